//! Deletes pod interfaces.
//!
//! The kernel blocks the caller that deletes an interface for some 20 ms, in an RCU barrier, after the interface is
//! gone and the notification was sent. So separate threads delete interfaces, the notification ends the wait of the
//! callers, and interfaces that queue up meanwhile are deleted as a group, which takes as long as one deletion.

use std::collections::HashMap;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use polder_api::IfName;
use polder_netlink::{Error, IfIndex, RouteSocket, SocketError, link};
use tokio::sync::oneshot;
use tracing::warn;

/// Number of threads that delete interfaces.
const THREADS: u32 = 16;

/// Most interfaces that are deleted as one group: a large group holds the kernel's lock for a long time.
const GROUP: usize = 8;

/// First of the interface group numbers that the threads use for deletion ("PLD" in ASCII).
const FIRST_GROUP: u32 = 0x50_4c_44_00;

type Done = oneshot::Sender<Result<(), NotDeleted>>;

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
    /// Remedy: correct the kernel's error at the end of the text. The deletion is retried.
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
    /// Remedy: correct the kernel's error at the end of the text. The deletion is retried.
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
    queue: Sender<(IfName, Done)>,
    waiting: Waiting,
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
        let reaper = Self { queue, waiting: Waiting::default() };
        for number in 0..THREADS {
            let socket = RouteSocket::open()?;
            let (jobs, waiting) = (Arc::clone(&jobs), reaper.waiting.clone());
            let work = move || work(socket, FIRST_GROUP + number, &jobs, &waiting);
            let spawned = thread::Builder::new().name(format!("reaper-{number}")).spawn(work);
            spawned.map_err(SocketError::StartThread)?;
        }
        Ok(reaper)
    }

    /// A handle without threads: every deletion fails.
    pub fn idle() -> Self {
        Self { queue: channel().0, waiting: Waiting::default() }
    }

    /// Deletes the interface, and returns when it is gone. Succeeds if it does not exist.
    pub async fn delete(&self, name: IfName) -> Result<(), NotDeleted> {
        let (done, gone) = oneshot::channel();
        let stopped = || NotDeleted::Stopped(name.clone());
        self.queue.send((name.clone(), done)).map_err(|_| stopped())?;
        gone.await.map_err(|_| stopped())?
    }

    /// Ends the wait of the callers for the interface with that index, which is gone.
    pub fn is_gone(&self, index: IfIndex) {
        self.waiting.finish(index, &Ok(()));
    }
}

fn work(mut socket: RouteSocket, group: u32, jobs: &Mutex<Receiver<(IfName, Done)>>, waiting: &Waiting) {
    while let Some(batch) = next_batch(jobs) {
        let mut indexes = Vec::new();
        for (name, done) in batch {
            match socket.link(name.as_str()) {
                Ok(Some(link)) => {
                    waiting.add(link.index, done);
                    indexes.push((link.index, name));
                }
                Ok(None) => drop(done.send(Ok(()))),
                Err(error) => {
                    let error = Arc::new(error);
                    drop(done.send(Err(NotDeleted::Find { name, error })));
                }
            }
        }
        let outcome = match indexes.as_slice() {
            [] => continue,
            [(index, _)] => socket.execute_all([link::delete(*index)]),
            several => {
                let mark = several.iter().map(|(index, _)| link::change_index(*index).group(group).into());
                socket.execute_all(mark.chain([link::delete_group(group)]))
            }
        };
        let outcome = outcome.map_err(Arc::new);
        // The request for a group can fail because one interface is already gone, although the others were deleted:
        // check each.
        for (index, name) in indexes {
            let result = match (&outcome, socket.link_by_index(index)) {
                (_, Ok(None)) | (Ok(()), _) => Ok(()),
                (Err(error), _) => Err(NotDeleted::Delete { name: name.clone(), error: Arc::clone(error) }),
            };
            if let Err(reason) = &result {
                warn!(interface = %name, %reason, "interface not deleted");
            }
            waiting.finish(index, &result);
        }
    }
}

/// Waits for the first queued interface, then takes up to `GROUP` in total.
fn next_batch(jobs: &Mutex<Receiver<(IfName, Done)>>) -> Option<Vec<(IfName, Done)>> {
    let jobs = jobs.lock().unwrap_or_else(PoisonError::into_inner);
    let first = jobs.recv().ok()?;
    Some(std::iter::once(first).chain(jobs.try_iter().take(GROUP - 1)).collect())
}
