//! Decisions of one node about its own blocks, attachments and addresses. Each change is written to the ledger before
//! memory.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use polder_api::{Attachment, Family, Mac, PoolName, PortMapping, rule};

use crate::allocator::{AddressRefusal, Allocator, CoolDown, Counts};
use crate::claim::LOW_WATER;
use crate::ids::BootId;
use crate::ledger::{AttachmentEntry, AttachmentKind, Ledger, LedgerError, NodeIdentity, OwnedBlock};
use crate::moment::Moment;
use crate::pool::{Block, Labels, Pool};

/// The addresses of one node.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct NodeIpam<L> {
    ledger: L,
    allocator: Allocator,
    blocks: Vec<OwnedBlock>,
    gateways: Vec<IpAddr>,
    attachments: BTreeMap<Attachment, AttachmentEntry>,
    /// Blocks of the ledger whose pool is not known yet: nothing is allocated from them.
    inactive: Vec<OwnedBlock>,
    /// Reserved addresses that are being handed over to this node, each with its attachment.
    expected: BTreeSet<(IpAddr, Attachment)>,
    /// Addresses of attachments that were released before their ADD ended: the plugin may still create the interface.
    deleted_meanwhile: BTreeMap<Attachment, Vec<IpAddr>>,
    /// The last attachment of each address that is in cool-down. Not in the ledger: empty after an agent start.
    last: BTreeMap<IpAddr, Attachment>,
    /// Blocks that were claimed recently, with the time of the claim: the requester has not allocated its address yet.
    fresh: BTreeMap<Block, Moment>,
    /// Number of addresses. With fewer free ones the node claims a block; on release of a block it keeps twice as many.
    low_water: u64,
}

/// Minimum time between adding a block and releasing it.
const MIN_BLOCK_AGE: Duration = Duration::from_secs(10);

rule! {
    /// Whether attachments of an earlier boot are void.
    fn reboot_voids_attachments() -> bool {
        true
    }
    BootIsIgnored => false
}

rule! {
    /// The gateway addresses of the ledger that are marked as used when a block becomes usable.
    fn kept_gateways(gateways: &[IpAddr]) -> &[IpAddr] {
        gateways
    }
    GatewayIsForgotten => &[]
}

rule! {
    /// The addresses of the ledger that are still in cool-down when a block becomes usable, with the time of their
    /// release.
    fn kept_cool_downs(resting: Vec<(IpAddr, Moment)>) -> Vec<(IpAddr, Moment)> {
        resting
    }
    RestIsForgotten => Vec::new()
}

rule! {
    /// Whether releasing `released` also releases `one`: only the same attachment, not others of the same pod.
    fn is_released_with(one: &AttachmentEntry, released: &AttachmentEntry) -> bool {
        one.attachment == released.attachment
    }
    ReleaseByPod => one.pod == released.pod
}

rule! {
    /// Whether the attachment was added before the call began, so that the caller could know it.
    fn is_older(held: &AttachmentEntry, began: Moment) -> bool {
        held.since < began
    }
    YoungIsStale => true
}

rule! {
    /// The pools that the node does not allocate from, given those that are closed to it.
    fn closed_to_allocation(closed: BTreeSet<PoolName>) -> BTreeSet<PoolName> {
        closed
    }
    DrainedPoolGives => BTreeSet::new()
}

impl<L: Ledger> NodeIpam<L> {
    /// Opens the ledger in this boot; `cool_down` is the cool-down. Returns the attachments of an earlier boot, which
    /// are now void.
    pub fn with(
        mut ledger: L,
        boot_id: &BootId,
        cool_down: Duration,
    ) -> Result<(Self, Vec<AttachmentEntry>), LedgerError> {
        let void = if reboot_voids_attachments() { ledger.enter_boot(boot_id)? } else { Vec::new() };
        let inactive = ledger.blocks()?;
        let attachments = ledger.attachments()?;
        let node = Self {
            allocator: Allocator::new(cool_down),
            blocks: inactive.clone(),
            gateways: ledger.gateways()?,
            attachments: attachments.into_iter().map(|held| (held.attachment.clone(), held)).collect(),
            inactive,
            ledger,
            expected: BTreeSet::new(),
            deleted_meanwhile: BTreeMap::new(),
            last: BTreeMap::new(),
            fresh: BTreeMap::new(),
            low_water: LOW_WATER,
        };
        Ok((node, void))
    }

    /// The ledger that this node uses.
    pub fn ledger(&self) -> &L {
        &self.ledger
    }

    /// The node identity that the ledger stores; `None` before the first registration.
    pub fn identity(&self) -> Result<Option<NodeIdentity>, LedgerError> {
        self.ledger.identity()
    }

