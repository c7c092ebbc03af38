//! Encodes the conditions of rules as expressions, which load fields of the packet into registers and compare them.

use netlink_packet_netfilter::nftables::{
    Bitwise, Cmp, DataAttribute, Expressions, Lookup, Meta, MetaKey, Operator, Payload, Register,
};
use polder_api::Family;

use super::other;
use crate::nft::{InterfaceMatch, Match, SetMatch};

/// The interface type with link-layer addresses of six bytes (`include/uapi/linux/if_arp.h`).
const ARPHRD_ETHER: u16 = 1;

/// A position in a packet: base (`enum nft_payload_bases`), offset and length in bytes.
#[derive(Clone, Copy)]
pub(super) struct Field(pub(super) u32, pub(super) u32, pub(super) u32);

const SENDER_MAC: Field = Field(0, 6, 6);
const UDP_DESTINATION: Field = Field(2, 2, 2);
/// The VNI follows the UDP header (8 bytes) and the VXLAN flags (4 bytes) (RFC 7348, section 5).
const VXLAN_VNI: Field = Field(2, 12, 3);
/// The type of the inner frame follows the VXLAN header (8 bytes) and the frame's addresses (12 bytes).
const CARRIED_TYPE: Field = Field(2, 28, 2);
const ICMP_TYPE: Field = Field(2, 0, 1);
/// RFC 826, for Ethernet and IPv4.
const ARP_OPERATION: Field = Field(1, 6, 2);
const ARP_SENDER_MAC: Field = Field(1, 8, 6);
const ARP_SENDER: Field = Field(1, 14, 4);

/// The source address of the inner packet.
pub(super) fn inner_source(family: Family) -> Field {
    match family {
        Family::V4 => Field(2, 42, 4),
        Family::V6 => Field(2, 38, 16),
    }
}

/// `ETH_P_IP` and `ETH_P_IPV6`.
fn ether_type(family: Family) -> u16 {
    match family {
        Family::V4 => 0x0800,
        Family::V6 => 0x86dd,
    }
}

fn source(family: Family) -> Field {
    match family {
        Family::V4 => Field(1, 12, 4),
        Family::V6 => Field(1, 8, 16),
    }
}

pub(super) fn destination(family: Family) -> Field {
    match family {
        Family::V4 => Field(1, 16, 4),
        Family::V6 => Field(1, 24, 16),
    }
}

/// `NFPROTO_*`.
pub(super) fn protocol_number(family: Family) -> u8 {
    match family {
        Family::V4 => 2,
        Family::V6 => 10,
    }
}

/// The expressions of a condition.
pub(super) fn expressions(what: &Match) -> Vec<Expressions> {
    match *what {
        Match::Input(interface) => vec![load_meta(MetaKey::Iifname), equal(name_of(interface))],
        Match::Output(interface) => vec![load_meta(MetaKey::Oifname), equal(name_of(interface))],
        Match::NotOutput(interface) => vec![load_meta(MetaKey::Oifname), differs(name_of(interface))],
        Match::Family(family) => vec![load_meta(MetaKey::Nfproto), equal(vec![protocol_number(family)])],
        Match::UdpTo(port) => {
            const UDP: u8 = 17;
            let protocol = [load_meta(MetaKey::L4Proto), equal(vec![UDP])];
            let port = [load(UDP_DESTINATION, Register::Reg1), equal(port.to_be_bytes().to_vec())];
            [protocol, port].concat()
        }
        Match::VxlanOf(vni) => {
            vec![load(VXLAN_VNI, Register::Reg1), equal(vni.to_be_bytes()[1..].to_vec())]
        }
        Match::Source(within) => vec![load(source(within.family()), Register::Reg1), lookup(within)],
        Match::Destination(within) => {
            vec![load(destination(within.family()), Register::Reg1), lookup(within)]
        }
        Match::Sender(within) => vec![
            load_meta(MetaKey::Iftype),
            equal(ARPHRD_ETHER.to_ne_bytes().to_vec()),
            load(SENDER_MAC, Register::Reg1),
            // The six bytes take two registers of four bytes.
            load(source(within.family()), Register::Reg32_02),
            lookup(within),
        ],
        Match::Icmpv6(number) => {
            const ICMPV6: u8 = 58;
            let protocol = [load_meta(MetaKey::L4Proto), equal(vec![ICMPV6])];
            [protocol, [load(ICMP_TYPE, Register::Reg1), equal(vec![number])]].concat()
        }
        Match::InnerFamily(family) => {
            let number = ether_type(family).to_be_bytes();
            vec![load(CARRIED_TYPE, Register::Reg1), equal(number.to_vec())]
        }
        Match::TunnelSource { inner, length, set } => {
            let register = after_address(set.family());
            let Field(_, _, bytes) = inner_source(inner);
            vec![
                load(source(set.family()), Register::Reg1),
                load(inner_source(inner), register),
                mask(register, bytes, length),
                lookup(set),
            ]
        }
        Match::ArpReply => {
            const ARPOP_REPLY: u16 = 2;
            vec![load(ARP_OPERATION, Register::Reg1), equal(ARPOP_REPLY.to_be_bytes().to_vec())]
        }
        Match::ArpSender(within) => {
            vec![load(ARP_SENDER_MAC, Register::Reg1), load(ARP_SENDER, Register::Reg32_02), lookup(within)]
        }
        Match::AddressPair(within) => vec![
            load(source(within.family()), Register::Reg1),
            load(destination(within.family()), after_address(within.family())),
            lookup(within),
        ],
        Match::FromLoopback => is_loopback(source(Family::V4)),
        Match::ToLoopback => is_loopback(destination(Family::V4)),
        Match::Unicast => is_destination_type(RTN_UNICAST),
        Match::Local => is_destination_type(RTN_LOCAL),
    }
}

