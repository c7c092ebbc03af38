//! A blocking client of the agent's socket.

use std::collections::VecDeque;
use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::ask::Ask;
use crate::credentials::EtcdCredentials;
use crate::frame::{self, FrameError};
use crate::message::{Question, Refusal, Reply, Request};

/// A connection to the agent. It holds the attachments that were added on it until it is dropped.
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
    /// Bytes of the next reply that have been read already.
    received: VecDeque<u8>,
    socket: PathBuf,
    trace: Option<String>,
    credentials: Option<EtcdCredentials>,
}

/// Why no answer was received.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Cannot connect: the agent does not run, the path is not its socket, or the caller has no permission.
    #[error("polder-agent is not reachable at {}{}", socket.display(), remedy(source))]
    Unreachable {
        /// Path of the socket that was tried.
        socket: PathBuf,
        /// Error of the kernel.
        #[source]
        source: io::Error,
    },
    /// The agent accepted the connection but did not answer: it stopped, is too slow, or uses another protocol version.
    /// Remedy: check that polder-agent runs and is of the same release; see its log.
    #[error("polder-agent at {} did not answer", socket.display())]
    NoAnswer {
        /// Path of the agent's socket.
        socket: PathBuf,
        /// Cause.
        #[source]
        source: FrameError,
    },
}

/// The remedy, if the kind of error has one.
fn remedy(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::NotFound => {
            ": no socket there; start polder-agent on this node, or give the path of its socket"
        }
        io::ErrorKind::PermissionDenied => ": only root may use the socket; run the command as root",
        io::ErrorKind::ConnectionRefused => ": the agent has stopped; start it again",
        _ => "",
    }
}

/// Why a request has no answer of its type.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// No reply was received.
    #[error(transparent)]
    NoReply(#[from] ClientError),
    /// The agent refused the request.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The reply is of another type.
    #[error(
        "unexpected answer from polder-agent: polderctl and polder-agent must be of the same release; compare \
         polderctl --version with polder-agent --version"
    )]
    OtherAnswer,
}

impl Client {
    /// Connects to the agent at `socket`. `max_wait` is the timeout of each read and write.
    pub fn connect(socket: &Path, max_wait: Duration) -> Result<Self, ClientError> {
        let connect = || {
            let stream = UnixStream::connect(socket)?;
            stream.set_read_timeout(Some(max_wait))?;
            stream.set_write_timeout(Some(max_wait))?;
            Ok(stream)
        };
        match connect() {
            Ok(stream) => Ok(Self::of(stream, socket)),
            Err(source) => Err(ClientError::Unreachable { socket: socket.to_owned(), source }),
        }
    }

    fn of(stream: UnixStream, socket: &Path) -> Self {
        let received = VecDeque::new();
        Self { stream, received, socket: socket.to_owned(), trace: None, credentials: None }
    }

    /// Sets the trace context of the requests (W3C Trace Context).
    #[must_use]
    pub fn traced(mut self, trace: Option<String>) -> Self {
        self.trace = trace;
        self
    }

    /// Sets the etcd credentials of the requests.
    #[must_use]
    pub fn with_credentials(mut self, credentials: Option<EtcdCredentials>) -> Self {
        self.credentials = credentials;
        self
    }

    /// Sends a request and waits for the reply.
    pub fn ask(&mut self, request: Request) -> Result<Reply, ClientError> {
        self.send(request)?;
        self.receive()
    }

    /// Sends a request, and does not wait for its reply.
    pub fn send(&mut self, request: Request) -> Result<(), ClientError> {
        let question = Question { trace: self.trace.clone(), credentials: self.credentials.clone(), request };
        frame::write(&mut self.stream, &question).map_err(|source| self.no_answer(source))
    }

    /// Waits for the next reply.
    pub fn receive(&mut self) -> Result<Reply, ClientError> {
        let mut replies = self.received.by_ref().chain(&mut self.stream);
        frame::read(&mut replies).map_err(|source| self.no_answer(source))
    }

    fn no_answer(&self, source: FrameError) -> ClientError {
        ClientError::NoAnswer { socket: self.socket.clone(), source }
    }

    /// Sends a request and waits for its typed answer.
    pub fn get<A: Ask>(&mut self, ask: A) -> Result<A::Answer, AskError> {
        match self.ask(ask.request())? {
            Reply::Refused(refusal) => Err(refusal.into()),
            reply => A::answer(reply).map_err(|_| AskError::OtherAnswer),
        }
    }

    /// Whether the agent still holds the attachments of this connection. Sends nothing: the agent closes the connection
    /// when it ends the hold.
    pub fn is_open(&mut self) -> bool {
        let read =
            self.stream.set_nonblocking(true).and_then(|()| io::copy(&mut self.stream, &mut self.received));
        let is_open = read.is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock);
        is_open && self.stream.set_nonblocking(false).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::message::{Refusal, RefusalKind};

    fn connected() -> (Client, UnixStream) {
        let (stream, agent) = UnixStream::pair().unwrap();
        (Client::of(stream, Path::new("")), agent)
    }

    #[test]
    fn a_connection_is_open_until_it_ends_also_before_its_replies_are_read() {
        let (mut client, mut agent) = connected();
        assert!(client.is_open());
        // `is_open` has no side effect: the next request still waits for its reply.
        let refusal = Reply::Refused(Refusal { kind: RefusalKind::Missing, message: "nothing".to_owned() });
        client.send(Request::Status).unwrap();
        frame::read::<Question>(&mut agent).unwrap();
        let reply = frame::encode(&refusal).unwrap();
        let (first, last) = reply.split_at(7);
        agent.write_all(first).unwrap();
        assert!(client.is_open());
        agent.write_all(last).unwrap();
        frame::write(&mut agent, &Reply::Permitted).unwrap();
        assert!(client.is_open());
        assert_eq!(client.receive().unwrap(), refusal);
        assert_eq!(client.receive().unwrap(), Reply::Permitted);
        assert!(client.is_open());
        frame::write(&mut agent, &refusal).unwrap();
        drop(agent);
        assert!(!client.is_open(), "the agent has ended the connection");
        assert_eq!(client.receive().unwrap(), refusal);
    }
}
