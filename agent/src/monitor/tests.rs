//! The events that cause a pass.

use polder_api::{Attachment, BRIDGE, PerFamily};
use polder_netlink::link::{LinkKind, Port};
use polder_netlink::neighbour::Neighbour;
use tokio::time::timeout;

use super::*;
use crate::in_flight::AttachmentLock;
use crate::kernel::state::PodLink;
use crate::local_pods::LocalPod;
use crate::wake::{WakeReceiver, wake_channel};

/// Port ids of a socket of the agent, and of another program.
const OWN: u32 = 7;
const OTHER: u32 = 5_000_000;

/// Interface indexes of the host.
const ON_BRIDGE: IfIndex = IfIndex::new(1);
const ON_TUNNEL: IfIndex = IfIndex::new(2);
const ON_POD: IfIndex = IfIndex::new(3);
const UPLINK: IfIndex = IfIndex::new(4);
const FOREIGN: IfIndex = IfIndex::new(9);
const NEW_BRIDGE: IfIndex = IfIndex::new(12);

const POD_MAC: Mac = Mac([2, 0, 0, 0, 0, 9]);
const POD_ADDRESS: &str = "10.0.0.9";

/// The interface of the pod as the kernel has it, and how often it was read.
#[derive(Default)]
struct Fake {
    link: Option<Link>,
    reads: usize,
}

impl Links for Fake {
    fn link(&mut self, _: IfIndex) -> Result<Option<Link>, Error> {
        self.reads += 1;
        Ok(self.link.clone())
    }

    fn devices(&mut self) -> Result<BTreeMap<IfIndex, Device>, Error> {
        Ok([(NEW_BRIDGE, Device::Bridge)].into())
    }
}

/// A listener, and the receivers of the tasks that it wakes.
struct Fixture {
    listener: Listener<Fake>,
    expected: watch::Sender<Expected>,
    underlay: WakeReceiver,
    drift_signal: Arc<DriftSignal>,
    programs: WakeReceiver,
}

fn attachment() -> Attachment {
    "net/c1/eth0".parse().unwrap()
}

/// A host with a bridge, a tunnel, a pod and an uplink.
fn fixture() -> Fixture {
    let (underlay_changed, underlay) = wake_channel();
    let (programs_changed, programs) = wake_channel();
    let drift_signal = Arc::<DriftSignal>::default();
    let pods = Arc::<LocalPods>::default();
    let name = attachment().host_interface();
    let addresses = vec![POD_ADDRESS.parse().unwrap()];
    pods.add(LocalPod { name: name.clone(), mac: POD_MAC, addresses, ports: Vec::new() });
    let pod_link = Some(PodLink { port: Some(Port::of_pod(true)), up: true, ipv4_forwarding: false });
    let expected = watch::Sender::new(Expected { pod_link, path_interfaces: Some([UPLINK].into()) });
    let task = Task {
        own: [OWN].into(),
        expected: expected.subscribe(),
        pods,
        in_flight: Arc::default(),
        reaper: Reaper::idle(),
        underlay_changed,
        drift_signal: Arc::clone(&drift_signal),
        programs_changed,
    };
    let devices =
        [(ON_BRIDGE, Device::Bridge), (ON_TUNNEL, Device::OWN[1].clone()), (ON_POD, Device::Pod(name))];
    let listener = Listener { task, devices: devices.into(), kernel: Fake::default() };
    Fixture { listener, expected, underlay, drift_signal, programs }
}

#[derive(Debug, PartialEq, Eq)]
enum Woken {
    Neither,
    Underlay,
    Drift,
    Both,
}

impl Fixture {
    /// Handles one event. Returns the receivers that it woke.
    async fn on_event(&mut self, what: EventKind, port: u32) -> Woken {
        self.listener.on_event(&Event { what, port });
        let underlay = timeout(std::time::Duration::ZERO, self.underlay.woken()).await.is_ok();
        let drift_signal = timeout(std::time::Duration::ZERO, self.drift_signal.woken()).await.is_ok();
        match (underlay, drift_signal) {
            (false, false) => Woken::Neither,
            (true, false) => Woken::Underlay,
            (false, true) => Woken::Drift,
            (true, true) => Woken::Both,
        }
    }

