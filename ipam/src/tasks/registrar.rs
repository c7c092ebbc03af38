//! Carries out the decisions of the membership rules ([`crate::membership`]): keeps the node registered and its blocks
//! claimed, and creates the first settings of a cluster that has none.
//!
//! Each change depends on the records that led to it. A failed step is decided again when the records change, and after
//! a retry interval.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use polder_api::{Attachment, NodeName, PerFamily};
use tracing::{info, warn};

use super::{AttemptResult, NotReleased, OwnNode, RegistrarHost, attempt};
use crate::bootstrap::{Proposal, propose};
use crate::change::{Change, Claim, RemovedAllocations};
use crate::claim::NoClaim;
use crate::key::{Key, Range};
use crate::ledger::{LedgerError, MemberState, NodeIdentity, OwnedBlock};
use crate::membership::{self, ClaimOwner, Conflict, MembershipInputs, NameConflict, OwnerLease, Step};
use crate::moment::Moment;
use crate::node::NodeIpam;
use crate::pool::{BlockRequest, Pool};
use crate::publication;
use crate::registration::{
    Allocations, PendingReason, Registration, RemovalProgress, StepError, UnprovenReason,
};
use crate::removal::Quarantine;
use crate::store::{Outcome, StoreError};
use crate::view::{View, ViewSource};

/// Maximum steps in a row, before the other work of the registrar's task continues.
const STEPS: usize = 64;

/// How long no block is claimed after the datastore has lost records: their owners are restoring them.
pub(super) const LOSS_HOLD_OFF: Duration = Duration::from_secs(60);

/// The registrar of a node. Only one runs at a time: nothing else claims blocks for the node.
#[derive(Debug)]
pub struct Registrar<'a, H> {
    pub(super) host: &'a H,
    pub(super) me: &'a OwnNode,
    state: RegistrarState,
}

/// The state that a registrar keeps between steps.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct RegistrarState {
    /// The removed nodes whose blocks are in cool-down.
    quarantine: Quarantine,
    /// Number of record losses of the datastore noticed so far.
    losses: u64,
    /// When the last loss was noticed.
    lost_at: Option<Moment>,
    round: Round,
}

/// The state that is kept until a round of steps ends.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Round {
    /// Whether another machine, or another boot, is alive under this node's name.
    double: NameConflict,
    /// Whether this machine is proven to be the node.
    is_proven: bool,
    /// The families in which no block could be claimed, with the reason.
    unclaimable: PerFamily<Option<NoClaim>>,
}

/// The next step of a registrar, and the view it was decided on. The current view may be newer by the time of the step.
#[derive(Debug, Clone)]
pub struct Decided(Result<(Step, Arc<View>), StepError>);

impl Decided {
    /// The step; `None` if the decision failed.
    pub fn step(&self) -> Option<&Step> {
        self.0.as_ref().ok().map(|(step, _)| step)
    }
}

impl RegistrarState {
    /// The state of a registrar that has not run yet.
    pub fn new(me: &OwnNode) -> Self {
        Self { quarantine: Quarantine::new(me.cooldown), losses: 0, lost_at: None, round: Round::new() }
    }
}

impl Round {
    const fn new() -> Self {
        Self { double: NameConflict::Unchecked, is_proven: false, unclaimable: PerFamily::NONE }
    }
}

impl<'a, H: RegistrarHost> Registrar<'a, H> {
    /// A registrar that has not run yet.
    pub fn new(host: &'a H, me: &'a OwnNode) -> Self {
        Self::with(host, me, RegistrarState::new(me))
    }

    /// A registrar with the state of an earlier one.
    pub const fn with(host: &'a H, me: &'a OwnNode, state: RegistrarState) -> Self {
        Self { host, me, state }
    }

    /// The state, to continue with [`Self::with`].
    pub fn into_state(self) -> RegistrarState {
        self.state
    }

    /// Carries out all pending steps, and publishes the resulting registration state.
    pub async fn run_once(&mut self) {
        for _ in 0..STEPS {
            let decided = self.decide().await;
            if self.carry_out(decided).await {
                return;
            }
        }
        self.end(Registration::Waiting(PendingReason::More));
    }

    /// Whether claims are delayed because the datastore has lost records. A loss that the view shows counts even before
    /// the next step notices it.
    pub(super) fn delays_claims(&self, view: &View) -> bool {
        let RegistrarState { losses, lost_at, .. } = self.state;
        view.losses != losses || lost_at.is_some_and(|lost| self.host.now().since(lost) < LOSS_HOLD_OFF)
    }

