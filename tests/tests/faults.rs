//! Polder's kernel objects are changed at random on nodes with faults, while all pods exchange packets. At the end, the
//! kernel state must be correct.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use polder_tests::agent::Worker;
use polder_tests::fabric::{Families, ROUTER, address};
use polder_tests::lab::{POOL4, POOL6};
use polder_tests::matrix::{assert_flat_over, listen};
use polder_tests::probe::{Echo, Stream};
use polder_tests::random::{Random, announced_seed};
use polder_tests::routes::wait_for_routes;
use polder_tests::sabotage::{
    REPAIRED_CHANGES, REPORTED_CHANGES, apply_change, apply_random_change, foreign, make_foreign, revert,
};
use polder_tests::{Lab, Pod, Topology, wait};
use serde_json::{Value, json};

/// Number of steps, with one random event each.
const STEPS: usize = 800;

/// Number of etcd members.
const MEMBERS: usize = 3;

/// Number of pods in a crowd: with the other pods on its node, they need another block.
const CROWD: usize = 14;

/// Longest time until the state is correct.
const TIMEOUT: Duration = Duration::from_secs(90);

/// The event of a step, and its probability in percent.
const EVENTS: [(usize, Event); 10] = [
    (50, Event::RepairedChange),
    (6, Event::Underlay),
    (4, Event::ReportedChange),
    (8, Event::AgentKilled),
    (6, Event::AgentStopped),
    (6, Event::LinkFlaps),
    (6, Event::CableCut),
    (6, Event::MemberKilled),
    (5, Event::Crowd),
    (3, Event::NodeReplaced),
];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Event {
    /// Another program changes one of Polder's kernel objects.
    RepairedChange,
    /// Another program does something that Polder must not repair. The next event of this kind on the node undoes it.
    ReportedChange,
    /// The agent is killed and started at once.
    AgentKilled,
    /// The agent is killed. The next event of this kind on the node starts it.
    AgentStopped,
    /// The underlay gets a property that is easily misread, or loses it.
    Underlay,
    /// The underlay interface goes down and up, and loses its configuration.
    LinkFlaps,
    /// The cable is unplugged. The next event of this kind on the node plugs it in.
    CableCut,
    /// A member of etcd is killed. The next event of this kind starts it.
    MemberKilled,
    /// Many pods are added and deleted, so that blocks are claimed and released.
    Crowd,
    /// The node dies and is removed, and another machine of the same name replaces it.
    NodeReplaced,
}

/// A property of an underlay that is easily misread.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Oddity {
    /// The node has virtual addresses in addition to its own.
    VirtualAddress,
    /// The route to the neighbour node has two next hops, one of them the neighbour.
    TwoNextHops,
    /// The network drops packets of the node with the source address of a pod.
    SourcesDropped,
    /// The node's underlay address is replaced.
    Renumbered,
}

const ODDITIES: [Oddity; 4] =
    [Oddity::VirtualAddress, Oddity::TwoNextHops, Oddity::SourcesDropped, Oddity::Renumbered];

/// The lab, and its current faults.
struct Site {
    lab: Lab,
    random: Random,
    /// The pod of each node; `servers` and `streams` run in these pods.
    pods: Vec<Pod>,
    servers: Vec<Vec<Echo>>,
    streams: Vec<Stream>,
    /// Kernel objects of other programs on each node.
    foreign: Vec<String>,
    stopped: BTreeSet<usize>,
    cut: BTreeSet<usize>,
    /// The current oddities, each with the number of its node.
    odd: BTreeSet<(usize, Oddity)>,
    /// The current change of each node: an index into `REPORTED_CHANGES`.
    changed: BTreeMap<usize, usize>,
    member: Option<usize>,
    steps: Vec<String>,
}

/// Prints the steps if the test fails.
impl Drop for Site {
    fn drop(&mut self) {
        if std::thread::panicking() {
            println!("It happened after {}.", self.steps.join(", "));
        }
    }
}

