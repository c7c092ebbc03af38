//! The records in the datastore: the value of each key, a small JSON object.

use std::fmt;
use std::net::IpAddr;

pub use polder_api::Backend;
pub use polder_api::ipam::PodsGone;
use polder_api::ipam::{DeviationStatus, RepairMode};
pub use polder_api::status::AttachMode;
use polder_api::{Attachment, Mac, NodeName, Pod, PoolName};
use serde::{Deserialize, Serialize};

use crate::Cidr;
use crate::ids::{BootId, ClusterId, Incarnation, MachineId, NodeUid, Nonce};
use crate::pool::{Labels, Pool, PoolState, Purpose, default_block_length};

mod codec;
mod leader;

pub use codec::{NotDecoded, Record, address, decode, encode, lease};
pub use leader::{LeaderRecord, MissingNode};

/// MTU in bytes: from the size that every IPv4 host accepts (RFC 791, section 3.1) to the maximum of an interface.
pub const MTU_RANGE: std::ops::RangeInclusive<u32> = 576..=65535;

/// The settings shared by all nodes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClusterRecord {
    /// Random, created with the cluster: distinguishes objects of another cluster with the same names.
    pub id: ClusterId,
    /// Paths to peers: direct, VXLAN or automatic.
    pub backend: Backend,
    /// Connection of pods to their node.
    pub attach: AttachMode,
    /// Parameters of the VXLAN tunnels.
    pub vxlan: VxlanSettings,
    /// Source address of traffic from pods to destinations outside the cluster.
    pub masquerade: Masquerade,
}

impl ClusterRecord {
    /// The UDP port on which all nodes receive tunnel packets.
    pub const fn tunnel_port(&self) -> u16 {
        self.vxlan.port
    }

    /// The default settings of a new cluster.
    pub fn new(id: ClusterId) -> Self {
        Self {
            id,
            backend: Backend::Auto,
            attach: AttachMode::Bridge,
            vxlan: VxlanSettings::default(),
            masquerade: Masquerade::default(),
        }
    }
}

/// Parameters of the VXLAN tunnels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VxlanSettings {
    /// VXLAN network identifier, 24 bits.
    pub vni: u32,
    /// UDP destination port.
    pub port: u16,
}

impl Default for VxlanSettings {
    fn default() -> Self {
        Self { vni: 1, port: 8472 }
    }
}

/// Whether packets from pods leave the cluster with their node's address.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Masquerade {
    /// Whether it is enabled.
    pub enabled: bool,
    /// Destinations, besides the pools, to which pods keep their own address.
    pub except: Vec<Cidr>,
}

impl Default for Masquerade {
    fn default() -> Self {
        Self { enabled: true, except: Vec::new() }
    }
}

/// A pool; its key contains its name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PoolRecord {
    /// Range of the pool.
    pub cidr: Cidr,
    /// Prefix length of its blocks.
    pub block_length: u8,
    /// Whether addresses may be allocated from it.
    pub state: PoolState,
    /// Use of its addresses: blocks or reservations.
    #[serde(default, skip_serializing_if = "is_usual")]
    pub purpose: Purpose,
    /// Labels that a node needs to allocate from it; empty for all nodes.
    #[serde(default, skip_serializing_if = "Labels::is_empty")]
    pub nodes: Labels,
}

fn is_usual(purpose: &Purpose) -> bool {
    *purpose == Purpose::default()
}

impl From<&Pool> for PoolRecord {
    fn from(pool: &Pool) -> Self {
        Self {
            cidr: pool.cidr(),
            block_length: pool.block_length(),
            state: pool.state,
            purpose: pool.purpose,
            nodes: pool.nodes.clone(),
        }
    }
}

impl PoolRecord {
    /// An active pool with the default block length.
    pub fn new(cidr: Cidr) -> Self {
        Self {
            cidr,
            block_length: default_block_length(cidr.family()),
            state: PoolState::Active,
            purpose: Purpose::default(),
            nodes: Labels::new(),
        }
    }
}

/// A node; written by the node itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeRecord {
    /// Distinguishes successive nodes with this name.
    pub incarnation: Incarnation,
    /// Id of its machine.
    pub machine_id: MachineId,
    /// Id of the current boot of the machine.
    pub boot_id: BootId,
    /// Underlay addresses, at most one per family.
    pub underlay: Vec<IpAddr>,
    /// Gateway addresses of its pods in the pod network, at most one per family.
    pub gateways: Vec<IpAddr>,
    /// Addresses of its probe endpoint, at most one per family: packets to it are forwarded like packets to a pod.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub probes: Vec<IpAddr>,
    /// MAC address of its VXLAN tunnel endpoint.
    pub vtep_mac: Mac,
    /// MTU of its pods, in bytes.
    pub mtu: u32,
    /// Version of its agent.
    pub version: String,
    /// Its Node object in Kubernetes, as its agent last saw it. `None` on a node that does not use Kubernetes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kubernetes_uid: Option<NodeUid>,
}

