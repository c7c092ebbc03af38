//! Watches the routes of a node with `ip monitor`.

use std::collections::HashMap;
use std::io::{BufRead, BufReader};
use std::process::{Child, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Instant;

use anyhow::Context;

use crate::node::Node;

/// A route that was created or replaced, and when.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// When the line of `ip monitor` was read.
    pub at: Instant,
    /// The destination.
    pub destination: String,
    /// The next hop.
    pub gateway: String,
}

/// A running `ip monitor`. It ends when this is dropped.
#[derive(Debug)]
pub struct Follower {
    child: Child,
    /// The routes since the start.
    pub routes: Receiver<Seen>,
}

impl Follower {
    /// Starts to watch.
    pub fn start(node: &Node) -> anyhow::Result<Self> {
        let mut command = node.command("ip");
        command.args(["-o", "monitor", "route"]).stdin(Stdio::null()).stdout(Stdio::piped());
        let mut child = command.spawn().context("start nsenter")?;
        let output = BufReader::new(child.stdout.take().context("a pipe")?);
        let (sender, routes) = channel();
        std::thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                let at = Instant::now();
                if let Some((destination, gateway)) = parse(&line)
                    && sender.send(Seen { at, destination, gateway }).is_err()
                {
                    return;
                }
            }
        });
        Ok(Self { child, routes })
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        let nsenter = self.child.id();
        if let Ok(monitor) = crate::node::child_of(nsenter) {
            let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(monitor), nix::sys::signal::SIGTERM);
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Destination and next hop of a new route; `None` for a deleted one, and for other lines.
fn parse(line: &str) -> Option<(String, String)> {
    let mut words = line.split_whitespace().filter(|word| *word != "[ROUTE]" && *word != "unicast");
    let destination = words.next().filter(|word| *word != "Deleted")?;
    let mut rest = words.skip_while(|word| *word != "via").skip(1);
    Some((destination.to_owned(), rest.next()?.to_owned()))
}

/// Changes that have not arrived in the kernel yet.
#[derive(Debug, Default)]
pub struct Pending {
    changes: HashMap<String, Vec<(String, Instant)>>,
    count: usize,
}

impl Pending {
    /// A change that was made at that time.
    pub fn add(&mut self, destination: String, gateway: String, at: Instant) {
        self.changes.entry(destination).or_default().push((gateway, at));
        self.count += 1;
    }

    /// The delays, in seconds, of the changes that this route ends: the newest change to its next hop, and all changes
    /// of its destination before that one, which the agent has skipped.
    pub fn arrive(&mut self, seen: &Seen) -> Vec<f64> {
        let Some(changes) = self.changes.get_mut(&seen.destination) else { return Vec::new() };
        let Some(newest) = changes.iter().rposition(|(gateway, _)| *gateway == seen.gateway) else {
            return Vec::new();
        };
        let done = changes.drain(..=newest);
        let delays: Vec<f64> =
            done.map(|(_, at)| seen.at.saturating_duration_since(at).as_secs_f64()).collect();
        self.count -= delays.len();
        delays
    }

    /// Number of changes that have not arrived.
    pub fn count(&self) -> usize {
        self.count
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn new_routes_are_recognized_and_deleted_ones_ignored() {
        let pair = |a: &str, b: &str| Some((a.to_owned(), b.to_owned()));
        assert_eq!(
            parse("10.128.0.64/26 via 10.128.0.65 dev polder.vx proto 84 metric 84 onlink"),
            pair("10.128.0.64/26", "10.128.0.65")
        );
        assert_eq!(parse("unicast 10.0.0.0/26 via 10.0.0.1 dev x"), pair("10.0.0.0/26", "10.0.0.1"));
        assert_eq!(parse("Deleted 10.128.0.64/26 via 10.128.0.65 dev polder.vx"), None);
        assert_eq!(parse("10.128.0.64/26 dev eth0 scope link"), None);
    }

    #[test]
    fn a_route_ends_its_change_and_the_skipped_ones_before() {
        let begin = Instant::now();
        let at = |seconds| begin + Duration::from_secs(seconds);
        let seen = |gateway: &str, seconds| Seen {
            at: at(seconds),
            destination: "d".to_owned(),
            gateway: gateway.to_owned(),
        };
        let mut pending = Pending::default();
        for (second, gateway) in ["a", "b", "c"].into_iter().enumerate() {
            pending.add("d".to_owned(), gateway.to_owned(), at(second as u64));
        }
        assert_eq!(pending.arrive(&seen("b", 5)), [5.0, 4.0]);
        assert_eq!(pending.arrive(&seen("b", 6)), [0.0; 0]);
        assert_eq!(pending.count(), 1);
        assert_eq!(pending.arrive(&seen("c", 6)), [4.0]);
        assert_eq!(pending.count(), 0);
    }
}
