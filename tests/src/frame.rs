//! Frames built by tests, sent without the sender's IP stack, and captured before the receiver's.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};

use nix::errno::Errno;
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrStorage, recvfrom, sendto, setsockopt,
    socket, sockopt::RcvBufForce,
};
use nix::unistd::Pid;
use polder_api::Mac;

use crate::wait;

/// The broadcast MAC address.
pub const BROADCAST: Mac = Mac([0xff; 6]);
/// The MAC address of all IPv6 hosts on the link (RFC 2464, section 7).
pub const ALL_NODES_MAC: Mac = Mac([0x33, 0x33, 0, 0, 0, 1]);
/// The multicast address of all IPv6 hosts on the link.
pub const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);

const IPV4: u16 = 0x0800;
const ARP: u16 = 0x0806;
const VLAN: u16 = 0x8100;
const IPV6: u16 = 0x86dd;
const UDP: u8 = 17;
const ICMP6: u8 = 58;
const SCTP: u8 = 132;

/// The first bytes of every mark.
const PREFIX: [u8; 8] = *b"LabMark:";

/// Bytes that occur in only one packet of the lab, even if that packet is encapsulated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Mark(u64);

impl Mark {
    /// A new, unique mark.
    #[expect(clippy::new_without_default, reason = "no two are the same: none is the default")]
    pub fn new() -> Self {
        static LAST: AtomicU64 = AtomicU64::new(0);
        Self(LAST.fetch_add(1, Ordering::Relaxed))
    }

    /// The 16 bytes of the mark.
    pub fn bytes(self) -> Vec<u8> {
        [PREFIX, self.0.to_be_bytes()].concat()
    }

    /// The mark in these bytes, if any.
    pub fn find(bytes: &[u8]) -> Option<Self> {
        let at = bytes.windows(PREFIX.len()).position(|window| window == PREFIX)? + PREFIX.len();
        let number = bytes.get(at..at + 8)?.try_into().ok()?;
        Some(Self(u64::from_be_bytes(number)))
    }
}

/// An Ethernet frame with an IP packet.
pub fn ip_frame(to: Mac, from: Mac, packet: &[u8]) -> Vec<u8> {
    ethernet(to, from, if packet[0] >> 4 == 4 { IPV4 } else { IPV6 }, packet)
}

/// The same frame with an 802.1Q tag with a priority and without a VLAN: hosts accept it like an untagged frame.
pub fn with_priority(frame: &[u8]) -> Vec<u8> {
    let (addresses, rest) = frame.split_at(12);
    [addresses, &VLAN.to_be_bytes(), &[0xa0, 0], rest].concat()
}

fn ethernet(to: Mac, from: Mac, kind: u16, payload: &[u8]) -> Vec<u8> {
    [&to.0[..], &from.0, &kind.to_be_bytes(), payload].concat()
}

/// An IP packet with a UDP datagram.
pub fn udp(from: SocketAddr, to: SocketAddr, payload: &[u8]) -> Vec<u8> {
    let length = length(8 + payload.len()).to_be_bytes();
    let mut datagram =
        [&from.port().to_be_bytes()[..], &to.port().to_be_bytes(), &length, &[0, 0], payload].concat();
    let sum = checksum(&[&pseudo_header(from.ip(), to.ip(), UDP, datagram.len()), &datagram]);
    // 0 would mean no checksum (RFC 768).
    datagram[6..8].copy_from_slice(&if sum == 0 { [0xff; 2] } else { sum.to_be_bytes() });
    ip(from.ip(), to.ip(), UDP, &datagram)
}

/// The tag by which the initiator of [`sctp`] packets recognises replies.
const INITIATOR: u32 = 0x0102_0304;

/// The first two packets of an SCTP association.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sctp {
    /// INIT, from the initiator.
    Init = 1,
    /// INIT ACK, the reply.
    InitAck = 2,
}

