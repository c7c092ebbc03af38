//! The state of a node as the membership rules use it, and how the node releases blocks and addresses.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use polder_api::{Attachment, Family, rule};

use super::{MIN_BLOCK_AGE, NodeIpam};
use crate::allocator::CoolDown;
use crate::allocator::Counts;
use crate::claim::MAX_PER_CHANGE;
use crate::ledger::{Ledger, LedgerError, NodeIdentity, OwnedBlock};
use crate::moment::Moment;
use crate::pool::{Block, Pool};

/// Blocks, addresses and attachments of a node.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct NodeAllocations {
    /// Identity in the cluster; `None` before the first registration.
    pub identity: Option<NodeIdentity>,
    /// Blocks of the ledger, including those that are being released.
    pub blocks: Vec<OwnedBlock>,
    /// Gateway addresses of the node, at most one per family.
    pub gateways: Vec<IpAddr>,
    /// Addresses of the probe endpoint, at most one per family; none while it is leaving.
    pub probes: Vec<IpAddr>,
    /// Number of attachments, including the probe endpoint.
    pub attachments: usize,
    /// Addresses of attachments outside the node's blocks.
    pub addresses_outside_blocks: Vec<OutsideAddress>,
    /// Reserved addresses that are being handed over to this node, and addresses of attachments whose ADD may still
    /// create an interface.
    pub expected: BTreeSet<IpAddr>,
    /// Blocks that the node does not need.
    pub spare: Vec<Block>,
    /// Gateway addresses to replace: outside the node's blocks, or the last used address of a block in a closed pool.
    /// Only those for which another address is free.
    pub idle_gateways: Vec<IpAddr>,
    /// Gateway addresses of a family in which all the node's blocks are closed and no attachment has an address.
    pub unneeded_gateways: Vec<IpAddr>,
    /// Families without a gateway address in which an address is free.
    pub could_take_gateway: BTreeSet<Family>,
}

/// An address of an attachment outside the node's blocks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutsideAddress {
    /// An address in no block of this node.
    pub address: IpAddr,
    /// The attachment that uses it.
    pub attachment: Attachment,
    /// The workload: `namespace/name` of its pod.
    pub owner: Option<String>,
}

impl NodeAllocations {
    /// Whether the node has no attachments, blocks, gateways or expected addresses.
    pub fn is_bare(&self) -> bool {
        self.attachments == 0
            && self.blocks.is_empty()
            && self.gateways.is_empty()
            && self.expected.is_empty()
    }
}

rule! {
    /// Whether addresses of the block are in use: the block is not released then.
    fn has_used(counts: Counts) -> bool {
        counts.used > 0
    }
    UsedBlockIsSpare => false
}

rule! {
    /// The unused addresses of a block missing in the ledger that go into cool-down first: another pod may have used
    /// any of them.
    fn resting_first(unused: &[IpAddr]) -> &[IpAddr] {
        unused
    }
    AdoptedBlockDoesNotRest => &[]
}

rule! {
    /// Whether the ledger of a machine that replaces another may be an old copy.
    fn may_be_an_old_copy() -> bool {
        true
    }
    OldCopyDoesNotRest => false
}

impl<L: Ledger> NodeIpam<L> {
    /// Number of free addresses of a family below which the node claims a block. It keeps twice as many on release.
    pub fn low_water(&self) -> u64 {
        self.low_water
    }

    /// Sets the number of [`Self::low_water`]; default [`LOW_WATER`](crate::claim::LOW_WATER).
    #[must_use]
    pub fn with_low_water(self, low_water: u64) -> Self {
        Self { low_water, ..self }
    }

    /// The node's blocks, addresses and attachments at `now`.
    pub fn allocations(&self, now: Moment) -> Result<NodeAllocations, LedgerError> {
        let in_a_block = |address: &IpAddr| self.blocks.iter().any(|owned| owned.block.cidr().has(*address));
        let outside_address = |address: &IpAddr, held: &crate::ledger::AttachmentEntry| OutsideAddress {
            address: *address,
            attachment: held.attachment.clone(),
            owner: held.pod.as_ref().map(ToString::to_string),
        };
        let addresses_outside_blocks = self.attachments.values().flat_map(|held| {
            let outside = held.addresses.iter().filter(|address| !in_a_block(address));
            outside.map(|address| outside_address(address, held)).collect::<Vec<_>>()
        });
        let has_next = |family: Family| self.allocator.next(family, None, CoolDown::Shortest, now).is_some();
        let has_gateway = |family: &Family| self.gateways.iter().any(|own| Family::of(*own) == *family);
        Ok(NodeAllocations {
            identity: self.identity()?,
            blocks: self.blocks.clone(),
            gateways: self.gateways.clone(),
            probes: self
                .probe()
                .filter(|held| !held.leaving)
                .map(|held| held.addresses.clone())
                .unwrap_or_default(),
            attachments: self.attachments.len(),
            addresses_outside_blocks: addresses_outside_blocks.collect(),
            expected: {
                let expected = self.expected.iter().map(|(address, _)| address);
                expected.chain(self.deleted_meanwhile.values().flatten()).copied().collect()
            },
            spare: self.spare(now),
            idle_gateways: self.idle_gateways(now),
            unneeded_gateways: self.unneeded_gateways(),
            could_take_gateway: Family::BOTH
                .into_iter()
                .filter(|family| !has_gateway(family) && has_next(*family))
                .collect(),
        })
    }

