//! State with one owner: a thread runs the jobs of other tasks on it, in order.
//!
//! For blocking operations (SQLite, netlink) and state that must not be shared. The queue is bounded: a task waits
//! while it is full.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

type Job<T> = Box<dyn FnOnce(&mut T) + Send>;

/// Maximum number of waiting jobs; further callers wait.
const QUEUE: usize = 256;

/// A handle to state that a thread owns. The thread ends when the last handle is dropped.
#[derive(Debug)]
pub struct Owner<T> {
    jobs: mpsc::Sender<Job<T>>,
    /// Number of finished jobs.
    finished: Arc<AtomicU64>,
}

impl<T> Clone for Owner<T> {
    fn clone(&self) -> Self {
        Self { jobs: self.jobs.clone(), finished: Arc::clone(&self.finished) }
    }
}

/// A queued job whose result is not awaited yet.
#[derive(Debug)]
pub struct StartedJob<R>(oneshot::Receiver<R>);

impl<R> StartedJob<R> {
    /// Waits for the result.
    pub async fn result(self) -> R {
        self.0.await.expect("the owner thread panicked, and its state is lost")
    }
}

impl<T: Send + 'static> Owner<T> {
    /// Moves the state to a new thread of that name.
    pub fn spawn(name: &str, mut state: T) -> std::io::Result<Self> {
        let (jobs, mut queue) = mpsc::channel::<Job<T>>(QUEUE);
        let finished = Arc::new(AtomicU64::new(0));
        let counter = Arc::clone(&finished);
        thread::Builder::new().name(name.to_owned()).spawn(move || {
            while let Some(job) = queue.blocking_recv() {
                job(&mut state);
                counter.fetch_add(1, Ordering::Relaxed);
            }
        })?;
        Ok(Self { jobs, finished })
    }

    /// Runs the job on the thread of the state, after all jobs queued before. A job in the queue runs even if the
    /// caller stops waiting.
    pub async fn run<R: Send + 'static>(&self, job: impl FnOnce(&mut T) -> R + Send + 'static) -> R {
        self.start(job).await.result().await
    }

    /// Queues the job after all jobs queued before. Its result can be awaited later.
    pub async fn start<R: Send + 'static>(
        &self,
        job: impl FnOnce(&mut T) -> R + Send + 'static,
    ) -> StartedJob<R> {
        let (reply, answer) = oneshot::channel();
        let job = move |state: &mut T| {
            let _ = reply.send(job(state));
        };
        self.queue(job).await;
        StartedJob(answer)
    }

    /// Queues the job after all jobs queued before, and does not wait for it. Waits while the queue is full.
    pub async fn queue(&self, job: impl FnOnce(&mut T) + Send + 'static) {
        let sent = self.jobs.send(Box::new(job)).await;
        assert!(sent.is_ok(), "the owner thread panicked, and its state is lost");
    }

    /// Whether the thread finishes any job within that time, so that a long queue does not count as stuck.
    pub async fn works(&self, max_wait: Duration) -> bool {
        let before = self.finished.load(Ordering::Relaxed);
        timeout(max_wait, self.run(|_| ())).await.is_ok() || self.finished.load(Ordering::Relaxed) != before
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn jobs_run_sequentially_on_the_same_state() {
        let owner = Owner::spawn("counter", 0_u32).unwrap();
        let jobs: Vec<_> = (0..50)
            .map(|_| {
                let owner = owner.clone();
                tokio::spawn(async move {
                    owner
                        .run(|count| {
                            let before = *count;
                            thread::yield_now();
                            *count = before + 1;
                        })
                        .await;
                })
            })
            .collect();
        for job in jobs {
            job.await.unwrap();
        }
        assert_eq!(owner.run(|count| *count).await, 50);
    }

    #[tokio::test]
    async fn a_thread_that_completes_jobs_works_and_a_blocked_thread_does_not() {
        let max_wait = Duration::from_secs(1);
        // Each job ends on a signal of the test, so that the speed of the machine does not matter.
        let owner = Owner::spawn("owner", ()).unwrap();
        let (next, received) = std::sync::mpsc::channel::<()>();
        let received = Arc::new(std::sync::Mutex::new(received));
        for _ in 0..2 {
            let (owner, received) = (owner.clone(), Arc::clone(&received));
            tokio::spawn(async move { owner.run(move |()| received.lock().unwrap().recv()).await });
        }
        while owner.jobs.capacity() == QUEUE {
            tokio::task::yield_now().await;
        }
        assert!(!owner.works(max_wait).await, "a job blocks the thread");
        let (works, sent) = tokio::join!(owner.works(max_wait), async { next.send(()) });
        sent.unwrap();
        assert!(works, "it has finished one of several");
        drop(next);
        assert!(owner.works(Duration::from_secs(30)).await);
    }
}
