//! What one node decides alone: its blocks, its attachments and their addresses. Ledger first, memory second.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use polder_api::{Attachment, Family, Mac, Pod, PoolName};

use crate::allocator::{Allocator, Counts, Rest};
use crate::ledger::{Held, Identity, Kind, Ledger, LedgerError, OwnedBlock};
use crate::moment::Moment;
use crate::pool::{Pool, PoolState};

/// The addresses of one node.
#[derive(Debug)]
pub struct NodeIpam {
    ledger: Ledger,
    allocator: Allocator,
    blocks: Vec<OwnedBlock>,
    gateways: Vec<IpAddr>,
    attachments: BTreeMap<Attachment, Held>,
    /// Blocks of the ledger whose pool is not known yet: nothing is allocated from them.
    dormant: Vec<OwnedBlock>,
}

/// A wish for addresses.
#[derive(Debug, Clone)]
pub struct Wish {
    /// For which attachment.
    pub attachment: Attachment,
    /// What it is made of.
    pub kind: Kind,
    /// One address of each of these families, or none at all.
    pub families: Vec<Family>,
    /// Of this pool alone.
    pub pool: Option<PoolName>,
    /// MTU, in bytes.
    pub mtu: u32,
    /// Path of the network namespace.
    pub netns: String,
    /// The pod.
    pub pod: Option<Pod>,
}

/// A wish that was not fulfilled; nothing was allocated.
#[derive(Debug, thiserror::Error)]
pub enum AllocateError {
    /// The attachment has its addresses already.
    #[error("{} is attached already", .0.attachment)]
    Exists(Box<Held>),
    /// There is no address to give.
    #[error("no free {family} address: {} used, {} resting, {} free", counts.used, counts.resting, counts.free)]
    Shortage {
        /// Of that family.
        family: Family,
        /// What has become of the node's addresses, of that family and pool.
        counts: Counts,
    },
    /// It could not be written down.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
}

impl NodeIpam {
    /// Opens the ledger for this boot. Returns the attachments of another boot, which are void now.
    pub fn open(path: &Path, boot_id: &str, rest: Duration) -> Result<(Self, Vec<Held>), LedgerError> {
        let mut ledger = Ledger::open(path)?;
        let void = ledger.enter_boot(boot_id)?;
        let dormant = ledger.blocks()?;
        let attachments = ledger.attachments()?;
        let node = Self {
            allocator: Allocator::new(rest),
            blocks: dormant.clone(),
            gateways: ledger.gateways()?,
            attachments: attachments.into_iter().map(|held| (held.attachment.clone(), held)).collect(),
            dormant,
            ledger,
        };
        Ok((node, void))
    }

    /// Whose ledger it is.
    pub fn identity(&self) -> Result<Option<Identity>, LedgerError> {
        self.ledger.identity()
    }

    /// Writes down whose ledger it is.
    pub fn identify(&mut self, identity: &Identity) -> Result<(), LedgerError> {
        self.ledger.identify(identity)
    }

    /// Notes what a kernel setting was before it was changed, unless that is noted already.
    pub fn keep_sysctl(&mut self, path: &str, previous: &str) -> Result<(), LedgerError> {
        self.ledger.keep_sysctl(path, previous)
    }

    /// Takes down an attachment that is there and that the ledger has lost. Succeeds where the ledger has it.
    pub fn restore(&mut self, held: Held) -> Result<(), LedgerError> {
        if self.attachments.contains_key(&held.attachment) {
            return Ok(());
        }
        self.ledger.add_attachment(&held)?;
        self.attachments.insert(held.attachment.clone(), held);
        Ok(())
    }

    /// Takes down an address of the node itself that is there and that the ledger has lost. Succeeds where it has it.
    pub fn restore_gateway(&mut self, address: IpAddr) -> Result<(), LedgerError> {
        if self.gateways.contains(&address) {
            return Ok(());
        }
        self.ledger.add_gateway(address)?;
        self.gateways.push(address);
        self.gateways.sort();
        Ok(())
    }

