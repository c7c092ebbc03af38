//! The next step of a node for its own records.
//!
//! Pure: a function of the known facts, one step at a time. The caller carries the step out and calls again with new
//! facts. Every step can be repeated, and no step assumes that an earlier one succeeded.

use std::collections::BTreeSet;
use std::net::IpAddr;

use polder_api::{Family, Mac, NodeName, PerFamily, rule};

use crate::change::{Change, Claim, HandOver, Member};
use crate::claim::{MAX_PER_CHANGE, NoClaim, Preconditions, delays_claims};
use crate::ids::{BootId, MachineId, NodeUid};
use crate::ledger::{MemberState, NodeIdentity, OwnedBlock};
use crate::moment::Moment;
use crate::node::NodeAllocations;
use crate::peers::validate;
use crate::pool::{Block, BlockRequest, Labels};
use crate::pools::{self, Decision};
use crate::record::{self, BlockRecord, Boot, Holder, LeaseRecord, NodeRecord, ReservationRecord};
use crate::removal::Quarantine;
use crate::reservation;
use crate::store::Entry;
use crate::view::{Versioned, View, ViewSource};

pub use claim_owner::{ClaimOwner, OwnerLease};
pub use identity::{NotAdopted, Proof, adopt};
pub use reason::{Conflict, NoPresence, RemovedState, WaitReason};

mod claim_owner;
mod identity;
mod reason;

/// Input of a decision.
#[derive(Debug)]
pub struct MembershipInputs<'a> {
    /// The node's name.
    pub me: &'a NodeName,
    /// The machine id and boot id of this machine.
    pub boot: Boot<'a>,
    /// The evidence required that this machine is the node of its ledger.
    pub proof: Proof,
    /// The machine that this one replaces, as requested with `polderctl node adopt`.
    pub adopted: Option<&'a LeaseRecord>,
    /// The node's labels.
    pub labels: &'a Labels,
    /// The cluster's records, as last read.
    pub view: &'a View,
    /// The node's blocks and addresses, and the identity in its ledger.
    pub allocations: &'a NodeAllocations,
    /// The node's addresses and tunnel parameters, or the reason why they are not known yet.
    pub presence: &'a Result<NodePresence, NoPresence>,
    /// Result of the last check for another boot or machine with this node's name.
    pub double: NameConflict,
    /// Whether no block is claimed: the datastore lost records, and their owners are restoring them.
    pub hold_off: bool,
    /// The removed nodes whose blocks are held back.
    pub quarantine: &'a Quarantine,
    /// The families in which no block could be claimed, with the reason. No claim is tried in them now.
    pub unclaimable: &'a PerFamily<Option<NoClaim>>,
    /// A unique string: the incarnation, if the node joins as a new one.
    pub fresh: &'a str,
    /// Current time on this machine's clock.
    pub now: Moment,
}

/// The node's own addresses and tunnel parameters for its record.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct NodePresence {
    /// The underlay addresses, at most one per family.
    pub underlay: Vec<IpAddr>,
    /// MAC address of its VXLAN tunnel endpoint.
    pub vtep_mac: Mac,
    /// MTU of its pods, in bytes.
    pub mtu: u32,
    /// Version of its agent.
    pub version: String,
    /// Its Node object in Kubernetes.
    pub node_object: NodeObjectState,
}

/// What a node knows of its Node object in Kubernetes.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum NodeObjectState {
    /// The node does not use Kubernetes.
    NotUsed,
    /// It is not known now, or was deleted: the record keeps the uid that it has.
    Unknown,
    /// It has this uid.
    Known(NodeUid),
}

impl NodeObjectState {
    /// The uid for the node's record. `before` is the current record of the same incarnation.
    fn uid(&self, before: Option<&NodeRecord>) -> Option<NodeUid> {
        match self {
            Self::NotUsed => None,
            Self::Unknown => before?.kubernetes_uid.clone(),
            Self::Known(uid) => Some(uid.clone()),
        }
    }
}

/// Whether another boot or machine with the node's name is alive.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum NameConflict {
    /// Not checked.
    Unchecked,
    /// No other is alive.
    None,
    /// This one is alive.
    Alive(LeaseRecord),
}

impl NameConflict {
    /// Evaluates the entry at the node's liveness key (`Key::Lease`) for this boot. An unreadable value counts as
    /// another that is alive.
    pub fn read(entry: Option<&Entry>, me: Boot<'_>) -> Self {
        let Some(entry) = entry else { return Self::None };
        let unknown =
            || LeaseRecord { boot_id: BootId::new("unknown"), machine_id: MachineId::new("unknown") };
        let alive = record::lease(&entry.value).unwrap_or_else(|_| unknown());
        if Boot::from(&alive) == me { Self::None } else { Self::Alive(alive) }
    }
}

