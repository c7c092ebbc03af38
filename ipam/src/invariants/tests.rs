//! Tests: each invariant is violated in one way.

use std::time::Duration;

use super::history::{History, check_release};
use super::*;
use crate::Moment;
use crate::allocator::SHORTEST_COOL_DOWN;
use crate::ids::{ClusterId, Incarnation, MachineId, Nonce};
use crate::ledger::{AttachmentKind, MemberState};
use crate::record::{BlockRecord, FenceRecord, Holder, PodsGone, PoolRecord, ReservationRecord, encode};
use crate::store::{Contents, Entry, Update};

/// Node `a` with block 10.0.0.0/30 of pool `p`, whose pod `a1` has 10.0.0.2; node `b` with 10.0.0.4/30 and no pods.
struct Scene {
    entries: Vec<Entry>,
    nodes: Vec<NodeFacts>,
    published: Vec<PublishedAddress>,
}

fn attachment(container: &str) -> Attachment {
    format!("net/{container}/eth0").parse().unwrap()
}

fn address(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn owned(block: &str) -> OwnedBlock {
    let (block, pool) = (crate::Block::new(block.parse().unwrap()), "p".parse().unwrap());
    OwnedBlock { block, pool, nonce: Nonce::new("x"), leaving: false }
}

fn held(container: &str, ip: &str) -> AttachmentEntry {
    AttachmentEntry {
        attachment: attachment(container),
        kind: AttachmentKind::Pod,
        since: Moment::BOOT,
        addresses: vec![address(ip)],
        mac: polder_api::Mac([2, 0, 0, 0, 0, 1]),
        mtu: 1450,
        netns: String::new(),
        pod: None,
        leaving: false,
        gateways: Vec::new(),
        ports: Vec::new(),
    }
}

fn node(name: &str, block: &str) -> NodeFacts {
    let counts = Counts { used: 0, resting: 0, free: 4, excluded: 0 };
    let identity = NodeIdentity {
        node: name.parse().unwrap(),
        incarnation: Incarnation::new(format!("i-{name}")),
        cluster: ClusterId::new("c"),
        member_state: MemberState::Member,
    };
    NodeFacts {
        name: identity.node.clone(),
        boot_id: BootId::new("boot"),
        ledger: Some(LedgerFacts {
            identity: Some(identity),
            blocks: vec![(owned(block), Some(counts))],
            ..LedgerFacts::default()
        }),
        kernel: Some(KernelFacts::default()),
        in_flight: BTreeSet::new(),
        promised: BTreeMap::new(),
    }
}

fn claim(of: &str) -> Vec<u8> {
    encode(&BlockRecord {
        node: of.parse().unwrap(),
        incarnation: Incarnation::new(format!("i-{of}")),
        pool: "p".parse().unwrap(),
        nonce: Nonce::new("x"),
    })
}

impl Scene {
    fn new() -> Self {
        let mut a = node("a", "10.0.0.0/30");
        let ledger = a.ledger.as_mut().unwrap();
        ledger.attachments.push(held("a1", "10.0.0.2"));
        ledger.blocks[0].1 = Some(Counts { used: 1, resting: 0, free: 2, excluded: 1 });
        a.promised.insert(attachment("a1"), vec![address("10.0.0.2")]);
        let nodes = vec![a, node("b", "10.0.0.4/30")];
        let mut scene = Self { entries: Vec::new(), nodes, published: Vec::new() };
        scene.live(0, "a1", "10.0.0.2");
        scene.put(
            "pools/p",
            encode(&PoolRecord { block_length: 30, ..PoolRecord::new("10.0.0.0/24".parse().unwrap()) }),
        );
        let reserved = PoolRecord {
            purpose: crate::pool::Purpose::Reservations,
            ..PoolRecord::new("10.1.0.0/24".parse().unwrap())
        };
        scene.put("pools/r", encode(&reserved));
        for name in ["a", "b"] {
            scene.put(
                &format!("nodes/{name}"),
                format!(
                    r#"{{"incarnation":"i-{name}","machine_id":"m-{name}","boot_id":"boot","underlay":[],"gateways":[],
                    "vtep_mac":"02:00:00:00:00:01","mtu":1450,"version":"0"}}"#
                )
                .into_bytes(),
            );
        }
        scene.put("blocks/4-0a000000-30", claim("a"));
        scene.put("blocks/4-0a000004-30", claim("b"));
        scene
    }

    fn put(&mut self, key: &str, value: Vec<u8>) {
        let key = format!("/polder/v1/{key}");
        self.entries.retain(|entry| entry.key != key);
        let revision = self.entries.iter().map(|entry| entry.revision).max().unwrap_or_default().next();
        self.entries.push(Entry { key, value, revision });
    }

    fn delete(&mut self, key: &str) {
        self.entries.retain(|entry| entry.key != format!("/polder/v1/{key}"));
    }

    fn live(&mut self, node: usize, container: &str, ip: &str) {
        let interface = Interface { attachment: attachment(container), addresses: vec![address(ip)] };
        self.nodes[node].kernel.as_mut().unwrap().interfaces.push(interface);
    }

    fn ledger(&mut self, node: usize) -> &mut LedgerFacts {
        self.nodes[node].ledger.as_mut().unwrap()
    }

    fn fence(&mut self, pods: PodsGone) {
        let record = FenceRecord {
            node: "a".parse().unwrap(),
            machine_id: MachineId::new("m"),
            boot_id: BootId::new("boot"),
            pods,
            kubernetes_uid: None,
        };
        self.put("fences/a/i-a", encode(&record));
    }

    fn view(&self) -> View {
        let mut view = View::default();
        let revision = self.entries.iter().map(|entry| entry.revision).max().unwrap_or_default();
        view.apply(Update::Loaded(Contents { revision, entries: self.entries.clone() }));
        assert!(view.refused.is_empty(), "{:?}", view.refused);
        view
    }

    fn facts<'a>(&'a self, view: &'a View) -> ClusterReport<'a> {
        ClusterReport {
            view: Some(view),
            is_restoring: false,
            published: &self.published,
            nodes: &self.nodes,
        }
    }

    fn broken(&self) -> BTreeSet<Invariant> {
        let view = self.view();
        check(&self.facts(&view)).iter().map(|deviation| deviation.invariant).collect()
    }
}

