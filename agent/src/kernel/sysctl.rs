//! Kernel settings under `/proc/sys`.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use nix::errno::Errno;
use polder_api::Family;
use polder_ipam::record::AttachMode;

use super::state::{Device, State};

/// The directory of the kernel's network settings. All settings of Polder are in it.
pub const USUAL_FOLDER: &str = "/proc/sys/net";

/// The kernel's network settings. Each read or write affects the network namespace of the calling thread.
#[derive(Debug, Clone)]
pub struct Sysctls {
    folder: PathBuf,
    read_only: bool,
}

/// The inputs of the settings.
#[derive(Debug, Clone, Copy)]
pub struct Inputs<'a> {
    /// The families in which every pod has an address.
    pub families: &'a BTreeSet<Family>,
    /// How pods are attached.
    pub attach: AttachMode,
    /// The desired state with the devices that the agent creates.
    pub state: &'a State,
    /// The `accept_ra` settings of foreign interfaces that would lose their router advertisements.
    pub accept_ra_paths: &'a [String],
    /// Foreign interfaces on which pods' packets arrive: from peers, and from outside the cluster.
    pub ingress_interfaces: &'a BTreeSet<String>,
    /// Whether a pod has a host port.
    pub has_host_ports: bool,
    /// Whether the programs of the fast path are loaded.
    pub has_fast_path: bool,
}

/// The desired settings, in the order of writing.
pub fn desired(inputs: Inputs<'_>) -> Vec<(String, String)> {
    let Inputs {
        families,
        attach,
        state,
        accept_ra_paths,
        ingress_interfaces,
        has_host_ports,
        has_fast_path,
    } = inputs;
    let mut settings = Vec::new();
    let mut set = |path: &str, value: &str| settings.push((path.to_owned(), value.to_owned()));
    if families.contains(&Family::V4) {
        // Before the settings of single interfaces: a change of this setting sets all of them to its value.
        set("net/ipv4/ip_forward", "1");
        // In IPv4, the interface on which a packet arrives decides whether it is forwarded (`IN_DEV_FORWARD` in
        // `ip_route_input_slow`, net/ipv4/route.c). In IPv6, only the setting of "all" decides (`ip6_forward` in
        // net/ipv6/ip6_output.c); the setting of an interface controls whether it accepts router advertisements, so it
        // is not changed.
        ingress_interfaces.iter().for_each(|name| set(&forwarding(name), "1"));
        // A pod's packet to another pod of its node leaves through the bridge on which it arrived, so the host would
        // send the pod a redirect. It would be wrong: ports are isolated. The kernel combines the settings of "all" and
        // of the bridge by OR.
        set("net/ipv4/conf/all/send_redirects", "0");
    }
    if families.contains(&Family::V6) {
        // A host that forwards ignores router advertisements and loses its default route, unless this setting is
        // written first.
        accept_ra_paths.iter().for_each(|path| set(path, "2"));
        set("net/ipv6/conf/all/forwarding", "1");
    }
    if attach == AttachMode::Bridge {
        // With br_netfilter, iptables rules are applied to bridged frames. A frame that a rule redirects to a pod on
        // the same bridge, as for a service, stays in the bridge (br_nf_pre_routing_finish in
        // net/bridge/br_netfilter_hooks.c), which drops it because its ports are isolated. This setting is not needed:
        // every packet of a pod passes the IP stack anyway. Other bridges may need it: `host/bridges.rs` reports them.
        families.iter().for_each(|family| set(bridge_calls(*family), "0"));
    }
    if attach == AttachMode::Bridge && has_host_ports && families.contains(&Family::V4) {
        // With it, the kernel accepts replies from pods to connections of the host to a host port on 127.0.0.1. The
        // packet filter drops other packets from pods to such addresses. It is not reset when the last pod with a host
        // port is gone: the plugin portmap of other software sets it, too.
        set(ROUTE_LOCALNET, "1");
    }
    if has_fast_path {
        // Connection tracking sees only some packets of a flow on the fast path. It would take the next one for invalid,
        // because the sequence numbers between are missing, and kube-proxy drops invalid packets.
        set(LIBERAL, "1");
    }
    for (device, name) in state.links.keys().filter_map(|device| Some((device, device.name()?))) {
        if families.contains(&Family::V4) {
            set(&forwarding(name), "1");
            set(&format!("net/ipv4/conf/{name}/send_redirects"), "0");
            // The packet filter binds every pod to its own address, and replies to packets from a tunnel may use a
            // direct path. Only 0 accepts these packets in all cases: while a device has no address, loose mode (2) is
            // as strict as strict mode (__fib_validate_source in net/ipv4/fib_frontend.c).
            set(&format!("net/ipv4/conf/{name}/rp_filter"), "0");
        }
        if families.contains(&Family::V6) && state.has_family(device, Family::V6) {
            // IPv6 may be disabled on new interfaces. Without it, Polder's devices can have neither IPv6 addresses nor
            // routes.
            set(&format!("net/ipv6/conf/{name}/disable_ipv6"), "0");
            set(&format!("net/ipv6/conf/{name}/accept_ra"), "0");
        }
    }
    settings
}

