//! The progress line on standard error.

use std::io::{IsTerminal, Write, stderr};
use std::time::{Duration, Instant};

/// Interval of the lines where standard error is a file.
const INTERVAL: Duration = Duration::from_secs(10);

/// Shows what is measured now: one line that is overwritten on a terminal, else a line from time to time.
#[derive(Debug)]
pub struct Progress {
    begin: Instant,
    shown: Option<Instant>,
    terminal: bool,
}

impl Progress {
    /// Begins now.
    pub fn start() -> Self {
        Self { begin: Instant::now(), shown: None, terminal: stderr().is_terminal() }
    }

    /// Shows this step.
    pub fn step(&mut self, text: &str) {
        let seconds = self.begin.elapsed().as_secs();
        let mut out = stderr().lock();
        let _ = if self.terminal {
            write!(out, "\r\x1b[K{seconds:>4} s  {text}").and_then(|()| out.flush())
        } else if self.shown.is_none_or(|shown| shown.elapsed() >= INTERVAL) {
            self.shown = Some(Instant::now());
            writeln!(out, "{seconds:>4} s  {text}")
        } else {
            Ok(())
        };
    }

    /// Removes the line from the terminal.
    pub fn clear(&mut self) {
        if self.terminal {
            let _ = write!(stderr(), "\r\x1b[K");
        }
    }

    /// Time since the start.
    pub fn elapsed(&self) -> Duration {
        self.begin.elapsed()
    }
}
