//! Translates a change into a transaction of a datastore like etcd: comparisons and writes, by key and revision. Only
//! this module builds transactions, and decisions do not depend on them.
//!
//! Comparisons that a deliberate defect (mutant) leaves out are separate functions.

use polder_api::NodeName;
use polder_api::mutant::{Mutant, unless};
use serde::Serialize;

use crate::Cidr;
use crate::Revision;
use crate::change::{
    AddressRelease, Change, Claim, Confirmation, LeaseWrite, MOST_RECORDS, Member, RemovedAllocations,
    RequiredLease, Writer,
};
use crate::ids::Incarnation;
use crate::key::{Key, Name, Range};
use crate::pool::{Block, Pool};
use crate::record::{FenceRecord, LeaderRecord, PoolRecord, encode};
use crate::store::{Compare, Entry, LARGEST_TXN, Txn, Write};

const _: () = assert!(MOST_RECORDS <= LARGEST_TXN, "etcd would refuse the largest change");

/// The transaction that applies the change, or nothing.
pub fn transaction(change: &Change) -> Txn {
    let mut txn = Draft::default();
    match change {
        Change::RegisterNode { node, record, before } => {
            txn.replace(Key::Node(node.clone()), before.unwrap_or(Revision::ABSENT), record);
            if before.is_none() {
                txn.only_if(no_fence(node, &record.incarnation));
            }
        }
        Change::TakeOverNode { node, record, before } => {
            txn.replace(Key::Node(node.clone()), *before, record);
        }
        Change::RemoveNode { incarnation, revision, fence, lease } => {
            txn.remove_node(incarnation, *revision, fence, *lease);
        }
        Change::ConfirmByOperator(confirmations) => {
            confirmations.iter().for_each(|confirmation| txn.confirm(confirmation));
        }
        Change::ConfirmRemoval(confirmation) => txn.confirm(confirmation),
        Change::ReleaseRemoved(what) => txn.release_removed(what),
        Change::ForgetFence { by, fence } => {
            txn.delete(&Key::Fence(fence.node.clone(), fence.incarnation.clone()), fence.revision);
            txn.only_if(member_unchanged(by));
        }
        Change::ClaimBlock(claim) => txn.claim(claim),
        Change::ReleaseBlocks { by, blocks } => {
            blocks.iter().for_each(|(block, revision)| txn.delete(&Key::Block(*block), *revision));
            txn.only_if(member_unchanged(by));
        }
        Change::HandOverAddress(what) => {
            txn.only_if(member_unchanged(&what.by));
            let before = what.before.unwrap_or(Revision::ABSENT);
            txn.replace(Key::Reservation(what.address), before, &what.record);
            let pool = what.source_pool.iter();
            txn.only_if(pool.map(|(pool, revision)| unchanged(&Key::Pool(pool.clone()), *revision)));
        }
        Change::ReleaseAddress { by, released } => {
            txn.released(released);
            txn.only_if(member_unchanged(by));
        }
        Change::DeleteReservation { address, revision } => txn.delete(&Key::Reservation(*address), *revision),
        Change::AddPool { by, pool, as_of } => {
            txn.replace(Key::Pool(pool.name.clone()), Revision::ABSENT, &PoolRecord::from(pool));
            let ranges =
                [Key::all_pools(), Key::all_nodes(), Key::all_reservations(), Key::blocks_in(pool.cidr())];
            txn.only_if(ranges.map(|range| nothing_newer(range, *as_of)));
            txn.only_if(by.iter().filter_map(member_unchanged));
        }
        Change::ReplacePool { pool, revision } => {
            txn.replace(Key::Pool(pool.name.clone()), *revision, &PoolRecord::from(pool));
        }
        Change::RemovePool { name, cidr, revision, as_of } => {
            txn.delete(&Key::Pool(name.clone()), *revision);
            txn.only_if(nothing_claimed_of(*cidr));
            txn.only_if([nothing_newer(Key::all_reservations(), *as_of)]);
        }
        Change::MakeCluster { record, pools } => {
            txn.replace(Key::Cluster, Revision::ABSENT, record);
            if let Some(pools) = pools {
                txn.only_if([Compare::Empty(Key::all_pools())]);
                let put = |pool: &Pool| txn.put(&Key::Pool(pool.name.clone()), &PoolRecord::from(pool));
                pools.iter().for_each(put);
            }
        }
        Change::ReplaceSettings { record, revision } => txn.replace(Key::Cluster, *revision, record),
        Change::PublishAddresses { by, publish, withdraw } => {
            txn.only_if(member_unchanged(by));
            withdraw.iter().for_each(|name| txn.delete_unchecked(name));
            publish.iter().for_each(|(address, record)| {
                txn.put(&Key::Address(by.node.clone(), *address), record);
            });
        }
        Change::WithdrawAddresses { by, records } => {
            txn.only_if(writer_unchanged(by));
            for (name, revision) in records {
                txn.only_if(revision.map(|revision| unchanged(name, revision)));
                txn.delete_unchecked(name);
            }
        }
        Change::WriteLease(lease) => txn.lease(lease),
        Change::RestoreLease(lease) => {
            txn.only_if([Compare::absent(&Key::Lease(lease.by.node.clone()))]);
            txn.lease(lease);
        }
        Change::WriteLeader { by, record, before } => txn.leader(by, record, *before),
        Change::AskInspection(record) => txn.put(&Key::Inspection, record),
        Change::EndInspection { revision } => txn.delete(&Key::Inspection, *revision),
        Change::AnswerInspection { node, record, asked } => {
            txn.only_if([unchanged(&Key::Inspection, *asked)]);
            txn.put(&Key::Answer(node.clone()), record);
        }
        Change::ForgetAnswers(names) => {
            txn.only_if([Compare::absent(&Key::Inspection)]);
            names.iter().for_each(|name| txn.delete_unchecked(name));
        }
    }
    let Draft(txn) = txn;
    debug_assert!(txn.compares.len().max(txn.writes.len()) <= LARGEST_TXN, "too large: {change}");
    txn
}

