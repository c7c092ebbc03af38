//! One owner for a piece of state: a thread that has it, and runs what others ask of it, in order.
//!
//! For what blocks (SQLite, netlink) and for what must not be shared. The queue is bounded: whoever asks faster
//! than the owner works waits.

use std::thread;

use tokio::sync::{mpsc, oneshot};

type Job<T> = Box<dyn FnOnce(&mut T) + Send>;

/// Jobs that wait before the next asker has to.
const QUEUE: usize = 256;

/// A handle to state on a thread of its own. The thread ends with the last handle.
#[derive(Debug)]
pub struct Owner<T> {
    jobs: mpsc::Sender<Job<T>>,
}

impl<T> Clone for Owner<T> {
    fn clone(&self) -> Self {
        Self { jobs: self.jobs.clone() }
    }
}

impl<T: Send + 'static> Owner<T> {
    /// Gives the state to a new thread of that name.
    pub fn spawn(name: &str, mut state: T) -> std::io::Result<Self> {
        let (jobs, mut queue) = mpsc::channel::<Job<T>>(QUEUE);
        thread::Builder::new().name(name.to_owned()).spawn(move || {
            while let Some(job) = queue.blocking_recv() {
                job(&mut state);
            }
        })?;
        Ok(Self { jobs })
    }

    /// Runs the job where the state is, after those that were there before. A job that was begun is finished even
    /// if the asker stops waiting.
    pub async fn run<R: Send + 'static>(&self, job: impl FnOnce(&mut T) -> R + Send + 'static) -> R {
        let (reply, answer) = oneshot::channel();
        let job = Box::new(move |state: &mut T| {
            let _ = reply.send(job(state));
        });
        let sent = self.jobs.send(job).await;
        assert!(sent.is_ok(), "the owner's thread has panicked, and its state is lost");
        answer.await.expect("the owner's thread has panicked, and its state is lost")
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
}
