//! When programs are attached, and what is reported.

use polder_api::{Attachment as PodAttachment, Mac};
use polder_netlink::Error;
use tempfile::TempDir;
use tokio::sync::mpsc::{self, UnboundedReceiver, UnboundedSender};
use tokio::time::timeout;

use super::*;
use crate::kernel::desired::PeerPath;
use crate::underlay::NotChosen;
use crate::wake::{WakeSender, wake_channel};

const UPLINK: IfIndex = IfIndex::new(2);

/// What the task asked for.
#[derive(Debug, PartialEq, Eq)]
enum Asked {
    /// To compare everything, with these numbers of pods and uplinks.
    All { pods: usize, uplinks: usize },
    /// To add these pods, and forget these addresses.
    Some { pods: Vec<String>, gone: Vec<IpAddr> },
}

struct Fake {
    asked: UnboundedSender<Asked>,
    fails: watch::Receiver<bool>,
}

impl Fake {
    fn answer(&self, asked: Asked) -> Result<usize, AttachError> {
        self.asked.send(asked).unwrap();
        if *self.fails.borrow() {
            return Err(AttachError::Attach { interface: UPLINK, source: Error::NoAnswer });
        }
        Ok(0)
    }
}

impl Attachment for Fake {
    async fn check_all(&self, users: Users) -> Result<usize, AttachError> {
        self.answer(Asked::All { pods: users.pods.len(), uplinks: users.uplinks.len() })
    }

    async fn add(&self, pods: Vec<LocalPod>, gone: BTreeSet<IpAddr>) -> Result<usize, AttachError> {
        let pods = pods.into_iter().map(|pod| pod.name.to_string()).collect();
        self.answer(Asked::Some { pods, gone: gone.into_iter().collect() })
    }
}

/// A running task, and what it reads and writes.
struct Running {
    asked: UnboundedReceiver<Asked>,
    fails: watch::Sender<bool>,
    pods: Arc<LocalPods>,
    in_flight: Arc<InFlight>,
    pass: watch::Sender<Option<Arc<Pass>>>,
    changed: WakeSender,
    not_used: watch::Receiver<Option<NotUsed>>,
    settings: TempDir,
    /// The entry is never read.
    _underlay: watch::Sender<crate::node_state::Chosen>,
}

fn start(refused: Option<NotUsed>) -> Running {
    let settings = tempfile::tempdir().unwrap();
    for folder in ["ipv4", "netfilter"] {
        std::fs::create_dir(settings.path().join(folder)).unwrap();
    }
    let (asked, receiver) = mpsc::unbounded_channel();
    let (fails, fails_read) = watch::channel(false);
    let (changed, changed_wake) = wake_channel();
    let (underlay, underlay_read) = watch::channel(Err(NotChosen::NotYet));
    let (pass, pass_read) = watch::channel(None);
    let (sender, not_used) = watch::channel(Some(NotUsed::NotYet));
    let (pods, in_flight) = (Arc::<LocalPods>::default(), Arc::<InFlight>::default());
    let task = Task {
        resync: Duration::from_secs(30),
        refused,
        interfaces: Fake { asked, fails: fails_read },
        pods: Arc::clone(&pods),
        in_flight: Arc::clone(&in_flight),
        passes: Passes::new(underlay_read, pass_read),
        sysctls: Sysctls::at(settings.path().to_owned()).unwrap(),
        changed: changed_wake,
        not_used: sender,
    };
    tokio::spawn(task.run());
    let asked = receiver;
    Running { asked, fails, pods, in_flight, pass, changed, not_used, settings, _underlay: underlay }
}

impl Running {
    fn set_liberal(&self, value: &str) {
        std::fs::write(self.settings.path().join("netfilter/nf_conntrack_tcp_be_liberal"), value).unwrap();
    }

    /// Publishes a pass, with a direct path.
    fn pass(&self) {
        let path = Path::Direct { via: [192, 0, 2, 9].into(), index: UPLINK };
        let paths = [(
            ("n2".parse().unwrap(), polder_api::Family::V4),
            PeerPath { path, on_link: None, gateway: None, probe: None, mtu: 1500 },
        )];
        self.pass.send_replace(Some(Arc::new(Pass { paths: Arc::new(paths.into()), ..Pass::default() })));
    }

    async fn asked(&mut self) -> Asked {
        timeout(Duration::from_secs(10), self.asked.recv()).await.expect("the task asks").unwrap()
    }

    async fn is_idle(&mut self) -> bool {
        timeout(Duration::from_secs(10), self.asked.recv()).await.is_err()
    }
}

fn attachment(number: u8) -> PodAttachment {
    format!("net/c{number}/eth0").parse().unwrap()
}

fn pod(number: u8) -> LocalPod {
    LocalPod {
        name: attachment(number).host_interface(),
        mac: Mac([2, 0, 0, 0, 0, number]),
        addresses: vec![[10, 0, 0, number].into()],
        ports: Vec::new(),
    }
}

