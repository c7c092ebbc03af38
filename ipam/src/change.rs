//! Changes of the cluster's records, for example: claim a block, register a node, hand over an address.
//! [`crate::transaction`] translates them for a datastore like etcd.
//!
//! A change depends on records at the revision at which they were read. If one of them has changed since, nothing is
//! applied.

use std::fmt;
use std::net::IpAddr;

use polder_api::{NodeName, PoolName};

use crate::Cidr;
use crate::Revision;
use crate::ids::Incarnation;
use crate::key::Name;
use crate::pool::{Block, Pool};
use crate::record::{
    AddressRecord, AnswerRecord, BlockRecord, ClusterRecord, FenceRecord, InspectionRecord, LeaderRecord,
    LeaseRecord, NodeRecord, ReservationRecord,
};

/// The maximum number of records in one change, for changes that can have many.
pub const MOST_RECORDS: usize = 128;

/// A change of the cluster's records.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// Writes the node's own record.
    RegisterNode {
        /// The name of the node.
        node: NodeName,
        /// The record to write.
        record: NodeRecord,
        /// The revision of the current record. `None` if the node has no record; the node must not have been removed
        /// either.
        before: Option<Revision>,
    },
    /// Writes the node's own record over that of another machine. The node's ledger may be an old copy: all unused
    /// addresses must be put into cool-down first ([`crate::node::NodeIpam::cool_down_unused`]).
    TakeOverNode {
        /// The name of the node.
        node: NodeName,
        /// The record to write.
        record: NodeRecord,
        /// The revision of the other machine's record.
        before: Revision,
    },
    /// Removes a node from the cluster, and writes its fence.
    RemoveNode {
        /// The incarnation of the node.
        incarnation: Incarnation,
        /// The revision of the node's record.
        revision: Revision,
        /// The fence to write.
        fence: FenceRecord,
        /// The required state of the node's lease.
        lease: RequiredLease,
    },
    /// Confirms for an operator that the pods of removed nodes are gone.
    ConfirmByOperator(Vec<Confirmation>),
    /// Confirms for a removed node that its pods are gone.
    ConfirmRemoval(Confirmation),
    /// Releases the blocks and reserved addresses of a removed node, or a part of them.
    ReleaseRemoved(RemovedAllocations),
    /// Deletes the fence of a removed node that holds no blocks or addresses any more.
    ForgetFence {
        /// The node that deletes it.
        by: Member,
        /// The removed node.
        fence: Fence,
    },
    /// Claims a block for a node. Also restores a claim of the node that the datastore has lost.
    ClaimBlock(Claim),
    /// Releases blocks.
    ReleaseBlocks {
        /// The node that claimed them.
        by: Member,
        /// The blocks, with the revisions of their claims.
        blocks: Vec<(Block, Revision)>,
    },
    /// Hands a reserved address over to a pod. Also restores the record if the pod already uses the address and the
    /// datastore has lost the record.
    HandOverAddress(HandOver),
    /// Clears the holder of a reserved address. The workload keeps the reservation.
    ReleaseAddress {
        /// The node of the pod that held it.
        by: Member,
        /// The address.
        released: AddressRelease,
    },
    /// Deletes the reservation of an address.
    DeleteReservation {
        /// The address.
        address: IpAddr,
        /// The revision of its reservation.
        revision: Revision,
    },
    /// Adds a pool. Not applied if a pool, a node, a reservation, or a claim inside the new pool is newer than
    /// `as_of`.
    AddPool {
        /// The node that restores a pool that the datastore has lost; `None` if an operator adds it.
        by: Option<Member>,
        /// The pool.
        pool: Pool,
        /// The revision at which all records were read.
        as_of: Revision,
    },
    /// Drains a pool, or makes it active again.
    ReplacePool {
        /// The pool in its new state.
        pool: Pool,
        /// The revision of the pool's record.
        revision: Revision,
    },
    /// Removes a pool. Not applied if a block of it is claimed, or if a reservation is newer than `as_of`.
    RemovePool {
        /// The name of the pool.
        name: PoolName,
        /// The range of the pool.
        cidr: Cidr,
        /// The revision of the pool's record.
        revision: Revision,
        /// The revision at which all records were read.
        as_of: Revision,
    },
    /// Writes the settings of a cluster that has none.
    MakeCluster {
        /// The settings.
        record: ClusterRecord,
        /// The pools, if the cluster has none; `None` keeps the existing pools.
        pools: Option<Vec<Pool>>,
    },
    /// Changes the settings of a cluster.
    ReplaceSettings {
        /// The settings.
        record: ClusterRecord,
        /// The revision of the current settings.
        revision: Revision,
    },
    /// Updates the published owners of a node's addresses.
    PublishAddresses {
        /// The node.
        by: Member,
        /// The owners to write, by address.
        publish: Vec<(IpAddr, AddressRecord)>,
        /// The records to delete.
        withdraw: Vec<Name>,
    },
    /// Deletes published owners of addresses.
    WithdrawAddresses {
        /// The required state of the node.
        by: Writer,
        /// The records to delete; with a revision if the record must be unchanged.
        records: Vec<(Name, Option<Revision>)>,
    },
    /// Writes the lease record of a node, which exists while its lease is valid.
    WriteLease(LeaseWrite),
    /// Restores the lease record of a node, if it was deleted.
    RestoreLease(LeaseWrite),
    /// Writes the record of the leader under its lease.
    WriteLeader {
        /// The leader.
        by: Member,
        /// The record.
        record: LeaderRecord,
        /// The revision of its current record; `None` to become the leader, if there is none.
        before: Option<Revision>,
    },
    /// Requests a check on all nodes.
    AskInspection(InspectionRecord),
    /// Ends the check on all nodes.
    EndInspection {
        /// The revision of the request.
        revision: Revision,
    },
    /// Writes the check result of a node.
    AnswerInspection {
        /// The node.
        node: NodeName,
        /// The check result.
        record: AnswerRecord,
        /// The revision of the request. A result that is too late is not written.
        asked: Revision,
    },
    /// Deletes check results, if no check is requested.
    ForgetAnswers(Vec<Name>),
}

