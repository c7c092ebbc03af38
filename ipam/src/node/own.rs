//! What a node has, as its steward looks at it, and how it parts with it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use polder_api::{Attachment, Family, rule};

use super::{FRESH, NodeIpam};
use crate::allocator::Counts;
use crate::allocator::Rest;
use crate::claim::AT_ONCE;
use crate::ledger::{Identity, Ledger, LedgerError, OwnedBlock};
use crate::moment::Moment;
use crate::pool::{Block, Pool};

/// What a node has.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Own {
    /// Who it is, if it has ever been in a cluster.
    pub identity: Option<Identity>,
    /// Its blocks.
    pub blocks: Vec<OwnedBlock>,
    /// Its own addresses.
    pub gateways: Vec<IpAddr>,
    /// The addresses of its probe endpoint.
    pub probes: Vec<IpAddr>,
    /// How many attachments there are, with that of the probe endpoint.
    pub attachments: usize,
    /// The addresses of attachments that are in none of its blocks.
    pub strays: Vec<Stray>,
    /// Reserved addresses that are being handed over to it, and those of attachments whose ADD may still make an interface.
    pub expected: BTreeSet<IpAddr>,
    /// Blocks that it can do without.
    pub spare: Vec<Block>,
    /// Its own addresses that are in none of its blocks, or the last of their blocks, out of which nothing goes any more,
    /// and for which there is another.
    pub idle_gateways: Vec<IpAddr>,
    /// Its own addresses of a family of which nothing goes out any more, and of which no attachment has an address.
    pub lonely_gateways: Vec<IpAddr>,
    /// The families of which it has no address of its own and could take one.
    pub could_take_gateway: BTreeSet<Family>,
}

/// An address of an attachment that is in no block of the node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stray {
    /// The address.
    pub address: IpAddr,
    /// The attachment.
    pub attachment: Attachment,
    /// The workload: `namespace/name` of its pod.
    pub owner: Option<String>,
}

impl Own {
    /// Whether it has nothing.
    pub fn is_bare(&self) -> bool {
        self.attachments == 0
            && self.blocks.is_empty()
            && self.gateways.is_empty()
            && self.expected.is_empty()
    }
}

rule! {
    /// Whether addresses of a block are used: then it is not given back.
    fn has_used(counts: Counts) -> bool {
        counts.used > 0
    }
    UsedBlockIsSpare => false
}

rule! {
    /// What of the unused addresses of a block that the ledger has lost rests first: another pod may have had any of them.
    fn resting_first(unused: &[IpAddr]) -> &[IpAddr] {
        unused
    }
    AdoptedBlockDoesNotRest => &[]
}

rule! {
    /// Whether the ledger of a machine that takes the place of another may be an old copy.
    fn may_be_an_old_copy() -> bool {
        true
    }
    OldCopyDoesNotRest => false
}

impl<L: Ledger> NodeIpam<L> {
    /// Of how many free addresses there should always be.
    pub fn low_water(&self) -> u64 {
        self.low_water
    }

    /// Keeps twice as many free addresses when it gives a block back, instead of twice [`LOW_WATER`](crate::claim::LOW_WATER).
    #[must_use]
    pub fn with_low_water(self, low_water: u64) -> Self {
        Self { low_water, ..self }
    }

    /// What the node has at that moment.
    pub fn own(&self, now: Moment) -> Result<Own, LedgerError> {
        let in_a_block = |address: &IpAddr| self.blocks.iter().any(|owned| owned.block.cidr().has(*address));
        let stray = |address: &IpAddr, held: &crate::ledger::Held| Stray {
            address: *address,
            attachment: held.attachment.clone(),
            owner: held.pod.as_ref().map(ToString::to_string),
        };
        let strays = self.attachments.values().flat_map(|held| {
            let outside = held.addresses.iter().filter(|address| !in_a_block(address));
            outside.map(|address| stray(address, held)).collect::<Vec<_>>()
        });
        let has_next = |family: Family| self.allocator.next(family, None, Rest::Shortest, now).is_some();
        let has_gateway = |family: &Family| self.gateways.iter().any(|own| Family::of(*own) == *family);
        Ok(Own {
            identity: self.identity()?,
            blocks: self.blocks.clone(),
            gateways: self.gateways.clone(),
            probes: self
                .probe()
                .filter(|held| !held.leaving)
                .map(|held| held.addresses.clone())
                .unwrap_or_default(),
            attachments: self.attachments.len(),
            strays: strays.collect(),
            expected: {
                let expected = self.expected.iter().map(|(address, _)| address);
                expected.chain(self.overtaken.values().flatten()).copied().collect()
            },
            spare: self.spare(now),
            idle_gateways: self.idle_gateways(now),
            lonely_gateways: self.lonely_gateways(),
            could_take_gateway: Family::BOTH
                .into_iter()
                .filter(|family| !has_gateway(family) && has_next(*family))
                .collect(),
        })
    }

    /// Whether the block has, or had, an address for a pod, or for the node itself.
    pub fn is_for_pods(&self, block: Block, now: Moment) -> bool {
        let found = self.allocator.blocks(now).find(|(known, ..)| *known == block);
        found.is_none_or(|(_, _, counts)| counts.used + counts.resting + counts.free > 0)
    }

