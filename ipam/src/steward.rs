//! What a node does next about its own records: the order of business of a member of the cluster.
//!
//! Pure: from what is known, one step at a time. Whoever carries a step out comes back with what is known then. Every
//! step can be carried out again, and none rests on one before it having been seen to succeed.

use std::collections::BTreeSet;
use std::net::IpAddr;

use polder_api::{Family, Mac, NodeName, PerFamily, rule};

use crate::change::{Change, Claim, HandOver, Member};
use crate::claim::{AT_ONCE, Grounds, NoClaim, holds_off};
use crate::ids::{BootId, MachineId};
use crate::ledger::{Identity, OwnedBlock, Standing};
use crate::moment::Moment;
use crate::node::Own;
use crate::peers::believe;
use crate::pool::{Block, BlockRequest, Labels};
use crate::pools::{self, Decision};
use crate::record::{self, Alive, BlockRecord, Holder, Life, NodeRecord, ReservationRecord};
use crate::removal::Quarantine;
use crate::reservation;
use crate::store::Entry;
use crate::view::{Known, Source, View};

pub use identity::{NotAdopted, Proof, adopt};
pub use reason::{Conflict, NoPresence, Removed, Waiting};

mod identity;
mod reason;

/// What is known.
#[derive(Debug)]
pub struct Facts<'a> {
    /// The node's name.
    pub me: &'a NodeName,
    /// Which machine this is, and which boot of it.
    pub life: Life<'a>,
    /// What proves that this machine is the node of its ledger.
    pub proof: Proof,
    /// The machine that an operator says this one is in place of.
    pub adopted: Option<&'a Alive>,
    /// What the configuration says of the node.
    pub labels: &'a Labels,
    /// The cluster.
    pub view: &'a View,
    /// What the ledger says.
    pub own: &'a Own,
    /// How the node is reached, or what that waits for.
    pub presence: &'a Result<Presence, NoPresence>,
    /// Whether the node was alive in another boot, or elsewhere, when that was last asked.
    pub double: Double,
    /// Whether claims wait: the store has lost records, and their owners are putting them back.
    pub caution: bool,
    /// The removed nodes whose blocks rest.
    pub quarantine: &'a Quarantine,
    /// The families of which no block could be claimed, with the reason. They are not tried again now.
    pub unclaimable: &'a PerFamily<Option<NoClaim>>,
    /// A name that nobody else has.
    pub fresh: &'a str,
    /// Now.
    pub now: Moment,
}

/// How a node is reached.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Presence {
    /// Where peers reach it: at most one address of a family.
    pub underlay: Vec<IpAddr>,
    /// The MAC address of its end of the tunnels.
    pub vtep_mac: Mac,
    /// The MTU of its pods, in bytes.
    pub mtu: u32,
    /// The release of its agent.
    pub version: String,
}

/// Whether somebody else lives under the node's name.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Double {
    /// It was not asked.
    Unasked,
    /// Nobody does.
    None,
    /// Somebody does: this one.
    Alive(Alive),
}

impl Double {
    /// What the entry behind the lease of the node's name says to one who has that life. What cannot be read is
    /// somebody's sign of life, too.
    pub fn read(entry: Option<&Entry>, me: Life<'_>) -> Self {
        let Some(entry) = entry else { return Self::None };
        let unknown = || Alive { boot_id: BootId::new("unknown"), machine_id: MachineId::new("unknown") };
        let alive = record::alive(&entry.value).unwrap_or_else(|_| unknown());
        if Life::from(&alive) == me { Self::None } else { Self::Alive(alive) }
    }
}

/// What to do next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Nothing.
    Settled,
    /// Nothing, until what is named has changed. What the node owns it may use meanwhile.
    Wait(Waiting),
    /// Nothing: somebody else is who this node says it is. It must not serve.
    Conflict(Box<Conflict>),
    /// Nothing: the node was removed. It must not serve.
    Removed(Removed),
    /// The cluster has no settings: make them, or wait for them.
    Bootstrap,
    /// Write down who the node is.
    Identify(Identity),
    /// Ask whether somebody lives under the node's name.
    AskForDouble,
    /// Take everything away that the node had: it was removed.
    CutOff,
    /// Make the change.
    Commit(Box<Change>),
    /// Take down a block that is the node's own.
    Own(OwnedBlock),
    /// Begin to give blocks back.
    Leave(Vec<Block>),
    /// Forget blocks that are given back.
    Disown(Vec<Block>),
    /// Claim a block.
    Claim(BlockRequest),
    /// Allocate the node's own addresses that are missing.
    TakeGateways,
    /// Let another address be the node's own, for the pool of this one is closed and no pod is left in its block.
    MoveGateway(IpAddr),
    /// Have no address of the node's own of that family any more: the cluster has given the family up.
    DropGateway(IpAddr),
}

