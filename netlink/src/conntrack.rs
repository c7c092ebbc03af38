//! Connection tracking: deletes the entries of addresses that go to other pods.

use std::collections::BTreeSet;
use std::net::IpAddr;

use netlink_packet_core::{DefaultNla, Nla};
use netlink_packet_netfilter::conntrack::{ConntrackAttribute, ConntrackMessage, IPTuple, Tuple};
use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily,
};
use polder_api::Family;

use crate::nft::FilterSocket;
use crate::{Error, Operation};

/// `IPCTNL_MSG_CT_GET_STATS` (`include/uapi/linux/netfilter/nfnetlink_conntrack.h`).
const GET_STATS: u8 = 5;
/// `CTA_STATS_GLOBAL_ENTRIES`: number of entries of the namespace, 4 bytes in network order.
const ENTRIES: u16 = 1;

impl FilterSocket {
    /// Number of connection tracking entries in the network namespace, of both families.
    pub fn connections(&mut self) -> Result<u32, Error> {
        let stats = ConntrackMessage::Other { message_type: GET_STATS, attributes: Vec::new() };
        let answer = self.get(message(NetfilterProtoFamily::Unspec, stats))?;
        let NetfilterMessageInner::Conntrack(ConntrackMessage::Other { attributes, .. }) = answer.inner
        else {
            return Err(Error::NoAnswer);
        };
        let entries = attributes.iter().find(|attribute| attribute.kind() == ENTRIES);
        let value = |attribute: &DefaultNla| {
            let mut bytes = [0; size_of::<u32>()];
            (attribute.value_len() == bytes.len()).then(|| attribute.emit_value(&mut bytes))?;
            Some(u32::from_be_bytes(bytes))
        };
        entries.and_then(value).ok_or(Error::NoAnswer)
    }

    /// Deletes all connection tracking entries of the addresses, in both directions. Returns their number.
    ///
    /// Reads the table once for each family of the addresses. The kernel walks all buckets of its table for a dump,
    /// also for an empty one: 6 ms of one core for 262,144 buckets. So pass many addresses in one call. The kernel
    /// could filter a dump by one address, but for IPv6 its filter is inverted: it returns all addresses except the
    /// requested one (`ctnetlink_filter_match_tuple` in `net/netfilter/nf_conntrack_netlink.c` treats equal as
    /// different).
    pub fn forget_connections(&mut self, addresses: &BTreeSet<IpAddr>) -> Result<usize, Error> {
        let families: BTreeSet<Family> = addresses.iter().map(|address| Family::of(*address)).collect();
        let mut deletes = Vec::new();
        for family in families {
            let all = message(protocol(family), ConntrackMessage::Get(Vec::new()));
            deletes.extend(self.dump(all, |found| delete(family, addresses, found))?);
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

fn protocol(family: Family) -> NetfilterProtoFamily {
    match family {
        Family::V4 => NetfilterProtoFamily::IPv4,
        Family::V6 => NetfilterProtoFamily::IPv6,
    }
}

fn message(family: NetfilterProtoFamily, message: ConntrackMessage) -> NetfilterMessage {
    NetfilterMessage::new(NetfilterHeader::new(family, 0, 0), message)
}

/// The operation that deletes a dumped entry by its original tuple, if one of the addresses opened the connection or
/// replies (possibly after destination NAT).
fn delete(
    family: Family,
    addresses: &BTreeSet<IpAddr>,
    found: NetfilterMessage,
) -> Option<Operation<NetfilterMessage>> {
    let NetfilterMessageInner::Conntrack(ConntrackMessage::New(attributes)) = found.inner else {
        return None;
    };
    let is_source =
        |end: &IPTuple| matches!(end, IPTuple::SourceAddress(address) if addresses.contains(address));
    let is_from = |tuple: &Tuple| matches!(tuple, Tuple::Ip(ends) if ends.iter().any(is_source));
    let is_theirs = |attribute: &ConntrackAttribute| match attribute {
        ConntrackAttribute::CtaTupleOrig(tuple) | ConntrackAttribute::CtaTupleReply(tuple) => {
            tuple.iter().any(is_from)
        }
        _ => false,
    };
    attributes.iter().any(is_theirs).then_some(())?;
    let original = |attribute: &ConntrackAttribute| matches!(attribute, ConntrackAttribute::CtaTupleOrig(_));
    let original = attributes.into_iter().find(original)?;
    Some(Operation::new(message(protocol(family), ConntrackMessage::Delete(vec![original])), 0))
}