/// The next step of the node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Nothing to do.
    Settled,
    /// Nothing to do until this changes. The node may use what it owns.
    Wait(WaitReason),
    /// Nothing to do: another node or machine has this node's identity or block. The node must not serve.
    Conflict(Box<Conflict>),
    /// Nothing to do: the node was removed. It must not serve.
    Removed(RemovedState),
    /// The cluster has no settings: create them, or wait for them.
    Bootstrap,
    /// Write the node's identity to the ledger.
    Identify(NodeIdentity),
    /// Check whether another boot or machine is alive with the node's name.
    AskForDouble,
    /// Disconnect all pods and release all blocks and addresses: the node was removed.
    CutOff,
    /// Make the change in the datastore.
    Commit(Box<Change>),
    /// Add a block that the node owns to the ledger.
    Own(OwnedBlock),
    /// Start to release blocks.
    Leave(Vec<Block>),
    /// Remove released blocks from the ledger.
    Disown(Vec<Block>),
    /// Claim a block.
    Claim(BlockRequest),
    /// Allocate the missing gateway addresses.
    TakeGateways,
    /// Replace a gateway address: it is in no block of the node, or its pool is closed and no pod is left in its block.
    MoveGateway(IpAddr),
    /// Remove the gateway address of a family that the cluster no longer uses.
    DropGateway(IpAddr),
}

impl Step {
    /// Whether this step is decided only after this machine is proven to be the node. If such a step fails, the node
    /// keeps serving with what it owns.
    pub fn rests_on_identity(&self) -> bool {
        match self {
            Self::Commit(change) => {
                !matches!(**change, Change::TakeOverNode { .. } | Change::ConfirmRemoval(_))
            }
            Self::Own(_)
            | Self::Leave(_)
            | Self::Disown(_)
            | Self::Claim(_)
            | Self::TakeGateways
            | Self::MoveGateway(_)
            | Self::DropGateway(_)
            | Self::Settled => true,
            Self::Wait(_)
            | Self::Conflict(_)
            | Self::Removed(_)
            | Self::Bootstrap
            | Self::Identify(_)
            | Self::AskForDouble
            | Self::CutOff => false,
        }
    }
}

fn commit(change: impl Into<Change>) -> Step {
    Step::Commit(Box::new(change.into()))
}

/// The next step for these facts.
pub fn next(facts: &MembershipInputs<'_>) -> Step {
    decide(facts).unwrap_or_else(|step| step)
}

/// The step; an error if it blocks all later ones.
fn decide(facts: &MembershipInputs<'_>) -> Result<Step, Step> {
    let view = facts.view;
    if view.source == ViewSource::Nowhere {
        return Err(Step::Wait(view.lost.clone().map_or(WaitReason::Records, WaitReason::Unreachable)));
    }
    if let Some(identity) =
        facts.allocations.identity.as_ref().filter(|own| own.member_state == MemberState::Removed)
    {
        return Ok(identity::leave(facts, identity));
    }
    let Some(cluster) = &view.cluster else { return Err(Step::Bootstrap) };
    let identity = identity::identify(facts, &cluster.record)?;
    if view.source == ViewSource::Snapshot {
        return Err(Step::Wait(WaitReason::NotReached));
    }
    let me = register(facts, identity)?;
    let gone = reconcile(facts, identity, &me)?;
    release_blocks(facts, identity, &me)?;
    let needs = needs(facts);
    if let Some(step) = needs.step {
        return Ok(step);
    }
    reservations(facts, identity, &me)?;
    if let Some(change) = facts.quarantine.next_change(view, &me, facts.now) {
        return Ok(commit(change));
    }
    Ok(needs.reason.or(gone).map_or(Step::Settled, Step::Wait))
}

/// Writes the node's record if it differs from the desired one.
fn register(facts: &MembershipInputs<'_>, identity: &NodeIdentity) -> Result<Member, Step> {
    let known = facts.view.nodes.get(facts.me);
    let presence = facts.presence.as_ref().map_err(|reason| Step::Wait(reason.clone().into()))?;
    let before =
        known.map(|known| &*known.record).filter(|record| record.incarnation == identity.incarnation);
    let record = NodeRecord {
        incarnation: identity.incarnation.clone(),
        machine_id: facts.boot.machine_id.clone(),
        boot_id: facts.boot.boot_id.clone(),
        underlay: presence.underlay.clone(),
        gateways: facts.allocations.gateways.clone(),
        probes: facts.allocations.probes.clone(),
        vtep_mac: presence.vtep_mac,
        mtu: presence.mtu,
        version: presence.version.clone(),
        kubernetes_uid: presence.node_object.uid(before),
    };
    let node = facts.me.clone();
    Err(commit(match known {
        Some(known) if *known.record == record => return Ok(Member { node, revision: known.revision }),
        Some(known) if identity::is_of_stranger(facts, &known.record) => {
            Change::TakeOverNode { node, record, before: known.revision }
        }
        _ => {
            let before = known.map(|known| known.revision);
            Change::RegisterNode { node, record, before }
        }
    }))
}

