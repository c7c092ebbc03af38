//! Where a member of etcd is, as its URL says.

use std::fmt;
use std::net::IpAddr;

/// The URL of a member, or of several that have one name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    scheme: String,
    /// The host.
    pub host: Host,
    /// The port.
    pub port: u16,
}

/// The host in a URL.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Host {
    /// It is an address.
    Address(IpAddr),
    /// It is a name, which may stand for several addresses.
    Name(String),
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => address.fmt(f),
            Self::Name(name) => f.write_str(name),
        }
    }
}

impl Endpoint {
    /// That port of a host.
    pub(super) fn of(scheme: &str, host: &str, port: u16) -> Self {
        Self { scheme: scheme.to_owned(), host: Host::Name(host.to_owned()), port }
    }

    /// Reads a URL, if it has a host.
    pub fn parse(url: &str) -> Option<Self> {
        let (scheme, rest) = url.split_once("://")?;
        let authority = rest.split('/').next()?;
        let usual = if scheme == "https" { 443 } else { 80 };
        let (host, port) = match authority.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
            Some((host, "")) => (host, usual),
            Some((host, port)) => (host, port.strip_prefix(':')?.parse().ok()?),
            None => match authority.rsplit_once(':') {
                Some((host, port)) => (host, port.parse().ok()?),
                None => (authority, usual),
            },
        };
        if host.is_empty() {
            return None;
        }
        let host = host.parse().map_or_else(|_| Host::Name(host.to_owned()), Host::Address);
        Some(Self { scheme: scheme.to_owned(), host, port })
    }

    /// The URL of one of its addresses.
    pub(super) fn at(&self, address: IpAddr) -> String {
        let Self { scheme, port, .. } = self;
        match address {
            IpAddr::V4(v4) => format!("{scheme}://{v4}:{port}"),
            IpAddr::V6(v6) => format!("{scheme}://[{v6}]:{port}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_has_a_host_and_a_port() {
        let parse = |url| Endpoint::parse(url).map(|endpoint| (endpoint.host, endpoint.port));
        let address = |text: &str, port| Some((Host::Address(text.parse().unwrap()), port));
        assert_eq!(parse("http://192.0.2.1:2379"), address("192.0.2.1", 2379));
        assert_eq!(parse("https://[2001:db8::1]:2379/"), address("2001:db8::1", 2379));
        assert_eq!(parse("http://[2001:db8::1]"), address("2001:db8::1", 80));
        assert_eq!(parse("https://etcd.test"), Some((Host::Name("etcd.test".to_owned()), 443)));
        assert_eq!(parse("http://etcd.test:2379/path"), Some((Host::Name("etcd.test".to_owned()), 2379)));
        for bad in ["192.0.2.1:2379", "http://:2379", "http://a:b", "http://"] {
            assert_eq!(parse(bad), None, "{bad}");
        }
        let endpoint = Endpoint::parse("https://etcd.test:2379").unwrap();
        assert_eq!(endpoint.at("2001:db8::1".parse().unwrap()), "https://[2001:db8::1]:2379");
    }
}