    /// Writes the node identity to the ledger.
    pub fn identify(&mut self, identity: &NodeIdentity) -> Result<(), LedgerError> {
        self.ledger.identify(identity)
    }

    /// Saves the previous value of a kernel setting, unless one is already saved.
    pub fn keep_sysctl(&mut self, path: &str, previous: &str) -> Result<(), LedgerError> {
        self.ledger.keep_sysctl(path, previous)
    }

    /// The saved previous values of kernel settings as (path, value).
    pub fn kept_sysctls(&self) -> Result<Vec<(String, String)>, LedgerError> {
        self.ledger.sysctls()
    }

    /// Adds an existing attachment that is missing in the ledger. Succeeds if the ledger has it.
    pub fn restore(&mut self, held: AttachmentEntry) -> Result<(), LedgerError> {
        if self.attachments.contains_key(&held.attachment) {
            return Ok(());
        }
        self.ledger.add_attachment(&held)?;
        for address in &held.addresses {
            // Fails for addresses of blocks that are not usable yet: `activate_block` takes those.
            let _ = self.allocator.take(*address);
        }
        self.attachments.insert(held.attachment.clone(), held);
        Ok(())
    }

    /// Adds an existing gateway address that is missing in the ledger. Succeeds if the ledger has it.
    pub fn restore_gateway(&mut self, address: IpAddr) -> Result<(), LedgerError> {
        if self.gateways.contains(&address) {
            return Ok(());
        }
        self.ledger.add_gateway(address)?;
        self.gateways.push(address);
        self.gateways.sort();
        Ok(())
    }

    /// Updates the known pools: makes ledger blocks of these pools usable, and stops allocation from blocks whose pools
    /// are not active or do not match these node labels.
    pub fn learn_pools(&mut self, pools: &[Pool], labels: &Labels) -> Result<(), LedgerError> {
        let open = |name: &PoolName| pools.iter().any(|pool| pool.name == *name && pool.is_open_to(labels));
        let closed = self.blocks.iter().map(|owned| &owned.pool).filter(|name| !open(name)).cloned();
        self.allocator.close(closed_to_allocation(closed.collect()));
        if self.inactive.is_empty() {
            return Ok(());
        }
        for pool in pools {
            let (known, unknown) = std::mem::take(&mut self.inactive)
                .into_iter()
                .partition(|owned| owned.pool == pool.name && pool.has_block(owned.block));
            self.inactive = unknown;
            let known: Vec<OwnedBlock> = known;
            for owned in known {
                self.activate_block(&owned, pool)?;
                self.allocator.doubt(owned.block);
            }
        }
        Ok(())
    }