/// The node that makes a change. The change is not applied if the record of the node has changed or is gone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// The name of the node.
    pub node: NodeName,
    /// The revision of its record; 0 if it has none.
    pub revision: Revision,
}

/// The state of the lease of a node that its removal requires.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RequiredLease {
    /// Any: an operator has decided.
    Any,
    /// None: the agent of the node is not alive.
    Absent,
}

/// A write of the lease record of a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeaseWrite {
    /// The node.
    pub by: Member,
    /// The machine and its boot.
    pub record: LeaseRecord,
}

/// The state of a node that a deletion of its published addresses requires.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Writer {
    /// The node is registered, and its record is unchanged.
    Node(Member),
    /// No node has that name. Any node may delete the addresses.
    AnyNode(NodeName),
}

/// A removed node, with its fence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fence {
    /// The name of the node.
    pub node: NodeName,
    /// The incarnation of the node.
    pub incarnation: Incarnation,
    /// The revision of its fence.
    pub revision: Revision,
}

/// A confirmation that the pods of a removed node are gone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Confirmation {
    /// The incarnation of the removed node.
    pub incarnation: Incarnation,
    /// Its fence, with the confirmation.
    pub record: FenceRecord,
    /// The revision of the fence without the confirmation.
    pub revision: Revision,
}

/// Blocks and reserved addresses of a removed node, to be released.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RemovedAllocations {
    /// The node that releases them.
    pub by: Member,
    /// The removed node.
    pub fence: Fence,
    /// Its blocks, with the revisions of their claims.
    pub blocks: Vec<(Block, Revision)>,
    /// The reserved addresses held by its pods.
    pub addresses: Vec<AddressRelease>,
}

/// A claim of a block. Not applied if the block, a part of it, or a larger range of the pool around it is claimed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claim {
    /// The node that claims the block.
    pub by: Member,
    /// The block.
    pub block: Block,
    /// The record to write.
    pub record: BlockRecord,
    /// The range of its pool.
    pub pool: Cidr,
    /// The revision of the pool's record.
    pub pool_revision: Revision,
}

