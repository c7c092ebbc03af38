//! BPF programs on interfaces of the real kernel, in network namespaces of their own. Needs root.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

mod common;

use common::{in_a_new_namespace, run};
use nix::errno::Errno;
use polder_fastpath::{Program, Programs};
use polder_netlink::program::{Attached, Direction, Hooks, Queues, add_hooks, attach, delete_hooks, detach};
use polder_netlink::{IfIndex, RouteSocket};

const BOTH: [Direction; 2] = [Direction::Ingress, Direction::Egress];

/// Runs the test on an interface in a new network namespace.
fn with_interface(test: impl FnOnce(&mut RouteSocket, IfIndex) + Send) {
    in_a_new_namespace(|socket| {
        shell("ip link add pod0 type veth peer name other0; ip link set pod0 up");
        let index = socket.link("pod0").unwrap().unwrap().index;
        test(socket, index);
    });
}

fn shell(commands: &str) -> String {
    run("sh", &["-ec", commands])
}

/// The programs at both places of the interface.
fn attached(socket: &mut RouteSocket, index: IfIndex) -> Vec<Option<Attached>> {
    socket.attached_programs(&BOTH.map(|direction| (index, direction))).unwrap()
}

fn queues(socket: &mut RouteSocket, index: IfIndex) -> Queues {
    socket.queues().unwrap().remove(&index).unwrap_or_default()
}

#[test]
fn a_program_is_attached_replaced_and_detached_in_each_direction() {
    with_interface(|socket, index| {
        let programs = Programs::load().unwrap();
        let expected =
            |program: Program| Some(Attached { program: programs.id(program), name: "ours".to_owned() });
        assert_eq!(attached(socket, index), [None, None], "without clsact");
        socket.execute_all([add_hooks(index), add_hooks(index)]).unwrap();
        assert_eq!(attached(socket, index), [None, None]);
        assert_eq!(queues(socket, index).hooks, Hooks::Clsact);
        for program in [Program::FromPod, Program::FromNode] {
            let descriptor = programs.descriptor(program);
            socket.execute_all([attach(index, Direction::Ingress, descriptor, "ours")]).unwrap();
            assert_eq!(attached(socket, index), [expected(program), None]);
        }
        let descriptor = programs.descriptor(Program::ToPod);
        socket.execute_all([attach(index, Direction::Egress, descriptor, "ours")]).unwrap();
        assert_eq!(attached(socket, index), [expected(Program::FromNode), expected(Program::ToPod)]);
        let shown = shell("tc filter show dev pod0 ingress");
        assert_eq!(shown.matches("ours").count(), 1, "one program, not two: {shown}");
        assert!(shown.contains("pref 65000") && shown.contains("direct-action"), "{shown}");
        socket.execute_all([detach(index, Direction::Ingress)]).unwrap();
        assert_eq!(attached(socket, index), [None, expected(Program::ToPod)]);
        let missing = socket.execute_all([detach(index, Direction::Ingress)]).unwrap_err();
        assert!(missing.is_missing(), "{missing}");
        socket.execute_all([delete_hooks(index)]).unwrap();
        assert_eq!(attached(socket, index), [None, None]);
        let missing = socket.execute_all([delete_hooks(index)]).unwrap_err();
        assert!(missing.is_missing() || missing.errno() == Some(Errno::EINVAL), "{missing}");
    });
}

#[test]
fn a_program_stays_after_the_process_that_loaded_it_has_closed_it() {
    with_interface(|socket, index| {
        let programs = Programs::load().unwrap();
        let id = programs.id(Program::FromPod);
        let descriptor = programs.descriptor(Program::FromPod);
        socket
            .execute_all([add_hooks(index), attach(index, Direction::Ingress, descriptor, "ours")])
            .unwrap();
        drop(programs);
        let found = RouteSocket::open().unwrap().attached_programs(&[(index, Direction::Ingress)]).unwrap();
        assert_eq!(found, [Some(Attached { program: id, name: "ours".to_owned() })]);
    });
}

#[test]
fn an_interface_with_the_discipline_ingress_is_left_as_it_is() {
    with_interface(|socket, index| {
        shell("tc qdisc add dev pod0 ingress");
        assert!(socket.execute_all([add_hooks(index)]).is_err());
        assert_eq!(queues(socket, index).hooks, Hooks::Ingress);
    });
}

#[test]
fn an_interface_has_programs_until_the_last_one_is_detached() {
    with_interface(|socket, index| {
        let programs = Programs::load().unwrap();
        assert!(!socket.has_programs(index).unwrap(), "without clsact");
        let descriptor = programs.descriptor(Program::ToPod);
        socket.execute_all([add_hooks(index)]).unwrap();
        assert!(!socket.has_programs(index).unwrap());
        for direction in BOTH {
            socket.execute_all([attach(index, direction, descriptor, "ours")]).unwrap();
            assert!(socket.has_programs(index).unwrap(), "{direction:?}");
            socket.execute_all([detach(index, direction)]).unwrap();
            assert!(!socket.has_programs(index).unwrap());
        }
    });
}

#[test]
fn a_queue_is_found_that_somebody_has_set() {
    with_interface(|socket, index| {
        assert_eq!((queues(socket, index).root, socket.queue(index).unwrap()), (None, None));
        shell("tc qdisc add dev pod0 root tbf rate 1mbit burst 10kb latency 10ms");
        let tbf = Some("tbf".to_owned());
        assert_eq!((queues(socket, index).root, socket.queue(index).unwrap()), (tbf.clone(), tbf));
    });
}

#[test]
fn a_thousand_places_are_read_in_their_order() {
    with_interface(|socket, index| {
        let programs = Programs::load().unwrap();
        let descriptor = programs.descriptor(Program::FromPod);
        socket
            .execute_all([add_hooks(index), attach(index, Direction::Ingress, descriptor, "ours")])
            .unwrap();
        let missing = IfIndex::new(999_999);
        let places: Vec<_> = (0..1000)
            .map(|number| (if number % 3 == 0 { index } else { missing }, Direction::Ingress))
            .collect();
        let found = socket.attached_programs(&places).unwrap();
        assert_eq!(found.len(), 1000);
        assert!(found.iter().enumerate().all(|(number, found)| found.is_some() == (number % 3 == 0)));
    });
}
