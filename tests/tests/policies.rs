//! `NetworkPolicy` by a program beside Polder, as kube-network-policies does it: the kernel passes the first packet of
//! each connection to a program, which accepts or drops it. The program must see pods' own addresses, and its verdict
//! must hold on every path.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

mod policies {
    pub(crate) mod rules;
    pub(crate) mod site;
}

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use polder_tests::manifest::{Manifest, text};
use polder_tests::probe::{self, Echo, PORT};
use polder_tests::queue::{Flow, Protocol, QueueProgram, Ruling};
use polder_tests::{Lab, cni, wait};
use serde_json::{Value, json};

use policies::rules::{QUEUE, Queued, RELEASE, WithoutProgram, install, install_with_reject, remove, saved};
use policies::site::{Outcome, Site, connect, flows, problems, with_both_attachments, works};

const ACCEPT_ALL: fn(&Flow) -> Ruling = |_| Ruling::Accept;

/// Selects all pods on these nodes.
fn select_pods_of(site: &Site, numbers: &[usize]) {
    for (number, worker) in site.lab.workers.iter().enumerate() {
        remove(&worker.node);
        if numbers.contains(&number) {
            install(&worker.node, &site.pods_of(number), WithoutProgram::Drop, Queued::New);
        }
    }
}

/// A policy that drops or rejects the packets of the client to any server.
fn against_client(site: &Site, ruling: Ruling) -> impl Fn(&Flow) -> Ruling + Clone + Send + 'static {
    let client = site.client.addresses();
    move |flow| if client.contains(&flow.source) { ruling } else { Ruling::Accept }
}

#[test]
fn a_policy_program_sees_pods_own_addresses_on_every_path() {
    with_both_attachments(|site| {
        select_pods_of(site, &[0, 1, 2]);
        let programs = site.programs(ACCEPT_ALL);
        site.assert_all_work("accepted by the program");
        let all_pods: Vec<IpAddr> = (0..3).flat_map(|number| site.pods_of(number)).collect();
        for (number, program) in programs.iter().enumerate() {
            let seen = program.seen();
            for (place, of, server) in &site.servers {
                for to in server.addresses() {
                    for flow in
                        [&site.client, &site.bystander].map(|pod| flows(pod.address_like(to), to)).concat()
                    {
                        let passes = number == 0 || number == *of;
                        assert_eq!(seen.contains(&flow), passes, "n{}: {flow:?} {place}", number + 1);
                    }
                }
            }
            // A reply is a part of an accepted connection, and nothing has another address than a pod's.
            let is_first = |flow: &Flow| flow.port == PORT && all_pods.contains(&flow.source);
            assert!(seen.iter().all(is_first), "n{}: {seen:?}", number + 1);
        }
    });
}

#[test]
fn a_connection_that_the_program_drops_times_out_on_every_path_and_others_work() {
    with_both_attachments(|site| {
        // Each node decides about its own pods: the client's node about egress, the server's about ingress.
        for (what, nodes) in [("egress of the client", &[0][..]), ("ingress of the servers", &[1, 2])] {
            select_pods_of(site, nodes);
            let _programs = site.programs(against_client(site, Ruling::Drop));
            let is_policed = |to: &IpAddr| nodes.iter().any(|number| site.pods_of(*number).contains(to));
            let is_dropped =
                |client: &str, to: &IpAddr| client == site.client.name() && (nodes == [0] || is_policed(to));
            site.assert_outcomes(
                what,
                |client, from, to| {
                    if is_dropped(client.name(), &to) { Err("a time-out") } else { Ok(works(from)) }
                },
                |expected, outcome| match expected {
                    Ok(works) => works == outcome,
                    Err(_) => outcome.is_time_out(),
                },
            );
        }
        // Between two pods of one node, ingress is decided there, too.
        let (_, _, beside) = &site.servers[0];
        select_pods_of(site, &[]);
        install(&site.n1().node, &beside.addresses(), WithoutProgram::Drop, Queued::New);
        let program = QueueProgram::start(&site.n1().node, QUEUE, against_client(site, Ruling::Drop));
        for to in beside.addresses() {
            let outcome = connect(&site.client, to);
            assert!(outcome.is_time_out(), "ingress on the same node to {to}: {outcome:?}");
            assert_eq!(connect(&site.bystander, to), works(site.bystander.address_like(to)));
        }
        program.set_policy(ACCEPT_ALL);
        site.assert_all_work("accepted again");
    });
}