impl Site {
    fn new(random: Random) -> Self {
        let topology = Topology { nodes: vec![1, 1, 2, 2], etcd_members: 3, ..Topology::two_segments() };
        let mut lab = Lab::build(topology.families(Families::DUAL));
        for (name, pool) in [("ipv4", ("10.244.0.0/16", 28)), ("ipv6", ("fd00:244::/56", 124))] {
            let record = json!({ "cidr": pool.0, "block_length": pool.1, "state": "active" });
            lab.etcd.ctl(&["put", &format!("/polder/v1/pools/{name}"), &record.to_string()]);
        }
        for worker in &lab.workers {
            worker.configure_also("ipam.grace_seconds = 1\nipam.cooldown_seconds = 10");
        }
        lab.start_agents();
        lab.workers.iter().for_each(make_foreign);
        let foreign = lab.workers.iter().map(foreign).collect();
        let pods: Vec<Pod> = lab.workers.iter().map(|worker| worker.pod("a")).collect();
        let servers = pods.iter().map(|pod| listen(std::slice::from_ref(pod))).collect();
        let mut site = Self {
            lab,
            random,
            pods,
            servers,
            streams: Vec::new(),
            foreign,
            stopped: BTreeSet::new(),
            cut: BTreeSet::new(),
            odd: BTreeSet::new(),
            changed: BTreeMap::new(),
            member: None,
            steps: Vec::new(),
        };
        (0..site.pods.len()).for_each(|number| site.start_streams(number));
        site
    }

    /// Starts streams from the pod of that node to the pods of all other nodes.
    fn start_streams(&mut self, number: usize) {
        let from = &self.pods[number];
        let others = self.pods.iter().filter(|to| to.node() != from.node());
        let streams = others.map(|to| from.within(|| Stream::start(from.v4(), to.v4())));
        self.streams.extend(streams);
    }

    fn step(&mut self) {
        let mut share = self.random.below(100);
        let event = EVENTS.iter().find(|(percent, _)| {
            let is_it = share < *percent;
            share = share.saturating_sub(*percent);
            is_it
        });
        let (_, event) = event.expect("a hundred in all");
        let number = self.random.below(self.lab.workers.len());
        let what = match event {
            Event::RepairedChange => {
                apply_random_change(&self.lab.workers[number], &mut self.random).to_owned()
            }
            other => {
                self.apply(*other, number);
                format!("{other:?}")
            }
        };
        self.steps.push(format!("n{}: {what}", number + 1));
        // In 30 % of the steps, the agent repairs everything before the next event. A disconnected agent may not have
        // the records for that.
        if self.random.chance(30) && !self.stopped.contains(&number) && !self.cut.contains(&number) {
            self.lab.workers[number].wait_for_status("a pass that finds nothing", settled);
        }
    }

    fn apply(&mut self, event: Event, number: usize) {
        match event {
            Event::RepairedChange => {}
            Event::ReportedChange => self.toggle_reported_change(number),
            Event::AgentKilled => {
                self.lab.workers[number].kill();
                self.start(number);
            }
            Event::AgentStopped if self.stopped.contains(&number) => self.start(number),
            Event::AgentStopped => {
                self.lab.workers[number].kill();
                self.stopped.insert(number);
            }
            Event::Underlay => {
                let oddity = *self.random.one_of(&ODDITIES);
                self.toggle_oddity(number, oddity);
            }
            Event::LinkFlaps => self.flap_link(number),
            Event::CableCut if self.cut.contains(&number) => self.restore(number),
            Event::CableCut => {
                let worker = &self.lab.workers[number];
                self.lab.fabric.cut(&worker.node, worker.segment);
                self.cut.insert(number);
            }
            Event::MemberKilled => match self.member.take() {
                Some(member) => self.lab.etcd.start_member(member),
                None => {
                    let member = self.random.below(MEMBERS);
                    self.lab.etcd.kill_member(member);
                    self.member = Some(member);
                }
            },
            Event::Crowd => self.crowd(number),
            Event::NodeReplaced => self.replace_node(number),
        }
    }

    fn toggle_reported_change(&mut self, number: usize) {
        match self.changed.remove(&number) {
            Some(which) => revert(&REPORTED_CHANGES[which], &self.lab.workers[number]),
            None => {
                let which = self.random.below(REPORTED_CHANGES.len());
                apply_change(&REPORTED_CHANGES[which].change, &self.lab.workers[number], &mut self.random);
                self.changed.insert(number, which);
            }
        }
    }

