//! What an operator does: pools, and nodes that are gone.

use polder_api::NodeName;
use polder_ipam::Pool;
use polder_ipam::change::Change;
use polder_ipam::ledger::Ledger;
use polder_ipam::pool::{PoolState, Purpose};
use polder_ipam::record::Life;
use polder_ipam::removal::{Vouched, remove};
use polder_ipam::steward::adopt;
use polder_ipam::store::Outcome;
use polder_ipam::transaction::transaction;

use crate::settings::pool;
use crate::world::World;

/// Adds a pool that was not there, if there is none of that name.
pub fn add_pool(world: &mut World) -> bool {
    if world.truth.cluster.is_none() {
        return false;
    }
    let as_of = world.etcd.revision();
    commit(world, &Change::AddPool { by: None, pool: pool("more", "10.1.0.0/27", 30), as_of })
}

/// Lets a pool be drained, or used again.
pub fn turn_pool(world: &mut World) -> bool {
    let blocks = |pool: &&Pool| pool.purpose == Purpose::Blocks;
    let pools: Vec<_> =
        world.truth.pools.values().map(|known| (known.revision, (*known.record).clone())).collect();
    let pools: Vec<_> = pools.into_iter().filter(|(_, pool)| blocks(&pool)).collect();
    if pools.is_empty() {
        return false;
    }
    let (revision, pool) = world.random.one_of(&pools).clone();
    let state = if pool.state == PoolState::Active { PoolState::Draining } else { PoolState::Active };
    set_state(world, revision, &pool, state)
}

/// Lets all pools be used.
pub fn open_all_pools(world: &mut World) {
    let pools: Vec<_> = world.truth.pools.values().cloned().collect();
    for pool in pools.iter().filter(|pool| pool.record.state != PoolState::Active) {
        set_state(world, pool.revision, &pool.record, PoolState::Active);
    }
}

fn set_state(world: &mut World, revision: i64, pool: &Pool, state: PoolState) -> bool {
    commit(world, &Change::ReplacePool { pool: pool.in_state(state), revision })
}

/// Removes a node; true if it is removed then. Nobody vouches for pods that live.
pub fn remove_node(world: &mut World, name: &NodeName, vouched: Vouched) -> bool {
    let change = remove(&world.truth, name, vouched);
    change.is_ok_and(|change| change.is_none_or(|change| commit(world, &change)))
}

/// Lets a machine take the place of one that is gone: with its ledger as the same node, without it as a new one.
pub fn take_place(world: &mut World, index: usize) {
    let machine = &world.machines[index];
    let Some(node) = world.truth.nodes.get(&machine.name) else { return };
    if Life::from(&*node.record) == machine.life() {
        return;
    }
    let (name, identity) = (machine.name.clone(), machine.disk.identity().ok().flatten());
    match adopt(&world.truth, &name, &name, identity.as_ref(), machine.life()) {
        Ok(adopted) => {
            if let Some(agent) = &mut world.machines[index].agent {
                agent.adopted = adopted;
                agent.news = true;
                world.count("node adopted");
            }
        }
        Err(_) => drop(remove_node(world, &name, Vouched::Yes)),
    }
}

fn commit(world: &mut World, change: &Change) -> bool {
    let outcome = world.etcd.commit(&transaction(change));
    world.look();
    matches!(outcome, Ok(Outcome::Applied { .. }))
}
