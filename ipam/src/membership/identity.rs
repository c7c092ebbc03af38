//! The identity of this node: the evidence from machine id, boot id and ledger, and the step for each combination of
//! them.
//!
//! The *boot id* proves that the kernel has not restarted; containers of one host share it. The *machine id* proves
//! that the installation is the same, unless its disk was copied; a container can have another one after each start.
//! Only the *ledger* names the incarnation; it can be a copy, too. The table is in `docs/architecture.md`.

use polder_api::NodeName;
use polder_api::rule;
use serde::{Deserialize, Serialize};

use super::{Conflict, MembershipInputs, NameConflict, NodeObjectState, RemovedState, Step, commit};
use crate::ids::Incarnation;
use crate::ledger::{MemberState, NodeIdentity};
use crate::record::{Boot, ClusterRecord, FenceRecord, LeaseRecord, NodeRecord, PodsGone};
use crate::removal;
use crate::view::{Versioned, View, ViewSource};

/// The evidence required that a machine is the node that its ledger names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Proof {
    /// The ledger, and the machine id or the boot id.
    #[default]
    Machine,
    /// The ledger alone: the operator guarantees that it is never copied.
    Ledger,
}

/// Relation between this machine and that of a record, according to their ids.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum IdMatch {
    /// Both ids are equal: the same boot.
    Same,
    /// The same machine id with another boot id: the machine was rebooted.
    Rebooted,
    /// Another machine id on the same running kernel: a restarted container, or another container.
    OneKernel,
    /// Both ids differ: another machine, or a restart that changed both.
    Stranger,
}

impl IdMatch {
    fn of(me: Boot<'_>, other: Boot<'_>) -> Self {
        match (me.machine_id == other.machine_id, me.boot_id == other.boot_id) {
            (true, true) => Self::Same,
            (true, false) => Self::Rebooted,
            (false, true) => Self::OneKernel,
            (false, false) => Self::Stranger,
        }
    }
}

rule! {
    /// Whether the ledger alone is enough evidence.
    fn ledger_is_proof(facts: &MembershipInputs<'_>) -> bool {
        facts.proof == Proof::Ledger
    }
    CopyIsAccepted => true
}

rule! {
    /// Whether this incarnation was removed.
    fn was_removed(view: &View, incarnation: &Incarnation) -> bool {
        view.fences.contains_key(incarnation)
    }
    FenceIsIgnored => false
}

rule! {
    /// Whether the record is from another boot or machine, which may still be alive.
    fn is_of_another(boot: Boot<'_>, record: &NodeRecord) -> bool {
        IdMatch::of(boot, record.into()) != IdMatch::Same
    }
    NameConflictIsIgnored => false
}

rule! {
    /// The fence of this machine if it has no ledger. Always `None`: only the ledger identifies a fence.
    fn own_fence<'a>(facts: &MembershipInputs<'a>) -> Option<&'a Incarnation> {
        let _ = facts;
        None
    }
    FenceMatchedByBootId => {
        let is_open = |fence: &FenceRecord| {
            fence.node == *facts.me && fence.boot_id == *facts.boot.boot_id && fence.pods == PodsGone::Unknown
        };
        let mut fences = facts.view.fences.iter();
        fences.find(|(_, fence)| is_open(&fence.record)).map(|(incarnation, _)| incarnation)
    }
}

/// Whether the record is another machine's, and only an operator can permit this machine to take it over.
pub(super) fn is_of_stranger(facts: &MembershipInputs<'_>, record: &NodeRecord) -> bool {
    IdMatch::of(facts.boot, record.into()) == IdMatch::Stranger && !ledger_is_proof(facts)
}

/// The next step of a removed node.
pub(super) fn leave(facts: &MembershipInputs<'_>, identity: &NodeIdentity) -> Step {
    if !facts.allocations.is_bare() {
        return Step::CutOff;
    }
    let node = identity.node.clone();
    let fence = facts.view.fences.get(&identity.incarnation);
    let Some(fence) = fence.filter(|fence| fence.record.pods == PodsGone::Unknown) else {
        if let Some(again) = fence.and_then(|fence| join_again(facts, identity, &fence.record)) {
            return Step::Identify(again);
        }
        let namesake = facts.view.nodes.get(&node).map(|now| Boot::from(&*now.record).into());
        return Step::Removed(RemovedState::Done { node, namesake });
    };
    if !could_confirm(facts, &fence.record) {
        return Step::Removed(RemovedState::Stranger { node, removed: Boot::from(&*fence.record).into() });
    }
    if facts.view.source == ViewSource::Store {
        return commit(removal::confirm(&identity.incarnation, fence));
    }
    Step::Removed(RemovedState::Unconfirmed(node))
}

