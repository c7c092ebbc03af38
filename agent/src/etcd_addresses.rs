//! At which addresses etcd is: those of the configuration, those that its names stand for, and those of the connections
//! in use. The pods' network must not take them from the node ([`crate::kernel::guard`]).

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::IpAddr;
use std::os::fd::RawFd;
use std::time::Duration;

use nix::sys::socket::{SockaddrStorage, getpeername};
use polder_ipam::needed::{Needed, What};
use polder_store::etcd::config::EtcdConfig;
use polder_store::etcd::endpoint::{Endpoint, Host};
use polder_store::etcd::lookup::{Found, Lookup};
use tokio::sync::watch;
use tokio::time::sleep;
use tracing::{info, warn};

use crate::bell::Bell;
use crate::config::StoreConfig;

/// How often names are looked up: after all of them were found, and after one was not.
const PAUSE: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(1));

/// Where the host's name servers are written.
const RESOLVER: &str = "/etc/resolv.conf";

/// The address in a URL, if it is one and not a name.
pub fn address(url: &str) -> Option<IpAddr> {
    match Endpoint::parse(url)?.host {
        Host::Address(address) => Some(address),
        Host::Name(_) => None,
    }
}

/// The name servers of a `resolv.conf`.
fn name_servers(text: &str) -> Vec<IpAddr> {
    let servers = text.lines().filter_map(|line| line.trim().strip_prefix("nameserver"));
    servers.filter_map(|server| server.trim().parse().ok()).collect()
}

/// The other ends of this process's connections to one of the ports.
fn connected_to(ports: &BTreeSet<u16>) -> Vec<IpAddr> {
    let Ok(descriptors) = fs::read_dir("/proc/self/fd") else { return Vec::new() };
    let numbers = descriptors.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let peers = numbers.filter_map(|descriptor: RawFd| {
        // What is no socket, or is not connected, has none.
        let peer: SockaddrStorage = getpeername(descriptor).ok()?;
        let v4 = peer.as_sockaddr_in().map(|peer| (IpAddr::V4(peer.ip()), peer.port()));
        v4.or_else(|| peer.as_sockaddr_in6().map(|peer| (IpAddr::V6(peer.ip()), peer.port())))
    });
    peers.filter(|(_, port)| ports.contains(port)).map(|(address, _)| address.to_canonical()).collect()
}

/// What the node needs for that, without repetition.
fn needed(addresses: impl Iterator<Item = (String, IpAddr)>) -> Vec<Needed> {
    let elsewhere = addresses.filter(|(_, address)| !address.is_loopback() && !address.is_unspecified());
    // The first word about an address is the best one.
    let mut by_address = BTreeMap::new();
    for (what, address) in elsewhere {
        by_address.entry(address).or_insert(what);
    }
    by_address.into_iter().map(|(address, what)| Needed::host(address, What::Store(what))).collect()
}

/// What is looked for, and the task's entry.
#[derive(Debug)]
pub struct Task {
    /// The store of the configuration.
    pub store: StoreConfig,
    /// Where etcd is; `None` until that was first looked for.
    pub found: watch::Sender<Option<Vec<Needed>>>,
    /// Rings when it has moved.
    pub underlay_changed: Bell,
}

impl Task {
    /// Runs for ever.
    pub async fn run(self) {
        let config = match &self.store {
            StoreConfig::Etcd(etcd) => etcd.clone(),
            StoreConfig::Embedded => EtcdConfig::default(),
        };
        let mut lookup = Lookup::new(&config);
        // Of all members that had a name so far: connections to those that have no more may be in use.
        let mut ports = BTreeSet::new();
        loop {
            let (members, problem) = lookup.look_up().await;
            ports.extend(members.iter().filter(|found| found.by.is_some()).map(|found| found.port));
            let members = members.into_iter().map(|Found { url, address, by, .. }| {
                (format!("the address of etcd ({})", by.map_or(url, |by| by.host)), address)
            });
            let connected = connected_to(&ports).into_iter();
            let connected =
                connected.map(|address| ("the address of a connection to etcd".to_owned(), address));
            let servers = if lookup.has_names() {
                name_servers(&fs::read_to_string(RESOLVER).unwrap_or_default())
            } else {
                Vec::new()
            };
            let servers = servers
                .into_iter()
                .map(|server| (format!("the name server ({RESOLVER}) that etcd is found by"), server));
            self.publish(needed(members.chain(connected).chain(servers)));
            if !lookup.has_names() {
                std::future::pending::<()>().await;
            }
            sleep(if problem.is_none() { PAUSE.0 } else { PAUSE.1 }).await;
        }
    }

    fn publish(&self, found: Vec<Needed>) {
        let changed = self.found.send_if_modified(|known| {
            let is_other = known.as_ref() != Some(&found);
            if is_other {
                let words: Vec<String> = found.iter().map(ToString::to_string).collect();
                match known {
                    None if words.is_empty() => {}
                    None => info!("etcd is at: {}", words.join("; ")),
                    Some(_) => warn!("etcd has moved. It is at: {}", words.join("; ")),
                }
                *known = Some(found);
            }
            is_other
        });
        if changed {
            self.underlay_changed.ring();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_address_of_an_endpoint_is_found_in_its_url() {
        for (url, found) in [
            ("http://10.0.0.1:2379", Some("10.0.0.1")),
            ("https://[fd00::1]:2379", Some("fd00::1")),
            ("http://10.0.0.1", Some("10.0.0.1")),
            ("http://etcd.example:2379", None),
        ] {
            assert_eq!(address(url), found.map(|address| address.parse().unwrap()), "{url}");
        }
    }

    #[test]
    fn name_servers_are_read_from_the_resolvers_file() {
        let text = "# nameserver 10.9.9.9\nsearch example\nnameserver 10.0.0.53\nnameserver fd00::53\n";
        assert_eq!(
            name_servers(text),
            ["10.0.0.53", "fd00::53"].map(|server| server.parse::<IpAddr>().unwrap())
        );
    }

    #[test]
    fn the_other_end_of_a_connection_is_found_by_its_port() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        assert_eq!(connected_to(&[port].into()), Vec::<IpAddr>::new());
        let _connection = std::net::TcpStream::connect(("127.0.0.1", port)).unwrap();
        assert_eq!(connected_to(&[port].into()), ["127.0.0.1".parse::<IpAddr>().unwrap()]);
    }

    #[test]
    fn an_address_is_needed_once_and_one_of_this_host_alone_is_not() {
        let found = [("first", "10.0.0.1"), ("second", "10.0.0.1"), ("local", "127.0.0.53")];
        let found =
            needed(found.map(|(what, address)| (what.to_owned(), address.parse().unwrap())).into_iter());
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].to_string(), "10.0.0.1, first");
    }
}
