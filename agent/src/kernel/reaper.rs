//! Deletes pod interfaces.
//!
//! The kernel blocks the caller that deletes an interface for some 20 ms, in an RCU barrier, after the interface is
//! gone and the notification was sent. So separate threads delete interfaces, the notification ends the wait of the
//! callers, and interfaces that queue up meanwhile are deleted as a group, which takes as long as one deletion. The
//! entries of a pod that the kernel does not delete with its interface are deleted in the same request.

use std::collections::HashMap;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use ipnetwork::IpNetwork;
use polder_api::{BRIDGE, IfName};
use polder_netlink::neighbour::Neighbour;
use polder_netlink::{Error, IfIndex, Operation, RouteSocket, SocketError, link, route};
use tokio::sync::oneshot;
use tracing::warn;

use crate::local_pods::LocalPod;

/// Number of threads that delete interfaces.
const THREADS: u32 = 16;

/// Most interfaces that are deleted as one group: a large group holds the kernel's lock for a long time.
const GROUP: usize = 8;

/// First of the interface group numbers that the threads use for deletion ("PLD" in ASCII).
const FIRST_GROUP: u32 = 0x50_4c_44_00;

type Done = oneshot::Sender<Result<(), NotDeleted>>;

/// An interface to delete.
#[derive(Debug)]
struct Job {
    name: IfName,
    /// The pod behind it, if it is known.
    pod: Option<LocalPod>,
    done: Done,
}

/// An interface was not deleted.
#[derive(Debug, Clone, thiserror::Error)]
pub enum NotDeleted {
    /// The threads that delete interfaces have stopped.
    ///
    /// Remedy: restart polder-agent.
    #[error("cannot delete {0}: the threads that delete interfaces have stopped")]
    Stopped(IfName),
    /// The interface cannot be looked up.
    ///
    /// Remedy: correct the cause that the kernel reports at the end of the text. The deletion is retried.
    #[error("cannot find {name}: {error}")]
    Find {
        /// The interface.
        name: IfName,
        /// Error of the kernel.
        #[source]
        error: Arc<Error>,
    },
    /// The kernel refused the deletion.
    ///
    /// Remedy: correct the cause that the kernel reports at the end of the text. The deletion is retried.
    #[error("cannot delete {name}: {error}")]
    Delete {
        /// The interface.
        name: IfName,
        /// Error of the kernel.
        #[source]
        error: Arc<Error>,
    },
}

/// Handle to the threads that delete interfaces.
#[derive(Debug, Clone)]
pub struct Reaper {
    queue: Sender<Job>,
    waiting: Waiting,
    /// Netlink port ids of the threads' sockets.
    ports: Arc<[u32]>,
}

/// The waiting callers, by interface index.
#[derive(Debug, Clone, Default)]
struct Waiting(Arc<Mutex<HashMap<IfIndex, Vec<Done>>>>);

impl Waiting {
    fn add(&self, index: IfIndex, done: Done) {
        self.lock().entry(index).or_default().push(done);
    }

