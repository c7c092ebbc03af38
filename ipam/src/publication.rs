//! What a node tells the store of itself: that it is alive, and who has which of its addresses. For people and tools, and never
//! for safety; but only the node that its record names may say it.

use std::collections::{BTreeMap, BTreeSet};

use polder_api::NodeName;
use polder_api::mutant::{self, Mutant};

use crate::key::{Key, Range};
use crate::ledger::{Held, Identity};
use crate::record::{AddressRecord, Alive, Life, encode};
use crate::store::{Compare, Contents, LARGEST_TXN, Txn, Write};
use crate::view::{Source, View};

/// Records of one node by their keys.
pub type Published = BTreeMap<String, Vec<u8>>;

/// The revision of the node's own record in the store; 0 if it is not there, or not this node's. One of another boot
/// or machine is not: a clone has the ledger of its original, and must not seem to be the one that lives before it has
/// asked; and an original in whose place another machine came is not the node any more.
pub fn own_revision(view: &View, me: &NodeName, identity: Option<&Identity>, life: Life<'_>) -> i64 {
    let own = view
        .nodes
        .get(me)
        .filter(|own| identity.is_some_and(|identity| identity.incarnation == own.record.incarnation))
        .filter(|own| mutant::is(Mutant::AnyBootIsOwn) || Life::from(&*own.record) == life);
    own.filter(|_| view.source == Source::Store).map_or(0, |own| own.revision)
}

/// What a node may write only as long as its record is as of that revision: one that was removed or replaced meanwhile must
/// not write any more.
fn unchanged(me: &NodeName, revision: i64) -> Compare {
    Compare::Unchanged { key: Key::Node(me.clone()).to_string(), revision }
}

/// The sign of life of a node in one boot of its machine: its key, what is put there, and what must hold for that. The node's
/// record must be as of that revision.
pub fn sign_of_life(me: &NodeName, life: Life<'_>, revision: i64) -> (Key, Vec<u8>, Compare) {
    let sign = Alive { boot_id: life.boot_id.to_owned(), machine_id: life.machine_id.to_owned() };
    let only_if = if mutant::is(Mutant::SignIgnoresNode) {
        Compare::Empty(Range::single("/".to_owned()))
    } else {
        unchanged(me, revision)
    };
    (Key::Alive(me.clone()), encode(&sign), only_if)
}

/// The nodes of which there is a sign of life.
pub fn living(signs: &Contents) -> BTreeSet<NodeName> {
    let name = |key: &str| match key.parse() {
        Ok(Key::Alive(name)) => Some(name),
        _ => None,
    };
    signs.entries.iter().filter_map(|entry| name(&entry.key)).collect()
}

/// What the store should say of these attachments.
pub fn wanted<'a>(me: &NodeName, attachments: impl Iterator<Item = &'a Held>) -> Published {
    let mut records = Published::new();
    for held in attachments {
        let value = encode(&AddressRecord { attachment: held.attachment.clone(), pod: held.pod.clone() });
        let keys = held.addresses.iter().map(|address| Key::Address(me.clone(), *address).to_string());
        records.extend(keys.map(|key| (key, value.clone())));
    }
    records
}

/// What makes the store say what is wanted, as the node whose record was written at that revision: in as many transactions as it
/// takes.
pub fn publish(me: &NodeName, revision: i64, published: &Published, wanted: &Published) -> Vec<Txn> {
    let puts = wanted.iter().filter(|(key, value)| published.get(*key) != Some(value));
    let puts = puts.map(|(key, value)| Write::Put { key: key.clone(), value: value.clone() });
    let deletes = published.keys().filter(|key| !wanted.contains_key(*key));
    let deletes = deletes.map(|key| Write::Delete { key: key.clone() });
    in_parts(deletes.chain(puts).collect(), &unchanged(me, revision))
}

/// What deletes what the store says of the addresses of a removed node, unless there is another of its name by now: that one
/// looks after them itself.
pub fn forget(node: &NodeName, published: &Contents) -> Vec<Txn> {
    let deletes = published.entries.iter().map(|entry| Write::Delete { key: entry.key.clone() });
    in_parts(deletes.collect(), &Compare::absent(&Key::Node(node.clone())))
}

