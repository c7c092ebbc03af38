//! The lock that ensures one agent per node. Devices, routes and tables exist once per node, even if two agents use
//! different state directories.

use std::io;
use std::os::fd::AsFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};

use anyhow::{Context, bail};
use nix::sys::socket::{getsockopt, sockopt};
use tracing::warn;

/// An abstract socket name belongs to a network namespace, like the devices, and is released when its process ends.
const NAME: &str = "polder-agent";

/// Lock of the node, held until it is dropped.
#[derive(Debug)]
pub struct NodeLock {
    /// Accepts no connections. `None` if a process of another user has the name.
    _listener: Option<UnixListener>,
}

impl NodeLock {
    /// Locks the node, unless another agent of this network namespace has locked it.
    pub fn take() -> anyhow::Result<Self> {
        Self::take_named(NAME)
    }

    fn take_named(name: &str) -> anyhow::Result<Self> {
        let action =
            || format!("cannot take the abstract socket @{name}, which ensures one polder-agent per node");
        let address = SocketAddr::from_abstract_name(name).with_context(action)?;
        let error = match UnixListener::bind_addr(&address) {
            Ok(listener) => return Ok(Self { _listener: Some(listener) }),
            Err(error) => error,
        };
        if error.kind() != io::ErrorKind::AddrInUse {
            return Err(error).with_context(action);
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
            Ok(holder) => bail!(
                "another polder-agent runs on this node{}: only one can run per node, whatever its state_dir. Stop that one \
                 first, or do not start this one",
                process(holder.pid())
            ),
            Err(_) => bail!(
                "another polder-agent runs on this node, or is just stopping: only one can run per node, whatever its \
                 state_dir. Stop that one first, or do not start this one"
            ),
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
    fn the_name_has_one_holder_until_that_one_drops_it() {
        let name = format!("polder-agent-test-{}", std::process::id());
        let first = NodeLock::take_named(&name).unwrap();
        let said = NodeLock::take_named(&name).unwrap_err().to_string();
        assert!(said.contains(&format!("process {}", std::process::id())) && said.contains("Stop"), "{said}");
        drop(first);
        NodeLock::take_named(&name).unwrap();
    }
}
