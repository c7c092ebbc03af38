//! Capabilities of this process: capabilities(7), with the names that Kubernetes uses.

use std::fmt;
use std::fs;

/// A capability that the agent needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Capability {
    /// For devices, routes, filters and kernel settings.
    NetAdmin = 12,
    /// For probing peers.
    NetRaw = 13,
    /// For network namespaces: to create them, and to enter those of pods.
    SysAdmin = 21,
}

impl fmt::Display for Capability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NetAdmin => "NET_ADMIN",
            Self::NetRaw => "NET_RAW",
            Self::SysAdmin => "SYS_ADMIN",
        })
    }
}

impl Capability {
    /// Whether this process has the capability. Returns `true` if that cannot be read: a later operation fails then.
    pub fn is_held(self) -> bool {
        fs::read_to_string("/proc/self/status").ok().and_then(|status| self.is_in(&status)).unwrap_or(true)
    }

    fn is_in(self, status: &str) -> Option<bool> {
        let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
        let set = u64::from_str_radix(effective.trim(), 16).ok()?;
        Some(set >> (self as u32) & 1 == 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn added_capabilities_of_a_container_are_recognised() {
        // `drop: [ALL]`, `add: [NET_ADMIN, NET_RAW]`.
        let status = "Name:\tpolder-agent\nCapPrm:\t0000000000003000\nCapEff:\t0000000000003000\n";
        let held = |capability: Capability| capability.is_in(status);
        assert_eq!(held(Capability::NetAdmin), Some(true));
        assert_eq!(held(Capability::NetRaw), Some(true));
        assert_eq!(held(Capability::SysAdmin), Some(false));
        assert_eq!(Capability::NetAdmin.is_in("CapEff:\t0000000000002000\n"), Some(false));
        assert_eq!(Capability::NetAdmin.is_in("no such line"), None);
    }
}
