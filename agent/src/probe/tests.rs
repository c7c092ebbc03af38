//! The prober, on sockets whose replies the test defines.

use std::collections::{BTreeSet, VecDeque};
use std::fs::File;
use std::pin::Pin;
use std::sync::Mutex;

use polder_ipam::key::Key as RecordKey;
use polder_ipam::store::{Txn, Write};
use polder_netlink::IfIndex;
use polder_store::Embedded;
use tokio::sync::Notify;
use tokio::time::timeout;

use super::direct::Direct;
use super::*;
use crate::kernel::desired::{OnLink, Path};
use crate::kernel::tunnel::Encapsulation;
use crate::underlay::{NotChosen, Underlay, Uplink};

/// The node's address in the pod network, and on the underlay; the peer's address on the underlay.
const GATEWAY: &str = "10.0.0.1";
const OWN: &str = "192.0.2.1";
const PEER: &str = "192.0.2.2";

/// The peer's own address in the pod network, and the address of its endpoint.
const HOST: &str = "10.0.1.1";
const ENDPOINT: &str = "10.0.1.2";

/// Sockets without a network.
#[derive(Clone, Default)]
struct Fake(Arc<Mutex<Wire>>);

#[derive(Default)]
struct Wire {
    /// Maximum packet length, in bytes, that each answering address replies to.
    answering: BTreeMap<IpAddr, usize>,
    /// Source addresses whose packets are dropped.
    dropped: BTreeSet<IpAddr>,
    /// Whether opening a socket fails.
    open_fails: bool,
    sockets: Vec<Arc<Socket>>,
}

struct Socket {
    source: IpAddr,
    replies: Mutex<VecDeque<(IpAddr, Token)>>,
    reply_arrived: Notify,
}

impl Fake {
    fn with<T>(&self, action: impl FnOnce(&mut Wire) -> T) -> T {
        action(&mut self.0.lock().unwrap())
    }

    fn set_replies(&self, address: &str, up_to: usize) {
        self.with(|wire| wire.answering.insert(address.parse().unwrap(), up_to));
    }

    fn stop_replies(&self, address: &str) {
        self.with(|wire| wire.answering.remove(&address.parse().unwrap()));
    }
}

impl Pings for Fake {
    type Socket = Arc<Socket>;

    fn open(&self, source: IpAddr, _: Option<&File>) -> io::Result<Arc<Socket>> {
        self.with(|wire| {
            if wire.open_fails {
                return Err(io::ErrorKind::PermissionDenied.into());
            }
            let socket = Socket { source, replies: Mutex::default(), reply_arrived: Notify::new() };
            wire.sockets.push(Arc::new(socket));
            Ok(Arc::clone(wire.sockets.last().unwrap()))
        })
    }

    fn source(&self, socket: &Arc<Socket>) -> IpAddr {
        socket.source
    }

    async fn send(&self, socket: &Arc<Socket>, to: IpAddr, length: usize, token: Token) -> io::Result<()> {
        if self.with(|wire| {
            !wire.dropped.contains(&socket.source)
                && wire.answering.get(&to).is_some_and(|most| length <= *most)
        }) {
            socket.replies.lock().unwrap().push_back((to, token));
            socket.reply_arrived.notify_one();
        }
        Ok(())
    }

    async fn receive(&self, socket: &Arc<Socket>) -> io::Result<(IpAddr, Token)> {
        loop {
            if let Some(reply) = socket.replies.lock().unwrap().pop_front() {
                return Ok(reply);
            }
            socket.reply_arrived.notified().await;
        }
    }
}

/// A running prober, and the values that it publishes.
struct Fixture {
    wire: Fake,
    store: Store,
    pass: watch::Sender<Option<Arc<Pass>>>,
    endpoint: watch::Sender<Endpoint>,
    probed: watch::Receiver<Result<(), NotProbed>>,
    verdicts: watch::Receiver<Arc<BTreeMap<Key, Verdict>>>,
    direct: watch::Receiver<Arc<DirectPaths>>,
    running: Pin<Box<dyn Future<Output = ()>>>,
    _folder: tempfile::TempDir,
}

