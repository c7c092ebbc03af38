//! What stands behind each key of the store: small JSON objects, read strictly.
//!
//! A record comes from outside. One that has an unknown field, lacks one or contradicts its key is refused with the
//! key named, and never applied in part.

use std::fmt;
use std::net::IpAddr;

pub use polder_api::Backend;
use polder_api::ipam::{DeviationStatus, Repairs};
use polder_api::{Attachment, Mac, NodeName, Pod, PoolName};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::key::{Key, PREFIX};
use crate::pool::{Labels, Pool, PoolState, Purpose, default_block_length};
use crate::{Block, Cidr};

/// From what every IPv4 host takes (RFC 791, section 3.1) to the largest that an interface takes.
pub const MTU_RANGE: std::ops::RangeInclusive<u32> = 576..=65535;

/// A record that is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("record {key} is refused: {reason}")]
pub struct RefusedRecord {
    /// Where it is.
    pub key: String,
    /// What is wrong with it.
    pub reason: String,
}

/// A record of a kind that agents follow.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Record {
    /// At [`Key::Cluster`].
    Cluster(ClusterRecord),
    /// At [`Key::Pool`].
    Pool(Pool),
    /// At [`Key::Node`].
    Node(NodeName, NodeRecord),
    /// At [`Key::Block`].
    Block(Block, BlockRecord),
    /// At [`Key::Fence`].
    Fence(Incarnation, FenceRecord),
    /// At [`Key::Reservation`].
    Reservation(IpAddr, ReservationRecord),
    /// At [`Key::Inspection`].
    Inspection(InspectionRecord),
}

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

/// How pods hang on their node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AttachMode {
    /// As ports of a bridge.
    #[default]
    Bridge,
    /// With a host route each.
    Routed,
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
    /// `/etc/machine-id`.
    pub machine_id: String,
    /// Which boot of the machine (`/proc/sys/kernel/random/boot_id`).
    pub boot_id: String,
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
    pub machine_id: String,
    /// In which boot it was.
    pub boot_id: String,
    /// Whether it is known that its pods are gone.
    pub pods: PodsGone,
}

/// Whether it is known that the pods of a removed node are gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PodsGone {
    /// It is not.
    Unknown,
    /// The node itself has cut them off.
    Confirmed,
    /// An operator says so.
    Vouched,
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
    pub boot_id: String,
    /// The attachment.
    pub attachment: Attachment,
}

/// A sign of life of a node, under a lease.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Alive {
    /// In which boot it is alive.
    pub boot_id: String,
    /// On which machine: machines can share a boot id, as containers of one host do.
    #[serde(default)]
    pub machine_id: String,
}

/// One boot of one machine, as far as ids tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Life<'a> {
    /// `/etc/machine-id`.
    pub machine_id: &'a str,
    /// Which boot.
    pub boot_id: &'a str,
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

/// The wish that every node looks at itself, and answers at [`Key::Answer`].
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

macro_rules! random_identity {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub String);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Debug::fmt(&self.0, f)
            }
        }
    };
}

random_identity!(
    /// Which of all clusters.
    ClusterId
);
random_identity!(
    /// Which of the nodes that had the same name. Made when a node first registers, kept in its ledger.
    Incarnation
);
random_identity!(
    /// Which of the attempts to write the same record.
    Nonce
);

/// What is said of a fence where an earlier build put it.
const OLD_FENCE: &str = "it is the fence of a removed node as an earlier build wrote it: fences are at \
     fences/NODE/INCARNATION. When the node is registered again, remove it again with polderctl node remove, then \
     delete this key with etcdctl del";

/// Reads the record behind a key that agents follow.
pub fn decode(key: &str, value: &[u8]) -> Result<Record, RefusedRecord> {
    let refused = |reason: String| RefusedRecord { key: key.to_owned(), reason };
    let parsed: Key = key.parse().map_err(|error: crate::key::UnknownKey| {
        let is_old_fence = key.strip_prefix(PREFIX).and_then(|rest| rest.strip_prefix("fences/"));
        match is_old_fence.filter(|rest| !rest.contains('/')) {
            Some(_) => refused(OLD_FENCE.to_owned()),
            None => refused(error.to_string()),
        }
    })?;
    let record = match parsed {
        Key::Cluster => Record::Cluster(json(value).map_err(refused)?),
        Key::Node(name) => Record::Node(name, json(value).map_err(refused)?),
        Key::Block(block) => Record::Block(block, json(value).map_err(refused)?),
        Key::Pool(name) => {
            let record: PoolRecord = json(value).map_err(refused)?;
            let pool = Pool::new(name, record.cidr, record.block_length, record.state);
            let mut pool = pool.map_err(|error| refused(error.to_string()))?;
            pool.purpose = record.purpose;
            pool.nodes = record.nodes;
            Record::Pool(pool)
        }
        Key::Fence(node, incarnation) => {
            let record: FenceRecord = json(value).map_err(refused)?;
            if record.node != node {
                return Err(refused(format!("it names node {}, and its key names {node}", record.node)));
            }
            Record::Fence(incarnation, record)
        }
        Key::Reservation(address) => Record::Reservation(address, json(value).map_err(refused)?),
        Key::Inspection => Record::Inspection(json(value).map_err(refused)?),
        Key::Address(..) | Key::Alive(_) | Key::Answer(_) => {
            return Err(refused("agents do not follow it".to_owned()));
        }
    };
    Ok(record)
}

