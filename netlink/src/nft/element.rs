//! Set elements, in the binary form of the kernel.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use ipnetwork::IpNetwork;
use polder_api::{Family, Mac};

/// The type of the elements of a set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ElementKey {
    /// Single addresses.
    Address(Family),
    /// Ranges of addresses.
    Network(Family),
    /// Pairs of link-layer address and address.
    Sender(Family),
    /// Pairs of outer address of a tunnel and inner network.
    TunnelSource(Family, Family),
    /// Pairs of source and destination address.
    AddressPair(Family),
    /// Transport protocol and port, in a map to address and port.
    Port(Family),
    /// Address, transport protocol and port, in a map to address and port.
    AddressPort(Family),
}

/// The parts of an element of a map with [`ElementKey::Port`] or [`ElementKey::AddressPort`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PortParts {
    /// The address; `None` in a map without addresses.
    pub host: Option<IpAddr>,
    /// The number of the transport protocol.
    pub protocol: u8,
    /// The port.
    pub port: u16,
    /// The destination that they are translated to.
    pub to: SocketAddr,
}

/// The type of the data of a map.
#[derive(Debug, Clone, Copy)]
pub(super) struct DataType {
    /// The datatype number in `nft`.
    pub(super) type_number: u32,
    /// Length of the data, in bytes.
    pub(super) length: u32,
}

/// One element of a set, or one end of a range: a key, and whether it ends a range (the first address after it). An
/// element of a map has data, too.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Element {
    /// The key and the data, padded with zeros.
    bytes: [u8; MAX_LENGTH],
    /// The length of the key, in bytes.
    key_length: u8,
    /// The length of the data, in bytes.
    data_length: u8,
    ends_range: bool,
}

/// The longest key with data, in bytes: two IPv6 addresses, two ports and a protocol.
const MAX_LENGTH: usize = 44;

impl Element {
    /// The element with that key; `None` if the key is longer than `MAX_LENGTH`.
    pub(super) fn with_key(key: &[u8]) -> Option<Self> {
        Self::with_data(key, &[])
    }

    /// The element of a map with that key and data; `None` if both are longer than `MAX_LENGTH`.
    pub(super) fn with_data(key: &[u8], data: &[u8]) -> Option<Self> {
        let mut bytes = [0; MAX_LENGTH];
        bytes.get_mut(..key.len())?.copy_from_slice(key);
        bytes.get_mut(key.len()..key.len() + data.len())?.copy_from_slice(data);
        let (key_length, data_length) = (u8::try_from(key.len()).ok()?, u8::try_from(data.len()).ok()?);
        Some(Self { bytes, key_length, data_length, ends_range: false })
    }

    /// The same key, as end of a range.
    pub(super) fn range_end(self) -> Self {
        Self { ends_range: true, ..self }
    }

    /// The key, without padding.
    pub fn key(&self) -> &[u8] {
        &self.bytes[..usize::from(self.key_length)]
    }

    /// The data, without padding; empty in a set.
    pub(super) fn data(&self) -> &[u8] {
        let begin = usize::from(self.key_length);
        &self.bytes[begin..begin + usize::from(self.data_length)]
    }

    /// Whether it ends a range.
    pub(super) fn ends_range(&self) -> bool {
        self.ends_range
    }

    /// An element of a set with [`ElementKey::Address`].
    pub fn address(address: IpAddr) -> Self {
        Self::with_key(&octets(address)).expect("an address is no longer")
    }

    /// An element of a set with [`ElementKey::Sender`]. Parts of a key start at multiples of four bytes.
    pub fn sender(mac: Mac, address: IpAddr) -> Self {
        let key = [&mac.0[..], &[0, 0], &octets(address)].concat();
        Self::with_key(&key).expect("no key of ours is longer")
    }

    /// An element of a set with [`ElementKey::TunnelSource`]: the tunnel endpoint `outer` may send packets from
    /// `network`.
    pub fn tunnel_source(outer: IpAddr, network: IpNetwork) -> Self {
        let key = [octets(outer), octets(network.network())].concat();
        Self::with_key(&key).expect("no key of ours is longer")
    }

