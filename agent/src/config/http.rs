//! Listen address for metrics and health.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// IP address and port; `localhost` means 127.0.0.1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(try_from = "String", into = "String")]
pub struct HttpAddress(SocketAddr);

/// The text is not an address with a port.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is not an address with a port: use e.g. 127.0.0.1:9474, [::1]:9474 or localhost:9474")]
pub struct NoHttpAddress(String);

impl HttpAddress {
    /// Wraps a socket address.
    pub const fn new(address: SocketAddr) -> Self {
        Self(address)
    }

    /// The socket address.
    pub const fn get(self) -> SocketAddr {
        self.0
    }
}

impl FromStr for HttpAddress {
    type Err = NoHttpAddress;

    fn from_str(text: &str) -> Result<Self, NoHttpAddress> {
        let of_this_host = || {
            let port = text.strip_prefix("localhost:")?.parse().ok()?;
            Some(SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port))
        };
        text.parse().ok().or_else(of_this_host).map(Self).ok_or_else(|| NoHttpAddress(text.to_owned()))
    }
}

impl TryFrom<String> for HttpAddress {
    type Error = NoHttpAddress;

    fn try_from(text: String) -> Result<Self, NoHttpAddress> {
        text.parse()
    }
}

impl From<HttpAddress> for String {
    fn from(address: HttpAddress) -> Self {
        address.to_string()
    }
}

impl fmt::Display for HttpAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_http_address_is_an_ip_address_or_localhost_with_a_port() {
        let read = |text: &str| text.parse::<HttpAddress>().map(|address| address.to_string());
        assert_eq!(read("localhost:9474").unwrap(), "127.0.0.1:9474");
        assert_eq!(read("[::1]:80").unwrap(), "[::1]:80");
        for text in ["9474", ":9474", "localhost", "localhost:x", "node.example:9474"] {
            let problem = read(text).unwrap_err().to_string();
            assert!(problem.contains(text) && problem.contains("127.0.0.1:9474"), "{problem}");
        }
    }
}
