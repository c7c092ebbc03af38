//! Tests of a node's decisions about its addresses.

use super::*;
use crate::allocator::DEFAULT_COOL_DOWN;
use crate::ids::{BootId, Nonce};
use crate::ledger::memory::Memory;
use crate::pool::PoolState;

const NOW: Moment = Moment::from_millis(1_000_000);

fn pool(cidr: &str, block_length: u8) -> Pool {
    Pool::new("p".parse().unwrap(), cidr.parse().unwrap(), block_length, PoolState::Active).unwrap()
}

type Node = NodeIpam<Memory>;

fn open(ledger: Memory, boot: &str) -> (Node, Vec<AttachmentEntry>) {
    NodeIpam::with(ledger, &BootId::new(boot), DEFAULT_COOL_DOWN).unwrap()
}

/// The same node after an agent restart.
fn again(before: Node, boot: &str) -> (Node, Vec<AttachmentEntry>) {
    open(before.ledger, boot)
}

/// A node with the first block of 8 addresses of 10.0.0.0/24, and gateway 10.0.0.1.
fn node() -> Node {
    let (mut node, _) = open(Memory::default(), "boot-1");
    let pool = pool("10.0.0.0/24", 29);
    let owned =
        OwnedBlock { block: pool.block(0), pool: pool.name.clone(), nonce: Nonce::new("x"), leaving: false };
    node.add_block(owned, &pool, Moment::BOOT).unwrap();
    assert!(node.take_gateways(NOW).unwrap());
    node
}

fn request(container: &str, families: &[Family]) -> AllocationRequest {
    AllocationRequest {
        attachment: format!("net/{container}/eth0").parse().unwrap(),
        kind: AttachmentKind::Pod,
        source: AllocationSource::Blocks {
            families: families.to_vec(),
            pool: None,
            requested: Vec::new(),
            reserved: Vec::new(),
        },
        mac: None,
        mtu: 1450,
        netns: String::new(),
        pod: None,
        ports: Vec::new(),
    }
}

fn from_elsewhere(container: &str, address: &str) -> AllocationRequest {
    AllocationRequest {
        source: AllocationSource::OtherPlugin(vec![address.parse().unwrap()]),
        ..request(container, &[])
    }
}

fn asking_for(container: &str, address: &str) -> AllocationRequest {
    let requested = vec![address.parse().unwrap()];
    AllocationRequest {
        source: AllocationSource::Blocks {
            families: vec![Family::V4],
            pool: None,
            requested,
            reserved: Vec::new(),
        },
        ..request(container, &[])
    }
}

fn allocate(node: &mut Node, container: &str) -> Result<AttachmentEntry, AllocateError> {
    node.allocate(request(container, &[Family::V4]), CoolDown::Full, NOW)
}

#[test]
fn the_gateway_is_the_first_address_of_the_first_block_and_is_taken_once() {
    let mut node = node();
    assert_eq!(node.gateways(), ["10.0.0.1".parse::<IpAddr>().unwrap()]);
    assert!(!node.take_gateways(NOW).unwrap());
    assert_eq!(allocate(&mut node, "a").unwrap().addresses, ["10.0.0.2".parse::<IpAddr>().unwrap()]);
}

#[test]
fn a_request_gets_all_its_addresses_or_none() {
    let mut node = node();
    let both = node.allocate(request("a", &Family::BOTH), CoolDown::Full, NOW);
    assert!(matches!(both, Err(AllocateError::Shortage { family: Family::V6, .. })));
    assert_eq!(node.total(Family::V4, None, NOW).used, 1, "the gateway address");
    assert_eq!(node.attachments().count(), 0);
}

#[test]
fn a_repeated_request_gets_the_existing_addresses() {
    let mut node = node();
    let first = allocate(&mut node, "a").unwrap();
    let Err(AllocateError::Exists(held)) = allocate(&mut node, "a") else { panic!("allocated twice") };
    assert_eq!(*held, first);
    assert_eq!(node.total(Family::V4, None, NOW).used, 2);
}