/// The setting: whether IPv4 packets that arrive on the interface are forwarded.
fn forwarding(interface: &str) -> String {
    format!("net/ipv4/conf/{interface}/forwarding")
}

/// The setting: whether packets from and to loopback addresses may use the bridge. Without it, only the host's own
/// connections to host ports on 127.0.0.1 fail.
pub const ROUTE_LOCALNET: &str = "net/ipv4/conf/polder0/route_localnet";

/// The setting: whether connection tracking accepts packets of TCP outside the window that it knows.
pub const LIBERAL: &str = "net/netfilter/nf_conntrack_tcp_be_liberal";

/// The command to write a setting on the host, if the agent cannot: in a container, `/proc/sys` may be read-only.
pub fn command(path: &str, value: &str) -> String {
    format!("sysctl -w {path}={value}")
}

/// The setting: whether iptables rules are applied to frames on all bridges. If it is 0, the setting of each bridge
/// decides (`br_nf_pre_routing` in `net/bridge/br_netfilter_hooks.c`), so that a 1 here cannot be undone for one bridge.
pub const fn bridge_calls(family: Family) -> &'static str {
    match family {
        Family::V4 => "net/bridge/bridge-nf-call-iptables",
        Family::V6 => "net/bridge/bridge-nf-call-ip6tables",
    }
}

/// Whether the setting may be missing: the modules `br_netfilter` and `nf_conntrack` may not be loaded, and foreign
/// interfaces appear and disappear.
pub fn may_be_missing(path: &str) -> bool {
    let interface = path.strip_prefix("net/ipv4/conf/").and_then(|rest| rest.strip_suffix("/forwarding"));
    let is_foreign = interface.is_some_and(|name| Device::named(name).is_none());
    is_foreign || path == LIBERAL || Family::BOTH.map(bridge_calls).contains(&path)
}

/// The directory does not contain the kernel's network settings: `/proc` is not mounted, or the configuration names
/// another directory.
#[derive(Debug, thiserror::Error)]
#[error(
    "proc_sys_net {}: this directory does not contain the kernel's network settings. In a container, mount the host's \
     {USUAL_FOLDER} at this path",
    folder.display()
)]
pub struct NoSysctls {
    /// The configured directory.
    pub folder: PathBuf,
}

/// Settings whose changes are detected by frequent reads. Their files stay open, because to find a file takes the
/// kernel longer than to read it.
#[derive(Debug, Default)]
pub struct WatchedSettings(Vec<WatchedSetting>);

#[derive(Debug)]
struct WatchedSetting {
    path: PathBuf,
    /// The value that it should have.
    value: String,
    file: Option<File>,
}

impl WatchedSettings {
    /// Whether an existing setting has another value.
    pub fn differ(&mut self) -> bool {
        self.0.iter_mut().any(|setting| setting.read().is_ok_and(|value| value != setting.value))
    }
}

impl WatchedSetting {
    fn read(&mut self) -> io::Result<String> {
        // The file of a deleted interface cannot be read any more. There may be a new interface of that name.
        if let Some(Ok(value)) = self.file.as_ref().map(read) {
            return Ok(value);
        }
        let file = self.file.insert(File::open(&self.path)?);
        read(file)
    }
}

fn read(file: &File) -> io::Result<String> {
    let mut value = [0; LONGEST];
    // The kernel returns the complete value to one read from the beginning.
    let length = file.read_at(&mut value, 0)?;
    let value = str::from_utf8(&value[..length]).map_err(|_| io::Error::from(io::ErrorKind::InvalidData))?;
    Ok(value.trim().to_owned())
}

/// Largest length of a value, in bytes: each is one number.
const LONGEST: usize = 64;

impl Sysctls {
    /// The settings in that folder: `/proc/sys/net`, or another mount of it. In an unprivileged container, `/proc/sys`
    /// is read-only, and nothing can be mounted there.
    pub fn at(folder: PathBuf) -> Result<Self, NoSysctls> {
        let ipv4 = folder.join("ipv4");
        if !ipv4.is_dir() {
            return Err(NoSysctls { folder });
        }
        Ok(Self { folder, read_only: false })
    }

