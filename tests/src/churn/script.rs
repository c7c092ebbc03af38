//! The faults of a run with their times, determined before it starts.

use crate::Lab;
use crate::caller::Caller;
use crate::churn::site::{Boot, Site};
use crate::churn::tally::Tally;
use crate::churn::truth::Truth;
use crate::random::Random;

/// A temporary fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// One etcd member is killed.
    MemberKilled,
    /// One member is stopped with SIGSTOP.
    MemberFrozen,
    /// One member is disconnected.
    MemberCut,
    /// Two of three members are killed.
    QuorumKilled,
    /// All members are stopped with SIGSTOP.
    QuorumFrozen,
    /// Two members are disconnected.
    QuorumCut,
    /// The agent is killed.
    AgentKilled,
    /// The agent is killed and started at once, two times.
    AgentRestarted,
    /// The agent is stopped with SIGSTOP.
    AgentFrozen,
    /// The node is powered off; its agent starts later than the node.
    NodeRebooted,
    /// The node is disconnected.
    NodeCut,
    /// The agent is killed, and its ledger deleted.
    LedgerLost,
    /// The agent is killed, its ledger is deleted, and the node is powered off.
    LedgerLostAndRebooted,
    /// The agent's disk is full.
    DiskFull,
    /// The agent's disk is full, and the agent is killed and started.
    DiskFullAndKilled,
}

/// Faults of etcd, and faults of nodes: one of each kind can be active at the same time.
const OF_ETCD: [Fault; 6] = [
    Fault::MemberKilled,
    Fault::MemberFrozen,
    Fault::MemberCut,
    Fault::QuorumKilled,
    Fault::QuorumFrozen,
    Fault::QuorumCut,
];
const OF_NODES: [Fault; 9] = [
    Fault::AgentKilled,
    Fault::AgentRestarted,
    Fault::AgentFrozen,
    Fault::NodeRebooted,
    Fault::NodeCut,
    Fault::LedgerLost,
    Fault::LedgerLostAndRebooted,
    Fault::DiskFull,
    Fault::DiskFullAndKilled,
];

/// Number of etcd members, and their segment.
const MEMBERS: usize = 3;
const SEGMENT: u8 = 1;

/// The files of the agent's ledger, and the file that fills the disk.
const LEDGER: &str = "/var/lib/polder/ledger.db*";
const FILLING: &str = "/var/lib/polder/full";

/// The beginning or the end of a fault.
#[derive(Debug, Clone, Copy)]
pub struct Event {
    /// Step of the event.
    pub step: usize,
    /// The fault.
    pub fault: Fault,
    /// Index of the member or node.
    pub target: usize,
    /// Whether it begins or ends.
    pub edge: Edge,
}

/// Whether a fault begins or ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Edge {
    /// It begins.
    Begins,
    /// It ends.
    Ends,
}

/// Each fault once, in random order, at random steps below `steps`.
pub fn script(random: &mut Random, steps: usize) -> Vec<Event> {
    let mut events = lane(random, steps, &OF_ETCD);
    events.extend(lane(random, steps, &OF_NODES));
    events.sort_by_key(|event| event.step);
    events
}

/// Faults of one kind, one after the other.
fn lane(random: &mut Random, steps: usize, faults: &[Fault]) -> Vec<Event> {
    let mut faults = faults.to_vec();
    random.shuffle(&mut faults);
    let slot = steps / faults.len();
    let mut events = Vec::new();
    for (number, fault) in faults.into_iter().enumerate() {
        let (first, target) = (number * slot, random.below(3));
        let begins = first + random.below(slot / 3);
        let ends = begins + slot / 3 + random.below(slot / 3);
        events.push(Event { step: begins, fault, target, edge: Edge::Begins });
        events.push(Event { step: ends, fault, target, edge: Edge::Ends });
    }
    events
}

/// Applies the events.
#[derive(Debug)]
pub struct Saboteur<'a> {
    /// The lab.
    pub lab: &'a mut Lab,
    /// The lab's nodes, as the runtimes use them.
    pub sites: &'a [Site],
    /// The owner of each address.
    pub truth: &'a Truth,
    /// Counts of events.
    pub tally: &'a Tally,
}