#[test]
fn a_connection_that_the_program_rejects_is_refused_on_every_path_and_others_work() {
    with_both_attachments(|site| {
        for (what, nodes) in [("egress of the client", &[0][..]), ("ingress of the servers", &[1, 2])] {
            for (number, worker) in site.lab.workers.iter().enumerate() {
                remove(&worker.node);
                if nodes.contains(&number) {
                    install_with_reject(&worker.node, &site.pods_of(number));
                }
            }
            let _programs = site.programs(against_client(site, Ruling::Reject));
            let (_, _, beside) = &site.servers[0];
            let is_rejected = |client: &str, to: &IpAddr| {
                client == site.client.name() && (nodes == [0] || !beside.addresses().contains(to))
            };
            site.assert_outcomes(
                what,
                |client, from, to| {
                    if is_rejected(client.name(), &to) { Err(to.is_ipv6()) } else { Ok(works(from)) }
                },
                |expected, outcome: &Outcome| match expected {
                    Ok(works) => works == outcome,
                    Err(v6) => outcome.is_rejected(*v6),
                },
            );
        }
    });
}

#[test]
fn an_established_connection_ends_when_a_changed_policy_forbids_it() {
    with_both_attachments(|site| {
        let programs = site.programs(ACCEPT_ALL);
        let worker = site.n1();
        install(&worker.node, &site.pods_of(0), WithoutProgram::Drop, Queued::New);
        let mut streams = Vec::new();
        for (place, _, server) in &site.servers {
            for own in server.addresses() {
                let listener = server.within(|| TcpListener::bind((own, PORT + 1))).unwrap();
                let to = SocketAddr::new(own, PORT + 1);
                let ours = site.client.within(|| TcpStream::connect_timeout(&to, wait::TIMEOUT)).unwrap();
                streams.push((format!("{place} {own}"), ours, listener.accept().unwrap().0));
            }
        }
        let passes = |(what, ours, theirs): &mut (String, TcpStream, TcpStream), time: Duration| {
            theirs.set_read_timeout(Some(time)).unwrap();
            ours.write_all(b".").unwrap();
            theirs.read_exact(&mut [0]).map_err(|error| format!("{what}: {error}"))
        };
        streams.iter_mut().for_each(|stream| passes(stream, wait::TIMEOUT).unwrap());
        // All packets pass the queue from now on, also large ones that the kernel has not segmented yet.
        install(&worker.node, &site.pods_of(0), WithoutProgram::Drop, Queued::All);
        streams.iter_mut().for_each(|stream| passes(stream, wait::TIMEOUT).unwrap());
        site.assert_all_work("with every packet in the queue");
        programs[0].set_policy(against_client(site, Ruling::Drop));
        if polder_tests::agent::all_use_the_fast_path() {
            // It forwards packets of a flow for a second after the host did.
            std::thread::park_timeout(Duration::from_millis(1500));
        }
        for stream in &mut streams {
            assert!(
                passes(stream, wait::scaled(Duration::from_millis(500))).is_err(),
                "{} goes on",
                stream.0
            );
        }
        programs[0].set_policy(ACCEPT_ALL);
        streams.iter_mut().for_each(|(_, _, theirs)| theirs.set_read_timeout(Some(wait::TIMEOUT)).unwrap());
        streams.iter_mut().for_each(|(_, _, theirs)| theirs.read_exact(&mut [0]).unwrap());
    });
}

