//! Invariants of one node: its ledger against its kernel, and both against the datastore's records.

use std::collections::BTreeSet;
use std::net::IpAddr;

use polder_api::NodeName;

use super::{
    ClusterReport, Deviation, Interface, Invariant, KernelFacts, LedgerFacts, NodeFacts, Repair, deviation,
};
use crate::ids::Incarnation;
use crate::ledger::{AttachmentEntry, AttachmentKind};
use crate::pool::{Block, Purpose};
use crate::record::{Holder, PodsGone};
use crate::view::View;

pub(super) fn check(facts: &ClusterReport<'_>, node: &NodeFacts, found: &mut Vec<Deviation>) {
    if let Some(ledger) = &node.ledger {
        conservation(node, ledger, found);
        check_promised(node, ledger, found);
        if let Some(kernel) = &node.kernel {
            leaks(node, ledger, kernel, found);
            interfaces(node, ledger, kernel, found);
        }
        if let (Some(view), Some(kernel), Some(identity)) = (facts.view, &node.kernel, &ledger.identity) {
            confirmed(view, node, kernel, &identity.incarnation, found);
        }
        if let (Some(view), Some(identity), false) = (facts.view, &ledger.identity, facts.is_restoring) {
            reservations(view, node, ledger, &identity.incarnation, found);
        }
    }
    if let (Some(view), false) = (facts.view, facts.is_restoring) {
        owners(view, node, found);
    }
}

/// I3: the counts of each block add up to its size, and no address is used twice.
fn conservation(node: &NodeFacts, ledger: &LedgerFacts, found: &mut Vec<Deviation>) {
    const REMEDY: &str = "restart the node's agent, and report the contents of its ledger";
    let mut add =
        |what: String| found.push(deviation(Invariant::Conservation, Some(&node.name), what, REMEDY));
    let mut used = BTreeSet::new();
    let all = ledger.attachments.iter().flat_map(|held| &held.addresses).chain(&ledger.gateways);
    for address in all {
        if !used.insert(*address) {
            add(format!("{address} is used twice in the ledger of {}", node.name));
        }
    }
    for (number, (owned, counts)) in ledger.blocks.iter().enumerate() {
        let cidr = owned.block.cidr();
        if let Some((other, _)) =
            ledger.blocks[..number].iter().find(|(other, _)| other.block.cidr().overlaps(cidr))
        {
            add(format!(
                "block {} overlaps block {} in the ledger of {}",
                owned.block, other.block, node.name
            ));
        }
        let Some(counts) = counts else { continue };
        let size = 1_u128 << (owned.block.family().bits() - cidr.length()).min(127);
        let sum = counts.used + counts.resting + counts.free + counts.excluded;
        if u128::from(sum) != size {
            add(format!("block {} has {size} addresses, but {counts:?} add up to {sum}", owned.block));
        }
        let inside = used.iter().filter(|address| cidr.has(**address)).count() as u64;
        if inside != counts.used {
            add(format!(
                "block {} counts {} used addresses, but {inside} are used",
                owned.block, counts.used
            ));
        }
    }
}

/// I8: the ledger contains every address that ADD returned to the runtime.
fn check_promised(node: &NodeFacts, ledger: &LedgerFacts, found: &mut Vec<Deviation>) {
    for (attachment, addresses) in &node.promised {
        let held = ledger.attachments.iter().find(|held| held.attachment == *attachment);
        if held.is_none_or(|held| held.addresses != *addresses) {
            let what = format!(
                "{attachment} was given {addresses:?}, but the ledger of {} does not list them",
                node.name
            );
            found.push(deviation(Invariant::Durable, Some(&node.name), what, "delete the pod"));
        }
    }
}

