//! Changes of pools: add, drain, remove. Each is one change, or is refused with the reason.
//!
//! Pure: computed from all records at one revision. A change names the records that it depends on: pools that do not
//! overlap when it is computed do not overlap when it is applied, and an empty pool is still empty then. Every
//! request can be repeated.

use std::collections::BTreeMap;
use std::net::IpAddr;

use polder_api::{NodeName, PoolName};

use crate::capacity::LargestOwners;
use crate::change::Change;
use crate::key::Key;
use crate::needed;
use crate::pool::{Block, Pool, PoolState, Purpose, format_labels};
use crate::view::{Versioned, View};

mod reason;

pub use self::reason::{NotChanged, Users};

/// The result of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// The requested state already exists; the message about it.
    NothingToDo(String),
    /// The change leads to the requested state.
    Commit {
        /// The change.
        change: Box<Change>,
        /// The message for when the change is applied.
        success_message: String,
    },
}

/// Adds the pool; a draining pool with the same parameters becomes active again.
pub fn add(view: &View, pool: &Pool) -> Result<Decision, NotChanged> {
    let name = &pool.name;
    if let Some(known) = view.any_pool(name) {
        let there = &*known.record;
        if *there != pool.in_state(there.state) {
            return Err(NotChanged::Different { name: name.clone(), there: describe(there) });
        }
        if there.state == PoolState::Active {
            return Ok(Decision::NothingToDo(format!("pool {name} already exists: {}", describe(there))));
        }
        check_range(view, pool)?;
        let again = there.in_state(PoolState::Active);
        return Ok(Decision::Commit {
            change: Box::new(Change::ReplacePool { pool: again, revision: known.revision }),
            success_message: format!("pool {name} is active again: {}", describe(there)),
        });
    }
    check_room(view, pool)?;
    Ok(Decision::Commit {
        change: Box::new(Change::AddPool { by: None, pool: pool.clone(), as_of: view.revision }),
        success_message: format!("pool {name} is added: {}", describe(pool)),
    })
}

/// Checks whether pods can use the range of the pool, as far as this node knows the addresses in use around it.
pub fn check_range(view: &View, pool: &Pool) -> Result<(), NotChanged> {
    pool.check_use()?;
    let cidr = pool.cidr();
    if let Some(address) = view.own_addresses.iter().find(|address| cidr.has(**address)) {
        return Err(NotChanged::OwnAddress { cidr, address: *address });
    }
    if let Some(needed) = needed::overlapping(&view.needed, cidr) {
        let is_inside = needed.range.covers(cidr) && needed.range != cidr;
        let needed = needed.clone();
        return Err(if is_inside {
            NotChanged::Inside { cidr, needed }
        } else {
            NotChanged::Needed { cidr, needed }
        });
    }
    for (node, known) in &view.nodes {
        if let Some(address) = known.record.underlay.iter().find(|address| cidr.has(**address)) {
            return Err(NotChanged::Underlay { cidr, address: *address, node: node.clone() });
        }
    }
    Ok(())
}

/// Checks whether a new pool conflicts with other pools, claims, reservations, or addresses in use.
fn check_room(view: &View, pool: &Pool) -> Result<(), NotChanged> {
    let cidr = pool.cidr();
    let pools = Key::all_pools();
    let unreadable = |key: &str| match key.parse() {
        Ok(Key::Pool(name)) => view.any_pool(&name).is_none(),
        _ => pools.has(key),
    };
    if let Some((key, reason)) = view.refused.iter().find(|(key, _)| unreadable(key)) {
        return Err(NotChanged::Unreadable { key: key.clone(), reason: reason.clone() });
    }
    if let Some(other) = view.every_pool().find(|other| other.record.cidr().overlaps(cidr)) {
        let (other, other_cidr) = (other.record.name.clone(), other.record.cidr());
        return Err(NotChanged::Overlaps { cidr, other, other_cidr });
    }
    // If the record of a pool was deleted by hand, its blocks belong to it again when it is restored.
    let own = |block: Block, known: Option<&PoolName>| known == Some(&pool.name) && pool.has_block(block);
    let claims = view.blocks.iter().map(|(block, known)| (*block, Some(&known.record.pool)));
    let unreadable = view.refused.keys().filter_map(|key| match key.parse() {
        Ok(Key::Block(block)) => Some((block, None)),
        _ => None,
    });
    let foreign = |(block, of): &(Block, Option<&PoolName>)| block.cidr().overlaps(cidr) && !own(*block, *of);
    if let Some((block, of)) = claims.chain(unreadable).find(foreign) {
        return Err(match of {
            Some(pool) => NotChanged::Claimed { cidr, block, pool: pool.clone() },
            None => NotChanged::ClaimedUnreadably { cidr, block },
        });
    }
    check_range(view, pool)?;
    let unreadable = view.refused.keys().filter_map(|key| unreadable_address(key));
    let mut reserved = view.reservations.keys().copied().chain(unreadable);
    let reserved = reserved.find(|address| cidr.has(*address));
    if let Some(address) = reserved.filter(|_| pool.purpose != Purpose::Reservations) {
        return Err(NotChanged::Reserved { cidr, address });
    }
    Ok(())
}

fn unreadable_address(key: &str) -> Option<IpAddr> {
    match key.parse() {
        Ok(Key::Reservation(address)) => Some(address),
        _ => None,
    }
}