    /// Blocks of which nothing is used and nothing rests, and that the node does not need: as many as go back at once.
    fn spare(&self, now: Moment) -> Vec<Block> {
        let mut free: BTreeMap<_, u64> = BTreeMap::new();
        for (_, pool, counts) in self.allocator.blocks(now) {
            *free.entry(pool).or_default() += counts.free;
        }
        let needless = |free: u64| free >= 2 * self.low_water;
        let is_fresh =
            |block: &Block| self.fresh.get(block).is_some_and(|claimed| now.since(*claimed) < FRESH);
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
            if spare.len() == AT_ONCE {
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
            (alone || self.is_stray(**gateway)) && self.next_gateway(**gateway, now).is_some()
        };
        self.gateways.iter().filter(idle).copied().collect()
    }

    fn lonely_gateways(&self) -> Vec<IpAddr> {
        let is_lonely = |family: Family| {
            let mut owned = self.blocks.iter().filter(|owned| owned.block.family() == family);
            let mut held = self.attachments.values().flat_map(|held| &held.addresses);
            owned.all(|owned| self.allocator.is_closed(&owned.pool))
                && !held.any(|address| Family::of(*address) == family)
        };
        self.gateways.iter().copied().filter(|gateway| is_lonely(Family::of(*gateway))).collect()
    }

    /// Has no address of its own of that family any more, where nothing else needs it. Returns whether it had it.
    pub fn drop_gateway(&mut self, gateway: IpAddr, now: Moment) -> Result<bool, LedgerError> {
        if !self.lonely_gateways().contains(&gateway) {
            return Ok(false);
        }
        self.ledger.remove_gateway(gateway, now)?;
        self.allocator.free(gateway, now);
        self.gateways.retain(|own| *own != gateway);
        Ok(true)
    }

    /// Whether the address is in no block of the node. A gateway that was found in the kernel can be of an earlier node of
    /// this name.
    fn is_stray(&self, gateway: IpAddr) -> bool {
        !self.blocks.iter().any(|owned| owned.block.cidr().has(gateway))
    }

    /// The address that would replace that gateway. A stray one can be another node's address at any moment, so its
    /// replacement needs only the shortest rest.
    fn next_gateway(&self, old: IpAddr, now: Moment) -> Option<IpAddr> {
        let rest = if self.is_stray(old) { Rest::Shortest } else { Rest::Full };
        self.allocator.next(Family::of(old), None, rest, now)
    }

    /// Adds a block that the store says is the node's and of which the ledger knows nothing: whoever had an address of it
    /// may have had it until now, so all that are not used rest. Succeeds where it is known.
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
        self.ledger.rest(resting_first(&unused), now)?;
        self.last.retain(|address, _| !owned.block.cidr().has(*address));
        self.add_block(owned, pool, now)
    }

    /// Lets every address of its blocks that is not used rest from that moment: another machine with this ledger may have
    /// had it until now.
    pub fn rest_unused(&mut self, now: Moment) -> Result<(), LedgerError> {
        if !may_be_an_old_copy() {
            return Ok(());
        }
        let dormant = self.dormant.iter().flat_map(|owned| owned.block.cidr().addresses());
        let mut allocator = self.allocator.clone();
        let unused: Vec<IpAddr> = allocator.rest_unused(now).into_iter().chain(dormant).collect();
        self.ledger.rest(&unused, now)?;
        self.allocator = allocator;
        self.last.clear();
        Ok(())
    }

    /// Begins to give a block back: nothing goes out of it any more. Refused, with false, where something of it is used
    /// or rests by now.
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

    /// Forgets a block that was given back. Succeeds where it is not known.
    pub fn disown(&mut self, block: Block) -> Result<(), LedgerError> {
        if self.blocks.iter().any(|owned| owned.block == block && owned.leaving) {
            self.ledger.remove_block(block)?;
            self.blocks.retain(|owned| owned.block != block);
            self.dormant.retain(|owned| owned.block != block);
        }
        Ok(())
    }

    /// Takes another address for the node's own instead of that one, if there is one. Returns whether there was.
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

    /// Forgets all blocks and the node's own addresses: it was removed. No attachment may be left.
    pub fn forget_all(&mut self) -> Result<(), LedgerError> {
        self.ledger.clear()?;
        for owned in std::mem::take(&mut self.blocks) {
            self.allocator.remove(owned.block);
        }
        self.dormant.clear();
        self.gateways.clear();
        self.last.clear();
        // What is handed over to it now is no pod's any more: it is about to say that its pods are gone.
        self.expected.clear();
        Ok(())
    }

    /// Expects that a reserved address is handed over to this node for that attachment: until it is used or given up, it
    /// is not let go. Only meanwhile the attachment can have it.
    pub fn expect(&mut self, address: IpAddr, attachment: &Attachment) {
        self.expected.insert((address, attachment.clone()));
    }

    /// As [`Self::release`], while the ADD of the attachment goes on: it can still make an interface. Until it is released again after
    /// that, a reserved address that it had is kept, and the attachment is not added again.
    pub fn release_before_its_add_ends(
        &mut self,
        attachment: &Attachment,
        now: Moment,
    ) -> Result<(), LedgerError> {
        let Some(held) = self.attachments.get(attachment).cloned() else { return Ok(()) };
        self.release(attachment, now)?;
        self.overtaken.insert(held.attachment, held.addresses);
        Ok(())
    }

    /// The attachments that were released before their ADD had ended.
    pub fn overtaken(&self) -> impl Iterator<Item = &Attachment> {
        self.overtaken.keys()
    }

    /// Whether the attachment was released before its ADD had ended.
    pub fn is_overtaken(&self, attachment: &Attachment) -> bool {
        self.overtaken.contains_key(attachment)
    }

    /// Expects the address no more for that attachment. Another may still.
    pub fn give_up(&mut self, address: IpAddr, attachment: &Attachment) {
        self.expected.remove(&(address, attachment.clone()));
    }
}