impl Step {
    /// Whether it is decided only after it is proven that this machine is the node. Where such a step fails, the node goes on
    /// serving with what it owns.
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

/// What to do next.
pub fn next(facts: &Facts<'_>) -> Step {
    decide(facts).unwrap_or_else(|step| step)
}

/// The step; as an error where it bars the way to all others.
fn decide(facts: &Facts<'_>) -> Result<Step, Step> {
    let view = facts.view;
    if view.source == Source::Nowhere {
        return Err(Step::Wait(view.lost.clone().map_or(Waiting::Records, Waiting::Silent)));
    }
    if let Some(identity) = facts.own.identity.as_ref().filter(|own| own.standing == Standing::Removed) {
        return Ok(identity::leave(facts, identity));
    }
    let Some(cluster) = &view.cluster else { return Err(Step::Bootstrap) };
    let identity = identity::identify(facts, &cluster.record)?;
    if view.source == Source::Snapshot {
        return Err(Step::Wait(Waiting::Away));
    }
    let me = register(facts, identity)?;
    let gone = reconcile(facts, identity, &me)?;
    give_back(facts, identity, &me)?;
    let needs = needs(facts);
    if let Some(step) = needs.step {
        return Ok(step);
    }
    reservations(facts, identity, &me)?;
    if let Some(change) = facts.quarantine.over(view, &me, facts.now) {
        return Ok(commit(change));
    }
    Ok(needs.reason.or(gone).map_or(Step::Settled, Step::Wait))
}

/// Makes the node's record what it should be.
fn register(facts: &Facts<'_>, identity: &Identity) -> Result<Member, Step> {
    let known = facts.view.nodes.get(facts.me);
    let presence = facts.presence.as_ref().map_err(|reason| Step::Wait(reason.clone().into()))?;
    let record = NodeRecord {
        incarnation: identity.incarnation.clone(),
        machine_id: facts.life.machine_id.clone(),
        boot_id: facts.life.boot_id.clone(),
        underlay: presence.underlay.clone(),
        gateways: facts.own.gateways.clone(),
        probes: facts.own.probes.clone(),
        vtep_mac: presence.vtep_mac,
        mtu: presence.mtu,
        version: presence.version.clone(),
    };
    let node = facts.me.clone();
    Err(commit(match known {
        Some(known) if *known.record == record => return Ok(Member { node, revision: known.revision }),
        Some(known) if identity::is_strangers(facts, &known.record) => {
            Change::TakeOverNode { node, record, before: known.revision }
        }
        _ => {
            let before = known.map(|known| known.revision);
            Change::RegisterNode { node, record, before }
        }
    }))
}

/// Takes over what the store says is the node's, and puts back what the ledger says is. Returns what cannot be put back.
fn reconcile(facts: &Facts<'_>, identity: &Identity, me: &Member) -> Result<Option<Waiting>, Step> {
    let (view, blocks) = (facts.view, &facts.own.blocks);
    for block in believe(view, facts.me, &BTreeSet::new()).own_blocks {
        if !blocks.iter().any(|owned| owned.block == block) {
            // A claim whose outcome was never known, or one that the ledger has lost.
            let BlockRecord { pool, nonce, .. } = (*view.blocks[&block].record).clone();
            return Err(Step::Own(OwnedBlock { block, pool, nonce, leaving: false }));
        }
    }
    let ours = |claim: &BlockRecord| claim.node == identity.node && claim.incarnation == identity.incarnation;
    for owned in blocks.iter().filter(|owned| !owned.leaving) {
        let foreign = |(block, known): &(&Block, &Known<BlockRecord>)| {
            block.cidr().overlaps(owned.block.cidr()) && !ours(&known.record)
        };
        if let Some((block, known)) = view.blocks.iter().find(foreign) {
            let (own, claimed, by) = (owned.block, *block, known.record.node.clone());
            return Err(Step::Conflict(Conflict::Block { own, claimed, by }.into()));
        }
    }
    put_back_pools(facts, me)?;
    let mut gone = None;
    for lost in blocks.iter().filter(|owned| is_lost(owned, view)) {
        let Some(pool) = view.pools.get(&lost.pool) else {
            gone = Some(Waiting::PoolGone { pool: lost.pool.clone(), block: lost.block });
            continue;
        };
        let grounds = Grounds { by: me.clone(), incarnation: &identity.incarnation, pool };
        return Err(commit(Claim::new(grounds, lost.block, lost.nonce.clone())));
    }
    Ok(gone)
}

/// Puts back pools that the store has lost and that this node has addresses of: one that is in use cannot have been
/// removed.
fn put_back_pools(facts: &Facts<'_>, me: &Member) -> Result<(), Step> {
    for (name, pool) in &facts.view.lost_pools {
        let of_block = facts.own.blocks.iter().any(|owned| !owned.leaving && owned.pool == *name);
        let of_stray = || facts.own.strays.iter().any(|stray| pool.cidr().has(stray.address));
        if !of_block && !of_stray() {
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

/// Gives back blocks that are not needed, many at once: a node can have thousands.
fn give_back(facts: &Facts<'_>, identity: &Identity, me: &Member) -> Result<(), Step> {
    let is_own = |claim: &Known<BlockRecord>| claim.record.incarnation == identity.incarnation;
    let leaving = facts.own.blocks.iter().filter(|owned| owned.leaving).map(|owned| owned.block);
    let (claimed, gone): (Vec<Block>, Vec<Block>) =
        leaving.partition(|block| facts.view.blocks.get(block).is_some_and(is_own));
    if !gone.is_empty() {
        return Err(Step::Disown(gone));
    }
    if !claimed.is_empty() {
        let known = |block: Block| (block, facts.view.blocks[&block].revision);
        let blocks = claimed.into_iter().take(AT_ONCE).map(known).collect();
        return Err(commit(Change::GiveBackBlocks { by: me.clone(), blocks }));
    }
    // While others put back what the store has lost, this node's claims may be needed as witnesses.
    if facts.own.spare.is_empty() || facts.caution {
        return Ok(());
    }
    Err(Step::Leave(facts.own.spare.clone()))
}

/// What a node needs to serve.
struct Needs {
    /// How to get something that is missing.
    step: Option<Step>,
    /// What cannot be had.
    reason: Option<Waiting>,
}

/// Sees to it that there is a block of each family that addresses go out of, and an address of the node itself. What
/// cannot be had of one family does not stop the other.
fn needs(facts: &Facts<'_>) -> Needs {
    let (view, own) = (facts.view, facts.own);
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
                None if holds_off(facts.caution) => {
                    reason.get_or_insert(Waiting::Caution);
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
    let lonely = own.lonely_gateways.iter().find(is_given_up);
    Needs { step: lonely.filter(|_| !facts.caution).map(|gateway| Step::DropGateway(*gateway)), reason }
}

/// Lets go of reserved addresses that no attachment has any more, and puts back those that the store has lost.
fn reservations(facts: &Facts<'_>, identity: &Identity, me: &Member) -> Result<(), Step> {
    let mine = |holder: &&Holder| holder.incarnation == identity.incarnation;
    for (address, known) in &facts.view.reservations {
        let Some(holder) = known.record.holder.as_ref().filter(mine) else { continue };
        let held = facts.own.strays.iter().any(|stray| stray.address == *address);
        let wanted = held || facts.own.expected.contains(address);
        if !wanted || holder.boot_id != *facts.life.boot_id {
            let let_go = reservation::let_go(*address, known);
            return Err(commit(Change::LetGoAddress { by: me.clone(), let_go }));
        }
    }
    for stray in &facts.own.strays {
        let Some(owner) = &stray.owner else { continue };
        let known = facts.view.reservations.get(&stray.address);
        // A store that was set back knows an earlier holder, or none. If he is another node's, that one lets go first.
        let is_right = known.and_then(|known| Some((known, known.record.holder.as_ref()?)));
        let is_right = is_right.is_some_and(|(known, holder)| {
            let lives = || facts.own.strays.iter().any(|stray| stray.attachment == holder.attachment);
            !mine(&holder) || known.record.owner == *owner || lives()
        });
        if is_right || reservation::pool_of(facts.view, stray.address).is_none() {
            continue;
        }
        let holder = Holder {
            node: facts.me.clone(),
            incarnation: identity.incarnation.clone(),
            boot_id: facts.life.boot_id.clone(),
            attachment: stray.attachment.clone(),
        };
        let generation = known.map_or(1, |known| known.record.generation + 1);
        let record = ReservationRecord { owner: owner.clone(), holder: Some(holder), generation };
        let before = known.map(|known| known.revision);
        let again = HandOver { by: me.clone(), address: stray.address, record, before, out_of: None };
        return Err(commit(again));
    }
    Ok(())
}

rule! {
    /// Whether the store has lost the claim of a block that this node uses: it is put back.
    fn is_lost(owned: &OwnedBlock, view: &View) -> bool {
        !owned.leaving && !view.blocks.contains_key(&owned.block)
    }
    LostClaimStaysLost => false
}

#[cfg(test)]
mod tests;
