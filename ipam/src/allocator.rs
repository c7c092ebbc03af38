//! Chooses the next address to allocate: plain data about the node's own blocks.
//!
//! An address is free, used, or in cool-down after its release. An address in cool-down is not allocated: packets to
//! the previous owner may be in transit, neighbour entries may be valid, and clients may still use it. The address
//! that has been free for the longest time is allocated first, so that each stays unused as long as possible.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use polder_api::{Family, PoolName, rule};

use crate::moment::Moment;
use crate::pool::{Block, Pool};

/// The minimum cool-down of a released address, whatever the configuration.
pub const SHORTEST_COOL_DOWN: Duration = Duration::from_secs(10);

/// The default cool-down of a released address.
pub const DEFAULT_COOL_DOWN: Duration = Duration::from_mins(1);

/// The addresses of one node's blocks.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Allocator {
    cool_down: Duration,
    blocks: BTreeMap<Block, BlockAddresses>,
    /// Pools from which no address is allocated any more.
    closed: BTreeSet<PoolName>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct BlockAddresses {
    pool: PoolName,
    used: BTreeSet<IpAddr>,
    /// With the time of release. Never used addresses (`None`) sort first, addresses in cool-down last.
    unused: BTreeSet<(Option<Moment>, IpAddr)>,
    excluded: u64,
    /// The first address, if it is kept for the block's gateway.
    gateway: Option<IpAddr>,
    /// The number of addresses of the pool.
    pool_size: u128,
    /// Whether an address that seems never used may have been in use before the machine was booted.
    is_doubted: bool,
}

/// The number of addresses of one or more blocks, by state. The four add up to the size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counts {
    /// Allocated.
    pub used: u64,
    /// Released, in cool-down.
    pub resting: u64,
    /// Ready to be allocated.
    pub free: u64,
    /// Excluded from allocation: the first and the last address of the pool, and kept gateways.
    pub excluded: u64,
}

/// The cool-down that an address must have completed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CoolDown {
    /// The full cool-down.
    Full,
    /// The minimum cool-down, [`SHORTEST_COOL_DOWN`]: for when there is no other address and no other block.
    Shortest,
}

/// Why a requested address is not allocated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AddressRefusal {
    /// It is in use.
    Used,
    /// It is in cool-down for this much longer.
    Resting(Duration),
    /// It is in no block of this node, or is excluded from allocation.
    NotHere,
    /// It is reserved but not handed over to this node, or the node was removed before the pod got the address.
    NotExpected,
}

/// An address that cannot be marked as used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TakeError {
    /// It is already in use.
    /// Remedy: delete the pod that uses the address.
    #[error("{0} is already in use")]
    Used(IpAddr),
    /// It is in no block of this node, or is excluded from allocation.
    /// Remedy: check the blocks of the node with polderctl ipam show node NODE.
    #[error("{0} is not in a block of this node")]
    Foreign(IpAddr),
}

impl Allocator {
    /// An allocator without blocks. A cool-down `cool_down` below [`SHORTEST_COOL_DOWN`] is raised to it.
    pub fn new(cool_down: Duration) -> Self {
        Self {
            cool_down: cool_down.max(SHORTEST_COOL_DOWN),
            blocks: BTreeMap::new(),
            closed: BTreeSet::new(),
        }
    }

    /// Sets the pools from which no address is allocated any more. Used addresses stay in use.
    pub fn close(&mut self, pools: BTreeSet<PoolName>) {
        self.closed = pools;
    }

    /// Whether no address is allocated from the pool.
    pub fn is_closed(&self, pool: &PoolName) -> bool {
        self.closed.contains(pool)
    }

    /// Removes the block with its addresses.
    pub fn remove(&mut self, block: Block) {
        self.blocks.remove(&block);
    }

