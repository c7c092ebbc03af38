//! The relevant part of a state: two states that are equal in it behave identically from then on.
//!
//! The revision of the store grows with every write. Tasks only compare revisions for equality or order. So the
//! revisions still in use are renumbered, in the same order.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

use polder_ipam::Revision;
use polder_ipam::registration::Registration;
use polder_ipam::store::{Compare, Entry, Outcome, Txn, Update, Write};

use super::cluster::Cluster;
use super::machine::Machine;
use super::task::{Answer, Job, Part, Sent, Stopped, Wait};
use super::watcher::{Behind, Watcher};

impl PartialEq for Cluster {
    fn eq(&self, other: &Self) -> bool {
        let digest = |cluster: &Self| {
            let mut hasher = DefaultHasher::new();
            cluster.hash(&mut hasher);
            hasher.finish()
        };
        digest(self) == digest(other)
    }
}

impl Hash for Cluster {
    fn hash<H: Hasher>(&self, state: &mut H) {
        let mut projection = Projection { state, ranks: Ranks::of(self) };
        projection.entries(&self.truth.entries);
        self.machines.iter().for_each(|machine| projection.machine(machine));
        self.late.len().hash(projection.state);
        self.late.iter().for_each(|sent| projection.sent(sent));
        let Self { remaining, tick, in_cool_down, removed, violation, .. } = self;
        (remaining, tick, in_cool_down, removed, violation).hash(projection.state);
    }
}

/// The revisions still in use, in order. The first is [`Revision::ABSENT`], the revision of a missing key.
struct Ranks(Vec<Revision>);

impl Ranks {
    fn of(cluster: &Cluster) -> Self {
        let mut known = vec![Revision::ABSENT];
        known.extend(cluster.truth.entries.values().map(|entry| entry.revision));
        cluster.late.iter().for_each(|sent| add_txn(&mut known, &sent.txn));
        for agent in cluster.machines.iter().map(|machine| &machine.agent) {
            if !agent.watcher.is_current() {
                known.extend(agent.watcher.entries.values().map(|entry| entry.revision));
            }
            if let Behind::Changes(changes) = &agent.watcher.behind {
                known.extend(changes.iter().filter_map(|update| match &**update {
                    Update::Changed { revision, .. } => Some(*revision),
                    _ => None,
                }));
            }
            for stopped in agent.tasks() {
                match &stopped.wait {
                    Wait::Commit(sent) => add_txn(&mut known, &sent.txn),
                    Wait::CaughtUp(revision) => known.push(*revision),
                    _ => {}
                }
            }
        }
        known.sort_unstable();
        known.dedup();
        Self(known)
    }

    fn rank(&self, revision: Revision) -> usize {
        self.0.binary_search(&revision).unwrap_or_else(|place| place)
    }
}

fn add_txn(known: &mut Vec<Revision>, txn: &Txn) {
    known.extend(txn.compares.iter().filter_map(|compare| match compare {
        Compare::Unchanged { revision, .. } | Compare::NothingNewer { revision, .. } => Some(*revision),
        Compare::Empty(_) => None,
    }));
}

struct Projection<'a, H> {
    state: &'a mut H,
    ranks: Ranks,
}