/// A hand-over of a reserved address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HandOver {
    /// The node of the new holder.
    pub by: Member,
    /// The address.
    pub address: IpAddr,
    /// The reservation to write.
    pub record: ReservationRecord,
    /// The revision of the current reservation; `None` if there is none.
    pub before: Option<Revision>,
    /// The pool and its revision, which must be unchanged. Set for an address that was not reserved before.
    pub source_pool: Option<(PoolName, Revision)>,
}

/// A reserved address whose holder is cleared.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AddressRelease {
    /// The address.
    pub address: IpAddr,
    /// Its reservation, without the holder.
    pub record: ReservationRecord,
    /// The revision of the reservation with the holder.
    pub revision: Revision,
}

impl From<Claim> for Change {
    fn from(claim: Claim) -> Self {
        Self::ClaimBlock(claim)
    }
}

impl From<HandOver> for Change {
    fn from(hand_over: HandOver) -> Self {
        Self::HandOverAddress(hand_over)
    }
}

/// The subject of the change, for messages, without the records that it depends on.
impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::RegisterNode { node, .. } => write!(f, "register node {node}"),
            Self::TakeOverNode { node, .. } => write!(f, "take over node {node}"),
            Self::RemoveNode { fence, .. } => write!(f, "remove node {}", fence.node),
            Self::ConfirmByOperator(confirmations) => {
                let nodes = confirmations
                    .iter()
                    .map(|confirmation| (&confirmation.record.node, &confirmation.incarnation));
                list(
                    f,
                    "mark pods as gone (--dead): node",
                    nodes.map(|(node, incarnation)| format!("{node} {incarnation}")),
                )
            }
            Self::ConfirmRemoval(Confirmation { record, .. }) => {
                write!(f, "confirm the removal of node {}", record.node)
            }
            Self::ReleaseRemoved(what) => {
                write!(f, "release the blocks and reservations of removed node {}", what.fence.node)
            }
            Self::ForgetFence { fence, .. } => write!(f, "delete the fence of node {}", fence.node),
            Self::ClaimBlock(claim) => write!(f, "claim block {}", claim.block),
            Self::ReleaseBlocks { blocks, .. } => {
                list(f, "release block", blocks.iter().map(|(block, _)| block))
            }
            Self::HandOverAddress(what) => write!(f, "hand over {}", what.address),
            Self::ReleaseAddress { released, .. } => write!(f, "clear the holder of {}", released.address),
            Self::DeleteReservation { address, .. } => write!(f, "delete the reservation of {address}"),
            Self::AddPool { pool, .. } => write!(f, "add pool {}", pool.name),
            Self::ReplacePool { pool, .. } => write!(f, "change pool {}", pool.name),
            Self::RemovePool { name, .. } => write!(f, "remove pool {name}"),
            Self::MakeCluster { record, .. } => write!(f, "create cluster {}", record.id),
            Self::ReplaceSettings { record, .. } => write!(f, "change the settings of cluster {}", record.id),
            Self::PublishAddresses { by, .. } => write!(f, "publish the addresses of node {}", by.node),
            Self::WithdrawAddresses { records, .. } => {
                list(f, "withdraw", records.iter().map(|(name, _)| name))
            }
            Self::WriteLease(LeaseWrite { by, .. }) => {
                write!(f, "write the lease record of node {}", by.node)
            }
            Self::RestoreLease(LeaseWrite { by, .. }) => {
                write!(f, "restore the lease record of node {}", by.node)
            }
            Self::WriteLeader { by, .. } => write!(f, "write the leader record of node {}", by.node),
            Self::AskInspection(_) => write!(f, "request a check on all nodes"),
            Self::EndInspection { .. } => write!(f, "end the check on all nodes"),
            Self::AnswerInspection { node, .. } => write!(f, "write the check result of node {node}"),
            Self::ForgetAnswers(_) => write!(f, "delete check results"),
        }
    }
}

fn list<T: fmt::Display>(
    f: &mut fmt::Formatter<'_>,
    what: &str,
    all: impl Iterator<Item = T>,
) -> fmt::Result {
    let all: Vec<String> = all.map(|one| one.to_string()).collect();
    write!(f, "{what} {}", all.join(", "))
}
