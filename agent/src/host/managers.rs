//! Programs that manage interfaces, and whether they are configured to ignore Polder's interfaces and routes.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use crate::container;

/// Folders under the root in which systemd reads configuration.
const SYSTEMD: [&str; 5] = ["etc", "run", "usr/local/lib", "usr/lib", "lib"];

/// Folders under the root in which `NetworkManager` reads configuration.
const NETWORK_MANAGER: [&str; 3] = ["etc", "run", "usr/lib"];

/// Exists if systemd-networkd has run. Its folder is no indication, because systemd creates it at every boot.
const NETWORKD_RUNS: &str = "run/systemd/netif/state";

const NETWORK_MANAGER_RUNS: &str = "run/NetworkManager";

/// A setting that a running network manager lacks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MissingSetting {
    /// systemd-networkd: no `.network` file marks Polder's interfaces as unmanaged.
    NetworkdInterfaces,
    /// systemd-networkd: `ManageForeignRoutes` is not off, so it deletes Polder's routes.
    NetworkdRoutes,
    /// `NetworkManager`: Polder's interfaces are not excluded.
    NetworkManagerInterfaces,
}

impl fmt::Display for MissingSetting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NetworkdInterfaces => {
                "systemd-networkd is running and no .network file marks Polder's interfaces as unmanaged: a .network \
                 file that matches every interface changes their addresses and routes. Copy \
                 deploy/host/systemd/network/00-polder.network (deploy/host is /usr/share/doc/polder/host or \
                 /usr/local/share/doc/polder/host on this node) to /etc/systemd/network, then run `networkctl reload`"
            }
            Self::NetworkdRoutes => {
                "systemd-networkd is running and deletes foreign routes when it starts or reconfigures an interface: \
                 packets are lost until Polder restores its routes. Copy \
                 deploy/host/systemd/networkd.conf.d/polder.conf (deploy/host is /usr/share/doc/polder/host or \
                 /usr/local/share/doc/polder/host on this node) to /etc/systemd/networkd.conf.d, then run `systemctl \
                 restart systemd-networkd`"
            }
            Self::NetworkManagerInterfaces => {
                "NetworkManager is running and is not configured to ignore Polder's interfaces: it may change their \
                 addresses and routes. Copy deploy/host/NetworkManager/conf.d/polder.conf (deploy/host is \
                 /usr/share/doc/polder/host or /usr/local/share/doc/polder/host on this node) to \
                 /etc/NetworkManager/conf.d, then run `systemctl reload NetworkManager`"
            }
        })
    }
}

/// The check that is skipped in a container, whose `/etc` and `/run` are not the host's.
pub fn not_looked_at() -> Option<String> {
    container::is_known().then(|| {
        "cannot check in a container whether systemd-networkd or NetworkManager of the host changes Polder's \
         interfaces, because /etc and /run of the host are not mounted: install the files in deploy/host of the Polder \
         source on the host to prevent such changes"
            .to_owned()
    })
}

/// The settings that running network managers lack. Files that cannot be read, for example in a container, count as
/// absent.
pub fn missing_settings(root: &Path) -> Vec<MissingSetting> {
    let mut missing = Vec::new();
    if root.join(NETWORKD_RUNS).exists() {
        let networks =
            SYSTEMD.iter().flat_map(|base| files(&root.join(base).join("systemd/network"), "network"));
        if !networks.into_iter().any(|file| releases_ours(&file)) {
            missing.push(MissingSetting::NetworkdInterfaces);
        }
        let settings =
            SYSTEMD.iter().flat_map(|base| configuration(&root.join(base).join("systemd/networkd.conf")));
        let is_off = |file: PathBuf| has(&file, |key, value| key == "ManageForeignRoutes" && !truth(value));
        if !settings.into_iter().any(is_off) {
            missing.push(MissingSetting::NetworkdRoutes);
        }
    }
    if root.join(NETWORK_MANAGER_RUNS).exists() {
        let main = root.join("etc/NetworkManager/NetworkManager.conf");
        let folders = NETWORK_MANAGER.iter().map(|base| root.join(base).join("NetworkManager/conf.d"));
        let settings = folders.flat_map(|folder| files(&folder, "conf")).chain([main]);
        if !settings.into_iter().any(|file| leaves_ours(&file)) {
            missing.push(MissingSetting::NetworkManagerInterfaces);
        }
    }
    missing
}

/// Whether the file matches Polder's interfaces and sets them to unmanaged.
fn releases_ours(network: &Path) -> bool {
    has(network, |key, value| key == "Name" && is_ours(value))
        && has(network, |key, value| key == "Unmanaged" && truth(value))
}