    /// The same settings, read-only.
    #[must_use]
    pub fn read_only(&self) -> Self {
        Self { read_only: true, ..self.clone() }
    }

    /// Reads the settings that exist.
    pub fn read<'a>(&self, paths: impl IntoIterator<Item = &'a String>) -> BTreeMap<String, String> {
        let value = |path: &String| Some((path.clone(), self.get(path).ok()?));
        paths.into_iter().filter_map(value).collect()
    }

    /// Reads one setting, by its path under `/proc/sys`, without surrounding white space.
    pub fn get(&self, path: &str) -> io::Result<String> {
        read(&File::open(self.full(path))?)
    }

    /// The settings with these values, by path, for frequent checks.
    pub fn watch(&self, settings: &[(String, String)]) -> WatchedSettings {
        let watched = |(path, value): &(String, String)| WatchedSetting {
            path: self.full(path),
            value: value.clone(),
            file: None,
        };
        WatchedSettings(settings.iter().map(watched).collect())
    }

    /// Writes one setting, by its path under `/proc/sys`.
    pub fn set(&self, path: &str, value: &str) -> io::Result<()> {
        if self.read_only {
            return Err(io::ErrorKind::ReadOnlyFilesystem.into());
        }
        fs::write(self.full(path), value)
    }

    /// The settings that the kernel changes together with this setting, with their current values. Settings
    /// that will get their current value back when this setting returns to 0 are omitted: see `inet_forward_change` in
    /// `net/ipv4/devinet.c`, and `addrconf_fixup_forwarding` in `net/ipv6/addrconf.c`.
    pub fn changed_with(&self, path: &str) -> Vec<(String, String)> {
        let folder = match path {
            "net/ipv4/ip_forward" => "net/ipv4/conf",
            "net/ipv6/conf/all/forwarding" => "net/ipv6/conf",
            _ => return Vec::new(),
        };
        let names = self.interfaces(folder);
        let forwarding = names.filter(|name| name != "all").map(|name| format!("{folder}/{name}/forwarding"));
        let redirects = "net/ipv4/conf/all/accept_redirects".to_owned();
        let all = forwarding.map(|path| (path, "1")).chain([(redirects, "0")]);
        let has_that_value = |(path, value): &(String, &str)| {
            path.starts_with(folder) && self.get(path).is_ok_and(|now| now == *value)
        };
        all.filter(has_that_value).map(|(path, value)| (path, value.to_owned())).collect()
    }

    /// Whether this kernel supports that family.
    pub fn has_family(&self, family: Family) -> bool {
        let folder = match family {
            Family::V4 => "net/ipv4",
            Family::V6 => "net/ipv6/conf/all",
        };
        self.full(folder).exists()
    }

    /// The `accept_ra` settings of foreign interfaces that accept router advertisements only while the host does not
    /// forward IPv6. Empty if the host forwards IPv6 already.
    pub fn accept_ra_paths(&self) -> Vec<String> {
        if self.get("net/ipv6/conf/all/forwarding").is_ok_and(|value| value != "0") {
            return Vec::new();
        }
        let foreign = self.interfaces("net/ipv6/conf").filter(|name| Device::named(name).is_none());
        let paths = foreign.filter(|name| !["all", "default", "lo"].contains(&name.as_str()));
        let paths = paths.map(|name| format!("net/ipv6/conf/{name}/accept_ra"));
        paths.filter(|path| self.get(path).is_ok_and(|value| value == "1")).collect()
    }

    /// The directory names in a folder of interface settings: interfaces, `all` and `default`.
    fn interfaces(&self, folder: &str) -> impl Iterator<Item = String> {
        let entries = fs::read_dir(self.full(folder)).into_iter().flatten().flatten();
        entries.filter_map(|entry| entry.file_name().into_string().ok())
    }

    /// The file of a setting.
    fn full(&self, path: &str) -> PathBuf {
        self.folder.join(path.strip_prefix("net/").unwrap_or(path))
    }
}

