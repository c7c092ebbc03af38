//! Invariants over time.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use polder_api::{Attachment, NodeName, PoolName};

use super::{ClusterReport, Deviation, Invariant, deviation};
use crate::Cidr;
use crate::Revision;
use crate::ids::{Incarnation, Nonce};
use crate::ledger::AttachmentEntry;
use crate::moment::Moment;
use crate::pool::{Block, PoolState, Purpose};
use crate::record::{BlockRecord, Boot, NodeRecord};
use crate::reservation;
use crate::view::{Versioned, View};

/// The earlier facts.
#[derive(Debug, Clone)]
pub struct History {
    /// Minimum cool-down of an address.
    cool_down: Duration,
    /// The last user of each address, and the time of its last observation.
    last_use: BTreeMap<IpAddr, (NodeName, Attachment, Moment)>,
    /// The ranges of all pools for reservations so far.
    reserved: BTreeSet<Cidr>,
    /// All claims so far, each with its nonce.
    claims: BTreeSet<(Block, Nonce)>,
    /// All reservations so far, each with its workload.
    workloads: BTreeSet<(IpAddr, String)>,
    /// The ranges of all pools so far.
    ranges: BTreeSet<Cidr>,
    /// The datastore's records at the last observation.
    before: Option<RecordSummary>,
}

/// The facts kept from the datastore's records.
#[derive(Debug, Clone)]
struct RecordSummary {
    revision: Revision,
    fenced: BTreeSet<Incarnation>,
    generations: BTreeMap<IpAddr, u64>,
    /// The pools from which no block may be claimed, with the revision of their record.
    closed: BTreeMap<PoolName, Revision>,
    /// The pools in which no address may be reserved, with the revision of their record.
    closed_pools: BTreeMap<PoolName, Revision>,
}

impl History {
    /// An empty history; `cool_down` is the minimum cool-down of an address.
    pub fn new(cool_down: Duration) -> Self {
        Self {
            cool_down,
            last_use: BTreeMap::new(),
            reserved: BTreeSet::new(),
            claims: BTreeSet::new(),
            workloads: BTreeSet::new(),
            ranges: BTreeSet::new(),
            before: None,
        }
    }

    /// Forgets the datastore's records: it was restored to an earlier state.
    pub fn store_was_set_back(&mut self) {
        self.before = None;
    }

    /// Forgets reservations that no longer exist: a new one for the same address starts at its first generation.
    pub fn forget_given_up(&mut self, view: &View) {
        if let Some(before) = &mut self.before {
            before.generations.retain(|address, _| view.reservations.contains_key(address));
        }
    }

    /// Observes the facts at `now`, on a clock shared by all nodes. Returns the deviations since the previous
    /// observation.
    pub fn observe(&mut self, facts: &ClusterReport<'_>, now: Moment) -> Vec<Deviation> {
        let mut found = Vec::new();
        self.cool_down(facts, now, &mut found);
        self.removed_pools(facts, &mut found);
        if let Some(view) =
            facts.view.filter(|view| self.before.as_ref().is_none_or(|known| known.revision != view.revision))
        {
            if let Some(before) = &self.before {
                let is_restored_claim = |claim: &_| facts.is_restoring || self.claims.contains(claim);
                before.compare(view, is_restored_claim, &mut found);
                let was_reserved = |workload: &_| facts.is_restoring || self.workloads.contains(workload);
                before.compare_reservations(view, was_reserved, &mut found);
            }
            self.claims.extend(view.blocks.iter().map(|(block, claim)| (*block, claim.record.nonce.clone())));
            let workloads = view.reservations.iter();
            self.workloads.extend(workloads.map(|(address, known)| (*address, known.record.owner.clone())));
            self.ranges.extend(view.every_pool().map(|pool| pool.record.cidr()));
            self.before = Some(RecordSummary::of(view));
        }
        found
    }

    /// I2: a pool is removed only when none of its addresses is used.
    fn removed_pools(&self, facts: &ClusterReport<'_>, found: &mut Vec<Deviation>) {
        let Some(view) = facts.view.filter(|_| !facts.is_restoring) else { return };
        let has = |address: IpAddr| move |range: &&Cidr| range.has(address);
        let removed: Vec<&Cidr> = self
            .ranges
            .iter()
            .filter(|range| view.every_pool().all(|pool| !pool.record.cidr().overlaps(**range)))
            .collect();
        if removed.is_empty() {
            return;
        }
        for node in facts.nodes {
            let interfaces = node.kernel.iter().flat_map(|kernel| &kernel.interfaces);
            for (interface, address) in
                interfaces.flat_map(|one| one.addresses.iter().map(move |address| (one, *address)))
            {
                if let Some(range) = removed.iter().copied().find(has(address)) {
                    let what = format!(
                        "{} on {} uses {address} of {range}, whose pool was removed",
                        interface.attachment, node.name
                    );
                    found.push(deviation(Invariant::Owner, Some(&node.name), what, "add the pool again"));
                }
            }
        }
    }

    /// I6. A reserved address belongs to its workload, so the workload's next pod needs no cool-down.
    fn cool_down(&mut self, facts: &ClusterReport<'_>, now: Moment, found: &mut Vec<Deviation>) {
        let pools = facts.view.iter().flat_map(|view| view.pools.values());
        let pools = pools.filter(|pool| pool.record.purpose == Purpose::Reservations);
        self.reserved.extend(pools.map(|pool| pool.record.cidr()));
        for node in facts.nodes {
            let interfaces = node.kernel.iter().flat_map(|kernel| &kernel.interfaces);
            for (interface, address) in
                interfaces.flat_map(|one| one.addresses.iter().map(move |address| (one, *address)))
            {
                if let Some((name, attachment, seen)) = self.last_use.get_mut(&address) {
                    if *attachment == interface.attachment && *name == node.name {
                        *seen = now;
                        continue;
                    }
                    let cooled_down = now.since(*seen);
                    if cooled_down < self.cool_down && !self.reserved.iter().any(|pool| pool.has(address)) {
                        let what = format!(
                            "{address} was assigned to {} on {} {cooled_down:?} after {attachment} on {name} used \
                             it",
                            interface.attachment, node.name
                        );
                        found.push(deviation(Invariant::CoolDown, Some(&node.name), what, "report it"));
                    }
                }
                self.last_use.insert(address, (node.name.clone(), interface.attachment.clone(), now));
            }
        }
    }
}

