//! Tests of the node identity, for each combination of ledger, machine id and boot id. The record has machine id `m`,
//! boot id `b` and incarnation `i1`.

use super::*;
use crate::Revision;
use crate::ledger::MemberState;

/// A machine that has started as node `n1`.
struct Case {
    ledger: Option<&'static str>,
    machine_id: &'static str,
    boot_id: &'static str,
    proof: Proof,
    adopted: Option<LeaseRecord>,
    double: NameConflict,
    node_object: NodeObjectState,
}

fn case(ledger: Option<&'static str>, machine_id: &'static str, boot_id: &'static str) -> Case {
    Case {
        ledger,
        machine_id,
        boot_id,
        proof: Proof::Machine,
        adopted: None,
        double: NameConflict::None,
        node_object: NodeObjectState::NotUsed,
    }
}

fn alive(machine_id: &str, boot_id: &str) -> LeaseRecord {
    LeaseRecord { machine_id: MachineId::new(machine_id), boot_id: BootId::new(boot_id) }
}

impl Case {
    fn step(&self, view: &View) -> Step {
        let identity = self
            .ledger
            .map(|incarnation| NodeIdentity { incarnation: Incarnation::new(incarnation), ..identity() });
        self.step_of(view, NodeAllocations { identity, ..NodeAllocations::default() })
    }

    fn step_of(&self, view: &View, own: NodeAllocations) -> Step {
        let quarantine = Quarantine::new(DEFAULT_COOL_DOWN);
        next(&MembershipInputs {
            me: &name(),
            boot: Boot { machine_id: &MachineId::new(self.machine_id), boot_id: &BootId::new(self.boot_id) },
            proof: self.proof,
            adopted: self.adopted.as_ref(),
            labels: &Labels::new(),
            view,
            allocations: &own,
            presence: &Ok(NodePresence { node_object: self.node_object.clone(), ..presence() }),
            double: self.double.clone(),
            hold_off: false,
            quarantine: &quarantine,
            unclaimable: &PerFamily::NONE,
            fresh: "i2",
            now: LATE,
        })
    }

    fn takes_over(&self, view: &View) -> bool {
        let step = self.step(view);
        registers(&step) || takes_over(&step)
    }
}

fn fence(incarnation: &str, machine_id: &str, boot_id: &str) -> (Key, Vec<u8>) {
    let record = FenceRecord {
        node: name(),
        machine_id: MachineId::new(machine_id),
        boot_id: BootId::new(boot_id),
        pods: PodsGone::Unknown,
        kubernetes_uid: None,
    };
    (Key::Fence(name(), Incarnation::new(incarnation)), encode(&record))
}

/// A view in which the node is not registered, with additional records.
fn without_node(more: Vec<(Key, Vec<u8>)>) -> View {
    let mut view = view(more);
    view.nodes.clear();
    view
}

fn conflict(step: Step) -> String {
    let Step::Conflict(reason) = step else { panic!("{step:?}") };
    reason.to_string()
}

#[test]
fn a_machine_with_the_ledger_and_one_id_takes_over_unless_another_lives() {
    let view = view(Vec::new());
    for (machine_id, boot_id) in [("m", "b2"), ("m2", "b")] {
        let case = case(Some("i1"), machine_id, boot_id);
        assert!(case.takes_over(&view), "{machine_id} {boot_id}");
        assert_eq!(Case { double: NameConflict::Unchecked, ..case }.step(&view), Step::AskForDouble);
        let case = self::case(Some("i1"), machine_id, boot_id);
        let double = NameConflict::Alive(alive("m", "b"));
        conflict(Case { double, ..case }.step(&view));
    }
    assert!(!case(Some("i1"), "m", "b").takes_over(&view), "it is already that node");
}

#[test]
fn a_machine_with_the_ledger_but_no_matching_id_needs_an_operator() {
    let view = view(Vec::new());
    let stranger = || case(Some("i1"), "m2", "b2");
    let message = conflict(stranger().step(&view));
    assert!(
        message.contains("polderctl node adopt n1") && message.contains("identity = \"ledger\""),
        "{message}"
    );
    let adopted = Case { adopted: Some(alive("m", "b")), ..stranger() };
    assert!(takes_over(&adopted.step(&view)), "its ledger may be an old copy");
    conflict(Case { adopted: Some(alive("m3", "b")), ..stranger() }.step(&view));
    let trusted = Case { proof: Proof::Ledger, ..stranger() };
    assert!(registers(&trusted.step(&view)), "its ledger is never a copy");
    let double = NameConflict::Alive(alive("m", "b"));
    conflict(Case { proof: Proof::Ledger, double, ..stranger() }.step(&view));
}

#[test]
fn a_machine_without_the_ledger_needs_the_machine_id_of_the_node() {
    let view = view(Vec::new());
    let identify = |machine_id, boot_id| match case(None, machine_id, boot_id).step(&view) {
        Step::Identify(identity) => Ok(identity.incarnation.to_string()),
        step => Err(conflict(step)),
    };
    assert_eq!(identify("m", "b"), Ok("i1".to_owned()));
    assert_eq!(identify("m", "b2"), Ok("i1".to_owned()));
    for (machine_id, boot_id) in [("m2", "b"), ("m2", "b2")] {
        let message = identify(machine_id, boot_id).unwrap_err();
        assert!(message.contains("polderctl node remove n1 --dead"), "{message}");
    }
}

