//! Ranges that pods cannot use, and ranges that something else may use.
//!
//! The table is that of IANA's special-purpose registries (IPv4 and IPv6, RFC 6890 and RFC 8190) as of 2025, with the
//! multicast ranges. Ranges that a registry marks as "not forwardable" are refused: hosts and routers drop packets to
//! them. This module does no I/O.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::Cidr;

/// A range with a special purpose.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Special {
    base: IpAddr,
    length: u8,
    /// The purpose, for example from a registry.
    pub purpose: &'static str,
    /// The document that defines it.
    pub source: &'static str,
    /// Whether pods can have addresses of it.
    pub verdict: RangeVerdict,
}

/// Whether pods can have addresses of a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RangeVerdict {
    /// No.
    Refused,
    /// Yes, but something else may use the same addresses.
    Doubtful,
    /// Yes.
    Fine,
}

use RangeVerdict::{Doubtful, Fine, Refused};

const fn v4(
    octets: [u8; 4],
    length: u8,
    purpose: &'static str,
    source: &'static str,
    verdict: RangeVerdict,
) -> Special {
    let [a, b, c, d] = octets;
    Special { base: IpAddr::V4(Ipv4Addr::new(a, b, c, d)), length, purpose, source, verdict }
}

const fn v6(
    all: [u16; 8],
    length: u8,
    purpose: &'static str,
    source: &'static str,
    verdict: RangeVerdict,
) -> Special {
    let base = IpAddr::V6(Ipv6Addr::new(all[0], all[1], all[2], all[3], all[4], all[5], all[6], all[7]));
    Special { base, length, purpose, source, verdict }
}