    /// Decides the next step.
    pub async fn decide(&mut self) -> Decided {
        let decided = self.next_step().await;
        if let Ok((step, view)) = &decided {
            self.state.round.is_proven |= step.rests_on_identity();
            if self.state.round.is_proven && matches!(self.host.registration(), Registration::Unproven(_)) {
                // The remaining steps can take long with a slow datastore. The node may serve meanwhile.
                self.publish(Registration::Waiting(PendingReason::UnderWay));
            }
            self.host.observe(step, self.state.losses, self.delays_claims(view));
        }
        Decided(decided)
    }

    /// Carries out the last decision. True if that ended the round: the registration state is published.
    pub async fn carry_out(&mut self, Decided(decided): Decided) -> bool {
        let done = match decided {
            Ok((step, view)) => self.make_step(step, &view).await,
            Err(waiting) => Err(waiting),
        };
        match done {
            Ok(None) => return false,
            Ok(Some(registration)) => self.end(registration),
            Err(why) if self.state.round.is_proven => self.end(Registration::Waiting(why.into())),
            Err(why) => self.end(self.host.registration().after_failure(why)),
        }
        true
    }

    fn end(&mut self, registration: Registration) {
        self.state.round = Round::new();
        self.publish(registration);
    }

    /// Carries out a step. Returns the registration state if no step is left for now.
    async fn make_step(&mut self, step: Step, view: &View) -> Result<Option<Registration>, StepError> {
        Ok(Some(match step {
            Step::Settled => Registration::Registered,
            // Before any record is read, the node may belong to another machine.
            Step::Wait(reason) if view.source == ViewSource::Nowhere => Registration::Unproven(reason.into()),
            Step::Wait(reason) => Registration::Waiting(reason.into()),
            Step::Conflict(reason) => Registration::Conflict(self.with_owner_lease(reason, view).await),
            Step::Removed(reason) => {
                let registration = Registration::Removed(reason.into());
                self.publish(registration.clone());
                self.remove_gateways().await?;
                registration
            }
            Step::Claim(BlockRequest::Any(family, pool)) => {
                if let Err(error) = self.claim(BlockRequest::Any(family, pool)).await {
                    self.state.round.unclaimable[family] = Some(error);
                }
                return Ok(None);
            }
            step @ Step::Identify(_) => {
                let Err(why) = self.change(step).await else { return Ok(None) };
                Registration::Unproven(UnprovenReason::Unwritten(why))
            }
            Step::AskForDouble => {
                let Err(error) = self.look_for_double().await else { return Ok(None) };
                Registration::Unproven(UnprovenReason::Unasked { node: self.me.name.clone(), error })
            }
            step => {
                self.change(step).await?;
                return Ok(None);
            }
        }))
    }

    async fn next_step(&mut self) -> Result<(Step, Arc<View>), StepError> {
        let view = self.host.view();
        if view.losses != self.state.losses {
            self.state.losses = view.losses;
            self.state.lost_at = Some(self.host.now());
        }
        self.state.quarantine.observe(&view, self.host.now());
        let pools: Vec<Pool> = view.pools.values().map(|pool| (*pool.record).clone()).collect();
        let labels = self.host.labels();
        let known_labels = labels.clone();
        let mut own = self
            .host
            .ledger(move |ipam, now| {
                ipam.learn_pools(&pools, &known_labels).and_then(|()| ipam.allocations(now))
            })
            .await?;
        // Reserved addresses whose ADD was answered by an earlier agent and still runs: the ledger no longer lists
        // them.
        own.expected.extend(view.reservations.iter().filter_map(|(address, known)| {
            let holder = known.record.holder.as_ref()?;
            self.host.is_wired_by_earlier_process(&holder.attachment).then_some(*address)
        }));
        self.publish_allocations(own.identity.clone(), &own.blocks, &own.gateways);
        let step = membership::next(&MembershipInputs {
            me: &self.me.name,
            boot: self.me.boot(),
            proof: self.me.proof,
            adopted: self.host.adopted().as_ref(),
            labels: &labels,
            view: &view,
            allocations: &own,
            presence: &self.host.presence(&view),
            double: self.state.round.double.clone(),
            hold_off: self.delays_claims(&view),
            quarantine: &self.state.quarantine,
            unclaimable: &self.state.round.unclaimable,
            fresh: &self.host.fresh_name()?,
            now: self.host.now(),
        });
        Ok((step, view))
    }