/// Stops claims of blocks of the pool. Pods keep their addresses.
pub fn drain(view: &View, name: &PoolName) -> Result<Decision, NotChanged> {
    let known = find(view, name)?.ok_or_else(|| NotChanged::Unknown(name.clone()))?;
    if known.record.state != PoolState::Active {
        return Ok(Decision::NothingToDo(format!(
            "pool {name} is already drained: {}",
            drained(view, known)
        )));
    }
    let draining = known.record.in_state(PoolState::Draining);
    Ok(Decision::Commit {
        change: Box::new(Change::ReplacePool { pool: draining, revision: known.revision }),
        success_message: format!(
            "pool {name} is drained: new pods get no address from it; {}",
            drained(view, known)
        ),
    })
}

/// The remaining users of a drained pool and the consequences, as text.
fn drained(view: &View, known: &Versioned<Pool>) -> String {
    let pool = &*known.record;
    let (blocks, reserved) = users(view, pool);
    let count = blocks.values().sum::<usize>();
    if count == 0 && reserved.is_empty() {
        return format!("it is unused, remove it with polderctl pool remove {}", pool.name);
    }
    let rest = format!("{count} blocks and {} reserved addresses are still in use", reserved.len());
    let open = |other: &&Versioned<Pool>| {
        let other = &*other.record;
        other.name != pool.name && other.family() == pool.family() && other.is_open_to(&pool.nodes)
    };
    if pool.purpose == Purpose::Blocks && !view.pools.values().any(|other| open(&other)) {
        let family = pool.family();
        let is_other = |other: &&Versioned<Pool>| {
            let other = &*other.record;
            other.family() != family && other.state == PoolState::Active && other.purpose == Purpose::Blocks
        };
        if view.pools.values().any(|other| is_other(&other)) {
            return format!(
                "{rest}; there is no other active {family} pool for its nodes: new pods get no {family} \
                 address, and each node releases its last block when none of its pods uses it"
            );
        }
        return format!(
            "{rest}; there is no other active {family} pool for its nodes: they keep one block for their own \
             addresses, and cannot start pods that need another until you add a pool with polderctl pool add"
        );
    }
    rest
}

/// Removes the pool, if it is not in use.
pub fn remove(view: &View, name: &PoolName) -> Result<Decision, NotChanged> {
    let known = find(view, name)?.ok_or_else(|| NotChanged::Unknown(name.clone()))?;
    let pool = &*known.record;
    let (blocks, reserved) = users(view, pool);
    if !blocks.is_empty() || !reserved.is_empty() {
        let count = blocks.values().sum::<usize>();
        let users = Users {
            blocks: (!blocks.is_empty()).then(|| (count, LargestOwners::of(&blocks))),
            reserved: reserved.first().map(|first| (reserved.len(), *first)),
        };
        let name = name.clone();
        return Err(match (pool.state, pool.purpose) {
            (PoolState::Active, _) => NotChanged::Active { name, users },
            (_, Purpose::Reservations) => NotChanged::StillReserved { name, users },
            _ => NotChanged::StillClaimed { name, users },
        });
    }
    let change = Change::RemovePool {
        name: name.clone(),
        cidr: pool.cidr(),
        revision: known.revision,
        as_of: view.revision,
    };
    Ok(Decision::Commit {
        change: Box::new(change),
        success_message: format!("pool {name} is removed: {} is free for other uses", pool.cidr()),
    })
}

/// The pool; an error if its record cannot be read.
fn find<'a>(view: &'a View, name: &PoolName) -> Result<Option<&'a Versioned<Pool>>, NotChanged> {
    let key = Key::Pool(name.clone()).to_string();
    match (view.any_pool(name), view.refused.get(&key)) {
        (Some(known), _) => Ok(Some(known)),
        (None, Some(reason)) => Err(NotChanged::Unreadable { key, reason: reason.clone() }),
        (None, None) => Ok(None),
    }
}

/// The number of blocks inside the pool that each node has claimed, and the reserved addresses of the pool.
/// Unreadable records count as well.
fn users(view: &View, pool: &Pool) -> (BTreeMap<NodeName, usize>, Vec<IpAddr>) {
    let mut blocks: BTreeMap<NodeName, usize> = BTreeMap::new();
    for (_, known) in view.blocks.iter().filter(|(block, _)| block.cidr().overlaps(pool.cidr())) {
        *blocks.entry(known.record.node.clone()).or_default() += 1;
    }
    let mut reserved: Vec<IpAddr> = view.reservations.keys().copied().collect();
    for key in view.refused.keys() {
        match key.parse() {
            Ok(Key::Reservation(address)) => reserved.push(address),
            Ok(Key::Block(block)) if block.cidr().overlaps(pool.cidr()) => {
                let nobody = "unreadable".parse().expect("letters");
                *blocks.entry(nobody).or_default() += 1;
            }
            _ => {}
        }
    }
    reserved.retain(|address| pool.cidr().has(*address));
    (blocks, reserved)
}

/// The parameters of a pool, as text.
fn describe(pool: &Pool) -> String {
    let uses = match pool.purpose {
        Purpose::Blocks => format!("in blocks of /{}", pool.block_length()),
        Purpose::Reservations => "for reservations".to_owned(),
    };
    let nodes = if pool.nodes.is_empty() {
        "all nodes".to_owned()
    } else {
        format!("nodes with {}", format_labels(&pool.nodes))
    };
    format!("{} {uses}, for {nodes}", pool.cidr())
}

#[cfg(test)]
mod tests;