#[tokio::test(start_paused = true)]
async fn nothing_is_attached_before_a_pass_has_found_the_paths_and_relaxed_connection_tracking() {
    let mut running = start(None);
    running.set_liberal("0");
    assert!(running.is_idle().await, "no pass yet");
    assert_eq!(*running.not_used.borrow(), Some(NotUsed::NotYet));
    running.pass();
    assert!(running.is_idle().await, "connection tracking is strict");
    assert_eq!(*running.not_used.borrow(), Some(NotUsed::Strict));
    running.set_liberal("1");
    running.pass();
    assert_eq!(running.asked().await, Asked::All { pods: 0, uplinks: 1 });
    assert!(running.is_idle().await);
    assert_eq!(*running.not_used.borrow(), None);
}

#[tokio::test(start_paused = true)]
async fn new_pods_are_served_together_and_after_their_add() {
    let mut running = start(None);
    running.pass();
    assert_eq!(running.asked().await, Asked::All { pods: 0, uplinks: 1 });
    let lock = running.in_flight.hold(&attachment(3)).unwrap();
    [pod(1), pod(2), pod(3)].into_iter().for_each(|pod| running.pods.add(pod));
    let mut both: Vec<String> = [pod(1), pod(2)].map(|pod| pod.name.to_string()).into();
    both.sort();
    assert_eq!(running.asked().await, Asked::Some { pods: both, gone: Vec::new() });
    drop(lock);
    let Asked::Some { mut pods, .. } = running.asked().await else { panic!("not a new pod") };
    while pods.is_empty() {
        let Asked::Some { pods: next, .. } = running.asked().await else { panic!("not a new pod") };
        pods = next;
    }
    assert_eq!(pods, [pod(3).name.to_string()]);
    running.pods.remove(pod(1));
    assert_eq!(running.asked().await, Asked::Some { pods: Vec::new(), gone: pod(1).addresses });
}

#[tokio::test(start_paused = true)]
async fn a_direct_path_that_is_found_while_a_new_pod_waits_is_served_and_stays_so() {
    let mut running = start(None);
    running.pass.send_replace(Some(Arc::new(Pass::default())));
    assert_eq!(running.asked().await, Asked::All { pods: 0, uplinks: 0 });
    running.pods.add(pod(1));
    sleep(SETTLE / 2).await;
    running.pass();
    assert_eq!(running.asked().await, Asked::All { pods: 1, uplinks: 1 });
    running.pass.send_replace(Some(Arc::new(Pass::default())));
    running.changed.wake();
    assert_eq!(running.asked().await, Asked::All { pods: 1, uplinks: 1 }, "detaching drops packets");
}

#[tokio::test(start_paused = true)]
async fn everything_is_compared_after_a_change_by_another_program_and_periodically() {
    let mut running = start(None);
    running.pass();
    let everything = Asked::All { pods: 0, uplinks: 1 };
    assert_eq!(running.asked().await, everything);
    running.changed.wake();
    assert_eq!(running.asked().await, everything);
    assert!(running.is_idle().await);
    sleep(Duration::from_secs(15)).await;
    assert_eq!(running.asked().await, everything, "30 s have passed");
}

#[tokio::test(start_paused = true)]
async fn a_failure_is_reported_until_an_attempt_succeeds() {
    let mut running = start(None);
    running.fails.send_replace(true);
    running.pass();
    running.asked().await;
    assert!(running.is_idle().await);
    let reason = running.not_used.borrow().clone().expect("a reason");
    let reported = status(Some(&reason), Ok(Vec::new()));
    assert_eq!(reported.state, FastPathState::On, "other pods use it");
    assert!(reported.reason.unwrap().contains("interface 2"));
    running.fails.send_replace(false);
    running.changed.wake();
    running.asked().await;
    assert!(running.is_idle().await);
    assert_eq!(*running.not_used.borrow(), None);
}

#[tokio::test(start_paused = true)]
async fn without_programs_those_of_an_earlier_agent_are_removed() {
    let mut running = start(Some(NotUsed::Off));
    running.pods.add(pod(1));
    assert_eq!(running.asked().await, Asked::All { pods: 0, uplinks: 0 });
    assert!(running.is_idle().await);
    assert_eq!(*running.not_used.borrow(), Some(NotUsed::Off));
}

#[test]
fn the_status_names_the_path_and_the_reason_of_packets() {
    let counts = Count::ALL.into_iter().zip(1..).collect();
    let reported = status(None, Ok(counts));
    assert_eq!((reported.state, reported.reason.as_deref()), (FastPathState::On, None));
    assert_eq!(reported.total(PacketPath::Fast), 1 + 2 + 3);
    assert_eq!(reported.total(PacketPath::Normal), (4..=12).sum::<u64>(), "none is counted twice");
    let off = status(Some(&NotUsed::Strict), Ok(Vec::new()));
    assert_eq!(off.state, FastPathState::Off);
    assert!(off.reason.unwrap().contains("nf_conntrack_tcp_be_liberal"));
}