    /// Whether the block has any address that can be allocated or is allocated, also for the node itself. True for
    /// unknown blocks.
    pub fn is_for_pods(&self, block: Block, now: Moment) -> bool {
        let found = self.allocator.blocks(now).find(|(known, ..)| *known == block);
        found.is_none_or(|(_, _, counts)| counts.used + counts.resting + counts.free > 0)
    }

    /// Blocks that the node does not need, without used addresses and without addresses in cool-down: at most
    /// [`MAX_PER_CHANGE`].
    fn spare(&self, now: Moment) -> Vec<Block> {
        let mut free: BTreeMap<_, u64> = BTreeMap::new();
        for (_, pool, counts) in self.allocator.blocks(now) {
            *free.entry(pool).or_default() += counts.free;
        }
        let needless = |free: u64| free >= 2 * self.low_water;
        let is_fresh =
            |block: &Block| self.fresh.get(block).is_some_and(|claimed| now.since(*claimed) < MIN_BLOCK_AGE);
        let mut spare = Vec::new();
        for (block, pool, counts) in self.allocator.blocks(now) {
            let left = free[&pool] - counts.free;
            let is_used = has_used(counts);
            let is_needed = !self.allocator.is_closed(pool) && !needless(left);
            if is_used || counts.resting > 0 || is_needed || is_fresh(&block) {
                continue;
            }
            free.insert(pool, left);
            spare.push(block);
            if spare.len() == MAX_PER_CHANGE {
                break;
            }
        }
        spare
    }

    fn idle_gateways(&self, now: Moment) -> Vec<IpAddr> {
        let idle = |gateway: &&IpAddr| {
            let mut blocks = self.allocator.blocks(now);
            let alone = blocks.any(|(block, pool, counts)| {
                block.cidr().has(**gateway) && counts.used == 1 && self.allocator.is_closed(pool)
            });
            (alone || self.is_outside_blocks(**gateway)) && self.next_gateway(**gateway, now).is_some()
        };
        self.gateways.iter().filter(idle).copied().collect()
    }

    fn unneeded_gateways(&self) -> Vec<IpAddr> {
        let is_lonely = |family: Family| {
            let mut owned = self.blocks.iter().filter(|owned| owned.block.family() == family);
            let mut held = self.attachments.values().flat_map(|held| &held.addresses);
            owned.all(|owned| self.allocator.is_closed(&owned.pool))
                && !held.any(|address| Family::of(*address) == family)
        };
        self.gateways.iter().copied().filter(|gateway| is_lonely(Family::of(*gateway))).collect()
    }

    /// Removes the gateway address if nothing else of its family needs it. Returns whether it was removed.
    pub fn drop_gateway(&mut self, gateway: IpAddr, now: Moment) -> Result<bool, LedgerError> {
        if !self.unneeded_gateways().contains(&gateway) {
            return Ok(false);
        }
        self.ledger.remove_gateway(gateway, now)?;
        self.allocator.free(gateway, now);
        self.gateways.retain(|own| *own != gateway);
        Ok(true)
    }

    /// Whether the address is outside the node's blocks. A gateway address found in the kernel can be that of an
    /// earlier node with this name.
    fn is_outside_blocks(&self, gateway: IpAddr) -> bool {
        !self.blocks.iter().any(|owned| owned.block.cidr().has(gateway))
    }

    /// The address that would replace this gateway address. Another node can get a gateway address outside this node's
    /// blocks at any time, so the shortest cool-down is enough for its replacement.
    fn next_gateway(&self, old: IpAddr, now: Moment) -> Option<IpAddr> {
        let cool_down = if self.is_outside_blocks(old) { CoolDown::Shortest } else { CoolDown::Full };
        self.allocator.next(Family::of(old), None, cool_down, now)
    }

    /// Adds a block that the datastore lists for this node but the ledger does not. Its addresses may have been in use
    /// until now, so all unused ones go into cool-down. Succeeds if the block is known.
    pub fn adopt_block(&mut self, owned: OwnedBlock, pool: &Pool, now: Moment) -> Result<(), LedgerError> {
        let used = |address: &IpAddr| {
            let mut held = self.attachments.values().flat_map(|held| &held.addresses);
            self.gateways.contains(address) || held.any(|held| held == address)
        };
        if self.blocks.iter().any(|known| known.block == owned.block) {
            return Ok(());
        }
        let addresses = owned.block.cidr().addresses();
        let unused: Vec<IpAddr> =
            addresses.filter(|address| !pool.excludes(*address) && !used(address)).collect();
        self.ledger.cool_down(resting_first(&unused), now)?;
        self.last.retain(|address, _| !owned.block.cidr().has(*address));
        self.add_block(owned, pool, now)
    }