#[test]
fn a_healthy_cluster_has_no_deviation() {
    assert_eq!(Scene::new().broken(), BTreeSet::new());
}

#[test]
fn a_duplicate_address_is_found_on_any_node() {
    let mut scene = Scene::new();
    scene.live(1, "b1", "10.0.0.2");
    let broken = scene.broken();
    assert!(broken.contains(&Invariant::Unique), "{broken:?}");
    assert!(broken.contains(&Invariant::Owner), "{broken:?}");
    let mut scene = Scene::new();
    scene.nodes[0].kernel = None;
    scene.live(1, "b1", "10.0.0.2");
    assert!(scene.broken().contains(&Invariant::Unique), "the kernel of one node is unknown");
}

#[test]
fn an_address_outside_the_blocks_of_its_node_is_found() {
    let mut scene = Scene::new();
    scene.put("blocks/4-0a000000-30", claim("b"));
    assert_eq!(scene.broken(), [Invariant::Owner].into());
    let mut scene = Scene::new();
    scene.delete("blocks/4-0a000000-30");
    assert_eq!(scene.broken(), [Invariant::Owner].into());
    let view = scene.view();
    assert_eq!(
        check(&ClusterReport { is_restoring: true, ..scene.facts(&view) }),
        [],
        "while the claim is restored"
    );
}

#[test]
fn a_reserved_address_without_a_reservation_or_an_interface_is_found() {
    let mut scene = Scene::new();
    scene.live(0, "a2", "10.1.0.5");
    scene.ledger(0).attachments.push(held("a2", "10.1.0.5"));
    assert_eq!(scene.broken(), [Invariant::Owner].into());
    let holder = Holder {
        node: "a".parse().unwrap(),
        incarnation: Incarnation::new("i-a"),
        boot_id: BootId::new("boot"),
        attachment: attachment("a2"),
    };
    let record = ReservationRecord { owner: "d/a".into(), holder: Some(holder), generation: 1 };
    scene.put("reservations/10.1.0.5", encode(&record));
    assert_eq!(scene.broken(), BTreeSet::new());
    scene.ledger(0).attachments.pop();
    scene.nodes[0].kernel.as_mut().unwrap().interfaces.pop();
    assert_eq!(scene.broken(), [Invariant::NoLeak].into(), "no interface has the address any more");
}

