//! How far the runtimes are, all together, and how far they may go: faults happen at steps, and not at times.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// Counts steps.
#[derive(Debug)]
pub struct Pace {
    steps: Mutex<Steps>,
    changed: Condvar,
}

#[derive(Debug)]
struct Steps {
    done: usize,
    allowed: usize,
    last: usize,
}

impl Pace {
    /// Of that many steps none is done, and none is allowed yet.
    pub fn new(last: usize) -> Self {
        Self { steps: Mutex::new(Steps { done: 0, allowed: 0, last }), changed: Condvar::new() }
    }

    fn steps(&self) -> MutexGuard<'_, Steps> {
        self.steps.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the next step, as soon as it is allowed; false after the last one.
    pub fn step(&self) -> bool {
        let mut steps = self.steps();
        loop {
            if steps.done >= steps.last {
                return false;
            }
            if steps.done < steps.allowed {
                steps.done += 1;
                self.changed.notify_all();
                return true;
            }
            steps = self.changed.wait(steps).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Allows as many steps, and returns when they are taken, or there are to be no more.
    pub fn go_on_to(&self, step: usize) {
        let mut steps = self.steps();
        steps.allowed = step;
        self.changed.notify_all();
        while steps.done < step.min(steps.last) {
            steps = self.changed.wait(steps).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Allows as many steps, without waiting.
    pub fn allow(&self, step: usize) {
        self.steps().allowed = step;
        self.changed.notify_all();
    }

    /// Ends it: there is no further step.
    pub fn stop(&self) {
        let mut steps = self.steps();
        steps.last = steps.done;
        self.changed.notify_all();
    }
}

/// Stops the others when whoever has it panics, so that the program ends.
#[derive(Debug)]
pub struct StopOnPanic<'a>(pub &'a Pace);

impl Drop for StopOnPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.stop();
        }
    }
}
