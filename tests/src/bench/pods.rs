//! Part `pods`: duration and processor time of ADD and DEL.

use std::path::Path;
use std::time::Duration;

use super::agents;
use super::contestant::{Contestant, Kind, rest};
use super::progress::Progress;
use super::results::{Key, Results};
use super::rounds::order;

/// Name of this part.
pub const PART: &str = "pods";

/// Extent of the measurement.
#[derive(Debug, Clone, Copy)]
pub struct Extent {
    /// Number of rounds without other pods, and with them.
    pub rounds: [u32; 2],
    /// Number of measurements of the processor time of lives.
    pub life_rounds: u32,
    /// Numbers of calls at once, and of calls of each verb in a round.
    pub calls: [(usize, usize); 3],
    /// Number of pods in a measurement of the processor time of lives.
    pub lives: usize,
    /// Time of idle agents.
    pub idle: Duration,
    /// Number of rounds of `bridge-masq` without other pods, and with them: its calls take up to two seconds.
    pub masquerade_rounds: [u32; 2],
}

impl Extent {
    /// The whole measurement: about a quarter of an hour.
    pub const FULL: Self = Self {
        rounds: [10, 6],
        life_rounds: 3,
        calls: [(1, 50), (10, 50), (50, 50)],
        lives: 100,
        idle: Duration::from_secs(30),
        masquerade_rounds: [4, 2],
    };
    /// About three minutes.
    pub const QUICK: Self = Self {
        rounds: [3, 2],
        life_rounds: 1,
        calls: [(1, 25), (10, 20), (50, 50)],
        lives: 30,
        idle: Duration::from_secs(6),
        masquerade_rounds: [1, 0],
    };

    fn slots(&self) -> usize {
        self.calls.iter().map(|(_, count)| *count).chain([self.lives]).max().unwrap_or_default()
    }
}

/// Number of other pods on the node.
const MANY: usize = 500;
/// Number of pods of an idle node.
const SOME: usize = 100;
/// Number of pods that are created at once before the measurement.
const FILLING: usize = 10;
/// Time after ADDs in which an agent publishes and writes.
const AFTER_ADDS: Duration = Duration::from_secs(4);
/// Calls before the first measurement: the first ones find cold caches and claim a block.
const WARM_UP: usize = 5;

/// Measures these contestants.
pub fn run(
    kinds: &[Kind],
    extent: &Extent,
    folder: &Path,
    results: &mut Results,
    progress: &mut Progress,
) -> anyhow::Result<()> {
    let slots = extent.slots();
    let mut contestants = Vec::new();
    for kind in kinds {
        progress.step(&format!("pods: preparing a node for {}", kind.name()));
        let mut contestant = Contestant::prepare(*kind, folder, slots + MANY)?;
        let calls = contestant.pods(0, WARM_UP);
        contestant.run("ADD", &calls, 1)?;
        contestant.run("DEL", &calls, 1)?;
        contestants.push(contestant);
    }
    let mut measurement = Measurement { extent, pods: 0, results, progress };
    measurement.lives(&mut contestants)?;
    measurement.some_pods(&mut contestants, slots)?;
    measurement.rounds(&mut contestants, 0)?;
    if extent.masquerade_rounds[1] == 0 {
        contestants.retain(|contestant| contestant.kind != Kind::BridgeMasquerade);
    }
    for contestant in &mut contestants {
        measurement.progress.step(&format!("pods: {MANY} pods for {}", contestant.kind.name()));
        let calls = contestant.pods(slots, MANY);
        contestant.run("ADD", &calls, FILLING)?;
    }
    measurement.pods = MANY;
    measurement.lives(&mut contestants)?;
    measurement.rounds(&mut contestants, 1)?;
    measurement.progress.step("pods: removing the nodes");
    Ok(())
}

/// One number of other pods on the nodes.
struct Measurement<'a> {
    extent: &'a Extent,
    pods: usize,
    results: &'a mut Results,
    progress: &'a mut Progress,
}

fn key(pods: usize) -> impl Fn(&Contestant, &'static str) -> Key {
    move |contestant, what| Key::new(PART, contestant.kind.name(), what).when("pods", pods)
}

impl Measurement<'_> {
    /// Processor time of lives.
    fn lives(&mut self, contestants: &mut [Contestant]) -> anyhow::Result<()> {
        let (key, pods, count) = (key(self.pods), self.pods, self.extent.lives);
        for round in 0..self.extent.life_rounds {
            let rounds = self.extent.life_rounds;
            self.progress.step(&format!("pods: {pods} pods, idle agents, round {} of {rounds}", round + 1));
            if round == 0 {
                rest(AFTER_ADDS);
            }
            agents::idle(contestants, self.extent.idle, &key, round, self.results)?;
            self.progress.step(&format!("pods: {pods} pods, processor time of {count} lives each"));
            agents::lives(contestants, count, &key, round, self.results)?;
        }
        Ok(())
    }

    /// Agents with some pods. The pods are deleted afterwards.
    fn some_pods(&mut self, contestants: &mut [Contestant], slots: usize) -> anyhow::Result<()> {
        let mut with_agent: Vec<_> =
            contestants.iter_mut().filter(|contestant| contestant.worker().is_some()).collect();
        let mut all = Vec::new();
        self.progress.step(&format!("pods: idle agents with {SOME} pods"));
        for agent in &mut with_agent {
            let calls = agent.pods(slots, SOME);
            agent.run("ADD", &calls, FILLING)?;
            all.push(calls);
        }
        rest(AFTER_ADDS);
        agents::idle(contestants, self.extent.idle, key(SOME), 0, self.results)?;
        self.progress.step("pods: 1000 foreign interfaces in a minute");
        agents::foreign(contestants, self.extent.idle, key(SOME), self.results)?;
        let with_agent = contestants.iter_mut().filter(|contestant| contestant.worker().is_some());
        for (agent, calls) in with_agent.zip(all) {
            agent.run("DEL", &calls, FILLING)?;
        }
        Ok(())
    }

    /// All rounds with that load: 0 without other pods, 1 with them.
    fn rounds(&mut self, contestants: &mut [Contestant], load: usize) -> anyhow::Result<()> {
        let rounds = self.extent.rounds[load];
        for round in 0..rounds {
            for at in order(contestants.len(), round) {
                let contestant = &mut contestants[at];
                let is_slow = contestant.kind == Kind::BridgeMasquerade;
                if is_slow && round >= self.extent.masquerade_rounds[load] {
                    continue;
                }
                let name = contestant.kind.name();
                self.progress.step(&format!(
                    "pods: {} pods, round {} of {rounds}: {name}",
                    self.pods,
                    round + 1
                ));
                self.turn(contestant, round)?;
                // What its agent has put off must not disturb the next one.
                contestant.settle()?;
            }
        }
        Ok(())
    }

    /// One contestant's turn in a round.
    fn turn(&mut self, contestant: &mut Contestant, round: u32) -> anyhow::Result<()> {
        for (at_once, count) in self.extent.calls {
            let calls = contestant.pods(0, count);
            for (verb, what, rate) in [("ADD", "add", "add_rate"), ("DEL", "del", "del_rate")] {
                contestant.settle()?;
                let outcome = contestant.run(verb, &calls, at_once)?;
                let key = |what| key(self.pods)(contestant, what).when("at_once", at_once);
                self.results.add(key(what), "ms", round, outcome.calls);
                if at_once > 1 {
                    self.results.add(key(rate), "calls/s", round, outcome.rates);
                }
            }
        }
        Ok(())
    }
}
