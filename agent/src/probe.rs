//! Probes: whether the peers answer over the very way that pods use, and whether it carries their longest packets.

mod echo;
pub mod schedule;

use std::collections::BTreeMap;
use std::future::pending;
use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use polder_api::Family;
use tokio::time::sleep_until;
use tracing::{info, warn};

use self::echo::Echo;
use self::schedule::{Key, Schedule, Shot, Size, Target, Token, Verdict};
use crate::agent::Agent;
use crate::board::Pass;
use crate::kernel::desired::{Path, Reached};
use crate::leases;

/// Probes that go out at once, and the time before the next ones do.
const VOLLEY: usize = 20;
const VOLLEYS_APART: Duration = Duration::from_millis(10);

/// Answers that come together are told together.
const SETTLE: Duration = Duration::from_millis(20);

/// Between two questions to the store about which nodes live.
const ASK_AGAIN: Duration = Duration::from_secs(2);

/// For how long it is waited for an answer, where nobody can say whether there is anybody who could give one.
const PATIENCE: Duration = Duration::from_secs(10);

/// Runs for ever.
pub async fn run(agent: Arc<Agent>) {
    if !agent.config.probe_peers {
        drop(agent.board.probed.send_replace(Ok(())));
        return pending().await;
    }
    let mut passes = agent.board.pass.subscribe();
    let mut prober = Prober {
        // The number of this process, of which there is one on the node, or what fits of it.
        identifier: u16::try_from(std::process::id() & 0xffff).expect("16 bits"),
        schedule: Schedule::new(agent.config.resync),
        agent,
        echoes: BTreeMap::new(),
        blind: BTreeMap::new(),
        aimed_by: None,
        // There may be nobody to wait for.
        tell_at: Some(Instant::now()),
        silent_since: None,
        ask_at: None,
    };
    loop {
        // Before the node has an address of its own, nothing is known of anybody.
        let pass = passes.borrow_and_update().clone().filter(|pass| !pass.gateways.is_empty());
        let Some(pass) = pass else {
            if passes.changed().await.is_err() {
                return;
            }
            continue;
        };
        prober.aim(&pass);
        prober.shoot().await;
        prober.tell(&pass).await;
        // Cancel-safe, all of them: what is not taken is seen the next time.
        tokio::select! {
            _ = passes.changed() => {}
            (family, answer) = answer(&prober.echoes) => prober.take(family, answer),
            () = sleep_until(prober.wake().into()) => {}
        }
    }
}

struct Prober {
    agent: Arc<Agent>,
    identifier: u16,
    schedule: Schedule,
    /// The sockets, where the node has an address of its own in the pod network.
    echoes: BTreeMap<Family, Echo>,
    /// Why there are none, although it has an address.
    blind: BTreeMap<Family, String>,
    /// The pass that the targets are from.
    aimed_by: Option<Arc<Pass>>,
    /// When the others are told what is known.
    tell_at: Option<Instant>,
    /// Since when no peer answers that ought to before the node is ready.
    silent_since: Option<Instant>,
    /// When the store is asked who lives.
    ask_at: Option<Instant>,
}

async fn answer(echoes: &BTreeMap<Family, Echo>) -> (Family, io::Result<(IpAddr, Token)>) {
    let receive = async |family| match echoes.get(&family) {
        Some(echo) => (family, echo.receive().await),
        None => pending().await,
    };
    tokio::select! {
        answer = receive(Family::V4) => answer,
        answer = receive(Family::V6) => answer,
    }
}

impl Prober {
    /// Goes by what the last pass over the kernel has found.
    fn aim(&mut self, pass: &Arc<Pass>) {
        if self.aimed_by.as_ref().is_some_and(|by| Arc::ptr_eq(by, pass)) {
            return;
        }
        self.aimed_by = Some(Arc::clone(pass));
        for family in Family::BOTH {
            let own = pass.gateways.iter().copied().find(|own| Family::of(*own) == family);
            if own.is_none() || self.echoes.get(&family).map(Echo::source) != own {
                self.echoes.remove(&family);
                self.open(family, own);
            }
        }
        let targets = pass.paths.iter().filter(|((_, family), _)| self.echoes.contains_key(family));
        let targets =
            targets.filter_map(|(key, reached)| Some((key.clone(), Target::of(reached)?))).collect();
        self.schedule.aim(&targets, Instant::now());
        self.tell_at.get_or_insert(Instant::now());
    }

    fn open(&mut self, family: Family, own: Option<IpAddr>) {
        let before = self.blind.remove(&family);
        let Some(source) = own else { return };
        match Echo::open(source, self.identifier) {
            Ok(echo) => drop(self.echoes.insert(family, echo)),
            Err(error) => {
                let reason = format!("peers cannot be probed from {source}: {error}");
                if before.as_ref() != Some(&reason) {
                    warn!("{reason}");
                }
                self.blind.insert(family, reason);
            }
        }
    }

    async fn shoot(&mut self) {
        for Shot { number, to, full } in self.schedule.shoot(Instant::now(), VOLLEY) {
            let Some(echo) = self.echoes.get(&Family::of(to)) else { continue };
            for (size, length) in [(Size::Small, 0), (Size::Full, full as usize)] {
                // What cannot be sent does not come back: that is what counts.
                let _ = echo.send(to, length, Token { number, size }).await;
            }
            // Which may be that an earlier one did not.
            self.tell_at.get_or_insert(Instant::now() + SETTLE);
        }
    }

    fn take(&mut self, family: Family, answer: io::Result<(IpAddr, Token)>) {
        match answer {
            Ok((from, token)) => {
                self.schedule.take(from, token, Instant::now());
                self.tell_at.get_or_insert(Instant::now() + SETTLE);
            }
            Err(error) => {
                warn!(%family, %error, "answers to probes cannot be read");
                self.echoes.remove(&family);
                self.aimed_by = None;
            }
        }
    }

