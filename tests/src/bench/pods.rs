//! Part `pods`: duration and processor time of ADD and DEL.

use std::io::Write;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};

use super::contestant::{Contestant, Kind, Place, rest};
use super::progress::Progress;
use super::results::{Key, Results};

/// Name of this part.
pub const PART: &str = "pods";

/// Extent of the measurement.
#[derive(Debug, Clone, Copy)]
pub struct Extent {
    /// Number of rounds without other pods, and with them.
    pub rounds: [u32; 2],
    /// Number of rounds with the agent's processor time for a pod's life.
    pub life_rounds: u32,
    /// Number of calls of each verb in a round, for 1, 10 and 50 at once.
    pub calls: [(usize, usize); 3],
    /// Number of pods whose lives the agent's processor time is measured for.
    pub lives: usize,
    /// Time after the last call of a life, in which the agent does what it has put off; and of an idle agent.
    pub rest: Duration,
    /// Time of an idle agent with 100 pods, and with foreign interfaces.
    pub idle: Duration,
    /// Whether `bridge-masq` is also measured with other pods: its ADD takes 0.1 s then.
    pub masquerade_with_pods: bool,
}

impl Extent {
    /// The whole measurement, about a quarter of an hour.
    pub const FULL: Self = Self {
        rounds: [10, 6],
        life_rounds: 4,
        calls: [(1, 50), (10, 50), (50, 50)],
        lives: 100,
        rest: Duration::from_secs(10),
        idle: Duration::from_secs(60),
        masquerade_with_pods: true,
    };
    /// About two minutes.
    pub const QUICK: Self = Self {
        rounds: [4, 3],
        life_rounds: 2,
        calls: [(1, 25), (10, 20), (50, 50)],
        lives: 50,
        rest: Duration::from_secs(4),
        idle: Duration::from_secs(8),
        masquerade_with_pods: false,
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
/// Calls before the first measurement: the first ones find cold caches and claim a block.
const WARM_UP: usize = 5;

/// Runs the part.
pub fn run(
    extent: &Extent,
    folder: &Path,
    results: &mut Results,
    progress: &mut Progress,
) -> anyhow::Result<()> {
    let slots = extent.slots();
    let mut contestants = Vec::new();
    for kind in Kind::ALL {
        progress.step(&format!("pods: preparing a node for {}", kind.name()));
        let mut contestant = Contestant::prepare(kind, folder, slots + MANY)?;
        let calls = contestant.pods(0, WARM_UP);
        contestant.run("ADD", &calls, 1)?;
        contestant.run("DEL", &calls, 1)?;
        contestants.push(contestant);
    }
    Measurement { extent, pods: 0, results, progress }.all(&mut contestants, extent.rounds[0])?;
    fill(&mut contestants, slots, 0, SOME, progress)?;
    idle(&contestants, extent, results, progress)?;
    foreign(&contestants, extent, results, progress)?;
    if !extent.masquerade_with_pods {
        contestants.retain(|contestant| contestant.kind != Kind::BridgeMasquerade);
    }
    fill(&mut contestants, slots, SOME, MANY, progress)?;
    Measurement { extent, pods: MANY, results, progress }.all(&mut contestants, extent.rounds[1])?;
    progress.step("pods: removing the nodes");
    Ok(())
}

/// Creates pods that stay.
fn fill(
    contestants: &mut [Contestant],
    slots: usize,
    from: usize,
    to: usize,
    progress: &mut Progress,
) -> anyhow::Result<()> {
    for contestant in contestants {
        progress.step(&format!("pods: {to} pods for {}", contestant.kind.name()));
        let calls = contestant.pods(slots + from, to - from);
        contestant.run("ADD", &calls, FILLING)?;
        contestant.settle()?;
    }
    Ok(())
}

/// One number of other pods on the nodes.
struct Measurement<'a> {
    extent: &'a Extent,
    pods: usize,
    results: &'a mut Results,
    progress: &'a mut Progress,
}

impl Measurement<'_> {
    fn key(&self, contestant: &Contestant, what: &'static str) -> Key {
        Key::new(PART, contestant.kind.name(), what).when("pods", self.pods)
    }

