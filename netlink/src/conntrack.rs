//! Connection tracking: deletes the entries of addresses and host ports that go to other pods.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use netlink_packet_core::{DefaultNla, Nla};
use netlink_packet_netfilter::conntrack::{
    ConntrackAttribute, ConntrackMessage, IPTuple, ProtoTuple, Protocol, Tuple,
};
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

/// Entries to delete.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StaleEntries {
    /// All entries of these addresses, in both directions.
    pub addresses: BTreeSet<IpAddr>,
    /// UDP ports of the host, each with the addresses that packets to it are translated to: the entries that lead
    /// elsewhere. The kernel applies an entry to all packets of a flow, also if the translation changes.
    pub udp_ports: BTreeMap<u16, BTreeSet<IpAddr>>,
    /// The host's addresses that have the ports, besides 127.0.0.0/8.
    pub host: BTreeSet<IpAddr>,
}

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

    /// Deletes stale connection tracking entries. Returns their number.
    ///
    /// Reads the table once for each family. The kernel walks all buckets of its table for a dump, also for an empty
    /// one: 6 ms of one core for 262,144 buckets. So pass many addresses in one call. The kernel could filter a dump by
    /// one address, but for IPv6 its filter is inverted: it returns all addresses except the requested one
    /// (`ctnetlink_filter_match_tuple` in `net/netfilter/nf_conntrack_netlink.c` treats equal as different).
    pub fn forget_connections(&mut self, stale: &StaleEntries) -> Result<usize, Error> {
        let host = stale.host.iter().filter(|_| !stale.udp_ports.is_empty());
        let families: BTreeSet<Family> =
            stale.addresses.iter().chain(host).map(|address| Family::of(*address)).collect();
        let mut deletes = Vec::new();
        for family in families {
            let all = message(protocol(family), ConntrackMessage::Get(Vec::new()));
            deletes.extend(self.dump(all, |found| delete(family, stale, found))?);
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

/// The operation that deletes a dumped entry by its original tuple, if it is stale.
fn delete(
    family: Family,
    stale: &StaleEntries,
    found: NetfilterMessage,
) -> Option<Operation<NetfilterMessage>> {
    let NetfilterMessageInner::Conntrack(ConntrackMessage::New(attributes)) = found.inner else {
        return None;
    };
    let tuple = |attribute: &ConntrackAttribute| match attribute {
        ConntrackAttribute::CtaTupleOrig(parts) => Some((Direction::Original, ends(parts))),
        ConntrackAttribute::CtaTupleReply(parts) => Some((Direction::Reply, ends(parts))),
        _ => None,
    };
    let tuples: Vec<(Direction, Ends)> = attributes.iter().filter_map(tuple).collect();
    let of = |direction| tuples.iter().find(|(known, _)| *known == direction).map(|(_, ends)| ends);
    let (first, reply) = (of(Direction::Original)?, of(Direction::Reply)?);
    stale.has(first, reply).then_some(())?;
    let original = |attribute: &ConntrackAttribute| matches!(attribute, ConntrackAttribute::CtaTupleOrig(_));
    let original = attributes.into_iter().find(original)?;
    Some(Operation::new(message(protocol(family), ConntrackMessage::Delete(vec![original])), 0))
}

/// The direction of packets of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Direction {
    Original,
    Reply,
}

/// The ends of a connection in one direction.
#[derive(Debug, Default)]
struct Ends {
    source: Option<IpAddr>,
    destination: Option<IpAddr>,
    protocol: Option<Protocol>,
    destination_port: Option<u16>,
}

fn ends(parts: &[Tuple]) -> Ends {
    let mut ends = Ends::default();
    for part in parts {
        match part {
            Tuple::Ip(addresses) => addresses.iter().for_each(|address| ends.add_address(address)),
            Tuple::Proto(values) => values.iter().for_each(|value| ends.add_protocol(value)),
            _ => {}
        }
    }
    ends
}

impl Ends {
    fn add_address(&mut self, address: &IPTuple) {
        match address {
            IPTuple::SourceAddress(address) => self.source = Some(*address),
            IPTuple::DestinationAddress(address) => self.destination = Some(*address),
            _ => {}
        }
    }

    fn add_protocol(&mut self, value: &ProtoTuple) {
        match value {
            ProtoTuple::Protocol(protocol) => self.protocol = Some(*protocol),
            ProtoTuple::DestinationPort(port) => self.destination_port = Some(*port),
            _ => {}
        }
    }
}

impl StaleEntries {
    /// Whether the entry with these ends is stale: if one of the addresses opened the connection or replies (possibly
    /// after destination NAT), or if the reply to a host port comes from elsewhere.
    fn has(&self, first: &Ends, reply: &Ends) -> bool {
        let is_released = |address: Option<IpAddr>| address.is_some_and(|one| self.addresses.contains(&one));
        if is_released(first.source) || is_released(reply.source) {
            return true;
        }
        let (Some(Protocol::Udp), Some(port), Some(host)) =
            (first.protocol, first.destination_port, first.destination)
        else {
            return false;
        };
        let is_host = self.host.contains(&host) || (host.is_ipv4() && host.is_loopback());
        let leads_elsewhere =
            |targets: &BTreeSet<IpAddr>| reply.source.is_none_or(|from| !targets.contains(&from));
        is_host && self.udp_ports.get(&port).is_some_and(leads_elsewhere)
    }
}