/// The identity with which a removed machine joins again by itself: Kubernetes has got another Node object for it since
/// it was removed. The removal alone is no reason: an operator may have removed it for good.
fn join_again(
    facts: &MembershipInputs<'_>,
    identity: &NodeIdentity,
    fence: &FenceRecord,
) -> Option<NodeIdentity> {
    let view = facts.view;
    let NodeObjectState::Known(now) = &facts.presence.as_ref().ok()?.node_object else { return None };
    let is_another = fence.kubernetes_uid.as_ref().is_some_and(|removed| removed != now);
    let is_free =
        view.source == ViewSource::Store && identity.node == *facts.me && !view.nodes.contains_key(facts.me);
    let cluster = view.cluster.as_ref().filter(|cluster| cluster.record.id == identity.cluster)?;
    (is_another && is_free).then(|| NodeIdentity {
        node: facts.me.clone(),
        incarnation: Incarnation::new(facts.fresh.to_owned()),
        cluster: cluster.record.id.clone(),
        member_state: MemberState::Member,
    })
}

/// Whether this machine can confirm for the removed one that its pods are gone. A machine with the ledger but two other
/// ids can have a copy of it, while the pods still run.
fn could_confirm(facts: &MembershipInputs<'_>, fence: &FenceRecord) -> bool {
    IdMatch::of(facts.boot, fence.into()) != IdMatch::Stranger || ledger_is_proof(facts)
}

/// The identity in the node's ledger, or the step that determines it.
pub(super) fn identify<'a>(
    facts: &'a MembershipInputs<'_>,
    cluster: &ClusterRecord,
) -> Result<&'a NodeIdentity, Step> {
    let MembershipInputs { me, view, .. } = facts;
    let registered = view.nodes.get(*me);
    let Some(identity) = &facts.allocations.identity else {
        return Err(first_step(facts, cluster, registered));
    };
    if identity.cluster != cluster.id {
        let (ledger, store) = (identity.cluster.clone(), cluster.id.clone());
        return Err(Step::Conflict(Conflict::Cluster { ledger, store }.into()));
    }
    // Checked first: this ledger's incarnation was removed, even if another machine has the name now.
    if view.source == ViewSource::Store && was_removed(view, &identity.incarnation) {
        return Err(Step::Identify(NodeIdentity { member_state: MemberState::Removed, ..identity.clone() }));
    }
    if identity.node != **me {
        let (ledger, me) = (identity.node.clone(), (*me).clone());
        return Err(Step::Conflict(Conflict::Name { ledger, me }.into()));
    }
    match registered {
        Some(node) if node.record.incarnation != identity.incarnation => Err(Step::Conflict(
            Conflict::Incarnation {
                me: (*me).clone(),
                registered: node.record.incarnation.clone(),
                other: Boot::from(&*node.record).into(),
                ledger: identity.incarnation.clone(),
            }
            .into(),
        )),
        Some(node) => prove(facts, node).map_or(Ok(identity), Err),
        None => Ok(identity),
    }
}

/// The step that prevents this machine from being the node of its ledger: the record may be another machine's.
fn prove(facts: &MembershipInputs<'_>, node: &Versioned<NodeRecord>) -> Option<Step> {
    let (me, other) = (facts.me, Boot::from(&*node.record));
    let is_adopted = facts.adopted.is_some_and(|adopted| Boot::from(adopted) == other);
    let kinship = IdMatch::of(facts.boot, other);
    let is_left = kinship != IdMatch::Stranger || is_adopted || ledger_is_proof(facts);
    if facts.view.source != ViewSource::Store {
        let is_proven = matches!(kinship, IdMatch::Same | IdMatch::Rebooted) || ledger_is_proof(facts);
        return (!is_proven)
            .then(|| Step::Conflict(Conflict::Unasked { me: me.clone(), other: other.into() }.into()));
    }
    name_conflict_step(facts, node).or_else(|| {
        let stranger = || Conflict::Stranger { me: me.clone(), other: other.into(), own: facts.boot.into() };
        (!is_left).then(|| Step::Conflict(stranger().into()))
    })
}

