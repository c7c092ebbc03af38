//! Network prefixes, each with one spelling only.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use ipnetwork::IpNetwork;
use polder_api::Family;
use serde::{Deserialize, Serialize};

/// A network prefix. No address bit after the prefix is set, so equal ranges are equal values.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Cidr {
    // Compared first: ranges of one family sort together, in the order of their addresses.
    family: Family,
    base: u128,
    length: u8,
}

/// A text that is not a network prefix.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseCidrError {
    /// It is not an address with a prefix length.
    #[error("{0:?} is not a network: write an address and a prefix length, like 10.244.0.0/16")]
    Malformed(String),
    /// It has address bits set after the prefix.
    #[error("{given} has host bits set: did you mean {meant}?")]
    HostBits {
        /// The parsed text.
        given: IpNetwork,
        /// The network that contains the address.
        meant: Cidr,
    },
}

impl Cidr {
    /// The range with this prefix length that contains `address`. A length above that of the address is reduced to
    /// it.
    pub fn containing(address: IpAddr, length: u8) -> Self {
        let family = Family::of(address);
        let length = length.min(family.bits());
        let base = to_bits(address) & !host_mask(family, length);
        Self { family, base, length }
    }

    /// The address family.
    pub fn family(self) -> Family {
        self.family
    }

    /// The prefix length, in bits.
    pub fn length(self) -> u8 {
        self.length
    }

    /// The number of addresses. For `::/0` only half of them: 2^128 does not fit into `u128`.
    pub fn size(self) -> u128 {
        1 << (self.family().bits() - self.length()).min(127)
    }

    /// The first address.
    pub fn first(self) -> IpAddr {
        from_bits(self.family, self.base)
    }

    /// The last address.
    pub fn last(self) -> IpAddr {
        from_bits(self.family, self.base | host_mask(self.family, self.length))
    }

    /// Whether it contains the address.
    pub fn has(self, address: IpAddr) -> bool {
        Family::of(address) == self.family && Self::containing(address, self.length).base == self.base
    }

    /// Whether it contains all of `other`.
    pub fn covers(self, other: Self) -> bool {
        self.length <= other.length && self.has(other.first())
    }

    /// Whether an address is in both ranges.
    pub fn overlaps(self, other: Self) -> bool {
        self.covers(other) || other.covers(self)
    }

    /// The index of the last part with this prefix length. Not the number of parts: for `::/0` in single addresses,
    /// that is one more than fits into `u128`.
    pub(crate) fn last_part(self, length: u8) -> u128 {
        host_mask(self.family, self.length)
            >> self.host_bits(length).min(127)
            >> u8::from(self.host_bits(length) == 128)
    }

    /// The part with this prefix length and index.
    pub(crate) fn part(self, length: u8, index: u128) -> Self {
        let base = self.base | index.checked_shl(self.host_bits(length).into()).unwrap_or(0);
        Self { family: self.family, base, length }
    }

    /// All addresses, in ascending order.
    pub(crate) fn addresses(self) -> impl Iterator<Item = IpAddr> {
        let last = self.base | host_mask(self.family, self.length);
        (self.base..=last).map(move |bits| from_bits(self.family, bits))
    }

    fn host_bits(self, length: u8) -> u8 {
        self.family.bits() - length.min(self.family.bits())
    }
}

fn host_mask(family: Family, length: u8) -> u128 {
    u128::MAX.checked_shl((family.bits() - length).into()).map_or(u128::MAX, |network| !network)
}

fn to_bits(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(v4) => v4.to_bits().into(),
        IpAddr::V6(v6) => v6.to_bits(),
    }
}

fn from_bits(family: Family, bits: u128) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::from_bits(u32::try_from(bits).expect("an IPv4 address has 32 bits")).into(),
        Family::V6 => Ipv6Addr::from_bits(bits).into(),
    }
}

impl From<Cidr> for IpNetwork {
    fn from(cidr: Cidr) -> Self {
        Self::new(cidr.first(), cidr.length).expect("the length is one of its family")
    }
}

impl FromStr for Cidr {
    type Err = ParseCidrError;
    fn from_str(text: &str) -> Result<Self, ParseCidrError> {
        let malformed = || ParseCidrError::Malformed(text.to_owned());
        if !text.contains('/') {
            return Err(malformed());
        }
        let given: IpNetwork = text.parse().map_err(|_| malformed())?;
        let meant = Self::containing(given.ip(), given.prefix());
        if meant.first() == given.ip() { Ok(meant) } else { Err(ParseCidrError::HostBits { given, meant }) }
    }
}

impl TryFrom<String> for Cidr {
    type Error = ParseCidrError;
    fn try_from(text: String) -> Result<Self, ParseCidrError> {
        text.parse()
    }
}

impl From<Cidr> for String {
    fn from(cidr: Cidr) -> String {
        cidr.to_string()
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format!("{}/{}", self.first(), self.length))
    }
}

impl fmt::Debug for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cidr(text: &str) -> Cidr {
        text.parse().unwrap()
    }

    #[test]
    fn a_network_with_host_bits_is_refused_with_the_correct_network() {
        let error = "10.244.3.1/16".parse::<Cidr>().unwrap_err().to_string();
        assert_eq!(error, "10.244.3.1/16 has host bits set: did you mean 10.244.0.0/16?");
        for bad in ["", "10.0.0.0", "10.0.0.0/33", "fd00::/129", "10.0.0/8", "x/8"] {
            assert!(bad.parse::<Cidr>().is_err(), "{bad:?} was taken");
        }
    }

    #[test]
    fn a_range_has_the_correct_first_and_last_address() {
        for (text, first, last) in [
            ("10.0.0.64/26", "10.0.0.64", "10.0.0.127"),
            ("0.0.0.0/0", "0.0.0.0", "255.255.255.255"),
            ("10.0.0.1/32", "10.0.0.1", "10.0.0.1"),
            ("fd00::40/122", "fd00::40", "fd00::7f"),
            ("::/0", "::", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"),
        ] {
            assert_eq!(
                (cidr(text).first().to_string().as_str(), cidr(text).last().to_string().as_str()),
                (first, last)
            );
        }
    }

    #[test]
    fn parts_tile_the_range() {
        assert_eq!(cidr("10.244.0.0/16").last_part(26), 1023);
        assert_eq!(cidr("10.244.0.0/16").part(26, 1023), cidr("10.244.255.192/26"));
        assert_eq!(cidr("10.0.0.0/26").last_part(26), 0);
        assert_eq!(cidr("fd00:244::/56").last_part(122), (1 << 66) - 1);
        assert_eq!(
            cidr("fd00:244::/56").part(122, (1 << 66) - 1),
            cidr("fd00:244:0:ff:ffff:ffff:ffff:ffc0/122")
        );
        assert_eq!(cidr("::/0").last_part(128), u128::MAX);
        assert_eq!(cidr("::/0").last_part(0), 0);
    }

    #[test]
    fn a_range_never_covers_or_overlaps_one_of_the_other_family() {
        assert!(cidr("10.0.0.0/8").covers(cidr("10.1.0.0/16")));
        assert!(!cidr("10.1.0.0/16").covers(cidr("10.0.0.0/8")));
        assert!(cidr("10.1.0.0/16").overlaps(cidr("10.0.0.0/8")));
        assert!(!cidr("10.1.0.0/16").overlaps(cidr("10.2.0.0/16")));
        assert!(!cidr("0.0.0.0/0").overlaps(cidr("::/0")));
    }
}
