//! etcd's addresses: those in the configuration, those that configured names resolve to, and those of open connections.
//! Pod routes must not make them unreachable ([`crate::kernel::guard`]).

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::IpAddr;
use std::os::fd::RawFd;
use std::time::Duration;

use nix::sys::socket::{SockaddrStorage, getpeername};
use polder_ipam::needed::{RequiredFor, RequiredRange};
use polder_store::etcd::config::EtcdConfig;
use polder_store::etcd::endpoint::{EtcdEndpoint, UrlHost};
use polder_store::etcd::lookup::{MemberLookup, ResolvedMember};
use tokio::sync::watch;
use tokio::time::sleep;
use tracing::{info, warn};

use crate::config::StoreConfig;
use crate::wake::WakeSender;

/// Pause between lookups after all names were resolved.
const LOOKUP_INTERVAL: Duration = Duration::from_secs(10);

/// Pause between lookups after a failure.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);

/// The file with the host's name servers.
const RESOLV_CONF: &str = "/etc/resolv.conf";

/// The address in a URL; `None` if the host is a name.
pub fn address(url: &str) -> Option<IpAddr> {
    match EtcdEndpoint::parse(url)?.host {
        UrlHost::Address(address) => Some(address),
        UrlHost::Name(_) => None,
    }
}

/// The name servers in the text of a `resolv.conf`.
fn name_servers(text: &str) -> Vec<IpAddr> {
    let servers = text.lines().filter_map(|line| line.trim().strip_prefix("nameserver"));
    servers.filter_map(|server| server.trim().parse().ok()).collect()
}

/// The remote addresses of this process's connections to one of the ports.
fn connected_to(ports: &BTreeSet<u16>) -> Vec<IpAddr> {
    let Ok(descriptors) = fs::read_dir("/proc/self/fd") else { return Vec::new() };
    let numbers = descriptors.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let peers = numbers.filter_map(|descriptor: RawFd| {
        // Fails for descriptors that are not connected sockets.
        let peer: SockaddrStorage = getpeername(descriptor).ok()?;
        let v4 = peer.as_sockaddr_in().map(|peer| (IpAddr::V4(peer.ip()), peer.port()));
        v4.or_else(|| peer.as_sockaddr_in6().map(|peer| (IpAddr::V6(peer.ip()), peer.port())))
    });
    peers.filter(|(_, port)| ports.contains(port)).map(|(address, _)| address.to_canonical()).collect()
}

/// The addresses as required ranges, without duplicates.
fn required_ranges(addresses: impl Iterator<Item = (String, IpAddr)>) -> Vec<RequiredRange> {
    let remote = addresses.filter(|(_, address)| !address.is_loopback() && !address.is_unspecified());
    // The first description of an address is the best one.
    let mut by_address = BTreeMap::new();
    for (what, address) in remote {
        by_address.entry(address).or_insert(what);
    }
    by_address
        .into_iter()
        .map(|(address, what)| RequiredRange::host(address, RequiredFor::Store(what)))
        .collect()
}

/// The inputs of the task, and the value that it publishes.
#[derive(Debug)]
pub struct Task {
    /// The configured datastore.
    pub store: StoreConfig,
    /// etcd's addresses; `None` until the first lookup.
    pub addresses: watch::Sender<Option<Vec<RequiredRange>>>,
    /// Wakes the engine when the addresses have changed.
    pub engine_wake: WakeSender,
}

/// Sources of etcd's addresses.
trait AddressSources {
    /// Whether names are configured, whose addresses can change.
    fn has_names(&self) -> bool;

    /// All members, and the error of a failed lookup.
    fn look_up(&mut self) -> impl Future<Output = (Vec<ResolvedMember>, Option<String>)> + Send;

    /// The remote addresses of this process's connections to one of the ports.
    fn connected_to(&self, ports: &BTreeSet<u16>) -> Vec<IpAddr>;

    /// The host's name servers.
    fn name_servers(&self) -> Vec<IpAddr>;
}

impl AddressSources for MemberLookup {
    fn has_names(&self) -> bool {
        Self::has_names(self)
    }

    async fn look_up(&mut self) -> (Vec<ResolvedMember>, Option<String>) {
        Self::look_up(self).await
    }

    fn connected_to(&self, ports: &BTreeSet<u16>) -> Vec<IpAddr> {
        connected_to(ports)
    }

    fn name_servers(&self) -> Vec<IpAddr> {
        name_servers(&fs::read_to_string(RESOLV_CONF).unwrap_or_default())
    }
}