/// Reads the record behind [`Key::Address`].
pub fn address(value: &[u8]) -> Result<AddressRecord, String> {
    json(value)
}

fn json<T: DeserializeOwned>(value: &[u8]) -> Result<T, String> {
    serde_json::from_slice(value).map_err(|error| error.to_string())
}

/// A record as it goes into the store.
pub fn encode(record: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(record).expect("records are plain data with text keys")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_that_is_not_exactly_one_is_refused_with_its_key() {
        for (key, value, reason) in [
            ("/polder/v1/cluster", "{", "EOF"),
            ("/polder/v1/pools/p", r#"{"cidr":"10.0.0.0/16","block_length":26}"#, "missing field `state`"),
            (
                "/polder/v1/pools/p",
                r#"{"cidr":"10.0.0.0/16","block_length":26,"state":"active","x":1}"#,
                "unknown field `x`",
            ),
            (
                "/polder/v1/pools/p",
                r#"{"cidr":"10.0.0.1/16","block_length":26,"state":"active"}"#,
                "did you mean",
            ),
            (
                "/polder/v1/pools/p",
                r#"{"cidr":"10.0.0.0/28","block_length":26,"state":"active"}"#,
                "smaller than one",
            ),
            (
                "/polder/v1/pools/p",
                r#"{"cidr":"10.0.0.0/16","block_length":26,"state":"open"}"#,
                "unknown variant",
            ),
            ("/polder/v1/strange", "{}", "not a key of a known kind"),
            ("/polder/v1/fences/i", r#"{"node":"n","boot_id":"b","pods":"unknown"}"#, "earlier build"),
            (
                "/polder/v1/fences/m/i",
                r#"{"node":"n","machine_id":"m","boot_id":"b","pods":"unknown"}"#,
                "its key names m",
            ),
        ] {
            let error = decode(key, value.as_bytes()).unwrap_err().to_string();
            assert!(error.starts_with(&format!("record {key} is refused: ")), "{error}");
            assert!(error.contains(reason), "{error} does not say {reason:?}");
        }
    }

    #[test]
    fn records_stay_readable_by_every_later_release() {
        let golden = [
            (
                "/polder/v1/cluster",
                r#"{"id":"c0ffee","backend":"auto","attach":"bridge","vxlan":{"vni":1,"port":8472},"masquerade":{"enabled":true,"except":["192.0.2.0/24"]}}"#,
            ),
            ("/polder/v1/pools/p", r#"{"cidr":"10.0.0.0/16","block_length":26,"state":"draining"}"#),
            (
                "/polder/v1/nodes/n",
                r#"{"incarnation":"i","machine_id":"m","boot_id":"b","underlay":["10.1.0.1","fd01::1"],"gateways":["10.0.0.1"],"vtep_mac":"02:00:00:00:00:01","mtu":1450,"version":"0.1.0"}"#,
            ),
            ("/polder/v1/blocks/4-0a000000-26", r#"{"node":"n","incarnation":"i","pool":"p","nonce":"x"}"#),
            (
                "/polder/v1/pools/static",
                r#"{"cidr":"10.1.0.0/24","block_length":26,"state":"active","purpose":"reservations","nodes":{"zone":"a"}}"#,
            ),
            ("/polder/v1/fences/n/i", r#"{"node":"n","machine_id":"m","boot_id":"b","pods":"unknown"}"#),
            (
                "/polder/v1/reservations/10.1.0.5",
                r#"{"owner":"default/db-0","holder":{"node":"n","incarnation":"i","boot_id":"b","attachment":{"network":"polder","container":"c","interface":"eth0"}},"generation":3}"#,
            ),
            ("/polder/v1/reservations/fd00::5", r#"{"owner":"default/db-0","generation":4}"#),
            ("/polder/v1/inspection", r#"{"id":"x","repairs":"safe"}"#),
        ];
        for (key, text) in golden {
            let again = match decode(key, text.as_bytes()).unwrap() {
                Record::Cluster(record) => encode(&record),
                Record::Pool(pool) => encode(&PoolRecord::from(&pool)),
                Record::Node(_, record) => encode(&record),
                Record::Block(_, record) => encode(&record),
                Record::Fence(_, record) => encode(&record),
                Record::Reservation(_, record) => encode(&record),
                Record::Inspection(record) => encode(&record),
            };
            assert_eq!(String::from_utf8(again).unwrap(), text);
        }
    }
}