    /// Starts an ADD or DEL of the pod.
    fn lock(&self) -> AttachmentLock {
        self.listener.task.in_flight.hold(&attachment()).unwrap()
    }
}

fn state(index: IfIndex, name: &str) -> Link {
    Link {
        index,
        name: name.to_owned(),
        up: true,
        running: true,
        has_neighbours: true,
        mac: None,
        mtu: 1500,
        controller: None,
        peer: None,
        alias: None,
        kind: LinkKind::Other,
        filters_vlans: false,
        calls_iptables: PerFamily::default(),
        port: None,
        makes_link_local: None,
        ipv4_forwarding: true,
    }
}

fn link(index: IfIndex, name: &str) -> EventKind {
    EventKind::Link(Box::new(state(index, name)))
}

/// The pod's interface with these port settings.
fn pod(port: Option<Port>) -> Link {
    let name = attachment().host_interface();
    Link { port, controller: port.map(|_| ON_BRIDGE), ..state(ON_POD, name.as_str()) }
}

fn gone(index: IfIndex, name: &str) -> EventKind {
    EventKind::LinkGone { index, name: name.to_owned() }
}

fn neighbour(index: IfIndex, address: &str, mac: Option<Mac>) -> EventKind {
    let address = address.parse().unwrap();
    EventKind::Neighbour { index, address, entry: mac.map(|mac| Neighbour { index, address, mac }) }
}

fn fdb_entry(mac: Mac, to: Option<Destination>, exists: bool) -> EventKind {
    EventKind::FdbEntry { index: ON_POD, mac, to, exists }
}

fn own_route(destination: &str, index: Option<IfIndex>, exists: bool) -> EventKind {
    EventKind::OwnRoute { destination: destination.parse().unwrap(), index, exists }
}

#[tokio::test]
async fn another_programs_change_of_what_runs_on_an_interface_of_pods_or_of_a_path_wakes_the_fast_path() {
    let mut fixture = fixture();
    for (index, port, wakes) in [
        (ON_POD, OTHER, true),
        (ON_TUNNEL, OTHER, true),
        (UPLINK, OTHER, true),
        (ON_POD, OWN, false),
        (FOREIGN, OTHER, false),
    ] {
        assert_eq!(fixture.on_event(EventKind::Programs { index }, port).await, Woken::Neither);
        let woken = timeout(std::time::Duration::ZERO, fixture.programs.woken()).await.is_ok();
        assert_eq!(woken, wakes, "interface {index}, port {port}");
    }
}

#[tokio::test]
async fn a_change_of_polders_devices_and_routes_causes_a_pass_unless_the_agent_made_it() {
    let mut fixture = fixture();
    for what in [
        link(ON_BRIDGE, BRIDGE),
        EventKind::Address { index: ON_BRIDGE, global: true },
        EventKind::Address { index: ON_POD, global: true },
        EventKind::ForwardingStopped { index: ON_TUNNEL },
        own_route("10.0.0.0/26", Some(ON_BRIDGE), false),
        own_route("10.0.1.0/26", Some(ON_TUNNEL), true),
    ] {
        assert_eq!(fixture.on_event(what.clone(), OTHER).await, Woken::Drift, "{what:?}");
        assert_eq!(fixture.on_event(what.clone(), OWN).await, Woken::Neither, "{what:?}");
    }
    assert_eq!(
        fixture.on_event(EventKind::ForwardingStopped { index: FOREIGN }, OTHER).await,
        Woken::Neither
    );
    assert_eq!(fixture.on_event(EventKind::Overrun, 0).await, Woken::Both, "anything may have changed");
}

