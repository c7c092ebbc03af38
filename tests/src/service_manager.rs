//! The messages of an agent to systemd: the receiving end of the socket of `sd_notify(3)`.

use std::os::unix::net::UnixDatagram;
use std::time::Duration;

use crate::agent::Worker;
use crate::wait;

/// The receiving socket, and all lines received.
#[derive(Debug)]
pub struct ServiceManager {
    socket: UnixDatagram,
    received: Vec<String>,
}

impl ServiceManager {
    /// Receives the messages of that node's agent from its next start on, and sets this watchdog timeout.
    pub fn of(worker: &mut Worker, watchdog: Duration) -> Self {
        let path = worker.node.folder().join("notify.sock");
        let socket = UnixDatagram::bind(&path).expect("a socket in the node's folder");
        socket.set_nonblocking(true).expect("sockets can");
        let variables = [
            ("NOTIFY_SOCKET", path.display().to_string()),
            ("WATCHDOG_USEC", watchdog.as_micros().to_string()),
        ];
        worker.variables.extend(variables.map(|(name, value)| (name.to_owned(), value)));
        Self { socket, received: Vec::new() }
    }

    /// All lines received so far.
    pub fn received(&mut self) -> &[String] {
        let mut message = [0; 4096];
        while let Ok(length) = self.socket.recv(&mut message) {
            let text = String::from_utf8_lossy(&message[..length]);
            self.received.extend(text.lines().map(ToOwned::to_owned));
        }
        &self.received
    }

    /// Discards all lines received so far.
    pub fn forget(&mut self) {
        self.received();
        self.received.clear();
    }

    /// How often that line was received.
    pub fn count(&mut self, line: &str) -> usize {
        self.received().iter().filter(|received| *received == line).count()
    }

    /// Waits until that line is received.
    pub fn wait_for(&mut self, line: &str) {
        self.wait_for_any(line, |received| received == line);
    }

    /// Waits until a status with these words is received.
    pub fn wait_for_status(&mut self, words: &str) {
        self.wait_for_any(words, |received| received.starts_with("STATUS=") && received.contains(words));
    }

    fn wait_for_any(&mut self, what: &str, is_it: impl Fn(&str) -> bool) {
        wait::until(&format!("systemd to hear {what}"), || {
            let received = self.received();
            if received.iter().any(|line| is_it(line)) { Ok(()) } else { Err(received.join(" | ")) }
        });
    }
}