    /// An element of a set with [`ElementKey::AddressPair`].
    pub fn address_pair(source: IpAddr, destination: IpAddr) -> Self {
        let key = [octets(source), octets(destination)].concat();
        Self::with_key(&key).expect("no key of ours is longer")
    }

    /// An element of a map with [`ElementKey::AddressPort`], or with [`ElementKey::Port`] if there is no `address`: the
    /// number of a transport protocol and a port, and the destination that they are translated to.
    pub fn port(address: Option<IpAddr>, protocol: u8, port: u16, to: SocketAddr) -> Self {
        let padded = |port: u16| [&port.to_be_bytes()[..], &[0, 0]].concat();
        let address = address.map(octets).unwrap_or_default();
        let key = [address, vec![protocol, 0, 0, 0], padded(port)].concat();
        let data = [octets(to.ip()), padded(to.port())].concat();
        Self::with_data(&key, &data).expect("no key and data of ours are longer")
    }

    /// The parts of an element that [`Self::port`] makes for a map of that family; `None` if it has another form.
    pub fn port_parts(&self, family: Family) -> Option<PortParts> {
        let address = usize::from(family.bits() / 8);
        let (host, service) = self.key().split_at_checked(self.key().len().checked_sub(8)?)?;
        let (to, to_port) = self.data().split_at_checked(address)?;
        let number = |bytes: &[u8]| bytes.first_chunk::<2>().map(|bytes| u16::from_be_bytes(*bytes));
        let host = if host.is_empty() { None } else { Some(address_of(host)?) };
        Some(PortParts {
            host,
            protocol: *service.first()?,
            port: number(service.get(4..)?)?,
            to: SocketAddr::new(address_of(to)?, number(to_port)?),
        })
    }

    /// The elements of a set with [`ElementKey::Network`]: the ends of ranges that cover exactly these networks of one
    /// family.
    pub fn networks(networks: impl IntoIterator<Item = IpNetwork>) -> Vec<Self> {
        let mut ranges: Vec<(IpAddr, Option<IpAddr>)> =
            networks.into_iter().map(|network| (network.network(), after(network))).collect();
        ranges.sort();
        let mut merged: Vec<(IpAddr, Option<IpAddr>)> = Vec::new();
        for (first, after) in ranges {
            match merged.last_mut() {
                // `None` is after the last address of the family.
                Some((_, end)) if end.is_none_or(|end| first <= end) => {
                    *end = end.and_then(|end| after.map(|after| end.max(after)));
                }
                _ => merged.push((first, after)),
            }
        }
        merged
            .into_iter()
            .flat_map(|(first, after)| {
                let end = after.map(|after| Self::address(after).range_end());
                std::iter::once(Self::address(first)).chain(end)
            })
            .collect()
    }
}

/// The union of two sets with [`ElementKey::Network`], as ends of ranges.
pub fn union(some: &BTreeSet<Element>, others: &BTreeSet<Element>) -> BTreeSet<Element> {
    let mut ends: Vec<&Element> = some.iter().chain(others).collect();
    // A range that begins where another ends is joined with it.
    ends.sort_by_key(|end| (end.key(), end.ends_range));
    let (mut depth, mut union) = (0_usize, BTreeSet::new());
    for end in ends {
        let before = depth;
        depth = if end.ends_range { depth.saturating_sub(1) } else { depth + 1 };
        if before == 0 || depth == 0 {
            union.insert(end.clone());
        }
    }
    union
}

impl ElementKey {
    /// The datatype number of the key in `nft`, which it needs to print elements (`include/datatype.h`).
    pub(super) fn type_number(self) -> u32 {
        const INTEGER: u32 = 4;
        const ETHER_ADDRESS: u32 = 9;
        const PROTOCOL: u32 = 12;
        match self {
            Self::Address(family) | Self::Network(family) => family_number(family),
            Self::Sender(family) => ETHER_ADDRESS << 6 | family_number(family),
            Self::TunnelSource(outer, _) => family_number(outer) << 6 | INTEGER,
            Self::AddressPair(family) => family_number(family) << 6 | family_number(family),
            Self::Port(_) => PROTOCOL << 6 | PORT,
            Self::AddressPort(family) => family_number(family) << 12 | PROTOCOL << 6 | PORT,
        }
    }