#[tokio::test]
async fn a_foreign_interface_causes_work_only_on_a_path_or_while_there_is_no_underlay_address() {
    let mut fixture = fixture();
    let of = |index| [link(index, "eth0"), gone(index, "eth0"), EventKind::Address { index, global: false }];
    for what in of(UPLINK).into_iter().chain([EventKind::ForeignRoute]) {
        assert_eq!(fixture.on_event(what.clone(), OTHER).await, Woken::Underlay, "{what:?}");
    }
    for what in of(FOREIGN) {
        assert_eq!(fixture.on_event(what.clone(), OTHER).await, Woken::Neither, "{what:?}");
    }
    let address = EventKind::Address { index: FOREIGN, global: true };
    assert_eq!(
        fixture.on_event(address, OTHER).await,
        Woken::Underlay,
        "it may be better than the current one"
    );
    fixture.expected.send_modify(|expected| expected.path_interfaces = None);
    for what in of(FOREIGN) {
        assert_eq!(fixture.on_event(what.clone(), OTHER).await, Woken::Underlay, "{what:?}");
    }
}

#[tokio::test]
async fn a_device_is_polders_while_it_has_its_name_and_a_pods_interface_may_disappear() {
    let mut fixture = fixture();
    assert_eq!(fixture.on_event(link(ON_BRIDGE, "renamed"), OTHER).await, Woken::Drift);
    fixture.expected.send_modify(|expected| expected.path_interfaces = None);
    assert_eq!(fixture.on_event(link(ON_BRIDGE, "renamed"), OTHER).await, Woken::Underlay);
    assert_eq!(fixture.on_event(link(FOREIGN, BRIDGE), OTHER).await, Woken::Drift);
    assert_eq!(fixture.on_event(gone(FOREIGN, BRIDGE), OTHER).await, Woken::Drift);
    assert_eq!(fixture.on_event(gone(ON_POD, "whatever"), OTHER).await, Woken::Neither);
}

#[tokio::test]
async fn a_pods_interface_causes_a_pass_only_if_its_settings_are_wrong() {
    let mut fixture = fixture();
    let changed = |link: Link| EventKind::Link(Box::new(link));
    let right = pod(Some(Port::of_pod(true)));
    assert_eq!(fixture.on_event(changed(right.clone()), OTHER).await, Woken::Neither);
    assert_eq!(fixture.listener.kernel.reads, 0, "the notification has its state");
    // An older notification of a change that was completed since.
    fixture.listener.kernel.link = Some(right);
    assert_eq!(fixture.on_event(changed(pod(None)), OTHER).await, Woken::Neither);
    assert_eq!(fixture.on_event(EventKind::Port { index: ON_POD }, OTHER).await, Woken::Neither);
    for wrong in
        [pod(None), pod(Some(Port::of_pod(false))), Link { up: false, ..pod(Some(Port::of_pod(true))) }]
    {
        fixture.listener.kernel.link = Some(wrong.clone());
        assert_eq!(fixture.on_event(changed(wrong.clone()), OTHER).await, Woken::Drift, "{wrong:?}");
        assert_eq!(
            fixture.on_event(EventKind::Port { index: ON_POD }, OTHER).await,
            Woken::Drift,
            "{wrong:?}"
        );
        assert_eq!(
            fixture.on_event(EventKind::Port { index: ON_POD }, OWN).await,
            Woken::Neither,
            "{wrong:?}"
        );
    }
    fixture.listener.kernel.link = None;
    assert_eq!(
        fixture.on_event(EventKind::Port { index: ON_POD }, OTHER).await,
        Woken::Neither,
        "it is gone"
    );
}