/// Interval between two probes of a path without a fault.
const STEADY: Duration = Duration::from_secs(30);

/// A node with one peer; `probe_address` is the address of the peer's endpoint, if known.
fn fixture(probe_address: Option<&str>) -> Fixture {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::Embedded(Embedded::open(&folder.path().join("store")).unwrap());
    let (pass, passes) = watch::channel(None);
    let (endpoint, endpoints) = watch::channel(Endpoint::Unavailable(crate::endpoint::NoEndpoint::Disabled));
    let (probed, probed_receiver) = watch::channel(Err(NotProbed::NotYet));
    let (verdicts, verdicts_receiver) = watch::channel(Arc::default());
    let (direct, direct_receiver) = watch::channel(Arc::default());
    let interface = "eth0".to_owned();
    let uplink = Uplink {
        address: OWN.parse().unwrap(),
        index: IfIndex::new(2),
        interface,
        mtu: 1500,
        chosen_by: String::new(),
    };
    let uplinks = PerFamily::new(Some(uplink), None);
    let underlay = Underlay { uplinks, others: Vec::new(), needed: Vec::new() };
    let task = Task {
        probe_peers: true,
        resync: STEADY,
        store: store.clone(),
        passes: Passes::new(watch::channel(Ok(Arc::new(underlay))).1, passes),
        endpoint: endpoints,
        probed,
        verdicts,
        direct,
    };
    let peer_path = PeerPath {
        path: Path::Direct { via: PEER.parse().unwrap(), index: IfIndex::new(2) },
        gateway: Some(HOST.parse().unwrap()),
        probe: probe_address.map(|address| address.parse().unwrap()),
        mtu: 1500,
        on_link: Some(OnLink { via: PEER.parse().unwrap(), index: IfIndex::new(2) }),
    };
    pass.send_replace(Some(Arc::new(Pass {
        gateways: vec![GATEWAY.parse().unwrap()],
        paths: Arc::new([(key(), peer_path)].into()),
        ..Pass::default()
    })));
    let wire = Fake::default();
    let running = Box::pin(task.probe(wire.clone()));
    Fixture {
        wire,
        store,
        pass,
        endpoint,
        probed: probed_receiver,
        verdicts: verdicts_receiver,
        direct: direct_receiver,
        running,
        _folder: folder,
    }
}

fn key() -> Key {
    ("n2".parse().unwrap(), Family::V4)
}

impl Fixture {
    /// Runs the prober for that time.
    async fn run_for(&mut self, time: Duration) {
        assert!(timeout(time, &mut self.running).await.is_err(), "the prober task ended");
    }

    /// Runs for 45 s (1.5 x `STEADY`), in which a peer that does not answer is probed several times.
    async fn run_several_rounds(&mut self) {
        self.run_for(STEADY + STEADY / 2).await;
    }

    fn verdict(&self) -> Option<Verdict> {
        self.verdicts.borrow().get(&key()).copied()
    }

    fn probed(&self) -> Result<(), NotProbed> {
        self.probed.borrow().clone()
    }

    /// Creates the lease of the peer's agent.
    async fn create_peer_lease(&self) {
        let key = RecordKey::Lease("n2".parse().unwrap()).to_string();
        let writes = vec![Write::Put { key, value: b"{}".to_vec() }];
        self.store.transact(&Txn { writes, ..Txn::default() }).await.unwrap();
    }

    /// Publishes a pass in which pod packets use the tunnel.
    fn publish_pass_with_tunnel(&self) {
        self.pass.send_modify(|pass| {
            let mut other = Pass::clone(pass.as_ref().unwrap());
            let remote = PEER.parse().unwrap();
            let next_hop = HOST.parse().unwrap();
            let tunnel =
                Path::Tunnel { encapsulation: Encapsulation::Vxlan, over: Family::V4, remote, next_hop };
            Arc::make_mut(&mut other.paths).get_mut(&key()).unwrap().path = tunnel;
            *pass = Some(Arc::new(other));
        });
    }

    fn open_endpoint(&self) {
        let namespace = Arc::new(File::open("/dev/null").unwrap());
        let open = OpenEndpoint { namespace, addresses: vec!["10.0.0.2".parse().unwrap()] };
        self.endpoint.send_replace(Endpoint::Open(Arc::new(open)));
    }
}