    /// Adds the oddity to the underlay of that node, or removes it.
    fn toggle_oddity(&mut self, number: usize, oddity: Oddity) {
        let begins = !self.odd.remove(&(number, oddity));
        if begins {
            self.odd.insert((number, oddity));
        }
        let worker = &self.lab.workers[number];
        let (verb, segment) = (if begins { "add" } else { "delete" }, worker.segment);
        let own = self.lab.underlay(number, false);
        let router = address(segment, ROUTER, false);
        let host = u8::try_from(number).unwrap();
        // If the link was down in the meantime, the kernel has deleted part of it.
        let shell = match oddity {
            Oddity::VirtualAddress => {
                let of = |v6| address(segment, 100 + host, v6);
                format!(
                    "ip address {verb} {}/32 dev eth0; ip address {verb} {}/128 dev eth0 nodad",
                    of(false),
                    of(true)
                )
            }
            Oddity::TwoNextHops => {
                let neighbour = self.lab.underlay(number ^ 1, false);
                format!(
                    "ip route {verb} {neighbour} nexthop via {neighbour} dev eth0 nexthop via {router} dev eth0"
                )
            }
            Oddity::SourcesDropped if begins => {
                self.lab.fabric.drop_sources(&worker.node, segment, &[POOL4, POOL6]);
                return;
            }
            Oddity::SourcesDropped => return self.lab.fabric.carry_sources(&worker.node),
            Oddity::Renumbered => {
                let other = address(segment, 150 + host, false);
                let (from, to) = if begins { (own, other) } else { (other, own) };
                format!(
                    "ip address delete {from}/24 dev eth0; ip address add {to}/24 dev eth0; ip route replace default \
                     via {router}"
                )
            }
        };
        worker.node.shell(&format!("({shell}) 2>&1 || true"));
    }

    fn start(&mut self, number: usize) {
        self.stopped.remove(&number);
        self.lab.workers[number].start();
    }

    fn restore(&mut self, number: usize) {
        let worker = &self.lab.workers[number];
        self.lab.fabric.restore(&worker.node, worker.segment);
        self.cut.remove(&number);
    }

    /// As a network manager does: sets the interface down and up, and restores its configuration.
    fn flap_link(&self, number: usize) {
        let worker = &self.lab.workers[number];
        let v6 = self.lab.underlay(number, true);
        worker.node.shell(&format!(
            "ip link set eth0 down; ip link set eth0 up; ip address replace {v6}/64 dev eth0 nodad\n\
             ip route flush default; ip -6 route flush default"
        ));
        self.lab.fabric.default_route(&worker.node, worker.segment);
    }

    /// Adds pods for which the node needs another block, one after the other, and deletes them. A pod may get no
    /// address while the node cannot claim a block.
    fn crowd(&self, number: usize) {
        if self.stopped.contains(&number) {
            return;
        }
        let worker = &self.lab.workers[number];
        let names = (0..CROWD).map(|pod| format!("crowd{pod}"));
        let pods: Vec<_> =
            names.map(|name| (worker.try_pod(&name, &Worker::netconf("1.1.0")), name)).collect();
        for (pod, name) in pods {
            match pod {
                Ok(pod) => worker.delete(&pod),
                Err(_) => drop(worker.node.run("ip", &["netns", "delete", &name])),
            }
        }
    }

    /// Replaces the node with another machine of the same name, without any state of the first one.
    fn replace_node(&mut self, number: usize) {
        let other = (number + 1) % self.lab.workers.len();
        if self.stopped.contains(&other) || self.cut.contains(&other) {
            return;
        }
        let name = self.lab.workers[number].name().to_owned();
        self.lab.workers[number].kill();
        // The datastore may be electing a leader.
        wait::until("the node to be removed", || {
            self.lab.workers[other].try_ctl(&["node", "remove", &name, "--dead"]).map(drop)
        });
        self.lab.reboot(number);
        // The harm ended with the machine.
        self.changed.remove(&number);
        for oddity in ODDITIES {
            if self.odd.contains(&(number, oddity)) {
                self.toggle_oddity(number, oddity);
            }
        }
        if self.cut.contains(&number) {
            self.restore(number);
        }
        self.lab.workers[number].node.shell("rm -rf /var/lib/polder");
        make_foreign(&self.lab.workers[number]);
        self.foreign[number] = foreign(&self.lab.workers[number]);
        self.start(number);
        let worker = &self.lab.workers[number];
        let pod = worker.pod_within(TIMEOUT, "a", &Worker::netconf("1.1.0"));
        self.servers[number] = listen(std::slice::from_ref(&pod));
        self.pods[number] = pod;
        self.start_streams(number);
    }

    /// Ends all faults.
    fn end_all(&mut self) {
        self.cut.clone().into_iter().for_each(|number| self.restore(number));
        self.stopped.clone().into_iter().for_each(|number| self.start(number));
        self.odd.clone().into_iter().for_each(|(number, oddity)| self.toggle_oddity(number, oddity));
        self.changed.clone().into_keys().for_each(|number| self.toggle_reported_change(number));
        if let Some(member) = self.member.take() {
            self.lab.etcd.start_member(member);
        }
        for worker in &mut self.lab.workers {
            assert!(worker.runs(), "the agent of {} has ended: {}", worker.name(), worker.log());
        }
    }
}

fn settled(status: &Value) -> Option<()> {
    let pass = &status["last_pass"];
    (pass["writes"] == 0 && pass["failures"] == json!([])).then_some(())
}

