//! ICMP echo requests and replies, with the node's own address in the pod network as source (RFC 792, RFC 4443).
//!
//! The peer's kernel answers, whether or not its agent runs. Probes are never fragmented: IPv4 ones have the DF bit
//! set, and IPv6 routers do not fragment. Probes ignore the path MTU that the kernel caches for ten minutes, so each
//! one tests the current path.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{
    AddressFamily, SockFlag, SockProtocol, SockType, SockaddrStorage, bind, setsockopt, socket, sockopt,
};
use nix::{libc, setsockopt_impl, sockopt_impl};
use polder_api::{Family, PerFamily};
use tokio::net::UdpSocket;

use super::schedule::{Size, Token};

/// Echo request and echo reply, in ICMP and in `ICMPv6`.
const REQUEST: PerFamily<u8> = PerFamily::new(8, 128);
const REPLY: PerFamily<u8> = PerFamily::new(0, 129);

/// Lengths of the headers, in bytes: IPv4, IPv6, ICMP.
const V4_HEADER: usize = 20;
const V6_HEADER: usize = 40;
const ICMP_HEADER: usize = 8;

/// Receive buffer in bytes: holds the replies of a large cluster while this thread does not run.
const RECEIVE_QUEUE: usize = 4 << 20;

sockopt_impl!(
    /// Whether the kernel uses the path MTU that it remembers, in IPv4 (ip(7)).
    V4MtuDiscover,
    SetOnly,
    libc::IPPROTO_IP,
    libc::IP_MTU_DISCOVER,
    libc::c_int
);

sockopt_impl!(
    /// Whether the kernel uses the path MTU that it remembers, in IPv6 (ipv6(7)).
    V6MtuDiscover,
    SetOnly,
    libc::IPPROTO_IPV6,
    libc::IPV6_MTU_DISCOVER,
    libc::c_int
);

/// Marks a probe of Polder at the start of its data; the target's number and the size follow.
const MARK: &[u8; 6] = b"polder";
const DATA: usize = MARK.len() + 4 + 1;

/// The sockets of one family.
///
/// They are raw sockets. The library's UDP socket type only sends and receives, which works for raw sockets, too.
#[derive(Debug)]
pub(super) struct EchoSocket {
    source: IpAddr,
    /// The ICMP identifier of this agent's probes.
    identifier: u16,
    /// Receives replies; in IPv6 it also sends requests.
    inbox: UdpSocket,
    /// Whole IPv4 packets, with their header.
    packets: Option<UdpSocket>,
}

impl EchoSocket {
    /// Opens the sockets in the network namespace of the calling thread.
    pub(super) fn open(source: IpAddr, identifier: u16) -> io::Result<Self> {
        let raw = |family, protocol| {
            let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
            socket(family, SockType::Raw, flags, protocol)
        };
        let (inbox, packets) = match source {
            IpAddr::V4(_) => {
                let packets = raw(AddressFamily::Inet, SockProtocol::Raw)?;
                setsockopt(&packets, V4MtuDiscover, &libc::IP_PMTUDISC_PROBE)?;
                (raw(AddressFamily::Inet, SockProtocol::Icmp)?, Some(asynchronous(packets)?))
            }
            IpAddr::V6(_) => {
                let inbox = raw(AddressFamily::Inet6, SockProtocol::IcmpV6)?;
                setsockopt(&inbox, sockopt::Ipv6DontFrag, &true)?;
                setsockopt(&inbox, V6MtuDiscover, &libc::IPV6_PMTUDISC_PROBE)?;
                (inbox, None)
            }
        };
        setsockopt(&inbox, sockopt::RcvBufForce, &RECEIVE_QUEUE)?;
        bind(inbox.as_raw_fd(), &SockaddrStorage::from(SocketAddr::new(source, 0)))?;
        Ok(Self { source, identifier, inbox: asynchronous(inbox)?, packets })
    }

    /// The source address of the probes.
    pub(super) fn source(&self) -> IpAddr {
        self.source
    }

    /// Sends a probe in a packet of `length` bytes, or of the minimum length. An error means that this node cannot send
    /// it.
    pub(super) async fn send(&self, to: IpAddr, length: usize, token: Token) -> io::Result<()> {
        let (header, socket) = match &self.packets {
            Some(packets) => (V4_HEADER, packets),
            None => (V6_HEADER, &self.inbox),
        };
        let message = request(Family::of(self.source), self.identifier, length.saturating_sub(header), token);
        let bytes = match (self.source, to) {
            (IpAddr::V4(from), IpAddr::V4(to)) => {
                [&v4_header(from, to, message.len())[..], &message].concat()
            }
            _ => message,
        };
        socket.send_to(&bytes, SocketAddr::new(to, 0)).await.map(drop)
    }

