//! The properties that must hold in every state.

use std::collections::BTreeSet;

use polder_ipam::allocator::Counts;
use polder_ipam::ledger::OwnedBlock;
use stateright::Property;

use super::cluster::{Cluster, Violation};
use super::machine::{Agent, Machine, Power};
use super::task::Job;
use super::{RESERVED, Space};

/// With this many pods or more, a node may need another block.
const A_BLOCK: u8 = 3;

/// All properties.
pub(super) fn all() -> Vec<Property<Space>> {
    vec![
        Property::always("no address is on two live pods", no_address_is_on_two),
        Property::always("a live address is its node's, or reserved for it", every_address_is_owned),
        Property::always("claims are disjoint, and inside their pools", claims_are_disjoint),
        Property::always("a removed node changes nothing", |_, cluster| {
            has_not(cluster, Violation::WroteAfterFence)
        }),
        Property::always("a removed node's blocks are held until its pods are gone", |_, cluster| {
            has_not(cluster, Violation::BlockReleasedEarly)
        }),
        Property::always("a confirmed removal has no pods left", |_, cluster| {
            has_not(cluster, Violation::ConfirmedEarly)
        }),
        Property::always("an address is in cool-down before another pod gets it", |_, cluster| {
            has_not(cluster, Violation::ReusedInCoolDown)
        }),
        Property::always("a DEL releases nothing of other pods", |_, cluster| {
            has_not(cluster, Violation::ReleasedOthers)
        }),
        Property::always("a live pod's address is used in the ledger", every_pod_is_in_the_ledger),
        Property::always("no address is lost", no_address_is_lost),
        Property::always("no block request is served twice", no_block_request_is_served_twice),
        Property::always(
            "a reserved address is kept only for a pod that is being added",
            reserved_addresses_are_kept_only_during_adds,
        ),
    ]
}

fn has_not(cluster: &Cluster, violation: Violation) -> bool {
    cluster.violation != Some(violation)
}

fn running(cluster: &Cluster) -> impl Iterator<Item = &Machine> {
    cluster.machines.iter().map(|machine| &**machine).filter(|machine| machine.power == Power::On)
}

fn no_address_is_on_two(_: &Space, cluster: &Cluster) -> bool {
    let mut seen = BTreeSet::new();
    cluster.machines.iter().flat_map(|machine| machine.live()).all(|address| seen.insert(address))
}

fn every_address_is_owned(_: &Space, cluster: &Cluster) -> bool {
    let view = &cluster.truth.view;
    running(cluster).all(|machine| {
        let Some(identity) = machine.identity() else { return machine.live().next().is_none() };
        machine.live().all(|address| {
            if address == RESERVED {
                let holder = view.reservations.get(&address).and_then(|known| known.record.holder.as_ref());
                return holder.is_some_and(|holder| {
                    let has_it = |(container, addresses): (&u8, &Vec<_>)| {
                        addresses.contains(&address) && *machine.attachment(*container) == holder.attachment
                    };
                    holder.incarnation == identity.incarnation && machine.plugged.iter().any(has_it)
                });
            }
            let claim = view.blocks.iter().find(|(block, _)| block.cidr().has(address));
            claim.is_some_and(|(_, claim)| claim.record.incarnation == identity.incarnation)
        })
    })
}

fn claims_are_disjoint(_: &Space, cluster: &Cluster) -> bool {
    let view = &cluster.truth.view;
    let blocks: Vec<_> = view.blocks.keys().collect();
    let apart = blocks
        .iter()
        .enumerate()
        .all(|(index, block)| blocks[..index].iter().all(|other| !other.cidr().overlaps(block.cidr())));
    apart
        && view.blocks.iter().all(|(block, claim)| {
            view.pools.get(&claim.record.pool).is_some_and(|pool| pool.record.has_block(*block))
        })
}

fn every_pod_is_in_the_ledger(_: &Space, cluster: &Cluster) -> bool {
    running(cluster).all(|machine| {
        machine.plugged.iter().all(|(container, addresses)| {
            machine.ipam.get(machine.attachment(*container)).is_some_and(|held| held.addresses == *addresses)
        })
    })
}

fn no_address_is_lost(_: &Space, cluster: &Cluster) -> bool {
    running(cluster).all(|machine| {
        let counts = machine.ipam.counts(machine.now(cluster.tick));
        counts.iter().all(|(owned, counts): &(OwnedBlock, Counts)| {
            let size = 1_u64 << (32 - owned.block.cidr().length());
            counts.used + counts.resting + counts.free + counts.excluded == size
        })
    })
}

fn reserved_addresses_are_kept_only_during_adds(_: &Space, cluster: &Cluster) -> bool {
    running(cluster).all(|machine| {
        let Agent { adding, registrar, locked, .. } = &machine.agent;
        let mut deleted_meanwhile = machine.ipam.deleted_meanwhile().peekable();
        if deleted_meanwhile.peek().is_some() {
            // An overtaken attachment stays only until the task that locks it is done.
            return deleted_meanwhile.all(|attachment| locked.contains(attachment));
        }
        let own = machine.ipam.allocations(machine.now(cluster.tick)).expect("a ledger in memory");
        let is_handing_over =
            || registrar.as_ref().is_some_and(|stopped| matches!(*stopped.job, Job::HandOver(..)));
        own.expected.is_empty() || adding.is_some() || is_handing_over()
    })
}

/// Two claims per node are allowed only if the node could not know of the first: a transaction took effect late, its
/// outcome could not be read, or the agent crashed.
fn no_block_request_is_served_twice(space: &Space, cluster: &Cluster) -> bool {
    let (remaining, limits) = (&cluster.remaining, &space.limits);
    let accountable = remaining.late == limits.late
        && remaining.failed_reads == limits.failed_reads
        && remaining.timeouts == limits.timeouts
        && remaining.crashes == limits.crashes
        && remaining.reboots == limits.reboots
        && remaining.block_requests == limits.block_requests
        && limits.pods < A_BLOCK;
    if !accountable {
        return true;
    }
    let claims = || cluster.truth.view.blocks.values().map(|claim| &claim.record.incarnation);
    claims().all(|incarnation| claims().filter(|other| *other == incarnation).count() == 1)
}