impl Task {
    /// Runs for ever.
    pub async fn run(self) {
        let config = match &self.store {
            StoreConfig::Etcd(etcd) => etcd.clone(),
            StoreConfig::Embedded => EtcdConfig::default(),
        };
        self.resolve(MemberLookup::new(&config)).await;
    }

    /// Looks addresses up for ever.
    async fn resolve(&self, mut sources: impl AddressSources) {
        // Ports of all members found by name so far: connections to former members may be in use.
        let mut ports = BTreeSet::new();
        loop {
            let (members, problem) = sources.look_up().await;
            ports.extend(members.iter().filter(|found| found.origin.is_some()).map(|found| found.port));
            let members = members.into_iter().map(|ResolvedMember { url, address, origin, .. }| {
                (format!("the address of etcd ({})", origin.map_or(url, |origin| origin.host)), address)
            });
            let connected = sources.connected_to(&ports).into_iter();
            let connected =
                connected.map(|address| ("the address of a connection to etcd".to_owned(), address));
            let servers = if sources.has_names() { sources.name_servers() } else { Vec::new() };
            let servers = servers
                .into_iter()
                .map(|server| (format!("the name server ({RESOLV_CONF}) that resolves etcd's name"), server));
            self.publish(required_ranges(members.chain(connected).chain(servers)));
            if !sources.has_names() {
                std::future::pending::<()>().await;
            }
            sleep(if problem.is_none() { LOOKUP_INTERVAL } else { RETRY_INTERVAL }).await;
        }
    }