    /// Adds a block of the pool, all addresses never used. Does nothing if the block exists.
    pub fn add(&mut self, block: Block, pool: &Pool) {
        self.blocks.entry(block).or_insert_with(|| {
            let (excluded, usable): (Vec<_>, Vec<_>) =
                block.cidr().addresses().partition(|address| pool.excludes(*address));
            BlockAddresses {
                pool: pool.name.clone(),
                used: BTreeSet::new(),
                unused: usable.into_iter().map(|address| (None, address)).collect(),
                excluded: excluded.len() as u64,
                gateway: None,
                pool_size: pool.cidr().size(),
                is_doubted: false,
            }
        });
    }

    /// Puts the never used addresses of a block into the minimum cool-down, counted from the boot of the machine: a
    /// power failure may have lost the last writes about them.
    pub fn doubt(&mut self, block: Block) {
        if let Some(addresses) = self.blocks.get_mut(&block) {
            addresses.is_doubted = true;
        }
    }

    /// The next address to allocate: of that family, and of that pool if one is given.
    pub fn next(
        &self,
        family: Family,
        pool: Option<&PoolName>,
        cool_down: CoolDown,
        now: Moment,
    ) -> Option<IpAddr> {
        let of_pool = |addresses: &&BlockAddresses| {
            pool.is_none_or(|pool| *pool == addresses.pool) && !self.closed.contains(&addresses.pool)
        };
        let blocks = self.blocks.iter().filter(|(block, _)| block.family() == family);
        let required = match cool_down {
            CoolDown::Full => self.cool_down,
            CoolDown::Shortest => SHORTEST_COOL_DOWN,
        };
        let firsts = blocks.map(|(_, addresses)| addresses).filter(of_pool).filter_map(|addresses| {
            let first = addresses.unused.first()?;
            addresses.has_rested(first.0, required, now).then_some(first)
        });
        firsts.min().map(|(_, address)| *address)
    }

    /// Checks whether this address may be allocated. A request for one address has a reason: the minimum cool-down is
    /// enough.
    pub fn ask(&self, address: IpAddr, now: Moment) -> Result<(), AddressRefusal> {
        let (_, addresses) =
            self.blocks.iter().find(|(block, _)| block.cidr().has(address)).ok_or(AddressRefusal::NotHere)?;
        if addresses.used.contains(&address) {
            return Err(AddressRefusal::Used);
        }
        let (freed, _) =
            addresses.unused.iter().find(|(_, unused)| *unused == address).ok_or(AddressRefusal::NotHere)?;
        let cooled_down = match freed {
            Some(freed) => now.since(*freed),
            None if addresses.is_doubted => now.since(Moment::BOOT),
            None => SHORTEST_COOL_DOWN,
        };
        match SHORTEST_COOL_DOWN.checked_sub(cooled_down) {
            None | Some(Duration::ZERO) => Ok(()),
            Some(left) => Err(AddressRefusal::Resting(left)),
        }
    }

    /// Keeps the first address of a block for its gateway, unless it was ever used.
    pub fn reserve_gateway(&mut self, block: Block) {
        let Some(addresses) = self.blocks.get_mut(&block) else { return };
        let first = addresses.unused.first().copied().filter(|(freed, _)| freed.is_none());
        let least = addresses.used.iter().chain(addresses.unused.iter().map(|(_, address)| address)).min();
        if let Some(entry) = first.filter(|(_, first)| Some(first) == least) {
            addresses.unused.remove(&entry);
            addresses.excluded += 1;
            addresses.gateway = Some(entry.1);
        }
    }

    /// The address that is kept for the block's gateway.
    pub fn gateway(&self, block: Block) -> Option<IpAddr> {
        self.blocks.get(&block)?.gateway
    }

    /// The number of addresses of the block's pool. 0 if the block is unknown.
    pub fn pool_size(&self, block: Block) -> u128 {
        self.blocks.get(&block).map_or(0, |addresses| addresses.pool_size)
    }