/// An IP packet with an SCTP packet (RFC 9260, sections 3.3.2 and 3.3.3). The mark is in an unknown parameter, which
/// hosts ignore.
pub fn sctp(chunk: Sctp, from: SocketAddr, to: SocketAddr, mark: Mark) -> Vec<u8> {
    // Each side sends the tag of the other side in the header, and its own tag in the chunk.
    let (theirs, own) = if chunk == Sctp::Init { (0, INITIATOR) } else { (INITIATOR, !INITIATOR) };
    let window_and_streams = [0, 1, 0, 0, 0, 1, 0, 1];
    let first_number: [u8; 4] = [0, 0, 0, 1];
    let parameter = [&[0x80, 99, 0, 20][..], &mark.bytes()].concat();
    let body = [&own.to_be_bytes()[..], &window_and_streams, &first_number, &parameter].concat();
    let head = [&[chunk as u8, 0][..], &length(4 + body.len()).to_be_bytes()].concat();
    let ports = [from.port().to_be_bytes(), to.port().to_be_bytes()].concat();
    let mut packet = [&ports[..], &theirs.to_be_bytes(), &[0; 4], &head, &body].concat();
    let sum = crc32c(&packet);
    packet[8..12].copy_from_slice(&sum.to_le_bytes());
    ip(from.ip(), to.ip(), SCTP, &packet)
}

/// Source and destination of a frame with an SCTP packet. `None` for another frame, and if the checksum is wrong.
pub fn sctp_ends(frame: &[u8]) -> Option<(SocketAddr, SocketAddr)> {
    let (kind, packet) = (frame.get(12..14)?, frame.get(14..)?);
    let (from, to, sctp): (IpAddr, IpAddr, &[u8]) =
        if kind == IPV4.to_be_bytes() && packet.get(9) == Some(&SCTP) {
            let octets = |at: usize| Some(<[u8; 4]>::try_from(packet.get(at..at + 4)?).ok()?.into());
            (octets(12)?, octets(16)?, packet.get(20..)?)
        } else if kind == IPV6.to_be_bytes() && packet.get(6) == Some(&SCTP) {
            let octets = |at: usize| Some(<[u8; 16]>::try_from(packet.get(at..at + 16)?).ok()?.into());
            (octets(8)?, octets(24)?, packet.get(40..)?)
        } else {
            return None;
        };
    let port = |at: usize| Some(u16::from_be_bytes(sctp.get(at..at + 2)?.try_into().ok()?));
    let sum = u32::from_le_bytes(sctp.get(8..12)?.try_into().ok()?);
    let without_sum = [&sctp[..8], &[0; 4], &sctp[12..]].concat();
    (crc32c(&without_sum) == sum).then_some((SocketAddr::new(from, port(0)?), SocketAddr::new(to, port(2)?)))
}

/// The checksum of SCTP (RFC 9260, appendix A).
fn crc32c(bytes: &[u8]) -> u32 {
    let divide = |sum: u32| if sum & 1 == 1 { (sum >> 1) ^ 0x82f6_3b78 } else { sum >> 1 };
    !bytes.iter().fold(!0, |sum, byte| (0..8).fold(sum ^ u32::from(*byte), |sum, _| divide(sum)))
}

/// The payload of a VXLAN datagram (RFC 7348).
pub fn vxlan(vni: u32, inner: &[u8]) -> Vec<u8> {
    [&[0x08, 0, 0, 0][..], &(vni << 8).to_be_bytes(), inner].concat()
}

/// Operation code of an ARP packet (RFC 826).
#[derive(Debug, Clone, Copy)]
pub enum Operation {
    /// A request for the MAC address of an IP address.
    Request = 1,
    /// A reply with the MAC address of an IP address.
    Reply = 2,
}

/// A frame with an ARP packet. The mark is in the padding.
pub fn arp(
    (to, from): (Mac, Mac),
    operation: Operation,
    sender: (Mac, Ipv4Addr),
    target: (Mac, Ipv4Addr),
    mark: Mark,
) -> Vec<u8> {
    let head = [0, 1, 8, 0, 6, 4, 0, operation as u8];
    let [sender, target] = [sender, target].map(|(mac, ip)| [&mac.0[..], &ip.octets()].concat());
    ethernet(to, from, ARP, &[&head[..], &sender, &target, &mark.bytes()].concat())
}

/// Whether the frame is a reply of the address to a neighbour request or an echo request.
pub fn is_answer(frame: &[u8], address: IpAddr) -> bool {
    let has = |at: usize, value: &[u8]| frame.get(at..at + value.len()) == Some(value);
    match address {
        IpAddr::V4(v4) => has(12, &ARP.to_be_bytes()) && has(21, &[2]) && has(28, &v4.octets()),
        IpAddr::V6(v6) => {
            let advertised = has(54, &[136]) && has(62, &v6.octets());
            let echoed = has(54, &[129]) && has(22, &v6.octets());
            has(12, &IPV6.to_be_bytes()) && has(20, &[ICMP6]) && (advertised || echoed)
        }
    }
}

