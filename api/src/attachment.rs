//! One interface of one container: what everything else hangs on.

use std::fmt;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::{ContainerId, IfName, InvalidName, NetworkName, POD_INTERFACE_PREFIX, PROBE_INTERFACE};

/// The key that the CNI specification gives an attachment: network name, container ID, interface name.
///
/// As text it is the three joined by `/`, none of which can contain one.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Attachment {
    /// The network's name in the CNI configuration.
    pub network: NetworkName,
    /// The container whose network namespace has the interface.
    pub container: ContainerId,
    /// The interface in that namespace.
    pub interface: IfName,
}

/// The attachment of a node's probe endpoint. A network of that name cannot be told from it.
const PROBE: [&str; 3] = ["polder.probe", "node", "eth0"];

impl Attachment {
    /// That of the node's probe endpoint: an end point like a pod, from which the agent probes the ways to its peers.
    pub fn of_probe() -> Self {
        PROBE.join("/").parse().expect("three valid names")
    }

    /// Whether it is that of the node's probe endpoint.
    pub fn is_probe(&self) -> bool {
        [self.network.as_str(), self.container.as_str(), self.interface.as_str()] == PROBE
    }

    /// The name of the host's end of the pair: `pld` and 12 hex digits of a hash of the attachment.
    ///
    /// It is found without asking anyone, so the plugin can take an attachment down while the agent is away, and
    /// it names this attachment alone, so a DEL that comes late cannot meet another pod's interface.
    ///
    /// The node's probe endpoint is no pod, and its interface has a name of its own.
    pub fn host_interface(&self) -> IfName {
        if self.is_probe() {
            return IfName::try_from(PROBE_INTERFACE.to_owned()).expect("twelve bytes, letters and a dot");
        }
        let mut hash = Sha256::new();
        for part in [self.network.as_str(), self.container.as_str(), self.interface.as_str()] {
            hash.update((part.len() as u64).to_be_bytes());
            hash.update(part);
        }
        let mut name = String::from(POD_INTERFACE_PREFIX);
        for byte in &hash.finalize()[..6] {
            let _ = write!(name, "{byte:02x}");
        }
        IfName::try_from(name).expect("15 bytes, letters and digits")
    }
}

/// Whether [`Attachment::host_interface`] gives such names.
pub fn is_host_interface(name: &str) -> bool {
    let digits = name.strip_prefix(POD_INTERFACE_PREFIX);
    digits.is_some_and(|digits| digits.len() == 12 && digits.bytes().all(|digit| digit.is_ascii_hexdigit()))
}

impl fmt::Display for Attachment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", self.network, self.container, self.interface)
    }
}

impl FromStr for Attachment {
    type Err = InvalidName;
    fn from_str(text: &str) -> Result<Self, InvalidName> {
        let mut parts = text.split('/');
        let mut next = || parts.next().unwrap_or_default();
        let attachment =
            Self { network: next().parse()?, container: next().parse()?, interface: next().parse()? };
        match parts.next() {
            None => Ok(attachment),
            Some(_) => Err(InvalidName {
                kind: "attachment",
                given: text.to_owned(),
                rule: "network, container and interface, joined by '/'",
            }),
        }
    }
}

/// The note that a plugin leaves for an agent that is away: the attachment was taken down and its addresses are to
/// be freed. It stands beside the agent's socket, under a name of the attachment's own, and holds the attachment as
/// text. A reboot takes it away, and the attachment with it.
pub fn tombstone(socket: &Path, attachment: &Attachment) -> PathBuf {
    tombstones(socket).join(attachment.host_interface().as_str())
}

/// Where such notes are.
pub fn tombstones(socket: &Path) -> PathBuf {
    socket.with_file_name("tombstones")
}

/// The pod behind an attachment, as the runtime names it. For people and tools, never for a decision.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pod {
    /// Kubernetes namespace.
    pub namespace: String,
    /// Name of the pod.
    pub name: String,
    /// Its UID, where the runtime says it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uid: Option<String>,
}

impl fmt::Display for Pod {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attachment(text: &str) -> Attachment {
        text.parse().unwrap()
    }

    #[test]
    fn the_host_interface_is_a_valid_name_of_its_own() {
        let one = attachment("net/c1/eth0").host_interface();
        assert_eq!(one.as_str().len(), 15);
        assert!(is_host_interface(one.as_str()));
        assert_eq!(Attachment::of_probe().host_interface().as_str(), PROBE_INTERFACE);
        assert!(Attachment::of_probe().is_probe() && !attachment("net/c1/eth0").is_probe());
        for other in [PROBE_INTERFACE, "pld", "pld0", "pldveth-of-mine", "eth0"] {
            assert!(!is_host_interface(other), "{other} was taken for ours");
        }
        assert_ne!(one, attachment("net/c1/eth1").host_interface());
        assert_ne!(one, attachment("net/c2/eth0").host_interface());
        assert_ne!(one, attachment("net2/c1/eth0").host_interface());
    }

    #[test]
    fn the_host_interface_name_never_changes_between_releases() {
        assert_eq!(attachment("polder/0123456789ab/eth0").host_interface().as_str(), "pld677ffda0dfd1");
    }

    #[test]
    fn text_gives_the_attachment_back() {
        let one = attachment("net/c1/eth0");
        assert_eq!(attachment(&one.to_string()), one);
        for bad in ["", "net/c1", "net/c1/eth0/x", "net//eth0"] {
            assert!(bad.parse::<Attachment>().is_err(), "{bad:?} was taken");
        }
    }
}