    /// Waits for the next reply to a probe of this agent. Cancel-safe: unread replies stay in the socket.
    pub(super) async fn receive(&self) -> io::Result<(IpAddr, Token)> {
        // Only the start of a long reply is needed.
        let mut buffer = [0; 128];
        loop {
            let (length, from) = self.inbox.recv_from(&mut buffer).await?;
            let header = if self.packets.is_some() { V4_HEADER } else { 0 };
            let message = buffer.get(header..length).unwrap_or_default();
            if let Some(token) = reply(Family::of(self.source), self.identifier, message) {
                return Ok((from.ip(), token));
            }
        }
    }
}

fn asynchronous(socket: OwnedFd) -> io::Result<UdpSocket> {
    UdpSocket::from_std(socket.into())
}

/// An echo request of that length, in bytes, but at least as long as its mark and token.
fn request(family: Family, identifier: u16, length: usize, token: Token) -> Vec<u8> {
    let mut message = vec![REQUEST[family], 0, 0, 0];
    message.extend(identifier.to_be_bytes());
    message.extend([0, 0]);
    message.extend(MARK);
    message.extend(token.number.to_be_bytes());
    message.push(u8::from(token.size == Size::Full));
    message.resize(length.max(ICMP_HEADER + DATA), 0);
    if family == Family::V4 {
        // In IPv6 the kernel does it.
        let sum = checksum(&message);
        message[2..4].copy_from_slice(&sum.to_be_bytes());
    }
    message
}

/// The token of an echo reply, if it has that identifier.
fn reply(family: Family, identifier: u16, message: &[u8]) -> Option<Token> {
    let (header, data) = message.split_at_checked(ICMP_HEADER)?;
    let is_ours = header[0] == REPLY[family] && header[4..6] == identifier.to_be_bytes();
    let rest = data.strip_prefix(MARK.as_slice()).filter(|_| is_ours)?;
    let (number, rest) = rest.split_first_chunk::<4>()?;
    let size = if *rest.first()? == 0 { Size::Small } else { Size::Full };
    Some(Token { number: u32::from_be_bytes(*number), size })
}

/// An IPv4 header (RFC 791) that forbids fragments. Length, checksum and identification are filled in by the kernel
/// (raw(7)).
fn v4_header(from: Ipv4Addr, to: Ipv4Addr, data: usize) -> [u8; V4_HEADER] {
    const VERSION_AND_LENGTH: u8 = 0x45;
    const DO_NOT_FRAGMENT: u8 = 0x40;
    const HOPS: u8 = 64;
    const ICMP: u8 = 1;
    let length = u16::try_from(V4_HEADER + data).unwrap_or(u16::MAX).to_be_bytes();
    let mut header = [0; V4_HEADER];
    header[0] = VERSION_AND_LENGTH;
    header[2..4].copy_from_slice(&length);
    header[6] = DO_NOT_FRAGMENT;
    header[8] = HOPS;
    header[9] = ICMP;
    header[12..16].copy_from_slice(&from.octets());
    header[16..20].copy_from_slice(&to.octets());
    header
}

/// RFC 1071.
fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|pair| u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
    let mut sum: u32 = words.map(u32::from).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).expect("its carries were added")
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOKEN: Token = Token { number: 0x0102_0304, size: Size::Full };

    #[test]
    fn the_token_of_a_request_is_read_from_its_reply() {
        for family in Family::BOTH {
            let mut message = request(family, 77, 100, TOKEN);
            assert_eq!(message.len(), 100);
            assert_eq!(reply(family, 77, &message), None, "the request itself is no reply");
            message[0] = REPLY[family];
            assert_eq!(reply(family, 77, &message), Some(TOKEN));
            assert_eq!(reply(family, 78, &message), None, "reply to another identifier");
            assert_eq!(reply(family, 77, &message[..ICMP_HEADER + DATA - 1]), None, "cut off");
        }
    }

    #[test]
    fn the_checksum_of_a_message_that_contains_its_checksum_is_zero() {
        for length in [0, 84, 85] {
            assert_eq!(checksum(&request(Family::V4, 77, length, TOKEN)), 0, "{length} bytes");
        }
    }
}