/// Adopts blocks that only the datastore lists for this node, and restores those that only the ledger lists. Returns a
/// lost pool that prevents a restore.
fn reconcile(
    facts: &MembershipInputs<'_>,
    identity: &NodeIdentity,
    me: &Member,
) -> Result<Option<WaitReason>, Step> {
    let (view, blocks) = (facts.view, &facts.allocations.blocks);
    let is_known = |block: &Block| blocks.iter().any(|owned| owned.block == *block);
    let is_missing = |(block, known): (&Block, &Versioned<BlockRecord>)| {
        known.record.node == *facts.me && !is_known(block)
    };
    // The validation takes long in a large cluster.
    if view.blocks.iter().any(is_missing) {
        let valid = validate(view, facts.me, &BTreeSet::new()).own_blocks;
        if let Some(block) = valid.into_iter().find(|block| !is_known(block)) {
            // The outcome of this claim was unknown, or the ledger lost it.
            let BlockRecord { pool, nonce, .. } = (*view.blocks[&block].record).clone();
            return Err(Step::Own(OwnedBlock { block, pool, nonce, leaving: false }));
        }
    }
    let ours = |claim: &BlockRecord| claim.node == identity.node && claim.incarnation == identity.incarnation;
    for owned in blocks.iter().filter(|owned| !owned.leaving) {
        let foreign = |(block, known): &(&Block, &Versioned<BlockRecord>)| {
            block.cidr().overlaps(owned.block.cidr()) && !ours(&known.record)
        };
        if let Some((block, known)) = view.blocks.iter().find(foreign) {
            let (own, claimed, by) = (owned.block, *block, known.record.node.clone());
            let owner = ClaimOwner::of(view, &known.record);
            return Err(Step::Conflict(Conflict::Block { own, claimed, by, owner }.into()));
        }
    }
    put_back_pools(facts, me)?;
    let mut gone = None;
    for lost in blocks.iter().filter(|owned| is_lost(owned, view)) {
        let Some(pool) = view.pools.get(&lost.pool) else {
            gone = Some(WaitReason::PoolGone { pool: lost.pool.clone(), block: lost.block });
            continue;
        };
        let grounds = Preconditions { by: me.clone(), incarnation: &identity.incarnation, pool };
        return Err(commit(Claim::new(grounds, lost.block, lost.nonce.clone())));
    }
    Ok(gone)
}

/// Restores pools that the datastore lost and in which this node has addresses: a pool in use cannot have been removed.
fn put_back_pools(facts: &MembershipInputs<'_>, me: &Member) -> Result<(), Step> {
    for (name, pool) in &facts.view.lost_pools {
        let of_block = facts.allocations.blocks.iter().any(|owned| !owned.leaving && owned.pool == *name);
        let is_held_outside = || {
            facts.allocations.addresses_outside_blocks.iter().any(|outside| pool.cidr().has(outside.address))
        };
        if !of_block && !is_held_outside() {
            continue;
        }
        if let Ok(Decision::Commit { change, .. }) = pools::add(facts.view, pool)
            && let Change::AddPool { pool, as_of, .. } = *change
        {
            return Err(commit(Change::AddPool { by: Some(me.clone()), pool, as_of }));
        }
    }
    Ok(())
}

/// Releases blocks that are not needed, many per change: a node can have thousands.
fn release_blocks(facts: &MembershipInputs<'_>, identity: &NodeIdentity, me: &Member) -> Result<(), Step> {
    let is_own = |claim: &Versioned<BlockRecord>| claim.record.incarnation == identity.incarnation;
    let leaving = facts.allocations.blocks.iter().filter(|owned| owned.leaving).map(|owned| owned.block);
    let (claimed, gone): (Vec<Block>, Vec<Block>) =
        leaving.partition(|block| facts.view.blocks.get(block).is_some_and(is_own));
    if !gone.is_empty() {
        return Err(Step::Disown(gone));
    }
    if !claimed.is_empty() {
        let known = |block: Block| (block, facts.view.blocks[&block].revision);
        let blocks = claimed.into_iter().take(MAX_PER_CHANGE).map(known).collect();
        return Err(commit(Change::ReleaseBlocks { by: me.clone(), blocks }));
    }
    // While other nodes restore lost records, this node's claims can be needed as evidence.
    if facts.allocations.spare.is_empty() || facts.hold_off {
        return Ok(());
    }
    Err(Step::Leave(facts.allocations.spare.clone()))
}

