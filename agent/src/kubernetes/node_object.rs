//! The agent's excerpt of a Node object of Kubernetes: plain data, checked when it is received.

use std::collections::BTreeMap;
use std::net::IpAddr;

use k8s_openapi::api::core::v1::{Node, NodeCondition, Taint as WireTaint};
use polder_api::NodeName;
use polder_ipam::ids::NodeUid;

/// The condition of a Node that says whether its pod network works (`core/v1`, `NodeNetworkUnavailable`).
pub const NETWORK_UNAVAILABLE: &str = "NetworkUnavailable";

/// The type of a Node's address that other nodes use (`core/v1`, `NodeInternalIP`).
const INTERNAL_IP: &str = "InternalIP";

/// A Node object.
#[derive(Debug, Clone, PartialEq)]
pub struct NodeObject {
    /// The name.
    pub name: NodeName,
    /// The object's unique id: a Node that was deleted and created again has another one.
    pub uid: NodeUid,
    /// The version of the object, as the API server counts.
    pub version: ResourceVersion,
    /// The labels.
    pub labels: BTreeMap<String, String>,
    /// The taints, in the order of the object.
    pub taints: Vec<Taint>,
    /// The addresses of type `InternalIP`, in the order of the object.
    pub addresses: Vec<IpAddr>,
    /// The conditions.
    pub conditions: Vec<Condition>,
}

/// The version of an object or of a list. Opaque: two are only compared for equality.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResourceVersion(pub(super) String);

/// A taint of a Node.
#[derive(Debug, Clone, PartialEq)]
pub struct Taint {
    /// The key, for example `node.kubernetes.io/out-of-service`.
    pub key: String,
    /// All fields.
    pub(super) wire: WireTaint,
}

/// A condition of a Node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Condition {
    /// The type, for example [`NETWORK_UNAVAILABLE`].
    pub kind: String,
    /// Whether the condition is met.
    pub status: ConditionStatus,
    /// The reason as one word.
    pub reason: String,
    /// The reason as text.
    pub message: String,
}

/// The status of a condition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ConditionStatus {
    /// The condition is met.
    True,
    /// The condition is not met.
    False,
    /// It is not known whether the condition is met.
    Unknown,
}

/// The part of the agent's own Node object that other tasks use.
#[derive(Debug, Default, Clone, PartialEq, Eq, serde::Deserialize, serde::Serialize)]
#[serde(deny_unknown_fields)]
pub struct NodeFacts {
    /// The labels.
    pub labels: BTreeMap<String, String>,
    /// The addresses of type `InternalIP`, in the order of the object.
    pub addresses: Vec<IpAddr>,
    /// The object's unique id. `None` if the object was never read.
    #[serde(default)]
    pub uid: Option<NodeUid>,
}

impl NodeObject {
    /// The excerpt of an object. `None` if its name is not the name of a node of Polder.
    pub fn of(node: Node) -> Option<Self> {
        let Node { metadata, spec, status } = node;
        let name: NodeName = match metadata.name.unwrap_or_default().parse() {
            Ok(name) => name,
            Err(error) => {
                tracing::debug!(%error, "ignoring a Node object");
                return None;
            }
        };
        let status = status.unwrap_or_default();
        let internal = status.addresses.into_iter().flatten().filter(|address| address.type_ == INTERNAL_IP);
        Some(Self {
            name,
            uid: NodeUid::new(metadata.uid.unwrap_or_default()),
            version: ResourceVersion(metadata.resource_version.unwrap_or_default()),
            labels: metadata.labels.unwrap_or_default(),
            taints: spec.unwrap_or_default().taints.into_iter().flatten().map(Taint::from).collect(),
            addresses: internal.filter_map(|address| address.address.parse().ok()).collect(),
            conditions: status.conditions.into_iter().flatten().map(Condition::from).collect(),
        })
    }

    /// The part that other tasks use.
    pub fn facts(&self) -> NodeFacts {
        NodeFacts {
            labels: self.labels.clone(),
            addresses: self.addresses.clone(),
            uid: Some(self.uid.clone()),
        }
    }

    /// The condition of that type.
    pub fn condition(&self, kind: &str) -> Option<&Condition> {
        self.conditions.iter().find(|condition| condition.kind == kind)
    }

    /// Whether it has a taint with that key.
    pub fn has_taint(&self, key: &str) -> bool {
        self.taints.iter().any(|taint| taint.key == key)
    }
}

impl From<WireTaint> for Taint {
    fn from(taint: WireTaint) -> Self {
        Self { key: taint.key.clone(), wire: taint }
    }
}

impl From<NodeCondition> for Condition {
    fn from(condition: NodeCondition) -> Self {
        Self {
            kind: condition.type_,
            status: match condition.status.as_str() {
                "True" => ConditionStatus::True,
                "False" => ConditionStatus::False,
                _ => ConditionStatus::Unknown,
            },
            reason: condition.reason.unwrap_or_default(),
            message: condition.message.unwrap_or_default(),
        }
    }
}

impl ConditionStatus {
    /// As in the object.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::True => "True",
            Self::False => "False",
            Self::Unknown => "Unknown",
        }
    }
}