/// I9: a removed node that confirmed that its pods are gone has no pod interface.
fn confirmed(
    view: &View,
    node: &NodeFacts,
    kernel: &KernelFacts,
    own: &Incarnation,
    found: &mut Vec<Deviation>,
) {
    let is_confirmed = view.fences.get(own).is_some_and(|fence| fence.record.pods == PodsGone::Confirmed);
    if let (true, Some(interface)) = (is_confirmed, kernel.interfaces.first()) {
        let what = format!(
            "node {} was removed and its pods are confirmed gone, but {} is still running",
            node.name, interface.attachment
        );
        found.push(deviation(Invariant::Fenced, Some(&node.name), what, "delete the pod"));
    }
}

/// I4: attachments whose interface or namespace is gone.
fn leaks(node: &NodeFacts, ledger: &LedgerFacts, kernel: &KernelFacts, found: &mut Vec<Deviation>) {
    for held in ledger.attachments.iter().filter(|held| !node.in_flight.contains(&held.attachment)) {
        if !is_alive(held, kernel) {
            let what =
                format!("{} on {} has {:?} but no interface", held.attachment, node.name, held.addresses);
            let remedy = "the node's agent releases it after its grace period";
            let mut leak = deviation(Invariant::NoLeak, Some(&node.name), what, remedy);
            leak.repair = Some(Repair::Release(held.attachment.clone()));
            found.push(leak);
        }
    }
}

fn is_alive(held: &AttachmentEntry, kernel: &KernelFacts) -> bool {
    match held.kind {
        AttachmentKind::Pod => {
            kernel.interfaces.iter().any(|interface| interface.attachment == held.attachment)
        }
        // Without a known namespace, only DEL ends the attachment.
        AttachmentKind::Lease => held.netns.is_empty() || kernel.namespaces.contains(&held.netns),
    }
}

/// I5: interfaces with addresses that the ledger does not list for them.
fn interfaces(node: &NodeFacts, ledger: &LedgerFacts, kernel: &KernelFacts, found: &mut Vec<Deviation>) {
    for Interface { attachment, addresses } in &kernel.interfaces {
        // The addresses of a failed ADD stay in the ledger until its interface is gone, also while a task works on it.
        let held = ledger.attachments.iter().find(|held| held.attachment == *attachment);
        if held.is_none() && node.in_flight.contains(attachment) {
            // DEL ended before its ADD: the next pass deletes the interface, and its addresses are in cool-down until
            // then.
            continue;
        }
        for address in addresses {
            if !held.is_some_and(|held| held.addresses.contains(address)) {
                let what = format!(
                    "{attachment} on {} uses {address}, which is not in the ledger: the address could be \
                     assigned again",
                    node.name
                );
                found.push(deviation(Invariant::NoEarlyFree, Some(&node.name), what, "delete the pod"));
            }
        }
    }
    for gateway in &kernel.gateways {
        if !ledger.gateways.contains(gateway)
            && ledger.attachments.iter().any(|held| held.addresses.contains(gateway))
        {
            let what = format!("{gateway} is both the gateway address of {} and a pod address", node.name);
            found.push(deviation(Invariant::NoEarlyFree, Some(&node.name), what, "delete the pod"));
        }
    }
}

/// I2: pods and gateways use only addresses of blocks that the node claims, and reserved addresses that it holds.
fn owners(view: &View, node: &NodeFacts, found: &mut Vec<Deviation>) {
    let incarnation =
        node.ledger.as_ref().and_then(|ledger| ledger.identity.as_ref()).map(|own| &own.incarnation);
    let living: Vec<Interface> = match (&node.kernel, &node.ledger) {
        (Some(kernel), _) => kernel.interfaces.clone(),
        (None, Some(ledger)) => ledger
            .attachments
            .iter()
            .map(|held| Interface { attachment: held.attachment.clone(), addresses: held.addresses.clone() })
            .collect(),
        (None, None) => return,
    };
    for gateway in node.kernel.iter().flat_map(|kernel| &kernel.gateways) {
        let claim = view.blocks.iter().find(|(block, _)| block.cidr().has(*gateway));
        if let Some((block, claim)) = claim.filter(|(_, claim)| claim.record.node != node.name) {
            let what = format!(
                "{} itself has {gateway}, but block {block} is claimed by node {}",
                node.name, claim.record.node
            );
            found.push(deviation(Invariant::Owner, Some(&node.name), what, "restart the node's agent"));
        }
    }
    for Interface { attachment, addresses } in &living {
        for address in addresses {
            if let Err(why) = check_owner(view, node, incarnation, *address) {
                let what = format!("{attachment} on {} uses {address}: {why}", node.name);
                found.push(deviation(Invariant::Owner, Some(&node.name), what, "delete the pod"));
            }
        }
    }
}

