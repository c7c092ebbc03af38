//! Programs that manage interfaces, and whether they have been told to leave ours alone.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use crate::container;

/// Where systemd looks for configuration, under the root.
const SYSTEMD: [&str; 5] = ["etc", "run", "usr/local/lib", "usr/lib", "lib"];

/// Where `NetworkManager` does.
const NETWORK_MANAGER: [&str; 3] = ["etc", "run", "usr/lib"];

/// Is there as soon as systemd-networkd has run. Its folder says nothing: systemd makes that at every boot.
const NETWORKD_RUNS: &str = "run/systemd/netif/state";

const NETWORK_MANAGER_RUNS: &str = "run/NetworkManager";

/// What somebody who runs has not been told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gap {
    /// systemd-networkd: that our interfaces are not its own.
    NetworkdInterfaces,
    /// systemd-networkd: that our routes are not its own.
    NetworkdRoutes,
    /// `NetworkManager`: that our interfaces are not its own.
    NetworkManagerInterfaces,
}

impl fmt::Display for Gap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NetworkdInterfaces => {
                "systemd-networkd runs, and no .network file says that our interfaces are not its own: one that is for \
                 every interface changes addresses and routes of ours. Install \
                 deploy/host/systemd/network/00-polder.network in /etc/systemd/network, then `networkctl reload`"
            }
            Self::NetworkdRoutes => {
                "systemd-networkd runs, and deletes routes of others when it starts or sets an interface up anew: \
                 packets are lost until ours are back. Install deploy/host/systemd/networkd.conf.d/polder.conf in \
                 /etc/systemd/networkd.conf.d, then `systemctl restart systemd-networkd`"
            }
            Self::NetworkManagerInterfaces => {
                "NetworkManager runs, and is not told that our interfaces are not its own: it may change addresses and \
                 routes of ours. Install deploy/host/NetworkManager/conf.d/polder.conf in \
                 /etc/NetworkManager/conf.d, then `systemctl reload NetworkManager`"
            }
        })
    }
}

/// What is not looked at in a container, and why: its `/etc` and `/run` are not the host's.
pub fn not_looked_at() -> Option<String> {
    container::is_known().then(|| {
        "whether systemd-networkd or NetworkManager of the host changes our interfaces is not looked at: needs /etc and /run of the \
         host, which are not mounted. deploy/host has the files that keep them from it"
            .to_owned()
    })
}

/// What those who run have not been told. What cannot be seen, in a container perhaps, is not there.
pub fn gaps(root: &Path) -> Vec<Gap> {
    let mut gaps = Vec::new();
    if root.join(NETWORKD_RUNS).exists() {
        let networks =
            SYSTEMD.iter().flat_map(|base| files(&root.join(base).join("systemd/network"), "network"));
        if !networks.into_iter().any(|file| releases_ours(&file)) {
            gaps.push(Gap::NetworkdInterfaces);
        }
        let settings =
            SYSTEMD.iter().flat_map(|base| configuration(&root.join(base).join("systemd/networkd.conf")));
        let is_off = |file: PathBuf| has(&file, |key, value| key == "ManageForeignRoutes" && !truth(value));
        if !settings.into_iter().any(is_off) {
            gaps.push(Gap::NetworkdRoutes);
        }
    }
    if root.join(NETWORK_MANAGER_RUNS).exists() {
        let main = root.join("etc/NetworkManager/NetworkManager.conf");
        let folders = NETWORK_MANAGER.iter().map(|base| root.join(base).join("NetworkManager/conf.d"));
        let settings = folders.flat_map(|folder| files(&folder, "conf")).chain([main]);
        if !settings.into_iter().any(|file| leaves_ours(&file)) {
            gaps.push(Gap::NetworkManagerInterfaces);
        }
    }
    gaps
}