#[test]
fn without_a_program_packets_pass_with_bypass_and_are_dropped_and_reported_without() {
    with_both_attachments(|site| {
        let worker = site.n1();
        install(&worker.node, &site.pods_of(0), WithoutProgram::Accept, Queued::New);
        let program = QueueProgram::start(&worker.node, QUEUE, against_client(site, Ruling::Drop));
        let (_, _, far) = &site.servers[2];
        assert!(connect(&site.client, far.v4()).is_time_out());
        drop(program);
        site.assert_all_work("with bypass, after the program's end");
        assert_eq!(problems(worker), Vec::<String>::new());

        install(&worker.node, &site.pods_of(0), WithoutProgram::Drop, Queued::New);
        site.assert_outcomes("without bypass", |_, _, _| "a time-out", |_, outcome| outcome.is_time_out());
        let reported = worker.wait_for_status("a problem with the queue", |status| {
            let text = status["problems"].to_string();
            text.contains(&format!("no program reads netfilter queue {QUEUE}")).then_some(text)
        });
        for chain in
            ["PREROUTING of table ip mangle", "POSTROUTING of table ip6 mangle", "kube-network-policies"]
        {
            assert!(reported.contains(chain), "{reported}");
        }
        assert_eq!(problems(worker).len(), 1, "{reported}");

        let _program = QueueProgram::start(&worker.node, QUEUE, ACCEPT_ALL);
        site.assert_all_work("with the next program");
        worker.wait_for_status("no problem", |status| (status["problems"] == json!([])).then_some(()));
    });
}

#[test]
fn host_ports_and_connections_to_the_outside_are_decided_by_pods_own_addresses() {
    with_both_attachments(|site| {
        let (worker, world) = (site.n1(), site.lab.world.as_ref().unwrap());
        let mapping = json!({ "hostPort": 8080, "containerPort": PORT, "protocol": "tcp" });
        let conf = cni::conf("1.1.0", &json!({ "runtimeConfig": { "portMappings": [mapping] } }));
        let server = worker.pod_with("server", &conf);
        let pods = [server.addresses(), site.client.addresses()].concat();
        install(&worker.node, &pods, WithoutProgram::Drop, Queued::New);
        let program = QueueProgram::start(&worker.node, QUEUE, ACCEPT_ALL);
        for own in server.addresses() {
            let v6 = own.is_ipv6();
            let (node, outside) = (site.lab.underlay(0, v6), Lab::world_address(v6));
            let (_in_pod, _outside, _on_node) = (
                server.within(|| Echo::start(own)),
                world.within(|| Echo::start(outside)),
                worker.node.within(|| Echo::start(node)),
            );
            let client = site.client.address_like(own);
            let to_host_port = || world.within(|| probe::tcp_at(node, 8080, 1000));
            let to_outside = || site.client.within(|| probe::tcp(outside, 1000));
            let to_node = || site.client.within(|| probe::tcp(node, 1000));
            // The node's own connections are not queued: the kubelet checks pods.
            let from_node = || worker.node.within(|| probe::tcp(own, 1000));
            assert_eq!((to_host_port(), to_outside(), to_node()), (Ok(outside), Ok(node), Ok(client)));
            let [of_host_port, _] = flows(outside, own);
            let [of_outside, _] = flows(client, outside);
            let [of_node, _] = flows(client, node);
            let seen = program.seen();
            for flow in [of_host_port, of_outside, of_node] {
                assert!(seen.contains(&flow), "{flow:?} is not in {seen:?}");
            }
            program.set_policy(|_| Ruling::Drop);
            for outcome in [to_host_port(), to_outside(), to_node()] {
                assert!(outcome.as_ref().is_err_and(|error| error.contains("timed out")), "{outcome:?}");
            }
            from_node().unwrap();
            program.set_policy(ACCEPT_ALL);
        }
    });
}

#[test]
fn a_dns_query_is_decided_before_routing() {
    with_both_attachments(|site| {
        let worker = site.n1();
        let selected = site.client.addresses();
        install(&worker.node, &selected, WithoutProgram::Drop, Queued::New);
        let program = QueueProgram::start(&worker.node, QUEUE, ACCEPT_ALL);
        for (place, _, server) in &site.servers {
            for own in server.addresses() {
                let (from, to) = (site.client.address_like(own), SocketAddr::new(own, 53));
                let dns = server.within(|| UdpSocket::bind(to)).unwrap();
                let client = site.client.within(|| UdpSocket::bind((from, 0))).unwrap();
                let arrives = |time| {
                    client.send_to(b"query", to).unwrap();
                    dns.set_read_timeout(Some(time)).unwrap();
                    dns.recv_from(&mut [0; 16]).map(|(_, from)| from.ip())
                };
                assert_eq!(arrives(wait::TIMEOUT).unwrap(), from, "{place}");
                let query = Flow { protocol: Protocol::Udp, source: from, destination: own, port: 53 };
                assert!(program.seen().contains(&query), "{place}: {:?}", program.seen());
                program.set_policy(|_| Ruling::Drop);
                // Another port: a new connection.
                let client = site.client.within(|| UdpSocket::bind((from, 0))).unwrap();
                client.send_to(b"query", to).unwrap();
                dns.set_read_timeout(Some(wait::scaled(Duration::from_millis(500)))).unwrap();
                assert!(dns.recv_from(&mut [0; 16]).is_err(), "{place}: a dropped query arrives");
                assert!(program.seen().contains(&query), "{place}: {:?}", program.seen());
                program.set_policy(ACCEPT_ALL);
            }
        }
    });
}