    /// Takes in which pools there are: makes the blocks of the ledger usable whose pools are among them, and hands
    /// nothing out of blocks whose pools are not active.
    pub fn learn_pools(&mut self, pools: &[Pool]) -> Result<(), LedgerError> {
        let active =
            |name: &PoolName| pools.iter().any(|pool| pool.name == *name && pool.state == PoolState::Active);
        let closed = self.blocks.iter().map(|owned| &owned.pool).filter(|name| !active(name)).cloned();
        self.allocator.close(closed.collect());
        if self.dormant.is_empty() {
            return Ok(());
        }
        for pool in pools {
            let (known, unknown) = std::mem::take(&mut self.dormant)
                .into_iter()
                .partition(|owned| owned.pool == pool.name && pool.has_block(owned.block));
            self.dormant = unknown;
            let known: Vec<OwnedBlock> = known;
            for owned in known {
                self.wake(&owned, pool)?;
            }
        }
        Ok(())
    }

    /// Gives the allocator a block, with all that the ledger knows of its addresses.
    fn wake(&mut self, owned: &OwnedBlock, pool: &Pool) -> Result<(), LedgerError> {
        self.allocator.add(owned.block, pool);
        let inside = |address: &IpAddr| owned.block.cidr().has(*address);
        let held = self.attachments.values().flat_map(|held| &held.addresses);
        for address in held.chain(&self.gateways).copied().filter(inside) {
            // What the ledger says is used is used, whatever else stands in the way.
            let _ = self.allocator.take(address);
        }
        for (address, freed) in self.ledger.resting()? {
            if inside(&address) {
                self.allocator.free(address, freed);
            }
        }
        Ok(())
    }

    /// Adds a block that the node now owns. Succeeds where it owns it already.
    pub fn add_block(&mut self, owned: OwnedBlock, pool: &Pool) -> Result<(), LedgerError> {
        if self.blocks.iter().any(|known| known.block == owned.block) {
            return Ok(());
        }
        self.ledger.add_block(&owned)?;
        self.wake(&owned, pool)?;
        self.blocks.push(owned);
        Ok(())
    }

    /// The blocks that the node owns, the first claimed first.
    pub fn blocks(&self) -> &[OwnedBlock] {
        &self.blocks
    }

    /// The node's own addresses, at most one of a family.
    pub fn gateways(&self) -> &[IpAddr] {
        &self.gateways
    }

    /// Allocates the node's own address of each family that has a block and no such address: the first of the
    /// first block. Returns whether there is a new one.
    pub fn take_gateways(&mut self, now: Moment) -> Result<bool, LedgerError> {
        let mut new = false;
        for family in Family::BOTH {
            if self.gateways.iter().any(|gateway| Family::of(*gateway) == family) {
                continue;
            }
            if let Some(address) = self.allocator.next(family, None, Rest::Full, now) {
                self.ledger.add_gateway(address)?;
                let _ = self.allocator.take(address);
                self.gateways.push(address);
                self.gateways.sort();
                new = true;
            }
        }
        Ok(new)
    }

    /// Fulfils a wish: all of it is in the ledger when this returns, or nothing is.
    pub fn allocate(&mut self, wish: Wish, rest: Rest, now: Moment) -> Result<Held, AllocateError> {
        if let Some(held) = self.attachments.get(&wish.attachment) {
            return Err(AllocateError::Exists(Box::new(held.clone())));
        }
        let mut addresses = Vec::new();
        for family in &wish.families {
            let next = self.allocator.next(*family, wish.pool.as_ref(), rest, now);
            addresses.push(next.ok_or_else(|| AllocateError::Shortage {
                family: *family,
                counts: self.allocator.total(*family, wish.pool.as_ref(), now),
            })?);
        }
        addresses.sort();
        let Some(first) = addresses.first() else {
            return Err(AllocateError::Shortage { family: Family::V4, counts: Counts::default() });
        };
        let held = Held {
            mac: Mac::of_pod(*first),
            attachment: wish.attachment,
            kind: wish.kind,
            since: now,
            addresses,
            mtu: wish.mtu,
            netns: wish.netns,
            pod: wish.pod,
            leaving: false,
        };
        self.ledger.add_attachment(&held)?;
        for address in &held.addresses {
            let taken = self.allocator.take(*address);
            debug_assert_eq!(taken, Ok(()), "the allocator named the address as the next");
        }
        self.attachments.insert(held.attachment.clone(), held.clone());
        Ok(held)
    }

