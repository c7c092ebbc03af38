//! The attachment: one interface of one container, the unit of allocation.

use std::fmt;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::{ContainerId, IfName, InvalidName, NetworkName, POD_INTERFACE_PREFIX, PROBE_INTERFACE};

/// The key that the CNI specification gives an attachment: network name, container ID, interface name.
///
/// As text, the three parts are joined by `/`, which no part can contain.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Attachment {
    /// Name of the network in the CNI configuration.
    pub network: NetworkName,
    /// Container ID, from `CNI_CONTAINERID`.
    pub container: ContainerId,
    /// Name of the interface in the container, from `CNI_IFNAME`.
    pub interface: IfName,
}

/// The attachment of a node's probe endpoint. A CNI network must not have this name.
const PROBE: [&str; 3] = ["polder.probe", "node", "eth0"];

impl Attachment {
    /// The attachment of the node's probe endpoint, from which the agent probes the paths to its peers like a pod.
    pub fn of_probe() -> Self {
        PROBE.join("/").parse().expect("three valid names")
    }

    /// Whether this is the attachment of the node's probe endpoint.
    pub fn is_probe(&self) -> bool {
        [self.network.as_str(), self.container.as_str(), self.interface.as_str()] == PROBE
    }

    /// Name of the host end of the veth pair: `pld` and 12 hex digits of a hash of the attachment.
    ///
    /// The plugin computes it locally, so it can delete an attachment while the agent does not run. Each attachment has
    /// its own name, so a late DEL cannot delete another pod's interface.
    ///
    /// The interface of the node's probe endpoint has a fixed name.
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

/// Whether the name has the form of [`Attachment::host_interface`].
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

/// Path of the tombstone that a plugin writes while the agent does not run: the attachment was deleted, and its
/// addresses must be released. The file is in a directory next to the agent's socket and contains the attachment as
/// text. A reboot deletes both the tombstone and the attachment.
pub fn tombstone(socket: &Path, attachment: &Attachment) -> PathBuf {
    tombstones(socket).join(attachment.host_interface().as_str())
}

/// Directory of the tombstones.
pub fn tombstones(socket: &Path) -> PathBuf {
    socket.with_file_name("tombstones")
}

/// The pod of an attachment, as reported by the runtime. For display only, never for decisions.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pod {
    /// Kubernetes namespace.
    pub namespace: String,
    /// Name of the pod.
    pub name: String,
    /// UID of the pod, if the runtime passes it.
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
    fn each_attachment_has_its_own_valid_interface_name() {
        let one = attachment("net/c1/eth0").host_interface();
        assert_eq!(one.as_str().len(), 15);
        assert!(is_host_interface(one.as_str()));
        assert_eq!(Attachment::of_probe().host_interface().as_str(), PROBE_INTERFACE);
        assert!(Attachment::of_probe().is_probe() && !attachment("net/c1/eth0").is_probe());
        for other in [PROBE_INTERFACE, "pld", "pld0", "pldveth-of-mine", "eth0"] {
            assert!(!is_host_interface(other), "{other} was accepted as ours");
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
    fn an_attachment_is_parsed_as_it_was_formatted() {
        let one = attachment("net/c1/eth0");
        assert_eq!(attachment(&one.to_string()), one);
        for bad in ["", "net/c1", "net/c1/eth0/x", "net//eth0"] {
            assert!(bad.parse::<Attachment>().is_err(), "{bad:?} was taken");
        }
    }
}