/// The claim of a block; its key contains the block.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlockRecord {
    /// Owner of the block.
    pub node: NodeName,
    /// Incarnation of the owner.
    pub incarnation: Incarnation,
    /// The pool that contains the block.
    pub pool: PoolName,
    /// Distinguishes this claim from other attempts to claim the same block.
    pub nonce: Nonce,
}

/// The fence of a removed node; its key contains name and incarnation. While it exists, the node's blocks are not
/// allocated again, because its pods may still run. Only this incarnation, on the machine named here, can confirm that
/// they are gone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FenceRecord {
    /// Node name, as in the key.
    pub node: NodeName,
    /// Machine id of the removed node.
    pub machine_id: MachineId,
    /// Boot id of the removed node.
    pub boot_id: BootId,
    /// Whether its pods are known to be gone.
    pub pods: PodsGone,
    /// The Node object in Kubernetes that the removed node had. If its machine has another one, it joins again by
    /// itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kubernetes_uid: Option<NodeUid>,
}

/// An address reserved for a workload name; its key contains the address.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReservationRecord {
    /// The workload: `namespace/name` of its pod.
    pub owner: String,
    /// Current holder; `None` if no node holds it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub holder: Option<Holder>,
    /// Increases with each handover: late changes by an earlier holder have no effect.
    pub generation: u64,
}

/// The holder of a reserved address.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Holder {
    /// Node of the holder.
    pub node: NodeName,
    /// Incarnation of the node.
    pub incarnation: Incarnation,
    /// Boot id of the node's machine: after a reboot the pod is gone.
    pub boot_id: BootId,
    /// The attachment that uses it.
    pub attachment: Attachment,
}

/// Liveness record of a node; its key is bound to a lease.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LeaseRecord {
    /// Id of the boot that is alive.
    pub boot_id: BootId,
    /// Id of the machine: machines can share a boot id, for example containers of one host.
    #[serde(default)]
    pub machine_id: MachineId,
}

/// One boot of one machine, identified by both ids.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Boot<'a> {
    /// Machine id.
    pub machine_id: &'a MachineId,
    /// Boot id.
    pub boot_id: &'a BootId,
}

impl<'a> From<&'a NodeRecord> for Boot<'a> {
    fn from(record: &'a NodeRecord) -> Self {
        Self { machine_id: &record.machine_id, boot_id: &record.boot_id }
    }
}

impl<'a> From<&'a FenceRecord> for Boot<'a> {
    fn from(record: &'a FenceRecord) -> Self {
        Self { machine_id: &record.machine_id, boot_id: &record.boot_id }
    }
}

impl<'a> From<&'a LeaseRecord> for Boot<'a> {
    fn from(record: &'a LeaseRecord) -> Self {
        Self { machine_id: &record.machine_id, boot_id: &record.boot_id }
    }
}

impl From<Boot<'_>> for LeaseRecord {
    fn from(boot: Boot<'_>) -> Self {
        Self { boot_id: boot.boot_id.clone(), machine_id: boot.machine_id.clone() }
    }
}

impl fmt::Display for LeaseRecord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Boot::from(self).fmt(f)
    }
}

impl fmt::Display for Boot<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "machine id {}, boot id {}", self.machine_id, self.boot_id)
    }
}

/// The user of an address, for operators and tools.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AddressRecord {
    /// The attachment.
    pub attachment: Attachment,
    /// The pod, if the runtime passed its name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<Pod>,
}

/// Request that every node checks itself and writes the result to [`crate::key::Key::Answer`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InspectionRecord {
    /// Identifies the request.
    pub id: Nonce,
    /// Whether deviations are to be repaired.
    pub repairs: RepairMode,
}

/// The result of a node's check of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AnswerRecord {
    /// Id of the request that it answers.
    pub id: Nonce,
    /// Number of attachments in the node's ledger.
    pub attachments: u64,
    /// Number of pod interfaces in the node's kernel.
    pub interfaces: u64,
    /// The deviations that fit into the record.
    pub deviations: Vec<DeviationStatus>,
    /// Number of further deviations that were not repaired and do not fit.
    pub left_out: u64,
}
