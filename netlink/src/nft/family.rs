//! nftables table families.

use std::fmt;

use netlink_packet_netfilter::NetfilterProtoFamily;

/// The family of a table: the packets that it processes. Families bridge and netdev are ignored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TableFamily {
    /// IPv4.
    Ip,
    /// IPv6.
    Ip6,
    /// IPv4 and IPv6.
    Inet,
}

impl TableFamily {
    pub(super) fn number(self) -> NetfilterProtoFamily {
        match self {
            Self::Ip => NetfilterProtoFamily::IPv4,
            Self::Ip6 => NetfilterProtoFamily::IPv6,
            Self::Inet => NetfilterProtoFamily::Inet,
        }
    }

    pub(super) fn of(number: NetfilterProtoFamily) -> Option<Self> {
        [Self::Ip, Self::Ip6, Self::Inet].into_iter().find(|family| family.number() == number)
    }
}

impl fmt::Display for TableFamily {
    /// The name in `nft`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Ip => "ip",
            Self::Ip6 => "ip6",
            Self::Inet => "inet",
        })
    }
}
