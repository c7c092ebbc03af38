//! Lists of Node objects over time, by hand and at random.

use std::sync::Arc;

use polder_api::Mac;
use proptest::prelude::*;

use super::*;
use crate::Revision;
use crate::ids::MachineId;
use crate::view::Versioned;

/// Seconds between two lists.
const LIST_EVERY: u64 = 60;

fn name(node: &str) -> NodeName {
    node.parse().unwrap()
}

fn record(boot: &str, uid: Option<&str>) -> NodeRecord {
    NodeRecord {
        incarnation: Incarnation::new("i"),
        machine_id: MachineId::new("m"),
        boot_id: BootId::new(boot),
        underlay: Vec::new(),
        gateways: Vec::new(),
        probes: Vec::new(),
        vtep_mac: Mac([2; 6]),
        mtu: 1450,
        version: String::new(),
        kubernetes_uid: uid.map(NodeUid::new),
    }
}

/// A cluster, as the leader `n0` sees it.
struct Cluster {
    view: View,
    list: NodeList,
    alive: BTreeSet<NodeName>,
    history: NodeHistory,
    now: Moment,
}

impl Cluster {
    /// Nodes `n0` to `n(count - 1)`, all listed and alive.
    fn new(count: usize) -> Self {
        let mut cluster = Self {
            view: View::default(),
            list: NodeList::new(),
            alive: BTreeSet::new(),
            history: NodeHistory::default(),
            now: Moment::BOOT,
        };
        for number in 0..count {
            let node = format!("n{number}");
            cluster.register(&node, record("b1", Some(&format!("uid-{node}"))));
            cluster.start(&node);
            cluster.list(&node, &format!("uid-{node}"), None);
        }
        cluster
    }

    fn register(&mut self, node: &str, record: NodeRecord) {
        let known = Versioned { record: Arc::new(record), revision: Revision::new(5) };
        self.view.nodes.insert(name(node), known);
    }

    fn start(&mut self, node: &str) {
        self.alive.insert(name(node));
    }

    fn stop(&mut self, node: &str) {
        self.alive.remove(&name(node));
    }

    fn list(&mut self, node: &str, uid: &str, shut_down: Option<ShutDown>) {
        self.list.insert(name(node), KubernetesNode { uid: NodeUid::new(uid), shut_down });
    }

    fn delete(&mut self, node: &str) {
        self.list.remove(&name(node));
    }

    /// The evaluation of the next list.
    fn next(&mut self) -> Departures {
        self.after(LIST_EVERY)
    }

    fn after(&mut self, seconds: u64) -> Departures {
        self.now = self.now + Duration::from_secs(seconds);
        self.history.observe(&name("n0"), &self.list, &self.view, &self.alive, self.now)
    }
}

fn removable(found: &Departures) -> Vec<(&str, Departure, Option<ShutDown>)> {
    found.removable().map(|one| (one.node.as_str(), one.departure, one.proof)).collect()
}

#[test]
fn a_dead_node_is_removed_when_two_lists_some_time_apart_lack_its_node_object() {
    let mut cluster = Cluster::new(4);
    cluster.next();
    cluster.stop("n3");
    assert_eq!(cluster.next(), Departures::default(), "its Node object exists");
    cluster.delete("n3");
    assert_eq!(removable(&cluster.next()), []);
    assert_eq!(removable(&cluster.after(10)), [], "the second list came too early");
    assert_eq!(removable(&cluster.after(35)), [("n3", Departure::Deleted, None)]);
}

#[test]
fn a_list_that_has_the_node_object_again_starts_the_time_anew() {
    let mut cluster = Cluster::new(4);
    cluster.stop("n3");
    cluster.delete("n3");
    cluster.next();
    cluster.list("n3", "uid-n3", None);
    cluster.next();
    cluster.delete("n3");
    assert_eq!(removable(&cluster.next()), []);
    assert_eq!(removable(&cluster.next()).len(), 1);
}

#[test]
fn a_deleted_node_whose_agent_is_alive_is_only_reported() {
    let mut cluster = Cluster::new(4);
    cluster.delete("n3");
    cluster.next();
    let found = cluster.next();
    assert_eq!((found.missing.len(), removable(&found)), (1, vec![]));
    // Its agent dies: the time starts anew.
    cluster.stop("n3");
    assert_eq!(removable(&cluster.next()), []);
    assert_eq!(removable(&cluster.next()), [("n3", Departure::Deleted, None)]);
}