#[test]
fn wrong_address_counts_are_found() {
    let mut scene = Scene::new();
    scene.ledger(0).blocks[0].1 = Some(Counts { used: 1, resting: 0, free: 3, excluded: 1 });
    assert_eq!(scene.broken(), [Invariant::Conservation].into());
    scene.ledger(0).blocks[0].1 = Some(Counts { used: 0, resting: 0, free: 3, excluded: 1 });
    assert_eq!(scene.broken(), [Invariant::Conservation].into());
}

#[test]
fn an_attachment_without_interface_leaks_unless_a_call_is_running() {
    let mut scene = Scene::new();
    scene.nodes[0].kernel.as_mut().unwrap().interfaces.clear();
    let view = scene.view();
    let leaks = check(&scene.facts(&view));
    assert_eq!((leaks.len(), &leaks[0].invariant), (1, &Invariant::NoLeak));
    assert_eq!(leaks[0].repair, Some(Repair::Release(attachment("a1"))));
    scene.nodes[0].in_flight.insert(attachment("a1"));
    assert_eq!(scene.broken(), BTreeSet::new());
}

#[test]
fn a_stale_published_address_is_found_and_can_be_withdrawn() {
    let mut scene = Scene::new();
    let mut publish = |node: &str, container: &str, ip: &str| {
        let record = AddressRecord { attachment: attachment(container), pod: None };
        scene.published.push(PublishedAddress { node: node.parse().unwrap(), address: address(ip), record });
    };
    publish("a", "a1", "10.0.0.2");
    publish("a", "gone", "10.0.0.3");
    publish("c", "elsewhere", "10.0.0.6");
    let view = scene.view();
    let found = check(&scene.facts(&view));
    let stale: Vec<_> = found.iter().map(|deviation| deviation.repair.clone().unwrap()).collect();
    assert_eq!(stale, ["10.0.0.3", "10.0.0.6"].map(|ip| Repair::Withdraw(address(ip))));
}

#[test]
fn a_claim_of_an_unknown_node_is_found() {
    let mut scene = Scene::new();
    scene.put("blocks/4-0a000008-30", claim("c"));
    assert_eq!(scene.broken(), [Invariant::NoLeak].into());
}

#[test]
fn a_freed_address_of_an_existing_interface_is_found() {
    let mut scene = Scene::new();
    scene.ledger(0).attachments.clear();
    scene.ledger(0).blocks[0].1 = Some(Counts { used: 0, resting: 1, free: 2, excluded: 1 });
    scene.nodes[0].promised.clear();
    assert_eq!(scene.broken(), [Invariant::NoEarlyFree].into());
}

#[test]
fn a_promised_address_that_is_not_in_the_ledger_is_found() {
    let mut scene = Scene::new();
    scene.nodes[0].promised.insert(attachment("a2"), vec![address("10.0.0.3")]);
    assert_eq!(scene.broken(), [Invariant::Durable].into());
}

#[test]
fn overlapping_and_misaligned_claims_are_found() {
    let mut scene = Scene::new();
    scene.put("blocks/4-0a000000-29", claim("a"));
    let view = scene.view();
    let found = check(&scene.facts(&view));
    assert_eq!(found.iter().filter(|found| found.invariant == Invariant::BlockTree).count(), 3, "{found:?}");
}

#[test]
fn an_address_allocated_before_the_end_of_its_cool_down_is_found() {
    let (mut scene, at) = (Scene::new(), Moment::from_millis);
    let view = scene.view();
    let mut history = History::new(SHORTEST_COOL_DOWN);
    assert_eq!(history.observe(&scene.facts(&view), at(0)), []);
    scene.nodes[0].kernel.as_mut().unwrap().interfaces.clear();
    assert_eq!(history.observe(&scene.facts(&view), at(1_000)), []);
    scene.live(0, "a2", "10.0.0.2");
    let mut early = history.clone();
    let found = early.observe(&scene.facts(&view), at(9_000));
    assert_eq!(found.iter().map(|found| found.invariant).collect::<Vec<_>>(), [Invariant::CoolDown]);
    assert_eq!(history.observe(&scene.facts(&view), at(0) + Duration::from_secs(10)), []);
}

