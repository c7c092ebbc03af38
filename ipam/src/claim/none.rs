//! Reasons why no block is claimed: none is left, or none can be claimed now.

use polder_api::PoolName;

use crate::Block;
use crate::capacity::{AllClaimed, NoPool};
use crate::cause::HostError;
use crate::ledger::LedgerError;
use crate::store::StoreError;
use crate::store::position::Interruption;
use crate::view::{View, ViewSource};

/// Reason why no block is claimed.
#[derive(Debug, Clone, PartialEq, Eq, Hash, thiserror::Error)]
pub enum NoClaim {
    /// All blocks are claimed, or there is no pool to claim from.
    #[error(transparent)]
    Exhausted(#[from] Exhausted),
    /// No block can be claimed now.
    /// Remedy: correct the cause in the text if it persists; the agent retries.
    #[error("no block can be claimed: {0}")]
    Unavailable(#[source] Unavailable),
}

impl<E: Into<Unavailable>> From<E> for NoClaim {
    fn from(error: E) -> Self {
        Self::Unavailable(error.into())
    }
}

/// No block is left for the node.
#[derive(Debug, Clone, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Exhausted {
    /// The wanted blocks are claimed, in each pool that is open to the node.
    /// Remedy: add a pool with polderctl pool add, or remove nodes that are permanently gone with polderctl node
    /// remove.
    #[error("{}", joined(.0))]
    Taken(Vec<AlreadyClaimed>),
    /// No pool is open to the node.
    #[error(transparent)]
    NoPool(NoPool),
    /// The claimed block has only gateway and excluded addresses.
    #[error(
        "block {block} of pool {pool}, claimed by this node, has no address for pods: add a pool with larger \
         blocks"
    )]
    Useless {
        /// The claimed block.
        block: Block,
        /// Its pool.
        pool: PoolName,
    },
}

/// Claimed blocks of a pool.
#[derive(Debug, Clone, PartialEq, Eq, Hash, thiserror::Error)]
pub enum AlreadyClaimed {
    /// The requested block.
    /// Remedy: see its owner with polderctl ipam show block CIDR.
    #[error("block {0} is already claimed")]
    Block(Block),
    /// All blocks of the pool.
    #[error(transparent)]
    Pool(AllClaimed),
}

fn joined(taken: &[AlreadyClaimed]) -> String {
    let all: Vec<String> = taken.iter().map(ToString::to_string).collect();
    all.join("; ")
}

/// Why an operation on the datastore is not possible now; a retry may succeed.
#[derive(Debug, Clone, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Unavailable {
    /// The node is not registered.
    #[error("this node is not registered: see polderctl status")]
    Unregistered,
    /// The registration is of another boot or machine.
    #[error("this node is registered with another machine id or boot id: see polderctl status")]
    OtherBoot,
    /// The datastore is unreachable, with the reason.
    #[error(transparent)]
    Unreachable(Interruption),
    /// The datastore was not reached yet.
    #[error("the datastore was not reached since the agent started: check etcd, and [etcd] in agent.toml")]
    NotReached,
    /// Records were lost; their owners may still restore them.
    /// Remedy: none, it is temporary; find out who restored or emptied etcd.
    #[error(
        "the datastore lost records: this node claims no block for 60 s, while all nodes restore their records"
    )]
    HoldOff,
    /// Error of the datastore.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The ledger cannot be read or written.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// Error of the node.
    #[error(transparent)]
    Host(#[from] HostError),
    /// Other nodes were faster in all attempts, with their number.
    /// Remedy: none, it is retried; if it persists, add a pool with polderctl pool add.
    #[error("other nodes were faster in {0} attempts")]
    Overtaken(usize),
    /// The agent is stopping.
    /// Remedy: none, the next agent serves the request.
    #[error("the agent is stopping")]
    Stopping,
    /// No reply in time.
    /// Remedy: check the load and the disk latency of etcd.
    #[error("the datastore is too slow")]
    TooSlow,
}

impl Unavailable {
    /// The reason, if the datastore is unreachable.
    pub fn if_unreachable(view: &View) -> Option<Self> {
        match &view.lost {
            Some(reason) => Some(Self::Unreachable(reason.clone())),
            None if view.source != ViewSource::Store => Some(Self::NotReached),
            None => None,
        }
    }
}
