//! The cluster as a model that can be explored completely: every order in which things can happen to a few machines, a
//! few blocks and a few pods.
//!
//! What decides and what carries it out is what ships: the tasks of [`polder_ipam::tasks`]. Each can stop wherever it waits
//! for the outside ([`task`]): there an agent can die, a reply be lost, or another machine be faster. What is below that is
//! [`crate::etcd`], clocks that stand still until time passes, and a kernel that knows which pod has which address.

mod action;
mod choices;
mod cluster;
mod explore;
mod flaw;
mod host;
mod limits;
mod machine;
mod play;
mod pods;
mod projection;
mod properties;
mod registrar;
mod run;
mod spaces;
mod start;
mod tally;
mod task;
mod watcher;

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use polder_ipam::allocator::USUAL_REST;
use polder_ipam::change::Change;
use polder_ipam::key::Key;
use polder_ipam::ledger::memory::Memory;
use polder_ipam::ledger::{Identity, Standing};
use polder_ipam::node::NodeIpam;
use polder_ipam::pool::Labels;
use polder_ipam::record::{FenceRecord, PodsGone};
use polder_ipam::steward::Proof;
use polder_ipam::store::{Compare, Txn};
use polder_ipam::tasks::Me;
use polder_ipam::transaction::transaction;
use polder_ipam::view::View;
use stateright::{Model, Property};

pub use action::{Action, Fate, Whose};
pub use cluster::{Broken, Cluster, Remains};
pub use explore::{Report, Ways};
pub use flaw::Flaw;
pub use limits::Limits;
pub use machine::{Container, Machine, Power, Who};
pub use start::Start;
pub use tally::{HAPPENINGS, Happening, Tally};
pub use task::{Answer, Ended, Job, Part, Sent, Stopped, Wait};

use play::Play;

/// The address that belongs to a workload by name.
pub const RESERVED: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 1, 0, 1));

/// The workload.
pub const OWNER: &str = "default/db";

/// What is explored: where it begins, what may happen how often, and what is wrong on purpose.
#[derive(Debug, Clone)]
pub struct Space {
    /// What it is called.
    pub name: &'static str,
    /// Where it begins.
    pub start: Start,
    /// How often each thing may happen.
    pub limits: Limits,
    /// What is wrong on purpose.
    pub flaw: Option<Flaw>,
    /// What has happened.
    pub tally: Arc<Tally>,
}

impl Space {
    /// A space in which nothing is wrong.
    pub fn new(name: &'static str, start: Start, limits: Limits) -> Self {
        Self { name, start, limits, flaw: None, tally: Arc::default() }
    }

    /// The same space with something wrong.
    #[must_use]
    pub fn with(self, flaw: Flaw) -> Self {
        Self { flaw: Some(flaw), tally: Arc::default(), ..self }
    }

    /// Who the node on a machine is.
    fn me(&self, machine: &Machine) -> Me {
        Me {
            name: machine.name.clone(),
            machine_id: machine.machine_id(),
            boot_id: machine.boot_id(),
            proof: if self.flaw == Some(Flaw::BelievesCopies) { Proof::Ledger } else { Proof::Machine },
            labels: Labels::new(),
            bootstrap: None,
            cooldown: USUAL_REST,
        }
    }

    /// The view that a task goes by.
    fn bend(&self, view: &Arc<View>, job: &Job) -> Arc<View> {
        let mut view = Arc::clone(view);
        match self.flaw {
            Some(Flaw::IgnoresFences) => Arc::make_mut(&mut view).fences.clear(),
            Some(Flaw::NeedsNoConfirmation) => {
                for known in Arc::make_mut(&mut view).fences.values_mut() {
                    Arc::make_mut(&mut known.record).pods = PodsGone::Vouched;
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

    /// The ledger that a task goes by, if it is another one.
    fn bend_ledger(&self, machine: &Machine, job: &Job) -> Option<NodeIpam<Memory>> {
        let identity = machine.identity().filter(|identity| identity.standing == Standing::Removed)?;
        if self.flaw != Some(Flaw::ConfirmsFirst) || !matches!(job, Job::Decide) {
            return None;
        }
        let (mut bare, _) = NodeIpam::with(Memory::default(), &machine.boot_id(), USUAL_REST).ok()?;
        bare.identify(&identity).ok()?;
        Some(bare)
    }

    /// Who a machine without a ledger takes itself for.
    fn mistake(&self, machine: &Machine) -> Option<Identity> {
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
        Some(Identity { node: machine.name.clone(), incarnation, cluster, standing: Standing::Removed })
    }

    /// The transaction that a node sends for a change.
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
        // What comes after something is broken proves nothing.
        if cluster.broken.is_none() {
            choices::choices(cluster, actions);
        }
    }

    fn next_state(&self, cluster: &Cluster, action: Action) -> Option<Cluster> {
        let mut play = Play { space: self, cluster: cluster.clone() };
        play.act(&action).then_some(play.cluster)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        properties::all()
    }

    fn format_action(&self, action: &Action) -> String {
        action.to_string()
    }
}
