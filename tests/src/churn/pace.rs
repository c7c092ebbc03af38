//! Progress of all runtimes together, and their limit: faults happen at steps, not at times.

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
    /// Starts without done or allowed steps; `last` is the total number of steps.
    pub fn new(last: usize) -> Self {
        Self { steps: Mutex::new(Steps { done: 0, allowed: 0, last }), changed: Condvar::new() }
    }

    fn steps(&self) -> MutexGuard<'_, Steps> {
        self.steps.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the next step as soon as it is allowed. Returns false after the last step.
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

    /// Allows steps up to this number. Returns when they are done, or no step is left.
    pub fn go_on_to(&self, step: usize) {
        let mut steps = self.steps();
        steps.allowed = step;
        self.changed.notify_all();
        while steps.done < step.min(steps.last) {
            steps = self.changed.wait(steps).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Allows steps up to this number, without waiting.
    pub fn allow(&self, step: usize) {
        self.steps().allowed = step;
        self.changed.notify_all();
    }

    /// Ends the run: no further step is allowed.
    pub fn stop(&self) {
        let mut steps = self.steps();
        steps.last = steps.done;
        self.changed.notify_all();
    }
}

/// Stops the other threads if its owner panics, so that the program ends.
#[derive(Debug)]
pub struct StopOnPanic<'a>(pub &'a Pace);

impl Drop for StopOnPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.stop();
        }
    }
}