    /// Adds a block to the allocator, with the state of its addresses from the ledger.
    fn activate_block(&mut self, owned: &OwnedBlock, pool: &Pool) -> Result<(), LedgerError> {
        if owned.leaving {
            return Ok(());
        }
        self.allocator.add(owned.block, pool);
        let inside = |address: &IpAddr| owned.block.cidr().has(*address);
        let held = self.attachments.values().flat_map(|held| &held.addresses);
        for address in held.chain(kept_gateways(&self.gateways)).copied().filter(inside) {
            // The ledger decides: an address that the allocator refuses is used all the same.
            let _ = self.allocator.take(address);
        }
        for (address, freed) in kept_cool_downs(self.ledger.resting()?) {
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

    /// Adds a block that the node now owns. The node keeps it for at least `MIN_BLOCK_AGE`, so that its requester can
    /// use it. Succeeds if the node already owns it.
    pub fn add_block(&mut self, owned: OwnedBlock, pool: &Pool, now: Moment) -> Result<(), LedgerError> {
        if self.blocks.iter().any(|known| known.block == owned.block) {
            return Ok(());
        }
        self.ledger.add_block(&owned)?;
        self.activate_block(&owned, pool)?;
        self.fresh.retain(|_, claimed| now.since(*claimed) < MIN_BLOCK_AGE);
        self.fresh.insert(owned.block, now);
        self.blocks.push(owned);
        Ok(())
    }

    /// The blocks that the node owns, in the order of their claims.
    pub fn blocks(&self) -> &[OwnedBlock] {
        &self.blocks
    }

    /// The node's gateway addresses, at most one per family.
    pub fn gateways(&self) -> &[IpAddr] {
        &self.gateways
    }

    /// Allocates a gateway address in each family that has none and has a free address. Returns whether any was
    /// allocated.
    pub fn take_gateways(&mut self, now: Moment) -> Result<bool, LedgerError> {
        let mut new = false;
        for family in Family::BOTH {
            if self.gateways.iter().any(|gateway| Family::of(*gateway) == family) {
                continue;
            }
            if let Some(address) = self.allocator.next(family, None, CoolDown::Shortest, now) {
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

    /// Allocates the addresses of a request. Afterwards the ledger contains all of them, or none.
    pub fn allocate(
        &mut self,
        request: AllocationRequest,
        cool_down: CoolDown,
        now: Moment,
    ) -> Result<AttachmentEntry, AllocateError> {
        if let Some(held) = self.attachments.get(&request.attachment) {
            return Err(AllocateError::Exists(Box::new(held.clone())));
        }
        if self.is_deleted_during_add(&request.attachment) {
            return Err(AllocateError::DeletedDuringAdd);
        }
        let mut addresses = match &request.source {
            AllocationSource::Blocks { families, pool, requested, reserved } => {
                let expected =
                    |address: &IpAddr| self.expected.contains(&(*address, request.attachment.clone()));
                if let Some(address) = reserved.iter().copied().find(|address| !expected(address)) {
                    let why = AddressRefusal::NotExpected;
                    return Err(AllocateError::Refused { address, why, holder: None });
                }
                let choice =
                    Choice { pool: pool.as_ref(), requested, reserved, attachment: &request.attachment };
                self.choose(families, &choice, cool_down, now)?
            }
            AllocationSource::OtherPlugin(addresses) => addresses.clone(),
        };
        addresses.sort();
        if let Some((address, holder)) =
            addresses.iter().find_map(|address| Some((*address, self.holder(*address)?)))
        {
            return Err(AllocateError::Refused { address, why: AddressRefusal::Used, holder: Some(holder) });
        }
        let Some(first) = addresses.first() else {
            return Err(AllocateError::Shortage { family: Family::V4, counts: Counts::default() });
        };
        let has_gateway = |family: Family| self.gateways.iter().any(|own| Family::of(*own) == family);
        let families = addresses.iter().map(|address| Family::of(*address));
        if let (AttachmentKind::Pod, Some(family)) =
            (request.kind, families.clone().find(|family| !has_gateway(*family)))
        {
            return Err(AllocateError::NoGateway { family });
        }
        let mac = request.mac.unwrap_or_else(|| Mac::of_pod(*first));
        let same = |held: &&AttachmentEntry| {
            held.kind == AttachmentKind::Pod && held.mac == mac && request.kind == AttachmentKind::Pod
        };
        if let Some(holder) = self.attachments.values().find(same) {
            return Err(AllocateError::MacTaken { mac, holder: holder.attachment.clone() });
        }
        if let Some((port, holder)) = self.holder_of_port(&request.ports) {
            return Err(AllocateError::PortTaken { port, holder });
        }
        let held = AttachmentEntry {
            mac,
            attachment: request.attachment,
            kind: request.kind,
            since: now,
            addresses,
            mtu: request.mtu,
            netns: request.netns,
            pod: request.pod,
            leaving: false,
            gateways: Vec::new(),
            ports: request.ports,
        };
        self.ledger.add_attachment(&held)?;
        for address in &held.addresses {
            // Addresses from another IPAM plugin are unknown to the allocator.
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
        cool_down: CoolDown,
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
                    // The same attachment used the address last: no cool-down is needed.
                    Err(AddressRefusal::Resting(_)) if self.last.get(&address) == Some(attachment) => {
                        Ok(address)
                    }
                    asked => asked.map(|()| address).map_err(refused),
                };
            }
            self.allocator.next(*family, pool, cool_down, now).ok_or_else(|| AllocateError::Shortage {
                family: *family,
                counts: self.total(*family, pool, now),
            })
        };
        families.iter().map(choose).collect()
    }

    /// The attachment that uses the address.
    fn holder(&self, address: IpAddr) -> Option<Box<AttachmentEntry>> {
        let held = self.attachments.values().find(|held| held.addresses.contains(&address))?;
        Some(Box::new(held.clone()))
    }

    /// The first of these host ports that another pod has, and the attachment that has it.
    fn holder_of_port(&self, ports: &[PortMapping]) -> Option<(PortMapping, Box<AttachmentEntry>)> {
        ports.iter().find_map(|port| {
            let has_port = |held: &&AttachmentEntry| held.ports.iter().any(|other| other.overlaps(port));
            let holder = self.attachments.values().find(has_port)?;
            Some((*port, Box::new(holder.clone())))
        })
    }

    /// The block of an address, and the gateway for interfaces that another plugin creates in it: the node's gateway
    /// address, or the address reserved for this block's gateway.
    pub fn neighbourhood(&self, address: IpAddr) -> Option<(Block, IpAddr)> {
        let block = self.blocks.iter().map(|owned| owned.block).find(|block| block.cidr().has(address))?;
        let own = self.gateways.iter().copied();
        let inside = own.clone().find(|gateway| block.cidr().has(*gateway));
        let gateway = inside.or_else(|| self.allocator.gateway(block));
        // A block whose first address was given to a pod has no gateway: use the node's own, which works where routes
        // are applied.
        let gateway = gateway.or_else(|| own.clone().find(|own| Family::of(*own) == block.family()))?;
        Some((block, gateway))
    }

    /// Whether an address can be allocated.
    pub fn could_allocate(
        &self,
        family: Family,
        pool: Option<&PoolName>,
        cool_down: CoolDown,
        now: Moment,
    ) -> bool {
        self.allocator.next(family, pool, cool_down, now).is_some()
    }

    /// The attachment, if it exists.
    pub fn get(&self, attachment: &Attachment) -> Option<&AttachmentEntry> {
        self.attachments.get(attachment)
    }

    /// All pod attachments. Excludes the probe endpoint ([`Self::probe`]).
    pub fn attachments(&self) -> impl Iterator<Item = &AttachmentEntry> {
        self.attachments.values().filter(|held| !held.attachment.is_probe())
    }

    /// Marks the attachment as leaving; it keeps its addresses. Returns `None` if it does not exist. It is leaving in
    /// memory even if the ledger write fails.
    pub fn begin_release(
        &mut self,
        attachment: &Attachment,
    ) -> (Option<AttachmentEntry>, Result<(), LedgerError>) {
        let Some(held) = self.attachments.get_mut(attachment) else { return (None, Ok(())) };
        let written = if held.leaving { Ok(()) } else { self.ledger.mark_leaving(attachment) };
        held.leaving = true;
        (Some(held.clone()), written)
    }

    /// Releases the addresses of an attachment whose interface is gone; their cool-down starts. Succeeds if it does not
    /// exist.
    pub fn release(&mut self, attachment: &Attachment, now: Moment) -> Result<(), LedgerError> {
        self.deleted_meanwhile.remove(attachment);
        let Some(released) = self.attachments.get(attachment) else { return Ok(()) };
        let gone = self.attachments.values().filter(|one| is_released_with(one, released));
        for attachment in gone.map(|one| one.attachment.clone()).collect::<Vec<_>>() {
            self.ledger.remove_attachment(&attachment, now)?;
            for address in self.attachments.remove(&attachment).into_iter().flat_map(|held| held.addresses) {
                if self.allocator.free(address, now) {
                    self.last.insert(address, attachment.clone());
                }
            }
        }
        let rests =
            |address: &IpAddr| matches!(self.allocator.ask(*address, now), Err(AddressRefusal::Resting(_)));
        self.last.retain(|address, _| rests(address));
        Ok(())
    }

    /// The counts of each usable block at `now`. The address of the probe endpoint counts as excluded, as in
    /// [`Self::total`].
    pub fn counts(&self, now: Moment) -> Vec<(OwnedBlock, Counts)> {
        let owned = |block| self.blocks.iter().find(|owned| owned.block == block).cloned();
        let counts = self.allocator.blocks(now).filter_map(|(block, _, counts)| {
            Some((owned(block)?, self.without_probe(counts, |address| block.cidr().has(address))))
        });
        counts.collect()
    }

    /// The counts of one family, optionally of one pool only.
    pub fn total(&self, family: Family, pool: Option<&PoolName>, now: Moment) -> Counts {
        let counted = |address: IpAddr| {
            let mut blocks = self.blocks.iter().filter(|owned| pool.is_none_or(|pool| owned.pool == *pool));
            Family::of(address) == family && blocks.any(|owned| owned.block.cidr().has(address))
        };
        self.without_probe(self.allocator.total(family, pool, now), counted)
    }
}

/// The attachments that a GC removes: those that are not in `valid` and were added before the call began.
pub fn stale<'a>(
    there: impl Iterator<Item = &'a AttachmentEntry>,
    began: Moment,
    valid: &BTreeSet<Attachment>,
) -> Vec<Attachment> {
    let stale = there.filter(|held| is_older(held, began) && !valid.contains(&held.attachment));
    stale.map(|held| held.attachment.clone()).collect()
}

mod facts;
mod own;
mod probe;
mod request;

pub use facts::AddressCondition;
pub use own::{NodeAllocations, OutsideAddress};
pub use probe::{SMALLEST_BLOCK, SMALLEST_POOL};
use request::Choice;
pub use request::{AllocateError, AllocationRequest, AllocationSource};

#[cfg(test)]
mod tests;
