//! What one node decides alone: its blocks, its attachments and their addresses. Ledger first, memory second.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use polder_api::{Attachment, Family, Mac, PoolName, rule};

use crate::allocator::{Allocator, Counts, Refused, Rest};
use crate::claim::LOW_WATER;
use crate::ids::BootId;
use crate::ledger::{Held, Identity, Kind, Ledger, LedgerError, OwnedBlock};
use crate::moment::Moment;
use crate::pool::{Block, Labels, Pool};

/// The addresses of one node.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct NodeIpam<L> {
    ledger: L,
    allocator: Allocator,
    blocks: Vec<OwnedBlock>,
    gateways: Vec<IpAddr>,
    attachments: BTreeMap<Attachment, Held>,
    /// Blocks of the ledger whose pool is not known yet: nothing is allocated from them.
    dormant: Vec<OwnedBlock>,
    /// Reserved addresses that are being handed over to this node, and for which attachment.
    expected: BTreeSet<(IpAddr, Attachment)>,
    /// What attachments had that were released before their ADD had ended: its plugin may still make the interface.
    overtaken: BTreeMap<Attachment, Vec<IpAddr>>,
    /// The attachments that had the addresses which were freed not long ago. Not in the ledger: an agent that starts lets them rest.
    last: BTreeMap<IpAddr, Attachment>,
    /// Blocks that were claimed not long ago, and when: whoever they were claimed for is about to take an address.
    fresh: BTreeMap<Block, Moment>,
    /// Of how many free addresses it keeps twice as many when it gives a block back.
    low_water: u64,
}

/// How long a block is kept at least that was just claimed.
const FRESH: Duration = Duration::from_secs(10);

rule! {
    /// Whether what was attached in another boot is void.
    fn another_boot_ends_all() -> bool {
        true
    }
    BootIsIgnored => false
}

rule! {
    /// Which of the node's own addresses are used when its ledger is opened.
    fn kept_gateways(gateways: &[IpAddr]) -> &[IpAddr] {
        gateways
    }
    GatewayIsForgotten => &[]
}

rule! {
    /// What still rests when the ledger is opened.
    fn kept_rest(resting: Vec<(IpAddr, Moment)>) -> Vec<(IpAddr, Moment)> {
        resting
    }
    RestIsForgotten => Vec::new()
}

rule! {
    /// What goes when an attachment is released: that one alone, whatever else its pod has.
    fn goes_with(one: &Held, released: &Held) -> bool {
        one.attachment == released.attachment
    }
    ReleaseByPod => one.pod == released.pod
}

rule! {
    /// Whether the attachment was there before the call began, so that whoever called could know of it.
    fn is_older(held: &Held, began: Moment) -> bool {
        held.since < began
    }
    YoungIsStale => true
}

rule! {
    /// The pools that nothing is handed out of any more, of those that the records close to this node.
    fn shut(closed: BTreeSet<PoolName>) -> BTreeSet<PoolName> {
        closed
    }
    DrainedPoolGives => BTreeSet::new()
}

impl<L: Ledger> NodeIpam<L> {
    /// Goes by that ledger in this boot. Returns the attachments of another boot, which are void now.
    pub fn with(mut ledger: L, boot_id: &BootId, rest: Duration) -> Result<(Self, Vec<Held>), LedgerError> {
        let void = if another_boot_ends_all() { ledger.enter_boot(boot_id)? } else { Vec::new() };
        let dormant = ledger.blocks()?;
        let attachments = ledger.attachments()?;
        let node = Self {
            allocator: Allocator::new(rest),
            blocks: dormant.clone(),
            gateways: ledger.gateways()?,
            attachments: attachments.into_iter().map(|held| (held.attachment.clone(), held)).collect(),
            dormant,
            ledger,
            expected: BTreeSet::new(),
            overtaken: BTreeMap::new(),
            last: BTreeMap::new(),
            fresh: BTreeMap::new(),
            low_water: LOW_WATER,
        };
        Ok((node, void))
    }

