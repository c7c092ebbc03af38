//! The cluster's pools and blocks, for an operator.

use std::collections::{BTreeMap, BTreeSet};

use polder_api::NodeName;
use polder_api::message::Refusal;
use polder_api::pool::{BlockStanding, ClaimStatus, PoolStatus};
use polder_ipam::capacity::ClaimedCount;
use polder_ipam::key::Key;
use polder_ipam::peers::validate;
use polder_ipam::tasks::published::PublishedAddresses;
use polder_ipam::view::View;
use polder_ipam::{Cidr, Pool};
use polder_store::Store;

use crate::node_state::Records;

/// The status of all pools, from the records that this node knows.
pub async fn list(records: &Records, store: &Store) -> Result<Vec<PoolStatus>, Refusal> {
    let (view, used) = (records.read()?, PublishedAddresses::read(store).await.ok());
    Ok(view.every_pool().map(|known| status(&view, &known.record, used.as_ref())).collect())
}

/// The status of one pool.
pub fn status(view: &View, pool: &Pool, used: Option<&PublishedAddresses>) -> PoolStatus {
    let claimed = ClaimedCount::of(view, pool);
    PoolStatus {
        name: pool.name.clone(),
        cidr: pool.cidr().into(),
        block_length: pool.block_length(),
        purpose: pool.purpose,
        state: pool.state,
        nodes: pool.nodes.clone(),
        blocks_owned: claimed.owned,
        blocks_resting: claimed.resting,
        blocks_total: u64::try_from(claimed.total).unwrap_or(u64::MAX),
        reserved: view.reservations.keys().filter(|address| pool.cidr().has(**address)).count() as u64,
        addresses_used: used.map(|used| used.count_in(pool.cidr())),
    }
}

/// The claimed blocks, from the records that this node knows.
pub async fn blocks(
    me: &NodeName,
    records: &Records,
    store: &Store,
    dead: &BTreeSet<NodeName>,
) -> Result<Vec<ClaimStatus>, Refusal> {
    let (view, used) = (records.read()?, PublishedAddresses::read(store).await.ok());
    Ok(claims(me, &view, used.as_ref(), dead))
}

/// The claims of all blocks. `dead` are the nodes whose agents are treated as dead.
pub fn claims(
    me: &NodeName,
    view: &View,
    used: Option<&PublishedAddresses>,
    dead: &BTreeSet<NodeName>,
) -> Vec<ClaimStatus> {
    let problems = validate(view, me, dead).problems.into_iter();
    let refused: BTreeMap<String, String> =
        problems.map(|problem| (problem.key, problem.fault.to_string())).collect();
    let mut counts: BTreeMap<Cidr, u64> = BTreeMap::new();
    let mut blocks: Vec<Cidr> = view.blocks.keys().map(|block| block.cidr()).collect();
    blocks.sort();
    for address in used.into_iter().flat_map(PublishedAddresses::all) {
        // Valid blocks do not overlap: only the last block that begins at or before the address can contain it.
        let behind = blocks.partition_point(|block| *block <= Cidr::containing(address, u8::MAX));
        if let Some(block) =
            behind.checked_sub(1).map(|index| blocks[index]).filter(|block| block.has(address))
        {
            *counts.entry(block).or_default() += 1;
        }
    }
    let claims = view.blocks.iter().map(|(block, known)| {
        let claim = &*known.record;
        let standing = if view.fences.contains_key(&claim.incarnation) {
            BlockStanding::Rests
        } else {
            let reason = refused.get(&Key::Block(*block).to_string());
            reason.cloned().map_or(BlockStanding::Owned, BlockStanding::Refused)
        };
        ClaimStatus {
            block: block.cidr().into(),
            pool: claim.pool.clone(),
            node: claim.node.clone(),
            incarnation: claim.incarnation.to_string(),
            revision: known.revision.number(),
            addresses_used: used.map(|_| counts.get(&block.cidr()).copied().unwrap_or(0)),
            standing,
        }
    });
    claims.collect()
}