#[test]
fn a_fence_is_matched_only_by_the_ledger_and_checked_first() {
    // Another machine has the name by now.
    let view = view(vec![fence("i0", "m0", "b0")]);
    let Step::Identify(removed) = case(Some("i0"), "m0", "b0").step(&view) else { panic!("it is removed") };
    assert_eq!(
        (removed.incarnation.to_string().as_str(), removed.member_state),
        ("i0", MemberState::Removed)
    );
    // A machine without a ledger, with the name and the boot id of the removed one.
    let view = without_node(vec![fence("i1", "m", "b")]);
    let Step::Identify(fresh) = case(None, "m2", "b").step(&view) else { panic!("it joins anew") };
    assert_eq!((fresh.incarnation.to_string().as_str(), fresh.member_state), ("i2", MemberState::Member));
    // If it has addresses but no identity in its ledger, it disconnects its pods first.
    let own = NodeAllocations { gateways: vec!["10.0.0.1".parse().unwrap()], ..NodeAllocations::default() };
    assert_eq!(case(None, "m", "b").step_of(&view, own), Step::CutOff);
}

#[test]
fn a_removed_machine_joins_again_only_with_another_node_object_and_after_its_confirmation() {
    let fence = |pods, uid: Option<&str>| {
        let record = FenceRecord {
            node: name(),
            machine_id: MachineId::new("m"),
            boot_id: BootId::new("b"),
            pods,
            kubernetes_uid: uid.map(NodeUid::new),
        };
        (Key::Fence(name(), Incarnation::new("i1")), encode(&record))
    };
    let joins = |view: &View, node_object| {
        let identity = NodeIdentity { member_state: MemberState::Removed, ..identity() };
        let own = NodeAllocations { identity: Some(identity), ..NodeAllocations::default() };
        match (Case { node_object, ..case(None, "m", "b") }).step_of(view, own) {
            Step::Identify(again) => {
                assert_eq!(
                    (again.incarnation.to_string().as_str(), again.member_state),
                    ("i2", MemberState::Member)
                );
                true
            }
            _ => false,
        }
    };
    let known = |uid: &str| NodeObjectState::Known(NodeUid::new(uid));
    let removed = |pods, uid| without_node(vec![fence(pods, uid)]);
    for pods in [PodsGone::Confirmed, PodsGone::ConfirmedByOperator] {
        assert!(joins(&removed(pods, Some("u1")), known("u2")), "Kubernetes has got it again");
        assert!(!joins(&removed(pods, Some("u1")), known("u1")), "an operator has removed it for good");
        assert!(!joins(&removed(pods, Some("u1")), NodeObjectState::Unknown));
        assert!(!joins(&removed(pods, Some("u1")), NodeObjectState::NotUsed));
        assert!(!joins(&removed(pods, None), known("u2")), "it was not in Kubernetes");
    }
    assert!(!joins(&removed(PodsGone::Unknown, Some("u1")), known("u2")), "it has to confirm first");
    let taken = view(vec![fence(PodsGone::Confirmed, Some("u1"))]);
    assert!(!joins(&taken, known("u2")), "another machine has the name");
}

#[test]
fn only_the_machine_that_was_removed_confirms_that_its_pods_are_gone() {
    let view = without_node(vec![fence("i1", "m", "b")]);
    let removed = || NodeAllocations {
        identity: Some(NodeIdentity { member_state: MemberState::Removed, ..identity() }),
        ..NodeAllocations::default()
    };
    for (machine_id, boot_id, confirms) in
        [("m", "b", true), ("m", "b2", true), ("m2", "b", true), ("m2", "b2", false)]
    {
        let step = case(None, machine_id, boot_id).step_of(&view, removed());
        let is_confirmed =
            matches!(step, Step::Commit(change) if matches!(*change, Change::ConfirmRemoval(_)));
        assert_eq!(is_confirmed, confirms, "{machine_id} {boot_id}");
    }
    let Step::Removed(message) = case(None, "m2", "b2").step_of(&view, removed()) else { panic!("it waits") };
    let message = message.to_string();
    assert!(message.contains("polderctl node remove n1 --dead --earlier"), "{message}");
}

#[test]
fn an_unreadable_lease_counts_as_another_living_machine() {
    let me = alive("m", "b");
    let me = Boot::from(&me);
    let entry = |value: &str| Entry { key: String::new(), value: value.into(), revision: Revision::new(1) };
    assert_eq!(NameConflict::read(None, me), NameConflict::None);
    assert_eq!(
        NameConflict::read(Some(&entry(r#"{"boot_id":"b","machine_id":"m"}"#)), me),
        NameConflict::None
    );
    let other = NameConflict::read(Some(&entry(r#"{"boot_id":"b","machine_id":"m2"}"#)), me);
    assert_eq!(other, NameConflict::Alive(alive("m2", "b")), "on the same kernel");
    assert!(matches!(NameConflict::read(Some(&entry("?")), me), NameConflict::Alive(_)));
}