    /// The attachment, if it is there.
    pub fn get(&self, attachment: &Attachment) -> Option<&Held> {
        self.attachments.get(attachment)
    }

    /// All attachments.
    pub fn attachments(&self) -> impl Iterator<Item = &Held> {
        self.attachments.values()
    }

    /// Notes that the attachment is being taken away. It keeps its addresses; `None` if it is not there. It is
    /// leaving even if that could not be written down.
    pub fn begin_release(&mut self, attachment: &Attachment) -> (Option<Held>, Result<(), LedgerError>) {
        let Some(held) = self.attachments.get_mut(attachment) else { return (None, Ok(())) };
        let written = if held.leaving { Ok(()) } else { self.ledger.mark_leaving(attachment) };
        held.leaving = true;
        (Some(held.clone()), written)
    }

    /// Puts the addresses of an attachment to rest, whose interface is gone. Succeeds where there is none.
    pub fn release(&mut self, attachment: &Attachment, now: Moment) -> Result<(), LedgerError> {
        if !self.attachments.contains_key(attachment) {
            return Ok(());
        }
        self.ledger.remove_attachment(attachment, now)?;
        for address in self.attachments.remove(attachment).into_iter().flat_map(|held| held.addresses) {
            self.allocator.free(address, now);
        }
        Ok(())
    }

    /// The counts of each usable block at that moment.
    pub fn counts(&self, now: Moment) -> Vec<(OwnedBlock, Counts)> {
        let owned = |block| self.blocks.iter().find(|owned| owned.block == block).cloned();
        self.allocator.blocks(now).filter_map(|(block, _, counts)| Some((owned(block)?, counts))).collect()
    }