#[test]
fn a_claim_written_by_a_removed_node_is_found() {
    let mut scene = Scene::new();
    let mut history = History::new(SHORTEST_COOL_DOWN);
    scene.delete("nodes/a");
    scene.fence(PodsGone::Unknown);
    let view = scene.view();
    assert_eq!(history.observe(&scene.facts(&view), Moment::BOOT), []);
    scene.fence(PodsGone::Confirmed);
    let view = scene.view();
    assert_eq!(
        history.observe(&scene.facts(&view), Moment::BOOT),
        [],
        "it may confirm that its pods are gone"
    );
    scene.put("blocks/4-0a000008-30", claim("a"));
    let view = scene.view();
    let found = history.observe(&scene.facts(&view), Moment::BOOT);
    assert_eq!(found.iter().map(|found| found.invariant).collect::<Vec<_>>(), [Invariant::Fenced]);
}

#[test]
fn a_new_claim_of_a_drained_pool_is_found() {
    let mut scene = Scene::new();
    let mut history = History::new(SHORTEST_COOL_DOWN);
    let draining = PoolRecord {
        block_length: 30,
        state: crate::pool::PoolState::Draining,
        ..PoolRecord::new("10.0.0.0/24".parse().unwrap())
    };
    scene.put("pools/p", encode(&draining));
    let view = scene.view();
    assert_eq!(history.observe(&scene.facts(&view), Moment::BOOT), []);
    scene.put("blocks/4-0a000008-30", claim("a"));
    let view = scene.view();
    let found = history.observe(&scene.facts(&view), Moment::BOOT);
    assert_eq!(found.iter().map(|found| found.invariant).collect::<Vec<_>>(), [Invariant::BlockTree]);
}

#[test]
fn only_a_new_reservation_of_a_drained_pool_is_found() {
    let reserved =
        |owner: &str| encode(&ReservationRecord { owner: owner.to_owned(), holder: None, generation: 1 });
    let draining = PoolRecord {
        purpose: crate::pool::Purpose::Reservations,
        state: crate::pool::PoolState::Draining,
        ..PoolRecord::new("10.1.0.0/24".parse().unwrap())
    };
    let mut scene = Scene::new();
    let mut history = History::new(SHORTEST_COOL_DOWN);
    let mut found = |scene: &Scene| {
        let view = scene.view();
        let found = history.observe(&scene.facts(&view), Moment::BOOT);
        found.iter().map(|found| found.invariant).collect::<Vec<_>>()
    };
    scene.put("reservations/10.1.0.1", reserved("d/web"));
    assert_eq!(found(&scene), []);
    scene.delete("reservations/10.1.0.1");
    scene.put("pools/r", encode(&draining));
    assert_eq!(found(&scene), []);
    scene.put("reservations/10.1.0.1", reserved("d/web"));
    assert_eq!(found(&scene), [], "the reservation existed before");
    scene.put("reservations/10.1.0.2", reserved("d/web"));
    assert_eq!(found(&scene), [Invariant::BlockTree]);
}

#[test]
fn an_address_of_a_removed_pool_is_found_unless_the_pool_is_restored() {
    let mut scene = Scene::new();
    let mut history = History::new(SHORTEST_COOL_DOWN);
    let view = scene.view();
    assert_eq!(history.observe(&scene.facts(&view), Moment::BOOT), []);
    scene.delete("pools/p");
    scene.put("pools/q", encode(&PoolRecord::new("10.2.0.0/24".parse().unwrap())));
    let view = scene.view();
    let lost = ClusterReport { is_restoring: true, ..scene.facts(&view) };
    assert_eq!(history.observe(&lost, Moment::BOOT), []);
    let found = history.observe(&scene.facts(&view), Moment::BOOT);
    assert_eq!(found.iter().map(|found| found.invariant).collect::<Vec<_>>(), [Invariant::Owner]);
}

#[test]
fn a_release_that_changes_another_attachment_is_found() {
    let before = [held("a1", "10.0.0.2"), held("a2", "10.0.0.3")];
    let of = |after: &[AttachmentEntry]| {
        check_release(&"a".parse().unwrap(), &attachment("a1"), &before, after).len()
    };
    assert_eq!((of(&before[1..]), of(&before[..1]), of(&before)), (0, 1, 0));
}