    /// Starts the cool-down of all unused addresses at `now`: another machine with this ledger may have used them until
    /// now.
    pub fn cool_down_unused(&mut self, now: Moment) -> Result<(), LedgerError> {
        if !may_be_an_old_copy() {
            return Ok(());
        }
        let inactive = self.inactive.iter().flat_map(|owned| owned.block.cidr().addresses());
        let mut allocator = self.allocator.clone();
        let unused: Vec<IpAddr> = allocator.cool_down_unused(now).into_iter().chain(inactive).collect();
        self.ledger.cool_down(&unused, now)?;
        self.allocator = allocator;
        self.last.clear();
        Ok(())
    }

    /// Starts to release a block: nothing is allocated from it any more. Returns false if any of its addresses is in
    /// use or in cool-down.
    pub fn leave(&mut self, block: Block, now: Moment) -> Result<bool, LedgerError> {
        let empty = |(known, _, counts): (Block, _, Counts)| {
            let is_used = has_used(counts);
            known == block && !is_used && counts.resting == 0
        };
        if !self.allocator.blocks(now).any(empty) {
            return Ok(false);
        }
        self.ledger.mark_block_leaving(block)?;
        self.allocator.remove(block);
        self.blocks.iter_mut().filter(|owned| owned.block == block).for_each(|owned| owned.leaving = true);
        Ok(true)
    }

    /// Removes a released block from the ledger. Succeeds if it is not known.
    pub fn disown(&mut self, block: Block) -> Result<(), LedgerError> {
        if self.blocks.iter().any(|owned| owned.block == block && owned.leaving) {
            self.ledger.remove_block(block)?;
            self.blocks.retain(|owned| owned.block != block);
            self.inactive.retain(|owned| owned.block != block);
        }
        Ok(())
    }

    /// Replaces a gateway address with another one. Returns false if no address is free.
    pub fn move_gateway(&mut self, old: IpAddr, now: Moment) -> Result<bool, LedgerError> {
        let Some(new) = self.next_gateway(old, now) else { return Ok(false) };
        let before = self.gateways.clone();
        self.ledger.replace_gateway(old, new, now)?;
        for held in self.attachments.values_mut().filter(|held| held.gateways.is_empty()) {
            held.gateways.clone_from(&before);
        }
        self.allocator.free(old, now);
        let _ = self.allocator.take(new);
        self.last.remove(&new);
        self.gateways.retain(|gateway| *gateway != old);
        self.gateways.push(new);
        self.gateways.sort();
        Ok(true)
    }

    /// Removes all blocks and gateway addresses, after the node was removed. Fails if an attachment is left.
    pub fn forget_all(&mut self) -> Result<(), LedgerError> {
        self.ledger.clear()?;
        for owned in std::mem::take(&mut self.blocks) {
            self.allocator.remove(owned.block);
        }
        self.inactive.clear();
        self.gateways.clear();
        self.last.clear();
        // No pod may use addresses that are still being handed over: the node is about to confirm that its pods are
        // gone.
        self.expected.clear();
        Ok(())
    }

    /// Expects the hand-over of a reserved address to this node for the attachment: it is not released until it is used
    /// or the expectation is cancelled ([`Self::cancel_expected`]). Only an expected address can be allocated to the
    /// attachment.
    pub fn mark_expected(&mut self, address: IpAddr, attachment: &Attachment) {
        self.expected.insert((address, attachment.clone()));
    }

    /// As [`Self::release`], while the ADD of the attachment still runs and can create an interface. Until the next
    /// release, the node keeps its reserved addresses and refuses another ADD of it.
    pub fn release_before_its_add_ends(
        &mut self,
        attachment: &Attachment,
        now: Moment,
    ) -> Result<(), LedgerError> {
        let Some(held) = self.attachments.get(attachment).cloned() else { return Ok(()) };
        self.release(attachment, now)?;
        self.deleted_meanwhile.insert(held.attachment, held.addresses);
        Ok(())
    }

    /// The attachments that were released before their ADD ended.
    pub fn deleted_meanwhile(&self) -> impl Iterator<Item = &Attachment> {
        self.deleted_meanwhile.keys()
    }

    /// Whether the attachment was released before its ADD ended.
    pub fn is_deleted_during_add(&self, attachment: &Attachment) -> bool {
        self.deleted_meanwhile.contains_key(attachment)
    }

    /// Stops expecting the address for this attachment. Another attachment may still expect it.
    pub fn cancel_expected(&mut self, address: IpAddr, attachment: &Attachment) {
        self.expected.remove(&(address, attachment.clone()));
    }
}
