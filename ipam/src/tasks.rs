//! The tasks that carry out the decisions about a node's addresses. A node is an agent with etcd, a SQLite ledger and a
//! kernel, or a node of a simulation. Both run this code.

mod allocation;
mod attach;
mod claims;
pub mod collect;
mod hand_over;
pub mod lease;
pub mod operator;
pub mod orphan_collector;
mod pods;
pub mod published;
pub mod publisher;
mod race;
pub mod records;
mod registrar;
pub mod teardown;
#[cfg(test)]
mod tests;
pub mod tombstones;

use std::ops::Deref;
use std::sync::Arc;
use std::time::Duration;

use polder_api::{Attachment, NodeName};

use crate::Moment;
use crate::Revision;
use crate::attempt::{Attempt, AttemptAnswer, ReadResult};
use crate::bootstrap::{AddressesUnknown, Bootstrap};
use crate::cause::HostError;
use crate::change::{Change, MOST_RECORDS};
use crate::ids::{BootId, MachineId};
use crate::ledger::Ledger;
use crate::membership::{NoPresence, NodePresence, Proof, Step};
use crate::node::NodeIpam;
use crate::pool::Labels;
use crate::record::{Boot, LeaseRecord};
use crate::registration::{Allocations, Registration};
use crate::release::NotReleased;
use crate::store::StoreError;
use crate::view::View;

pub use self::attach::{Added, Caller, NotPermitted, add, lease};
pub use self::claims::could_claim;
pub use self::hand_over::{NotHandedOver, ReservationRequest, RetryReason};
pub use self::pods::{CLAIM_TIMEOUT, LastAdd, LedgerUnusable, PodHost, Requests};
pub use self::records::RecordStore;
pub use self::registrar::{Decided, Registrar, RegistrarState};

/// The identity and settings of the node, constant while its agent runs.
#[derive(Debug, Clone)]
pub struct OwnNode {
    /// The name under which this agent registers.
    pub name: NodeName,
    /// The machine id, compared with the records of the datastore.
    pub machine_id: MachineId,
    /// The id of the current boot.
    pub boot_id: BootId,
    /// The proof that this machine is the node that its ledger names.
    pub proof: Proof,
    /// The first settings of the cluster, used only if it has none.
    pub bootstrap: Option<Bootstrap>,
    /// The cool-down of a released address or block.
    pub cooldown: Duration,
}

impl OwnNode {
    /// The machine id and the boot id, for comparison with records.
    pub fn boot(&self) -> Boot<'_> {
        Boot { machine_id: &self.machine_id, boot_id: &self.boot_id }
    }
}

/// The longest time that the own view may lag behind a record just written.
pub const CATCH_UP: Duration = Duration::from_secs(5);

/// The environment of all tasks, in addition to the cluster's records.
pub trait Host: RecordStore {
    /// The storage of the node's addresses.
    type Ledger: Ledger + 'static;

    /// The current time, on a clock that continues during suspend and that nobody can set.
    fn now(&self) -> Moment;

    /// The current view of the cluster.
    fn view(&self) -> Arc<View>;

    /// The last state that the registrar published.
    fn registration(&self) -> Registration;

    /// The current labels of the node, by which pools select nodes.
    fn labels(&self) -> Labels;

    /// The maximum number of records in one change.
    fn most_records(&self) -> usize {
        MOST_RECORDS
    }

    /// Runs `job` on the node's addresses. Its changes are stored when this returns.
    fn ledger<T: Send + 'static>(
        &self,
        job: impl FnOnce(&mut NodeIpam<Self::Ledger>, Moment) -> T + Send + 'static,
    ) -> impl Future<Output = T>;
}

/// A type that dereferences to a host is a host, too: a task can add its own parts to the node.
impl<T> Host for T
where
    T: Deref,
    T::Target: Host,
{
    type Ledger = <T::Target as Host>::Ledger;

    fn now(&self) -> Moment {
        (**self).now()
    }

    fn view(&self) -> Arc<View> {
        (**self).view()
    }

    fn registration(&self) -> Registration {
        (**self).registration()
    }

    fn labels(&self) -> Labels {
        (**self).labels()
    }

    fn most_records(&self) -> usize {
        (**self).most_records()
    }

    fn ledger<R: Send + 'static>(
        &self,
        job: impl FnOnce(&mut NodeIpam<Self::Ledger>, Moment) -> R + Send + 'static,
    ) -> impl Future<Output = R> {
        (**self).ledger(job)
    }
}

