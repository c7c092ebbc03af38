//! What is to change in the cluster's records, in the words of whoever decides it: claim this block, register this node, hand over
//! this address. How it is written is the store's matter: [`crate::transaction`] says it for one like etcd.
//!
//! A change names what it rests on: records as of the revision at which they were looked at. Where one of them has changed since,
//! nothing of the change happens.

use std::fmt;
use std::net::IpAddr;

use polder_api::{NodeName, PoolName};

use crate::Cidr;
use crate::Revision;
use crate::ids::Incarnation;
use crate::key::Name;
use crate::pool::{Block, Pool};
use crate::record::{
    AddressRecord, Alive, AnswerRecord, BlockRecord, ClusterRecord, FenceRecord, InspectionRecord,
    NodeRecord, ReservationRecord,
};

/// How many records are put into one change at most, where there can be many.
pub const MOST_RECORDS: usize = 128;

/// A change of the cluster's records.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// The node's own record is what it should be.
    RegisterNode {
        /// Its name.
        node: NodeName,
        /// What it says of itself.
        record: NodeRecord,
        /// The revision of its record; `None` where it has none, and was not removed either.
        before: Option<Revision>,
    },
    /// The node's own record is what it should be, and was another machine's. The node's ledger can be an old copy: before
    /// this, all that is not used has to rest ([`crate::node::NodeIpam::rest_unused`]).
    TakeOverNode {
        /// Its name.
        node: NodeName,
        /// What it says of itself.
        record: NodeRecord,
        /// The revision of the other machine's record.
        before: Revision,
    },
    /// A node is no member any more, and a fence says so.
    RemoveNode {
        /// Which of the nodes that had its name.
        incarnation: Incarnation,
        /// The revision of its record.
        revision: Revision,
        /// The fence.
        fence: FenceRecord,
    },
    /// The pods of removed nodes are gone, as an operator says.
    VouchForNode(Vec<Confirmation>),
    /// The pods of a removed node are gone, as it says itself.
    ConfirmRemoval(Confirmation),
    /// What a removed node had is given back, or part of it.
    InheritFrom(Inheritance),
    /// A removed node of which nothing else is left is forgotten.
    ForgetFence {
        /// Who forgets it.
        by: Member,
        /// The removed node.
        fence: Fence,
    },
    /// A block is a node's; also one that is its own, and whose claim the store has lost.
    ClaimBlock(Claim),
    /// Blocks are nobody's any more.
    GiveBackBlocks {
        /// Whose they were.
        by: Member,
        /// The blocks, with the revisions of their claims.
        blocks: Vec<(Block, Revision)>,
    },
    /// A reserved address is held by a pod; also by one that uses it already, if the store has lost that.
    HandOverAddress(HandOver),
    /// A reserved address is held by nobody; its workload keeps it.
    LetGoAddress {
        /// Whose pod held it.
        by: Member,
        /// The address.
        let_go: LetGo,
    },
    /// A reserved address belongs to nobody any more.
    GiveUpAddress {
        /// The address.
        address: IpAddr,
        /// The revision of its reservation.
        revision: Revision,
    },
    /// There is a new pool. No pool, no node, no reservation and no claim inside of it may be newer than what was looked at.
    AddPool {
        /// The node that puts it back after the store has lost it; `None` if an operator adds it.
        by: Option<Member>,
        /// The pool.
        pool: Pool,
        /// The revision of all records that were looked at.
        as_of: Revision,
    },
    /// A pool is drained, or in use again.
    ReplacePool {
        /// What it is now.
        pool: Pool,
        /// The revision of its record.
        revision: Revision,
    },
    /// A pool is gone. No block of it may be claimed, and no reservation newer than what was looked at.
    RemovePool {
        /// Its name.
        name: PoolName,
        /// Its range.
        cidr: Cidr,
        /// The revision of its record.
        revision: Revision,
        /// The revision of all records that were looked at.
        as_of: Revision,
    },
    /// The cluster has these settings where it had none.
    MakeCluster {
        /// The settings.
        record: ClusterRecord,
        /// Its pools, where it had none; `None` where those that are there stay.
        pools: Option<Vec<Pool>>,
    },
    /// The cluster has other settings.
    ReplaceSettings {
        /// The settings.
        record: ClusterRecord,
        /// The revision of its record.
        revision: Revision,
    },
    /// Who has which of a node's addresses is said anew.
    PublishAddresses {
        /// The node.
        by: Member,
        /// What is said.
        say: Vec<(IpAddr, AddressRecord)>,
        /// What is said no more.
        withdraw: Vec<Name>,
    },
    /// Who has some addresses is said no more.
    WithdrawAddresses {
        /// Who may withdraw it.
        by: Speaker,
        /// Where it was said; with the revision where nothing else may be said there by now.
        records: Vec<(Name, Option<Revision>)>,
    },
    /// A node is alive, as long as somebody keeps this.
    SignOfLife(Sign),
    /// The sign of life of a node is put back, where somebody has deleted it.
    RestoreSignOfLife(Sign),
    /// Every node is to look at itself.
    AskInspection(InspectionRecord),
    /// No node is to look at itself any more.
    EndInspection {
        /// The revision of the wish.
        revision: Revision,
    },
    /// A node has looked at itself.
    AnswerInspection {
        /// The node.
        node: NodeName,
        /// What it has found.
        record: AnswerRecord,
        /// The revision of the wish: one that was answered too late leaves nothing behind.
        asked: Revision,
    },
    /// What nodes have answered is forgotten, while no answer is wished for.
    ForgetAnswers(Vec<Name>),
}