#[test]
fn a_machine_that_was_replaced_under_its_name_is_removed() {
    let mut cluster = Cluster::new(4);
    cluster.stop("n3");
    cluster.list("n3", "uid-of-the-next-machine", None);
    cluster.next();
    assert_eq!(removable(&cluster.next()), [("n3", Departure::Replaced, None)]);
    // The next machine has registered.
    cluster.register("n3", record("b2", Some("uid-of-the-next-machine")));
    assert_eq!(cluster.next(), Departures::default());
}

#[test]
fn a_node_that_was_never_in_kubernetes_is_not_mentioned() {
    let mut cluster = Cluster::new(3);
    cluster.register("outside", record("b1", None));
    cluster.next();
    assert_eq!(cluster.next(), Departures::default());
}

#[test]
fn an_empty_list_and_one_without_the_leader_remove_nobody_and_void_earlier_lists() {
    let mut cluster = Cluster::new(4);
    cluster.stop("n3");
    cluster.delete("n3");
    cluster.next();
    let complete = std::mem::take(&mut cluster.list);
    assert_eq!(cluster.next(), Departures { missing: Vec::new(), doubt: Some(Doubt::EmptyList) });
    cluster.list = complete;
    assert_eq!(removable(&cluster.next()), [], "the list before the empty one does not count");
    cluster.list("n0", "another cluster's n0", None);
    let doubt = Some(Doubt::OwnNodeMissing(name("n0")));
    assert_eq!(cluster.next(), Departures { missing: Vec::new(), doubt });
}

#[test]
fn more_than_three_and_more_than_a_third_at_once_are_not_removed() {
    let missing = |nodes: usize, gone: usize| {
        let mut cluster = Cluster::new(nodes);
        for number in 1..=gone {
            cluster.stop(&format!("n{number}"));
            cluster.delete(&format!("n{number}"));
        }
        cluster.next();
        let found = cluster.next();
        (removable(&found).len(), found.missing.len(), found.doubt)
    };
    assert_eq!(missing(4, 3), (3, 3, None));
    assert_eq!(missing(5, 4), (0, 4, Some(Doubt::Many { missing: 4, nodes: 5, limit: 3 })));
    assert_eq!(missing(30, 10), (10, 10, None));
    assert_eq!(missing(30, 11), (0, 11, Some(Doubt::Many { missing: 11, nodes: 30, limit: 10 })));
}

#[test]
fn a_machine_that_was_shut_down_when_it_was_last_listed_is_proof_for_that_boot_only() {
    let shut_down = |change: fn(&mut Cluster)| {
        let mut cluster = Cluster::new(4);
        cluster.next();
        cluster.stop("n3");
        cluster.list("n3", "uid-n3", Some(ShutDown::CloudProvider));
        cluster.next();
        change(&mut cluster);
        cluster.stop("n3");
        cluster.delete("n3");
        cluster.next();
        let found = cluster.next();
        assert_eq!(found.missing.len(), 1);
        found.missing[0].proof
    };
    assert_eq!(shut_down(|_| {}), Some(ShutDown::CloudProvider));
    assert_eq!(
        shut_down(|cluster| {
            cluster.list("n3", "uid-n3", None);
            cluster.next();
        }),
        None,
        "it was started again when it was last listed"
    );
    assert_eq!(
        shut_down(|cluster| cluster.register("n3", record("b2", Some("uid-n3")))),
        None,
        "its agent has registered another boot"
    );
    assert_eq!(
        shut_down(|cluster| {
            cluster.start("n3");
            cluster.delete("n3");
            cluster.next();
        }),
        None,
        "its agent was alive after that"
    );
    assert_eq!(
        shut_down(|cluster| {
            let complete = std::mem::take(&mut cluster.list);
            cluster.next();
            cluster.list = complete;
            cluster.delete("n3");
        }),
        None,
        "a doubtful list came after it"
    );
}

/// What happens to a node between two lists.
#[derive(Debug, Clone, Copy)]
enum Event {
    Start,
    Stop,
    Delete,
    List,
    ListAnother,
    ListShutDown,
    Reboot,
    LeaveKubernetes,
}