    /// Carries out a step that changes records, the ledger or the kernel.
    async fn change(&mut self, step: Step) -> Result<(), StepError> {
        match step {
            Step::Bootstrap => self.bootstrap().await?,
            Step::Identify(identity) => {
                if identity.member_state == MemberState::Removed {
                    warn!(node = %identity.node, "this node was removed from the cluster");
                }
                self.host.ledger(move |ipam, _| ipam.identify(&identity)).await?;
            }
            Step::CutOff => {
                if !matches!(self.host.registration(), Registration::Removed(_)) {
                    self.publish(Registration::Removed(RemovalProgress::CuttingOff));
                }
                self.cut_off().await?;
            }
            Step::Commit(change) => {
                if matches!(*change, Change::ConfirmRemoval(_)) {
                    // Repeated, because a pass that began before the removal was known may have restored them.
                    self.remove_gateways().await?;
                }
                if matches!(*change, Change::TakeOverNode { .. }) {
                    warn!(
                        "replacing another machine: unused addresses go into cool-down, because its pods may \
                         have used them"
                    );
                    self.host.ledger(NodeIpam::cool_down_unused).await?;
                }
                self.commit_step(&change).await?;
            }
            Step::Own(owned) => {
                info!(block = %owned.block, "adopting a block that the datastore assigns to this node");
                self.adopt_block(owned).await?;
            }
            Step::Leave(blocks) => {
                let leave = move |ipam: &mut NodeIpam<H::Ledger>, now: Moment| {
                    blocks.into_iter().try_for_each(|block| {
                        if ipam.leave(block, now)? {
                            info!(%block, "releasing a block that is not needed");
                        }
                        Ok::<_, LedgerError>(())
                    })
                };
                self.host.ledger(leave).await?;
            }
            Step::Disown(blocks) => {
                self.host
                    .ledger(move |ipam, _| blocks.into_iter().try_for_each(|block| ipam.disown(block)))
                    .await?;
            }
            Step::TakeGateways => drop(self.host.ledger(NodeIpam::take_gateways).await?),
            Step::MoveGateway(old) => {
                info!(%old, "moving the gateway address of this node");
                self.host.ledger(move |ipam, now| ipam.move_gateway(old, now)).await?;
            }
            Step::DropGateway(gateway) => {
                info!(%gateway, "removing the gateway address of this node: the cluster has no pool of its \
                                 family");
                self.host.ledger(move |ipam, now| ipam.drop_gateway(gateway, now)).await?;
            }
            Step::Settled
            | Step::Wait(_)
            | Step::Conflict(_)
            | Step::Removed(_)
            | Step::AskForDouble
            | Step::Claim(_) => {}
        }
        Ok(())
    }

    async fn commit_step(&self, change: &Change) -> Result<(), StepError> {
        let revision = match attempt(self.host, change).await {
            AttemptResult::Made(revision) => revision,
            AttemptResult::Refused => return Err(StepError::Changed),
            AttemptResult::NotMade(error) | AttemptResult::Failed(error) => return Err(error.into()),
        };
        match change {
            Change::ReleaseRemoved(RemovedAllocations { fence, .. }) | Change::ForgetFence { fence, .. } => {
                info!(node = %fence.node, "released the blocks and reservations of a removed node");
                self.forget_addresses(&fence.node).await?;
            }
            // The membership rules add pools, claim blocks and hand addresses over only to restore lost records.
            Change::AddPool { pool, .. } => {
                warn!(name = %pool.name, "restored a pool in use on this node that was missing in the \
                                          datastore");
            }
            Change::ClaimBlock(Claim { block, .. }) => {
                warn!(%block, "restored the claim of a block in use on this node that was missing in the \
                               datastore");
            }
            Change::HandOverAddress(again) => {
                let address = again.address;
                warn!(%address, "restored the reservation of an address in use on this node that was missing \
                                 in the datastore");
            }
            Change::ConfirmRemoval(_) => info!("confirmed that the pods of this node are gone"),
            _ => info!(%change, "record written"),
        }
        Ok(self.host.wait_for_revision(revision).await?)
    }

    /// Adds to a conflict about a block whether the agent of the other node is alive. For some time after the datastore
    /// has lost records, that is not known: a restored etcd has the leases of its backup.
    async fn with_owner_lease(&self, mut conflict: Box<Conflict>, view: &View) -> Box<Conflict> {
        if let Conflict::Block { by, owner: ClaimOwner::Member(lease), .. } = &mut *conflict
            && !self.delays_claims(view)
        {
            let found = self.host.range(&Range::single(Key::Lease(by.clone()).to_string())).await;
            *lease = match found {
                Ok(found) if found.entries.is_empty() => OwnerLease::Missing,
                Ok(_) => OwnerLease::Held,
                Err(_) => OwnerLease::Unknown,
            };
        }
        conflict
    }

