//! A program behind a netfilter queue, like a daemon for `NetworkPolicy`: it gets packets from the kernel and decides
//! about each of them.

mod socket;

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::io::ErrorKind;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use self::socket::{QueueSocket, Verdict};
use crate::node::Node;
use crate::wait;

/// The mark of packets that the program passes on to be rejected: a queue itself can only accept or drop.
pub const REJECT_MARK: u32 = 0x0010_0000;

/// Pause while no packet is queued.
const PAUSE: Duration = Duration::from_millis(1);

/// The ends of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Flow {
    /// The transport protocol.
    pub protocol: Protocol,
    /// The source address.
    pub source: IpAddr,
    /// The destination address.
    pub destination: IpAddr,
    /// The destination port; 0 if the protocol has no ports.
    pub port: u16,
}

/// The transport protocol of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// Another one, with its number.
    Other(u8),
}

/// What happens to a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ruling {
    /// It continues.
    Accept,
    /// It is dropped without a reply.
    Drop,
    /// It continues with [`REJECT_MARK`], and a rule after the queue answers it.
    Reject,
}

/// A running program. It ends when it is dropped, as if it was killed: the kernel closes its queue, and drops the
/// packets in it.
pub struct QueueProgram {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    number: u16,
    /// The kernel's list of the queues that programs of the node read.
    list: String,
}

type Policy = Box<dyn Fn(&Flow) -> Ruling + Send>;

struct Shared {
    wanted: AtomicBool,
    seen: Mutex<BTreeSet<Flow>>,
    policy: Mutex<Policy>,
}

impl QueueProgram {
    /// Starts to read the queue of that number in the node's network namespace, with the options of
    /// `kube-network-policies`. `policy` decides about each packet.
    pub fn start(node: &Node, number: u16, policy: impl Fn(&Flow) -> Ruling + Send + 'static) -> Self {
        // A program that is just being started elsewhere briefly has copies of all open sockets, also of that of an
        // earlier reader.
        let queue = wait::until(&format!("queue {number} of {} to be free", node.name()), || {
            node.within(|| QueueSocket::bind(number)).map_err(|error| error.to_string())
        });
        let shared = Arc::new(Shared {
            wanted: AtomicBool::new(true),
            seen: Mutex::default(),
            policy: Mutex::new(Box::new(policy)),
        });
        let for_thread = Arc::clone(&shared);
        let thread = std::thread::spawn(move || for_thread.run(&queue));
        let list = format!("/proc/{}/net/netfilter/nfnetlink_queue", node.pid());
        Self { shared, thread: Some(thread), number, list }
    }

    /// Replaces the policy, and forgets the packets that were seen.
    pub fn set_policy(&self, policy: impl Fn(&Flow) -> Ruling + Send + 'static) {
        *lock(&self.shared.policy) = Box::new(policy);
        lock(&self.shared.seen).clear();
    }

    /// The packets that the program has got.
    pub fn seen(&self) -> BTreeSet<Flow> {
        lock(&self.shared.seen).clone()
    }
}

impl Shared {
    fn run(&self, queue: &QueueSocket) {
        while self.wanted.load(Ordering::Relaxed) {
            let packets = match queue.receive() {
                Ok(packets) => packets,
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    std::thread::park_timeout(PAUSE);
                    continue;
                }
                Err(error) => panic!("the queue cannot be read: {error}"),
            };
            for packet in packets {
                let flow = Flow::of(&packet.headers).unwrap_or_else(|| panic!("no IP packet: {packet:?}"));
                lock(&self.seen).insert(flow);
                let verdict = match lock(&self.policy)(&flow) {
                    Ruling::Accept => Verdict::Accept,
                    Ruling::Drop => Verdict::Drop,
                    Ruling::Reject => Verdict::AcceptWith(REJECT_MARK),
                };
                queue.decide(&packet, verdict).expect("the kernel takes a verdict");
            }
        }
    }
}

impl Flow {
    /// The ends of an IP packet. IPv6 extension headers are not skipped.
    fn of(packet: &[u8]) -> Option<Self> {
        let (protocol, source, destination, transport) = match packet.first()? >> 4 {
            4 => {
                let address = |at: usize| Some(IpAddr::from(*packet.get(at..)?.first_chunk::<4>()?));
                (*packet.get(9)?, address(12)?, address(16)?, usize::from(packet[0] & 0xf) * 4)
            }
            6 => {
                let address = |at: usize| Some(IpAddr::from(*packet.get(at..)?.first_chunk::<16>()?));
                (*packet.get(6)?, address(8)?, address(24)?, 40)
            }
            _ => return None,
        };
        let port = || Some(u16::from_be_bytes(*packet.get(transport + 2..)?.first_chunk()?));
        let (protocol, port) = match protocol {
            6 => (Protocol::Tcp, port()?),
            17 => (Protocol::Udp, port()?),
            other => (Protocol::Other(other), 0),
        };
        Some(Self { protocol, source, destination, port })
    }
}

impl fmt::Debug for QueueProgram {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("QueueProgram").field("seen", &self.seen()).finish_non_exhaustive()
    }
}

impl Drop for QueueProgram {
    fn drop(&mut self) {
        self.shared.wanted.store(false, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A failure of the thread fails the test, unless it has failed already.
            let outcome = thread.join();
            assert!(outcome.is_ok() || std::thread::panicking(), "the program behind the queue has failed");
        }
        if !std::thread::panicking() {
            wait::until(&format!("queue {} to be closed", self.number), || {
                let queues =
                    fs::read_to_string(&self.list).map_err(|error| format!("{}: {error}", self.list))?;
                let mut numbers =
                    queues.lines().filter_map(|line| line.split_whitespace().next()?.parse().ok());
                if numbers.any(|number: u16| number == self.number) { Err(queues) } else { Ok(()) }
            });
        }
    }
}

/// A mutex that a failed test has poisoned is still readable.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
