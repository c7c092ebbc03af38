//! The node's probe endpoint: an attachment of the node itself, with at most one address per family. It is not a pod.
//!
//! It uses the last free address of a block, so that it does not change the addresses that pods get.

use std::collections::BTreeSet;
use std::net::IpAddr;

use polder_api::{Attachment, Family};

use super::{AllocateError, AllocationRequest, AllocationSource, NodeIpam};
use crate::allocator::{CoolDown, Counts};
use crate::ledger::{AttachmentEntry, AttachmentKind, Ledger, LedgerError, MemberState};
use crate::moment::Moment;
use crate::pool::Block;

/// Minimum block size, in addresses, for a probe endpoint.
pub const SMALLEST_BLOCK: u128 = 16;

/// Minimum pool size, in addresses, for a probe endpoint: smaller pools are for pods only.
pub const SMALLEST_POOL: u128 = 256;

/// Minimum number of addresses that stay free in the block when the endpoint takes one.
const LEFT_FOR_PODS: u64 = 4;

/// Number of addresses that are tried from the end of a block.
const MAX_CANDIDATES: u128 = 64;

impl<L: Ledger> NodeIpam<L> {
    /// The endpoint, if it has an address.
    pub fn probe(&self) -> Option<&AttachmentEntry> {
        self.attachments.get(&Attachment::of_probe())
    }

    /// Whether the endpoint has the right addresses: one in each family that has a suitable address, and none in a
    /// block that should become empty.
    pub fn probe_fits(&self, families: &BTreeSet<Family>, now: Moment) -> bool {
        let Some(held) = self.probe() else {
            return families.iter().all(|family| self.probe_address(*family, now).is_none());
        };
        let stays =
            |address: &IpAddr| families.contains(&Family::of(*address)) && self.may_stay(*address, now);
        let has = |family: &Family| held.addresses.iter().any(|address| Family::of(*address) == *family);
        let missing = families.iter().filter(|family| !has(family));
        !held.leaving
            && held.addresses.iter().all(stays)
            && missing.into_iter().all(|family| self.probe_address(*family, now).is_none())
    }

    /// Allocates the endpoint's addresses, in the families that have a suitable one. Existing addresses stay. `None` if
    /// there is no suitable address or the node is not a member of a cluster.
    pub fn take_probe(
        &mut self,
        families: &BTreeSet<Family>,
        mtu: u32,
        now: Moment,
    ) -> Result<Option<AttachmentEntry>, LedgerError> {
        if let Some(held) = self.probe() {
            return Ok(Some(held.clone()));
        }
        if self.identity()?.is_none_or(|identity| identity.member_state != MemberState::Member) {
            return Ok(None);
        }
        let requested: Vec<IpAddr> =
            families.iter().filter_map(|family| self.probe_address(*family, now)).collect();
        if requested.is_empty() {
            return Ok(None);
        }
        let families = requested.iter().copied().map(Family::of).collect();
        let request = AllocationRequest {
            attachment: Attachment::of_probe(),
            kind: AttachmentKind::Pod,
            source: AllocationSource::Blocks { families, pool: None, requested, reserved: Vec::new() },
            mac: None,
            mtu,
            netns: String::new(),
            pod: None,
            ports: Vec::new(),
        };
        match self.allocate(request, CoolDown::Full, now) {
            Ok(held) => Ok(Some(held)),
            Err(AllocateError::Ledger(error)) => Err(error),
            // For example, a pod requested the same MAC address.
            Err(_) => Ok(None),
        }
    }

    /// The counts without the endpoint: its addresses count as excluded.
    pub(super) fn without_probe(&self, mut counts: Counts, is_counted: impl Fn(IpAddr) -> bool) -> Counts {
        let own = self.probe().into_iter().flat_map(|held| &held.addresses);
        let own = own.filter(|address| is_counted(**address)).count() as u64;
        counts.used = counts.used.saturating_sub(own);
        counts.excluded += own;
        counts
    }

    /// Whether the endpoint may keep the address: its block is not being released, and its pool is open. In a closed
    /// pool it stays while the block has the gateway and there is no other address for the endpoint.
    fn may_stay(&self, address: IpAddr, now: Moment) -> bool {
        let mut blocks = self.blocks.iter().filter(|owned| !owned.leaving);
        let Some(owned) = blocks.find(|owned| owned.block.cidr().has(address)) else { return false };
        let has_gateway = self.gateways.iter().any(|gateway| owned.block.cidr().has(*gateway));
        let is_needed = has_gateway && self.probe_address(Family::of(address), now).is_none();
        !self.allocator.is_closed(&owned.pool) || is_needed
    }

    /// The address that the endpoint would get: the last free one of a suitable block, preferably of the gateway's
    /// block.
    fn probe_address(&self, family: Family, now: Moment) -> Option<IpAddr> {
        let mut blocks: Vec<Block> = self
            .allocator
            .blocks(now)
            .filter(|(block, pool, counts)| {
                block.family() == family
                    && !self.allocator.is_closed(pool)
                    && block.cidr().size() >= SMALLEST_BLOCK
                    && self.allocator.pool_size(*block) >= SMALLEST_POOL
                    && counts.free > LEFT_FOR_PODS
            })
            .map(|(block, ..)| block)
            .collect();
        blocks.sort_by_key(|block| !self.gateways.iter().any(|gateway| block.cidr().has(*gateway)));
        let from_the_end = |block: Block| {
            (0..MAX_CANDIDATES.min(block.cidr().size())).map(move |back| before(block.cidr().last(), back))
        };
        blocks.into_iter().flat_map(from_the_end).find(|address| self.allocator.ask(*address, now).is_ok())
    }
}

