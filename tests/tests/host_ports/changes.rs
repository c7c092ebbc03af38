//! Host ports while pods, the agent and the rules of nftables come and go.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicUsize, Ordering};

use polder_tests::cni::{WITH_GC, conf};
use polder_tests::probe::{self, ask, asker};
use polder_tests::traces::assert_nothing_left;
use polder_tests::wait::{self, TIMEOUT};
use polder_tests::{Node, Pod};
use serde_json::json;

use super::site::{
    BOTH, HOST_PORT, LOCALHOST, askers, assert_reached, conf_with, dialogue, node_address, one_node,
    outside_address, outsider, pod_with, seen_through, serve, table, wait_for_answers, wait_for_table,
    wait_until_refused, while_clients_begin, while_connecting, while_sending, with_both_attachments,
};

/// Host port and port of the pod of long connections.
const LONG: (u16, u16) = (8090, 7090);

/// Clients that send to the host port and get no answer, because nobody listens.
fn clients_without_answer(host: &Node) -> Vec<UdpSocket> {
    let sockets = askers(host);
    sockets.iter().for_each(|socket| assert!(ask(socket).is_err(), "{socket:?} has an answer of nobody"));
    sockets
}

#[test]
fn a_udp_client_reaches_the_pod_that_has_the_port_now_without_a_new_socket() {
    with_both_attachments(|bootstrap| {
        let lab = one_node(bootstrap);
        let (worker, host) = (&lab.workers[0], outsider(&lab));
        // They send before there is a pod: the node refuses that.
        let mut sockets = clients_without_answer(host);
        let mut pod = while_sending(&sockets, || pod_with(worker, "p0", &BOTH));
        for round in 1..4 {
            // The pod refuses these, as it has no server yet. They send again when another pod has the port.
            let mute = clients_without_answer(host);
            let _echo = serve(&pod);
            wait_for_answers(pod.name(), &sockets);
            sockets.extend(mute);
            pod = while_sending(&sockets, || {
                worker.delete(&pod);
                pod_with(worker, &format!("p{round}"), &BOTH)
            });
        }
        let _echo = serve(&pod);
        wait_for_answers(pod.name(), &sockets);
    });
}

#[test]
fn a_pod_is_replaced_under_traffic_by_another_with_the_same_port() {
    with_both_attachments(|bootstrap| {
        let lab = one_node(bootstrap);
        let (worker, host) = (&lab.workers[0], outsider(&lab));
        let empty = table(worker);
        let mut pod = pod_with(worker, "p0", &BOTH);
        let mut _echo = serve(&pod);
        while_connecting(host, |stage| {
            for round in 1..6 {
                stage.wait_for_connections();
                stage.next();
                worker.delete(&pod);
                wait_until_refused(host, "right after the DEL");
                pod = pod_with(worker, &format!("p{round}"), &BOTH);
                _echo = serve(&pod);
                stage.next();
                for _ in 0..3 {
                    assert_reached(host, "right after the ADD");
                }
            }
        });
        assert_eq!(worker.status()["problems"], json!([]));
        worker.delete(&pod);
        wait_for_table(worker, "without pods", &empty);
    });
}

#[test]
fn host_ports_work_while_the_agent_is_away_and_when_the_next_one_takes_over() {
    with_both_attachments(|bootstrap| {
        let mut lab = one_node(bootstrap);
        let host = lab.etcd.machine(0);
        let pod = pod_with(&lab.workers[0], "a", &[&BOTH[..], &["8090:7090/tcp"]].concat());
        let _echo = serve(&pod);
        let sockets = askers(host);
        wait_for_answers("the pod", &sockets);
        let dialogues = [false, true].map(|v6| dialogue(host, &pod, v6, LONG));
        let worker = &mut lab.workers[0];
        while_connecting(host, |stage| {
            for is_killed in [true, false] {
                let before = table(worker);
                if is_killed {
                    worker.kill();
                } else {
                    assert!(worker.stop());
                }
                assert_reached(host, "without an agent");
                stage.wait_for_connections();
                wait_for_answers("the pod, without an agent", &sockets);
                worker.start_and_wait();
                assert_reached(host, "with the next agent");
                wait_for_answers("the pod, with the next agent", &sockets);
                wait_for_table(worker, "with the next agent", &before);
            }
        });
        dialogues.into_iter().for_each(|dialogue| dialogue.finish().unwrap());
    });
}