/// The record that shows whether the change was applied: no other change writes the same. `None` if there is no such
/// record.
pub fn trace(change: &Change) -> Option<Entry> {
    let (key, value) = match change {
        Change::ClaimBlock(claim) => (Key::Block(claim.block), encode(&claim.record)),
        Change::HandOverAddress(what) => (Key::Reservation(what.address), encode(&what.record)),
        _ => return None,
    };
    Some(Entry { key: key.to_string(), value, revision: Revision::ABSENT })
}

/// A transaction under construction.
#[derive(Default)]
struct Draft(Txn);

impl Draft {
    fn lease(&mut self, LeaseWrite { by, record }: &LeaseWrite) {
        self.only_if(lease_of_member(by));
        self.put(&Key::Lease(by.node.clone()), record);
    }

    fn remove_node(
        &mut self,
        incarnation: &Incarnation,
        revision: Revision,
        fence: &FenceRecord,
        lease: RequiredLease,
    ) {
        self.only_if(removed_without_lease(&fence.node, lease));
        self.delete(&Key::Node(fence.node.clone()), revision);
        self.replace(Key::Fence(fence.node.clone(), incarnation.clone()), Revision::ABSENT, fence);
    }

    fn leader(&mut self, by: &Member, record: &LeaderRecord, before: Option<Revision>) {
        self.only_if([record_of(by)]);
        self.replace(Key::Leader, before.unwrap_or(Revision::ABSENT), record);
    }

    fn only_if(&mut self, compares: impl IntoIterator<Item = Compare>) {
        self.0.compares.extend(compares);
    }

    fn put(&mut self, key: &Key, record: &impl Serialize) {
        self.0.writes.push(Write::Put { key: key.to_string(), value: encode(record) });
    }

    fn delete_unchecked(&mut self, name: &Name) {
        self.0.writes.push(Write::Delete { key: name.to_string() });
    }

    /// Replaces the record of that revision.
    fn replace(&mut self, key: Key, revision: Revision, record: &impl Serialize) {
        self.only_if([unchanged(&key, revision)]);
        self.put(&key, record);
    }

    /// Deletes the record of that revision.
    fn delete(&mut self, key: &Key, revision: Revision) {
        self.only_if([unchanged(key, revision)]);
        self.0.writes.push(Write::Delete { key: key.to_string() });
    }

    fn confirm(&mut self, confirmation: &Confirmation) {
        let Confirmation { incarnation, record, revision } = confirmation;
        self.replace(Key::Fence(record.node.clone(), incarnation.clone()), *revision, record);
    }