/// An IPv6 packet with an echo request that contains the mark (RFC 4443, section 4.1).
pub fn echo_request(from: Ipv6Addr, to: Ipv6Addr, mark: Mark) -> Vec<u8> {
    icmp6(from, to, &[&[128, 0, 0, 0, 0, 0, 0, 0]], mark)
}

/// An IPv6 packet with a neighbour solicitation for the address (RFC 4861, section 4.3).
pub fn solicitation(from: Ipv6Addr, to: Ipv6Addr, target: Ipv6Addr, mac: Mac, mark: Mark) -> Vec<u8> {
    icmp6(from, to, &[&[135, 0, 0, 0, 0, 0, 0, 0][..], &target.octets(), &[1, 1], &mac.0], mark)
}

/// An IPv6 packet with a neighbour advertisement of the address at that MAC address, with the override flag (section
/// 4.4).
pub fn advertisement(from: Ipv6Addr, to: Ipv6Addr, target: Ipv6Addr, mac: Mac, mark: Mark) -> Vec<u8> {
    icmp6(from, to, &[&[136, 0, 0, 0, 0x20, 0, 0, 0][..], &target.octets(), &[2, 1], &mac.0], mark)
}

/// An IPv6 packet with a router advertisement of its sender and a 64-bit prefix (section 4.2).
pub fn router_advertisement(from: Ipv6Addr, to: Ipv6Addr, prefix: Ipv6Addr, mac: Mac, mark: Mark) -> Vec<u8> {
    let router = [134, 0, 0, 0, 64, 0, 0x07, 0x08, 0, 0, 0, 0, 0, 0, 0, 0];
    // A prefix on this link, for address configuration; valid and preferred for one hour.
    let information = [3, 4, 64, 0xc0, 0, 0, 0x0e, 0x10, 0, 0, 0x0e, 0x10, 0, 0, 0, 0];
    icmp6(from, to, &[&router, &[1, 1], &mac.0, &information, &prefix.octets()], mark)
}

/// The mark is added as an unknown option, which hosts ignore (section 4.6).
fn icmp6(from: Ipv6Addr, to: Ipv6Addr, parts: &[&[u8]], mark: Mark) -> Vec<u8> {
    let mut message = [&parts.concat()[..], &[253, 3, 0, 0, 0, 0, 0, 0], &mark.bytes()].concat();
    let sum = checksum(&[&pseudo_header(from.into(), to.into(), ICMP6, message.len()), &message]);
    message[2..4].copy_from_slice(&sum.to_be_bytes());
    ip(from.into(), to.into(), ICMP6, &message)
}

/// Hosts accept neighbour discovery only with hop limit 255, which shows that no router has forwarded the packet.
const HOPS: u8 = 255;

fn ip(from: IpAddr, to: IpAddr, protocol: u8, body: &[u8]) -> Vec<u8> {
    match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let [high, low] = length(20 + body.len()).to_be_bytes();
            let head = [0x45, 0, high, low, 0, 0, 0, 0, HOPS, protocol, 0, 0];
            let mut header = [&head[..], &from.octets(), &to.octets()].concat();
            let sum = checksum(&[&header]);
            header[10..12].copy_from_slice(&sum.to_be_bytes());
            [&header, body].concat()
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            let [high, low] = length(body.len()).to_be_bytes();
            let head = [0x60, 0, 0, 0, high, low, protocol, HOPS];
            [&head[..], &from.octets(), &to.octets(), body].concat()
        }
        _ => panic!("{from} and {to} are of different families"),
    }
}

fn pseudo_header(from: IpAddr, to: IpAddr, protocol: u8, bytes: usize) -> Vec<u8> {
    let octets = |address: IpAddr| match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    };
    [&octets(from)[..], &octets(to), &[0, protocol], &length(bytes).to_be_bytes()].concat()
}

fn length(bytes: usize) -> u16 {
    u16::try_from(bytes).expect("a packet that fits")
}

/// The Internet checksum (RFC 1071) of parts that have an even length, except the last one.
fn checksum(parts: &[&[u8]]) -> u16 {
    let words = parts.iter().flat_map(|part| part.chunks(2));
    let mut sum: u32 =
        words.map(|word| u32::from(word[0]) << 8 | word.get(1).copied().map_or(0, u32::from)).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).expect("folded")
}

