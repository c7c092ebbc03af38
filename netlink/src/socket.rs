//! A blocking netlink socket: sends requests in batches and returns the outcome of each.
//!
//! It keeps information that common libraries drop: the error at the end of a failed dump, the flag of a dump that
//! was interrupted by changes, and the kernel's text of an error. It ignores late answers to earlier requests.

mod answer;

use std::fmt::Debug;
use std::marker::PhantomData;

use netlink_packet_core::{
    DecodeError, NLM_F_ACK, NLM_F_DUMP, NLM_F_ECHO, NLM_F_REQUEST, NetlinkDeserializable, NetlinkHeader,
    NetlinkMessage, NetlinkPayload, NetlinkSerializable,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::SocketAddr;
use netlink_sys::protocols::NETLINK_ROUTE;
use nix::errno::Errno;
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::{TimeVal, TimeValLike};

use self::answer::{Answer, all_ended};
use crate::{Error, SocketError};

/// Size of the receive buffer, in bytes: the largest dump message of the kernel is 32 KiB, and no larger single one
/// is known.
const RECEIVE_BUFFER: usize = 64 << 10;

/// Requests per batch. Acknowledgements wait in the receive queue and take about 800 bytes each: this many always fit.
const BATCH: usize = 128;

/// Receive timeout in seconds. The kernel answers during the send, so it only matters if an answer is lost.
const REPLY_TIMEOUT_SECONDS: i64 = 10;

/// A netlink protocol: its messages and its number.
pub trait Protocol: NetlinkSerializable + NetlinkDeserializable + Debug {
    /// The protocol number, `NETLINK_*`.
    const NUMBER: isize;

    /// Decodes one message.
    fn decode(message: &[u8]) -> Result<NetlinkMessage<Self>, DecodeError> {
        NetlinkMessage::deserialize(message)
    }

    /// Handles a message that cannot be decoded: returns it in a form that can be decoded, or `None` to skip it, or
    /// an error if the whole answer is unusable (the default).
    fn undecodable(_message: &[u8], error: DecodeError) -> Result<Option<Vec<u8>>, Error> {
        Err(error.into())
    }
}

impl Protocol for RouteNetlinkMessage {
    const NUMBER: isize = NETLINK_ROUTE;

    fn undecodable(message: &[u8], error: DecodeError) -> Result<Option<Vec<u8>>, Error> {
        crate::link::undecodable(message, error)
    }
}

/// A socket for links, addresses, routes and neighbours.
pub type RouteSocket = Socket<RouteNetlinkMessage>;

/// A change to the kernel's state, ready to be sent.
#[derive(Debug, Clone)]
pub struct Operation<M = RouteNetlinkMessage> {
    message: M,
    flags: u16,
    harmless: Option<Errno>,
}

impl<M> Operation<M> {
    /// `flags` are the `NLM_F_*` flags in addition to request and acknowledgement.
    pub fn new(message: impl Into<M>, flags: u16) -> Self {
        Self { message: message.into(), flags, harmless: None }
    }

    /// Requests that the kernel echoes the created object.
    #[must_use]
    pub(crate) fn echoed(self) -> Self {
        Self { flags: self.flags | NLM_F_ECHO, ..self }
    }

    /// Treats that error as success. Not in a transaction, which fails as a whole.
    #[must_use]
    pub fn harmless_if(self, errno: Errno) -> Self {
        Self { harmless: Some(errno), ..self }
    }
}

/// The outcome of an operation, and the objects that the kernel echoed.
type Executed<M> = (Result<(), Error>, Vec<M>);

/// A blocking socket of one protocol. It belongs to the network namespace in which it was opened, also when another
/// thread uses it.
#[derive(Debug)]
pub struct Socket<M> {
    inner: netlink_sys::Socket,
    read_only: bool,
    sequence: u32,
    buffer: Vec<u8>,
    protocol: PhantomData<M>,
}

impl<M: Protocol> Socket<M> {
    /// Opens a socket in the network namespace of the calling thread.
    pub fn open() -> Result<Self, Error> {
        let mut inner = netlink_sys::Socket::new(M::NUMBER).map_err(SocketError::Open)?;
        inner.bind_auto().map_err(SocketError::Bind)?;
        // Request the text of an error, without a copy of the request.
        inner.set_ext_ack(true).map_err(SocketError::Configure)?;
        inner.set_cap_ack(true).map_err(SocketError::Configure)?;
        // The kernel filters dumps, and rejects a filter that it does not support instead of ignoring it.
        inner.set_netlink_get_strict_chk(true).map_err(SocketError::Configure)?;
        let timeout = TimeVal::seconds(REPLY_TIMEOUT_SECONDS);
        setsockopt(&inner, sockopt::ReceiveTimeout, &timeout)
            .and_then(|()| setsockopt(&inner, sockopt::RcvBufForce, &(1 << 20)))
            .and_then(|()| setsockopt(&inner, sockopt::SndBufForce, &(8 << 20)))
            .map_err(|errno| SocketError::Configure(errno.into()))?;
        let buffer = Vec::with_capacity(RECEIVE_BUFFER);
        Ok(Self { inner, read_only: false, sequence: 0, buffer, protocol: PhantomData })
    }

    /// Opens a read-only socket: a change is refused without sending anything to the kernel.
    pub fn open_to_read() -> Result<Self, Error> {
        Ok(Self { read_only: true, ..Self::open()? })
    }

    /// The port number by which notifications identify this socket.
    pub fn port(&self) -> Result<u32, Error> {
        let mut address = SocketAddr::new(0, 0);
        self.inner.get_address(&mut address).map_err(SocketError::ReadPort)?;
        Ok(address.port_number())
    }

    /// Executes the operations in order and returns the outcome of each. A failed one does not stop the rest.
    ///
    /// The outer error means that the socket failed; it is then unknown which operations were executed.
    pub fn execute(
        &mut self,
        operations: impl IntoIterator<Item = Operation<M>>,
    ) -> Result<Vec<Result<(), Error>>, Error> {
        let executed = self.execute_echoed(operations)?;
        Ok(executed.into_iter().map(|(outcome, _)| outcome).collect())
    }

    /// Executes the operations in order and returns the outcome of each, with the objects that the kernel echoes
    /// (`NLM_F_ECHO`).
    pub(crate) fn execute_echoed(
        &mut self,
        operations: impl IntoIterator<Item = Operation<M>>,
    ) -> Result<Vec<Executed<M>>, Error> {
        let mut outcomes = Vec::new();
        let mut operations = operations.into_iter().peekable();
        if self.read_only && operations.peek().is_some() {
            return Err(Error::ReadOnly);
        }
        loop {
            let batch = operations.by_ref().take(BATCH).map(|op| ((op.message, op.flags), op.harmless));
            let (batch, harmless): (Vec<_>, Vec<_>) = batch.unzip();
            if batch.is_empty() {
                return Ok(outcomes);
            }
            let answers = self.exchange(batch, NLM_F_ACK, |answers| all_ended(answers))?;
            outcomes.extend(answers.into_iter().zip(harmless).map(|(answer, harmless)| {
                let outcome = match answer.end.unwrap_or(Err(Error::NoAnswer)) {
                    Err(error) if harmless.is_some() && error.errno() == harmless => Ok(()),
                    end => end,
                };
                (outcome, answer.messages)
            }));
        }
    }

    /// Executes the operations in order. Returns the first failure, which does not stop the rest.
    pub fn execute_all(&mut self, operations: impl IntoIterator<Item = Operation<M>>) -> Result<(), Error> {
        self.execute(operations)?.into_iter().collect()
    }

    /// Executes all operations between `begin` and `end`, or none (nftables). Never split into batches.
    ///
    /// The kernel reports errors of the whole transaction as answer to `begin`.
    pub(crate) fn transact(&mut self, begin: M, operations: Vec<Operation<M>>, end: M) -> Result<(), Error> {
        if self.read_only {
            return Err(Error::ReadOnly);
        }
        let inner = operations.into_iter().map(|op| (op.message, op.flags | NLM_F_ACK));
        let batch = std::iter::once((begin, 0)).chain(inner).chain([(end, 0)]).collect();
        let finished = |answers: &mut [Answer<M>]| match answers {
            [begin, inner @ .., _] => begin.end.is_some() || all_ended(inner),
            _ => true,
        };
        self.exchange(batch, 0, finished)?.into_iter().try_for_each(|answer| answer.end.unwrap_or(Ok(())))
    }

    /// Reads one object.
    pub(crate) fn get(&mut self, message: impl Into<M>) -> Result<M, Error> {
        self.get_with(message, 0)
    }

    /// Reads one object; `flags` are the `NLM_F_*` flags in addition to request and acknowledgement.
    pub(crate) fn get_with(&mut self, message: impl Into<M>, flags: u16) -> Result<M, Error> {
        let mut answers =
            self.exchange(vec![(message.into(), flags)], NLM_F_ACK, |answers| all_ended(answers))?;
        let answer = answers.pop().ok_or(Error::NoAnswer)?;
        answer.end.unwrap_or(Ok(()))?;
        answer.messages.into_iter().next().ok_or(Error::NoAnswer)
    }

    /// Reads one object for each message, in this order, with few system calls. The outer error means that the socket
    /// failed.
    pub(crate) fn get_each(
        &mut self,
        messages: impl IntoIterator<Item = M>,
    ) -> Result<Vec<Result<M, Error>>, Error> {
        let mut found = Vec::new();
        let mut messages = messages.into_iter();
        loop {
            let batch: Vec<_> = messages.by_ref().take(BATCH).map(|message| (message, 0)).collect();
            if batch.is_empty() {
                return Ok(found);
            }
            let answers = self.exchange(batch, NLM_F_ACK, |answers| all_ended(answers))?;
            found.extend(answers.into_iter().map(|answer| {
                answer.end.unwrap_or(Ok(()))?;
                answer.messages.into_iter().next().ok_or(Error::NoAnswer)
            }));
        }
    }

    /// Reads all objects of a kind: a consistent dump, or an error. `convert` converts each message on arrival, because
    /// messages take about a kilobyte each and there can be thousands.
    pub(crate) fn dump<T>(
        &mut self,
        message: impl Into<M>,
        mut convert: impl FnMut(M) -> Option<T>,
    ) -> Result<Vec<T>, Error>
    where
        M: Clone,
    {
        let message = message.into();
        answer::whole(|| {
            let mut found = Vec::new();
            let mut answers = self.exchange(vec![(message.clone(), 0)], NLM_F_DUMP, |answers| {
                let messages = answers.iter_mut().flat_map(|answer| answer.messages.drain(..));
                found.extend(messages.filter_map(&mut convert));
                all_ended(answers)
            })?;
            Ok(answers.pop().ok_or(Error::NoAnswer)?.with(found))
        })
    }

    /// Sends all requests at once, each with the flags in `extra`, and reads answers until `finished`.
    fn exchange(
        &mut self,
        batch: Vec<(M, u16)>,
        extra: u16,
        mut finished: impl FnMut(&mut [Answer<M>]) -> bool,
    ) -> Result<Vec<Answer<M>>, Error> {
        let first = self.sequence.wrapping_add(1);
        let mut answers = Vec::with_capacity(batch.len());
        let mut request = Vec::new();
        for (message, flags) in batch {
            self.sequence = self.sequence.wrapping_add(1);
            append(&mut request, message, NLM_F_REQUEST | extra | flags, self.sequence);
            answers.push(Answer::default());
        }
        let sent = self.inner.send_to(&request, &SocketAddr::new(0, 0), 0);
        if sent.map_err(SocketError::Send)? != request.len() {
            return Err(SocketError::Send(std::io::ErrorKind::WriteZero.into()).into());
        }
        while !finished(&mut answers) {
            self.receive(first, &mut answers)?;
        }
        Ok(answers)
    }

    /// Reads one datagram into `answers`; `first` is the sequence number of the first one.
    fn receive(&mut self, first: u32, answers: &mut [Answer<M>]) -> Result<(), Error> {
        self.buffer.clear();
        let length = loop {
            match self.inner.recv(&mut self.buffer, nix::libc::MSG_TRUNC) {
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                other => break other.map_err(SocketError::Receive)?,
            }
        };
        if length > self.buffer.len() {
            return Err(Error::TooLong { length });
        }
        answer::take(&self.buffer, first, answers)
    }
}

/// Appends `message` to `request` with its netlink header and padding.
fn append<M: NetlinkSerializable>(request: &mut Vec<u8>, message: M, flags: u16, sequence: u32) {
    let mut header = NetlinkHeader::default();
    header.flags = flags;
    header.sequence_number = sequence;
    let mut message = NetlinkMessage::new(header, NetlinkPayload::InnerMessage(message));
    message.finalize();
    let start = request.len();
    let length = message.buffer_len();
    request.resize(start + length.next_multiple_of(4), 0);
    message.serialize(&mut request[start..start + length]);
}