impl RecordSummary {
    fn of(view: &View) -> Self {
        Self {
            revision: view.revision,
            fenced: view.fences.keys().cloned().collect(),
            generations: view
                .reservations
                .iter()
                .map(|(address, known)| (*address, known.record.generation))
                .collect(),
            closed: view
                .pools
                .values()
                .filter(|pool| {
                    pool.record.state != PoolState::Active || pool.record.purpose != Purpose::Blocks
                })
                .map(|pool| (pool.record.name.clone(), pool.revision))
                .collect(),
            closed_pools: view
                .pools
                .values()
                .filter(|pool| pool.record.state != PoolState::Active)
                .map(|pool| (pool.record.name.clone(), pool.revision))
                .collect(),
        }
    }

    /// I10: no address of a drained pool is reserved, except to restore a lost reservation of the same workload.
    fn compare_reservations(
        &self,
        view: &View,
        was_reserved: impl Fn(&(IpAddr, String)) -> bool,
        found: &mut Vec<Deviation>,
    ) {
        let new = view.reservations.iter().filter(|(address, known)| {
            !self.generations.contains_key(*address)
                && !was_reserved(&(**address, known.record.owner.clone()))
        });
        for (address, known) in new {
            let Some(pool) = reservation::pool_of(view, *address) else { continue };
            if self.closed_pools.get(&pool.record.name) == Some(&pool.revision) {
                let owner = &known.record.owner;
                let what = format!(
                    "{address} was reserved for {owner} from pool {}, which is drained",
                    pool.record.name
                );
                found.push(deviation(Invariant::BlockTree, None, what, "report it"));
            }
        }
    }

    fn compare(
        &self,
        view: &View,
        is_restored_claim: impl Fn(&(Block, Nonce)) -> bool,
        found: &mut Vec<Deviation>,
    ) {
        let since = |revision: Revision| revision > self.revision;
        let blocks = || view.blocks.iter().filter(|(_, claim)| since(claim.revision));
        // I9.
        let claims = blocks().map(|(block, claim)| {
            (&claim.record.node, &claim.record.incarnation, format!("claimed {block}"))
        });
        let nodes = view.nodes.iter().filter(|(_, node)| since(node.revision));
        let nodes = nodes.map(|(name, node)| (name, &node.record.incarnation, "registered".to_owned()));
        let held = view.reservations.iter().filter(|(_, known)| since(known.revision));
        let held = held.filter_map(|(address, known)| {
            let holder = known.record.holder.as_ref()?;
            Some((&holder.node, &holder.incarnation, format!("took {address}")))
        });
        for (node, _, what) in claims.chain(nodes).chain(held).filter(|(_, by, _)| self.fenced.contains(by)) {
            let what = format!("node {node} was removed, but {what} afterwards");
            found.push(deviation(Invariant::Fenced, Some(node), what, "report it"));
        }
        // I10: a lost claim that is still in its owner's ledger is restored, even if its pool was closed meanwhile.
        let still_closed = |name: &PoolName| {
            let revision = view.pools.get(name).map(|pool| pool.revision);
            revision.is_some() && self.closed.get(name).copied() == revision
        };
        let is_new = |(block, claim): &(&Block, &Versioned<BlockRecord>)| {
            still_closed(&claim.record.pool) && !is_restored_claim(&(**block, claim.record.nonce.clone()))
        };
        for (block, claim) in blocks().filter(is_new) {
            let what = format!("{block} was claimed from pool {}, which is closed", claim.record.pool);
            found.push(deviation(Invariant::BlockTree, Some(&claim.record.node), what, "report it"));
        }
        // I7.
        for (address, known) in &view.reservations {
            let (before, now) =
                (self.generations.get(address).copied().unwrap_or(0), known.record.generation);
            if now < before {
                let what =
                    format!("the reservation of {address} went back from generation {before} to {now}");
                found.push(deviation(Invariant::StaleDel, None, what, "report it"));
            }
        }
    }
}

/// I9: a machine that reports itself alive as a node has the machine id and boot id of the node's record.
pub fn check_lease_record(me: &NodeName, boot: Boot<'_>, record: Option<&NodeRecord>) -> Option<Deviation> {
    let is_own = record.is_some_and(|record| Boot::from(record) == boot);
    let what =
        || format!("machine {} reports that it is alive as {me}, but it is not that node", boot.machine_id);
    (!is_own).then(|| deviation(Invariant::Fenced, Some(me), what(), "report it"))
}

/// I7: the other attachments that a release has changed.
pub fn check_release(
    node: &NodeName,
    released: &Attachment,
    before: &[AttachmentEntry],
    after: &[AttachmentEntry],
) -> Vec<Deviation> {
    let others = before.iter().filter(|held| held.attachment != *released);
    let lost = others.filter(|held| !after.contains(held));
    lost.map(|held| {
        let what = format!("releasing {released} on {node} changed {}", held.attachment);
        deviation(Invariant::StaleDel, Some(node), what, "report it")
    })
    .collect()
}
