//! Small tests of the model's semantics. Other tests compare it with a real etcd.

use super::*;

fn put(key: &str, value: &str) -> Operation {
    Operation::Put { key: key.to_owned(), value: value.into(), lease: None }
}

fn leased(key: &str, lease: LeaseId) -> Operation {
    Operation::Put { key: key.to_owned(), value: Vec::new(), lease: Some(lease) }
}

fn delete(key: &str) -> Operation {
    Operation::Delete(Range::single(key.to_owned()))
}

fn all() -> Range {
    Range { start: "a".to_owned(), end: "z".to_owned() }
}

/// An etcd after these operations, one transaction each.
fn after(operations: &[Operation]) -> Model {
    let mut etcd = Model::new();
    for operation in operations {
        etcd.transact(&[], std::slice::from_ref(operation)).unwrap();
    }
    etcd
}

fn keys(etcd: &Model) -> Vec<(String, i64)> {
    etcd.range(&all()).entries.into_iter().map(|entry| (entry.key, entry.revision.number())).collect()
}

fn messages(watch: &mut Watch, etcd: &Model) -> Vec<(String, i64, bool)> {
    let mut events = Vec::new();
    while let Some(WatchMessage::Opened { .. } | WatchMessage::Events { .. }) = watch.clone().send(etcd) {
        if let Some(WatchMessage::Events { events: more, .. }) = watch.send(etcd) {
            events.extend(more.into_iter().map(|event| (event.key, event.revision, event.put.is_some())));
        }
    }
    events
}

#[test]
fn a_transaction_uses_one_revision_and_none_without_a_change() {
    let mut etcd = after(&[put("a", "1")]);
    let both = [put("b", "1"), delete("a")];
    assert_eq!(etcd.transact(&[], &both), Ok(Outcome::Applied { revision: Revision::new(3) }));
    assert_eq!(keys(&etcd), [("b".to_owned(), 3)]);
    assert_eq!(etcd.transact(&[], &[delete("a")]), Ok(Outcome::Applied { revision: Revision::new(3) }));
    assert_eq!(etcd.transact(&[], &[]), Ok(Outcome::Applied { revision: Revision::new(3) }));
}

#[test]
fn one_key_is_not_written_twice_in_a_transaction() {
    let mut etcd = Model::new();
    for bad in [[put("a", "1"), put("a", "2")], [put("a", "1"), delete("a")], [delete("a"), put("a", "1")]] {
        assert_eq!(etcd.transact(&[], &bad), Err(Error::DuplicateKey));
    }
    assert_eq!(
        etcd.transact(&[], &[delete("a"), delete("a")]),
        Ok(Outcome::Applied { revision: Revision::new(1) })
    );
    let many: Vec<_> = (0..=LARGEST_TXN).map(|number| put(&number.to_string(), "")).collect();
    assert_eq!(etcd.transact(&[], &many), Err(Error::TooManyOperations));
}

#[test]
fn an_earlier_revision_can_be_read_until_it_is_compacted() {
    let mut etcd = after(&[put("a", "1"), put("b", "1"), put("a", "2"), delete("b")]);
    let at = |etcd: &Model, revision| {
        let keys = etcd.range_at(&all(), revision)?;
        Ok(keys.into_iter().map(|key| (key.key, key.version)).collect::<Vec<_>>())
    };
    let both = vec![("a".to_owned(), 2), ("b".to_owned(), 1)];
    assert_eq!(at(&etcd, Revision::new(4)), Ok(both.clone()));
    assert_eq!(at(&etcd, Revision::new(6)), Err(Error::FutureRevision));
    etcd.compact(Revision::new(4)).unwrap();
    assert_eq!(at(&etcd, Revision::new(3)), Err(Error::Compacted));
    assert_eq!(at(&etcd, Revision::new(4)), Ok(both));
    assert_eq!(at(&etcd, Revision::ABSENT), Ok(vec![("a".to_owned(), 2)]));
    assert_eq!(etcd.compact(Revision::new(4)), Err(Error::Compacted));
    assert_eq!(etcd.compact(Revision::new(6)), Err(Error::FutureRevision));
}

#[test]
fn a_watch_sends_past_and_future_changes() {
    let mut etcd = after(&[put("a", "1"), put("b", "1"), delete("a")]);
    let mut watch = etcd.watch(all(), Revision::new(3));
    let deleted = ("a".to_owned(), 4, false);
    assert_eq!(messages(&mut watch, &etcd), [("b".to_owned(), 3, true), deleted.clone()]);
    etcd.transact(&[], &[put("c", "1")]).unwrap();
    assert_eq!(messages(&mut watch, &etcd), [("c".to_owned(), 5, true)]);
    assert_eq!(messages(&mut watch, &etcd), []);
    watch.repeat(&etcd, 2);
    assert_eq!(messages(&mut watch, &etcd), [deleted, ("c".to_owned(), 5, true)]);
}

#[test]
fn a_compaction_ends_only_watches_that_are_behind_it() {
    let mut etcd = after(&[put("a", "1"), put("b", "1")]);
    let (mut behind, mut ahead) = (etcd.watch(all(), Revision::new(2)), etcd.watch(all(), Revision::new(2)));
    messages(&mut ahead, &etcd);
    etcd.compact(Revision::new(3)).unwrap();
    assert_eq!(behind.send(&etcd), Some(WatchMessage::Opened { revision: 3 }));
    assert_eq!(behind.send(&etcd), Some(WatchMessage::Compacted { revision: 3 }));
    assert_eq!(behind.send(&etcd), Some(WatchMessage::Closed));
    assert_eq!(ahead.send(&etcd), None);
}

#[test]
fn an_expired_lease_deletes_all_its_keys_at_one_revision() {
    let mut etcd = Model::new();
    etcd.grant(7, 10).unwrap();
    etcd.grant(8, 5).unwrap();
    assert_eq!(etcd.grant(7, 10), Err(Error::LeaseExists(7)));
    etcd.transact(&[], &[leased("a", 7), leased("b", 7), leased("c", 8), leased("d", 8)]).unwrap();
    // One key moves to the other lease, one to no lease.
    etcd.transact(&[], &[leased("c", 7), put("d", "1")]).unwrap();
    assert_eq!(etcd.advance(9), [8]);
    assert_eq!((etcd.revision().number(), keys(&etcd).len()), (3, 4), "a lease without keys ends unseen");
    assert_eq!((etcd.keep_alive(7), etcd.keep_alive(8)), (Some(10), None));
    assert_eq!(etcd.advance(9), [0; 0]);
    assert_eq!(etcd.advance(1), [7]);
    assert_eq!((etcd.revision().number(), keys(&etcd)), (4, vec![("d".to_owned(), 3)]));
    assert_eq!(etcd.transact(&[], &[leased("a", 7)]), Err(Error::LeaseNotFound(7)));
}

#[test]
fn a_restored_backup_is_the_earlier_state_and_ends_all_watches() {
    let mut etcd = after(&[put("a", "1")]);
    let backup = etcd.clone();
    etcd.transact(&[], &[put("b", "1")]).unwrap();
    let mut watch = etcd.watch(all(), Revision::ABSENT);
    etcd.restore(&backup);
    assert_eq!((etcd.revision().number(), keys(&etcd).len()), (2, 1));
    assert_eq!(watch.send(&etcd), Some(WatchMessage::Closed));
    let mut watch = etcd.watch(all(), Revision::ABSENT);
    etcd.empty();
    assert_eq!((etcd.revision().number(), keys(&etcd).len()), (1, 0));
    assert_eq!(watch.send(&etcd), Some(WatchMessage::Closed));
}