#[test]
fn rules_and_verdicts_stay_when_the_agent_is_restarted_and_when_it_is_uninstalled() {
    with_both_attachments(|site| {
        install(&site.n1().node, &site.pods_of(0), WithoutProgram::Drop, Queued::New);
        let rules = saved(&site.n1().node);
        assert!(rules.contains("NFQUEUE"), "{rules}");
        let program = QueueProgram::start(&site.n1().node, QUEUE, against_client(site, Ruling::Drop));
        let (_, _, far) = &site.servers[2];
        let assert_verdicts = |site: &Site, what: &str| {
            let (_, _, far) = &site.servers[2];
            let outcome = connect(&site.client, far.v4());
            assert!(outcome.is_time_out(), "{what}: {outcome:?}");
            assert_eq!(connect(&site.bystander, far.v4()), works(site.bystander.v4()), "{what}");
            assert_eq!(saved(&site.n1().node), rules, "{what}");
        };
        assert_verdicts(site, "before");
        // A connection that lives through the restart.
        let to = SocketAddr::new(far.v4(), PORT + 1);
        let listener = far.within(|| TcpListener::bind(to)).unwrap();
        let ours = site.bystander.within(|| TcpStream::connect_timeout(&to, wait::TIMEOUT)).unwrap();
        let dialogue = probe::Dialogue::over(ours, &listener);
        site.lab.workers[0].kill();
        assert_verdicts(site, "without an agent");
        site.lab.workers[0].start_and_wait();
        site.n1().wait_for_status("a pass", |status| status["last_pass"]["writes"].is_number().then_some(()));
        assert_verdicts(site, "with the next agent");
        dialogue.finish().unwrap();
        assert_eq!(problems(site.n1()), Vec::<String>::new());
        assert!(site.lab.workers[0].stop());
        site.n1().ctl(&["uninstall", "--with-pods"]);
        assert_eq!(saved(&site.n1().node), rules);
        drop(program);
    });
}

#[test]
fn the_manifest_starts_the_release_with_these_rules_and_gives_it_what_it_reads() {
    let manifest = Manifest::read("network-policies");
    let container = manifest.container("containers");
    let (image, arguments) = (text(&container.0["image"]), container.words("args"));
    assert!(image.ends_with(&format!("/kube-network-policies:{RELEASE}")), "{image}");
    for expected in [format!("--nfqueue-id={QUEUE}"), "--fail-open=true".to_owned()] {
        assert!(arguments.contains(&expected), "{arguments:?} without {expected}");
    }
    assert_eq!(manifest.pod()["hostNetwork"], true);
    // Two programs cannot read one queue.
    let strategy = &manifest.document("DaemonSet")["spec"]["updateStrategy"]["rollingUpdate"];
    assert_eq!(strategy["maxSurge"], 0);
    assert_eq!(
        manifest.document("ClusterRole")["rules"],
        json!([
            { "apiGroups": [""], "resources": ["pods", "namespaces"], "verbs": ["list", "watch"] },
            { "apiGroups": ["networking.k8s.io"], "resources": ["networkpolicies"], "verbs": ["list", "watch"] },
        ])
    );
    let (account, binding) = (manifest.document("ServiceAccount"), manifest.document("ClusterRoleBinding"));
    let named = |value: &Value| (value["name"].clone(), value["namespace"].clone());
    assert_eq!(named(&binding["subjects"][0]), named(&account["metadata"]));
    assert_eq!(manifest.pod()["serviceAccountName"], account["metadata"]["name"]);
    assert_eq!(binding["roleRef"]["name"], manifest.document("ClusterRole")["metadata"]["name"]);
}