    fn all(&mut self, contestants: &mut [Contestant], rounds: u32) -> anyhow::Result<()> {
        for round in 0..rounds {
            // Each is first as often as the others, and follows another one in each round.
            let begin = round as usize % contestants.len();
            let (head, tail) = contestants.split_at_mut(begin);
            for contestant in tail.iter_mut().chain(head) {
                let name = contestant.kind.name();
                self.progress.step(&format!(
                    "pods: {} pods, round {} of {rounds}: {name}",
                    self.pods,
                    round + 1
                ));
                self.turn(contestant, round)?;
            }
            if round < self.extent.life_rounds {
                self.lives(contestants, round)?;
            }
        }
        Ok(())
    }

    /// One contestant's turn in a round.
    fn turn(&mut self, contestant: &mut Contestant, round: u32) -> anyhow::Result<()> {
        let mut plugin = 0.0;
        for (at_once, count) in self.extent.calls {
            let calls = contestant.pods(0, count);
            for (verb, what, rate) in [("ADD", "add", "add_rate"), ("DEL", "del", "del_rate")] {
                contestant.settle()?;
                let outcome = contestant.run(verb, &calls, at_once)?;
                let key = |what| self.key(contestant, what).when("at_once", at_once);
                let (key, rate) = (key(what), key(rate));
                self.results.add(key, "ms", round, outcome.calls);
                if at_once > 1 {
                    self.results.add(rate, "calls/s", round, outcome.rates);
                } else {
                    let (cpu, count) = (outcome.cpu, f64::from(u32::try_from(count)?));
                    plugin += cpu / count;
                    let what = if verb == "ADD" { "add_cpu_plugin" } else { "del_cpu_plugin" };
                    self.results.add(self.key(contestant, what), "ms", round, [cpu / count]);
                }
            }
        }
        self.results.add(self.key(contestant, "life_cpu_plugin"), "ms", round, [plugin]);
        if contestant.worker().is_none() && round < self.extent.life_rounds {
            self.results.add(self.key(contestant, "life_cpu"), "ms", round, [plugin]);
        }
        Ok(())
    }

    /// Processor time of the agents for the lives of some pods, without what they use when they are idle.
    fn lives(&mut self, contestants: &mut [Contestant], round: u32) -> anyhow::Result<()> {
        let mut agents: Vec<_> =
            contestants.iter_mut().filter(|contestant| contestant.worker().is_some()).collect();
        let count = self.extent.lives;
        self.progress.step(&format!("pods: {} pods, processor time of idle agents", self.pods));
        for agent in &agents {
            agent.settle()?;
        }
        let since: Vec<_> = agents.iter().map(|agent| begin(agent)).collect::<anyhow::Result<_>>()?;
        rest(self.extent.rest);
        let mut idle = Vec::new();
        for (agent, (at, cpu)) in agents.iter().zip(since) {
            let (used, seconds) = (cpu_of(agent)? - cpu, at.elapsed().as_secs_f64());
            idle.push(used / seconds);
            self.results.add(self.key(agent, "idle_cpu"), "% of a core", round, [used / seconds / 10.0]);
        }
        self.progress.step(&format!("pods: {} pods, processor time of {count} lives", self.pods));
        let mut since = Vec::new();
        for agent in &mut agents {
            since.push(begin(agent)?);
            let calls = agent.pods(0, count);
            let plugins = agent.run("ADD", &calls, 1)?.cpu + agent.run("DEL", &calls, 1)?.cpu;
            self.results.add(
                self.key(agent, "life_cpu_plugin"),
                "ms",
                round,
                [plugins / f64::from(u32::try_from(count)?)],
            );
        }
        rest(self.extent.rest);
        for ((agent, (at, cpu)), idle) in agents.iter().zip(since).zip(idle) {
            let used = cpu_of(agent)? - cpu - idle * at.elapsed().as_secs_f64();
            let life = used / f64::from(u32::try_from(count)?);
            self.results.add(self.key(agent, "life_cpu_agent"), "ms", round, [life]);
            let plugin = self.key(agent, "life_cpu_plugin");
            let plugin = self.results.get(&plugin).and_then(|series| series.rounds.get(&round));
            let plugin = plugin.and_then(|values| values.last()).context("a turn before")?;
            let whole = life + plugin;
            self.results.add(self.key(agent, "life_cpu"), "ms", round, [whole]);
        }
        Ok(())
    }
}