/// All special ranges. If two contain an address, the longer prefix decides.
const TABLE: &[Special] = &[
    v4([0, 0, 0, 0], 8, "\"this network\"", "RFC 791", Refused),
    v4([10, 0, 0, 0], 8, "private use", "RFC 1918", Fine),
    // The default of kubeadm's `networking.serviceSubnet`.
    v4([10, 96, 0, 0], 12, "kubeadm's default range for Services", "kubeadm init --service-cidr", Doubtful),
    v4([100, 64, 0, 0], 10, "shared by providers' NAT and some VPNs", "RFC 6598", Doubtful),
    v4([127, 0, 0, 0], 8, "loopback", "RFC 1122", Refused),
    v4([169, 254, 0, 0], 16, "link-local, with the metadata addresses of clouds", "RFC 3927", Refused),
    v4([172, 16, 0, 0], 12, "private use", "RFC 1918", Fine),
    v4([192, 0, 0, 0], 24, "IETF protocol assignments", "RFC 6890", Refused),
    v4([192, 0, 2, 0], 24, "documentation", "RFC 5737", Refused),
    v4([192, 88, 99, 0], 24, "deprecated 6to4 relays", "RFC 7526", Doubtful),
    v4([192, 168, 0, 0], 16, "private use", "RFC 1918", Fine),
    v4([198, 18, 0, 0], 15, "benchmarking", "RFC 2544", Fine),
    v4([198, 51, 100, 0], 24, "documentation", "RFC 5737", Refused),
    v4([203, 0, 113, 0], 24, "documentation", "RFC 5737", Refused),
    v4([224, 0, 0, 0], 4, "multicast", "RFC 5771", Refused),
    v4([240, 0, 0, 0], 4, "reserved", "RFC 1112", Refused),
    v4([255, 255, 255, 255], 32, "limited broadcast", "RFC 8190", Refused),
    // Contains the unspecified address, loopback, IPv4-compatible and IPv4-mapped addresses.
    v6([0; 8], 8, "reserved, with :: and ::1", "RFC 4291", Refused),
    v6([0, 0, 0, 0, 0, 0, 0, 0], 128, "the unspecified address", "RFC 4291", Refused),
    v6([0, 0, 0, 0, 0, 0, 0, 1], 128, "loopback", "RFC 4291", Refused),
    v6([0, 0, 0, 0, 0, 0xffff, 0, 0], 96, "IPv4-mapped", "RFC 4291", Refused),
    // Forwardable, but packets to it go to a NAT64 gateway.
    v6([0x64, 0xff9b, 0, 0, 0, 0, 0, 0], 96, "NAT64", "RFC 6052", Refused),
    v6([0x64, 0xff9b, 1, 0, 0, 0, 0, 0], 48, "NAT64 of a site", "RFC 8215", Doubtful),
    v6([0x100, 0, 0, 0, 0, 0, 0, 0], 64, "discard-only", "RFC 6666", Doubtful),
    v6([0x100, 0, 0, 1, 0, 0, 0, 0], 64, "dummy addresses", "RFC 9780", Refused),
    v6([0x2001, 0, 0, 0, 0, 0, 0, 0], 23, "IETF protocol assignments", "RFC 2928", Refused),
    v6([0x2001, 0, 0, 0, 0, 0, 0, 0], 32, "Teredo", "RFC 4380", Doubtful),
    v6([0x2001, 2, 0, 0, 0, 0, 0, 0], 48, "benchmarking", "RFC 5180", Fine),
    v6([0x2001, 3, 0, 0, 0, 0, 0, 0], 32, "AMT", "RFC 7450", Doubtful),
    v6([0x2001, 0x20, 0, 0, 0, 0, 0, 0], 28, "ORCHIDv2", "RFC 7343", Doubtful),
    v6([0x2001, 0x30, 0, 0, 0, 0, 0, 0], 28, "drone identification", "RFC 9374", Doubtful),
    v6([0x2001, 0xdb8, 0, 0, 0, 0, 0, 0], 32, "documentation", "RFC 3849", Refused),
    // Forwardable, but each address represents an IPv4 address.
    v6([0x2002, 0, 0, 0, 0, 0, 0, 0], 16, "6to4", "RFC 3056", Refused),
    v6([0x3fff, 0, 0, 0, 0, 0, 0, 0], 20, "documentation", "RFC 9637", Refused),
    v6([0x5f00, 0, 0, 0, 0, 0, 0, 0], 16, "segment routing (SRv6)", "RFC 9602", Doubtful),
    v6([0xfc00, 0, 0, 0, 0, 0, 0, 0], 7, "unique local", "RFC 4193", Fine),
    v6([0xfe80, 0, 0, 0, 0, 0, 0, 0], 10, "link-local", "RFC 4291", Refused),
    v6([0xff00, 0, 0, 0, 0, 0, 0, 0], 8, "multicast", "RFC 4291", Refused),
];

impl Special {
    /// The range.
    pub fn range(&self) -> Cidr {
        Cidr::containing(self.base, self.length)
    }
}

impl fmt::Display for Special {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({}, {})", self.range(), self.purpose, self.source)
    }
}

/// The most specific entry that contains the whole range.
fn most_specific_entry(range: Cidr) -> Option<&'static Special> {
    TABLE.iter().filter(|entry| entry.range().covers(range)).max_by_key(|entry| entry.length)
}

/// The entry that excludes pods from the range: one that contains the range, or is inside it.
pub fn refused(range: Cidr) -> Option<&'static Special> {
    let containing = most_specific_entry(range).filter(|entry| entry.verdict == Refused);
    let inside = || {
        let mut entries = TABLE.iter().filter(|entry| entry.verdict == Refused);
        entries.find(|entry| range.covers(entry.range()))
    };
    containing.or_else(inside)
}