    /// The counts of one family, and of one pool if one is named.
    pub fn total(&self, family: Family, pool: Option<&PoolName>, now: Moment) -> Counts {
        self.allocator.total(family, pool, now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::allocator::USUAL_REST;
    use crate::record::Nonce;

    const NOW: Moment = Moment::from_millis(1_000_000);

    fn pool(cidr: &str, block_length: u8) -> Pool {
        Pool::new("p".parse().unwrap(), cidr.parse().unwrap(), block_length, PoolState::Active).unwrap()
    }

    fn open(folder: &tempfile::TempDir, boot: &str) -> (NodeIpam, Vec<Held>) {
        NodeIpam::open(&folder.path().join("ledger.db"), boot, USUAL_REST).unwrap()
    }

    /// A node with the first block of 8 addresses of 10.0.0.0/24, and its gateway 10.0.0.1.
    fn node(folder: &tempfile::TempDir) -> NodeIpam {
        let (mut node, _) = open(folder, "boot-1");
        let pool = pool("10.0.0.0/24", 29);
        let owned = OwnedBlock { block: pool.block(0), pool: pool.name.clone(), nonce: Nonce("x".into()) };
        node.add_block(owned, &pool).unwrap();
        assert!(node.take_gateways(NOW).unwrap());
        node
    }

    fn wish(container: &str, families: &[Family]) -> Wish {
        Wish {
            attachment: format!("net/{container}/eth0").parse().unwrap(),
            kind: Kind::Pod,
            families: families.to_vec(),
            pool: None,
            mtu: 1450,
            netns: String::new(),
            pod: None,
        }
    }

    fn allocate(node: &mut NodeIpam, container: &str) -> Result<Held, AllocateError> {
        node.allocate(wish(container, &[Family::V4]), Rest::Full, NOW)
    }

    #[test]
    fn the_gateway_is_the_first_address_of_the_first_block_and_is_taken_once() {
        let folder = tempfile::tempdir().unwrap();
        let mut node = node(&folder);
        assert_eq!(node.gateways(), ["10.0.0.1".parse::<IpAddr>().unwrap()]);
        assert!(!node.take_gateways(NOW).unwrap());
        assert_eq!(allocate(&mut node, "a").unwrap().addresses, ["10.0.0.2".parse::<IpAddr>().unwrap()]);
    }

    #[test]
    fn all_addresses_of_a_wish_are_allocated_or_none() {
        let folder = tempfile::tempdir().unwrap();
        let mut node = node(&folder);
        let both = node.allocate(wish("a", &Family::BOTH), Rest::Full, NOW);
        assert!(matches!(both, Err(AllocateError::Shortage { family: Family::V6, .. })));
        assert_eq!(node.total(Family::V4, None, NOW).used, 1, "the gateway's");
        assert_eq!(node.attachments().count(), 0);
    }

    #[test]
    fn a_second_wish_for_an_attachment_gets_the_first_ones_answer_and_nothing_new() {
        let folder = tempfile::tempdir().unwrap();
        let mut node = node(&folder);
        let first = allocate(&mut node, "a").unwrap();
        let Err(AllocateError::Exists(held)) = allocate(&mut node, "a") else { panic!("allocated twice") };
        assert_eq!(*held, first);
        assert_eq!(node.total(Family::V4, None, NOW).used, 2);
    }

    #[test]
    fn an_address_is_held_until_its_interface_is_gone_and_then_rests() {
        let folder = tempfile::tempdir().unwrap();
        let mut node = node(&folder);
        let held = allocate(&mut node, "a").unwrap();
        assert!(node.begin_release(&held.attachment).0.unwrap().leaving);
        assert_eq!(node.total(Family::V4, None, NOW).used, 2);
        node.release(&held.attachment, NOW).unwrap();
        let counts = node.total(Family::V4, None, NOW);
        assert_eq!((counts.used, counts.resting), (1, 1));
        node.release(&held.attachment, NOW).unwrap();
        assert_eq!(node.begin_release(&held.attachment).0, None);
    }

    #[test]
    fn a_restart_knows_what_is_used_and_what_rests() {
        let folder = tempfile::tempdir().unwrap();
        let mut before = node(&folder);
        let (kept, freed) = (allocate(&mut before, "kept").unwrap(), allocate(&mut before, "freed").unwrap());
        before.release(&freed.attachment, NOW).unwrap();
        drop(before);

        let (mut after, void) = open(&folder, "boot-1");
        assert_eq!(void, []);
        assert!(matches!(allocate(&mut after, "new"), Err(AllocateError::Shortage { .. })), "pool unknown");
        after.learn_pools(&[pool("10.0.0.0/24", 29)]).unwrap();
        assert_eq!(after.get(&kept.attachment), Some(&kept));
        let all: Vec<_> = (0..).map_while(|n| allocate(&mut after, &format!("new{n}")).ok()).collect();
        let addresses: Vec<_> = all.iter().flat_map(|held| held.addresses.clone()).collect();
        let expected: Vec<IpAddr> = (4..8).map(|last| IpAddr::from([10, 0, 0, last])).collect();
        assert_eq!(addresses, expected, "2 is kept and 3 rests");
    }

    #[test]
    fn nothing_goes_out_of_a_pool_that_is_not_active_any_more() {
        let folder = tempfile::tempdir().unwrap();
        let mut node = node(&folder);
        let kept = allocate(&mut node, "a").unwrap();
        let mut draining = pool("10.0.0.0/24", 29);
        draining.state = PoolState::Draining;
        node.learn_pools(&[draining]).unwrap();
        assert!(matches!(allocate(&mut node, "b"), Err(AllocateError::Shortage { .. })));
        assert_eq!(node.get(&kept.attachment), Some(&kept));
        node.learn_pools(&[pool("10.0.0.0/24", 29)]).unwrap();
        assert!(allocate(&mut node, "b").is_ok());
    }

    #[test]
    fn a_reboot_frees_everything_but_the_gateway_and_lets_it_rest() {
        let folder = tempfile::tempdir().unwrap();
        let mut before = node(&folder);
        let held = allocate(&mut before, "a").unwrap();
        drop(before);
        let (mut after, void) = open(&folder, "boot-2");
        assert_eq!(void, [held]);
        after.learn_pools(&[pool("10.0.0.0/24", 29)]).unwrap();
        let soon_after_boot = Moment::from_millis(20_000);
        let counts = after.total(Family::V4, None, soon_after_boot);
        assert_eq!((counts.used, counts.resting), (1, 1));
        assert_eq!(after.total(Family::V4, None, NOW).resting, 0);
    }
}
