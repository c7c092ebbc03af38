//! What systemd hears of an agent: its end of the socket that `sd_notify(3)` speaks to.

use std::os::unix::net::UnixDatagram;
use std::time::Duration;

use crate::agent::Worker;
use crate::wait;

/// The end of the socket, and all lines that were heard.
#[derive(Debug)]
pub struct ServiceManager {
    socket: UnixDatagram,
    heard: Vec<String>,
}

impl ServiceManager {
    /// Listens to the agent of that node from its next start on, which is told of a watchdog with this time.
    pub fn of(worker: &mut Worker, watchdog: Duration) -> Self {
        let path = worker.node.folder().join("notify.sock");
        let socket = UnixDatagram::bind(&path).expect("a socket in the node's folder");
        socket.set_nonblocking(true).expect("sockets can");
        let variables = [
            ("NOTIFY_SOCKET", path.display().to_string()),
            ("WATCHDOG_USEC", watchdog.as_micros().to_string()),
        ];
        worker.variables.extend(variables.map(|(name, value)| (name.to_owned(), value)));
        Self { socket, heard: Vec::new() }
    }

    /// All that was heard so far, line by line.
    pub fn heard(&mut self) -> &[String] {
        let mut message = [0; 4096];
        while let Ok(length) = self.socket.recv(&mut message) {
            let text = String::from_utf8_lossy(&message[..length]);
            self.heard.extend(text.lines().map(ToOwned::to_owned));
        }
        &self.heard
    }

    /// Forgets what was heard.
    pub fn forget(&mut self) {
        self.heard();
        self.heard.clear();
    }

    /// How often that line was heard.
    pub fn count(&mut self, line: &str) -> usize {
        self.heard().iter().filter(|heard| *heard == line).count()
    }

    /// Waits until that line is heard.
    pub fn wait_for(&mut self, line: &str) {
        self.wait_for_any(line, |heard| heard == line);
    }

    /// Waits until the status says that.
    pub fn wait_for_status(&mut self, words: &str) {
        self.wait_for_any(words, |heard| heard.starts_with("STATUS=") && heard.contains(words));
    }

    fn wait_for_any(&mut self, what: &str, is_it: impl Fn(&str) -> bool) {
        wait::until(&format!("systemd to hear {what}"), || {
            let heard = self.heard();
            if heard.iter().any(|line| is_it(line)) { Ok(()) } else { Err(heard.join(" | ")) }
        });
    }
}