fn in_parts(writes: Vec<Write>, only_if: &Compare) -> Vec<Txn> {
    let part = |writes: &[Write]| Txn { compares: vec![only_if.clone()], writes: writes.to_vec() };
    writes.chunks(LARGEST_TXN).map(part).collect()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use polder_api::Mac;

    use super::*;
    use crate::ids::{ClusterId, Incarnation};
    use crate::ledger::Standing;
    use crate::record::NodeRecord;
    use crate::store::Entry;
    use crate::view::Known;

    const LIFE: Life<'static> = Life { machine_id: "m1", boot_id: "b1" };

    fn me() -> NodeName {
        "n1".parse().unwrap()
    }

    fn identity(incarnation: &str) -> Identity {
        Identity {
            node: me(),
            cluster: ClusterId("c".to_owned()),
            incarnation: Incarnation(incarnation.to_owned()),
            standing: Standing::Member,
        }
    }

    fn view() -> View {
        let record = NodeRecord {
            incarnation: Incarnation("i1".to_owned()),
            machine_id: LIFE.machine_id.to_owned(),
            boot_id: LIFE.boot_id.to_owned(),
            underlay: Vec::new(),
            gateways: Vec::new(),
            probes: Vec::new(),
            vtep_mac: Mac([2; 6]),
            mtu: 1450,
            version: String::new(),
        };
        let mut view = View::default();
        view.source = Source::Store;
        view.nodes.insert(me(), Known { record: Arc::new(record), revision: 7 });
        view
    }

    #[test]
    fn the_own_record_counts_only_in_its_incarnation_boot_and_machine_and_from_the_store() {
        let ours = identity("i1");
        assert_eq!(own_revision(&view(), &me(), Some(&ours), LIFE), 7);
        let later = Life { boot_id: "b2", ..LIFE };
        let elsewhere = Life { machine_id: "m2", ..LIFE };
        for life in [later, elsewhere] {
            assert_eq!(own_revision(&view(), &me(), Some(&ours), life), 0);
        }
        assert_eq!(own_revision(&view(), &me(), Some(&identity("i2")), LIFE), 0);
        assert_eq!(own_revision(&view(), &me(), None, LIFE), 0);
        let mut remembered = view();
        remembered.source = Source::Snapshot;
        assert_eq!(own_revision(&remembered, &me(), Some(&ours), LIFE), 0);
    }

    #[test]
    fn what_changed_is_published_in_parts_that_each_rest_on_the_own_record() {
        let record = |number: usize| (format!("/polder/v1/addresses/n1/{number}"), vec![1]);
        let published: Published = (0..2).map(record).collect();
        let wanted: Published = (1..2 + LARGEST_TXN).map(record).collect();
        let txns = publish(&me(), 7, &published, &wanted);
        assert_eq!(txns.iter().map(|txn| txn.writes.len()).collect::<Vec<_>>(), [LARGEST_TXN, 1]);
        assert!(matches!(&txns[0].writes[0], Write::Delete { key } if key.ends_with("/0")));
        assert!(txns.iter().all(|txn| txn.compares == [unchanged(&me(), 7)]));
        assert_eq!(publish(&me(), 7, &wanted, &wanted), []);
    }

    #[test]
    fn a_sign_of_life_is_put_only_while_the_own_record_is_as_it_was() {
        let (key, value, only_if) = sign_of_life(&me(), LIFE, 7);
        assert_eq!((key, only_if), (Key::Alive(me()), unchanged(&me(), 7)));
        let alive: Alive = serde_json::from_slice(&value).unwrap();
        assert_eq!(Life::from(&alive), LIFE);
    }

    #[test]
    fn who_is_alive_is_read_off_the_keys_and_what_is_no_such_key_is_nobody() {
        let entry = |key: &str| Entry { key: key.to_owned(), value: Vec::new(), revision: 1 };
        let entries = vec![entry(&Key::Alive(me()).to_string()), entry("/polder/v1/alive/"), entry("/else")];
        assert_eq!(living(&Contents { revision: 1, entries }), [me()].into());
    }
}
