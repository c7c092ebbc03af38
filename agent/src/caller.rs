//! The client at the other end of the agent's socket.

use std::os::fd::AsRawFd;

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv};
use tokio::net::UnixStream;

use crate::repair;

/// The client of a connection. It may have ended since it sent the request.
#[derive(Debug)]
pub struct Caller<'a>(&'a UnixStream);

impl<'a> Caller<'a> {
    /// The client of this connection.
    pub fn new(stream: &'a UnixStream) -> Self {
        Self(stream)
    }

    /// Process and user id of the client, for the log.
    pub fn name(&self) -> String {
        let Ok(peer) = self.0.peer_cred() else { return "an unknown caller".to_owned() };
        let process = peer.pid().and_then(|id| u32::try_from(id).ok()).filter(|id| *id > 0);
        let process = process.map_or("an unknown process".to_owned(), |id| repair::process(id, None));
        format!("{process}, uid {}", peer.uid())
    }
}

impl polder_ipam::tasks::Caller for Caller<'_> {
    fn is_gone(&self) -> bool {
        let look = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        // While the client waits, it sends nothing and the connection is open: EAGAIN.
        recv(self.0.as_raw_fd(), &mut [0], look) != Err(Errno::EAGAIN)
    }
}