impl SetMatch {
    fn family(self) -> Family {
        match self {
            Self::Set(family, _) | Self::NotSet(family, _) => family,
        }
    }
}

fn load_meta(key: MetaKey) -> Expressions {
    load_meta_to(key, Register::Reg1)
}

pub(super) fn load_meta_to(key: MetaKey, register: Register) -> Expressions {
    Expressions::Meta(vec![Meta::Key(key), Meta::DestinationRegister(register)])
}

/// The register after an address in the first one. Each part of a key takes as many registers of four bytes as it
/// needs.
pub(super) fn after_address(family: Family) -> Register {
    match family {
        Family::V4 => Register::Reg32_01,
        Family::V6 => Register::Reg32_04,
    }
}

/// Whether the address is in 127.0.0.0/8.
fn is_loopback(address: Field) -> Vec<Expressions> {
    vec![load(address, Register::Reg1), mask(Register::Reg1, 4, 8), equal(vec![127, 0, 0, 0])]
}

pub(super) fn load(Field(base, offset, length): Field, register: Register) -> Expressions {
    Expressions::Payload(vec![
        Payload::DestinationRegister(register),
        Payload::Base(base),
        Payload::Offset(offset),
        Payload::Len(length),
    ])
}

/// Masks the register to its first bits.
fn mask(register: Register, bytes: u32, length: u8) -> Expressions {
    let mask = (0..bytes).map(|byte| {
        let ones = u32::from(length).saturating_sub(byte * 8).min(8);
        (0xff00_u16 >> ones).to_be_bytes()[1]
    });
    Expressions::Bitwise(vec![
        Bitwise::SourceRegister(register),
        Bitwise::DestinationRegister(register),
        Bitwise::Length(bytes),
        Bitwise::Mask(DataAttribute::Value(mask.collect())),
        Bitwise::Xor(DataAttribute::Value(vec![0; bytes as usize])),
    ])
}

/// A full name is compared including its NULs, a prefix without them.
fn name_of(interface: InterfaceMatch) -> Vec<u8> {
    match interface {
        InterfaceMatch::Named(name) => [name.as_bytes(), &[0; 16][name.len().min(16)..]].concat(),
        InterfaceMatch::Prefixed(prefix) => prefix.as_bytes().to_vec(),
    }
}

fn equal(value: Vec<u8>) -> Expressions {
    compare(Operator::Equal, value)
}

fn differs(value: Vec<u8>) -> Expressions {
    compare(Operator::NotEqual, value)
}

fn compare(operator: Operator, value: Vec<u8>) -> Expressions {
    Expressions::Cmp(vec![
        Cmp::SourceRegister(Register::Reg1),
        Cmp::Op(operator),
        Cmp::Data(DataAttribute::Value(value)),
    ])
}

fn lookup(within: SetMatch) -> Expressions {
    const NFT_LOOKUP_F_INV: u32 = 1;
    let (set, flags) = match within {
        SetMatch::Set(_, set) => (set, 0),
        SetMatch::NotSet(_, set) => (set, NFT_LOOKUP_F_INV),
    };
    Expressions::Lookup(vec![
        Lookup::Set(set.to_owned()),
        Lookup::SourceRegister(Register::Reg1),
        Lookup::Flags(flags),
    ])
}

/// Types of destinations (`include/uapi/linux/rtnetlink.h`).
const RTN_UNICAST: u32 = 1;
const RTN_LOCAL: u32 = 2;

/// Whether the destination has that type according to the routing tables (`fib daddr type`).
fn is_destination_type(number: u32) -> Vec<Expressions> {
    vec![load_destination_type(), equal(number.to_ne_bytes().to_vec())]
}

fn load_destination_type() -> Expressions {
    const NFTA_FIB_DREG: u16 = 1;
    const NFTA_FIB_RESULT: u16 = 2;
    const NFTA_FIB_FLAGS: u16 = 3;
    const NFT_FIB_RESULT_ADDRTYPE: u32 = 3;
    const NFTA_FIB_F_DADDR: u32 = 1 << 1;
    other(
        "fib",
        &[
            (NFTA_FIB_FLAGS, NFTA_FIB_F_DADDR),
            (NFTA_FIB_RESULT, NFT_FIB_RESULT_ADDRTYPE),
            (NFTA_FIB_DREG, Register::Reg1.into()),
        ],
    )
}