#[tokio::test(start_paused = true)]
async fn a_path_is_silent_after_some_lost_rounds_and_recovers_with_the_next_answer() {
    let mut fixture = fixture(None);
    fixture.wire.set_replies(HOST, 1500);
    fixture.run_for(Duration::from_secs(1)).await;
    assert_eq!((fixture.verdict(), fixture.probed()), (Some(Verdict::Answers), Ok(())));
    fixture.wire.stop_replies(HOST);
    // The first failed round.
    fixture.run_for(STEADY.saturating_sub(Duration::from_millis(900))).await;
    assert_eq!(fixture.verdict(), Some(Verdict::Answers), "one packet can be lost");
    fixture.run_for(Duration::from_secs(5)).await;
    assert_eq!(fixture.verdict(), Some(Verdict::Silent));
    assert_eq!(fixture.probed(), Ok(()), "a ready node stays ready");
    fixture.wire.set_replies(HOST, 1500);
    fixture.run_for(Duration::from_secs(6)).await;
    assert_eq!(fixture.verdict(), Some(Verdict::Answers));
}

#[tokio::test(start_paused = true)]
async fn a_path_that_carries_only_short_packets_has_a_small_mtu() {
    let mut fixture = fixture(None);
    fixture.wire.set_replies(HOST, 1400);
    fixture.run_several_rounds().await;
    assert_eq!((fixture.verdict(), fixture.probed()), (Some(Verdict::PathMtuTooSmall(1500)), Ok(())));
}

#[tokio::test(start_paused = true)]
async fn a_node_is_ready_without_live_peers_but_not_while_no_live_peer_answers() {
    let mut fixture = fixture(None);
    fixture.create_peer_lease().await;
    fixture.run_several_rounds().await;
    let problem = fixture.probed().unwrap_err().to_string();
    assert!(problem.contains("no peer answers") && problem.contains("n2"), "{problem}");
    fixture.wire.set_replies(HOST, 1500);
    fixture.run_several_rounds().await;
    assert_eq!(fixture.probed(), Ok(()));

    let mut alone = self::fixture(None);
    alone.run_several_rounds().await;
    assert_eq!((alone.verdict(), alone.probed()), (Some(Verdict::Silent), Ok(())), "no peer is alive");
}

#[tokio::test(start_paused = true)]
async fn a_peer_whose_host_answers_but_whose_endpoint_does_not_drops_forwarded_packets() {
    let mut fixture = fixture(Some(ENDPOINT));
    fixture.open_endpoint();
    fixture.create_peer_lease().await;
    fixture.wire.set_replies(HOST, 1500);
    fixture.wire.set_replies(ENDPOINT, 1500);
    fixture.run_for(Duration::from_secs(1)).await;
    assert_eq!(fixture.verdict(), Some(Verdict::Answers));
    fixture.wire.stop_replies(ENDPOINT);
    fixture.run_several_rounds().await;
    fixture.run_several_rounds().await;
    assert_eq!(fixture.verdict(), Some(Verdict::Dropped));
    fixture.wire.set_replies(ENDPOINT, 1500);
    fixture.run_several_rounds().await;
    assert_eq!(fixture.verdict(), Some(Verdict::Answers));
}

#[tokio::test(start_paused = true)]
async fn a_direct_path_that_permits_only_underlay_source_addresses_drops_pod_packets() {
    let mut fixture = fixture(None);
    let direct = |fixture: &Fixture| fixture.direct.borrow().get(&key()).copied();
    fixture.create_peer_lease().await;
    fixture.wire.set_replies(PEER, 1500);
    fixture.wire.with(|wire| wire.dropped.insert(GATEWAY.parse().unwrap()));
    fixture.wire.set_replies(HOST, 1500);
    fixture.run_for(Duration::from_secs(10)).await;
    assert_eq!(direct(&fixture), Some(Direct::Drops));
    // The engine changes the path: through the tunnel, the peer answers.
    fixture.wire.with(|wire| wire.dropped.clear());
    fixture.publish_pass_with_tunnel();
    fixture.wire.stop_replies(PEER);
    fixture.run_for(STEADY * 3).await;
    assert_eq!(direct(&fixture), Some(Direct::Drops));
    fixture.wire.set_replies(PEER, 1500);
    fixture.run_for(STEADY * 3).await;
    assert_eq!(direct(&fixture), Some(Direct::Carries));
}

