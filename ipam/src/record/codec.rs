//! Strict decoding and encoding of the datastore's records.
//!
//! Records come from outside this process. A record with an unknown or missing field, or one that contradicts its key,
//! is refused, and never applied in part.

use std::net::IpAddr;

use polder_api::NodeName;
use serde::Serialize;

use super::{
    AddressRecord, BlockRecord, ClusterRecord, FenceRecord, InspectionRecord, LeaderRecord, LeaseRecord,
    NodeRecord, PoolRecord, ReservationRecord,
};
use crate::Block;
use crate::cause::SharedError;
use crate::ids::Incarnation;
use crate::key::{Key, UnknownKey};
use crate::pool::{InvalidPool, Pool};
use crate::prefix;

/// A record of a type that agents watch.
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
    /// At [`Key::Leader`].
    Leader(LeaderRecord),
}

/// Why a record cannot be decoded.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, thiserror::Error)]
pub enum NotDecoded {
    /// The value is not valid JSON of the expected type.
    /// Remedy: check that all agents are of releases that work together; otherwise correct the record.
    #[error(transparent)]
    Json(SharedError),
    /// The key is not one of Polder.
    #[error(transparent)]
    Key(#[from] UnknownKey),
    /// The parameters of a pool contradict each other.
    #[error(transparent)]
    Pool(#[from] InvalidPool),
    /// A fence at the key of an earlier build.
    #[error(
        "it is the fence of a removed node, written by an earlier build: fences are now at \
         fences/NODE/INCARNATION. Wait until the node has registered again, run polderctl node remove NODE, \
         then delete this key with etcdctl del"
    )]
    OldFence,
    /// A fence names another node than its key: it was not written by an agent.
    /// Remedy: correct the node in the record; delete the record only if no machine has that incarnation.
    #[error("it names node {named}, but its key names {node}")]
    OtherNode {
        /// The node in the record.
        named: NodeName,
        /// The node in the key.
        node: NodeName,
    },
    /// The key is of a type that agents do not watch.
    /// Remedy: none, it is an internal error.
    #[error("agents do not read this key")]
    NotWatched,
}

impl From<serde_json::Error> for NotDecoded {
    fn from(error: serde_json::Error) -> Self {
        Self::Json(SharedError::new(error))
    }
}

/// Decodes the record at a key that agents watch.
pub fn decode(key: &str, value: &[u8]) -> Result<Record, NotDecoded> {
    let parsed: Key = key.parse().map_err(|error: UnknownKey| {
        let is_old_fence = key.strip_prefix(prefix::in_use()).and_then(|rest| rest.strip_prefix("fences/"));
        match is_old_fence.filter(|rest| !rest.contains('/')) {
            Some(_) => NotDecoded::OldFence,
            None => error.into(),
        }
    })?;
    let record = match parsed {
        Key::Cluster => Record::Cluster(serde_json::from_slice(value)?),
        Key::Node(name) => Record::Node(name, serde_json::from_slice(value)?),
        Key::Block(block) => Record::Block(block, serde_json::from_slice(value)?),
        Key::Pool(name) => {
            let record: PoolRecord = serde_json::from_slice(value)?;
            let mut pool = Pool::new(name, record.cidr, record.block_length, record.state)?;
            pool.purpose = record.purpose;
            pool.nodes = record.nodes;
            Record::Pool(pool)
        }
        Key::Fence(node, incarnation) => {
            let record: FenceRecord = serde_json::from_slice(value)?;
            if record.node != node {
                return Err(NotDecoded::OtherNode { named: record.node, node });
            }
            Record::Fence(incarnation, record)
        }
        Key::Reservation(address) => Record::Reservation(address, serde_json::from_slice(value)?),
        Key::Inspection => Record::Inspection(serde_json::from_slice(value)?),
        Key::Leader => Record::Leader(serde_json::from_slice(value)?),
        Key::Address(..) | Key::Lease(_) | Key::Answer(_) => {
            return Err(NotDecoded::NotWatched);
        }
    };
    Ok(record)
}

/// Decodes the record at [`Key::Address`].
pub fn address(value: &[u8]) -> Result<AddressRecord, serde_json::Error> {
    serde_json::from_slice(value)
}

/// Decodes the record at [`Key::Lease`].
pub fn lease(value: &[u8]) -> Result<LeaseRecord, serde_json::Error> {
    serde_json::from_slice(value)
}

/// Encodes a record as JSON for the datastore.
pub fn encode(record: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(record).expect("records are plain data with text keys")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::view::RefusedRecord;

    #[test]
    fn an_invalid_record_is_refused_with_its_key() {
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
            let refusal = decode(key, value.as_bytes()).unwrap_err().into();
            let error = RefusedRecord { key: key.to_owned(), reason: refusal }.to_string();
            assert!(error.starts_with(&format!("record {key} of the datastore is ignored: ")), "{error}");
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
            (
                "/polder/v1/nodes/k",
                r#"{"incarnation":"i","machine_id":"m","boot_id":"b","underlay":[],"gateways":[],"vtep_mac":"02:00:00:00:00:01","mtu":1450,"version":"0.1.0","kubernetes_uid":"0b1f"}"#,
            ),
            (
                "/polder/v1/fences/k/i",
                r#"{"node":"k","machine_id":"m","boot_id":"b","pods":"confirmed","kubernetes_uid":"0b1f"}"#,
            ),
            ("/polder/v1/leader", r#"{"node":"n","boot_id":"b"}"#),
            (
                "/polder/v1/leader",
                r#"{"node":"n","boot_id":"b","missing":[{"node":"m","departure":"replaced","agent":"not_alive","proof":"out_of_service"}],"more":2,"doubt":{"many":{"missing":4,"nodes":5,"limit":3}},"failure":"f"}"#,
            ),
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
                Record::Leader(record) => encode(&record),
            };
            assert_eq!(String::from_utf8(again).unwrap(), text);
        }
    }
}
