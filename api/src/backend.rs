//! How nodes reach the pods of other nodes.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// How nodes reach the pods of other nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Backend {
    /// Direct route if the peer is on the same link, otherwise a tunnel.
    #[default]
    Auto,
    /// Direct routes only; other peers are unreachable.
    Direct,
    /// Always a VXLAN tunnel.
    Vxlan,
}

impl Backend {
    /// Whether peers on the same link get direct routes.
    pub const fn uses_direct_routes(self) -> bool {
        match self {
            Self::Auto | Self::Direct => true,
            Self::Vxlan => false,
        }
    }

    /// Whether peers are reached through tunnels.
    pub const fn uses_tunnels(self) -> bool {
        match self {
            Self::Auto | Self::Vxlan => true,
            Self::Direct => false,
        }
    }
}

/// The text is not the name of a backend.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown backend {0:?}: use auto, direct or vxlan")]
pub struct UnknownBackend(String);

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Auto => "auto",
            Self::Direct => "direct",
            Self::Vxlan => "vxlan",
        })
    }
}

impl FromStr for Backend {
    type Err = UnknownBackend;

    fn from_str(text: &str) -> Result<Self, UnknownBackend> {
        let all = [Self::Auto, Self::Direct, Self::Vxlan];
        let found = all.into_iter().find(|backend| backend.to_string() == text);
        found.ok_or_else(|| UnknownBackend(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_backend_has_the_same_text_in_json_and_on_the_command_line() {
        for backend in [Backend::Auto, Backend::Direct, Backend::Vxlan] {
            assert_eq!(backend.to_string().parse(), Ok(backend));
            assert_eq!(serde_json::to_string(&backend).unwrap(), format!("\"{backend}\""));
        }
        assert!("Auto".parse::<Backend>().unwrap_err().to_string().contains("auto, direct or vxlan"));
    }
}
