//! Processor time, memory and writes of agents: idle, while another program creates interfaces, and for the lives of
//! pods.

use std::io::Write;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};

use super::contestant::{COOLDOWN, Contestant, Place, rest};
use super::results::{Key, Results};

/// Time after the last call in which an agent may still work for it: the cool-down, and a little more.
const AFTERWARDS: Duration = COOLDOWN.saturating_add(Duration::from_secs(3));

/// Processor time of an agent from a moment on.
#[derive(Debug, Clone, Copy)]
struct Since {
    at: Instant,
    cpu: f64,
}

impl Since {
    fn now(agent: &Contestant) -> anyhow::Result<Self> {
        Ok(Self { at: Instant::now(), cpu: agent.agent_cpu()?.context("an agent")? })
    }

    /// Processor time since then, in milliseconds.
    fn used(&self, agent: &Contestant) -> anyhow::Result<f64> {
        Ok(Self::now(agent)?.cpu - self.cpu)
    }

    /// Share of a core since then, in percent: ten milliseconds in a second are one percent.
    fn share(&self, agent: &Contestant) -> anyhow::Result<f64> {
        Ok(self.used(agent)? / self.at.elapsed().as_secs_f64() / 10.0)
    }
}

fn with_agent(contestants: &[Contestant]) -> Vec<&Contestant> {
    contestants.iter().filter(|contestant| contestant.worker().is_some()).collect()
}

fn revision(agent: &Contestant) -> u64 {
    match &agent.place {
        Place::Lab(lab) => lab.etcd.revision(),
        Place::Node(_) => 0,
    }
}

/// Measures agents that have nothing to do, for that time. They must have finished what they did before.
pub fn idle(
    contestants: &[Contestant],
    time: Duration,
    key: impl Fn(&Contestant, &'static str) -> Key,
    round: u32,
    results: &mut Results,
) -> anyhow::Result<()> {
    let agents = with_agent(contestants);
    let writes: Vec<u64> = agents.iter().map(|agent| revision(agent)).collect();
    let since: Vec<_> = agents.iter().map(|agent| Since::now(agent)).collect::<anyhow::Result<_>>()?;
    rest(time);
    for ((agent, since), before) in agents.iter().zip(since).zip(writes) {
        results.add(key(agent, "idle_cpu"), "% of a core", round, [since.share(agent)?]);
        let writes = u32::try_from(revision(agent) - before)?;
        results.add(key(agent, "idle_writes"), "revisions", round, [f64::from(writes)]);
        let memory = agent.worker().context("an agent")?.agent_memory();
        results.add(key(agent, "memory"), "MiB", round, [memory.resident]);
        results.add(key(agent, "memory_anonymous"), "MiB", round, [memory.anonymous]);
    }
    Ok(())
}

/// Measures agents while another program creates and deletes interfaces for that time, 1,000 in a minute.
pub fn foreign(
    contestants: &[Contestant],
    time: Duration,
    key: impl Fn(&Contestant, &'static str) -> Key,
    results: &mut Results,
) -> anyhow::Result<()> {
    /// Time for a pair of interfaces.
    const PAIR: Duration = Duration::from_millis(120);
    let agents = with_agent(contestants);
    let mut batches = Vec::new();
    for agent in &agents {
        let mut command = agent.worker().context("an agent")?.node.command("ip");
        batches.push(command.args(["-batch", "-"]).stdin(Stdio::piped()).stdout(Stdio::null()).spawn()?);
    }
    let since: Vec<_> = agents.iter().map(|agent| Since::now(agent)).collect::<anyhow::Result<_>>()?;
    let started = Instant::now();
    for number in 1_u32.. {
        for batch in &mut batches {
            let input = batch.stdin.as_mut().context("a pipe")?;
            input.write_all(b"link add foreign0 type veth peer name foreign1\nlink delete foreign0\n")?;
        }
        rest((PAIR * number).saturating_sub(started.elapsed()));
        if started.elapsed() > time {
            break;
        }
    }
    for (agent, since) in agents.iter().zip(since) {
        results.add(key(agent, "foreign_cpu"), "% of a core", 0, [since.share(agent)?]);
    }
    for mut batch in batches {
        drop(batch.stdin.take());
        ensure!(batch.wait()?.success(), "ip -batch failed");
    }
    Ok(())
}

/// Measures the processor time of ADD and DEL of `count` pods, one at a time: of the plugins, and of the agent until
/// the cool-down is over. What the agent uses when it is idle, measured before, is subtracted.
pub fn lives(
    contestants: &mut [Contestant],
    count: usize,
    key: impl Fn(&Contestant, &'static str) -> Key,
    round: u32,
    results: &mut Results,
) -> anyhow::Result<()> {
    let of_one = 1.0 / f64::from(u32::try_from(count)?);
    let mut since = Vec::new();
    // Agents first: they have until the others are measured for what they put off.
    contestants.sort_by_key(|contestant| contestant.worker().is_none());
    let mut last = Instant::now();
    for contestant in contestants.iter_mut() {
        if contestant.worker().is_some() {
            since.push(Since::now(contestant)?);
        }
        let calls = contestant.pods(0, count);
        let [add, del] = [contestant.run("ADD", &calls, 1)?, contestant.run("DEL", &calls, 1)?];
        let plugin = (add.cpu + del.cpu) * of_one;
        for (what, value) in [
            ("add_cpu_plugin", add.cpu * of_one),
            ("del_cpu_plugin", del.cpu * of_one),
            ("life_cpu_plugin", plugin),
        ] {
            results.add(key(contestant, what), "ms", round, [value]);
        }
        match contestant.worker() {
            Some(_) => last = Instant::now(),
            None => results.add(key(contestant, "life_cpu"), "ms", round, [plugin]),
        }
    }
    rest(AFTERWARDS.saturating_sub(last.elapsed()));
    for (agent, since) in with_agent(contestants).into_iter().zip(since) {
        let latest = |what| {
            let series = results.get(&key(agent, what))?;
            series.rounds.get(&round).and_then(|values| values.last()).copied()
        };
        let idle = latest("idle_cpu").context("an idle agent was measured before")? * 10.0;
        let plugin = latest("life_cpu_plugin").context("it was just measured")?;
        let agents = (since.used(agent)? - idle * since.at.elapsed().as_secs_f64()) * of_one;
        results.add(key(agent, "life_cpu_agent"), "ms", round, [agents]);
        results.add(key(agent, "life_cpu"), "ms", round, [plugin + agents]);
    }
    Ok(())
}