    /// Checks whether another machine, or another boot of this one, holds the lease of this node's name. Until that is
    /// known, this node must not serve.
    async fn look_for_double(&mut self) -> Result<(), StoreError> {
        let node = &self.me.name;
        if !matches!(self.host.registration(), Registration::Conflict(_) | Registration::Removed(_)) {
            self.publish(Registration::Unproven(UnprovenReason::Asking(node.clone())));
        }
        let found = self.host.range(&Range::single(Key::Lease(node.clone()).to_string())).await?;
        self.state.round.double = NameConflict::read(found.entries.first(), self.me.boot());
        Ok(())
    }

    /// Releases all attachments of this node, and deletes its blocks and addresses from the ledger.
    async fn cut_off(&self) -> Result<(), StepError> {
        let all = |ipam: &mut NodeIpam<H::Ledger>, _| -> Vec<Attachment> {
            let held = ipam.attachments().chain(ipam.probe()).map(|held| &held.attachment);
            // Includes attachments released before their ADD ended: no pass deletes an interface that their plugin
            // still creates.
            held.chain(ipam.deleted_meanwhile()).cloned().collect()
        };
        let mut problem = None;
        for attachment in self.host.ledger(all).await {
            warn!(%attachment, "disconnecting it: this node was removed");
            // Any failure prevents the confirmation that the pods are gone. The other attachments are still
            // disconnected.
            if let Err(why) = self.host.cut_off(&attachment).await {
                problem.get_or_insert(why);
            }
        }
        self.remove_gateways().await?;
        if self.host.is_any_wired_by_earlier_process() {
            problem.get_or_insert(NotReleased::EarlierAdd);
        }
        if let Some(why) = problem {
            return Err(why.into());
        }
        let identity = self.host.ledger(|ipam, _| ipam.identity()).await?;
        // Fails if an ADD that was admitted before the removal has allocated addresses meanwhile.
        self.host.ledger(|ipam, _| ipam.forget_all()).await?;
        let node = identity.map_or_else(|| self.me.name.clone(), |identity| identity.node);
        self.forget_addresses(&node).await
    }

    /// Deletes the gateway addresses from the kernel. Otherwise an agent that starts without this ledger would treat
    /// them as its own. No pass deletes them: passes do not read the kernel of a removed node.
    async fn remove_gateways(&self) -> Result<(), StepError> {
        Ok(self.host.remove_gateways().await?)
    }

    async fn forget_addresses(&self, node: &NodeName) -> Result<(), StepError> {
        let published = self.host.range(&Key::addresses_of(node)).await?;
        for change in publication::forget(node, &published, self.host.most_records()) {
            self.host.commit(&change).await?;
        }
        Ok(())
    }

    /// Writes the settings of a cluster that has none.
    async fn bootstrap(&self) -> Result<(), StepError> {
        let view = self.host.view();
        let identity = self.host.ledger(|ipam, _| ipam.identity()).await?;
        let fresh = self.host.fresh_name()?;
        let addresses_in_use = self.host.check_addresses_in_use(&view);
        let bootstrap = self.me.bootstrap.as_ref();
        let Proposal { record, is_restored, pools } =
            propose(&view, identity.as_ref(), bootstrap, addresses_in_use, fresh)?;
        let id = record.id.clone();
        if is_restored {
            warn!(%id, "the datastore lost the cluster settings: restoring them");
        }
        let Outcome::Applied { revision } = self.host.commit(&Change::MakeCluster { record, pools }).await?
        else {
            return Err(StepError::Overtaken);
        };
        info!(%id, "created the cluster settings");
        Ok(self.host.wait_for_revision(revision).await?)
    }

    async fn adopt_block(&self, owned: OwnedBlock) -> Result<(), LedgerError> {
        let view = self.host.view();
        let Some(pool) = view.pools.get(&owned.pool) else { return Ok(()) };
        let pool = (*pool.record).clone();
        self.host.ledger(move |ipam, now| ipam.adopt_block(owned, &pool, now)).await
    }

    /// Publishes the node's identity, blocks and gateway addresses to the other tasks.
    pub(super) fn publish_allocations(
        &self,
        identity: Option<NodeIdentity>,
        blocks: &[OwnedBlock],
        gateways: &[IpAddr],
    ) {
        self.host.publish_allocations(Allocations {
            identity,
            blocks: blocks.to_vec(),
            gateways: gateways.to_vec(),
        });
    }

    fn publish(&self, registration: Registration) {
        if self.host.registration() == registration {
            return;
        }
        match &registration {
            Registration::Registered => info!("this node is registered"),
            Registration::Waiting(reason) => info!("waiting: {reason}"),
            Registration::Unproven(reason) => info!("waiting: {reason}"),
            Registration::Conflict(reason) => warn!("not serving: {reason}"),
            Registration::Removed(reason) => warn!("not serving: {reason}"),
        }
        self.host.register(registration);
    }
}
