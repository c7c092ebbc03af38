//! A blocking client of the agent's socket.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::frame::{self, FrameError};
use crate::message::{Reply, Request};

/// A connection to the agent. It holds what was added on it until it is dropped.
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
    socket: PathBuf,
}

/// Why there was no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens: the agent is not running, or the path is not its socket.
    #[error("polder-agent is not reachable at {}", socket.display())]
    Unreachable {
        /// The path that was tried.
        socket: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The agent was there and did not answer: it stopped, it is too slow, or it speaks another version.
    #[error("polder-agent at {} did not answer", socket.display())]
    NoAnswer {
        /// The path of its socket.
        socket: PathBuf,
        /// What happened instead.
        #[source]
        source: FrameError,
    },
}

impl Client {
    /// Connects to the agent at `socket`; no answer may then take longer than `patience`.
    pub fn connect(socket: &Path, patience: Duration) -> Result<Self, ClientError> {
        let connect = || {
            let stream = UnixStream::connect(socket)?;
            stream.set_read_timeout(Some(patience))?;
            stream.set_write_timeout(Some(patience))?;
            Ok(stream)
        };
        match connect() {
            Ok(stream) => Ok(Self { stream, socket: socket.to_owned() }),
            Err(source) => Err(ClientError::Unreachable { socket: socket.to_owned(), source }),
        }
    }

    /// Asks and waits for the answer.
    pub fn ask(&mut self, request: &Request) -> Result<Reply, ClientError> {
        let answered = frame::write(&mut self.stream, request).and_then(|()| frame::read(&mut self.stream));
        answered.map_err(|source| ClientError::NoAnswer { socket: self.socket.clone(), source })
    }
}
