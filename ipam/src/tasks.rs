//! The tasks that carry out what is decided about a node's addresses, over whatever a node is: an agent with etcd, a ledger in
//! SQLite and a kernel, or a node of a simulation. Both run the code of these modules.

mod allocation;
mod attach;
mod claims;
pub mod collect;
mod hand_over;
pub mod lease;
pub mod operator;
mod pods;
pub mod published;
pub mod publisher;
mod race;
pub mod records;
mod registrar;
pub mod sweeper;
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
use crate::attempt::{Answered, Attempt, Found};
use crate::bootstrap::{Bootstrap, Unsurveyed};
use crate::cause::HostError;
use crate::change::{Change, MOST_RECORDS};
use crate::ids::{BootId, MachineId};
use crate::ledger::Ledger;
use crate::node::NodeIpam;
use crate::pool::Labels;
use crate::record::{Alive, Life};
use crate::registration::{Holdings, Registration};
use crate::release::NotReleased;
use crate::steward::{NoPresence, Presence, Proof, Step};
use crate::store::StoreError;
use crate::view::View;

pub use self::attach::{Caller, add, lease};
pub use self::claims::could_claim;
pub use self::hand_over::{NotNow, Unreserved, Workload};
pub use self::pods::{CLAIM_PATIENCE, LastAdd, PodHost, Requests, ledger_failed, refuse};
pub use self::records::Records;
pub use self::registrar::{Decided, Registrar, RegistrarState};

/// Who the node is, as long as its agent runs.
#[derive(Debug, Clone)]
pub struct Me {
    /// Its name.
    pub name: NodeName,
    /// The machine.
    pub machine_id: MachineId,
    /// This boot of it.
    pub boot_id: BootId,
    /// What proves that this machine is the node of its ledger.
    pub proof: Proof,
    /// What pools may choose the node by.
    pub labels: Labels,
    /// What the cluster is to be, if it is not yet.
    pub bootstrap: Option<Bootstrap>,
    /// How long a freed address rests.
    pub cooldown: Duration,
}

impl Me {
    /// The machine and its boot, to be compared with records.
    pub fn life(&self) -> Life<'_> {
        Life { machine_id: &self.machine_id, boot_id: &self.boot_id }
    }
}

/// How long the own view of the records may be behind what was just written.
pub const CATCH_UP: Duration = Duration::from_secs(5);

/// What all tasks need of the outside, besides the cluster's records.
pub trait Host: Records {
    /// Where the node's addresses are written down.
    type Ledger: Ledger + 'static;

    /// Now, on the clock that goes on while the machine sleeps and that nobody sets.
    fn now(&self) -> Moment;

    /// The cluster as it is known now.
    fn view(&self) -> Arc<View>;

    /// What the registrar has said last.
    fn registration(&self) -> Registration;

    /// How many records one change may write.
    fn most_records(&self) -> usize {
        MOST_RECORDS
    }

    /// Does something with the node's addresses, which is written down when this returns.
    fn ledger<T: Send + 'static>(
        &self,
        job: impl FnOnce(&mut NodeIpam<Self::Ledger>, Moment) -> T + Send + 'static,
    ) -> impl Future<Output = T>;
}

/// What a task of its own has besides the node is as good a host as the node.
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

/// What became of a change that was sent to the store.
#[derive(Debug)]
enum Ended {
    /// It is made, at this revision or before it.
    Made(Revision),
    /// What it rests on has changed: nothing of it was made.
    Refused,
    /// There was no answer, and there is nothing of it; it may still be made.
    NotMade(StoreError),
    /// It was not made; or that is not known.
    Failed(StoreError),
}

/// Attempts at a change of records that others change at the same time, or whose outcome is not known.
const ATTEMPTS: usize = 10;

/// Has a change made. An outcome that is not known is looked up, and nothing is sent again.
async fn attempt(records: &impl Records, change: &Change) -> Ended {
    let doubt = match Attempt::new(change).answered(records.commit(change).await) {
        Answered::Made(revision) => return Ended::Made(revision),
        Answered::Refused => return Ended::Refused,
        Answered::Failed(error) => return Ended::Failed(error),
        Answered::InDoubt(doubt) => doubt,
    };
    let Ok(contents) = records.range(&doubt.range()).await else { return Ended::Failed(doubt.unread()) };
    match doubt.found(&contents) {
        Found::Made => Ended::Made(contents.revision),
        Found::NotMade(error) if error.is_unknown() => Ended::NotMade(error),
        Found::NotMade(error) => Ended::Failed(error),
    }
}

/// What the registrar needs besides.
pub trait RegistrarHost: Host {
    /// A name that nobody else has.
    fn fresh_name(&self) -> Result<String, HostError>;

    /// Waits until the view is another one than this, but not longer than that.
    fn changed(&self, view: &Arc<View>, patience: Duration) -> impl Future<Output = ()>;

    /// Waits until the view shows what was written at that revision. Fails when that takes longer than [`CATCH_UP`].
    fn caught_up(&self, revision: Revision) -> impl Future<Output = Result<(), StoreError>>;

    /// How this node is reached, or what that waits for.
    fn presence(&self, view: &View) -> Result<Presence, NoPresence>;

    /// Whether the view knows the addresses in use around this node; or what is waited for.
    fn surroundings(&self, view: &View) -> Result<(), Unsurveyed>;

    /// The machine that an operator says this one is in place of.
    fn adopted(&self) -> Option<Alive>;

    /// Tells the other tasks whether the store knows the node.
    fn register(&self, registration: Registration);

    /// Tells the other tasks what the node owns.
    fn announce(&self, holdings: Holdings);

    /// Takes an attachment of a removed node away, or the probe endpoint: [`teardown::cut_off`].
    fn cut_off(&self, attachment: &Attachment) -> impl Future<Output = Result<(), NotReleased>>;

    /// Whether a plugin still makes the attachment's interface although the agent has ended that answered its ADD.
    fn is_wired_from_before(&self, attachment: &Attachment) -> bool;

    /// Whether a plugin still makes any interface although the agent has ended that answered its ADD. The ledger may not name it
    /// any more.
    fn is_any_wired_from_before(&self) -> bool;

    /// Deletes the node's own addresses from the kernel.
    fn remove_gateways(&self) -> impl Future<Output = Result<(), HostError>>;

    /// Sees each step of the registrar, how often the store had lost records by then, and whether claims wait for that.
    fn observe(&self, _step: &Step, _losses: u64, _caution: bool) {}
}