    /// Marks the address as used.
    pub fn take(&mut self, address: IpAddr) -> Result<(), TakeError> {
        let addresses = self.block_of(address).ok_or(TakeError::Foreign(address))?;
        if addresses.used.contains(&address) {
            return Err(TakeError::Used(address));
        }
        let unused = addresses.unused.iter().find(|(_, unused)| *unused == address).copied();
        let entry = unused.ok_or(TakeError::Foreign(address))?;
        addresses.unused.remove(&entry);
        addresses.used.insert(address);
        Ok(())
    }

    /// Starts the cool-down of a used or never used address at `freed`. Returns false for any other address, for
    /// example one that was already released.
    pub fn free(&mut self, address: IpAddr, freed: Moment) -> bool {
        let Some(addresses) = self.block_of(address) else { return false };
        let known = addresses.used.remove(&address) || addresses.unused.remove(&(None, address));
        if known {
            addresses.unused.insert((Some(freed), address));
        }
        known
    }

    /// Starts the cool-down of all unused addresses at `since`, and returns them.
    pub fn cool_down_unused(&mut self, since: Moment) -> Vec<IpAddr> {
        let mut unused = Vec::new();
        for addresses in self.blocks.values_mut() {
            unused.extend(addresses.unused.iter().map(|(_, address)| *address));
            addresses.unused = addresses.unused.iter().map(|(_, address)| (Some(since), *address)).collect();
        }
        unused
    }

    /// The blocks, each with its pool and its counts at `now`.
    pub fn blocks(&self, now: Moment) -> impl Iterator<Item = (Block, &PoolName, Counts)> {
        self.blocks
            .iter()
            .map(move |(block, addresses)| (*block, &addresses.pool, self.counts(addresses, now)))
    }

    /// The counts of one family, and of one pool if one is given, without closed pools.
    pub fn total(&self, family: Family, pool: Option<&PoolName>, now: Moment) -> Counts {
        let wanted = |name: &PoolName| pool.is_none_or(|pool| pool == name) && !self.closed.contains(name);
        let of_family = self.blocks(now).filter(|(block, name, _)| block.family() == family && wanted(name));
        of_family.map(|(_, _, counts)| counts).fold(Counts::default(), |sum, counts| Counts {
            used: sum.used + counts.used,
            resting: sum.resting + counts.resting,
            free: sum.free + counts.free,
            excluded: sum.excluded + counts.excluded,
        })
    }

    fn counts(&self, addresses: &BlockAddresses, now: Moment) -> Counts {
        let cooled_down = addresses
            .unused
            .iter()
            .filter(|(freed, _)| addresses.has_rested(*freed, self.cool_down, now))
            .count() as u64;
        Counts {
            used: addresses.used.len() as u64,
            resting: addresses.unused.len() as u64 - cooled_down,
            free: cooled_down,
            excluded: addresses.excluded,
        }
    }

    fn block_of(&mut self, address: IpAddr) -> Option<&mut BlockAddresses> {
        self.blocks.iter_mut().find(|(block, _)| block.cidr().has(address)).map(|(_, addresses)| addresses)
    }
}

rule! {
    /// Whether the required cool-down of an address released at `freed` is over.
    fn is_over(freed: Moment, required: Duration, now: Moment) -> bool {
        now.since(freed) >= required
    }
    RestIsSkipped => true
}