#[tokio::test(start_paused = true)]
async fn a_node_without_peers_is_ready_as_soon_as_it_needs_no_endpoint() {
    // With a new pass at the same time, it is random which of them wakes the prober.
    for has_new_pass in [false, true].into_iter().cycle().take(20) {
        let mut fixture = fixture(None);
        let new_pass = |fixture: &Fixture, paths| {
            fixture.pass.send_modify(|pass| {
                *pass = Some(Arc::new(Pass { paths, ..Pass::clone(pass.as_ref().unwrap()) }));
            });
        };
        let paths = Arc::default();
        new_pass(&fixture, Arc::clone(&paths));
        fixture.endpoint.send_replace(Endpoint::Awaited);
        fixture.run_several_rounds().await;
        assert_eq!(fixture.probed(), Err(NotProbed::NoEndpoint));
        if has_new_pass {
            new_pass(&fixture, paths);
        }
        fixture.endpoint.send_replace(Endpoint::Unneeded);
        fixture.run_for(Duration::from_secs(1)).await;
        assert_eq!(fixture.probed(), Ok(()), "with a new pass: {has_new_pass}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_node_is_not_ready_until_it_has_probe_sockets() {
    let mut fixture = fixture(None);
    fixture.wire.set_replies(HOST, 1500);
    fixture.wire.with(|wire| wire.open_fails = true);
    fixture.run_several_rounds().await;
    let problem = fixture.probed().unwrap_err().to_string();
    assert!(problem.contains("peers cannot be probed from 10.0.0.1"), "{problem}");
    fixture.pass.send_modify(|pass| {
        let gateways = vec!["10.0.0.3".parse().unwrap()];
        *pass = Some(Arc::new(Pass { gateways, ..Pass::clone(pass.as_ref().unwrap()) }));
    });
    fixture.run_several_rounds().await;
    let problem = fixture.probed().unwrap_err().to_string();
    assert!(problem.contains("peers cannot be probed from 10.0.0.3"), "{problem}");
    fixture.wire.with(|wire| wire.open_fails = false);
    // Another pass.
    fixture.pass.send_modify(|pass| *pass = pass.as_deref().cloned().map(Arc::new));
    fixture.run_several_rounds().await;
    assert_eq!((fixture.verdict(), fixture.probed()), (Some(Verdict::Answers), Ok(())));
}

#[tokio::test(start_paused = true)]
async fn without_a_pass_a_node_has_no_verdicts_and_is_not_ready() {
    let mut fixture = fixture(None);
    let before = fixture.pass.send_replace(None);
    fixture.wire.set_replies(HOST, 1500);
    fixture.run_several_rounds().await;
    assert_eq!(fixture.verdict(), None);
    assert!(fixture.probed().is_err());
    fixture.pass.send_replace(before);
    fixture.run_several_rounds().await;
    assert_eq!(fixture.probed(), Ok(()));
}

#[tokio::test(start_paused = true)]
async fn with_probe_peers_false_the_node_is_ready_without_probes() {
    let folder = tempfile::tempdir().unwrap();
    let (probed, probed_receiver) = watch::channel(Err(NotProbed::NotYet));
    let task = Task {
        probe_peers: false,
        resync: STEADY,
        store: Store::Embedded(Embedded::open(&folder.path().join("store")).unwrap()),
        passes: Passes::new(watch::channel(Err(NotChosen::NotYet)).1, watch::channel(None).1),
        endpoint: watch::channel(Endpoint::Awaited).1,
        probed,
        verdicts: watch::channel(Arc::default()).0,
        direct: watch::channel(Arc::default()).0,
    };
    assert!(timeout(STEADY, task.run()).await.is_err(), "the prober task ended");
    assert_eq!(*probed_receiver.borrow(), Ok(()));
}