/// Result of the check for blocks and gateway addresses.
struct Needs {
    /// The step that obtains a missing one.
    step: Option<Step>,
    /// The reason why one cannot be obtained.
    reason: Option<WaitReason>,
}

/// Ensures an open block and a gateway address in each family. A failure in one family does not block the other.
fn needs(facts: &MembershipInputs<'_>) -> Needs {
    let (view, own) = (facts.view, facts.allocations);
    let mut reason = None;
    let is_open = |owned: &&OwnedBlock| {
        !owned.leaving && view.pools.get(&owned.pool).is_some_and(|pool| pool.record.is_open_to(facts.labels))
    };
    for family in view.families() {
        let mut open = own.blocks.iter().filter(is_open);
        let step = if !open.any(|owned| owned.block.family() == family) {
            match &facts.unclaimable[family] {
                Some(why) => {
                    reason.get_or_insert_with(|| why.clone().into());
                    None
                }
                None if delays_claims(facts.hold_off) => {
                    reason.get_or_insert(WaitReason::HoldOff);
                    None
                }
                None => Some(Step::Claim(BlockRequest::Any(family, None))),
            }
        } else if own.could_take_gateway.contains(&family) {
            Some(Step::TakeGateways)
        } else {
            let idle = own.idle_gateways.iter().find(|gateway| Family::of(**gateway) == family);
            idle.map(|gateway| Step::MoveGateway(*gateway))
        };
        if step.is_some() {
            return Needs { step, reason };
        }
    }
    let is_given_up = |gateway: &&IpAddr| !view.families().contains(&Family::of(**gateway));
    let unneeded = own.unneeded_gateways.iter().find(is_given_up);
    Needs { step: unneeded.filter(|_| !facts.hold_off).map(|gateway| Step::DropGateway(*gateway)), reason }
}

/// Releases reserved addresses that no attachment uses, and restores those that the datastore lost.
fn reservations(facts: &MembershipInputs<'_>, identity: &NodeIdentity, me: &Member) -> Result<(), Step> {
    let mine = |holder: &&Holder| holder.incarnation == identity.incarnation;
    for (address, known) in &facts.view.reservations {
        let Some(holder) = known.record.holder.as_ref().filter(mine) else { continue };
        let held =
            facts.allocations.addresses_outside_blocks.iter().any(|outside| outside.address == *address);
        let wanted = held || facts.allocations.expected.contains(address);
        if !wanted || holder.boot_id != *facts.boot.boot_id {
            let released = reservation::released(*address, known);
            return Err(commit(Change::ReleaseAddress { by: me.clone(), released }));
        }
    }
    for outside in &facts.allocations.addresses_outside_blocks {
        let Some(owner) = &outside.owner else { continue };
        let known = facts.view.reservations.get(&outside.address);
        // A datastore that was restored from a backup has an earlier holder, or none. If the holder is another node, it
        // must release the address first.
        let is_right = known.and_then(|known| Some((known, known.record.holder.as_ref()?)));
        let is_right = is_right.is_some_and(|(known, holder)| {
            let lives = || {
                facts
                    .allocations
                    .addresses_outside_blocks
                    .iter()
                    .any(|outside| outside.attachment == holder.attachment)
            };
            !mine(&holder) || known.record.owner == *owner || lives()
        });
        if is_right || reservation::pool_of(facts.view, outside.address).is_none() {
            continue;
        }
        let holder = Holder {
            node: facts.me.clone(),
            incarnation: identity.incarnation.clone(),
            boot_id: facts.boot.boot_id.clone(),
            attachment: outside.attachment.clone(),
        };
        let generation = known.map_or(1, |known| known.record.generation + 1);
        let record = ReservationRecord { owner: owner.clone(), holder: Some(holder), generation };
        let before = known.map(|known| known.revision);
        let again = HandOver { by: me.clone(), address: outside.address, record, before, source_pool: None };
        return Err(commit(again));
    }
    Ok(())
}

rule! {
    /// Whether the datastore lost the claim of a block that this node uses: the node restores it.
    fn is_lost(owned: &OwnedBlock, view: &View) -> bool {
        !owned.leaving && !view.blocks.contains_key(&owned.block)
    }
    LostClaimStaysLost => false
}

#[cfg(test)]
mod tests;