    fn publish(&self, addresses: Vec<RequiredRange>) {
        let changed = self.addresses.send_if_modified(|known| {
            let changed = known.as_ref() != Some(&addresses);
            if changed {
                let texts: Vec<String> = addresses.iter().map(ToString::to_string).collect();
                match known {
                    None if texts.is_empty() => {}
                    None => info!("etcd addresses: {}", texts.join("; ")),
                    Some(_) => warn!("etcd addresses changed: {}", texts.join("; ")),
                }
                *known = Some(addresses);
            }
            changed
        });
        if changed {
            self.engine_wake.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use polder_store::etcd::lookup::LookupOrigin;
    use tokio::time::timeout;

    use super::*;
    use crate::wake::{WakeReceiver, wake_channel};

    /// Name servers and connections that the test sets.
    #[derive(Debug, Clone, Default)]
    struct Fake(Arc<Mutex<State>>);

    #[derive(Debug, Default)]
    struct State {
        members: Vec<ResolvedMember>,
        problem: Option<String>,
        connected: Vec<IpAddr>,
        lookups: usize,
    }

    impl Fake {
        fn with<T>(&self, action: impl FnOnce(&mut State) -> T) -> T {
            action(&mut self.0.lock().unwrap())
        }
    }

    impl AddressSources for Fake {
        fn has_names(&self) -> bool {
            true
        }

        async fn look_up(&mut self) -> (Vec<ResolvedMember>, Option<String>) {
            self.with(|state| {
                state.lookups += 1;
                (state.members.clone(), state.problem.clone())
            })
        }

        fn connected_to(&self, ports: &BTreeSet<u16>) -> Vec<IpAddr> {
            self.with(|state| if ports.contains(&2379) { state.connected.clone() } else { Vec::new() })
        }

        fn name_servers(&self) -> Vec<IpAddr> {
            vec!["10.0.0.53".parse().unwrap()]
        }
    }

    fn member(address: &str) -> ResolvedMember {
        let origin = Some(LookupOrigin { source: "http://etcd:2379".to_owned(), host: "etcd".to_owned() });
        ResolvedMember { url: String::new(), address: address.parse().unwrap(), port: 2379, origin }
    }

    fn task() -> (Task, watch::Receiver<Option<Vec<RequiredRange>>>, WakeReceiver) {
        let (addresses, receiver) = watch::channel(None);
        let (engine_wake, wake) = wake_channel();
        (Task { store: StoreConfig::Embedded, addresses, engine_wake }, receiver, wake)
    }

    /// Lets the task run for that long.
    async fn run(running: &mut (impl Future<Output = ()> + Unpin), time: Duration) {
        assert!(timeout(time, running).await.is_err(), "the task ended");
    }

    async fn was_woken(wake: &WakeReceiver) -> bool {
        timeout(Duration::ZERO, wake.woken()).await.is_ok()
    }

    fn published(receiver: &watch::Receiver<Option<Vec<RequiredRange>>>) -> Vec<String> {
        receiver.borrow().iter().flatten().map(ToString::to_string).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn an_old_etcd_address_stays_published_while_a_connection_uses_it() {
        let (sources, (task, receiver, wake)) = (Fake::default(), task());
        sources.with(|state| state.members.push(member("10.0.0.1")));
        let mut running = Box::pin(task.resolve(sources.clone()));
        run(&mut running, LOOKUP_INTERVAL / 2).await;
        let server = "10.0.0.53, the name server (/etc/resolv.conf) that resolves etcd's name";
        assert_eq!(published(&receiver), ["10.0.0.1, the address of etcd (etcd)", server]);
        assert!(was_woken(&wake).await);
        run(&mut running, LOOKUP_INTERVAL).await;
        assert!(!was_woken(&wake).await, "nothing has changed");
        sources.with(|state| {
            state.members = vec![member("10.0.0.2")];
            state.connected = vec!["10.0.0.1".parse().unwrap()];
        });
        run(&mut running, LOOKUP_INTERVAL).await;
        let both =
            ["10.0.0.1, the address of a connection to etcd", "10.0.0.2, the address of etcd (etcd)", server];
        assert_eq!(published(&receiver), both);
        assert!(was_woken(&wake).await);
    }

    #[tokio::test(start_paused = true)]
    async fn a_failed_name_lookup_is_repeated_sooner() {
        let (sources, (task, receiver, _wake)) = (Fake::default(), task());
        sources.with(|state| state.problem = Some("no name server answers".to_owned()));
        let mut running = Box::pin(task.resolve(sources.clone()));
        run(&mut running, RETRY_INTERVAL / 2).await;
        assert_eq!(published(&receiver).len(), 1, "only the name server is published");
        run(&mut running, RETRY_INTERVAL).await;
        assert_eq!(sources.with(|state| state.lookups), 2);
        sources.with(|state| state.problem = None);
        run(&mut running, LOOKUP_INTERVAL + RETRY_INTERVAL).await;
        assert_eq!(sources.with(|state| state.lookups), 4);
    }

    #[tokio::test(start_paused = true)]
    async fn endpoints_without_names_are_resolved_once() {
        let (task, receiver, wake) = task();
        let config =
            EtcdConfig { endpoints: vec!["http://10.0.0.1:2379".to_owned()], ..EtcdConfig::default() };
        let mut running = Box::pin(Task { store: StoreConfig::Etcd(config), ..task }.run());
        run(&mut running, LOOKUP_INTERVAL * 3).await;
        assert_eq!(published(&receiver), ["10.0.0.1, the address of etcd (http://10.0.0.1:2379)"]);
        assert!(was_woken(&wake).await);
    }

    #[test]
    fn the_address_of_an_endpoint_is_parsed_from_its_url() {
        for (url, expected) in [
            ("http://10.0.0.1:2379", Some("10.0.0.1")),
            ("https://[fd00::1]:2379", Some("fd00::1")),
            ("http://10.0.0.1", Some("10.0.0.1")),
            ("http://etcd.example:2379", None),
        ] {
            assert_eq!(address(url), expected.map(|address| address.parse().unwrap()), "{url}");
        }
    }

    #[test]
    fn name_servers_are_parsed_from_the_resolver_configuration() {
        let text = "# nameserver 10.9.9.9\nsearch example\nnameserver 10.0.0.53\nnameserver fd00::53\n";
        assert_eq!(
            name_servers(text),
            ["10.0.0.53", "fd00::53"].map(|server| server.parse::<IpAddr>().unwrap())
        );
    }

    #[test]
    fn the_peer_address_of_a_connection_is_found_by_its_port() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        assert_eq!(connected_to(&[port].into()), Vec::<IpAddr>::new());
        let _connection = std::net::TcpStream::connect(("127.0.0.1", port)).unwrap();
        assert_eq!(connected_to(&[port].into()), ["127.0.0.1".parse::<IpAddr>().unwrap()]);
    }

    #[test]
    fn required_ranges_have_no_duplicates_and_no_loopback_addresses() {
        let found = [("first", "10.0.0.1"), ("second", "10.0.0.1"), ("local", "127.0.0.53")];
        let found = required_ranges(
            found.map(|(what, address)| (what.to_owned(), address.parse().unwrap())).into_iter(),
        );
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].to_string(), "10.0.0.1, first");
    }
}