/// The outcome of a change that was sent to the datastore.
#[derive(Debug)]
enum AttemptResult {
    /// Made, at this revision or before it.
    Made(Revision),
    /// Not made: the records that it depends on have changed.
    Refused,
    /// No answer, and the datastore has no trace of the change; it may still be made.
    NotMade(StoreError),
    /// Not made, or unknown.
    Failed(StoreError),
}

/// Maximum attempts at a change, if others change the same records or the outcome is unknown.
const ATTEMPTS: usize = 10;

/// Sends a change once. If the outcome is unknown, reads the records to find it, without sending the change again.
async fn attempt(records: &impl RecordStore, change: &Change) -> AttemptResult {
    let doubt = match Attempt::new(change).answered(records.commit(change).await) {
        AttemptAnswer::Made(revision) => return AttemptResult::Made(revision),
        AttemptAnswer::Refused => return AttemptResult::Refused,
        AttemptAnswer::Failed(error) => return AttemptResult::Failed(error),
        AttemptAnswer::InDoubt(doubt) => doubt,
    };
    let Ok(contents) = records.range(&doubt.range()).await else {
        return AttemptResult::Failed(doubt.unread());
    };
    match doubt.found(&contents) {
        ReadResult::Made => AttemptResult::Made(contents.revision),
        ReadResult::NotMade(error) if error.is_unknown() => AttemptResult::NotMade(error),
        ReadResult::NotMade(error) => AttemptResult::Failed(error),
    }
}

/// The environment of the registrar, in addition to [`Host`].
pub trait RegistrarHost: Host {
    /// A new unique name.
    fn fresh_name(&self) -> Result<String, HostError>;

    /// Waits until the current view is not `view` any more, at most for `max_wait`.
    fn changed(&self, view: &Arc<View>, max_wait: Duration) -> impl Future<Output = ()>;

    /// Waits until the view shows the record written at `revision`. Fails after [`CATCH_UP`].
    fn wait_for_revision(&self, revision: Revision) -> impl Future<Output = Result<(), StoreError>>;

    /// How peers reach this node, or why that is not known yet.
    fn presence(&self, view: &View) -> Result<NodePresence, NoPresence>;

    /// Succeeds if the view contains the addresses in use around this node; otherwise returns what is missing.
    fn check_addresses_in_use(&self, view: &View) -> Result<(), AddressesUnknown>;

    /// The machine that this one replaces, as confirmed by an operator.
    fn adopted(&self) -> Option<LeaseRecord>;

    /// Publishes the registration state to the other tasks.
    fn register(&self, registration: Registration);

    /// Publishes the node's identity, blocks and gateway addresses to the other tasks.
    fn publish_allocations(&self, allocations: Allocations);

    /// Releases an attachment, or the probe endpoint, of a removed node: [`teardown::cut_off`].
    fn cut_off(&self, attachment: &Attachment) -> impl Future<Output = Result<(), NotReleased>>;

    /// Whether a plugin still creates the attachment's interface although the agent that answered its ADD has ended.
    fn is_wired_by_earlier_process(&self, attachment: &Attachment) -> bool;

    /// Whether a plugin still creates any interface although the agent that answered its ADD has ended. The ledger may
    /// not list its attachment any more.
    fn is_any_wired_by_earlier_process(&self) -> bool;

    /// Deletes the node's gateway addresses from the kernel.
    fn remove_gateways(&self) -> impl Future<Output = Result<(), HostError>>;

    /// Called with each step of the registrar, the number of record losses of the datastore known by then, and whether
    /// claims are delayed because of a loss. Does nothing by default.
    fn observe(&self, _step: &Step, _losses: u64, _caution: bool) {}
}