    fn claim(&mut self, claim: &Claim) {
        self.only_if(claimed_by_member(claim));
        self.only_if(claimed_from_that_pool(claim));
        self.only_if(nothing_claimed_inside(claim));
        self.only_if(nothing_claimed_around(claim).into_iter().flatten());
        self.put(&Key::Block(claim.block), &claim.record);
    }

    fn release_removed(&mut self, what: &RemovedAllocations) {
        let fence = Key::Fence(what.fence.node.clone(), what.fence.incarnation.clone());
        self.only_if([unchanged(&fence, what.fence.revision)]);
        what.blocks.iter().for_each(|(block, revision)| self.delete(&Key::Block(*block), *revision));
        what.addresses.iter().for_each(|released| self.released(released));
        self.only_if(member_unchanged(&what.by));
    }

    fn released(&mut self, released: &AddressRelease) {
        self.replace(Key::Reservation(released.address), released.revision, &released.record);
    }
}

fn unchanged(key: &impl ToString, revision: Revision) -> Compare {
    Compare::Unchanged { key: key.to_string(), revision }
}

fn nothing_newer(range: Range, revision: Revision) -> Compare {
    Compare::NothingNewer { range, revision }
}

fn record_of(member: &Member) -> Compare {
    unchanged(&Key::Node(member.node.clone()), member.revision)
}

/// A removed node cannot change anything.
fn member_unchanged(by: &Member) -> Option<Compare> {
    unless(Mutant::WriteIgnoresNode, record_of(by))
}

fn writer_unchanged(by: &Writer) -> Option<Compare> {
    match by {
        Writer::Node(member) => member_unchanged(member),
        Writer::AnyNode(node) => Some(Compare::absent(&Key::Node(node.clone()))),
    }
}

/// Only the registered node can be alive under its name.
fn lease_of_member(by: &Member) -> Option<Compare> {
    unless(Mutant::LeaseIgnoresNode, record_of(by))
}

/// An agent that is alive is removed only by an operator.
fn removed_without_lease(node: &NodeName, lease: RequiredLease) -> Option<Compare> {
    (lease == RequiredLease::Absent).then(|| Compare::absent(&Key::Lease(node.clone())))
}

/// A removed node does not register again.
fn no_fence(node: &NodeName, incarnation: &Incarnation) -> Option<Compare> {
    unless(Mutant::FenceIsIgnored, Compare::absent(&Key::Fence(node.clone(), incarnation.clone())))
}

fn claimed_by_member(claim: &Claim) -> Option<Compare> {
    unless(Mutant::ClaimIgnoresNode, record_of(&claim.by))
}

fn claimed_from_that_pool(claim: &Claim) -> Option<Compare> {
    let pool = Key::Pool(claim.record.pool.clone());
    unless(Mutant::ClaimIgnoresPool, unchanged(&pool, claim.pool_revision))
}

/// No claim of the block itself or of a part of it.
fn nothing_claimed_inside(claim: &Claim) -> Option<Compare> {
    unless(Mutant::ClaimIgnoresClaims, Compare::Empty(Key::blocks_in(claim.block.cidr())))
}

/// No claim of a block of the pool.
fn nothing_claimed_of(pool: Cidr) -> Option<Compare> {
    unless(Mutant::RemovalIgnoresClaims, Compare::Empty(Key::blocks_in(pool)))
}

/// No claim of a larger range around the block. If it starts with the block, `nothing_claimed_inside` finds it.
fn nothing_claimed_around(claim: &Claim) -> Option<Vec<Compare>> {
    let absent = |larger| Compare::absent(&Key::Block(larger));
    unless(Mutant::ClaimIgnoresLargerClaims, larger_ranges(claim.pool, claim.block).map(absent).collect())
}

/// The larger ranges of the pool that contain `block` and start before it. Claims of these sizes exist only if they
/// were written by hand, or the pool had another block length earlier.
fn larger_ranges(pool: Cidr, block: Block) -> impl Iterator<Item = Block> {
    let first = block.cidr().first();
    (pool.length()..block.cidr().length())
        .map(move |length| Block::new(Cidr::containing(first, length)))
        .filter(move |larger| larger.cidr().first() != first)
}

#[cfg(test)]
mod tests;
