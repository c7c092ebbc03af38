//! What stands behind each key of the store: small JSON objects.

use std::fmt;
use std::net::IpAddr;

pub use polder_api::Backend;
pub use polder_api::ipam::PodsGone;
use polder_api::ipam::{DeviationStatus, Repairs};
pub use polder_api::status::AttachMode;
use polder_api::{Attachment, Mac, NodeName, Pod, PoolName};
use serde::{Deserialize, Serialize};

use crate::Cidr;
use crate::ids::{BootId, ClusterId, Incarnation, MachineId, Nonce};
use crate::pool::{Labels, Pool, PoolState, Purpose, default_block_length};

mod codec;

pub use codec::{Record, RefusedRecord, address, alive, decode, encode};

/// From what every IPv4 host takes (RFC 791, section 3.1) to the largest that an interface takes.
pub const MTU_RANGE: std::ops::RangeInclusive<u32> = 576..=65535;

/// The settings that all nodes share.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClusterRecord {
    /// Random, made with the cluster: what else has the same names in another cluster is not ours.
    pub id: ClusterId,
    /// How peers are reached.
    pub backend: Backend,
    /// How pods hang on their node.
    pub attach: AttachMode,
    /// The tunnels.
    pub vxlan: VxlanSettings,
    /// What pods look like from outside.
    pub masquerade: Masquerade,
}

impl ClusterRecord {
    /// The settings of a cluster for which nobody has asked for others.
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

/// The tunnels' parameters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VxlanSettings {
    /// VXLAN network identifier, 24 bits.
    pub vni: u32,
    /// UDP port.
    pub port: u16,
}

impl Default for VxlanSettings {
    fn default() -> Self {
        Self { vni: 1, port: 8472 }
    }
}

/// Whether pods leave the cluster with their node's address.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Masquerade {
    /// Whether they do at all.
    pub enabled: bool,
    /// Where they keep their own address nevertheless, besides the pools.
    pub except: Vec<Cidr>,
}

impl Default for Masquerade {
    fn default() -> Self {
        Self { enabled: true, except: Vec::new() }
    }
}

/// A pool, under its name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PoolRecord {
    /// Its range.
    pub cidr: Cidr,
    /// The prefix length of its blocks.
    pub block_length: u8,
    /// What may happen in it.
    pub state: PoolState,
    /// What its addresses are for.
    #[serde(default, skip_serializing_if = "is_usual")]
    pub purpose: Purpose,
    /// The labels that a node must have to take addresses from it.
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
    /// An active pool with blocks of the usual size.
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

/// A node, written by itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeRecord {
    /// Which of the nodes that had this name it is.
    pub incarnation: Incarnation,
    /// Its machine.
    pub machine_id: MachineId,
    /// Which boot of the machine.
    pub boot_id: BootId,
    /// Where peers reach it: at most one address of a family.
    pub underlay: Vec<IpAddr>,
    /// Its own addresses in the pod network, one of a family: the gateways of its pods.
    pub gateways: Vec<IpAddr>,
    /// The addresses of its probe endpoint, at most one of a family: what is sent there is forwarded as a pod's packet.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub probes: Vec<IpAddr>,
    /// The MAC address of its end of the tunnels.
    pub vtep_mac: Mac,
    /// The MTU of its pods, in bytes.
    pub mtu: u32,
    /// The release of its agent.
    pub version: String,
}

/// The claim of a block, under the block.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlockRecord {
    /// Whose it is.
    pub node: NodeName,
    /// Which of the nodes that had this name.
    pub incarnation: Incarnation,
    /// The pool that it is cut from.
    pub pool: PoolName,
    /// Tells this claim from any other attempt to make the same one.
    pub nonce: Nonce,
}

/// A node that was removed, under its name and incarnation. As long as this is there, its blocks rest: its pods may
/// live. Only the incarnation that the key names can confirm that they do not, on the machine that is named here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FenceRecord {
    /// Its name, as in the key.
    pub node: NodeName,
    /// The machine that it was.
    pub machine_id: MachineId,
    /// In which boot it was.
    pub boot_id: BootId,
    /// Whether it is known that its pods are gone.
    pub pods: PodsGone,
}

/// An address that belongs to a workload by name, under the address.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReservationRecord {
    /// The workload: `namespace/name` of its pod.
    pub owner: String,
    /// Who has it now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub holder: Option<Holder>,
    /// Counts the hands that it went through: what an earlier holder does late changes nothing.
    pub generation: u64,
}

/// Who has a reserved address.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Holder {
    /// On which node.
    pub node: NodeName,
    /// Which of the nodes that had this name.
    pub incarnation: Incarnation,
    /// In which boot: after another one the pod is gone.
    pub boot_id: BootId,
    /// The attachment.
    pub attachment: Attachment,
}

/// A sign of life of a node, under a lease.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Alive {
    /// In which boot it is alive.
    pub boot_id: BootId,
    /// On which machine: machines can share a boot id, as containers of one host do.
    #[serde(default)]
    pub machine_id: MachineId,
}

/// One boot of one machine, as far as ids tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Life<'a> {
    /// Its machine.
    pub machine_id: &'a MachineId,
    /// Which boot.
    pub boot_id: &'a BootId,
}

impl<'a> From<&'a NodeRecord> for Life<'a> {
    fn from(record: &'a NodeRecord) -> Self {
        Self { machine_id: &record.machine_id, boot_id: &record.boot_id }
    }
}

impl<'a> From<&'a FenceRecord> for Life<'a> {
    fn from(record: &'a FenceRecord) -> Self {
        Self { machine_id: &record.machine_id, boot_id: &record.boot_id }
    }
}

impl<'a> From<&'a Alive> for Life<'a> {
    fn from(record: &'a Alive) -> Self {
        Self { machine_id: &record.machine_id, boot_id: &record.boot_id }
    }
}

impl From<Life<'_>> for Alive {
    fn from(life: Life<'_>) -> Self {
        Self { boot_id: life.boot_id.clone(), machine_id: life.machine_id.clone() }
    }
}

impl fmt::Display for Alive {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Life::from(self).fmt(f)
    }
}

impl fmt::Display for Life<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "machine id {}, boot id {}", self.machine_id, self.boot_id)
    }
}

/// What has an address, for people and tools.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AddressRecord {
    /// The attachment.
    pub attachment: Attachment,
    /// The pod, where the runtime named it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<Pod>,
}

/// The wish that every node looks at itself, and answers at [`crate::key::Key::Answer`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InspectionRecord {
    /// Tells it from any other.
    pub id: Nonce,
    /// Whether what is found is to be put right.
    pub repairs: Repairs,
}

/// What a node has found that looked at itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AnswerRecord {
    /// Which inspection it answers.
    pub id: Nonce,
    /// How many attachments its ledger has.
    pub attachments: u64,
    /// How many interfaces of pods its kernel has.
    pub interfaces: u64,
    /// What is not as it should be.
    pub deviations: Vec<DeviationStatus>,
    /// How many more there are that were not put right, for which there was no room.
    pub left_out: u64,
}
