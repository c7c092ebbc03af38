//! Destination NAT from a map: the look-up of a packet's destination, and the translation to what the map has.
//!
//! The expressions are those of `dnat ip to meta l4proto . th dport map @NAME`.

use netlink_packet_netfilter::nftables::{Expressions, Lookup, MetaKey, Register};
use polder_api::Family;

use super::condition::{Field, after_address, destination, load, load_meta_to, protocol_number};
use super::other;
use crate::nft::PortMap;

/// The destination port of TCP, UDP and SCTP.
const DESTINATION_PORT: Field = Field(2, 2, 2);

/// Looks up the packet's destination in the map. The address that it has is then in the first register, the port in the
/// register after the address.
pub(super) fn look_up(map: PortMap) -> Vec<Expressions> {
    let (mut keys, name) = match map {
        PortMap::ByPort(_, name) => (
            vec![load_meta_to(MetaKey::L4Proto, Register::Reg1), load(DESTINATION_PORT, Register::Reg32_01)],
            name,
        ),
        PortMap::ByAddressAndPort(family, name) => {
            let (protocol, port) = match family {
                Family::V4 => (Register::Reg32_01, Register::Reg32_02),
                Family::V6 => (Register::Reg32_04, Register::Reg32_05),
            };
            (
                vec![
                    load(destination(family), Register::Reg1),
                    load_meta_to(MetaKey::L4Proto, protocol),
                    load(DESTINATION_PORT, port),
                ],
                name,
            )
        }
    };
    keys.push(Expressions::Lookup(vec![
        Lookup::Set(name.to_owned()),
        Lookup::SourceRegister(Register::Reg1),
        Lookup::DestinationRegister(Register::Reg1),
    ]));
    keys
}

/// Translates the destination to the address and port in the registers.
pub(super) fn translate(map: PortMap) -> Expressions {
    const NFTA_NAT_TYPE: u16 = 1;
    const NFTA_NAT_FAMILY: u16 = 2;
    const NFTA_NAT_REG_ADDR_MIN: u16 = 3;
    const NFTA_NAT_REG_PROTO_MIN: u16 = 5;
    const NFT_NAT_DNAT: u32 = 1;
    let (PortMap::ByPort(family, _) | PortMap::ByAddressAndPort(family, _)) = map;
    other(
        "nat",
        &[
            (NFTA_NAT_TYPE, NFT_NAT_DNAT),
            (NFTA_NAT_FAMILY, protocol_number(family).into()),
            (NFTA_NAT_REG_ADDR_MIN, Register::Reg1.into()),
            (NFTA_NAT_REG_PROTO_MIN, after_address(family).into()),
        ],
    )
}