/// The step that prevents taking the record over from another boot or machine: that one may still be alive.
fn name_conflict_step(facts: &MembershipInputs<'_>, node: &Versioned<NodeRecord>) -> Option<Step> {
    if !is_of_another(facts.boot, &node.record) || facts.view.source != ViewSource::Store {
        return None;
    }
    match &facts.double {
        NameConflict::None => None,
        NameConflict::Unchecked => Some(Step::AskForDouble),
        NameConflict::Alive(other) => Some(Step::Conflict(alive(facts, other).into())),
    }
}

fn alive(facts: &MembershipInputs<'_>, other: &LeaseRecord) -> Conflict {
    let (me, other) = (facts.me.clone(), other.clone());
    if other.machine_id == *facts.boot.machine_id {
        Conflict::OtherBoot { me, other }
    } else {
        Conflict::OtherMachine { me, other }
    }
}

/// The next step of a node whose ledger has no identity.
fn first_step(
    facts: &MembershipInputs<'_>,
    cluster: &ClusterRecord,
    registered: Option<&Versioned<NodeRecord>>,
) -> Step {
    let identify_as = |incarnation: &Incarnation, member_state| {
        let (node, incarnation) = (facts.me.clone(), incarnation.clone());
        Step::Identify(NodeIdentity { node, incarnation, cluster: cluster.id.clone(), member_state })
    };
    if let Some(node) = registered {
        return match IdMatch::of(facts.boot, (&*node.record).into()) {
            // Its ledger is lost. In the same boot, no other can be alive: it is this node.
            IdMatch::Same | IdMatch::Rebooted => name_conflict_step(facts, node)
                .unwrap_or_else(|| identify_as(&node.record.incarnation, MemberState::Member)),
            IdMatch::OneKernel | IdMatch::Stranger => {
                let (other, own) = (Boot::from(&*node.record).into(), facts.boot.into());
                Step::Conflict(Conflict::Taken { me: facts.me.clone(), other, own }.into())
            }
        };
    }
    let mut others = facts.view.nodes.iter();
    if let Some((name, _)) = others.find(|(_, node)| node.record.machine_id == *facts.boot.machine_id) {
        let (machine_id, registered) = (facts.boot.machine_id.clone(), name.clone());
        return Step::Conflict(Conflict::Clone { machine_id, registered }.into());
    }
    let mut removed = facts.view.fences.iter().filter(|(_, fence)| fence.record.node == *facts.me);
    if let Some(incarnation) = own_fence(facts) {
        return identify_as(incarnation, MemberState::Removed);
    }
    if removed.next().is_some() && !facts.allocations.is_bare() {
        // Its ledger is lost, and a node of this name was removed: the existing pods do not belong to the new node.
        // Without the ledger it cannot confirm that they are gone.
        return Step::CutOff;
    }
    identify_as(&Incarnation::new(facts.fresh.to_owned()), MemberState::Member)
}

/// Reason why a machine cannot replace another.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotAdopted {
    /// The agent has another node name.
    #[error(
        "this machine is configured as node {me}, not {wanted}: run this on the machine that is to become \
         node {wanted}"
    )]
    Name {
        /// Node name of the agent.
        me: NodeName,
        /// Node name in the request.
        wanted: NodeName,
    },
    /// The ledger does not name the node.
    #[error(
        "this machine has no ledger of the registered node {0}, so it cannot adopt the node. If the other machine \
         is permanently gone, run polderctl node remove {0} --dead: this machine then joins as a new node"
    )]
    Ledger(NodeName),
    /// No node is registered with the name.
    /// Remedy: check the name with polderctl node list.
    #[error("node {0} is not registered: there is nothing to adopt")]
    Unregistered(NodeName),
}

/// The machine that this one replaces, at an operator's request; `None` if this machine is already the node.
pub fn adopt(
    view: &View,
    me: &NodeName,
    wanted: &NodeName,
    identity: Option<&NodeIdentity>,
    boot: Boot<'_>,
) -> Result<Option<LeaseRecord>, NotAdopted> {
    if me != wanted {
        return Err(NotAdopted::Name { me: me.clone(), wanted: wanted.clone() });
    }
    let node = view.nodes.get(me).ok_or_else(|| NotAdopted::Unregistered(me.clone()))?;
    if identity.is_none_or(|identity| identity.incarnation != node.record.incarnation) {
        return Err(NotAdopted::Ledger(me.clone()));
    }
    let other = Boot::from(&*node.record);
    Ok((other != boot).then(|| other.into()))
}
