//! MAC addresses.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// A 48-bit MAC address, written `0a:58:0a:f4:00:05`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Mac(pub [u8; 6]);

/// A text that is not a MAC address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a MAC address: six pairs of hex digits joined by ':'")]
pub struct ParseMacError(String);

impl Mac {
    /// The MAC address of the pod interface that has `address`.
    ///
    /// An IPv4 address is embedded (`0a:58`, then the address); an IPv6 address is hashed to 40 bits. Two addresses of
    /// a node practically never have the same MAC address. The same address always gets the same MAC address, so a
    /// stale neighbour entry stays valid when the address is reused.
    pub fn of_pod(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(v4) => {
                let [a, b, c, d] = v4.octets();
                Self([0x0a, 0x58, a, b, c, d])
            }
            IpAddr::V6(v6) => Self::hashed(0x0e, &[&v6.octets()]),
        }
    }

    /// The IPv6 link-local address derived from the MAC address (RFC 4291, appendix A).
    pub fn link_local(self) -> Ipv6Addr {
        let (vendor, device) = self.0.split_at(3);
        let mut octets = [0; 16];
        octets[..2].copy_from_slice(&[0xfe, 0x80]);
        octets[8..11].copy_from_slice(vendor);
        octets[11..13].copy_from_slice(&[0xff, 0xfe]);
        octets[13..].copy_from_slice(device);
        // Inverts the universal/local bit.
        octets[8] ^= 2;
        octets.into()
    }

    /// A locally administered unicast address: the octet `first`, then 40 bits of a hash of `parts`.
    pub fn hashed(first: u8, parts: &[&[u8]]) -> Self {
        debug_assert_eq!(first & 0b11, 0b10, "locally administered, unicast");
        let mut hash = Sha256::new();
        for part in parts {
            hash.update((part.len() as u64).to_be_bytes());
            hash.update(part);
        }
        let digest = hash.finalize();
        Self([first, digest[0], digest[1], digest[2], digest[3], digest[4]])
    }
}

impl FromStr for Mac {
    type Err = ParseMacError;
    fn from_str(text: &str) -> Result<Self, ParseMacError> {
        let refused = || ParseMacError(text.to_owned());
        let mut octets = [0; 6];
        let mut parts = text.split(':');
        for octet in &mut octets {
            let part = parts.next().filter(|part| part.len() == 2).ok_or_else(refused)?;
            *octet = u8::from_str_radix(part, 16).map_err(|_| refused())?;
        }
        parts.next().map_or(Ok(Self(octets)), |_| Err(refused()))
    }
}

impl TryFrom<String> for Mac {
    type Error = ParseMacError;
    fn try_from(text: String) -> Result<Self, ParseMacError> {
        text.parse()
    }
}

impl From<Mac> for String {
    fn from(mac: Mac) -> String {
        mac.to_string()
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [first, rest @ ..] = self.0;
        write!(f, "{first:02x}")?;
        rest.iter().try_for_each(|octet| write!(f, ":{octet:02x}"))
    }
}

impl fmt::Debug for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_link_local_address_matches_the_example_in_the_rfc() {
        let mac: Mac = "34:56:78:9a:bc:de".parse().unwrap();
        assert_eq!(mac.link_local().to_string(), "fe80::3656:78ff:fe9a:bcde");
    }

    #[test]
    fn a_mac_address_is_parsed_from_its_text() {
        let mac: Mac = "0a:58:0A:f4:00:05".parse().unwrap();
        assert_eq!(mac, Mac([0x0a, 0x58, 0x0a, 0xf4, 0, 5]));
        assert_eq!(mac.to_string(), "0a:58:0a:f4:00:05");
        for bad in ["", "0a:58:0a:f4:00", "0a:58:0a:f4:00:05:06", "a:58:0a:f4:00:05", "+a:58:0a:f4:00:05x"] {
            assert!(bad.parse::<Mac>().is_err(), "{bad:?} was taken");
        }
    }

    #[test]
    fn a_pod_mac_is_unicast_and_locally_administered() {
        for address in ["10.244.0.5", "fd00:244::5"] {
            let mac = Mac::of_pod(address.parse().unwrap());
            assert_eq!(mac.0[0] & 0b11, 0b10, "{mac}");
        }
        assert_eq!(Mac::of_pod("10.244.0.5".parse().unwrap()).to_string(), "0a:58:0a:f4:00:05");
    }
}
