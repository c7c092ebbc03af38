//! The cluster as a model that can be explored completely: every order of events for a few machines, a few blocks and
//! a few pods.
//!
//! The decisions and their execution are production code: the tasks of [`polder_ipam::tasks`]. Each can stop wherever
//! it waits for something outside ([`task`]): there an agent can crash, a reply can be lost, or another machine can
//! be faster. Below the tasks are [`crate::etcd`], clocks that advance only when time passes, and a kernel that
//! records the addresses of each pod.

mod action;
mod choices;
mod cluster;
mod explore;
mod flaw;
mod host;
mod limits;
mod machine;
mod pods;
mod projection;
mod properties;
mod registrar;
mod run;
mod spaces;
mod start;
mod tally;
mod task;
mod transition;
mod watcher;

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use polder_ipam::allocator::DEFAULT_COOL_DOWN;
use polder_ipam::change::Change;
use polder_ipam::key::Key;
use polder_ipam::ledger::memory::Memory;
use polder_ipam::ledger::{MemberState, NodeIdentity};
use polder_ipam::membership::Proof;
use polder_ipam::node::NodeIpam;
use polder_ipam::record::{FenceRecord, PodsGone};
use polder_ipam::store::{Compare, Txn};
use polder_ipam::tasks::OwnNode;
use polder_ipam::transaction::transaction;
use polder_ipam::view::View;
use stateright::{Model, Property};

pub use action::{Action, Fate, TaskKind};
pub use cluster::{Cluster, RemovedPods, Violation};
pub use explore::{Counterexamples, Report};
pub use flaw::Flaw;
pub use limits::Limits;
pub use machine::{Container, Machine, MachineIndex, Power};
pub use start::Start;
pub use tally::{OCCURRENCES, Occurrence, Tally};
pub use task::{Answer, Job, Part, Sent, Stopped, TaskResult, Wait};

use transition::Transition;

/// The address reserved for [`OWNER`].
pub const RESERVED: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 1, 0, 1));

/// The workload that owns the reserved address, as namespace/name.
pub const OWNER: &str = "default/db";

/// A state space: the start, how often each event may occur, and a deliberate defect, if any.
#[derive(Debug, Clone)]
pub struct Space {
    /// Name in reports.
    pub name: &'static str,
    /// The initial state.
    pub start: Start,
    /// How often each event may occur.
    pub limits: Limits,
    /// The deliberate defect, if any.
    pub flaw: Option<Flaw>,
    /// Number of occurrences of each event.
    pub tally: Arc<Tally>,
}

impl Space {
    /// A space without a defect.
    pub fn new(name: &'static str, start: Start, limits: Limits) -> Self {
        Self { name, start, limits, flaw: None, tally: Arc::default() }
    }

    /// The same space with a deliberate defect.
    #[must_use]
    pub fn with(self, flaw: Flaw) -> Self {
        Self { flaw: Some(flaw), tally: Arc::default(), ..self }
    }

    /// The identity of the node on a machine.
    fn me(&self, machine: &Machine) -> OwnNode {
        OwnNode {
            name: machine.name.clone(),
            machine_id: machine.machine_id(),
            boot_id: machine.boot_id(),
            proof: if self.flaw == Some(Flaw::AcceptsCopies) { Proof::Ledger } else { Proof::Machine },
            bootstrap: None,
            cooldown: DEFAULT_COOL_DOWN,
        }
    }

    /// The view that a task uses, modified by the defect.
    fn apply_flaw_to_view(&self, view: &Arc<View>, job: &Job) -> Arc<View> {
        let mut view = Arc::clone(view);
        match self.flaw {
            Some(Flaw::IgnoresFences) => Arc::make_mut(&mut view).fences.clear(),
            Some(Flaw::NeedsNoConfirmation) => {
                for known in Arc::make_mut(&mut view).fences.values_mut() {
                    Arc::make_mut(&mut known.record).pods = PodsGone::ConfirmedByOperator;
                }
            }
            Some(Flaw::NeedsNoProof) if matches!(job, Job::HandOver(..)) => {
                for known in Arc::make_mut(&mut view).reservations.values_mut() {
                    Arc::make_mut(&mut known.record).holder = None;
                }
            }
            _ => {}
        }
        view
    }

    /// The modified ledger that a task uses; `None` if it uses the machine's own.
    fn apply_flaw_to_ledger(&self, machine: &Machine, job: &Job) -> Option<NodeIpam<Memory>> {
        let identity = machine.identity().filter(|identity| identity.member_state == MemberState::Removed)?;
        if self.flaw != Some(Flaw::ConfirmsFirst) || !matches!(job, Job::Decide) {
            return None;
        }
        let (mut bare, _) = NodeIpam::with(Memory::default(), &machine.boot_id(), DEFAULT_COOL_DOWN).ok()?;
        bare.identify(&identity).ok()?;
        Some(bare)
    }

    /// The identity that a machine without a ledger wrongly assumes because of the defect.
    fn mistaken_identity(&self, machine: &Machine) -> Option<NodeIdentity> {
        if self.flaw != Some(Flaw::MatchesFencesByBoot) || machine.identity().is_some() {
            return None;
        }
        let view = &machine.agent.watcher.view;
        let is_it = |fence: &FenceRecord| {
            let FenceRecord { node, boot_id, pods, .. } = fence;
            *node == machine.name && *boot_id == machine.boot_id() && *pods == PodsGone::Unknown
        };
        let (incarnation, _) = view.fences.iter().find(|(_, fence)| is_it(&fence.record))?;
        let (incarnation, cluster) = (incarnation.clone(), view.cluster.as_ref()?.record.id.clone());
        Some(NodeIdentity {
            node: machine.name.clone(),
            incarnation,
            cluster,
            member_state: MemberState::Removed,
        })
    }

    /// The transaction that a node sends for a change, modified by the defect.
    fn transaction(&self, change: &Change) -> Txn {
        let mut txn = transaction(change);
        let of = |compare: &Compare, is_it: fn(&Key) -> bool| matches!(compare, Compare::Unchanged { key, .. } if key.parse().is_ok_and(|key| is_it(&key)));
        txn.compares.retain(|compare| match self.flaw {
            Some(Flaw::ForgetsNodeRecord)
                if !matches!(change, Change::RegisterNode { .. } | Change::TakeOverNode { .. }) =>
            {
                !of(compare, |key| matches!(key, Key::Node(_)))
            }
            Some(Flaw::IgnoresFences) => !of(compare, |key| matches!(key, Key::Fence(..))),
            Some(Flaw::ForgetsBlocks) => !matches!(compare, Compare::Empty(_)),
            _ => true,
        });
        txn
    }
}

impl Model for Space {
    type State = Cluster;
    type Action = Action;

    fn init_states(&self) -> Vec<Cluster> {
        vec![start::cluster(self)]
    }

    fn actions(&self, cluster: &Cluster, actions: &mut Vec<Action>) {
        // States after a violation are not explored: they prove nothing.
        if cluster.violation.is_none() {
            choices::choices(cluster, actions);
        }
    }

    fn next_state(&self, cluster: &Cluster, action: Action) -> Option<Cluster> {
        let mut transition = Transition { space: self, cluster: cluster.clone() };
        transition.apply(&action).then_some(transition.cluster)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        properties::all()
    }

    fn format_action(&self, action: &Action) -> String {
        action.to_string()
    }
}
