//! What an operator asks an agent for: what is to change in the cluster's records is decided on what the store has, and decided
//! anew as long as others change the same records, or nobody knows what became of an attempt.
//!
//! Each answer is true when it is given: what is said to be done has been done, and what is said not to be done never will be. Where
//! neither is known, the answer says so.

mod adoption;
mod disconnect;
mod pools;
mod release;
mod removal;

use std::sync::Arc;
use std::time::Duration;

use polder_api::Attachment;
use polder_api::message::{Refusal, RefusalKind};

use super::{ATTEMPTS, PodHost};
use crate::Revision;
use crate::cause::HostError;
use crate::store::StoreError;
use crate::view::{Source, View};

pub use self::adoption::{Adoption, adopt};
pub use self::disconnect::allow_removal;
pub use self::pools::{change_pools, change_settings, parse_pool};
pub use self::release::release;
pub use self::removal::{remove_node, standings};

/// What the agent that is asked knows of the cluster.
pub trait Knowledge {
    /// The store, for people.
    fn store_name(&self) -> String;

    /// The cluster as it is known now.
    fn known(&self) -> Arc<View>;

    /// Waits until something else is known than this, but not longer than that.
    fn known_otherwise(&self, known: &Arc<View>, patience: Duration) -> impl Future<Output = ()>;

    /// Waits until it is known what was written at that revision, but not longer than that. `None` if it is not by then.
    fn known_at(&self, revision: Revision, patience: Duration) -> impl Future<Output = Option<Arc<View>>>;
}

/// What some requests need besides of the node whose agent is asked.
pub trait OperatorHost: PodHost + Knowledge {
    /// Whether the attachment has an interface on this node.
    fn has_interface(&self, attachment: &Attachment) -> impl Future<Output = Result<bool, HostError>>;
}

/// The answer to a request that has failed so in the store: only what may be over by itself is worth another attempt.
pub fn store_failed(error: &StoreError, message: impl Into<String>) -> Refusal {
    let kind = if error.is_lasting() { RefusalKind::Failed } else { RefusalKind::TryAgain };
    Refusal::new(kind, message)
}

/// What the agent knows of the cluster, if it knows it as the store has it.
fn current(agent: &impl Knowledge) -> Result<Arc<View>, Refusal> {
    let view = agent.known();
    if view.source != Source::Store || view.lost.is_some() {
        let why = view.lost.as_deref().unwrap_or("it has not been read yet");
        return Err(Refusal::try_again(format!("{}: {why}", agent.store_name())));
    }
    Ok(view)
}

fn invalid(problem: impl ToString) -> Refusal {
    Refusal::new(RefusalKind::Invalid, problem.to_string())
}