/// Maximum length that is read of a frame, in bytes: frames with a mark are shorter.
const LONGEST: usize = 2048;

/// Binds the calling thread to one processor, always the same. Each processor has its own packet queue: only packets
/// sent on the same processor arrive in the order in which they were sent.
pub fn keep_in_order() {
    let this = Pid::from_raw(0);
    let allowed = sched_getaffinity(this).expect("every thread may ask");
    let first = (0..CpuSet::count()).find(|cpu| allowed.is_set(*cpu).unwrap_or(false));
    let mut one = CpuSet::new();
    one.set(first.expect("it runs somewhere")).expect("a processor that there is");
    sched_setaffinity(this, &one).expect("one of those that are allowed");
}

fn packet_socket() -> OwnedFd {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(AddressFamily::Packet, SockType::Raw, flags, SockProtocol::EthAll);
    let socket = socket.expect("root may hear everything");
    // Buffer for the packets that arrive between two reads.
    setsockopt(&socket, RcvBufForce, &(8 << 20)).expect("root may have a large buffer");
    socket
}

/// The next captured frame: its length, and its interface.
fn next(socket: &OwnedFd, buffer: &mut [u8]) -> Option<(usize, Option<SockaddrStorage>)> {
    match recvfrom(socket.as_raw_fd(), buffer) {
        Ok(frame) => Some(frame),
        Err(Errno::EAGAIN) => None,
        Err(errno) => panic!("hear frames: {errno}"),
    }
}

/// Captures every frame that is received or sent on any interface of a network namespace, before a filter can drop
/// received frames.
#[derive(Debug)]
pub struct Capture {
    socket: OwnedFd,
    marks: BTreeSet<Mark>,
}

impl Capture {
    /// Opens a capture in the calling thread's namespace.
    pub fn open() -> Self {
        Self { socket: packet_socket(), marks: BTreeSet::new() }
    }

    /// Whether a packet with that mark was captured until now.
    pub fn has_received(&mut self, mark: Mark) -> bool {
        self.any(|_| false);
        self.marks.contains(&mark)
    }

    /// Waits for a packet with that mark.
    pub fn wait_for(&mut self, what: &str, mark: Mark) {
        wait::until_true(what, || self.has_received(mark));
    }

    /// Waits for a matching frame among those not read yet.
    pub fn wait_for_any(&mut self, what: &str, is_it: impl Fn(&[u8]) -> bool) {
        wait::until_true(what, || self.any(&is_it));
    }

    /// Reads all captured frames and records their marks. Returns whether one of the frames matches.
    fn any(&mut self, is_it: impl Fn(&[u8]) -> bool) -> bool {
        let mut buffer = [0; LONGEST];
        let mut found = false;
        while let Some((length, _)) = next(&self.socket, &mut buffer) {
            self.marks.extend(Mark::find(&buffer[..length]));
            found |= is_it(&buffer[..length]);
        }
        found
    }
}

/// Sends complete frames.
#[derive(Debug)]
pub struct FrameSender {
    socket: OwnedFd,
    interface: SockaddrStorage,
}

impl FrameSender {
    /// Opens a sender in the calling thread's namespace, on the interface of the route to that address.
    pub fn towards(address: IpAddr) -> Self {
        let socket = packet_socket();
        // The capture of a first packet to the address shows the interface.
        let mark = Mark::new();
        let any: IpAddr =
            if address.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        let sent = UdpSocket::bind((any, 0)).and_then(|udp| udp.send_to(&mark.bytes(), (address, 9)));
        sent.unwrap_or_else(|error| panic!("send to {address}: {error}"));
        let mut buffer = [0; LONGEST];
        let interface = wait::until("a frame to leave", || {
            while let Some((length, interface)) = next(&socket, &mut buffer) {
                if Mark::find(&buffer[..length]) == Some(mark) {
                    return interface.ok_or("no interface".to_owned());
                }
            }
            Err("not yet".to_owned())
        });
        Self { socket, interface }
    }

    /// Sends a frame after all those sent before.
    pub fn send(&self, frame: &[u8]) {
        let job = || {
            keep_in_order();
            sendto(self.socket.as_raw_fd(), frame, &self.interface, MsgFlags::empty())
        };
        let sent = std::thread::scope(|scope| scope.spawn(job).join().expect("it does not panic"));
        assert_eq!(sent, Ok(frame.len()), "a frame was not sent");
    }
}