#[test]
fn the_port_of_a_pod_that_was_deleted_without_the_agent_is_free_when_the_agent_is_back() {
    with_both_attachments(|bootstrap| {
        let mut lab = one_node(bootstrap);
        let host = lab.etcd.machine(0);
        let worker = &mut lab.workers[0];
        let old = pod_with(worker, "old", &BOTH);
        let echo = serve(&old);
        assert_reached(host, "the old pod");
        worker.kill();
        worker.del("old", old.netns(), &old.later_conf());
        drop(echo);
        worker.start_and_wait();
        wait_until_refused(host, "after the agent has read the tombstone");
        let new = pod_with(worker, "new", &BOTH);
        let _echo = serve(&new);
        assert_reached(host, "the next pod");
        // Late DELs of the old pod, with the agent and without.
        worker.del("old", "", &old.later_conf());
        assert_reached(host, "after another DEL of the old pod");
        worker.kill();
        worker.del("old", "", &old.later_conf());
        assert_reached(host, "after another DEL of the old pod, without the agent");
        worker.start_and_wait();
        assert_reached(host, "after its tombstone was read");
        worker.delete(&new);
        wait_until_refused(host, "after the DEL of the pod with the port");
        assert_nothing_left(&lab, &lab.workers[0]);
    });
}

#[test]
fn a_pod_that_is_gone_without_a_del_keeps_its_port_until_del_or_gc() {
    with_both_attachments(|bootstrap| {
        let lab = one_node(bootstrap);
        let (worker, host) = (&lab.workers[0], outsider(&lab));
        for verb in ["DEL", "GC"] {
            let old = pod_with(worker, "old", &BOTH);
            worker.end_without_del(&old);
            let error = worker.try_pod("new", &conf_with(&BOTH)).unwrap_err();
            assert_eq!(error["code"], 101, "{error}");
            worker.node.run("ip", &["netns", "delete", "new"]);
            if verb == "DEL" {
                worker.del("old", "", old.conf());
            } else {
                let none = conf(WITH_GC, &json!({ "cni.dev/valid-attachments": [] }));
                worker.cni("GC", "", "", &none).unwrap();
            }
            wait_until_refused(host, &format!("after the {verb}"));
            let new = pod_with(worker, "new", &BOTH);
            let echo = serve(&new);
            assert_reached(host, &format!("the next pod after the {verb}"));
            drop(echo);
            worker.delete(&new);
        }
    });
}

#[test]
fn host_ports_are_restored_after_another_program_has_deleted_them() {
    let changes = [
        ("nft flush ruleset", ""),
        ("nft delete table inet polder", ""),
        ("nft flush map inet polder", "maps"),
        ("nft flush chain inet polder", "chains"),
        ("ip link delete polder0", ""),
    ];
    with_both_attachments(|bootstrap| {
        let lab = one_node(bootstrap);
        let (worker, host) = (&lab.workers[0], outsider(&lab));
        let pod = pod_with(worker, "a", &BOTH);
        let _echo = serve(&pod);
        let sockets = askers(host);
        wait_for_answers("the pod", &sockets);
        let before = table(worker);
        for (change, each) in changes {
            // Without other rules that need it, connections are not tracked while those of Polder are gone.
            worker.node.shell(
                "nft 'add table inet other; add chain inet other c { type filter hook input priority 0; }; \
                 add rule inet other c ct state established accept'",
            );
            let names: Vec<String> = match each {
                "maps" => names_in(&before, "map "),
                "chains" => names_in(&before, "chain "),
                _ => vec![String::new()],
            };
            assert!(!names.is_empty(), "no {each} in {before}");
            let begun = while_clients_begin(host, || {
                for name in names {
                    worker.node.shell(&format!("{change} {name}"));
                    wait_for_table(worker, &format!("after {change} {name}"), &before);
                }
            });
            assert_reached(host, change);
            let of_node = worker.node.within(|| seen_through(LOCALHOST));
            assert!(of_node.is_ok(), "127.0.0.1 after {change}: {of_node:?}");
            // Some of these have sent while the rules were gone.
            wait_for_answers(&format!("the pod after {change}"), &begun);
            wait_for_answers(&format!("the pod, before and after {change}"), &sockets);
        }
    });
}

/// The names of the objects of a table in its listing, by the word before them.
fn names_in(listing: &str, word: &str) -> Vec<String> {
    let names = listing.lines().filter_map(|line| line.trim().strip_prefix(word)?.strip_suffix(" {"));
    names.map(str::to_owned).collect()
}