#[test]
fn an_address_is_used_until_its_release_and_then_cools_down() {
    let mut node = node();
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
fn used_and_cooling_addresses_survive_a_restart() {
    let mut before = node();
    let (kept, freed) = (allocate(&mut before, "kept").unwrap(), allocate(&mut before, "freed").unwrap());
    before.release(&freed.attachment, NOW).unwrap();

    let (mut after, void) = again(before, "boot-1");
    assert_eq!(void, []);
    assert!(matches!(allocate(&mut after, "new"), Err(AllocateError::Shortage { .. })), "pool unknown");
    after.learn_pools(&[pool("10.0.0.0/24", 29)], &Labels::new()).unwrap();
    assert_eq!(after.get(&kept.attachment), Some(&kept));
    let all: Vec<_> = (0..).map_while(|n| allocate(&mut after, &format!("new{n}")).ok()).collect();
    let addresses: Vec<_> = all.iter().flat_map(|held| held.addresses.clone()).collect();
    let expected: Vec<IpAddr> = (4..8).map(|last| IpAddr::from([10, 0, 0, last])).collect();
    assert_eq!(addresses, expected, "2 is used and 3 is in cool-down");
}

#[test]
fn a_drained_pool_allocates_no_address() {
    let mut node = node();
    let kept = allocate(&mut node, "a").unwrap();
    let mut draining = pool("10.0.0.0/24", 29);
    draining.state = PoolState::Draining;
    node.learn_pools(&[draining], &Labels::new()).unwrap();
    assert!(matches!(allocate(&mut node, "b"), Err(AllocateError::Shortage { .. })));
    assert_eq!(node.get(&kept.attachment), Some(&kept));
    node.learn_pools(&[pool("10.0.0.0/24", 29)], &Labels::new()).unwrap();
    assert!(allocate(&mut node, "b").is_ok());
}

#[test]
fn after_a_reboot_all_addresses_except_the_gateway_cool_down() {
    let mut before = node();
    let held = allocate(&mut before, "a").unwrap();
    let (mut after, void) = again(before, "boot-2");
    assert_eq!(void, [held]);
    after.learn_pools(&[pool("10.0.0.0/24", 29)], &Labels::new()).unwrap();
    let soon_after_boot = Moment::from_millis(20_000);
    let counts = after.total(Family::V4, None, soon_after_boot);
    assert_eq!((counts.used, counts.resting), (1, 1));
    assert_eq!(after.total(Family::V4, None, NOW).resting, 0);
}

#[test]
fn only_the_last_owner_gets_an_address_again_during_its_cool_down() {
    let mut node = node();
    let attachment = node.allocate(asking_for("a", "10.0.0.5"), CoolDown::Full, NOW).unwrap().attachment;
    node.release(&attachment, NOW).unwrap();
    let refused = node.allocate(asking_for("b", "10.0.0.5"), CoolDown::Full, NOW).unwrap_err();
    assert!(matches!(refused, AllocateError::Refused { why: AddressRefusal::Resting(_), .. }), "{refused}");
    let next = node.allocate(request("c", &[Family::V4]), CoolDown::Shortest, NOW).unwrap();
    assert_ne!(next.addresses, ["10.0.0.5".parse::<IpAddr>().unwrap()]);
    node.allocate(asking_for("a", "10.0.0.5"), CoolDown::Full, NOW).unwrap();
    node.release(&attachment, NOW).unwrap();
    let later = NOW + Duration::from_secs(10);
    let other = node.allocate(asking_for("b", "10.0.0.5"), CoolDown::Full, later).unwrap().attachment;
    node.release(&other, later).unwrap();
    // Another attachment used it in between.
    assert!(node.allocate(asking_for("a", "10.0.0.5"), CoolDown::Full, later).is_err());
}

#[test]
fn a_requested_address_is_allocated_or_refused_with_the_reason() {
    let mut node = node();
    let held = node.allocate(asking_for("a", "10.0.0.5"), CoolDown::Full, NOW).unwrap();
    assert_eq!(held.addresses, ["10.0.0.5".parse::<IpAddr>().unwrap()]);
    let why = |node: &mut Node, address: &str, now: Moment| match node.allocate(
        asking_for("b", address),
        CoolDown::Full,
        now,
    ) {
        Err(AllocateError::Refused { why, holder, .. }) => (why, holder.map(|held| held.attachment)),
        other => panic!("{other:?}"),
    };
    assert_eq!(why(&mut node, "10.0.0.5", NOW), (AddressRefusal::Used, Some(held.attachment.clone())));
    assert_eq!(why(&mut node, "10.0.0.1", NOW), (AddressRefusal::Used, None), "the gateway address");
    assert_eq!(why(&mut node, "10.9.0.1", NOW), (AddressRefusal::NotHere, None));
    node.release(&held.attachment, NOW).unwrap();
    let soon = NOW + Duration::from_secs(4);
    assert_eq!(why(&mut node, "10.0.0.5", soon), (AddressRefusal::Resting(Duration::from_secs(6)), None));
    let later = NOW + Duration::from_secs(10);
    assert!(node.allocate(asking_for("b", "10.0.0.5"), CoolDown::Full, later).is_ok());
}

#[test]
fn addresses_from_another_plugin_are_used_once_without_cool_down() {
    let mut node = node();
    let held = node.allocate(from_elsewhere("a", "192.0.2.5"), CoolDown::Full, NOW).unwrap();
    let again = node.allocate(from_elsewhere("b", "192.0.2.5"), CoolDown::Full, NOW);
    assert!(matches!(again, Err(AllocateError::Refused { why: AddressRefusal::Used, .. })));
    node.release(&held.attachment, NOW).unwrap();
    assert!(node.allocate(from_elsewhere("b", "192.0.2.5"), CoolDown::Full, NOW).is_ok());
}

#[test]
fn no_two_pods_have_the_same_mac_address() {
    let mut node = node();
    let mac = Some("02:00:00:00:00:07".parse().unwrap());
    let held =
        node.allocate(AllocationRequest { mac, ..request("a", &[Family::V4]) }, CoolDown::Full, NOW).unwrap();
    assert_eq!(Some(held.mac), mac);
    let again = node.allocate(AllocationRequest { mac, ..request("b", &[Family::V4]) }, CoolDown::Full, NOW);
    assert!(matches!(again, Err(AllocateError::MacTaken { holder, .. }) if holder == held.attachment));
}

#[test]
fn no_two_pods_have_the_same_host_port_of_an_address() {
    let mut node = node();
    let with_port = |container: &str, port: &str| AllocationRequest {
        ports: vec!["9:9/udp".parse().unwrap(), port.parse().unwrap()][usize::from(container != "a")..]
            .to_vec(),
        ..request(container, &[Family::V4])
    };
    let mut ask =
        |container: &str, port: &str| node.allocate(with_port(container, port), CoolDown::Full, NOW);
    let held = ask("a", "192.0.2.1:80:8080/tcp").unwrap();
    for taken in ["80:80/tcp", "192.0.2.1:80:80/tcp", "0.0.0.0:80:80/tcp", "9:80/udp"] {
        let refused = ask("b", taken).unwrap_err();
        assert!(
            matches!(&refused, AllocateError::PortTaken { port, holder } if port.to_string() == taken
                     && holder.attachment == held.attachment),
            "{taken}: {refused}"
        );
    }
    assert!(ask("b", "192.0.2.2:80:80/tcp").is_ok() && ask("c", "80:80/udp").is_ok());
    node.begin_release(&held.attachment).1.unwrap();
    let refused = node.allocate(with_port("d", "9:80/udp"), CoolDown::Full, NOW).unwrap_err();
    assert!(matches!(refused, AllocateError::PortTaken { holder, .. } if holder.leaving), "its rules remain");
    node.release(&held.attachment, NOW).unwrap();
    assert!(node.allocate(with_port("d", "9:80/udp"), CoolDown::Full, NOW).is_ok());
}

#[test]
fn every_block_has_a_gateway_that_no_pod_gets() {
    let mut node = node();
    let pool = pool("10.0.0.0/24", 29);
    let owned =
        OwnedBlock { block: pool.block(1), pool: pool.name.clone(), nonce: Nonce::new("y"), leaving: false };
    node.add_block(owned, &pool, Moment::BOOT).unwrap();
    let gateway =
        |node: &Node, address: &str| node.neighbourhood(address.parse().unwrap()).unwrap().1.to_string();
    assert_eq!(gateway(&node, "10.0.0.3"), "10.0.0.1", "the node's own");
    assert_eq!(gateway(&node, "10.0.0.11"), "10.0.0.8");
    let all: Vec<_> = (0..).map_while(|n| allocate(&mut node, &format!("c{n}")).ok()).collect();
    assert_eq!(all.len(), 6 + 7, "8 less the pool's first address and the node's own; 8 less the gateway");
    assert_eq!(node.neighbourhood("10.9.0.1".parse().unwrap()), None);
}

#[test]
fn a_block_that_is_missing_in_the_ledger_cools_down_first() {
    let (mut node, _) = open(Memory::default(), "boot-1");
    let pool = pool("10.0.0.0/24", 29);
    let owned =
        OwnedBlock { block: pool.block(1), pool: pool.name.clone(), nonce: Nonce::new("x"), leaving: false };
    node.adopt_block(owned, &pool, NOW).unwrap();
    let free = |node: &Node, seconds| node.total(Family::V4, None, NOW + Duration::from_secs(seconds)).free;
    assert_eq!((free(&node, 59), free(&node, 60)), (0, 8));
    let (mut node, _) = again(node, "boot-1");
    node.learn_pools(&[pool], &Labels::new()).unwrap();
    assert_eq!((free(&node, 59), free(&node, 60)), (0, 8), "after a restart, too");
}

#[test]
fn a_node_with_an_old_ledger_copy_cools_down_before_it_allocates() {
    let mut node = node();
    let held = allocate(&mut node, "a").unwrap();
    let freed = allocate(&mut node, "b").unwrap();
    node.release(&freed.attachment, NOW).unwrap();
    let later = NOW + DEFAULT_COOL_DOWN;
    node.cool_down_unused(later).unwrap();
    let before = later + Duration::from_secs(9);
    let next = |node: &mut Node, container, now| {
        node.allocate(request(container, &[Family::V4]), CoolDown::Shortest, now)
    };
    assert!(matches!(next(&mut node, "c", before), Err(AllocateError::Shortage { .. })));
    assert_eq!(node.total(Family::V4, None, before).used, 2, "the gateway address and the pod address");
    // The cool-down is in the ledger: a restart does not end it, and addresses already in cool-down start again.
    let (mut node, _) = again(node, "boot-1");
    node.learn_pools(&[pool("10.0.0.0/24", 29)], &Labels::new()).unwrap();
    assert!(matches!(next(&mut node, "c", before), Err(AllocateError::Shortage { .. })));
    let rested = next(&mut node, "c", later + Duration::from_secs(10)).unwrap();
    assert_ne!(rested.addresses, held.addresses);
}

#[test]
fn a_block_is_not_spare_immediately_after_its_claim() {
    let mut node = node().with_low_water(1);
    let pool = pool("10.0.0.0/24", 29);
    let (block, nonce) = (pool.block(3), Nonce::new("y"));
    node.add_block(OwnedBlock { block, pool: pool.name.clone(), nonce, leaving: false }, &pool, NOW).unwrap();
    let spare = |seconds| node.allocations(NOW + Duration::from_secs(seconds)).unwrap().spare;
    assert_eq!([spare(0), spare(9), spare(10)], [vec![], vec![], vec![block]]);
}

#[test]
fn cancelling_one_expected_hand_over_keeps_that_of_another_attachment() {
    let mut node = node();
    let address: IpAddr = "10.9.0.1".parse().unwrap();
    let [one, other] = ["one", "other"].map(|container| request(container, &[]).attachment);
    node.mark_expected(address, &one);
    node.mark_expected(address, &other);
    node.cancel_expected(address, &other);
    assert!(
        node.allocations(NOW).unwrap().expected.contains(&address),
        "the first attachment may use the address by now"
    );
    node.cancel_expected(address, &one);
    assert!(node.allocations(NOW).unwrap().expected.is_empty());
}

#[test]
fn a_restored_gateway_outside_the_nodes_blocks_is_moved() {
    let (mut node, _) = open(Memory::default(), "boot-1");
    let earlier: IpAddr = "10.0.0.33".parse().unwrap();
    node.restore_gateway(earlier).unwrap();
    assert!(node.allocations(NOW).unwrap().idle_gateways.is_empty(), "there is no other free address");
    let pool = pool("10.0.0.0/24", 29);
    let (block, nonce) = (pool.block(0), Nonce::new("x"));
    node.adopt_block(OwnedBlock { block, pool: pool.name.clone(), nonce, leaving: false }, &pool, NOW)
        .unwrap();
    assert!(
        node.allocations(NOW + Duration::from_secs(9)).unwrap().idle_gateways.is_empty(),
        "all addresses of the block are in cool-down"
    );
    // Another node may have the earlier one by now: the shortest cool-down is enough.
    let rested = NOW + Duration::from_secs(10);
    assert_eq!(node.allocations(rested).unwrap().idle_gateways, [earlier]);
    assert!(node.move_gateway(earlier, rested).unwrap());
    assert!(pool.block(0).cidr().has(node.gateways()[0]));
}

#[test]
fn a_reserved_address_is_allocated_only_while_it_is_expected() {
    let (mut node, _) = open(Memory::default(), "boot-1");
    let address: IpAddr = "10.1.0.5".parse().unwrap();
    let reserved = |container: &str| AllocationRequest {
        source: AllocationSource::Blocks {
            families: vec![Family::V4],
            pool: None,
            requested: Vec::new(),
            reserved: vec![address],
        },
        ..request(container, &[])
    };
    let unexpected = |allocated: Result<AttachmentEntry, AllocateError>| {
        matches!(allocated, Err(AllocateError::Refused { why: AddressRefusal::NotExpected, .. }))
    };
    assert!(unexpected(node.allocate(reserved("a"), CoolDown::Full, NOW)));
    let attachment = request("a", &[]).attachment;
    node.mark_expected(address, &attachment);
    assert!(
        unexpected(node.allocate(reserved("b"), CoolDown::Full, NOW)),
        "the address is expected for another pod"
    );
    node.forget_all().unwrap();
    assert!(unexpected(node.allocate(reserved("a"), CoolDown::Full, NOW)), "the node was removed meanwhile");
    node.mark_expected(address, &attachment);
    let without_gateway = node.allocate(reserved("a"), CoolDown::Full, NOW);
    assert!(matches!(without_gateway, Err(AllocateError::NoGateway { family: Family::V4 })));
    node.restore_gateway("10.0.0.1".parse().unwrap()).unwrap();
    assert_eq!(node.allocate(reserved("a"), CoolDown::Full, NOW).unwrap().addresses, [address]);
}

#[test]
fn all_spare_blocks_can_be_released_together() {
    let mut node = node().with_low_water(4);
    let pool = pool("10.0.0.0/24", 29);
    for number in 2..32 {
        let (block, nonce) = (pool.block(number), Nonce::new(number.to_string()));
        let owned = OwnedBlock { block, pool: pool.name.clone(), nonce, leaving: false };
        node.add_block(owned, &pool, NOW).unwrap();
    }
    let later = NOW + Duration::from_secs(100);
    let spare = node.allocations(later).unwrap().spare;
    assert!(spare.len() > 20, "{spare:?}");
    for block in spare {
        assert!(node.leave(block, later).unwrap(), "{block}");
    }
    assert!((8..16).contains(&node.total(Family::V4, None, later).free));
    assert_eq!(node.allocations(later).unwrap().spare, []);
}

#[test]
fn a_gc_collects_only_older_attachments_that_are_not_valid() {
    let mut node = node();
    let later = NOW + Duration::from_secs(1);
    for (container, at) in [("old", NOW), ("valid", NOW), ("young", later)] {
        node.allocate(request(container, &[Family::V4]), CoolDown::Full, at).unwrap();
    }
    let attachment = |container: &str| request(container, &[]).attachment;
    let valid = BTreeSet::from([attachment("valid")]);
    assert_eq!(stale(node.attachments(), later, &valid), [attachment("old")]);
}