impl BlockAddresses {
    fn has_rested(&self, freed: Option<Moment>, required: Duration, now: Moment) -> bool {
        match freed {
            Some(freed) => is_over(freed, required, now),
            None => !self.is_doubted || now.since(Moment::BOOT) >= SHORTEST_COOL_DOWN,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::pool::PoolState;

    const START: Moment = Moment::from_millis(1_000_000);

    fn pool(name: &str, cidr: &str, block_length: u8) -> Pool {
        Pool::new(name.parse().unwrap(), cidr.parse().unwrap(), block_length, PoolState::Active).unwrap()
    }

    /// An allocator over the first `blocks` blocks of 4 addresses of 10.0.0.0/24, and over one block of `fd00::/120`.
    fn allocator(blocks: u128) -> Allocator {
        let (v4, v6) = (pool("four", "10.0.0.0/24", 30), pool("six", "fd00::/120", 126));
        let mut allocator = Allocator::new(DEFAULT_COOL_DOWN);
        (0..blocks).for_each(|index| allocator.add(v4.block(index), &v4));
        allocator.add(v6.block(0), &v6);
        allocator
    }

    fn allocate(allocator: &mut Allocator, now: Moment) -> Option<IpAddr> {
        let address = allocator.next(Family::V4, None, CoolDown::Full, now)?;
        allocator.take(address).unwrap();
        Some(address)
    }

    #[test]
    fn every_address_except_the_ends_of_the_pool_is_allocated_once() {
        let mut allocator = allocator(2);
        let all: Vec<_> = std::iter::from_fn(|| allocate(&mut allocator, START)).collect();
        let expected: Vec<IpAddr> = (1..8).map(|last| IpAddr::from([10, 0, 0, last])).collect();
        assert_eq!(all, expected);
        let counts = allocator.total(Family::V4, None, START);
        assert_eq!(counts, Counts { used: 7, resting: 0, free: 0, excluded: 1 });
    }

    #[test]
    fn freed_addresses_are_allocated_after_the_cool_down_oldest_first() {
        let mut allocator = allocator(1);
        let all: Vec<_> = std::iter::from_fn(|| allocate(&mut allocator, START)).collect();
        let order = [all[1], all[0], all[2]];
        for (address, second) in order.iter().zip(0..) {
            assert!(allocator.free(*address, START + Duration::from_secs(second)));
        }
        assert_eq!(allocate(&mut allocator, START + Duration::from_secs(59)), None);
        let late = START + Duration::from_secs(100);
        assert_eq!(std::iter::from_fn(|| allocate(&mut allocator, late)).collect::<Vec<_>>(), order);
    }

    #[test]
    fn a_shortage_reduces_the_cool_down_to_the_shortest_one() {
        let mut allocator = allocator(1);
        while allocate(&mut allocator, START).is_some() {}
        allocator.free("10.0.0.2".parse().unwrap(), START);
        let needed = |seconds| {
            allocator.next(Family::V4, None, CoolDown::Shortest, START + Duration::from_secs(seconds))
        };
        assert_eq!(needed(9), None);
        assert_eq!(needed(10), Some("10.0.0.2".parse().unwrap()));
    }

    #[test]
    fn a_cool_down_below_the_minimum_has_no_effect() {
        let v4 = pool("four", "10.0.0.0/30", 30);
        let mut allocator = Allocator::new(Duration::ZERO);
        allocator.add(v4.block(0), &v4);
        while allocate(&mut allocator, START).is_some() {}
        allocator.free("10.0.0.1".parse().unwrap(), START);
        assert_eq!(allocate(&mut allocator, START + Duration::from_secs(9)), None);
    }

    #[test]
    fn unused_addresses_of_a_doubted_block_cool_down_after_a_boot() {
        let mut allocator = allocator(2);
        let next = |allocator: &Allocator, millis| {
            allocator.next(Family::V4, None, CoolDown::Full, Moment::from_millis(millis))
        };
        allocator.doubt(pool("four", "10.0.0.0/24", 30).block(0));
        assert_eq!(next(&allocator, 9_999), Some("10.0.0.4".parse().unwrap()), "from a block without doubt");
        assert_eq!(next(&allocator, 10_000), Some("10.0.0.1".parse().unwrap()));
        assert_eq!(
            allocator.ask("10.0.0.1".parse().unwrap(), Moment::from_millis(4_000)),
            Err(AddressRefusal::Resting(Duration::from_secs(6)))
        );
    }

    #[test]
    fn only_the_requested_pool_provides_addresses() {
        let (one, two) = (pool("one", "10.0.0.0/24", 30), pool("two", "10.1.0.0/24", 30));
        let mut allocator = Allocator::new(DEFAULT_COOL_DOWN);
        allocator.add(one.block(0), &one);
        let named =
            |allocator: &Allocator| allocator.next(Family::V4, Some(&two.name), CoolDown::Full, START);
        assert_eq!(named(&allocator), None);
        allocator.add(two.block(0), &two);
        assert_eq!(named(&allocator), Some("10.1.0.1".parse().unwrap()));
    }

    #[test]
    fn adding_a_block_again_keeps_its_used_addresses() {
        let mut allocator = allocator(1);
        let taken = allocate(&mut allocator, START).unwrap();
        let v4 = pool("four", "10.0.0.0/24", 30);
        allocator.add(v4.block(0), &v4);
        assert_eq!(allocator.take(taken), Err(TakeError::Used(taken)));
    }

    #[derive(Debug, Clone)]
    enum Step {
        Allocate { family: bool, shortest: bool },
        Take(u8),
        Free(u8),
        Wait(u32),
        AddBlock(u8),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => any::<(bool, bool)>().prop_map(|(family, shortest)| Step::Allocate { family, shortest }),
            1 => (0..20_u8).prop_map(Step::Take),
            4 => (0..20_u8).prop_map(Step::Free),
            2 => (0..40_000_u32).prop_map(Step::Wait),
            1 => (0..4_u8).prop_map(Step::AddBlock),
        ]
    }

    proptest! {
        /// Compares with a model that tracks the used addresses and the release time of each address.
        #[test]
        fn no_address_is_allocated_twice_or_too_early_or_lost(steps in prop::collection::vec(step(), 0..200)) {
            let v4 = pool("four", "10.0.0.0/24", 30);
            let mut allocator = allocator(1);
            let mut now = START;
            let mut used: BTreeSet<IpAddr> = BTreeSet::new();
            let mut freed: BTreeMap<IpAddr, Moment> = BTreeMap::new();
            let mut blocks: BTreeSet<u8> = [0].into();
            for step in steps {
                match step {
                    Step::Allocate { family, shortest } => {
                        let family = if family { Family::V4 } else { Family::V6 };
                        let cool_down = if shortest { CoolDown::Shortest } else { CoolDown::Full };
                        if let Some(address) = allocator.next(family, None, cool_down, now) {
                            prop_assert_eq!(Family::of(address), family);
                            prop_assert!(used.insert(address), "{} was allocated twice", address);
                            let required = if shortest { SHORTEST_COOL_DOWN } else { DEFAULT_COOL_DOWN };
                            if let Some(freed) = freed.get(&address) {
                                prop_assert!(now.since(*freed) >= required, "{} was allocated before the end of its cool-down", address);
                            }
                            prop_assert!(allocator.take(address).is_ok());
                        }
                    }
                    Step::Take(last) => {
                        let address = IpAddr::from([10, 0, 0, last]);
                        let ours = last != 0 && blocks.contains(&(last / 4));
                        match allocator.take(address) {
                            Ok(()) => prop_assert!(ours && used.insert(address)),
                            Err(TakeError::Used(_)) => prop_assert!(used.contains(&address)),
                            Err(TakeError::Foreign(_)) => prop_assert!(!ours),
                        }
                    }
                    Step::Free(last) => {
                        let address = IpAddr::from([10, 0, 0, last]);
                        if used.remove(&address) {
                            prop_assert!(allocator.free(address, now));
                            freed.insert(address, now);
                        }
                    }
                    Step::Wait(millis) => now = now + Duration::from_millis(millis.into()),
                    Step::AddBlock(index) => {
                        allocator.add(v4.block(index.into()), &v4);
                        blocks.insert(index);
                    }
                }
                for (block, _, counts) in allocator.blocks(now) {
                    let sum = counts.used + counts.resting + counts.free + counts.excluded;
                    prop_assert_eq!(sum, 4, "{}: {:?}", block, counts);
                    let really = used.iter().filter(|address| block.cidr().has(**address)).count();
                    prop_assert_eq!(counts.used, really as u64);
                }
            }
        }
    }
}