/// The node that makes a change. Once its record has changed or is gone, the change is none of its business any more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// Its name.
    pub node: NodeName,
    /// The revision of its record; 0 if it has none.
    pub revision: Revision,
}

/// That a node is alive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sign {
    /// The node.
    pub by: Member,
    /// In which life.
    pub alive: Alive,
}

/// Who may say which addresses a node has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Speaker {
    /// The node.
    Node(Member),
    /// Anybody, as long as there is no node of that name.
    Anybody(NodeName),
}

/// A node that was removed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fence {
    /// Its name.
    pub node: NodeName,
    /// Which of the nodes that had this name.
    pub incarnation: Incarnation,
    /// The revision of its fence.
    pub revision: Revision,
}

/// A word that the pods of a removed node are gone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Confirmation {
    /// Which of the nodes that had its name.
    pub incarnation: Incarnation,
    /// Its fence, with that word.
    pub record: FenceRecord,
    /// The revision of the fence without it.
    pub revision: Revision,
}

/// What is given back of a removed node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inheritance {
    /// Who gives it back.
    pub by: Member,
    /// The removed node.
    pub fence: Fence,
    /// Its blocks, with the revisions of their claims.
    pub blocks: Vec<(Block, Revision)>,
    /// The reserved addresses that its pods held.
    pub addresses: Vec<LetGo>,
}

/// A claim of a block. Nobody may have claimed anything inside of it, or around it in its pool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claim {
    /// Whose it is.
    pub by: Member,
    /// The block.
    pub block: Block,
    /// What will stand behind it.
    pub record: BlockRecord,
    /// The range of its pool.
    pub pool: Cidr,
    /// The revision of the pool's record.
    pub pool_revision: Revision,
}

/// A hand-over of a reserved address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HandOver {
    /// The node of the pod that gets it.
    pub by: Member,
    /// The address.
    pub address: IpAddr,
    /// What will stand behind it.
    pub record: ReservationRecord,
    /// The revision of its reservation; `None` where it has none.
    pub before: Option<Revision>,
    /// The pool that must be as it was, with its revision: that of an address which was nobody's.
    pub out_of: Option<(PoolName, Revision)>,
}

/// A reserved address that nobody holds any more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LetGo {
    /// The address.
    pub address: IpAddr,
    /// Its reservation, without the holder.
    pub record: ReservationRecord,
    /// The revision of the reservation with him.
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

/// What it is about, for people: not what it rests on.
impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::RegisterNode { node, .. } => write!(f, "register node {node}"),
            Self::TakeOverNode { node, .. } => write!(f, "take over node {node}"),
            Self::RemoveNode { fence, .. } => write!(f, "remove node {}", fence.node),
            Self::VouchForNode(words) => {
                let nodes = words.iter().map(|word| (&word.record.node, &word.incarnation));
                list(
                    f,
                    "mark pods as gone (--dead): node",
                    nodes.map(|(node, incarnation)| format!("{node} {incarnation}")),
                )
            }
            Self::ConfirmRemoval(Confirmation { record, .. }) => {
                write!(f, "confirm the removal of node {}", record.node)
            }
            Self::InheritFrom(what) => {
                write!(f, "release the blocks and reservations of removed node {}", what.fence.node)
            }
            Self::ForgetFence { fence, .. } => write!(f, "delete the fence of node {}", fence.node),
            Self::ClaimBlock(claim) => write!(f, "claim block {}", claim.block),
            Self::GiveBackBlocks { blocks, .. } => {
                list(f, "release block", blocks.iter().map(|(block, _)| block))
            }
            Self::HandOverAddress(what) => write!(f, "hand over {}", what.address),
            Self::LetGoAddress { let_go, .. } => write!(f, "clear the holder of {}", let_go.address),
            Self::GiveUpAddress { address, .. } => write!(f, "delete the reservation of {address}"),
            Self::AddPool { pool, .. } => write!(f, "add pool {}", pool.name),
            Self::ReplacePool { pool, .. } => write!(f, "change pool {}", pool.name),
            Self::RemovePool { name, .. } => write!(f, "remove pool {name}"),
            Self::MakeCluster { record, .. } => write!(f, "create cluster {}", record.id),
            Self::ReplaceSettings { record, .. } => write!(f, "change the settings of cluster {}", record.id),
            Self::PublishAddresses { by, .. } => write!(f, "publish the addresses of node {}", by.node),
            Self::WithdrawAddresses { records, .. } => {
                list(f, "withdraw", records.iter().map(|(name, _)| name))
            }
            Self::SignOfLife(Sign { by, .. }) => write!(f, "write the sign of life of node {}", by.node),
            Self::RestoreSignOfLife(Sign { by, .. }) => {
                write!(f, "restore the sign of life of node {}", by.node)
            }
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
