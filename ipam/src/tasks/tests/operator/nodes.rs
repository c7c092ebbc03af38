//! Nodes that operators remove, and machines that replace others.

use polder_api::message::{Refusal, RefusalKind, Removal, Reply};

use super::super::fake::*;
use super::super::*;
use crate::departure::{AgentState, Departed, Departure, ShutDown};
use crate::ids::{BootId, Incarnation, NodeUid};
use crate::key::Key;
use crate::record::{FenceRecord, NodeRecord, PodsGone, encode};
use crate::store::StoreError;
use crate::store::refusal::RefusalCause;
use crate::tasks::operator::{
    Adoption, DepartedNotRemoved, adopt, allow_removal, remove_departed, remove_node,
};

fn removal(dead: bool) -> Removal {
    Removal { node: me().name, dead, disconnect_pods: None, earlier: false }
}

fn remove(fake: &Fake, dead: bool) -> Result<String, Refusal> {
    at_once(remove_node(fake, fake, removal(dead)))
}

fn fences(fake: &Fake) -> Vec<PodsGone> {
    fake.records(|key, value| match key {
        Key::Fence(..) => Some(serde_json::from_slice::<FenceRecord>(value).unwrap().pods),
        _ => None,
    })
}

fn is_member(fake: &Fake) -> bool {
    fake.with(|state| state.entries.contains_key(&Key::Node(me().name).to_string()))
}

/// Changes the node's record in the datastore.
fn rewrite(state: &mut State, change: impl FnOnce(&mut NodeRecord)) {
    let key = Key::Node(me().name).to_string();
    let mut record: NodeRecord = serde_json::from_slice(&state.entries[&key].value).unwrap();
    change(&mut record);
    state.revision = state.revision.next();
    state.put(&key, encode(&record));
}

#[test]
fn a_node_is_removed_although_its_record_changes_meanwhile() {
    for (dead, pods) in [(false, PodsGone::Unknown), (true, PodsGone::ConfirmedByOperator)] {
        let (fake, _) = registered();
        let written = |state: &mut State| rewrite(state, |record| record.mtu = 1400);
        fake.with(|state| state.fates.push_back(Fate::After(Box::new(written))));
        let message = remove(&fake, dead).unwrap();
        assert!(message.contains("node n1 is removed"), "{message}");
        assert_eq!((is_member(&fake), fences(&fake)), (false, vec![pods]));
    }
}

/// The decision that the node has left Kubernetes, for the record that it has now.
fn departed(fake: &Fake, proof: Option<ShutDown>) -> Departed {
    fake.with(|state| rewrite(state, |record| record.kubernetes_uid = Some(NodeUid::new("uid"))));
    fake.with(State::load);
    let view = fake.view();
    let record = &view.nodes[&me().name].record;
    Departed {
        node: me().name,
        incarnation: record.incarnation.clone(),
        boot_id: record.boot_id.clone(),
        uid: NodeUid::new("uid"),
        departure: Departure::Deleted,
        agent: AgentState::NotAlive,
        proof,
    }
}

fn remove_one(fake: &Fake, departed: &Departed) -> Result<String, DepartedNotRemoved> {
    at_once(remove_departed(fake, fake, departed))
}

#[test]
fn a_node_that_has_left_kubernetes_is_removed_as_dead_only_with_proof() {
    for (proof, pods) in
        [(None, PodsGone::Unknown), (Some(ShutDown::OutOfService), PodsGone::ConfirmedByOperator)]
    {
        let (fake, _) = registered();
        let departed = departed(&fake, proof);
        let message = remove_one(&fake, &departed).unwrap();
        assert!(message.contains("node n1 is removed"), "{message}");
        assert_eq!((is_member(&fake), fences(&fake)), (false, vec![pods]));
    }
}

#[test]
fn a_node_whose_agent_is_alive_again_is_not_removed_although_it_has_left_kubernetes() {
    let (fake, _) = registered();
    let departed = departed(&fake, Some(ShutDown::CloudProvider));
    let lease = Key::Lease(me().name).to_string();
    fake.with(|state| state.put(&lease, b"{}".to_vec()));
    let refused = remove_one(&fake, &departed).unwrap_err();
    assert!(matches!(refused, DepartedNotRemoved::Changed(_)), "{refused}");
    assert_eq!((is_member(&fake), fences(&fake)), (true, Vec::new()));
}

#[test]
fn a_node_that_was_replaced_or_rebooted_since_the_decision_is_not_removed() {
    let changes: [fn(&mut NodeRecord); 3] = [
        |record| record.incarnation = Incarnation::new("another"),
        |record| record.boot_id = BootId::new("b2"),
        |record| record.kubernetes_uid = Some(NodeUid::new("another")),
    ];
    for change in changes {
        // Before the decision is carried out, and between its last read and its write.
        for meanwhile in [false, true] {
            let (fake, _) = registered();
            let departed = departed(&fake, Some(ShutDown::CloudProvider));
            let rewritten = move |state: &mut State| rewrite(state, change);
            if meanwhile {
                fake.with(|state| state.fates.push_back(Fate::After(Box::new(rewritten))));
            } else {
                fake.with(rewritten);
                fake.with(State::load);
            }
            let refused = remove_one(&fake, &departed).unwrap_err();
            assert!(matches!(refused, DepartedNotRemoved::Changed(_)), "{refused}");
            assert_eq!((is_member(&fake), fences(&fake)), (true, Vec::new()));
        }
    }
}

