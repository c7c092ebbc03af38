//! After faults, a watcher's data equals the store's.

use std::collections::BTreeMap;

use polder_ipam::Revision;
use polder_ipam::store::{Entry, Txn, Write};

use super::*;
use crate::Random;

/// The data of a reader that applies each update.
#[derive(Debug, Default)]
struct Copy {
    entries: BTreeMap<String, Entry>,
    lost: bool,
}

impl Copy {
    fn apply(&mut self, update: Update) {
        self.lost = matches!(update, Update::Lost { .. });
        match update {
            Update::Loaded(contents) => {
                self.entries = contents.entries.into_iter().map(|entry| (entry.key.clone(), entry)).collect();
            }
            Update::Changed { changes, .. } => {
                for change in changes {
                    match change.entry {
                        Some(entry) => drop(self.entries.insert(change.key, entry)),
                        None => drop(self.entries.remove(&change.key)),
                    }
                }
            }
            Update::Lost { .. } | Update::Back { .. } => {}
        }
    }
}

fn write(etcd: &mut Model, write: Write) {
    etcd.commit(&Txn { compares: Vec::new(), writes: vec![write] }).unwrap();
}

fn put(etcd: &mut Model, key: &str) {
    write(etcd, Write::Put { key: key.to_owned(), value: Vec::new() });
}

fn delete(etcd: &mut Model, key: &str) {
    write(etcd, Write::Delete { key: key.to_owned() });
}

fn watcher() -> Watcher {
    Watcher::new(Range::prefix("b".to_owned()))
}

/// The kind of each update, in one word.
fn words(updates: &[Update]) -> Vec<&'static str> {
    updates
        .iter()
        .map(|update| match update {
            Update::Loaded(_) => "loaded",
            Update::Changed { .. } => "changed",
            Update::Lost { .. } => "lost",
            Update::Back { .. } => "back",
        })
        .collect()
}

fn polls<const N: usize>(watcher: &mut Watcher, etcd: &Model) -> [Vec<&'static str>; N] {
    [(); N].map(|()| words(&watcher.poll(etcd)))
}

#[test]
fn a_reopened_watch_resumes_after_the_last_change() {
    let (mut etcd, mut watcher) = (Model::new(), watcher());
    put(&mut etcd, "b1");
    assert_eq!(polls(&mut watcher, &etcd), [vec!["loaded"], vec![]]);
    put(&mut etcd, "b2");
    watcher.disconnect();
    assert_eq!(polls(&mut watcher, &etcd), [vec!["lost"], vec![], vec!["back", "changed"]]);
    watcher.disconnect();
    assert_eq!(polls(&mut watcher, &etcd), [vec!["lost"], vec![], vec!["back"]]);
}

#[test]
fn a_compacted_history_causes_a_reload() {
    let (mut etcd, mut watcher) = (Model::new(), watcher());
    put(&mut etcd, "b1");
    polls::<2>(&mut watcher, &etcd);
    watcher.cut();
    (0..3).for_each(|_| put(&mut etcd, "b2"));
    etcd.compact(Revision::new(5)).unwrap();
    assert_eq!(polls(&mut watcher, &etcd), [["lost"], ["lost"]]);
    watcher.restore();
    assert_eq!(polls(&mut watcher, &etcd), [vec![], vec!["back", "lost"], vec!["loaded"]]);
}

#[test]
fn a_deletion_at_the_revision_of_a_compaction_is_not_missed() {
    let (mut etcd, mut watcher) = (Model::new(), watcher());
    put(&mut etcd, "b1");
    put(&mut etcd, "b2");
    polls::<2>(&mut watcher, &etcd);
    watcher.disconnect();
    delete(&mut etcd, "b1");
    etcd.compact(Revision::new(4)).unwrap();
    assert_eq!(polls(&mut watcher, &etcd), [vec!["lost"], vec![], vec!["back", "lost"], vec!["loaded"]]);
}

#[test]
fn delayed_changes_arrive_late() {
    let (mut etcd, mut watcher) = (Model::new(), watcher());
    polls::<2>(&mut watcher, &etcd);
    watcher.delay();
    put(&mut etcd, "b1");
    assert_eq!(polls(&mut watcher, &etcd), [[""; 0]]);
    put(&mut etcd, "b2");
    etcd.compact(Revision::new(3)).unwrap();
    watcher.restore();
    assert_eq!(polls(&mut watcher, &etcd), [["changed", "changed"]]);
}

#[test]
fn a_replaced_datastore_is_reloaded() {
    let (mut etcd, mut watcher) = (Model::new(), watcher());
    put(&mut etcd, "b1");
    let backup = etcd.clone();
    put(&mut etcd, "b2");
    polls::<2>(&mut watcher, &etcd);
    etcd.restore(&backup);
    assert_eq!(polls(&mut watcher, &etcd), [["lost"], ["lost"], ["loaded"]]);
    etcd.empty();
    assert_eq!(polls(&mut watcher, &etcd), [["lost"], ["lost"], ["loaded"]]);
}

/// One random step: a change, a fault, or a poll.
fn step(random: &mut Random, etcd: &mut Model, watcher: &mut Watcher, copy: &mut Copy) {
    let key = *random.one_of(&["a", "b1", "b2", "b3"]);
    match random.below(12) {
        0..3 => put(etcd, key),
        3 => delete(etcd, key),
        4 => watcher.disconnect(),
        5 => watcher.cut(),
        6 => watcher.delay(),
        7 => watcher.repeat(etcd, 3),
        8 => watcher.restore(),
        9 => drop(etcd.compact(Revision::new(etcd.revision().number() - i64::from(random.once_in(2))))),
        10 => watcher.send(etcd),
        _ => watcher.poll(etcd).into_iter().for_each(|update| copy.apply(update)),
    }
}

#[test]
fn a_watcher_without_faults_has_the_current_state_in_the_end() {
    for seed in 0..3000 {
        let mut random = Random::new(seed);
        let (mut etcd, mut watcher, mut copy) = (Model::new(), watcher(), Copy::default());
        for _ in 0..40 {
            step(&mut random, &mut etcd, &mut watcher, &mut copy);
        }
        watcher.restore();
        for _ in 0..6 {
            watcher.poll(&etcd).into_iter().for_each(|update| copy.apply(update));
        }
        let known: Vec<Entry> = copy.entries.into_values().collect();
        assert_eq!(known, etcd.range(watcher.range()).entries, "seed {seed}");
        assert!(!copy.lost, "seed {seed}");
    }
}
