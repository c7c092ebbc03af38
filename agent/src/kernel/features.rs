//! Kernel features that Polder uses, detected by tests in a temporary network namespace, or derived from the kernel
//! release if no namespace can be created.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;

use polder_api::{Family, IfName, Mac};
use polder_ipam::ids::ClusterId;
use polder_ipam::record::ClusterRecord;
use polder_netlink::link::{Port, VethPair};
use polder_netlink::nft::{Elements, FilterSocket, NatAnchor};
use polder_netlink::{Error, RouteSocket, link, namespace};
use tracing::info;

use super::ruleset;
use super::sysctl::Sysctls;
use super::tunnel::Encapsulation;
use crate::capability::Capability;

/// Detected kernel features.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "each is there or not, whatever the others are")]
pub struct Features {
    /// Bridge ports can be locked to a MAC address (Linux 5.18).
    pub locked_ports: bool,
    /// Tunnel devices are available.
    pub tunnels: bool,
    /// Tables of nftables can belong to a process (Linux 5.12).
    pub owned_tables: bool,
    /// IPv6 is available.
    pub ipv6: bool,
    /// The programs of the fast path are loaded.
    pub fast_path: bool,
    /// Whether the features were tested, and not derived from the release.
    pub tried: bool,
}

/// A required feature is missing.
#[derive(Debug, thiserror::Error)]
pub enum FeatureError {
    /// The agent lacks the capability `NET_ADMIN`.
    #[error("polder-agent needs the capability NET_ADMIN: run it as root, or add NET_ADMIN to its container")]
    NotAllowed,
    /// The network namespace for the tests cannot be opened.
    #[error(
        "cannot open the test network namespace /proc/thread-self/ns/net: mount /proc in the agent's container"
    )]
    Namespace(#[source] io::Error),
    /// The kernel denies netlink sockets.
    #[error(
        "cannot use netlink: run polder-agent as root with the capability NET_ADMIN, and load module nfnetlink"
    )]
    NoNetlink(#[source] Error),
    /// The kernel has no bridges: its module is missing or not loaded.
    #[error("the kernel cannot create a bridge: load module bridge")]
    NoBridge(#[source] Error),
    /// The bridge that was created for the tests cannot be read.
    ///
    /// Remedy: correct the cause that the kernel reports at the end of the text, and start polder-agent again.
    #[error("cannot read the test bridge trial from the kernel")]
    BridgeUnread(#[source] Error),
    /// The kernel has no veth pairs: its module is missing or not loaded.
    #[error("the kernel cannot create a veth pair: load module veth")]
    NoVeth(#[source] Error),
    /// The interface that was created for the tests cannot be read.
    ///
    /// Remedy: correct the cause that the kernel reports at the end of the text, and start polder-agent again.
    #[error("cannot read the test interface trialhost from the kernel")]
    InterfaceUnread(#[source] Error),
    /// The kernel rejects Polder's packet filter: a module of nftables is missing or not loaded.
    #[error(
        "the kernel cannot filter with nftables: load modules nf_tables, nft_fib_inet, nft_masq, nft_nat and \
         nft_chain_nat; the kernel needs CONFIG_NF_TABLES_INET and CONFIG_NF_TABLES_ARP"
    )]
    NoNftables(#[source] Error),
    /// The kernel accepts the isolation of bridge ports, but ignores it.
    #[error("the kernel does not isolate bridge ports: Linux 5.10 or newer is needed")]
    NotIsolated,
}

const TRIAL_MAC: Mac = Mac([2, 0, 0, 0, 0, 1]);

impl Features {
    /// All features, as in a new kernel.
    #[cfg(test)]
    pub(crate) const ALL: Self = Self {
        locked_ports: true,
        tunnels: true,
        owned_tables: true,
        ipv6: true,
        fast_path: true,
        tried: true,
    };

    /// Tests all required features and detects the optional ones. If no namespace can be created, derives them from the
    /// kernel release. A missing feature that the release does not show causes a failure of the first pass, which names
    /// it.
    pub fn find_out(sysctls: &Sysctls) -> Result<Self, FeatureError> {
        if !Capability::NetAdmin.is_held() {
            return Err(FeatureError::NotAllowed);
        }
        let ipv6 = sysctls.has_family(Family::V6);
        match namespace::run_in_new(probe) {
            Ok(found) => found.map(|found| Self { ipv6, ..found }),
            Err(error) => {
                info!(%error, "cannot create a network namespace: the kernel features are not tested at the start");
                let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
                Ok(Self {
                    locked_ports: is_since(&release, (5, 18)),
                    tunnels: true,
                    owned_tables: is_since(&release, (5, 12)),
                    ipv6,
                    fast_path: false,
                    tried: false,
                })
            }
        }
    }

    /// Missing features and their consequences; `keeps_nat`: whether the kernel's NAT is to be kept running.
    pub fn missing(&self, keeps_nat: bool) -> Vec<String> {
        let consequences = [
            (
                self.locked_ports,
                "a pod can send with another source MAC address, but not with another source IP address: bridge ports \
                 cannot be locked before Linux 5.18, upgrade the kernel",
            ),
            (self.tunnels, Encapsulation::of(&trial_cluster()).unsupported_message()),
            (
                self.owned_tables || !keeps_nat,
                "nftables.keep_nat has no effect: nftables tables cannot belong to a process before Linux 5.12",
            ),
            (self.ipv6, "IPv6 is not available: pods get no IPv6 address"),
            (
                self.tried,
                "kernel features were not tested at start, because polder-agent cannot create a network namespace \
                 (needs SYS_ADMIN): a missing feature appears as a failure of the first pass",
            ),
        ];
        consequences.iter().filter(|(there, _)| !there).map(|(_, what)| (*what).to_owned()).collect()
    }
}

fn probe() -> Result<Features, FeatureError> {
    let mut socket = RouteSocket::open().map_err(FeatureError::NoNetlink)?;
    socket.execute_all(link::create_bridge("trial", TRIAL_MAC, 1450)).map_err(FeatureError::NoBridge)?;
    let port = try_port(&mut socket)?;
    if !port.isolated {
        return Err(FeatureError::NotIsolated);
    }
    let cluster = trial_cluster();
    let mut filter = FilterSocket::open().map_err(FeatureError::NoNetlink)?;
    filter
        .commit(ruleset::table(&cluster, &ruleset::lengths([])).install(&Elements::new()))
        .map_err(FeatureError::NoNftables)?;
    let owned_tables = NatAnchor::hold(ruleset::ANCHOR).is_ok();
    let tunnel = Encapsulation::of(&cluster).device(&cluster, None);
    let tunnels = socket.execute_all(tunnel.create("trialtunnel", TRIAL_MAC, 1450)).is_ok();
    Ok(Features {
        locked_ports: port.locked,
        tunnels,
        owned_tables,
        ipv6: true,
        fast_path: false,
        tried: true,
    })
}

/// Whether the kernel release is at least version `first` (major, minor).
fn is_since(release: &str, first: (u32, u32)) -> bool {
    let mut numbers = release.split(|character: char| !character.is_ascii_digit()).map(str::parse::<u32>);
    let mut next = || numbers.next().and_then(Result::ok).unwrap_or(0);
    (next(), next()) >= first
}

/// Creates a port like a pod's and reads its settings back: older kernels ignore unknown settings.
fn try_port(socket: &mut RouteSocket) -> Result<Port, FeatureError> {
    let name = |name: &str| -> IfName { name.parse().expect("a valid name") };
    let here = File::open("/proc/thread-self/ns/net").map_err(FeatureError::Namespace)?;
    let bridge = socket.link("trial").map_err(FeatureError::BridgeUnread)?;
    let pair = VethPair {
        name: &name("trialhost"),
        mac: None,
        peer_name: &name("trialpod"),
        peer_mac: TRIAL_MAC,
        peer_namespace: here.as_fd(),
        mtu: 1450,
        controller: bridge.map(|bridge| bridge.index),
    };
    let port = Port::of_pod(true);
    let operations = [link::create_veth(&pair), link::change("trialhost").port(&port).into()];
    socket.execute_all(operations).map_err(FeatureError::NoVeth)?;
    let made = socket.link("trialhost").map_err(FeatureError::InterfaceUnread)?;
    Ok(made.and_then(|link| link.port).unwrap_or(Port { isolated: false, locked: false, ..port }))
}

fn trial_cluster() -> ClusterRecord {
    ClusterRecord::new(ClusterId::new(String::new()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_kernel_features_are_reported_with_their_consequence() {
        let all = Features::ALL;
        assert_eq!(all.missing(true), Vec::<String>::new());
        let old = Features { locked_ports: false, ..all };
        assert!(old.missing(true)[0].contains("5.18"), "{:?}", old.missing(true));
        let older = Features { owned_tables: false, ..all };
        assert!(older.missing(true)[0].contains("keep_nat") && older.missing(false).is_empty());
        let untried = Features { tried: false, ..all };
        assert!(untried.missing(true)[0].contains("SYS_ADMIN"), "{:?}", untried.missing(true));
    }

    #[test]
    fn kernel_releases_are_compared_by_version() {
        for release in ["5.18.0", "6.1.0-18-amd64", "6.18.44-fc", "10.0"] {
            assert!(is_since(release, (5, 18)), "{release}");
        }
        for release in ["5.15.0-100-generic", "4.19", "5.17.15", ""] {
            assert!(!is_since(release, (5, 18)), "{release}");
        }
    }
}
