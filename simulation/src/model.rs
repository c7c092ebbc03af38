//! The cluster as a model that can be explored completely: every order in which things can happen to a few machines, a
//! few blocks and a few pods.
//!
//! What decides is what runs in production: the steward, claims, hand-overs, removals, the ledger's rules and the
//! allocator of [`polder_ipam`]. What carries it out mirrors the agent, at the same places where an agent can die,
//! a reply be lost or another machine be faster. What is below that is [`crate::etcd`], clocks that stand still until time
//! passes, and a kernel that knows which pod has which address.

mod action;
mod choices;
mod cluster;
mod errands;
mod explore;
mod flaw;
mod limits;
mod machine;
mod play;
mod pods;
mod projection;
mod properties;
mod registrar;
mod spaces;
mod start;
mod tally;
mod watcher;

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::Duration;

use polder_api::NodeName;
use polder_ipam::Moment;
use polder_ipam::change::Change;
use polder_ipam::key::Key;
use polder_ipam::ledger::{Identity, Standing};
use polder_ipam::node::Own;
use polder_ipam::record::{FenceRecord, PodsGone};
use polder_ipam::removal::Quarantine;
use polder_ipam::steward::{Proof, Step};
use polder_ipam::store::{Compare, Txn};
use polder_ipam::transaction::transaction;
use polder_ipam::view::{Known, View};
use stateright::{Model, Property};

pub use action::{Action, Errands, Fate};
pub use cluster::{Broken, Cluster, Remains};
pub use explore::{Report, Ways};
pub use flaw::Flaw;
pub use limits::Limits;
pub use machine::{Container, Machine, Power, Service, Who};
pub use start::Start;
pub use tally::{HAPPENINGS, Happening, Tally};

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

    /// The view that a registrar goes by.
    fn bend(&self, view: &Arc<View>) -> Arc<View> {
        if self.flaw != Some(Flaw::IgnoresFences) {
            return Arc::clone(view);
        }
        let mut view = Arc::clone(view);
        Arc::make_mut(&mut view).fences.clear();
        view
    }

    /// The view that a hand-over goes by.
    fn bend_holders(&self, view: &Arc<View>) -> Arc<View> {
        let mut view = Arc::clone(view);
        if self.flaw == Some(Flaw::NeedsNoProof) {
            for known in Arc::make_mut(&mut view).reservations.values_mut() {
                Arc::make_mut(&mut known.record).holder = None;
            }
        }
        view
    }

    /// Lets a quarantine take in what is known.
    fn observe(&self, quarantine: &mut Quarantine, view: &View, now: Moment) {
        if self.flaw != Some(Flaw::NeedsNoConfirmation) {
            return quarantine.observe(view, now);
        }
        let mut bent = view.clone();
        for known in bent.fences.values_mut() {
            let record = FenceRecord { pods: PodsGone::Vouched, ..(*known.record).clone() };
            *known = Known { record: Arc::new(record), revision: known.revision };
        }
        quarantine.observe(&bent, now);
    }

    /// The quarantine that a steward goes by.
    fn judged(&self, quarantine: &Quarantine, view: &View) -> Quarantine {
        if self.flaw != Some(Flaw::NeedsNoRest) {
            return quarantine.clone();
        }
        let mut restless = Quarantine::new(Duration::ZERO);
        restless.observe(view, Moment::BOOT);
        restless
    }

    /// What proves that a machine is the node of its ledger.
    fn proof(&self) -> Proof {
        if self.flaw == Some(Flaw::BelievesCopies) { Proof::Ledger } else { Proof::Machine }
    }

    /// What a node does instead of what its steward says.
    fn bend_step(&self, own: &Own, view: &View, me: &NodeName, boot_id: &str) -> Option<Step> {
        if self.flaw != Some(Flaw::MatchesFencesByBoot) || own.identity.is_some() {
            return None;
        }
        let is_it = |fence: &FenceRecord| {
            fence.node == *me && fence.boot_id == boot_id && fence.pods == PodsGone::Unknown
        };
        let (incarnation, _) = view.fences.iter().find(|(_, fence)| is_it(&fence.record))?;
        let (cluster, standing) = (view.cluster.as_ref()?.record.id.clone(), Standing::Removed);
        Some(Step::Identify(Identity {
            node: me.clone(),
            incarnation: incarnation.clone(),
            cluster,
            standing,
        }))
    }

    /// What a node says that it has.
    fn bend_own(&self, own: Own) -> Own {
        let removed = |own: &Own| {
            let standing = own.identity.as_ref().map(|identity| identity.standing);
            standing == Some(Standing::Removed)
        };
        match self.flaw {
            Some(Flaw::ConfirmsFirst) if removed(&own) => Own { identity: own.identity, ..Own::default() },
            _ => own,
        }
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
