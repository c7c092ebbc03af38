//! Invariants between the datastore's records.

use std::net::IpAddr;

use super::{ClusterReport, Deviation, Invariant, Repair, deviation};
use crate::ids::Incarnation;
use crate::key::Key;
use crate::pool::Purpose;
use crate::record::PodsGone;
use crate::reservation;
use crate::view::View;

const CLAIM_REMEDY: &str =
    "it was written by hand: check which pods have addresses in it, and delete the other record";

pub(super) fn check(facts: &ClusterReport<'_>, found: &mut Vec<Deviation>) {
    let Some(view) = facts.view else { return };
    pools(view, found);
    claims(view, found);
    for (name, node) in &view.nodes {
        if view.fences.contains_key(&node.record.incarnation) {
            let what = format!("node {name} is registered as an incarnation that was removed");
            let remedy = "restart its agent; if it is gone, remove it again with polderctl node remove";
            found.push(deviation(Invariant::Fenced, Some(name), what, remedy));
        }
    }
    if !facts.is_restoring {
        orphans(view, found);
    }
    published(facts, view, found);
}

fn pools(view: &View, found: &mut Vec<Deviation>) {
    let pools: Vec<_> = view.pools.values().map(|known| &known.record).collect();
    for (number, pool) in pools.iter().enumerate() {
        if let Some(other) = pools[..number].iter().find(|other| other.cidr().overlaps(pool.cidr())) {
            let what = format!("pool {} overlaps pool {}", pool.name, other.name);
            let remedy = "drain and remove the one that was created by mistake";
            found.push(deviation(Invariant::BlockTree, None, what, remedy));
        }
    }
}

fn claims(view: &View, found: &mut Vec<Deviation>) {
    let mut before: Vec<crate::Block> = Vec::new();
    for (block, known) in &view.blocks {
        let (key, claim) = (Key::Block(*block), &known.record);
        let mut add = |what: String, remedy: &str| {
            found.push(deviation(Invariant::BlockTree, Some(&claim.node), what, remedy));
        };
        // In key order, a block follows all blocks that contain it.
        before.retain(|outer| outer.cidr().overlaps(block.cidr()));
        if let Some(outer) = before.last() {
            add(format!("claim {key} overlaps the claim of {outer}"), CLAIM_REMEDY);
        }
        before.push(*block);
        match view.pools.get(&claim.pool) {
            // A pool that cannot be decoded or used is reported elsewhere.
            None if view.refused.keys().any(|key| key.contains("/pools/")) => {}
            None => add(
                format!("claim {key} is from pool {}, which does not exist", claim.pool),
                "add the pool again, or delete the claim when no pod has an address in it",
            ),
            Some(pool) if !pool.record.has_block(*block) || pool.record.purpose != Purpose::Blocks => {
                add(format!("claim {key} is not a block of pool {}", claim.pool), CLAIM_REMEDY);
            }
            Some(_) => {}
        }
    }
}

/// Claims and held addresses of unknown incarnations: neither a registered node nor a removed one.
fn orphans(view: &View, found: &mut Vec<Deviation>) {
    let known = |incarnation: &Incarnation| {
        view.fences.contains_key(incarnation)
            || view.nodes.values().any(|node| node.record.incarnation == *incarnation)
    };
    for (block, claim) in view.blocks.iter().filter(|(_, claim)| !known(&claim.record.incarnation)) {
        let what = format!("block {block} belongs to an unknown incarnation of node {}", claim.record.node);
        let remedy = "start the agent of that node; if the node is gone, delete the claim";
        found.push(deviation(Invariant::NoLeak, Some(&claim.record.node), what, remedy));
    }
    for (address, known_as) in &view.reservations {
        if reservation::pool_of(view, *address).is_none() {
            let what = format!("reserved address {address} is not in a pool for reservations");
            found.push(deviation(
                Invariant::BlockTree,
                None,
                what,
                "add the pool again, or release the address",
            ));
        }
        let Some(holder) = &known_as.record.holder else { continue };
        if !known(&holder.incarnation) {
            let what =
                format!("reserved address {address} is held by {}, whose node is unknown", holder.attachment);
            let remedy = "if node and pod are permanently gone, run polderctl ipam release --dead";
            found.push(deviation(Invariant::NoLeak, Some(&holder.node), what, remedy));
        }
    }
}

/// Records of addresses that their node does not have.
fn published(facts: &ClusterReport<'_>, view: &View, found: &mut Vec<Deviation>) {
    for published in facts.published {
        let (node, address) = (&published.node, published.address);
        let stale = match facts.nodes.iter().find(|known| known.name == *node) {
            Some(known) => {
                let attachment = &published.record.attachment;
                let Some(ledger) = &known.ledger else { continue };
                let has = |held: &crate::ledger::AttachmentEntry| {
                    held.attachment == *attachment && held.addresses.contains(&address)
                };
                !known.in_flight.contains(attachment) && !ledger.attachments.iter().any(has)
            }
            None => !facts.is_restoring && !can_own(view, published.node.as_str(), address),
        };
        if stale {
            let what = format!(
                "the datastore lists {address} for {} on {node}, which does not have it",
                published.record.attachment
            );
            let remedy = "the node's agent withdraws it within seconds while it runs";
            let mut stale = deviation(Invariant::NoLeak, Some(node), what, remedy);
            stale.repair = Some(Repair::Withdraw(address));
            found.push(stale);
        }
    }
}

/// Whether a node of that name could have the address, according to the records.
fn can_own(view: &View, node: &str, address: IpAddr) -> bool {
    let gone = |incarnation: &Incarnation| {
        view.fences.get(incarnation).is_some_and(|fence| fence.record.pods != PodsGone::Unknown)
    };
    let in_pool = view.pools.values().find(|pool| pool.record.cidr().has(address));
    match in_pool.map(|pool| pool.record.purpose) {
        // The address is from another IPAM plugin.
        None => true,
        Some(Purpose::Reservations) => {
            let holder = view.reservations.get(&address).and_then(|known| known.record.holder.as_ref());
            holder.is_some_and(|holder| holder.node.as_str() == node && !gone(&holder.incarnation))
        }
        Some(Purpose::Blocks) => view.blocks.iter().any(|(block, claim)| {
            block.cidr().has(address)
                && claim.record.node.as_str() == node
                && !gone(&claim.record.incarnation)
        }),
    }
}