impl<H: Hasher> Projection<'_, H> {
    fn put(&mut self, what: impl Hash) {
        what.hash(self.state);
    }

    fn entry(&mut self, entry: &Entry) {
        let rank = self.ranks.rank(entry.revision);
        self.put((&entry.key, &entry.value, rank));
    }

    fn entries(&mut self, entries: &Arc<BTreeMap<String, Entry>>) {
        self.put(entries.len());
        entries.values().for_each(|entry| self.entry(entry));
    }

    fn machine(&mut self, machine: &Machine) {
        let Machine {
            id,
            kernel: _,
            name: _,
            power,
            boots,
            booted,
            incarnations,
            ipam,
            plugged,
            containers,
            agent,
        } = machine;
        self.put((id, power, boots, booted, incarnations, ipam, plugged, containers));
        // Waiting or registered: a node that serves behaves the same in both.
        let registration = match agent.registration {
            Registration::Waiting(_) | Registration::Registered => 0_u8,
            Registration::Unproven(_) => 1,
            Registration::Conflict(_) => 2,
            Registration::Removed(_) => 3,
        };
        self.put((&agent.adopted, registration, &agent.state));
        self.watcher(&agent.watcher);
        for stopped in [&agent.registrar, &agent.adding, &agent.sweeping] {
            self.put(stopped.is_some());
            stopped.iter().for_each(|stopped| self.stopped(stopped, &agent.watcher));
        }
        self.put(agent.deleting.len());
        for (container, stopped) in &agent.deleting {
            self.put(container);
            self.stopped(stopped, &agent.watcher);
        }
    }

    fn watcher(&mut self, watcher: &Watcher) {
        self.put((watcher.view.source as u8, watcher.view.losses));
        if watcher.is_current() {
            // It shows the current contents of the store.
            return self.put(0_u8);
        }
        self.entries(&watcher.entries);
        let Behind::Changes(changes) = &watcher.behind else { return self.put(1_u8) };
        self.put((2_u8, changes.len()));
        for update in changes {
            let Update::Changed { revision, changes } = &**update else { continue };
            let rank = self.ranks.rank(*revision);
            self.put((rank, changes.len()));
            for change in changes {
                self.put((&change.key, change.entry.as_ref().map(|entry| &entry.value)));
            }
        }
    }

    /// Hashes the answers that a task received, not their times: the wait condition covers what the task had read by
    /// then.
    fn stopped(&mut self, Stopped { job, parts, wait }: &Stopped, watcher: &Watcher) {
        match &**job {
            Job::CarryOut(decided) => self.put((0_u8, decided.step().map(std::mem::discriminant))),
            Job::Serve { for_add, .. } => self.put((1_u8, for_add)),
            Job::HandOver(_, attachment) => self.put((2_u8, attachment)),
            Job::Add(request) => self.put((3_u8, &request.attachment)),
            Job::Del(attachment) => self.put((4_u8, attachment)),
            Job::Decide | Job::Sweep(_) => self.put(5_u8),
        }
        for (waited, answer) in parts.iter().filter_map(|part: &Part| part.resumed_with.as_ref()) {
            if let Wait::Commit(sent) = waited {
                self.writes(sent);
            }
            self.answer(answer);
        }
        match wait {
            Wait::Commit(sent) => {
                self.put(0_u8);
                self.sent(sent);
            }
            Wait::Read(range) => self.put((1_u8, &range.start)),
            Wait::CaughtUp(revision) => {
                let rank = self.ranks.rank(*revision);
                self.put((2_u8, rank));
            }
            Wait::Changed(revision) => self.put((3_u8, watcher.view.revision != *revision)),
            Wait::Block(_) => self.put(4_u8),
            Wait::Address(_) => self.put(5_u8),
            Wait::Turn(answer) => {
                self.put(6_u8);
                self.answer(answer);
            }
            Wait::Interface(attachment) => self.put((7_u8, attachment)),
            Wait::Free(attachment) => self.put((8_u8, attachment)),
            Wait::Time => self.put(9_u8),
        }
    }

    fn answer(&mut self, answer: &Answer) {
        match answer {
            Answer::Committed(Ok(outcome)) => self.put((0_u8, *outcome == Outcome::Refused)),
            Answer::Committed(Err(_)) => self.put(1_u8),
            Answer::Contents(contents) => {
                let values = contents.as_ref().ok().map(|contents| {
                    contents.entries.iter().map(|entry| entry.value.clone()).collect::<Vec<_>>()
                });
                self.put((2_u8, values));
            }
            Answer::CaughtUp(seen) => self.put((3_u8, seen.is_ok())),
            Answer::Block(block) => self.put((4_u8, block.is_ok())),
            Answer::Address(address) => self.put((5_u8, address.as_ref().ok())),
            Answer::Continue => self.put(6_u8),
        }
    }

    fn sent(&mut self, sent: &Sent) {
        self.put((&sent.by, sent.confirms(), sent.txn.compares.len()));
        for compare in &sent.txn.compares {
            match compare {
                Compare::Empty(range) => self.put((0_u8, &range.start, &range.end)),
                Compare::Unchanged { key, revision } => {
                    let rank = self.ranks.rank(*revision);
                    self.put((1_u8, key, rank));
                }
                Compare::NothingNewer { range, revision } => {
                    let rank = self.ranks.rank(*revision);
                    self.put((2_u8, &range.start, &range.end, rank));
                }
            }
        }
        self.writes(sent);
    }

    fn writes(&mut self, sent: &Sent) {
        self.put(sent.txn.writes.len());
        for write in &sent.txn.writes {
            match write {
                Write::Put { key, value } => self.put((0_u8, key, value)),
                Write::Delete { key } => self.put((1_u8, key)),
            }
        }
    }
}