/// Neither the plan nor another pass has anything to do. Blocks of the last crowd are released later; the writes for
/// that happen only once.
fn finds_nothing(worker: &Worker) -> Result<(), String> {
    let before = worker.wait_for_status("a pass that finds nothing", |status| {
        settled(status)?;
        Some(status["last_pass"].clone())
    });
    let plan = worker.try_ctl(&["plan"])?;
    worker.node.run("ip", &["address", "add", "192.0.2.99/32", "dev", "other0"]);
    let after = worker.wait_for_status("another pass", |status| {
        let last = &status["last_pass"];
        (last["count"].as_u64()? > before["count"].as_u64()?).then(|| last.clone())
    });
    worker.node.run("ip", &["address", "delete", "192.0.2.99/32", "dev", "other0"]);
    let is_idle = plan == json!([]) && after["written"] == before["written"];
    if is_idle { Ok(()) } else { Err(format!("planned {plan}, and {before} was followed by {after}")) }
}

#[test]
fn every_repaired_change_has_an_effect_and_is_repaired() {
    let mut random = Random::new(announced_seed());
    let lab = Lab::start(Topology::two_segments().families(Families::DUAL));
    let worker = &lab.workers[0];
    make_foreign(worker);
    let _pod = worker.pod("a");
    for change in &REPAIRED_CHANGES {
        // Nothing is left to repair from earlier changes.
        wait::until("nothing to do", || finds_nothing(worker));
        let before = worker.status()["last_pass"]["written"].as_u64();
        // By chance, there may be nothing to change in one family, or the kernel may refuse all changes.
        wait::until(&format!("something to be written where somebody {}", change.0), || {
            let message = apply_change(change, worker, &mut random);
            let last = worker.status()["last_pass"].clone();
            let is_noticed = last["written"].as_u64() > before;
            if is_noticed { Ok(()) } else { Err(format!("the output is {message:?}, and {last}")) }
        });
    }
}

#[test]
fn every_reported_change_is_a_problem_on_its_node_until_it_is_reverted() {
    let mut random = Random::new(announced_seed());
    let mut lab = Lab::build(Topology::two_segments().families(Families::DUAL));
    lab.workers.iter().for_each(|worker| worker.configure_also("resync_seconds = 1"));
    lab.start_agents();
    let worker = &lab.workers[0];
    let _pod = worker.pod("a");
    for reported in &REPORTED_CHANGES {
        let message = apply_change(&reported.change, worker, &mut random);
        let names = |status: &Value| status["problems"].to_string().contains(reported.named).then_some(());
        worker
            .wait_for_status(&format!("somebody who {} ({message:?}) to be named", reported.change.0), names);
        assert_eq!(names(&lab.workers[1].status()), None, "{} on the first node alone", reported.change.0);
        revert(reported, worker);
        worker.wait_for_status(
            &format!("nothing to be said, once {} is undone", reported.change.0),
            |status| (status["problems"] == json!([])).then_some(()),
        );
    }
}

#[test]
fn the_kernel_state_is_correct_after_random_damage_and_node_failures() {
    let mut site = Site::new(Random::new(announced_seed()));
    (0..STEPS).for_each(|_| site.step());
    site.end_all();
    let workers = &site.lab.workers;
    for worker in workers {
        wait::within(TIMEOUT, &format!("{} to be ready", worker.name()), || {
            let status = worker.try_status()?;
            let is_well = status["ready"] == true && status["problems"] == json!([]);
            let last = &status["last_pass"];
            let seen = || format!("{} {} {last}", status["reasons"], status["problems"]);
            if is_well { Ok(()) } else { Err(seen()) }
        });
    }
    wait_for_routes(&site.lab, TIMEOUT);
    for worker in workers {
        wait::within(TIMEOUT, &format!("{} to find nothing to do", worker.name()), || finds_nothing(worker));
    }
    site.servers.clear();
    let counts = Stream::finish(std::mem::take(&mut site.streams));
    let (sent, received) = counts.iter().fold((0, 0), |all, one| (all.0 + one.0, all.1 + one.1));
    assert_flat_over(Families::DUAL, &site.pods, 1450);
    for (worker, before) in workers.iter().zip(&site.foreign) {
        assert_eq!(foreign(worker), *before, "what is not ours on {}", worker.name());
    }
    let mut happened = BTreeMap::<&str, usize>::new();
    for (_, what) in site.steps.iter().filter_map(|step| step.split_once(": ")) {
        *happened.entry(what).or_default() += 1;
    }
    println!("{happened:#?}");
    println!("{received} of {sent} datagrams came back");
}
