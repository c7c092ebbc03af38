//! What fails, when, and for how long: decided before it begins.

use crate::Lab;
use crate::caller::Caller;
use crate::churn::site::{Boot, Site};
use crate::churn::tally::Tally;
use crate::churn::truth::Truth;
use crate::random::Random;

/// Something that fails for a while.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// A member of etcd is killed.
    MemberKilled,
    /// It hangs.
    MemberFrozen,
    /// Its cable is pulled.
    MemberCut,
    /// Two of the three are killed.
    QuorumKilled,
    /// All hang.
    QuorumFrozen,
    /// The cables of two are pulled.
    QuorumCut,
    /// The agent is killed.
    AgentKilled,
    /// The agent is killed and started at once, twice.
    AgentRestarted,
    /// The agent hangs.
    AgentFrozen,
    /// The node's plug is pulled; its agent comes later than the node.
    NodeRebooted,
    /// The node's cable is pulled.
    NodeCut,
    /// The agent is killed, and its ledger deleted.
    LedgerLost,
    /// The agent is killed, its ledger deleted, and the node's plug is pulled.
    LedgerLostAndRebooted,
    /// There is no space left on the agent's disk.
    DiskFull,
    /// There is none, and the agent is killed and started.
    DiskFullAndKilled,
}

/// Faults of etcd, and faults of nodes: one of each kind may be there at the same time.
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

/// Members of etcd, and the segment that they are on.
const MEMBERS: usize = 3;
const SEGMENT: u8 = 1;

/// Where the agent's ledger is, and what takes the space.
const LEDGER: &str = "/var/lib/polder/ledger.db*";
const FILLING: &str = "/var/lib/polder/full";

/// The beginning or the end of a fault.
#[derive(Debug, Clone, Copy)]
pub struct Event {
    /// The step at which it happens.
    pub step: usize,
    /// What fails.
    pub fault: Fault,
    /// Which member, or which node.
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

/// Each fault once, in any order, at any time of that many steps.
pub fn script(random: &mut Random, steps: usize) -> Vec<Event> {
    let mut events = lane(random, steps, &OF_ETCD);
    events.extend(lane(random, steps, &OF_NODES));
    events.sort_by_key(|event| event.step);
    events
}

/// Faults one after the other.
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

/// Makes faults happen.
#[derive(Debug)]
pub struct Saboteur<'a> {
    /// To what.
    pub lab: &'a mut Lab,
    /// Its nodes as the runtimes see them.
    pub sites: &'a [Site],
    /// Who has which address.
    pub truth: &'a Truth,
    /// What has happened.
    pub tally: &'a Tally,
}

impl Saboteur<'_> {
    /// Lets it happen.
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
                self.lab.fabric.mend(&worker.node, worker.segment);
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
        self.lab.fabric.mend(self.lab.etcd.machine(number), SEGMENT);
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

    /// Says so if an agent has ended by itself. Each of them is to run.
    pub fn expect_agents(&mut self) {
        for worker in &mut self.lab.workers {
            if !worker.runs() {
                let log = worker.log();
                let last: Vec<_> = log.lines().rev().take(5).collect();
                self.truth.is_wrong(format!("the agent of {} has ended: {last:#?}", worker.name()));
            }
        }
    }
}