    fn finish(&self, index: IfIndex, result: &Result<(), NotDeleted>) {
        let waiting = self.lock().remove(&index);
        waiting.into_iter().flatten().for_each(|done| drop(done.send(result.clone())));
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<IfIndex, Vec<Done>>> {
        // The map stays valid if a thread panics while it holds the lock.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Reaper {
    /// Starts the threads, in the network namespace of the calling thread.
    pub fn start() -> Result<Self, Error> {
        let (queue, jobs) = channel();
        let jobs = Arc::new(Mutex::new(jobs));
        let waiting = Waiting::default();
        let sockets = (0..THREADS).map(|_| RouteSocket::open()).collect::<Result<Vec<_>, _>>()?;
        let ports = sockets.iter().map(RouteSocket::port).collect::<Result<_, _>>()?;
        for (number, socket) in (0..THREADS).zip(sockets) {
            let (jobs, waiting) = (Arc::clone(&jobs), waiting.clone());
            let work = move || work(socket, FIRST_GROUP + number, &jobs, &waiting);
            let spawned = thread::Builder::new().name(format!("reaper-{number}")).spawn(work);
            spawned.map_err(SocketError::StartThread)?;
        }
        Ok(Self { queue, waiting, ports })
    }

    /// The netlink port ids of the threads' sockets.
    pub fn ports(&self) -> impl Iterator<Item = u32> {
        self.ports.iter().copied()
    }

    /// A handle without threads: every deletion fails.
    pub fn idle() -> Self {
        Self { queue: channel().0, waiting: Waiting::default(), ports: Arc::default() }
    }

    /// Deletes the interface, and returns when it is gone. Succeeds if it does not exist.
    pub async fn delete(&self, name: IfName) -> Result<(), NotDeleted> {
        self.enqueue(name, None).await
    }

    /// Deletes a pod's interface, its neighbour entries on the bridge, and the routes to its addresses that are in no
    /// block. Returns when the interface is gone. Succeeds if nothing exists.
    pub async fn delete_pod(&self, pod: LocalPod) -> Result<(), NotDeleted> {
        self.enqueue(pod.name.clone(), Some(pod)).await
    }

    async fn enqueue(&self, name: IfName, pod: Option<LocalPod>) -> Result<(), NotDeleted> {
        let (done, gone) = oneshot::channel();
        let stopped = || NotDeleted::Stopped(name.clone());
        self.queue.send(Job { name: name.clone(), pod, done }).map_err(|_| stopped())?;
        gone.await.map_err(|_| stopped())?
    }

    /// Ends the wait of the callers for the interface with that index, which is gone.
    pub fn on_deleted(&self, index: IfIndex) {
        self.waiting.finish(index, &Ok(()));
    }
}

fn work(mut socket: RouteSocket, group: u32, jobs: &Mutex<Receiver<Job>>, waiting: &Waiting) {
    while let Some(batch) = next_batch(jobs) {
        let (mut indexes, mut entries) = (Vec::new(), Vec::new());
        for Job { name, pod, done } in batch {
            match socket.link(name.as_str()) {
                Ok(Some(link)) => {
                    waiting.add(link.index, done);
                    indexes.push((link.index, name));
                    entries.extend(pod.iter().flat_map(|pod| entries_of(pod, link.controller)));
                }
                Ok(None) => {
                    if let Some(pod) = pod {
                        let bridge = socket.link(BRIDGE).ok().flatten().map(|bridge| bridge.index);
                        let entries = entries_of(&pod, bridge).collect();
                        if let Err(error) = request(&mut socket, entries, Vec::new()) {
                            // The next pass deletes them.
                            warn!(interface = %name, %error, "entries of a deleted pod not deleted yet");
                        }
                    }
                    drop(done.send(Ok(())));
                }
                Err(error) => {
                    let error = Arc::new(error);
                    drop(done.send(Err(NotDeleted::Find { name, error })));
                }
            }
        }
        let deletion: Vec<Operation> = match indexes.as_slice() {
            [] => continue,
            [(index, _)] => vec![link::delete(*index)],
            several => {
                let mark = several.iter().map(|(index, _)| link::change_index(*index).group(group).into());
                mark.chain([link::delete_group(group)]).collect()
            }
        };
        let outcome = request(&mut socket, entries, deletion).map_err(Arc::new);
        for (index, name) in indexes {
            let result = match &outcome {
                Ok(()) => Ok(()),
                // The request for a group can fail because one interface is already gone, although the others were
                // deleted: check each.
                Err(_) if matches!(socket.link_by_index(index), Ok(None)) => Ok(()),
                Err(error) => Err(NotDeleted::Delete { name: name.clone(), error: Arc::clone(error) }),
            };
            if let Err(reason) = &result {
                warn!(interface = %name, %reason, "interface not deleted");
            }
            waiting.finish(index, &result);
        }
    }
}
/// Deletes the entries that the kernel keeps when it deletes a pod's interface: the neighbour entries on the bridge,
/// and the routes to addresses that are in no block.
fn entries_of(pod: &LocalPod, bridge: Option<IfIndex>) -> impl Iterator<Item = Operation> {
    let LocalPod { mac, addresses, .. } = pod;
    let on = move |index| {
        addresses.iter().map(move |address| Neighbour { index, address: *address, mac: *mac }.delete())
    };
    let routes = addresses.iter().map(|address| route::delete(IpNetwork::from(*address)));
    bridge.into_iter().flat_map(on).chain(routes)
}

/// Sends the deletions of entries and of interfaces in one request. Missing entries are ignored.
fn request(
    socket: &mut RouteSocket,
    entries: Vec<Operation>,
    interfaces: Vec<Operation>,
) -> Result<(), Error> {
    let count = entries.len();
    let outcomes = socket.execute(entries.into_iter().chain(interfaces))?;
    outcomes.into_iter().enumerate().try_for_each(|(number, outcome)| match outcome {
        Err(error) if number < count && error.is_missing() => Ok(()),
        outcome => outcome,
    })
}

/// Waits for the first queued interface, then takes up to `GROUP` in total.
fn next_batch(jobs: &Mutex<Receiver<Job>>) -> Option<Vec<Job>> {
    let jobs = jobs.lock().unwrap_or_else(PoisonError::into_inner);
    let first = jobs.recv().ok()?;
    Some(std::iter::once(first).chain(jobs.try_iter().take(GROUP - 1)).collect())
}