    fn wake(&self) -> Instant {
        let now = Instant::now();
        let next = self.schedule.next().map(|next| next.max(now + VOLLEYS_APART));
        let far = now + PATIENCE;
        [next, self.tell_at, self.ask_at].into_iter().flatten().fold(far, Instant::min)
    }

    /// Tells the others what is known, if it is time to.
    async fn tell(&mut self, pass: &Pass) {
        let now = Instant::now();
        let is_due = |at: Option<Instant>| at.is_some_and(|at| at <= now);
        if !is_due(self.tell_at) && !is_due(self.ask_at) {
            return;
        }
        self.tell_at = None;
        self.ask_at = None;
        let verdicts = self.schedule.verdicts();
        if self.agent.board.probed.borrow().is_err() {
            let probed = self.judge(pass, &verdicts).await;
            self.agent.board.probed.send_if_modified(|known| {
                let is_other = *known != probed;
                if is_other && probed.is_ok() {
                    info!("the ways to the peers are open, as far as there are any");
                }
                *known = probed;
                is_other
            });
        }
        self.agent.board.verdicts.send_if_modified(|known| {
            let is_other = **known != verdicts;
            if is_other {
                log(known, &verdicts);
                *known = Arc::new(verdicts);
            }
            is_other
        });
    }

    /// Whether the node is ready, as far as peers have a say in it: in every family one of them answers, or there is none that
    /// could. One to which there is no way yet does not answer either.
    async fn judge(&mut self, pass: &Pass, verdicts: &BTreeMap<Key, Verdict>) -> Result<(), String> {
        if let Some(reason) = self.blind.values().next() {
            return Err(format!("{reason}; probe_peers = false in the configuration does without"));
        }
        let mut silent = Vec::new();
        for family in self.echoes.keys() {
            let has_pods = |((_, of), reached): &(&Key, &Reached)| of == family && reached.gateway.is_some();
            let peers: Vec<&Key> = pass.paths.iter().filter(has_pods).map(|(key, _)| key).collect();
            let known = || peers.iter().filter_map(|key| verdicts.get(*key));
            if known().any(|verdict| verdict.is_open()) {
                continue;
            }
            if known().any(|verdict| *verdict == Verdict::Unknown) {
                return Err("the ways to the peers are being probed".to_owned());
            }
            silent.extend(peers.into_iter().map(|(name, _)| name.clone()));
        }
        if silent.is_empty() {
            return Ok(());
        }
        let now = Instant::now();
        let since = *self.silent_since.get_or_insert(now);
        self.ask_at = Some(now + ASK_AGAIN);
        let living = match leases::living(&self.agent.store).await {
            Ok(living) => living,
            Err(_) if now - since < PATIENCE => {
                return Err("no peer answers, and the store cannot be asked which of them live".to_owned());
            }
            Err(_) => return Ok(()),
        };
        silent.retain(|name| living.contains(name));
        silent.sort();
        silent.dedup();
        if silent.is_empty() {
            return Ok(());
        }
        let names: Vec<_> = silent.iter().take(5).map(ToString::to_string).collect();
        Err(format!(
            "no peer answers over the way that pods would use, although {} of them live, {} among them: look whether \
             the underlay lets through what `polderctl node list` names as their paths, and ICMP; probe_peers = false in the \
             configuration does without an answer",
            silent.len(),
            names.join(", ")
        ))
    }
}

/// Says what is no longer as it was.
fn log(before: &BTreeMap<Key, Verdict>, now: &BTreeMap<Key, Verdict>) {
    for ((node, family), verdict) in now {
        let was = before.get(&(node.clone(), *family)).copied().unwrap_or(Verdict::Unknown);
        match (was, verdict) {
            (Verdict::Silent | Verdict::Narrow(_), Verdict::Answers) => {
                info!(%node, %family, "answers again");
            }
            (Verdict::Unknown | Verdict::Answers | Verdict::Narrow(_), Verdict::Silent) => {
                warn!(%node, %family, "does not answer");
            }
            (Verdict::Unknown | Verdict::Answers | Verdict::Silent, Verdict::Narrow(bytes)) => {
                warn!(%node, %family, bytes, "answers, but not to packets of that length");
            }
            _ => {}
        }
    }
}

/// The verdict in a word; none, while nothing is known.
pub fn word(verdict: Option<&Verdict>) -> &'static str {
    match verdict {
        Some(Verdict::Answers) => "answers",
        Some(Verdict::Narrow(_)) => "narrow",
        Some(Verdict::Silent) => "silent",
        Some(Verdict::Unknown) | None => "",
    }
}

/// What is wrong with the way to a peer, if anything is.
pub fn problem((node, family): &Key, verdict: Verdict, reached: &Reached) -> Option<String> {
    let way = match &reached.path {
        Path::Direct { via, .. } => format!("directly to {via}"),
        Path::Vxlan { remote, .. } => format!("through a tunnel to {remote}"),
        Path::Unreachable(_) => return None,
    };
    match verdict {
        Verdict::Unknown | Verdict::Answers => None,
        Verdict::Silent => Some(format!(
            "node {node} does not answer over the way that {family} pods use, {way}: it is down, or what is between does \
             not let it through"
        )),
        Verdict::Narrow(bytes) => Some(format!(
            "packets of {bytes} bytes do not get to {family} pods of node {node}, {way}, although small ones do: what is \
             between carries less than the interfaces say. Set mtu in the configuration to what it carries, or raise its MTU"
        )),
    }
}