fn cpu_of(agent: &Contestant) -> anyhow::Result<f64> {
    agent.agent_cpu()?.context("an agent")
}

fn begin(agent: &Contestant) -> anyhow::Result<(Instant, f64)> {
    Ok((Instant::now(), cpu_of(agent)?))
}

/// Processor time, memory and writes to etcd of agents that have nothing to do.
fn idle(
    contestants: &[Contestant],
    extent: &Extent,
    results: &mut Results,
    progress: &mut Progress,
) -> anyhow::Result<()> {
    progress.step(&format!("pods: idle agents with {SOME} pods"));
    let revision = |agent: &Contestant| match &agent.place {
        Place::Lab(lab) => lab.etcd.revision(),
        Place::Node(_) => 0,
    };
    let agents: Vec<_> = contestants.iter().filter(|contestant| contestant.worker().is_some()).collect();
    // What follows the last ADD has to be over: the agent publishes and writes within some seconds.
    rest(extent.rest);
    let mut since = Vec::new();
    for agent in &agents {
        since.push((begin(agent)?, revision(agent)));
    }
    rest(extent.idle);
    for (agent, ((at, cpu), before)) in agents.iter().zip(since) {
        let key = |what| Key::new(PART, agent.kind.name(), what).when("pods", SOME);
        let share = (cpu_of(agent)? - cpu) / at.elapsed().as_secs_f64() / 10.0;
        results.add(key("idle_cpu"), "% of a core", 0, [share]);
        let writes = u32::try_from(revision(agent) - before)?;
        results.add(key("idle_writes"), "revisions of etcd", 0, [f64::from(writes)]);
        let memory = agent.worker().context("an agent")?.agent_memory();
        results.add(key("memory"), "MiB", 0, [memory.resident]);
        results.add(key("memory_anonymous"), "MiB", 0, [memory.anonymous]);
    }
    Ok(())
}

/// Processor time of the agents while another program creates and deletes interfaces, 1,000 in a minute.
fn foreign(
    contestants: &[Contestant],
    extent: &Extent,
    results: &mut Results,
    progress: &mut Progress,
) -> anyhow::Result<()> {
    /// Time for a pair of interfaces.
    const PAIR: Duration = Duration::from_millis(120);
    progress.step("pods: 1000 foreign interfaces in a minute");
    let agents: Vec<_> = contestants.iter().filter(|contestant| contestant.worker().is_some()).collect();
    let mut batches = Vec::new();
    for agent in &agents {
        let mut command = agent.worker().context("an agent")?.node.command("ip");
        batches.push(command.args(["-batch", "-"]).stdin(Stdio::piped()).stdout(Stdio::null()).spawn()?);
    }
    let since: Vec<_> = agents.iter().map(|agent| begin(agent)).collect::<anyhow::Result<_>>()?;
    let started = Instant::now();
    for number in 1_u32.. {
        for batch in &mut batches {
            let input = batch.stdin.as_mut().context("a pipe")?;
            input.write_all(b"link add foreign0 type veth peer name foreign1\nlink delete foreign0\n")?;
        }
        rest((PAIR * number).saturating_sub(started.elapsed()));
        if started.elapsed() > extent.idle {
            break;
        }
    }
    for (agent, (at, cpu)) in agents.iter().zip(since) {
        let share = (cpu_of(agent)? - cpu) / at.elapsed().as_secs_f64() / 10.0;
        let key = Key::new(PART, agent.kind.name(), "foreign_cpu").when("pods", SOME);
        results.add(key, "% of a core", 0, [share]);
    }
    for mut batch in batches {
        drop(batch.stdin.take());
        ensure!(batch.wait()?.success(), "ip -batch failed");
    }
    Ok(())
}
