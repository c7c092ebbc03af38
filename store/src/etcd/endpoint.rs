//! The location of an etcd member, from its URL.

use std::fmt;
use std::net::IpAddr;

/// The URL of a member, or of several members with the same name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EtcdEndpoint {
    scheme: String,
    /// Host name or IP address.
    pub host: UrlHost,
    /// TCP port; by default 443 for https, else 80.
    pub port: u16,
}

/// The host in a URL.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum UrlHost {
    /// An IP address.
    Address(IpAddr),
    /// A name, which may have several addresses.
    Name(String),
}

impl fmt::Display for UrlHost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => address.fmt(f),
            Self::Name(name) => f.write_str(name),
        }
    }
}

impl EtcdEndpoint {
    /// Creates an endpoint from a scheme, a host name and a port.
    pub(super) fn of(scheme: &str, host: &str, port: u16) -> Self {
        Self { scheme: scheme.to_owned(), host: UrlHost::Name(host.to_owned()), port }
    }

    /// Parses a URL; `None` if it has no scheme or host, or an invalid port.
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
        let host = host.parse().map_or_else(|_| UrlHost::Name(host.to_owned()), UrlHost::Address);
        Some(Self { scheme: scheme.to_owned(), host, port })
    }

    /// The URL with this address as the host.
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
        let parse = |url| EtcdEndpoint::parse(url).map(|endpoint| (endpoint.host, endpoint.port));
        let address = |text: &str, port| Some((UrlHost::Address(text.parse().unwrap()), port));
        assert_eq!(parse("http://192.0.2.1:2379"), address("192.0.2.1", 2379));
        assert_eq!(parse("https://[2001:db8::1]:2379/"), address("2001:db8::1", 2379));
        assert_eq!(parse("http://[2001:db8::1]"), address("2001:db8::1", 80));
        assert_eq!(parse("https://etcd.test"), Some((UrlHost::Name("etcd.test".to_owned()), 443)));
        assert_eq!(parse("http://etcd.test:2379/path"), Some((UrlHost::Name("etcd.test".to_owned()), 2379)));
        for bad in ["192.0.2.1:2379", "http://:2379", "http://a:b", "http://"] {
            assert_eq!(parse(bad), None, "{bad}");
        }
        let endpoint = EtcdEndpoint::parse("https://etcd.test:2379").unwrap();
        assert_eq!(endpoint.at("2001:db8::1".parse().unwrap()), "https://[2001:db8::1]:2379");
    }
}