#[test]
fn a_removal_does_not_apply_to_a_machine_that_replaces_the_node_meanwhile() {
    type Becomes = fn(&mut NodeRecord);
    let becomes: [Becomes; 2] = [
        |record| record.incarnation = Incarnation::new("another"),
        |record| record.boot_id = BootId::new("b2"),
    ];
    for change in becomes {
        let (fake, _) = registered();
        fake.with(|state| state.fates.push_back(Fate::After(Box::new(move |state| rewrite(state, change)))));
        let refused = remove(&fake, true).unwrap_err();
        assert!(refused.message.contains("since its removal began"), "{refused}");
        assert_eq!((is_member(&fake), fences(&fake)), (true, Vec::new()));
    }
    // The confirmation does not apply either to a machine that comes after the removal of the node that was meant.
    let (fake, _) = registered();
    let node = fake.with(|state| state.entries[&Key::Node(me().name).to_string()].clone());
    remove(&fake, false).unwrap();
    fake.with(State::load);
    let confirmed = move |state: &mut State| {
        let fence =
            state.entries.values().find(|entry| matches!(entry.key.parse(), Ok(Key::Fence(..)))).unwrap();
        let (key, record) = (fence.key.clone(), serde_json::from_slice::<FenceRecord>(&fence.value).unwrap());
        state.revision = state.revision.next();
        state.put(&key, encode(&FenceRecord { pods: PodsGone::Confirmed, ..record }));
        state.put(&node.key, node.value);
        rewrite(state, |record| record.incarnation = Incarnation::new("another"));
    };
    fake.with(|state| state.fates.push_back(Fate::After(Box::new(confirmed))));
    let refused = remove(&fake, true).unwrap_err();
    assert!(refused.message.contains("since its removal began"), "{refused}");
    assert_eq!((is_member(&fake), fences(&fake)), (true, vec![PodsGone::Confirmed]));
}

#[test]
fn a_stale_view_does_not_report_a_returned_node_as_removed() {
    let (fake, _) = registered();
    let node = fake.with(|state| state.entries[&Key::Node(me().name).to_string()].clone());
    remove(&fake, true).unwrap();
    fake.with(State::load);
    assert!(remove(&fake, true).unwrap().contains("node n1 is removed"));
    fake.with(|state| {
        state.put(&node.key, node.value);
        rewrite(state, |record| record.incarnation = Incarnation::new("another"));
    });
    let refused = remove(&fake, true).unwrap_err();
    assert!(refused.message.contains("since its removal began"), "{refused}");
    assert!(is_member(&fake));
}

#[test]
fn an_unanswered_removal_is_not_repeated_but_an_applied_one_is_detected() {
    let (fake, _) = registered();
    fake.with(|state| state.fates.push_back(Fate::Lost));
    let unknown = remove(&fake, false).unwrap_err();
    assert!(unknown.message.contains("It is unknown whether node n1 was removed"), "{unknown}");
    assert!(is_member(&fake) && fake.with(|state| state.fates.is_empty()));
    fake.with(|state| state.fates.push_back(Fate::Refused(RefusalCause::NoSpace)));
    let refused = remove(&fake, false).unwrap_err();
    assert!(refused.message.contains("node n1 was not removed"), "{refused}");
    fake.with(|state| state.fates.push_back(Fate::MadeAndRefused(RefusalCause::NoSpace)));
    assert!(remove(&fake, false).unwrap().contains("node n1 is removed"));
}

#[test]
fn no_node_is_removed_or_adopted_while_the_datastore_is_unreachable() {
    let (fake, _) = registered();
    let away = StoreError::NoAnswer { store: "etcd".to_owned(), reason: "it is away".to_owned() };
    fake.with(|state| Arc::make_mut(&mut state.view).lost = Some(away.into()));
    let refused = remove(&fake, true).unwrap_err();
    assert_eq!(
        (refused.kind, refused.message.as_str()),
        (RefusalKind::TryAgain, "a fake: etcd does not answer: it is away")
    );
    let refused = at_once(adopt(&fake, &me(), &me().name)).unwrap_err();
    assert_eq!(refused.message, "a fake: etcd does not answer: it is away");
}

#[test]
fn removing_the_answering_node_requires_its_pod_count() {
    let (fake, _) = registered();
    let allow = |disconnect_pods| {
        let removal = Removal { disconnect_pods, ..removal(false) };
        at_once(allow_removal(&fake, &me(), &fake, &removal))
    };
    assert_eq!(allow(None), Ok(()));
    fake.with(|state| state.allocate("c1"));
    assert!(matches!(allow(None), Err(Reply::Unconfirmed { pods: 1, .. })));
    assert_eq!(allow(Some(1)), Ok(()));
    // The answering node is alive.
    let dead = at_once(allow_removal(&fake, &me(), &fake, &removal(true)));
    assert!(matches!(dead, Err(Reply::Refused(refusal)) if refusal.message.contains("node n1 is alive")));
}

#[test]
fn a_machine_adopts_only_the_node_of_its_ledger() {
    let (fake, _) = registered();
    let adopted = |me: &OwnNode| at_once(adopt(&fake, me, &me.name));
    assert!(
        matches!(adopted(&me()), Ok(Adoption::AlreadyAdopted(words)) if words.contains("already node n1"))
    );
    let moved = OwnNode { machine_id: MachineId::new("m2"), boot_id: BootId::new("b2"), ..me() };
    let Ok(Adoption::InPlaceOf(other, _)) = adopted(&moved) else { panic!("not adopted") };
    assert_eq!([other.machine_id.to_string(), other.boot_id.to_string()], ["m1", "b1"]);
    let other = at_once(adopt(&fake, &moved, &"n2".parse().unwrap())).unwrap_err();
    assert_eq!(other.kind, RefusalKind::Invalid);
}