/// The address `places` before this one. Both must be in the same block.
fn before(address: IpAddr, places: u128) -> IpAddr {
    match address {
        IpAddr::V4(v4) => {
            let places = u32::try_from(places).unwrap_or(u32::MAX);
            IpAddr::V4(u32::from(v4).saturating_sub(places).into())
        }
        IpAddr::V6(v6) => IpAddr::V6(u128::from(v6).saturating_sub(places).into()),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::Pool;
    use crate::ids::{BootId, ClusterId, Incarnation, Nonce};
    use crate::ledger::memory::Memory;
    use crate::ledger::{NodeIdentity, OwnedBlock};
    use crate::pool::{Labels, PoolState};

    const NOW: Moment = Moment::from_millis(1_000_000);

    fn pool(name: &str, cidr: &str, length: u8, state: PoolState) -> Pool {
        Pool::new(name.parse().unwrap(), cidr.parse().unwrap(), length, state).unwrap()
    }

    fn node(pools: &[(&Pool, &str)]) -> NodeIpam<Memory> {
        let (mut node, _) =
            NodeIpam::with(Memory::default(), &BootId::new("boot"), Duration::from_mins(1)).unwrap();
        node.identify(&NodeIdentity {
            node: "n1".parse().unwrap(),
            incarnation: Incarnation::new("i"),
            cluster: ClusterId::new("c"),
            member_state: MemberState::Member,
        })
        .unwrap();
        for (pool, block) in pools {
            let block = Block::new(block.parse().unwrap());
            let owned = OwnedBlock { block, pool: pool.name.clone(), nonce: Nonce::new("x"), leaving: false };
            node.add_block(owned, pool, NOW).unwrap();
        }
        node.take_gateways(NOW).unwrap();
        node
    }

    fn v4() -> BTreeSet<Family> {
        BTreeSet::from([Family::V4])
    }

    fn taken(node: &mut NodeIpam<Memory>) -> Vec<String> {
        let held = node.take_probe(&v4(), 1450, NOW).unwrap();
        held.into_iter().flat_map(|held| held.addresses).map(|address| address.to_string()).collect()
    }

    #[test]
    fn the_probe_gets_the_last_address_of_the_gateway_block() {
        let pool = pool("p", "10.0.0.0/24", 26, PoolState::Active);
        let mut node = node(&[(&pool, "10.0.0.192/26"), (&pool, "10.0.0.0/26")]);
        assert!(!node.probe_fits(&v4(), NOW), "it has none yet");
        let gateway_block =
            node.blocks().iter().find(|owned| owned.block.cidr().has(node.gateways()[0])).unwrap();
        let expected = if gateway_block.block.cidr().last().to_string() == "10.0.0.255" {
            "10.0.0.254"
        } else {
            "10.0.0.63"
        };
        assert_eq!(taken(&mut node), [expected]);
        assert!(node.probe_fits(&v4(), NOW));
        assert_eq!(taken(&mut node), [expected], "the same again");
        assert_eq!(node.attachments().count(), 0);
        let of_pods = node.total(Family::V4, None, NOW);
        assert_eq!((of_pods.used, of_pods.excluded), (1, 3), "both ends of the pool, and the endpoint");
        assert_eq!(node.allocations(NOW).unwrap().probes.len(), 1);
        assert_eq!(node.facts(NOW).unwrap().attachments, []);
        assert_eq!(
            node.condition(expected.parse().unwrap(), NOW).unwrap(),
            Some(crate::node::AddressCondition::Probe)
        );
    }

    #[test]
    fn small_blocks_and_small_pools_have_no_probe_address() {
        for (cidr, length) in [("10.0.0.0/24", 29), ("10.0.0.0/25", 26)] {
            let pool = pool("p", cidr, length, PoolState::Active);
            let mut node = node(&[(&pool, &format!("10.0.0.0/{length}"))]);
            assert_eq!(taken(&mut node), Vec::<String>::new());
            assert!(node.probe_fits(&v4(), NOW));
        }
    }

    #[test]
    fn the_probe_leaves_a_drained_pool_if_another_pool_has_a_block() {
        let (old, new) = (
            pool("old", "10.0.0.0/24", 26, PoolState::Active),
            pool("new", "10.1.0.0/24", 26, PoolState::Active),
        );
        let mut node = node(&[(&old, "10.0.0.0/26")]);
        assert_eq!(taken(&mut node), ["10.0.0.63"]);
        let drained = old.in_state(PoolState::Draining);
        node.learn_pools(&[drained.clone(), new.clone()], &Labels::new()).unwrap();
        assert!(
            node.probe_fits(&v4(), NOW),
            "there is no other address, and the gateway keeps the block anyway"
        );
        let block = Block::new("10.1.0.0/26".parse().unwrap());
        let owned = OwnedBlock { block, pool: new.name.clone(), nonce: Nonce::new("y"), leaving: false };
        node.add_block(owned, &new, NOW).unwrap();
        assert!(!node.probe_fits(&v4(), NOW));
        node.release(&Attachment::of_probe(), NOW).unwrap();
        assert_eq!(taken(&mut node), ["10.1.0.63"]);
        assert!(node.probe_fits(&v4(), NOW));
    }

    #[test]
    fn a_removed_node_gets_no_probe_address() {
        let pool = pool("p", "10.0.0.0/24", 26, PoolState::Active);
        let mut node = node(&[(&pool, "10.0.0.0/26")]);
        let identity = node.identity().unwrap().unwrap();
        node.identify(&NodeIdentity { member_state: MemberState::Removed, ..identity }).unwrap();
        assert_eq!(taken(&mut node), Vec::<String>::new());
    }
}
