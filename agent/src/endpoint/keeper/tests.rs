//! The keeper, with a host that the test controls.

use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Mutex;

use polder_api::message::{Attach, Permission, PodAddress};
use polder_ipam::Moment;
use polder_ipam::ledger::AttachmentKind;
use polder_ipam::registration::{Registration, RemovalProgress};
use tokio::time::timeout;

use polder_netlink::IfIndex;

use super::*;
use crate::fixture::Fixture;
use crate::node_state::Pass;

/// A host and its state.
#[derive(Clone)]
struct Fake {
    node_state: NodeState,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    /// Whether no address is available.
    is_full: bool,
    /// Whether creation fails.
    is_broken: bool,
    has_address: bool,
    /// Index of the existing interface.
    interface: Option<u32>,
    /// How often the endpoint was created, and published to the peers.
    made: u32,
    published: u32,
}

impl Fake {
    fn with<T>(&self, action: impl FnOnce(&mut State) -> T) -> T {
        action(&mut self.state.lock().unwrap())
    }
}

fn address() -> IpAddr {
    "10.244.0.2".parse().unwrap()
}

impl EndpointHost for Fake {
    fn node_state(&self) -> &NodeState {
        &self.node_state
    }

    async fn fits(&self, _: BTreeSet<Family>) -> bool {
        true
    }

    async fn allocate(&self, _: BTreeSet<Family>, mtu: u32) -> Result<Option<AttachmentEntry>, LedgerError> {
        let held = || AttachmentEntry {
            attachment: Attachment::of_probe(),
            kind: AttachmentKind::Pod,
            since: Moment::BOOT,
            addresses: vec![address()],
            mac: polder_api::Mac([2; 6]),
            mtu,
            netns: String::new(),
            pod: None,
            leaving: false,
            gateways: Vec::new(),
            ports: Vec::new(),
        };
        self.with(|state| {
            state.has_address = !state.is_full;
            Ok(state.has_address.then(held))
        })
    }

    fn wiring(&self, _: &ClusterRecord, held: &AttachmentEntry) -> Wiring {
        let addresses = held.addresses.iter();
        let gateway = "10.244.0.1".parse().unwrap();
        Wiring {
            host_interface: held.attachment.host_interface(),
            alias: String::new(),
            attach: Attach::Routed,
            mac: held.mac,
            mtu: held.mtu,
            addresses: addresses.map(|address| PodAddress { address: *address, gateway }).collect(),
            gateway_mac: held.mac,
            strays: Vec::new(),
            permission: Permission::Given,
        }
    }

    async fn index_of(&self, _: IfName) -> Result<Option<IfIndex>, Error> {
        Ok(self.with(|state| state.interface.map(IfIndex::new)))
    }

    async fn make(&self, _: Arc<File>, _: Wiring) -> Result<IfIndex, NotMade> {
        self.with(|state| {
            assert!(state.interface.is_none(), "the previous interface still exists");
            if state.is_broken {
                return Err(EndpointError::Gone(interface(AttachMode::Bridge)).into());
            }
            state.made += 1;
            state.interface = Some(state.made);
            Ok(IfIndex::new(state.made))
        })
    }

    async fn delete(&self) -> Result<(), NotDeleted> {
        self.with(|state| state.interface = None);
        Ok(())
    }

    async fn release(&self) {
        self.with(|state| (state.interface, state.has_address) = (None, false));
    }

    fn publish_to_peers(&self) {
        self.with(|state| state.published += 1);
    }
}

/// A running keeper, on a node whose own addresses are not in place yet.
struct Harness {
    fixture: Fixture,
    host: Fake,
    endpoint: watch::Receiver<Endpoint>,
    running: Pin<Box<dyn Future<Output = ()>>>,
}

fn harness() -> Harness {
    let fixture = Fixture::new();
    let host = Fake { node_state: fixture.node_state(), state: Arc::default() };
    let (sender, endpoint) = watch::channel(Endpoint::Awaited);
    let namespace = Arc::new(File::open("/dev/null").unwrap());
    let running = Box::pin(keep(host.clone(), namespace, sender));
    Harness { fixture, host, endpoint, running }
}

impl Harness {
    /// Puts the node's own address in place, as the engine does.
    fn serve(&self) {
        let gateways = vec!["10.244.0.1".parse().unwrap()];
        self.fixture.pass.send_replace(Some(Arc::new(Pass { gateways, mtu: 1450, ..Pass::default() })));
    }

    /// Runs for that time. Returns the published value.
    async fn after(&mut self, time: Duration) -> Endpoint {
        assert!(timeout(time, &mut self.running).await.is_err(), "the endpoint task ended");
        self.endpoint.borrow().clone()
    }
}

fn is_open(endpoint: &Endpoint) -> bool {
    matches!(endpoint, Endpoint::Open(open) if open.addresses == [address()])
}

#[tokio::test(start_paused = true)]
async fn the_endpoint_is_created_when_the_node_has_a_gateway_and_recreated_after_deletion() {
    let mut harness = harness();
    assert!(matches!(harness.after(CHECK_INTERVAL * 3).await, Endpoint::Awaited));
    harness.serve();
    assert!(is_open(&harness.after(CHECK_INTERVAL / 2).await));
    assert_eq!(harness.host.with(|state| (state.made, state.published)), (1, 1));
    assert!(is_open(&harness.after(CHECK_INTERVAL * 3).await));
    assert_eq!(harness.host.with(|state| state.made), 1, "the endpoint exists already");
    harness.host.with(|state| state.interface = None);
    assert!(is_open(&harness.after(CHECK_INTERVAL).await));
    assert_eq!(harness.host.with(|state| (state.made, state.published)), (2, 2));
}

#[tokio::test(start_paused = true)]
async fn a_failed_endpoint_releases_its_addresses_and_is_retried_much_later() {
    let mut harness = harness();
    harness.host.with(|state| state.is_broken = true);
    harness.serve();
    let endpoint = harness.after(CHECK_INTERVAL / 2).await;
    assert!(
        matches!(&endpoint, Endpoint::Unavailable(why) if why.to_string().contains("does not exist")),
        "{endpoint:?}"
    );
    assert!(!harness.host.with(|state| state.has_address));
    harness.host.with(|state| state.is_broken = false);
    assert!(matches!(
        harness.after(RETRY.saturating_sub(CHECK_INTERVAL * 2)).await,
        Endpoint::Unavailable(_)
    ));
    assert!(is_open(&harness.after(CHECK_INTERVAL * 3).await));
}

#[tokio::test(start_paused = true)]
async fn without_a_spare_address_the_endpoint_is_created_once_one_is_free() {
    let mut harness = harness();
    harness.host.with(|state| state.is_full = true);
    harness.serve();
    let endpoint = harness.after(CHECK_INTERVAL / 2).await;
    assert!(
        matches!(&endpoint, Endpoint::Unavailable(why) if why.to_string().contains("has a spare address")),
        "{endpoint:?}"
    );
    harness.host.with(|state| state.is_full = false);
    assert!(is_open(&harness.after(CHECK_INTERVAL).await));
}

#[tokio::test(start_paused = true)]
async fn the_endpoint_of_a_removed_node_is_deleted() {
    let mut harness = harness();
    harness.serve();
    assert!(is_open(&harness.after(CHECK_INTERVAL / 2).await));
    harness.fixture.registration.send_replace(Registration::Removed(RemovalProgress::CuttingOff));
    assert!(matches!(harness.after(CHECK_INTERVAL).await, Endpoint::Awaited));
    assert_eq!(harness.host.with(|state| state.interface), None);
}
