//! What of a state matters: two states that agree in it behave alike for ever.
//!
//! The store counts everything that was ever written. All that is ever asked of a revision is whether it is another one,
//! or a later one; so the revisions that anybody still knows are numbered anew, in their order.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

use polder_ipam::store::{Compare, Entry, Txn, Update, Write};

use super::cluster::Cluster;
use super::machine::{Errand, Goal, Machine, Sent, Stage};
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
        let Self { left, tick, warm, removed, broken, .. } = self;
        (left, tick, warm, removed, broken).hash(projection.state);
    }
}

/// The revisions that anybody still knows, in order. The first is that of what is not there.
struct Ranks(Vec<i64>);

impl Ranks {
    fn of(cluster: &Cluster) -> Self {
        let mut known = vec![0];
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
            for errand in agent.errands() {
                match &errand.stage {
                    Stage::UnderWay(sent) => add_txn(&mut known, &sent.txn),
                    Stage::Won(revision) => known.push(*revision),
                    Stage::Ready | Stage::Unknown(_) => {}
                }
            }
        }
        known.sort_unstable();
        known.dedup();
        Self(known)
    }

    fn rank(&self, revision: i64) -> usize {
        self.0.binary_search(&revision).unwrap_or_else(|place| place)
    }
}

fn add_txn(known: &mut Vec<i64>, txn: &Txn) {
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
        let Machine { id, kernel: _, name: _, power, boots, booted, lives, ipam, plugged, containers, agent } =
            machine;
        self.put((id, power, boots, booted, lives, ipam, plugged, containers));
        let is_double = std::mem::discriminant(&agent.double);
        self.put(agent.learned);
        self.put((
            is_double,
            &agent.adopted,
            agent.service,
            agent.unclaimable,
            &agent.quarantine,
            agent.cautious,
            agent.losses,
        ));
        self.watcher(&agent.watcher);
        for errand in [&agent.registrar, &agent.adding] {
            self.put(errand.is_some());
            errand.iter().for_each(|errand| self.errand(errand));
        }
    }

    fn watcher(&mut self, watcher: &Watcher) {
        self.put((watcher.view.source as u8, watcher.view.losses));
        if watcher.is_current() {
            // It shows what the store holds.
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

    fn errand(&mut self, errand: &Errand) {
        match &errand.goal {
            // What it rests on is in the transaction, as long as that is under way.
            Goal::Write(change) => self.put((0_u8, change.to_string())),
            Goal::Claim { lost, attempt } => self.put((1_u8, lost, attempt)),
            Goal::HandOver { container, address } => self.put((2_u8, container, address)),
        }
        match &errand.stage {
            Stage::Ready => self.put(0_u8),
            Stage::UnderWay(sent) => {
                self.put(1_u8);
                self.sent(sent);
            }
            Stage::Unknown(doubt) => self.put((2_u8, &doubt.trace().key, &doubt.trace().value)),
            Stage::Won(revision) => {
                let rank = self.ranks.rank(*revision);
                self.put((3_u8, rank));
            }
        }
    }

    fn sent(&mut self, sent: &Sent) {
        self.put((&sent.by, sent.confirms, sent.txn.compares.len(), sent.txn.writes.len()));
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
        for write in &sent.txn.writes {
            match write {
                Write::Put { key, value } => self.put((0_u8, key, value)),
                Write::Delete { key } => self.put((1_u8, key)),
            }
        }
    }
}
