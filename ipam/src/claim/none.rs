//! Why there is no block: none is left, or none can be claimed now.

use polder_api::PoolName;

use crate::Block;
use crate::cause::HostError;
use crate::ledger::LedgerError;
use crate::shortage::{AllClaimed, NoPool};
use crate::store::StoreError;
use crate::view::{Source, View};

/// Why there is nothing to try.
#[derive(Debug, Clone, PartialEq, Eq, Hash, thiserror::Error)]
pub enum NoClaim {
    /// All blocks are claimed, or there is no pool to claim from.
    #[error(transparent)]
    Exhausted(#[from] Exhausted),
    /// Nothing can be claimed now.
    #[error("no block can be claimed: {0}")]
    Unavailable(#[source] Unavailable),
}

impl<E: Into<Unavailable>> From<E> for NoClaim {
    fn from(error: E) -> Self {
        Self::Unavailable(error.into())
    }
}

/// There is no block that the node could claim.
#[derive(Debug, Clone, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Exhausted {
    /// What it asked for is claimed, in each pool that is open to it.
    #[error("{}", joined(.0))]
    Taken(Vec<Taken>),
    /// No pool is open to it.
    #[error("{0}")]
    NoPool(NoPool),
    /// It has claimed one of which every address is a gateway's, or is never handed out.
    #[error(
        "block {block} of pool {pool} is claimed and has no address for a pod: add a pool with larger blocks"
    )]
    Useless {
        /// The block.
        block: Block,
        /// Its pool.
        pool: PoolName,
    },
}

/// What is claimed in a pool.
#[derive(Debug, Clone, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Taken {
    /// The one block that is wanted.
    #[error("block {0} is claimed")]
    Block(Block),
    /// All of them.
    #[error("{0}")]
    Pool(AllClaimed),
}

fn joined(taken: &[Taken]) -> String {
    let all: Vec<String> = taken.iter().map(ToString::to_string).collect();
    all.join("; ")
}

/// Why nothing that takes the store can be had now: another attempt may help.
#[derive(Debug, Clone, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Unavailable {
    /// The store does not know the node.
    #[error("the node is not registered")]
    Unregistered,
    /// The store knows it as it was, or as somebody else.
    #[error("the node is registered as another machine, or in another boot")]
    OtherLife,
    /// Nothing is heard from the store, for that reason.
    #[error("{0}")]
    Silent(String),
    /// The store was not heard yet.
    #[error("the store is away")]
    Away,
    /// What is missing in the store may only not be there yet.
    #[error("the store has lost records, and their owners are putting them back")]
    Caution,
    /// The store does not do it.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The ledger cannot be read or written.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// The node does not do its part.
    #[error(transparent)]
    Host(#[from] HostError),
    /// Others were faster, every time.
    #[error("{0} attempts were lost to other nodes")]
    Overtaken(usize),
    /// Nobody does it any more.
    #[error("the agent is stopping")]
    Stopping,
    /// There was no answer in time.
    #[error("the store is too slow")]
    TooSlow,
}

impl Unavailable {
    /// What keeps the store away, if anything does.
    pub fn away(view: &View) -> Option<Self> {
        match &view.lost {
            Some(reason) => Some(Self::Silent(reason.clone())),
            None if view.source != Source::Store => Some(Self::Away),
            None => None,
        }
    }
}