#[tokio::test]
async fn the_changes_of_an_add_or_del_in_progress_cause_no_pass_and_no_read() {
    let mut fixture = fixture();
    let lock = fixture.lock();
    let port = Some(Destination::Port);
    for what in [
        EventKind::Link(Box::new(pod(None))),
        EventKind::Port { index: ON_POD },
        EventKind::Address { index: ON_POD, global: false },
        neighbour(ON_BRIDGE, POD_ADDRESS, None),
        fdb_entry(POD_MAC, port, false),
        own_route("10.0.0.9/32", Some(ON_POD), false),
    ] {
        assert_eq!(fixture.on_event(what.clone(), OTHER).await, Woken::Neither, "{what:?}");
    }
    assert_eq!(fixture.listener.kernel.reads, 0);
    drop(lock);
    assert_eq!(fixture.on_event(neighbour(ON_BRIDGE, POD_ADDRESS, None), OTHER).await, Woken::Drift);
}

#[tokio::test]
async fn an_entry_or_route_of_a_pod_causes_a_pass_unless_it_is_as_its_plugin_makes_it() {
    let mut fixture = fixture();
    let (other_mac, port) = (Mac([2; 6]), Some(Destination::Port));
    for (what, woken) in [
        (neighbour(ON_BRIDGE, POD_ADDRESS, Some(POD_MAC)), Woken::Neither),
        (neighbour(ON_BRIDGE, POD_ADDRESS, Some(other_mac)), Woken::Drift),
        (neighbour(ON_BRIDGE, POD_ADDRESS, None), Woken::Drift),
        (neighbour(ON_BRIDGE, "10.0.0.1", None), Woken::Neither),
        (neighbour(ON_TUNNEL, "10.0.0.1", None), Woken::Drift),
        (neighbour(FOREIGN, POD_ADDRESS, None), Woken::Neither),
        (fdb_entry(POD_MAC, port, true), Woken::Neither),
        (fdb_entry(POD_MAC, port, false), Woken::Drift),
        // The entry was replaced by one of the host, or by one that ages.
        (fdb_entry(POD_MAC, None, true), Woken::Drift),
        (fdb_entry(other_mac, port, true), Woken::Drift),
        (fdb_entry(other_mac, port, false), Woken::Neither),
        (fdb_entry(other_mac, None, true), Woken::Neither),
        (own_route("10.0.0.9/32", Some(ON_POD), true), Woken::Neither),
        (own_route("10.0.0.9/32", Some(FOREIGN), true), Woken::Drift),
        (own_route("10.0.0.9/32", Some(ON_POD), false), Woken::Drift),
        (own_route("10.0.0.1/32", Some(ON_POD), true), Woken::Drift),
        (own_route("10.0.0.1/32", Some(ON_POD), false), Woken::Neither),
        (own_route("10.0.0.1/32", Some(FOREIGN), false), Woken::Neither),
        // A reserved address of a peer's pod, or of none.
        (own_route("10.0.0.1/32", Some(UPLINK), false), Woken::Drift),
        (own_route("10.0.0.1/32", Some(ON_TUNNEL), false), Woken::Drift),
        (own_route("10.0.0.1/32", None, false), Woken::Drift),
    ] {
        assert_eq!(fixture.on_event(what.clone(), OTHER).await, woken, "{what:?}");
    }
    // The DEL has removed the pod.
    fixture.listener.task.pods.remove_interface(&attachment().host_interface());
    for what in [neighbour(ON_BRIDGE, POD_ADDRESS, None), fdb_entry(POD_MAC, port, false)] {
        assert_eq!(fixture.on_event(what.clone(), OTHER).await, Woken::Neither, "{what:?}");
    }
}

#[tokio::test]
async fn after_lost_notifications_a_deleted_bridge_is_not_kept() {
    let mut fixture = fixture();
    assert_eq!(fixture.on_event(EventKind::Overrun, 0).await, Woken::Both);
    assert_eq!(fixture.listener.devices, [(NEW_BRIDGE, Device::Bridge)].into());
    // Its end was not reported before the next one appears.
    assert_eq!(fixture.on_event(link(ON_BRIDGE, BRIDGE), OTHER).await, Woken::Drift);
    assert_eq!(fixture.listener.devices, [(ON_BRIDGE, Device::Bridge)].into());
}