    /// What it goes by.
    pub fn ledger(&self) -> &L {
        &self.ledger
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
        for address in &held.addresses {
            // Those of blocks that are not usable yet are taken when they are.
            let _ = self.allocator.take(*address);
        }
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
    /// nothing out of blocks whose pools are not active, or not for a node with these labels.
    pub fn learn_pools(&mut self, pools: &[Pool], labels: &Labels) -> Result<(), LedgerError> {
        let open = |name: &PoolName| pools.iter().any(|pool| pool.name == *name && pool.is_open_to(labels));
        let closed = self.blocks.iter().map(|owned| &owned.pool).filter(|name| !open(name)).cloned();
        self.allocator.close(shut(closed.collect()));
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
                self.allocator.doubt(owned.block);
            }
        }
        Ok(())
    }

    /// Gives the allocator a block, with all that the ledger knows of its addresses.
    fn wake(&mut self, owned: &OwnedBlock, pool: &Pool) -> Result<(), LedgerError> {
        if owned.leaving {
            return Ok(());
        }
        self.allocator.add(owned.block, pool);
        let inside = |address: &IpAddr| owned.block.cidr().has(*address);
        let held = self.attachments.values().flat_map(|held| &held.addresses);
        for address in held.chain(kept_gateways(&self.gateways)).copied().filter(inside) {
            // What the ledger says is used is used, whatever else stands in the way.
            let _ = self.allocator.take(address);
        }
        for (address, freed) in kept_rest(self.ledger.resting()?) {
            if inside(&address) {
                self.allocator.free(address, freed);
            }
        }
        let mut gateways =
            self.gateways.iter().filter(|gateway| Family::of(**gateway) == owned.block.family());
        if gateways.clone().next().is_some() && !gateways.any(inside) {
            self.allocator.reserve_gateway(owned.block);
        }
        Ok(())
    }

    /// Adds a block that the node now owns. It is not given back before whoever it was claimed for had time to use it.
    /// Succeeds where the node owns it already.
    pub fn add_block(&mut self, owned: OwnedBlock, pool: &Pool, now: Moment) -> Result<(), LedgerError> {
        if self.blocks.iter().any(|known| known.block == owned.block) {
            return Ok(());
        }
        self.ledger.add_block(&owned)?;
        self.wake(&owned, pool)?;
        self.fresh.retain(|_, claimed| now.since(*claimed) < FRESH);
        self.fresh.insert(owned.block, now);
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
            if let Some(address) = self.allocator.next(family, None, Rest::Shortest, now) {
                self.ledger.add_gateway(address)?;
                let _ = self.allocator.take(address);
                self.last.remove(&address);
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
        if self.is_overtaken(&wish.attachment) {
            return Err(AllocateError::Overtaken);
        }
        let mut addresses = match &wish.source {
            Source::Blocks { families, pool, requested, reserved } => {
                let expected =
                    |address: &IpAddr| self.expected.contains(&(*address, wish.attachment.clone()));
                if let Some(address) = reserved.iter().copied().find(|address| !expected(address)) {
                    let why = Refused::NotExpected;
                    return Err(AllocateError::Refused { address, why, holder: None });
                }
                let choice =
                    Choice { pool: pool.as_ref(), requested, reserved, attachment: &wish.attachment };
                self.choose(families, &choice, rest, now)?
            }
            Source::Elsewhere(addresses) => addresses.clone(),
        };
        addresses.sort();
        if let Some((address, holder)) =
            addresses.iter().find_map(|address| Some((*address, self.holder(*address)?)))
        {
            return Err(AllocateError::Refused { address, why: Refused::Used, holder: Some(holder) });
        }
        let Some(first) = addresses.first() else {
            return Err(AllocateError::Shortage { family: Family::V4, counts: Counts::default() });
        };
        let has_gateway = |family: Family| self.gateways.iter().any(|own| Family::of(*own) == family);
        let families = addresses.iter().map(|address| Family::of(*address));
        if let (Kind::Pod, Some(family)) = (wish.kind, families.clone().find(|family| !has_gateway(*family)))
        {
            return Err(AllocateError::NoGateway { family });
        }
        let mac = wish.mac.unwrap_or_else(|| Mac::of_pod(*first));
        let same = |held: &&Held| held.kind == Kind::Pod && held.mac == mac && wish.kind == Kind::Pod;
        if let Some(holder) = self.attachments.values().find(same) {
            return Err(AllocateError::MacTaken { mac, holder: holder.attachment.clone() });
        }
        let held = Held {
            mac,
            attachment: wish.attachment,
            kind: wish.kind,
            since: now,
            addresses,
            mtu: wish.mtu,
            netns: wish.netns,
            pod: wish.pod,
            leaving: false,
            gateways: Vec::new(),
        };
        self.ledger.add_attachment(&held)?;
        for address in &held.addresses {
            // Those from elsewhere are not the allocator's.
            let _ = self.allocator.take(*address);
            self.last.remove(address);
            self.expected.remove(&(*address, held.attachment.clone()));
        }
        self.attachments.insert(held.attachment.clone(), held.clone());
        Ok(held)
    }

    fn choose(
        &self,
        families: &[Family],
        choice: &Choice<'_>,
        rest: Rest,
        now: Moment,
    ) -> Result<Vec<IpAddr>, AllocateError> {
        let Choice { pool, requested, reserved, attachment } = *choice;
        let choose = |family: &Family| {
            if let Some(address) = reserved.iter().copied().find(|address| Family::of(*address) == *family) {
                return Ok(address);
            }
            if let Some(address) = requested.iter().copied().find(|address| Family::of(*address) == *family) {
                let refused = |why| AllocateError::Refused { address, why, holder: self.holder(address) };
                return match self.allocator.ask(address, now) {
                    // Nobody else has had it since.
                    Err(Refused::Resting(_)) if self.last.get(&address) == Some(attachment) => Ok(address),
                    asked => asked.map(|()| address).map_err(refused),
                };
            }
            self.allocator.next(*family, pool, rest, now).ok_or_else(|| AllocateError::Shortage {
                family: *family,
                counts: self.total(*family, pool, now),
            })
        };
        families.iter().map(choose).collect()
    }

    /// Who has the address.
    fn holder(&self, address: IpAddr) -> Option<Box<Held>> {
        let held = self.attachments.values().find(|held| held.addresses.contains(&address))?;
        Some(Box::new(held.clone()))
    }

    /// The block of an address, and the gateway for those of its addresses whose interfaces are not ours: the node's
    /// own, or the one that is kept for the block.
    pub fn neighbourhood(&self, address: IpAddr) -> Option<(Block, IpAddr)> {
        let block = self.blocks.iter().map(|owned| owned.block).find(|block| block.cidr().has(address))?;
        let own = self.gateways.iter().copied();
        let inside = own.clone().find(|gateway| block.cidr().has(*gateway));
        let gateway = inside.or_else(|| self.allocator.gateway(block));
        // A block whose first address went to a pod has none: the node's own does, where routes are followed.
        let gateway = gateway.or_else(|| own.clone().find(|own| Family::of(*own) == block.family()))?;
        Some((block, gateway))
    }

    /// Whether there is an address to give.
    pub fn could_allocate(&self, family: Family, pool: Option<&PoolName>, rest: Rest, now: Moment) -> bool {
        self.allocator.next(family, pool, rest, now).is_some()
    }

    /// The attachment, if it is there.
    pub fn get(&self, attachment: &Attachment) -> Option<&Held> {
        self.attachments.get(attachment)
    }

    /// All attachments of pods. That of the probe endpoint is none ([`Self::probe`]).
    pub fn attachments(&self) -> impl Iterator<Item = &Held> {
        self.attachments.values().filter(|held| !held.attachment.is_probe())
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
        self.overtaken.remove(attachment);
        let Some(released) = self.attachments.get(attachment) else { return Ok(()) };
        let gone = self.attachments.values().filter(|one| goes_with(one, released));
        for attachment in gone.map(|one| one.attachment.clone()).collect::<Vec<_>>() {
            self.ledger.remove_attachment(&attachment, now)?;
            for address in self.attachments.remove(&attachment).into_iter().flat_map(|held| held.addresses) {
                if self.allocator.free(address, now) {
                    self.last.insert(address, attachment.clone());
                }
            }
        }
        let rests = |address: &IpAddr| matches!(self.allocator.ask(*address, now), Err(Refused::Resting(_)));
        self.last.retain(|address, _| rests(address));
        Ok(())
    }

    /// The counts of each usable block at that moment. The address of the probe endpoint counts as excluded, as it is in
    /// [`Self::total`].
    pub fn counts(&self, now: Moment) -> Vec<(OwnedBlock, Counts)> {
        let owned = |block| self.blocks.iter().find(|owned| owned.block == block).cloned();
        let counts = self.allocator.blocks(now).filter_map(|(block, _, counts)| {
            Some((owned(block)?, self.without_probe(counts, |address| block.cidr().has(address))))
        });
        counts.collect()
    }

    /// The counts of one family, and of one pool if one is named.
    pub fn total(&self, family: Family, pool: Option<&PoolName>, now: Moment) -> Counts {
        let counted = |address: IpAddr| {
            let mut blocks = self.blocks.iter().filter(|owned| pool.is_none_or(|pool| owned.pool == *pool));
            Family::of(address) == family && blocks.any(|owned| owned.block.cidr().has(address))
        };
        self.without_probe(self.allocator.total(family, pool, now), counted)
    }
}

/// What a GC takes away: what is there of a network, is not valid, and was there before the call began.
pub fn stale<'a>(
    there: impl Iterator<Item = &'a Held>,
    began: Moment,
    valid: &BTreeSet<Attachment>,
) -> Vec<Attachment> {
    let stale = there.filter(|held| is_older(held, began) && !valid.contains(&held.attachment));
    stale.map(|held| held.attachment.clone()).collect()
}

mod facts;
mod own;
mod probe;
mod wish;

pub use facts::Condition;
pub use own::{Own, Stray};
pub use probe::{SMALLEST_BLOCK, SMALLEST_POOL};
use wish::Choice;
pub use wish::{AllocateError, Source, Wish};

#[cfg(test)]
mod tests;