/// The remedy for a setting that the kernel refused to write.
pub fn remedy(refused: &io::Error) -> &'static str {
    match refused.raw_os_error().map(Errno::from_raw) {
        // Runtimes mount /proc/sys read-only in every unprivileged container.
        Some(Errno::EROFS) => {
            "mount the host's /proc/sys/net into the agent's container and set proc_sys_net to that path"
        }
        Some(Errno::EPERM) => "give the agent the capability NET_ADMIN",
        Some(Errno::EACCES) => {
            "allow it in AppArmor or SELinux; in a container, mount the host's /proc/sys/net and set proc_sys_net to \
             that path"
        }
        _ => "allow the agent to write it",
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use polder_netlink::namespace;

    use super::*;

    #[test]
    fn a_watched_setting_is_read_again_after_its_interface_was_replaced() {
        let run =
            |command: &str| assert!(Command::new("sh").args(["-ec", command]).status().unwrap().success());
        namespace::run_in_new(|| {
            run("ip link add d0 type bridge");
            let sysctls = Sysctls::at(PathBuf::from(USUAL_FOLDER)).unwrap();
            let path = "net/ipv4/conf/d0/rp_filter".to_owned();
            sysctls.set(&path, "1").unwrap();
            let mut watched = sysctls.watch(&[(path.clone(), "1".to_owned())]);
            assert!(!watched.differ());
            sysctls.set(&path, "2").unwrap();
            assert!(watched.differ());
            sysctls.set(&path, "1").unwrap();
            run("ip link delete d0");
            assert!(!watched.differ(), "it does not exist");
            run("ip link add d0 type bridge");
            sysctls.set(&path, "2").unwrap();
            assert!(watched.differ(), "a new interface");
        })
        .expect("tests of the kernel need root");
    }

    #[test]
    fn kernel_settings_are_read_and_written_in_the_configured_folder() {
        let folder = tempfile::tempdir().unwrap();
        let refused = Sysctls::at(folder.path().to_owned()).unwrap_err().to_string();
        assert!(refused.contains("proc_sys_net") && refused.contains("mount"), "{refused}");
        let all = folder.path().join("ipv6/conf/all");
        fs::create_dir_all(folder.path().join("ipv4/conf")).unwrap();
        fs::create_dir_all(&all).unwrap();
        fs::create_dir_all(folder.path().join("ipv6/conf/eth0")).unwrap();
        fs::write(all.join("forwarding"), "0\n").unwrap();
        fs::write(folder.path().join("ipv6/conf/eth0/accept_ra"), "1\n").unwrap();
        let sysctls = Sysctls::at(folder.path().to_owned()).unwrap();
        assert!(sysctls.has_family(Family::V6) && sysctls.has_family(Family::V4));
        assert_eq!(sysctls.accept_ra_paths(), ["net/ipv6/conf/eth0/accept_ra"]);
        sysctls.set("net/ipv6/conf/all/forwarding", "1").unwrap();
        assert_eq!(fs::read_to_string(all.join("forwarding")).unwrap(), "1");
        assert_eq!(sysctls.get("net/ipv6/conf/all/forwarding").unwrap(), "1");
        let refused = sysctls.read_only().set("net/ipv6/conf/all/forwarding", "0").unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::ReadOnlyFilesystem);
        assert_eq!(sysctls.get("net/ipv6/conf/all/forwarding").unwrap(), "1");
    }

    #[test]
    fn each_error_of_a_kernel_setting_has_its_own_remedy() {
        let remedy = |errno: Errno| remedy(&io::Error::from(errno));
        assert!(remedy(Errno::EROFS).contains("proc_sys_net"));
        assert!(remedy(Errno::EPERM).contains("NET_ADMIN"));
        assert!(remedy(Errno::EACCES).contains("AppArmor"));
    }

    #[test]
    fn settings_of_single_interfaces_are_written_after_the_setting_for_all_interfaces() {
        let (families, ingress_interfaces) = (Family::BOTH.into(), BTreeSet::from(["eth0.7".to_owned()]));
        let inputs = Inputs {
            families: &families,
            attach: AttachMode::Routed,
            state: &State::default(),
            accept_ra_paths: &[],
            ingress_interfaces: &ingress_interfaces,
            has_host_ports: false,
            has_fast_path: false,
        };
        let settings = desired(inputs);
        let at = |path: &str| settings.iter().position(|(found, _)| found == path);
        let (all, one) = (at("net/ipv4/ip_forward"), at("net/ipv4/conf/eth0.7/forwarding"));
        assert!(all.is_some() && all < one, "{settings:?}");
        assert!(may_be_missing("net/ipv4/conf/eth0.7/forwarding"), "it may be unplugged");
        assert!(!may_be_missing("net/ipv4/conf/polder0/forwarding"));
        assert!(!settings.iter().any(|(path, _)| path.contains("ipv6/conf/eth0.7")), "{settings:?}");
        assert!(!settings.iter().any(|(path, _)| path == LIBERAL), "{settings:?}");
        let with_fast_path = desired(Inputs { has_fast_path: true, ..inputs });
        assert!(with_fast_path.contains(&(LIBERAL.to_owned(), "1".to_owned())), "{with_fast_path:?}");
        assert!(may_be_missing(LIBERAL), "without connection tracking");
    }
}
