//! One owner for a piece of state: a thread that has it, and runs what others ask of it, in order.
//!
//! For what blocks (SQLite, netlink) and for what must not be shared. The queue is bounded: whoever asks faster
//! than the owner works waits.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

type Job<T> = Box<dyn FnOnce(&mut T) + Send>;

/// Jobs that wait before the next asker has to.
const QUEUE: usize = 256;

/// A handle to state on a thread of its own. The thread ends with the last handle.
#[derive(Debug)]
pub struct Owner<T> {
    jobs: mpsc::Sender<Job<T>>,
    /// How many jobs were finished.
    finished: Arc<AtomicU64>,
}

impl<T> Clone for Owner<T> {
    fn clone(&self) -> Self {
        Self { jobs: self.jobs.clone(), finished: Arc::clone(&self.finished) }
    }
}

impl<T: Send + 'static> Owner<T> {
    /// Gives the state to a new thread of that name.
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

    /// Runs the job where the state is, after those that were there before. A job that was begun is finished even
    /// if the asker stops waiting.
    pub async fn run<R: Send + 'static>(&self, job: impl FnOnce(&mut T) -> R + Send + 'static) -> R {
        let (reply, answer) = oneshot::channel();
        let job = Box::new(move |state: &mut T| {
            let _ = reply.send(job(state));
        });
        let sent = self.jobs.send(job).await;
        assert!(sent.is_ok(), "the owner thread panicked, and its state is lost");
        answer.await.expect("the owner thread panicked, and its state is lost")
    }

    /// Whether the thread finishes a job within that time. One with a long queue does its work, too.
    pub async fn works(&self, patience: Duration) -> bool {
        let before = self.finished.load(Ordering::Relaxed);
        timeout(patience, self.run(|_| ())).await.is_ok() || self.finished.load(Ordering::Relaxed) != before
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn jobs_run_one_after_another_on_the_same_state() {
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
    async fn a_thread_with_a_long_queue_works_and_one_that_stands_still_does_not() {
        let patience = Duration::from_secs(1);
        // Each job ends when it is told to, so that it does not matter how fast this machine is.
        let owner = Owner::spawn("owner", ()).unwrap();
        let (next, told) = std::sync::mpsc::channel::<()>();
        let told = Arc::new(std::sync::Mutex::new(told));
        for _ in 0..2 {
            let (owner, told) = (owner.clone(), Arc::clone(&told));
            tokio::spawn(async move { owner.run(move |()| told.lock().unwrap().recv()).await });
        }
        while owner.jobs.capacity() == QUEUE {
            tokio::task::yield_now().await;
        }
        assert!(!owner.works(patience).await, "it stands still");
        let (works, sent) = tokio::join!(owner.works(patience), async { next.send(()) });
        sent.unwrap();
        assert!(works, "it has finished one of several");
        drop(next);
        assert!(owner.works(Duration::from_secs(30)).await);
    }
}
