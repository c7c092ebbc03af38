//! The netlink socket of a netfilter queue (`include/uapi/linux/netfilter/nfnetlink_queue.h`).

use std::io;

use netlink_sys::protocols::NETLINK_NETFILTER;
use netlink_sys::{Socket, SocketAddr};

const NLMSG_HEADER: usize = 16;
const NFGEN_HEADER: usize = 4;
const NLMSG_ERROR: u16 = 2;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NFNL_SUBSYS_QUEUE: u16 = 3 << 8;
const NFQNL_MSG_PACKET: u16 = NFNL_SUBSYS_QUEUE;
const NFQNL_MSG_VERDICT: u16 = NFNL_SUBSYS_QUEUE | 1;
const NFQNL_MSG_CONFIG: u16 = NFNL_SUBSYS_QUEUE | 2;
const NFQA_CFG_CMD: u16 = 1;
const NFQNL_CFG_CMD_BIND: u8 = 1;
const NFQA_CFG_PARAMS: u16 = 2;
const NFQNL_COPY_PACKET: u8 = 2;
const NFQA_CFG_MASK: u16 = 4;
const NFQA_CFG_FLAGS: u16 = 5;
/// Packets arrive before they are segmented.
const NFQA_CFG_F_GSO: u32 = 1 << 2;
const NFQA_PACKET_HDR: u16 = 1;
const NFQA_VERDICT_HDR: u16 = 2;
const NFQA_MARK: u16 = 3;
const NFQA_PAYLOAD: u16 = 10;
const NF_DROP: u32 = 0;
const NF_ACCEPT: u32 = 1;

/// How much of each packet is received, in bytes: the headers.
const COPIED: u32 = 128;

/// A socket that reads one queue. Programs that are started meanwhile do not inherit it.
#[derive(Debug)]
pub(super) struct QueueSocket {
    socket: Socket,
    number: u16,
}

/// A packet that waits for its verdict.
#[derive(Debug)]
pub(super) struct Packet {
    id: u32,
    /// Its first bytes, from the IP header on.
    pub(super) headers: Vec<u8>,
}

/// The verdict on a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It continues.
    Accept,
    /// It continues with this mark.
    AcceptWith(u32),
    /// It is dropped.
    Drop,
}

impl QueueSocket {
    /// Reads the queue of that number in the network namespace of the calling thread. Fails while another socket does.
    pub(super) fn bind(number: u16) -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_NETFILTER)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        // A full buffer is no error: the kernel drops the packet, and its sender repeats it.
        socket.set_no_enobufs(true)?;
        let bound = Self { socket, number };
        let params = [&COPIED.to_be_bytes()[..], &[NFQNL_COPY_PACKET]].concat();
        let attributes = [
            attribute(NFQA_CFG_CMD, &[NFQNL_CFG_CMD_BIND, 0, 0, 0]),
            attribute(NFQA_CFG_PARAMS, &params),
            attribute(NFQA_CFG_MASK, &NFQA_CFG_F_GSO.to_be_bytes()),
            attribute(NFQA_CFG_FLAGS, &NFQA_CFG_F_GSO.to_be_bytes()),
        ];
        bound.send(NFQNL_MSG_CONFIG, NLM_F_ACK, &attributes.concat())?;
        let (answer, _) = bound.socket.recv_from_full()?;
        match error(&answer) {
            Some(0) => {}
            Some(code) => return Err(io::Error::from_raw_os_error(-code)),
            None => return Err(io::Error::other(format!("no acknowledgement: {answer:?}"))),
        }
        bound.socket.set_non_blocking(true)?;
        Ok(bound)
    }

    /// The next packets. `WouldBlock` if there are none.
    pub(super) fn receive(&self) -> io::Result<Vec<Packet>> {
        let (bytes, _) = self.socket.recv_from_full()?;
        let mut packets = Vec::new();
        let mut rest = &bytes[..];
        while let Some(length) = number(rest).filter(|length| (NLMSG_HEADER..=rest.len()).contains(length)) {
            let (message, next) = rest.split_at(length.next_multiple_of(4).min(rest.len()));
            rest = next;
            if kind(message) != Some(NFQNL_MSG_PACKET) {
                return Err(io::Error::other(format!("no packet: {message:?}")));
            }
            packets.extend(Packet::of(&message[..length]));
        }
        Ok(packets)
    }

    /// Passes the verdict on a packet to the kernel.
    pub(super) fn decide(&self, packet: &Packet, verdict: Verdict) -> io::Result<()> {
        let code = if verdict == Verdict::Drop { NF_DROP } else { NF_ACCEPT };
        let mut attributes =
            attribute(NFQA_VERDICT_HDR, &[code.to_be_bytes(), packet.id.to_be_bytes()].concat());
        if let Verdict::AcceptWith(mark) = verdict {
            attributes.extend(attribute(NFQA_MARK, &mark.to_be_bytes()));
        }
        self.send(NFQNL_MSG_VERDICT, 0, &attributes)
    }

    fn send(&self, kind: u16, flags: u16, attributes: &[u8]) -> io::Result<()> {
        let length = u32::try_from(NLMSG_HEADER + NFGEN_HEADER + attributes.len()).expect("a short message");
        let mut message = length.to_ne_bytes().to_vec();
        message.extend([kind, NLM_F_REQUEST | flags].iter().flat_map(|number| number.to_ne_bytes()));
        // Sequence number and sender, which the kernel fills in; family and version.
        message.extend([0; 10]);
        message.extend(self.number.to_be_bytes());
        message.extend(attributes);
        self.socket.send(&message, 0).map(drop)
    }
}

impl Packet {
    fn of(message: &[u8]) -> Option<Self> {
        let (mut id, mut headers) = (None, None);
        let mut rest = message.get(NLMSG_HEADER + NFGEN_HEADER..)?;
        while let Some(length) = short(rest).filter(|length| (4..=rest.len()).contains(length)) {
            let value = &rest[4..length];
            match short(&rest[2..]).and_then(|kind| u16::try_from(kind).ok())? {
                NFQA_PACKET_HDR => id = value.first_chunk().map(|bytes| u32::from_be_bytes(*bytes)),
                NFQA_PAYLOAD => headers = Some(value.to_vec()),
                _ => {}
            }
            rest = &rest[length.next_multiple_of(4).min(rest.len())..];
        }
        Some(Self { id: id?, headers: headers? })
    }
}

fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = u16::try_from(value.len() + 4).expect("a short value");
    let mut bytes = [&length.to_ne_bytes()[..], &kind.to_ne_bytes(), value].concat();
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// The first four bytes.
fn number(bytes: &[u8]) -> Option<usize> {
    usize::try_from(u32::from_ne_bytes(*bytes.first_chunk()?)).ok()
}

/// The first two bytes.
fn short(bytes: &[u8]) -> Option<usize> {
    Some(u16::from_ne_bytes(*bytes.first_chunk()?).into())
}

fn kind(message: &[u8]) -> Option<u16> {
    Some(u16::from_ne_bytes(*message.get(4..)?.first_chunk()?))
}

/// The error number of an answer, negative or 0; `None` if it is something else.
fn error(answer: &[u8]) -> Option<i32> {
    let code = answer.get(NLMSG_HEADER..)?.first_chunk()?;
    (kind(answer)? == NLMSG_ERROR).then(|| i32::from_ne_bytes(*code))
}