/// Whether the file excludes Polder's interfaces from `NetworkManager`, by either of its two settings.
fn leaves_ours(settings: &Path) -> bool {
    has(settings, |key, value| key.trim_end_matches('+') == "unmanaged-devices" && is_ours(value))
        || has(settings, |key, value| key == "match-device" && is_ours(value))
            && has(settings, |key, value| key == "managed" && !truth(value))
}

/// Whether these names include Polder's interfaces.
fn is_ours(names: &str) -> bool {
    names.contains("polder")
}

/// The value of a systemd boolean.
fn truth(value: &str) -> bool {
    ["1", "yes", "true", "on"].contains(&value.to_lowercase().as_str())
}

/// A configuration file and its drop-in files.
fn configuration(main: &Path) -> Vec<PathBuf> {
    let mut all = files(&main.with_added_extension("d"), "conf");
    all.push(main.to_owned());
    all
}

fn files(folder: &Path, extension: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten();
    let paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
    paths.filter(|path| path.extension().is_some_and(|found| found == extension)).collect()
}

/// Whether the file has a matching setting. A file that cannot be read has no settings.
fn has(file: &Path, is_meant: impl Fn(&str, &str) -> bool) -> bool {
    let text = fs::read_to_string(file).unwrap_or_default();
    let settings = text.lines().filter_map(|line| line.split_once('='));
    settings.into_iter().any(|(key, value)| is_meant(key.trim(), value.trim()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn root(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        root
    }

    /// Content of a file in `deploy/host`.
    fn shipped(file: &str) -> String {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/host").join(file);
        fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    }

    #[test]
    fn managers_that_do_not_run_lack_no_settings() {
        assert_eq!(missing_settings(root(&[("run/systemd/netif/leases/none", "")]).path()), []);
    }

    #[test]
    fn the_shipped_files_contain_the_missing_settings() {
        let running = [("run/systemd/netif/state", ""), ("run/NetworkManager/no-stub-resolv.conf", "")];
        let all = [
            MissingSetting::NetworkdInterfaces,
            MissingSetting::NetworkdRoutes,
            MissingSetting::NetworkManagerInterfaces,
        ];
        assert_eq!(missing_settings(root(&running).path()), all);
        let places = [
            ("systemd/network/00-polder.network", "etc/systemd/network/00-polder.network"),
            ("systemd/networkd.conf.d/polder.conf", "etc/systemd/networkd.conf.d/polder.conf"),
            ("NetworkManager/conf.d/polder.conf", "etc/NetworkManager/conf.d/polder.conf"),
        ];
        for (setting, (file, place)) in all.iter().zip(places) {
            assert!(setting.to_string().contains(&format!("deploy/host/{file}")), "{setting}");
            assert!(
                setting.to_string().contains(Path::new(place).parent().unwrap().to_str().unwrap()),
                "{setting}"
            );
            let text = shipped(file);
            let with = root(&[&running[..], &[(place, text.as_str())]].concat());
            let left: Vec<MissingSetting> = all.into_iter().filter(|other| other != setting).collect();
            assert_eq!(missing_settings(with.path()), left, "with {file}");
        }
    }

    #[test]
    fn settings_in_other_files_count_but_settings_for_other_interfaces_do_not() {
        let own = root(&[
            ("run/systemd/netif/state", ""),
            (
                "usr/lib/systemd/network/10-cni.network",
                "[Match]\nName = cni0 polder* pld*\n[Link]\nUnmanaged = true\n",
            ),
            ("etc/systemd/networkd.conf", "[Network]\nManageForeignRoutes=false\n"),
        ]);
        assert_eq!(missing_settings(own.path()), []);
        let foreign = root(&[
            ("run/systemd/netif/state", ""),
            ("run/NetworkManager/state", ""),
            ("etc/systemd/network/all.network", "[Match]\nName=*\n[Network]\nDHCP=yes\n"),
            ("etc/systemd/network/cni.network", "[Match]\nName=cali*\n[Link]\nUnmanaged=yes\n"),
            ("etc/systemd/network/polder.network", "[Match]\nName=polder0\n[Link]\nUnmanaged=no\n"),
            ("etc/systemd/networkd.conf", "[Network]\n#ManageForeignRoutes=no\n"),
            ("etc/NetworkManager/NetworkManager.conf", "[keyfile]\nunmanaged-devices=interface-name:cali*\n"),
        ]);
        assert_eq!(missing_settings(foreign.path()).len(), 3);
    }
}