/// Reason why an address in use on a node does not belong to it.
#[derive(Debug, thiserror::Error)]
enum NotOwned<'a> {
    /// The reservation of the address names an attachment of another node as its holder.
    /// Remedy: delete the pod.
    #[error("it is held by {} on node {}", .0.attachment, .0.node)]
    HeldByAnother(&'a Holder),
    /// The reservation of the address names no holder.
    /// Remedy: delete the pod.
    #[error("the reservation has no holder")]
    HeldByNobody,
    /// The node is releasing the block of the address, which must have no user.
    /// Remedy: delete the pod.
    #[error("block {0} is being released")]
    Released(Block),
    /// Another node owns the block of the address.
    /// Remedy: delete the pod.
    #[error("block {block} is claimed by node {node}")]
    ClaimedByAnother {
        /// The block.
        block: Block,
        /// Its owner.
        node: &'a NodeName,
    },
    /// No node owns the block of the address.
    /// Remedy: delete the pod.
    #[error("its block is not claimed")]
    ClaimedByNobody,
}

fn check_owner<'a>(
    view: &'a View,
    node: &NodeFacts,
    own: Option<&Incarnation>,
    address: IpAddr,
) -> Result<(), NotOwned<'a>> {
    let Some(pool) = view.pools.values().find(|pool| pool.record.cidr().has(address)) else { return Ok(()) };
    let mine = |name: &NodeName, incarnation: &Incarnation| {
        *name == node.name && own.is_none_or(|own| own == incarnation)
    };
    if pool.record.purpose == Purpose::Reservations {
        let holder = view.reservations.get(&address).and_then(|known| known.record.holder.as_ref());
        return match holder {
            Some(holder) if mine(&holder.node, &holder.incarnation) => Ok(()),
            Some(holder) => Err(NotOwned::HeldByAnother(holder)),
            None => Err(NotOwned::HeldByNobody),
        };
    }
    // The node takes a block missing in its ledger from the records. A block that it is releasing must have no user.
    let mut owned = node.ledger.iter().flat_map(|ledger| &ledger.blocks).map(|(owned, _)| owned);
    if let Some(owned) = owned.find(|owned| owned.leaving && owned.block.cidr().has(address)) {
        return Err(NotOwned::Released(owned.block));
    }
    let claim = view.blocks.iter().find(|(block, _)| block.cidr().has(address));
    match claim {
        Some((_, claim)) if mine(&claim.record.node, &claim.record.incarnation) => Ok(()),
        Some((block, claim)) => Err(NotOwned::ClaimedByAnother { block: *block, node: &claim.record.node }),
        None => Err(NotOwned::ClaimedByNobody),
    }
}

/// I4: reserved addresses whose attachment does not exist.
fn reservations(
    view: &View,
    node: &NodeFacts,
    ledger: &LedgerFacts,
    own: &Incarnation,
    found: &mut Vec<Deviation>,
) {
    for (address, known) in &view.reservations {
        let Some(holder) = known.record.holder.as_ref().filter(|holder| holder.incarnation == *own) else {
            continue;
        };
        let held = ledger.attachments.iter().any(|held| held.addresses.contains(address));
        if !held && !node.in_flight.contains(&holder.attachment) {
            let what =
                format!("{address} is held for {} on {}, which does not exist", holder.attachment, node.name);
            let remedy = "the node's agent releases it within seconds while it runs";
            let mut leak = deviation(Invariant::NoLeak, Some(&node.name), what, remedy);
            leak.repair = Some(Repair::ReleaseReservation(*address));
            found.push(leak);
        }
    }
}
