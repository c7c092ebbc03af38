//! Looks whether all that must hold does.

use std::collections::{BTreeMap, BTreeSet};

use polder_ipam::Moment;
use polder_ipam::invariants::{
    Deviation, Facts, Interface, KernelFacts, LedgerFacts, NodeFacts, Published, check,
};
use polder_ipam::key::Key;
use polder_ipam::ledger::{Ledger, Standing};

use crate::world::{Keeping, Machine, World};

/// How much is held against what is under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Strictness {
    /// What has no interface may be about to be noticed.
    Lenient,
    /// Nothing is under way any more.
    Strict,
}

/// What does not hold.
pub fn judge(world: &mut World, strictness: Strictness) -> Vec<Deviation> {
    let nodes: Vec<NodeFacts> =
        world.machines.iter().map(|machine| node(world, machine, strictness)).collect();
    let published = match strictness {
        Strictness::Lenient => Vec::new(),
        Strictness::Strict => published(world),
    };
    let facts = Facts {
        view: Some(&world.truth),
        putting_back: world.putting_back,
        published: &published,
        nodes: &nodes,
    };
    let mut found = check(&facts);
    found.extend(world.history.observe(&facts, Moment::from_millis(world.now)));
    found.append(&mut world.found);
    found
}

/// What does not hold.
#[derive(Debug)]
pub struct Wrong {
    /// What should hold.
    pub deviations: Vec<Deviation>,
    /// What should have come to pass, and has not.
    pub wanting: Vec<String>,
}

/// Judges the world. Lost records that have been put back are missed from then on.
pub fn holds(world: &mut World, strictness: Strictness) -> Result<(), Wrong> {
    if world.putting_back && is_put_back(world) {
        world.putting_back = false;
    }
    let deviations = judge(world, strictness);
    if deviations.is_empty() { Ok(()) } else { Err(Wrong { deviations, wanting: Vec::new() }) }
}

/// Whether all agents have noticed that records were lost, and had time to put them back.
fn is_put_back(world: &World) -> bool {
    world.machines.iter().filter(|machine| !machine.is_destroyed).all(|machine| {
        machine.agent.as_ref().is_some_and(|agent| {
            // An agent that was started since learns of no loss.
            let is_done = world.keeping == Keeping::Etcd || agent.last_step == "Settled";
            is_done
                && agent.view.cluster.is_some()
                && agent.view.revision == world.etcd.revision()
                && !agent.is_cautious()
                && !agent.news
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
                .chain(&machine.kernel.overtaken)
                .cloned()
                .collect()
        }
    };
    let serves = machine.agent.as_ref().is_some_and(|agent| !agent.is_forbidden());
    // A node that was removed breaks its promises.
    let is_removed = ledger.as_ref().and_then(|ledger| ledger.identity.as_ref());
    let is_removed = is_removed.is_some_and(|identity| identity.standing == Standing::Removed);
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
            // A machine that has no pods and must not serve uses none: a copy of a ledger names those of the original.
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

fn published(world: &World) -> Vec<Published> {
    let found = world.etcd.range(&Key::all_addresses());
    let read = |entry: &polder_ipam::store::Entry| match entry.key.parse() {
        Ok(Key::Address(node, address)) => {
            let record = polder_ipam::record::address(&entry.value).ok()?;
            Some(Published { node, address, record })
        }
        _ => None,
    };
    found.entries.iter().filter_map(read).collect()
}
