//! Tells the store who has which address, and that the node is alive.

use std::collections::BTreeMap;

use polder_ipam::key::Key;
use polder_ipam::record::{AddressRecord, Alive, Life, encode};
use polder_ipam::store::{Compare, LARGEST_TXN, Outcome, StoreError, Txn, Write};
use polder_ipam::view::Source;

use super::Hand;
use crate::etcd::{Condition, Operation};
use crate::world::no_answer;

/// Before another attempt.
const RETRY_MS: u64 = 5_000;

/// A node whose agent has not been heard for this long is not alive.
const ALIVE_SECONDS: u64 = 10;

/// The revision of the node's own record in the store; 0 if it is not there, or not this node's.
fn own_revision(hand: &Hand) -> i64 {
    hand.with(|world| {
        let machine = &world.machines[hand.machine];
        let agent = machine.agent.as_ref().expect("a task of an agent ends with it");
        let identity = agent.ipam.identity().ok().flatten();
        let own = agent.view.nodes.get(&machine.name).filter(|own| {
            identity.is_some_and(|identity| identity.incarnation == own.record.incarnation)
                && Life::from(&*own.record) == machine.life()
        });
        own.filter(|_| agent.view.source == Source::Store).map_or(0, |own| own.revision)
    })
}

/// Keeps the lease of a node that is in its cluster.
pub async fn stay_alive(hand: Hand) {
    loop {
        let revision = own_revision(&hand);
        if revision != 0 {
            renew(&hand, revision);
        }
        hand.sleep(ALIVE_SECONDS * 1_000 / 3).await;
    }
}

fn renew(hand: &Hand, revision: i64) {
    hand.with(|world| {
        let machine = &world.machines[hand.machine];
        if machine.is_cut {
            return;
        }
        let lease = i64::try_from(hand.epoch).unwrap_or(1);
        // Who may read only keeps a lease, and puts nothing under a new one.
        if world.etcd.keep_alive(lease).is_none() && !machine.reads_only {
            let put = Operation::Put {
                key: Key::Alive(machine.name.clone()).to_string(),
                value: encode(&Alive {
                    boot_id: machine.boot_id.clone(),
                    machine_id: machine.machine_id.clone(),
                }),
                lease: Some(lease),
            };
            let node = Key::Node(machine.name.clone()).to_string();
            let _ = world.etcd.grant(lease, ALIVE_SECONDS);
            let unchanged = Condition::from(&Compare::Unchanged { key: node, revision });
            let _ = world.etcd.transact(&[unchanged], &[put]);
        }
    });
}

/// Makes the store say what the ledger says, again and again. Begins anew whenever the node's own record was
/// written, or the store has lost records.
pub async fn run(hand: Hand) {
    let mut published = None;
    let mut known = (0, 0);
    loop {
        hand.sleep(1_000).await;
        let now = (own_revision(&hand), hand.view().losses);
        if now != known {
            known = now;
            published = None;
        }
        let (revision, _) = known;
        let wanted = wanted(&hand);
        if published.as_ref() != Some(&wanted) && revision != 0 {
            published = synchronize(&hand, revision, published.take(), wanted).await.ok();
            if published.is_none() {
                hand.sleep(RETRY_MS).await;
            }
        }
    }
}

type Records = BTreeMap<String, Vec<u8>>;

async fn synchronize(
    hand: &Hand,
    revision: i64,
    published: Option<Records>,
    wanted: Records,
) -> Result<Records, StoreError> {
    let name = hand.with(|world| world.machines[hand.machine].name.clone());
    let published = match published {
        Some(published) => published,
        None => {
            let contents = hand.range(Key::addresses_of(&name)).await?;
            contents.entries.into_iter().map(|entry| (entry.key, entry.value)).collect()
        }
    };
    let puts = wanted.iter().filter(|(key, value)| published.get(*key) != Some(value));
    let puts = puts.map(|(key, value)| Write::Put { key: key.clone(), value: value.clone() });
    let deletes = published.keys().filter(|key| !wanted.contains_key(*key));
    let writes: Vec<Write> =
        deletes.map(|key| Write::Delete { key: key.clone() }).chain(puts).take(LARGEST_TXN).collect();
    if writes.is_empty() {
        return Ok(wanted);
    }
    let unchanged = Compare::Unchanged { key: Key::Node(name).to_string(), revision };
    match hand.commit(&Txn { compares: vec![unchanged], writes }).await? {
        Outcome::Applied { .. } => Ok(wanted),
        Outcome::Refused => Err(no_answer()),
    }
}

fn wanted(hand: &Hand) -> Records {
    let name = hand.with(|world| world.machines[hand.machine].name.clone());
    hand.ipam(|ipam, _| {
        let all = ipam.attachments().flat_map(|held| {
            let value = encode(&AddressRecord { attachment: held.attachment.clone(), pod: held.pod.clone() });
            let key = |address: &std::net::IpAddr| Key::Address(name.clone(), *address).to_string();
            held.addresses.iter().map(move |address| (key(address), value.clone())).collect::<Vec<_>>()
        });
        all.collect()
    })
}
