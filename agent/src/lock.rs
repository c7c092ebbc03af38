//! The lock that ensures one agent per node. Devices, routes and tables exist once per node, even if two agents use
//! different state directories.

use std::io;
use std::os::fd::AsFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};

use nix::sys::socket::{getsockopt, sockopt};
use tracing::warn;

/// An abstract socket name belongs to a network namespace, like the devices, and is released when its process ends.
const NAME: &str = "polder-agent";

/// The node was not locked for this process.
#[derive(Debug, thiserror::Error)]
pub enum NodeNotLocked {
    /// The kernel refused to create the abstract socket.
    /// Remedy: check that the process may create Unix sockets (seccomp profile, security module, limit of open files).
    #[error("cannot take the abstract socket @{name}, which ensures one polder-agent per node")]
    Unusable {
        /// Name of the socket.
        name: String,
        /// The error.
        #[source]
        source: io::Error,
    },
    /// Another process of root holds the abstract socket of the agent.
    #[error(
        "another polder-agent runs on this node{}: only one can run per node, whatever its state_dir. Stop that one \
         first, or do not start this one",
        process(*pid)
    )]
    Held {
        /// Process id of the other agent; 0 if it is in another PID namespace.
        pid: i32,
    },
    /// The abstract socket of the agent is in use, but its process cannot be determined.
    #[error(
        "another polder-agent runs on this node, or is just stopping: only one can run per node, whatever its \
         state_dir. Stop that one first, or do not start this one"
    )]
    HeldByUnknown,
}

/// Lock of the node, held until it is dropped.
#[derive(Debug)]
pub struct NodeLock {
    /// Accepts no connections. `None` if a process of another user has the name.
    _listener: Option<UnixListener>,
}

impl NodeLock {
    /// Locks the node, unless another agent of this network namespace has locked it.
    pub fn take() -> Result<Self, NodeNotLocked> {
        Self::take_named(NAME)
    }

    fn take_named(name: &str) -> Result<Self, NodeNotLocked> {
        let unusable = |source| NodeNotLocked::Unusable { name: name.to_owned(), source };
        let address = SocketAddr::from_abstract_name(name).map_err(unusable)?;
        let error = match UnixListener::bind_addr(&address) {
            Ok(listener) => return Ok(Self { _listener: Some(listener) }),
            Err(error) => error,
        };
        if error.kind() != io::ErrorKind::AddrInUse {
            return Err(unusable(error));
        }
        let holder = UnixStream::connect_addr(&address)
            .and_then(|stream| Ok(getsockopt(&stream.as_fd(), sockopt::PeerCredentials)?));
        match holder {
            // Any user can bind an abstract name; this must not keep the agent from starting.
            Ok(holder) if holder.uid() != 0 => {
                warn!(
                    pid = holder.pid(),
                    uid = holder.uid(),
                    "a non-root process holds the abstract socket @{name}: a second agent on this node would not be \
                     detected. End that process, and restart polder-agent"
                );
                Ok(Self { _listener: None })
            }
            Ok(holder) => Err(NodeNotLocked::Held { pid: holder.pid() }),
            Err(_) => Err(NodeNotLocked::HeldByUnknown),
        }
    }
}

/// Text for the process id; empty for a process of another PID namespace, which has no id in this one.
fn process(pid: i32) -> String {
    if pid == 0 { String::new() } else { format!(" (process {pid})") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_lock_has_one_holder_at_a_time() {
        let name = format!("polder-agent-test-{}", std::process::id());
        let first = NodeLock::take_named(&name).unwrap();
        let said = NodeLock::take_named(&name).unwrap_err().to_string();
        assert!(said.contains(&format!("process {}", std::process::id())) && said.contains("Stop"), "{said}");
        drop(first);
        NodeLock::take_named(&name).unwrap();
    }
}