#[test]
fn rules_and_chains_do_not_grow_with_pods_and_host_ports() {
    with_both_attachments(|bootstrap| {
        let lab = one_node(bootstrap);
        let worker = &lab.workers[0];
        // Rules and chains have a handle in the listing, elements have none.
        let count = || {
            let listed = worker.node.run("nft", &["-a", "-s", "list", "table", "inet", "polder"]);
            listed.lines().filter(|line| line.contains("# handle ")).count()
        };
        let before = count();
        assert!(before > 20, "{before} rules, chains and sets");
        let ports = |number: u16| {
            let port = |index| format!("{}:7007/tcp", HOST_PORT + 10 * number + index);
            (0..10).map(port).collect::<Vec<_>>()
        };
        for number in 0..5 {
            let ports = ports(number);
            let ports: Vec<&str> = ports.iter().map(String::as_str).collect();
            pod_with(worker, &format!("p{number}"), &ports);
        }
        assert_eq!(count(), before);
        let listed = table(worker);
        for number in 0..5 {
            for port in ports(number) {
                let port = port.split(':').next().unwrap();
                assert!(listed.contains(&format!(". {port} :")), "port {port} is not in {listed}");
            }
        }
    });
}

#[test]
fn a_udp_client_that_sends_while_the_node_gets_an_address_reaches_the_pod_there() {
    with_both_attachments(|bootstrap| {
        let lab = one_node(bootstrap);
        let (worker, host) = (&lab.workers[0], outsider(&lab));
        let pod = pod_with(worker, "a", &BOTH);
        let _echo = serve(&pod);
        let later = [IpAddr::from([10, 10, 1, 101]), IpAddr::from([0xfd10, 1, 0, 0, 0, 0, 0, 0x101])];
        let sockets = later.map(|to| host.within(|| asker(SocketAddr::new(to, HOST_PORT))));
        // So that packets arrive before the node has the addresses, like from a router with a route through the node.
        let mac = worker.node.run("cat", &["/sys/class/net/eth0/address"]);
        for to in later {
            let to = to.to_string();
            host.run("ip", &["neigh", "add", &to, "lladdr", mac.trim(), "dev", "eth0", "nud", "permanent"]);
        }
        while_sending(&sockets, || {
            worker.node.shell(&format!(
                "ip address add {}/24 dev eth0; ip address add {}/64 dev eth0 nodad",
                later[0], later[1]
            ));
            for to in later {
                wait::until("the host port there", || host.within(|| seen_through(to)));
            }
        });
        wait_for_answers("the pod", &sockets);
    });
}

#[test]
fn pods_that_compete_for_a_host_port_have_it_one_at_a_time() {
    with_both_attachments(|bootstrap| {
        let lab = one_node(bootstrap);
        let (worker, host) = (&lab.workers[0], outsider(&lab));
        let empty = table(worker);
        let had_it = AtomicUsize::new(0);
        let compete = &|number: u16| {
            let (name, own) = (format!("p{number}"), format!("{}:7007/tcp", 9000 + number));
            let (netns, conf) = (worker.namespace(&name), conf_with(&[&own, BOTH[0], BOTH[1]]));
            let mut rounds = 0;
            wait::within(TIMEOUT * 2, &format!("{name} to have the port three times"), || {
                let result = match worker.cni("ADD", &name, &netns, &conf) {
                    Ok(result) => result,
                    Err(error) if [101, 11].contains(&error["code"].as_u64().unwrap()) => {
                        return Err(error.to_string());
                    }
                    Err(error) => panic!("{error}"),
                };
                let pod = Pod::new(&worker.node, &name, &netns, conf.clone(), result);
                assert_eq!(had_it.fetch_add(1, Ordering::SeqCst) % 2, 0, "two pods have the port");
                let echo = serve(&pod);
                assert_reached(host, &name);
                let of_node = worker.node.within(|| seen_through(LOCALHOST));
                assert!(of_node.is_ok(), "127.0.0.1 with {name}: {of_node:?}");
                let seen = host.within(|| probe::tcp_at(node_address(true), 9000 + number, 10));
                assert_eq!(seen, Ok(outside_address(true)));
                drop(echo);
                had_it.fetch_add(1, Ordering::SeqCst);
                worker.del(&name, &netns, &conf);
                rounds += 1;
                if rounds == 3 { Ok(()) } else { Err(format!("{rounds} times")) }
            });
        };
        std::thread::scope(|scope| {
            let all: Vec<_> = (0..4).map(|number| scope.spawn(move || compete(number))).collect();
            all.into_iter().for_each(|one| one.join().unwrap());
        });
        assert_nothing_left(&lab, worker);
        wait_for_table(worker, "without pods", &empty);
    });
}
