//! Requests of operators to an agent. A change of the cluster's records is decided on the current records of the
//! datastore, and decided again if others changed the same records or the outcome of an attempt is unknown.
//!
//! An answer is final: a change reported as done was made, and a change reported as not done will never be made. If the
//! outcome is unknown, the answer reports that.

mod adoption;
mod disconnect;
mod pools;
mod release;
mod removal;

use std::sync::Arc;
use std::time::Duration;

use polder_api::Attachment;
use polder_api::message::{RefusalKind, Refuse};

use super::{ATTEMPTS, PodHost};
use crate::Revision;
use crate::cause::HostError;
use crate::store::StoreError;
use crate::store::position::Interruption;
use crate::view::{View, ViewSource};

pub use self::adoption::{Adoption, adopt};
pub use self::disconnect::allow_removal;
pub use self::pools::{change_pools, change_settings, parse_pool};
pub use self::release::release;
pub use self::removal::{DepartedNotRemoved, remove_departed, remove_node, standings};

/// What the agent that answers the request knows of the cluster.
pub trait Knowledge {
    /// The name of the datastore, for messages.
    fn store_name(&self) -> String;

    /// The current view of the cluster.
    fn current_view(&self) -> Arc<View>;

    /// Waits until the view is not `known` any more, at most for `max_wait`.
    fn view_changed_from(&self, known: &Arc<View>, max_wait: Duration) -> impl Future<Output = ()>;

    /// Waits until the view shows `revision`, at most for `max_wait`. `None` after that.
    fn view_at(&self, revision: Revision, max_wait: Duration) -> impl Future<Output = Option<Arc<View>>>;
}

/// The environment of requests that concern the node of the answering agent.
pub trait OperatorHost: PodHost + Knowledge {
    /// Whether the attachment has an interface on this node.
    fn has_interface(&self, attachment: &Attachment) -> impl Future<Output = Result<bool, HostError>>;
}

/// Another attempt is offered only for an error that may end without an operator.
impl Refuse for StoreError {
    fn kind(&self) -> RefusalKind {
        if self.is_lasting() { RefusalKind::Failed } else { RefusalKind::TryAgain }
    }
}

/// The agent's view is not up to date with the datastore, so no decision is based on it.
#[derive(Debug, thiserror::Error)]
enum NotCurrent {
    /// The watch of the datastore is interrupted, for the reason in the text.
    /// Remedy: correct that reason, see polderctl status; then repeat the command.
    #[error("{store}: {reason}")]
    Lost {
        /// The name of the datastore.
        store: String,
        /// The reason.
        reason: Interruption,
    },
    /// The agent has no records from the datastore yet.
    /// Remedy: repeat the command; if it persists, see polderctl status.
    #[error("{0}: it has not been read yet")]
    Unread(String),
}

impl Refuse for NotCurrent {
    fn kind(&self) -> RefusalKind {
        RefusalKind::TryAgain
    }
}

/// The view of the agent, if it is up to date with the datastore.
fn current(agent: &impl Knowledge) -> Result<Arc<View>, NotCurrent> {
    let view = agent.current_view();
    match &view.lost {
        Some(reason) => Err(NotCurrent::Lost { store: agent.store_name(), reason: reason.clone() }),
        None if view.source != ViewSource::Store => Err(NotCurrent::Unread(agent.store_name())),
        None => Ok(view),
    }
}