/// The lists so far, as an independent and slow check reads them.
struct Trace {
    /// Seconds, list, lease holders, and boots in the records.
    steps: Vec<(u64, NodeList, BTreeSet<NodeName>, View)>,
}

impl Trace {
    /// The last step in which the Node object of the record was listed.
    fn last_listed(&self, departed: &Departed) -> Option<usize> {
        let listed = |list: &NodeList| list.get(&departed.node).is_some_and(|node| node.uid == departed.uid);
        self.steps.iter().rposition(|(_, list, ..)| listed(list))
    }
}

fn events() -> impl Strategy<Value = Vec<(usize, Event, u64)>> {
    let event = prop_oneof![
        2 => Just(Event::Start),
        4 => Just(Event::Stop),
        4 => Just(Event::Delete),
        2 => Just(Event::List),
        1 => Just(Event::ListAnother),
        3 => Just(Event::ListShutDown),
        1 => Just(Event::Reboot),
        1 => Just(Event::LeaveKubernetes),
    ];
    prop::collection::vec((0..6_usize, event, 1..90_u64), 1..60)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    /// Whatever happens to the nodes and the lists.
    #[test]
    fn no_node_is_removed_that_is_alive_or_listed_and_none_as_dead_without_proof(events in events()) {
        let mut cluster = Cluster::new(6);
        let mut trace = Trace { steps: Vec::new() };
        let mut seconds = 0;
        for (number, event, pause) in events {
            let node = format!("n{number}");
            let uid = format!("uid-{node}");
            match event {
                Event::Start => cluster.start(&node),
                Event::Stop => cluster.stop(&node),
                Event::Delete => cluster.delete(&node),
                Event::List => cluster.list(&node, &uid, None),
                Event::ListAnother => cluster.list(&node, "another", Some(ShutDown::CloudProvider)),
                Event::ListShutDown => cluster.list(&node, &uid, Some(ShutDown::OutOfService)),
                Event::Reboot => cluster.register(&node, record(&format!("b{seconds}"), Some(&uid))),
                Event::LeaveKubernetes => cluster.register(&node, record("b1", None)),
            }
            let found = cluster.after(pause);
            seconds += pause;
            trace.steps.push((seconds, cluster.list.clone(), cluster.alive.clone(), cluster.view.clone()));
            for departed in found.removable() {
                let Departed { node, proof, .. } = departed;
                prop_assert_ne!(node.as_str(), "n0", "the leader");
                let known = &cluster.view.nodes[node].record;
                prop_assert!(departed.is_of(known));
                // For the last 45 s it was missing in every list, and without a lease, in the same boot.
                let since = trace.last_listed(departed).map_or(0, |last| last + 1);
                let recent: Vec<_> = trace.steps[since..].iter().rev()
                    .take_while(|(_, _, alive, view)| {
                        !alive.contains(node) && view.nodes.get(node).is_some_and(|seen| departed.is_of(&seen.record))
                    })
                    .map(|(at, ..)| *at)
                    .collect();
                prop_assert!(recent.len() >= 2, "fewer than two lists");
                prop_assert!(recent[0] - recent[recent.len() - 1] >= MISSING_FOR.as_secs());
                prop_assert!(cluster.list.contains_key(&name("n0")), "a list without the leader");
                let absent = cluster.view.nodes.iter().filter(|(name, known)| {
                    let uid = known.record.kubernetes_uid.as_ref();
                    name.as_str() != "n0"
                        && uid.is_some_and(|uid| cluster.list.get(*name).is_none_or(|node| node.uid != *uid))
                });
                prop_assert!(absent.count() <= 3);
                if proof.is_some() {
                    let last = trace.last_listed(departed);
                    let last = last.expect("a proof from no list");
                    let (_, list, ..) = &trace.steps[last];
                    prop_assert_eq!(list[node].shut_down, *proof);
                    for (_, _, alive, view) in &trace.steps[last..] {
                        prop_assert!(!alive.contains(node), "it was alive after the proof");
                        prop_assert!(departed.is_of(&view.nodes[node].record), "a proof for another boot");
                    }
                }
            }
        }
    }
}
