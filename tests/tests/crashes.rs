//! A plugin is killed after each of its system calls: nothing is lost, nothing remains, and the next call works. One
//! version is enough because all make the same system calls: only the text that is read and printed differs.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use std::path::{Path, PathBuf};

use polder_api::AddMark;
use polder_tests::agent::{Worker, dist};
use polder_tests::steps::{End, kill_after};
use polder_tests::wait::TIMEOUT;
use polder_tests::{Lab, Topology, wait};

/// More system calls than a plugin makes.
const ENOUGH: usize = 2000;

fn lab() -> Lab {
    let mut lab = Lab::build(Topology::one_segment(1));
    lab.workers[0].configure_also("ipam.grace_seconds = 1");
    lab.start_agents();
    lab
}

/// Runs the plugin for a container, and kills it after `after` system calls.
fn killed(worker: &Worker, verb: &str, container: &str, after: usize) -> End {
    let input: PathBuf = worker.node.folder().join("netconf.json");
    std::fs::write(&input, Worker::netconf("1.1.0").to_string()).unwrap();
    let mut command = worker.node.command("env");
    command.arg("-i").args([
        format!("CNI_COMMAND={verb}"),
        format!("CNI_CONTAINERID={container}"),
        format!("CNI_NETNS=/run/netns/{container}"),
        "CNI_IFNAME=eth0".to_owned(),
    ]);
    kill_after(after, command.arg(dist().join("polder")), &input)
}

fn call(worker: &Worker, verb: &str, container: &str) {
    let outcome = worker.cni(verb, container, &format!("/run/netns/{container}"), &Worker::netconf("1.1.0"));
    assert!(outcome.is_ok(), "{verb} of {container}: {outcome:?}");
}

/// Waits until nothing of any pod is left in the kernel, the ledger and etcd.
fn assert_nothing_left(lab: &Lab, context: &str) {
    let worker = &lab.workers[0];
    // The kernel may still be deleting more than a hundred network namespaces.
    wait::within(TIMEOUT * 3, &format!("nothing to be left {context}"), || {
        let (status, links) = (worker.try_status()?, worker.node.run("ip", &["-o", "link"]));
        let used: u64 =
            status["blocks"].as_array().unwrap().iter().map(|block| block["used"].as_u64().unwrap()).sum();
        let keys = lab.etcd.keys("/polder/v1/addresses/");
        let nothing = status["pods"] == 0 && used == 1 && !links.contains("pld") && keys.is_empty();
        if nothing { Ok(()) } else { Err(format!("{used} used, {keys:?}, {links}")) }
    });
}

/// Kills an ADD, or a DEL after a complete ADD, after each of its system calls, each time for another container. Calls
/// `then` after each with the number of system calls and the container's name. Returns the names.
fn after_each_call(worker: &Worker, verb: &str, round: &str, then: impl Fn(usize, &str)) -> Vec<String> {
    let mut names = Vec::new();
    for after in 1..ENOUGH {
        let name = format!("{round}{after}");
        worker.namespace(&name);
        if verb == "DEL" {
            call(worker, "ADD", &name);
        }
        let end = killed(worker, verb, &name, after);
        then(after, &name);
        names.push(name);
        if end == End::Ended {
            println!("{verb} was killed after each of {} system calls", after - 1);
            break;
        }
    }
    assert!(
        names.len() > 20 && names.len() < ENOUGH - 1,
        "{} system calls are not those of {verb}",
        names.len()
    );
    names
}

/// ADD and DEL must succeed for containers that have left nothing.
fn add_and_del(worker: &Worker, names: &[String]) {
    for name in names {
        worker.namespace(name);
        call(worker, "ADD", name);
    }
    assert_eq!(worker.status()["pods"], names.len());
    for name in names {
        call(worker, "DEL", name);
        worker.node.run("ip", &["netns", "delete", name]);
    }
}

#[test]
fn an_add_is_refused_and_undone_while_another_process_creates_the_interface() {
    let lab = lab();
    let worker = &lab.workers[0];
    let netns = worker.namespace("a");
    let socket = worker.node.path_on_host(Path::new("/run/polder/agent.sock"));
    let mark = AddMark::set(&socket, &"polder/a/eth0".parse().unwrap()).unwrap();
    let add = || worker.cni("ADD", "a", &netns, &Worker::netconf("1.1.0"));
    let error = add().unwrap_err();
    assert!(error["code"] == 11 && error.to_string().contains("another process"), "{error}");
    assert_nothing_left(&lab, "an ADD that is refused");
    drop(mark);
    add().unwrap();
}

#[test]
fn an_add_that_is_killed_after_any_system_call_is_undone_by_its_del() {
    let lab = lab();
    let worker = &lab.workers[0];
    after_each_call(worker, "ADD", "k", |after, name| {
        call(worker, "DEL", name);
        let links = worker.node.run("ip", &["-o", "link"]);
        assert!(!links.contains("pld"), "after system call {after}: {links}");
        assert_eq!(worker.status()["pods"], 0, "after system call {after}");
        // The same attachment again, from the start.
        call(worker, "ADD", name);
        call(worker, "DEL", name);
        worker.node.run("ip", &["netns", "delete", name]);
    });
    assert_nothing_left(&lab, "after the last DEL");
}

#[test]
fn leftovers_of_a_killed_add_are_deleted_with_the_pod_or_at_a_reboot() {
    let mut lab = lab();
    for (round, reboots) in [("gone", false), ("boot", true)] {
        let names = after_each_call(&lab.workers[0], "ADD", round, |_, _| ());
        let in_use = lab.workers[0].node.shell("ip neigh show dev polder0 nud permanent");
        let mut addresses: Vec<&str> = in_use.lines().filter_map(|line| line.split(' ').next()).collect();
        addresses.sort_unstable();
        assert!(addresses.windows(2).all(|pair| pair[0] != pair[1]), "an address is used twice: {in_use}");
        if reboots {
            lab.reboot(0);
            lab.workers[0].start_and_wait();
        } else {
            names.iter().for_each(|name| drop(lab.workers[0].node.run("ip", &["netns", "delete", name])));
        }
        assert_nothing_left(&lab, if reboots { "after a reboot" } else { "after the pods' end" });
        add_and_del(&lab.workers[0], &names);
        assert_nothing_left(&lab, "after all was deleted");
    }
}

#[test]
fn a_del_that_is_killed_after_any_system_call_can_be_repeated_or_omitted() {
    let lab = lab();
    let worker = &lab.workers[0];
    after_each_call(worker, "DEL", "k", |after, name| {
        if after % 2 == 0 {
            call(worker, "DEL", name);
            // The same attachment again, from the start.
            call(worker, "ADD", name);
            call(worker, "DEL", name);
        }
        worker.node.run("ip", &["netns", "delete", name]);
    });
    assert_nothing_left(&lab, "after the last one");
}

#[test]
fn a_reboot_completes_a_killed_del() {
    let mut lab = lab();
    let names = after_each_call(&lab.workers[0], "DEL", "k", |_, _| ());
    lab.reboot(0);
    lab.workers[0].start_and_wait();
    assert_nothing_left(&lab, "after the reboot");
    add_and_del(&lab.workers[0], &names);
}
