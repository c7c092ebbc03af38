//! Checks the invariants.

use std::collections::{BTreeMap, BTreeSet};

use polder_ipam::Moment;
use polder_ipam::invariants::{
    ClusterReport, Deviation, Interface, KernelFacts, LedgerFacts, NodeFacts, PublishedAddress, check,
};
use polder_ipam::key::Key;
use polder_ipam::ledger::{Ledger, MemberState};

use crate::world::{Machine, StoreKind, World};

/// How to treat operations in flight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Strictness {
    /// A ledger entry without an interface may still be in flight.
    Lenient,
    /// Nothing is in flight any more.
    Strict,
}

/// The invariants that are violated.
pub fn find_violations(world: &mut World, strictness: Strictness) -> Vec<Deviation> {
    let nodes: Vec<NodeFacts> =
        world.machines.iter().map(|machine| node(world, machine, strictness)).collect();
    let published = match strictness {
        Strictness::Lenient => Vec::new(),
        Strictness::Strict => published(world),
    };
    let facts = ClusterReport {
        view: Some(&world.truth),
        is_restoring: world.is_restoring,
        published: &published,
        nodes: &nodes,
    };
    let mut found = check(&facts);
    found.extend(world.history.observe(&facts, Moment::from_millis(world.now)));
    found.append(&mut world.found);
    found
}

/// The result of a failed check.
#[derive(Debug)]
pub struct CheckFailure {
    /// The violated invariants.
    pub deviations: Vec<Deviation>,
    /// Expected outcomes that have not occurred.
    pub unrecovered: Vec<String>,
}

/// Checks the world. Once lost records are restored, missing records count as violations again.
pub fn check_invariants(world: &mut World, strictness: Strictness) -> Result<(), CheckFailure> {
    if world.is_restoring && is_restored(world) {
        world.is_restoring = false;
    }
    let deviations = find_violations(world, strictness);
    if deviations.is_empty() { Ok(()) } else { Err(CheckFailure { deviations, unrecovered: Vec::new() }) }
}

/// Whether all agents have detected the loss of records, and have had time to restore them.
fn is_restored(world: &World) -> bool {
    world.machines.iter().filter(|machine| !machine.is_destroyed).all(|machine| {
        machine.agent.as_ref().is_some_and(|agent| {
            // An agent that started after the loss does not detect it.
            let is_done = world.store_kind == StoreKind::Etcd || agent.last_step == "Settled";
            is_done
                && agent.view.cluster.is_some()
                && agent.view.revision == world.etcd.revision()
                && !agent.holds_off()
                && !agent.must_check_records
        })
    })
}

fn node(world: &World, machine: &Machine, strictness: Strictness) -> NodeFacts {
    let interfaces = &machine.kernel.interfaces;
    let ledger = machine.ledger_is_whole.then(|| ledger(machine));
    let in_flight: BTreeSet<_> = match strictness {
        Strictness::Strict => BTreeSet::new(),
        Strictness::Lenient => {
            let held =
                ledger.iter().flat_map(|ledger| ledger.attachments.iter().map(|held| &held.attachment));
            let holders = world.truth.reservations.values().filter_map(|known| known.record.holder.as_ref());
            held.chain(holders.map(|holder| &holder.attachment))
                .filter(|attachment| !interfaces.contains_key(attachment))
                .chain(&machine.kernel.deleted_meanwhile)
                .cloned()
                .collect()
        }
    };
    let serves = machine.agent.as_ref().is_some_and(|agent| !agent.is_forbidden());
    // A removed node does not keep its guarantees.
    let is_removed = ledger.as_ref().and_then(|ledger| ledger.identity.as_ref());
    let is_removed = is_removed.is_some_and(|identity| identity.member_state == MemberState::Removed);
    NodeFacts {
        name: machine.name.clone(),
        boot_id: machine.boot_id.clone(),
        ledger,
        kernel: Some(KernelFacts {
            interfaces: interfaces
                .iter()
                .map(|(attachment, addresses)| Interface {
                    attachment: attachment.clone(),
                    addresses: addresses.clone(),
                })
                .collect(),
            // A machine without pods that must not serve uses none of its addresses: a copied ledger lists those of
            // the original.
            gateways: if serves || !interfaces.is_empty() {
                machine.kernel.gateways.clone()
            } else {
                Vec::new()
            },
            namespaces: BTreeSet::new(),
        }),
        in_flight,
        promised: if is_removed { BTreeMap::new() } else { machine.promised.clone() },
    }
}

fn ledger(machine: &Machine) -> LedgerFacts {
    let disk = machine.disk.ledger();
    let counts = machine.agent.as_ref().map(|agent| agent.ipam.counts(machine.now())).unwrap_or_default();
    let count = |block| counts.iter().find(|(owned, _)| owned.block == block).map(|(_, counts)| *counts);
    // A ledger in memory always answers.
    LedgerFacts {
        identity: disk.identity().unwrap_or_default(),
        blocks: disk
            .blocks()
            .unwrap_or_default()
            .into_iter()
            .map(|owned| (owned.clone(), count(owned.block)))
            .collect(),
        gateways: disk.gateways().unwrap_or_default(),
        attachments: disk.attachments().unwrap_or_default(),
    }
}

fn published(world: &World) -> Vec<PublishedAddress> {
    let found = world.etcd.range(&Key::all_addresses());
    let read = |entry: &polder_ipam::store::Entry| match entry.key.parse() {
        Ok(Key::Address(node, address)) => {
            let record = polder_ipam::record::address(&entry.value).ok()?;
            Some(PublishedAddress { node, address, record })
        }
        _ => None,
    };
    found.entries.iter().filter_map(read).collect()
}