/// Other possible uses of a range that is not refused: warnings for the operator who adds a pool.
pub fn warnings(range: Cidr) -> Vec<String> {
    let doubtful = TABLE.iter().filter(|entry| entry.verdict == Doubtful && entry.range().overlaps(range));
    let mut warnings: Vec<String> = doubtful
        .map(|entry| {
            format!(
                "{range} overlaps {entry}: pods cannot reach anything else that uses these addresses; choose \
                 another range if you use them elsewhere"
            )
        })
        .collect();
    if most_specific_entry(range).is_none() {
        warnings.push(format!(
            "{range} is public address space: pods cannot reach the hosts on the Internet that own these addresses; \
             choose a private range (RFC 1918, RFC 4193) unless the range is yours"
        ));
    }
    warnings
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cidr(text: &str) -> Cidr {
        text.parse().unwrap()
    }

    #[test]
    fn a_range_that_contains_special_addresses_is_refused() {
        for (range, expected) in [
            ("0.0.0.0/8", "0.0.0.0/8"),
            ("0.0.0.0/0", "0.0.0.0/8"),
            ("127.0.0.0/16", "loopback"),
            ("126.0.0.0/7", "loopback"),
            ("169.254.0.0/16", "metadata"),
            ("169.254.169.0/24", "RFC 3927"),
            ("192.0.0.0/24", "RFC 6890"),
            ("192.0.0.0/16", "RFC 6890"),
            ("192.0.2.0/24", "documentation"),
            ("198.51.100.0/25", "documentation"),
            ("203.0.113.0/24", "documentation"),
            ("224.0.0.0/16", "multicast"),
            ("239.1.0.0/16", "multicast"),
            ("240.0.0.0/8", "reserved"),
            ("255.255.255.0/24", "reserved"),
            ("255.255.255.255/32", "broadcast"),
            ("::/64", "RFC 4291"),
            ("::/128", "unspecified"),
            ("::1/128", "loopback"),
            ("::ffff:10.0.0.0/104", "IPv4-mapped"),
            ("64:ff9b::/96", "NAT64"),
            ("100:0:0:1::/64", "RFC 9780"),
            ("2001:100::/32", "RFC 2928"),
            ("2001:db8::/32", "documentation"),
            ("2001:db8:1::/48", "documentation"),
            ("2000::/3", "RFC 2928"),
            ("2002::/16", "6to4"),
            ("2002:a00:1::/48", "6to4"),
            ("3fff::/20", "documentation"),
            ("fe80::/64", "link-local"),
            ("ff02::/64", "multicast"),
        ] {
            let found =
                refused(cidr(range)).unwrap_or_else(|| panic!("{range} was accepted, expected: refused"));
            assert!(found.to_string().contains(expected), "{range}: {found}");
        }
    }

    #[test]
    fn private_ranges_are_accepted_without_a_warning() {
        for range in [
            "10.0.0.0/16",
            "10.244.0.0/16",
            "10.128.0.0/9",
            "172.16.0.0/12",
            "192.168.0.0/16",
            "198.18.0.0/15",
            "fd00:244::/56",
            "fc00::/7",
            "2001:2::/48",
        ] {
            assert_eq!(refused(cidr(range)), None, "{range}");
            assert_eq!(warnings(cidr(range)), Vec::<String>::new(), "{range}");
        }
    }

    #[test]
    fn ranges_with_common_other_uses_are_accepted_with_a_warning() {
        for (range, expected) in [
            ("10.96.0.0/12", "kubeadm"),
            ("10.100.0.0/16", "kubeadm"),
            ("10.0.0.0/8", "kubeadm"),
            ("100.64.0.0/10", "RFC 6598"),
            ("100.100.0.0/16", "RFC 6598"),
            ("11.0.0.0/16", "public"),
            ("192.88.99.0/24", "6to4"),
            ("2a00:1450::/48", "public"),
            ("64:ff9b:1::/64", "RFC 8215"),
        ] {
            assert_eq!(refused(cidr(range)), None, "{range}");
            let warnings = warnings(cidr(range));
            assert!(warnings.len() == 1 && warnings[0].contains(expected), "{range}: {warnings:?}");
        }
    }
}
