//! Connection tracking: deletes the entries of an address that goes to another pod.

use std::net::IpAddr;

use netlink_packet_core::{DefaultNla, Emitable};
use netlink_packet_netfilter::conntrack::{
    ConntrackAttribute, ConntrackMessage, ConntrackMessageType, IPTuple, Tuple,
};
use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily,
};
use polder_api::Family;

use crate::nft::FilterSocket;
use crate::{Error, Operation};

/// `CTA_FILTER` (`include/uapi/linux/netfilter/nfnetlink_conntrack.h`): filters a dump, since Linux 5.8.
const CTA_FILTER: u16 = 25;
const CTA_TUPLE_ORIG: u16 = 1;
const CTA_TUPLE_REPLY: u16 = 2;
const CTA_FILTER_ORIG_FLAGS: u16 = 1;
const CTA_FILTER_REPLY_FLAGS: u16 = 2;

/// `CTA_FILTER_F_CTA_IP_SRC` (`net/netfilter/nf_internals.h`).
const BY_SOURCE: u32 = 1;

/// The flag of nested attributes (`NLA_F_NESTED`).
const NESTED: u16 = 1 << 15;

/// The direction in which an address is the source of a connection's packets.
#[derive(Clone, Copy)]
enum Direction {
    /// The address opened the connection.
    Original,
    /// The address replies, possibly after destination NAT.
    Reply,
}

impl FilterSocket {
    /// Deletes all connection tracking entries of the address, in both directions. Returns their number.
    pub fn forget_connections(&mut self, address: IpAddr) -> Result<usize, Error> {
        let requests = match Family::of(address) {
            Family::V4 => [Direction::Original, Direction::Reply].map(|of| of_address(address, of)).into(),
            // The kernel's filter is inverted for IPv6: it returns all addresses except the requested one
            // (`ctnetlink_filter_match_tuple` in `net/netfilter/nf_conntrack_netlink.c` treats equal as different).
            Family::V6 => vec![message(address, ConntrackMessage::Get(Vec::new()))],
        };
        let mut deletes = Vec::new();
        for request in requests {
            deletes.extend(self.dump(request, |found| delete(address, found))?);
        }
        let mut count = 0;
        for outcome in self.execute(deletes)? {
            match outcome {
                Ok(()) => count += 1,
                // The entry expired meanwhile.
                Err(error) if error.is_missing() => {}
                Err(error) => return Err(error),
            }
        }
        Ok(count)
    }
}

fn message(address: IpAddr, message: ConntrackMessage) -> NetfilterMessage {
    let family = match Family::of(address) {
        Family::V4 => NetfilterProtoFamily::IPv4,
        Family::V6 => NetfilterProtoFamily::IPv6,
    };
    NetfilterMessage::new(NetfilterHeader::new(family, 0, 0), message)
}

fn of_address(address: IpAddr, direction: Direction) -> NetfilterMessage {
    let (tuple, flags) = match direction {
        Direction::Original => (CTA_TUPLE_ORIG, CTA_FILTER_ORIG_FLAGS),
        Direction::Reply => (CTA_TUPLE_REPLY, CTA_FILTER_REPLY_FLAGS),
    };
    let source = Tuple::Ip(vec![IPTuple::SourceAddress(address)]);
    let mut bytes = vec![0; source.buffer_len()];
    source.emit(&mut bytes);
    // A nested attribute: 8 bytes long, including its header.
    let flags = [&8_u16.to_ne_bytes()[..], &flags.to_ne_bytes(), &BY_SOURCE.to_ne_bytes()].concat();
    // The crate drops the nested flag of an attribute that it does not know, but not of a raw message (`Other`).
    let attributes =
        vec![DefaultNla::new(tuple | NESTED, bytes), DefaultNla::new(CTA_FILTER | NESTED, flags)];
    message(address, ConntrackMessage::Other { message_type: ConntrackMessageType::Get.into(), attributes })
}

/// The operation that deletes a dumped entry by its original tuple, if the entry belongs to the address.
fn delete(address: IpAddr, found: NetfilterMessage) -> Option<Operation<NetfilterMessage>> {
    let NetfilterMessageInner::Conntrack(ConntrackMessage::New(attributes)) = found.inner else {
        return None;
    };
    let is_source = |tuple: &Tuple| match tuple {
        Tuple::Ip(ends) => ends.contains(&IPTuple::SourceAddress(address)),
        _ => false,
    };
    let is_its = |attribute: &ConntrackAttribute| match attribute {
        ConntrackAttribute::CtaTupleOrig(tuple) | ConntrackAttribute::CtaTupleReply(tuple) => {
            tuple.iter().any(is_source)
        }
        _ => false,
    };
    attributes.iter().any(is_its).then_some(())?;
    let original = |attribute: &ConntrackAttribute| matches!(attribute, ConntrackAttribute::CtaTupleOrig(_));
    let original = attributes.into_iter().find(original)?;
    Some(Operation::new(message(address, ConntrackMessage::Delete(vec![original])), 0))
}