    /// Length of a key, in bytes.
    pub(super) fn length(self) -> u32 {
        match self {
            Self::Address(family) | Self::Network(family) => address_length(family),
            Self::Sender(family) => 8 + address_length(family),
            Self::TunnelSource(outer, inner) => address_length(outer) + address_length(inner),
            Self::AddressPair(family) => 2 * address_length(family),
            Self::Port(_) => 8,
            Self::AddressPort(family) => address_length(family) + 8,
        }
    }

    /// The data of the elements; `None` for a set.
    pub(super) fn data(self) -> Option<DataType> {
        match self {
            Self::Port(family) | Self::AddressPort(family) => Some(DataType {
                type_number: family_number(family) << 6 | PORT,
                length: address_length(family) + 4,
            }),
            _ => None,
        }
    }

    pub(super) fn has_ranges(self) -> bool {
        matches!(self, Self::Network(_))
    }
}

/// The datatype number of ports in `nft`.
const PORT: u32 = 13;

fn family_number(family: Family) -> u32 {
    match family {
        Family::V4 => 7,
        Family::V6 => 8,
    }
}

fn address_length(family: Family) -> u32 {
    u32::from(family.bits() / 8)
}

fn address_of(octets: &[u8]) -> Option<IpAddr> {
    let v4 = || <[u8; 4]>::try_from(octets).ok().map(IpAddr::from);
    v4().or_else(|| <[u8; 16]>::try_from(octets).ok().map(IpAddr::from))
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

/// The first address after the network, if there is one.
fn after(network: IpNetwork) -> Option<IpAddr> {
    match network {
        IpNetwork::V4(v4) => {
            v4.broadcast().to_bits().checked_add(1).map(|bits| Ipv4Addr::from_bits(bits).into())
        }
        IpNetwork::V6(v6) => {
            v6.broadcast().to_bits().checked_add(1).map(|bits| Ipv6Addr::from_bits(bits).into())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ranges(networks: &[&str]) -> Vec<String> {
        let elements = Element::networks(networks.iter().map(|network| network.parse().unwrap()));
        let text = |element: &Element| {
            let octets = <[u8; 4]>::try_from(element.key()).unwrap();
            format!("{}{}", if element.ends_range { "<" } else { "" }, Ipv4Addr::from(octets))
        };
        elements.iter().map(text).collect()
    }

    #[test]
    fn a_network_becomes_a_range_with_an_exclusive_end() {
        assert_eq!(ranges(&["10.1.0.0/16"]), ["10.1.0.0", "<10.2.0.0"]);
    }

    #[test]
    fn touching_and_nested_networks_become_one_range() {
        assert_eq!(ranges(&["10.0.1.0/24", "10.0.0.0/24", "10.0.0.128/25"]), ["10.0.0.0", "<10.0.2.0"]);
        assert_eq!(
            ranges(&["10.0.0.0/24", "10.9.0.0/24"]),
            ["10.0.0.0", "<10.0.1.0", "10.9.0.0", "<10.9.1.0"]
        );
    }

    #[test]
    fn the_union_covers_both_sets() {
        let set = |networks: &[&str]| -> BTreeSet<Element> {
            Element::networks(networks.iter().map(|network| network.parse().unwrap())).into_iter().collect()
        };
        for (some, others, both) in [
            (&["10.0.0.0/24"][..], &["10.0.1.0/24", "10.9.0.0/24"][..], &["10.0.0.0/23", "10.9.0.0/24"][..]),
            (&["10.0.0.0/8"], &["10.1.0.0/16"], &["10.0.0.0/8"]),
            (&["255.0.0.0/8"], &["255.255.0.0/16"], &["255.0.0.0/8"]),
            (&[], &["10.0.0.0/8"], &["10.0.0.0/8"]),
        ] {
            assert_eq!(union(&set(some), &set(others)), set(both), "{some:?} and {others:?}");
        }
    }

    #[test]
    fn the_range_that_reaches_the_last_address_has_no_end() {
        assert_eq!(ranges(&["255.0.0.0/8"]), ["255.0.0.0"]);
        assert_eq!(ranges(&["0.0.0.0/0", "10.0.0.0/8"]), ["0.0.0.0"]);
    }
}