/// Whether it is for our interfaces, and says that they are not managed.
fn releases_ours(network: &Path) -> bool {
    has(network, |key, value| key == "Name" && is_ours(value))
        && has(network, |key, value| key == "Unmanaged" && truth(value))
}

/// Whether it keeps `NetworkManager` from our interfaces, in one way or the other.
fn leaves_ours(settings: &Path) -> bool {
    has(settings, |key, value| key.trim_end_matches('+') == "unmanaged-devices" && is_ours(value))
        || has(settings, |key, value| key == "match-device" && is_ours(value))
            && has(settings, |key, value| key == "managed" && !truth(value))
}

/// Whether these names are of interfaces of ours, whatever else they name.
fn is_ours(names: &str) -> bool {
    names.contains("polder")
}

/// As systemd writes it.
fn truth(value: &str) -> bool {
    ["1", "yes", "true", "on"].contains(&value.to_lowercase().as_str())
}

/// A file of settings, and those that add to it.
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

/// Whether the file has such a setting. One that cannot be read has none.
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

    /// What is shipped, as it is shipped.
    fn shipped(file: &str) -> String {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/host").join(file);
        fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    }

    #[test]
    fn whoever_does_not_run_need_not_be_told() {
        assert_eq!(gaps(root(&[("run/systemd/netif/leases/none", "")]).path()), []);
    }

    #[test]
    fn the_files_that_are_shipped_are_what_is_missed() {
        let running = [("run/systemd/netif/state", ""), ("run/NetworkManager/no-stub-resolv.conf", "")];
        let all = [Gap::NetworkdInterfaces, Gap::NetworkdRoutes, Gap::NetworkManagerInterfaces];
        assert_eq!(gaps(root(&running).path()), all);
        let places = [
            ("systemd/network/00-polder.network", "etc/systemd/network/00-polder.network"),
            ("systemd/networkd.conf.d/polder.conf", "etc/systemd/networkd.conf.d/polder.conf"),
            ("NetworkManager/conf.d/polder.conf", "etc/NetworkManager/conf.d/polder.conf"),
        ];
        for (gap, (file, place)) in all.iter().zip(places) {
            assert!(gap.to_string().contains(&format!("deploy/host/{file}")), "{gap}");
            assert!(gap.to_string().contains(Path::new(place).parent().unwrap().to_str().unwrap()), "{gap}");
            let text = shipped(file);
            let with = root(&[&running[..], &[(place, text.as_str())]].concat());
            let left: Vec<Gap> = all.into_iter().filter(|other| other != gap).collect();
            assert_eq!(gaps(with.path()), left, "with {file}");
        }
    }

    #[test]
    fn what_the_operator_has_said_elsewhere_is_said_and_what_is_for_others_is_not() {
        let own = root(&[
            ("run/systemd/netif/state", ""),
            (
                "usr/lib/systemd/network/10-cni.network",
                "[Match]\nName = cni0 polder* pld*\n[Link]\nUnmanaged = true\n",
            ),
            ("etc/systemd/networkd.conf", "[Network]\nManageForeignRoutes=false\n"),
        ]);
        assert_eq!(gaps(own.path()), []);
        let of_others = root(&[
            ("run/systemd/netif/state", ""),
            ("run/NetworkManager/state", ""),
            ("etc/systemd/network/all.network", "[Match]\nName=*\n[Network]\nDHCP=yes\n"),
            ("etc/systemd/network/cni.network", "[Match]\nName=cali*\n[Link]\nUnmanaged=yes\n"),
            ("etc/systemd/network/polder.network", "[Match]\nName=polder0\n[Link]\nUnmanaged=no\n"),
            ("etc/systemd/networkd.conf", "[Network]\n#ManageForeignRoutes=no\n"),
            ("etc/NetworkManager/NetworkManager.conf", "[keyfile]\nunmanaged-devices=interface-name:cali*\n"),
        ]);
        assert_eq!(gaps(of_others.path()).len(), 3);
    }
}