impl Saboteur<'_> {
    /// Applies an event.
    pub fn act(&mut self, event: &Event) {
        let Event { fault, target, edge, step } = *event;
        println!(
            "step {step}: {fault:?} of {target} {}",
            if edge == Edge::Begins { "begins" } else { "ends" }
        );
        if edge == Edge::Begins {
            self.tally.count(format!("fault {fault:?}"));
            self.begin(fault, target);
        } else {
            self.end(fault, target);
        }
    }

    fn begin(&mut self, fault: Fault, target: usize) {
        let two = [target, (target + 1) % MEMBERS];
        match fault {
            Fault::MemberKilled => self.lab.etcd.kill_member(target),
            Fault::MemberFrozen => self.lab.etcd.freeze_member(target, true),
            Fault::MemberCut => self.cut_member(target),
            Fault::QuorumKilled => two.into_iter().for_each(|number| self.lab.etcd.kill_member(number)),
            Fault::QuorumFrozen => self.lab.etcd.freeze(true),
            Fault::QuorumCut => two.into_iter().for_each(|number| self.cut_member(number)),
            Fault::AgentKilled => self.lab.workers[target].kill(),
            Fault::AgentRestarted => self.restart(target),
            Fault::AgentFrozen => self.lab.workers[target].freeze(true),
            Fault::NodeRebooted => self.reboot(target),
            Fault::NodeCut => {
                let worker = &self.lab.workers[target];
                self.lab.fabric.cut(&worker.node, worker.segment);
            }
            Fault::LedgerLost => self.lose_ledger(target),
            Fault::LedgerLostAndRebooted => {
                self.lose_ledger(target);
                self.reboot(target);
            }
            Fault::DiskFull => self.fill(target),
            Fault::DiskFullAndKilled => {
                self.fill(target);
                self.restart(target);
            }
        }
    }

    fn end(&mut self, fault: Fault, target: usize) {
        let two = [target, (target + 1) % MEMBERS];
        match fault {
            Fault::MemberKilled => self.lab.etcd.start_member(target),
            Fault::MemberFrozen => self.lab.etcd.freeze_member(target, false),
            Fault::MemberCut => self.mend_member(target),
            Fault::QuorumKilled => two.into_iter().for_each(|number| self.lab.etcd.start_member(number)),
            Fault::QuorumFrozen => self.lab.etcd.freeze(false),
            Fault::QuorumCut => two.into_iter().for_each(|number| self.mend_member(number)),
            Fault::AgentKilled | Fault::NodeRebooted | Fault::LedgerLost | Fault::LedgerLostAndRebooted => {
                self.lab.workers[target].start();
            }
            Fault::AgentRestarted => self.restart(target),
            Fault::AgentFrozen => self.lab.workers[target].freeze(false),
            Fault::NodeCut => {
                let worker = &self.lab.workers[target];
                self.lab.fabric.restore(&worker.node, worker.segment);
            }
            Fault::DiskFull | Fault::DiskFullAndKilled => {
                self.lab.workers[target].node.run("rm", &[FILLING]);
                if !self.lab.workers[target].runs() {
                    self.tally.count("agent ended without space on its disk");
                    self.restart(target);
                }
            }
        }
    }

    fn cut_member(&self, number: usize) {
        self.lab.fabric.cut(self.lab.etcd.machine(number), SEGMENT);
    }

    fn mend_member(&self, number: usize) {
        self.lab.fabric.restore(self.lab.etcd.machine(number), SEGMENT);
    }

    fn restart(&mut self, target: usize) {
        self.lab.workers[target].kill();
        self.lab.workers[target].start();
    }

    fn reboot(&mut self, target: usize) {
        let site = &self.sites[target];
        site.close();
        let number = self.truth.boots(&site.node);
        self.lab.reboot(target);
        site.open(Boot { number, caller: Caller::of(&self.lab.workers[target].node) });
    }

    fn lose_ledger(&mut self, target: usize) {
        let worker = &mut self.lab.workers[target];
        worker.kill();
        worker.node.shell(&format!("rm -f {LEDGER}"));
    }

    fn fill(&mut self, target: usize) {
        let filling = format!("dd if=/dev/zero of={FILLING} bs=4k 2>/dev/null || true");
        self.lab.workers[target].node.shell(&filling);
    }

    /// Reports agents that have ended by themselves. All of them must run.
    pub fn expect_agents(&mut self) {
        for worker in &mut self.lab.workers {
            if !worker.runs() {
                let log = worker.log();
                let last: Vec<_> = log.lines().rev().take(5).collect();
                self.truth.record_error(format!("the agent of {} has ended: {last:#?}", worker.name()));
            }
        }
    }
}
