//! Host ports of pods: what a runtime passes in the capability `portMappings` of the CNI conventions.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU16;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::Family;

words! {
    /// A transport protocol with ports.
    TransportProtocol {
        /// TCP.
        Tcp = "tcp",
        /// UDP.
        Udp = "udp",
        /// SCTP.
        Sctp = "sctp",
    }
}

impl TransportProtocol {
    /// Number of the protocol in IP packets (IANA, `IPPROTO_*`).
    pub const fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
            Self::Sctp => 132,
        }
    }
}

/// A port of the node that leads to a port of a pod.
///
/// As text: `8080:80/tcp`, with a host address `192.0.2.1:8080:80/tcp` or `[2001:db8::1]:8080:80/tcp`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct PortMapping {
    /// The transport protocol.
    pub protocol: TransportProtocol,
    /// The address of the node. `None`: all addresses of the node. The unspecified address of a family: all addresses
    /// of that family.
    pub host_address: Option<IpAddr>,
    /// The port of the node.
    pub host_port: NonZeroU16,
    /// The port of the pod.
    pub container_port: NonZeroU16,
}

impl PortMapping {
    /// The only address of the node with the port; `None` if all its addresses, or all of one family, have the port.
    pub fn single_address(&self) -> Option<IpAddr> {
        self.host_address.filter(|address| !address.is_unspecified())
    }

    /// Whether addresses of that family have the port.
    pub fn is_of_family(&self, family: Family) -> bool {
        self.host_address.is_none_or(|address| Family::of(address) == family)
    }

    /// Whether both are the same port of the same address, or of all addresses of a family.
    pub fn is_same_port(&self, other: &Self) -> bool {
        self.overlaps(other) && self.single_address() == other.single_address()
    }

    /// Whether a packet can be for both ports.
    pub fn overlaps(&self, other: &Self) -> bool {
        let has_common_address = match (self.host_address, other.host_address) {
            (Some(own), Some(others)) => {
                Family::of(own) == Family::of(others)
                    && (own == others || own.is_unspecified() || others.is_unspecified())
            }
            _ => true,
        };
        (self.protocol, self.host_port) == (other.protocol, other.host_port) && has_common_address
    }
}

impl fmt::Display for PortMapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.host_address {
            Some(address) => write!(f, "{}", SocketAddr::new(address, self.host_port.get()))?,
            None => write!(f, "{}", self.host_port)?,
        }
        write!(f, ":{}/{}", self.container_port, self.protocol)
    }
}

/// A text is not a host port.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a host port: write it as 8080:80/tcp or 192.0.2.1:8080:80/tcp")]
pub struct ParsePortError(String);

impl FromStr for PortMapping {
    type Err = ParsePortError;

    fn from_str(text: &str) -> Result<Self, ParsePortError> {
        let parse = || {
            let (ports, protocol) = text.rsplit_once('/')?;
            let (host, container_port) = ports.rsplit_once(':')?;
            let (host_address, host_port) = match host.parse::<SocketAddr>() {
                Ok(socket) => (Some(socket.ip()), NonZeroU16::new(socket.port())?),
                Err(_) => (None, host.parse().ok()?),
            };
            let protocol = *TransportProtocol::ALL.iter().find(|known| known.as_str() == protocol)?;
            Some(Self { protocol, host_address, host_port, container_port: container_port.parse().ok()? })
        };
        parse().ok_or_else(|| ParsePortError(text.to_owned()))
    }
}

impl From<PortMapping> for String {
    fn from(mapping: PortMapping) -> Self {
        mapping.to_string()
    }
}

impl TryFrom<String> for PortMapping {
    type Error = ParsePortError;

    fn try_from(text: String) -> Result<Self, ParsePortError> {
        text.parse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mapping(text: &str) -> PortMapping {
        text.parse().unwrap()
    }

    #[test]
    fn a_host_port_is_parsed_as_it_was_formatted() {
        for text in
            ["8080:80/tcp", "192.0.2.1:53:5353/udp", "[2001:db8::1]:8080:80/sctp", "0.0.0.0:1:65535/tcp"]
        {
            assert_eq!(mapping(text).to_string(), text);
        }
        let v6 = mapping("[2001:db8::1]:8080:80/sctp");
        assert_eq!((v6.host_port.get(), v6.container_port.get()), (8080, 80));
        for bad in [
            "",
            "8080",
            "8080:80",
            "0:80/tcp",
            "8080:0/tcp",
            "8080:80/icmp",
            "a:8080:80/tcp",
            "8080:65536/tcp",
        ] {
            assert!(bad.parse::<PortMapping>().is_err(), "{bad:?} was accepted");
        }
    }

    #[test]
    fn two_host_ports_overlap_if_a_packet_can_be_for_both() {
        for (one, other, expected) in [
            ("80:8080/tcp", "80:80/tcp", true),
            ("80:8080/tcp", "80:80/udp", false),
            ("80:8080/tcp", "81:8080/tcp", false),
            ("80:80/tcp", "192.0.2.1:80:80/tcp", true),
            ("0.0.0.0:80:80/tcp", "192.0.2.1:80:80/tcp", true),
            ("0.0.0.0:80:80/tcp", "[::]:80:80/tcp", false),
            ("[::]:80:80/tcp", "80:80/tcp", true),
            ("192.0.2.1:80:80/tcp", "192.0.2.2:80:80/tcp", false),
            ("192.0.2.1:80:80/tcp", "192.0.2.1:80:81/tcp", true),
            ("[2001:db8::1]:80:80/tcp", "0.0.0.0:80:80/tcp", false),
        ] {
            assert_eq!(mapping(one).overlaps(&mapping(other)), expected, "{one} and {other}");
            assert_eq!(mapping(other).overlaps(&mapping(one)), expected, "{other} and {one}");
        }
    }

    #[test]
    fn a_host_port_has_the_addresses_of_one_family_or_of_both() {
        let families = |text: &str| Family::BOTH.map(|family| mapping(text).is_of_family(family));
        assert_eq!(families("80:80/tcp"), [true, true]);
        assert_eq!(families("0.0.0.0:80:80/tcp"), [true, false]);
        assert_eq!(families("[2001:db8::1]:80:80/tcp"), [false, true]);
        assert_eq!(mapping("0.0.0.0:80:80/tcp").single_address(), None);
        assert_eq!(mapping("192.0.2.1:80:80/tcp").single_address(), "192.0.2.1".parse().ok());
    }
}
