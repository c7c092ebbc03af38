//! Faults between a pod and the underlay: single interfaces that do not forward, routes, rules and filters of other
//! programs, and the pod's own interface. Polder repairs its own objects; `status` reports the rest on the affected
//! node.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use ipnetwork::IpNetwork;
use polder_api::Family;
use polder_tests::agent::Worker;
use polder_tests::fabric::Families;
use polder_tests::kernel_state::{assert_unchanged, kernel_state};
use polder_tests::matrix::assert_flat;
use polder_tests::{Lab, Pod, Topology, wait};
use serde_json::Value;

/// Both values of `attach`.
const ATTACH: [&str; 2] = ["attach = \"bridge\"", "attach = \"routed\""];

/// Two nodes on a link and one behind a router, dual-stack. Nothing runs yet.
fn build_lab(bootstrap: &str) -> Lab {
    Lab::build(Topology::two_segments().families(Families::DUAL).bootstrap(bootstrap))
}

fn setting(worker: &Worker, path: &str) -> String {
    worker.node.shell(&format!("cat /proc/sys/{path}")).trim().to_owned()
}

fn set(worker: &Worker, path: &str, value: &str) {
    worker.node.shell(&format!("echo {value} > /proc/sys/{path}"));
}

fn wait_for_setting(worker: &Worker, path: &str, value: &str) {
    wait::until(&format!("{path} to be {value} on {}", worker.name()), || match setting(worker, path) {
        found if found == value => Ok(()),
        found => Err(found),
    });
}

#[test]
fn forwarding_is_enabled_per_interface_and_an_uninstall_restores_the_settings() {
    for attach in ATTACH {
        let mut lab = build_lab(attach);
        // As a hardening rule of a large distribution does it.
        for worker in &lab.workers {
            worker.node.shell(
                "sysctl -qw net.ipv4.ip_forward=1 net.ipv4.conf.default.forwarding=0 net.ipv4.conf.eth0.forwarding=0 \
                 net.ipv6.conf.default.disable_ipv6=1",
            );
        }
        let before: Vec<_> = lab.workers.iter().map(kernel_state).collect();
        lab.start_agents();
        let pods: Vec<Pod> = lab.workers.iter().map(|worker| worker.pod("a")).collect();
        assert_flat(&pods, 1450);
        for worker in &lab.workers {
            assert_eq!(setting(worker, "net/ipv4/conf/default/forwarding"), "0", "that is not ours");
        }
        lab.workers.iter_mut().for_each(|worker| assert!(worker.stop()));
        for (worker, before) in lab.workers.iter().zip(&before) {
            worker.ctl(&["uninstall", "--with-pods"]);
            assert_unchanged(worker, before);
        }
    }
}

#[test]
fn forwarding_that_was_disabled_on_an_interface_is_enabled_again() {
    for (attach, also) in ATTACH.into_iter().zip(["polder0", "pod"]) {
        let mut lab = build_lab(attach);
        lab.workers.iter().for_each(|worker| worker.configure_also("resync_seconds = 3600"));
        lab.start_agents();
        let pods: Vec<Pod> = lab.workers.iter().map(|worker| worker.pod("a")).collect();
        assert_flat(&pods, 1450);
        for (worker, pod) in lab.workers.iter().zip(&pods) {
            let also = if also == "pod" { pod.host_interface() } else { also.to_owned() };
            let interfaces = ["eth0".to_owned(), "polder.vx".to_owned(), also];
            let paths = interfaces.map(|name| format!("net/ipv4/conf/{name}/forwarding"));
            // The agent compares a setting with the value that it had when a pass found nothing to do.
            worker.wait_for_status("a pass that finds nothing", |status| {
                (status["last_pass"]["writes"] == 0).then_some(())
            });
            paths.iter().for_each(|path| set(worker, path, "0"));
            paths.iter().for_each(|path| wait_for_setting(worker, path, "1"));
            set(worker, "net/ipv6/conf/polder.vx/disable_ipv6", "1");
            wait_for_setting(worker, "net/ipv6/conf/polder.vx/disable_ipv6", "0");
        }
        for worker in &lab.workers {
            worker.wait_for_status("all of it to be back", |status| {
                let is_well = status["ready"] == true && status["last_pass"]["writes"] == 0;
                is_well.then_some(())
            });
        }
        assert_flat(&pods, 1450);
    }
}

#[test]
fn packets_of_a_new_pod_are_forwarded_if_new_interfaces_do_not_forward() {
    let lab = Lab::start(Topology::one_segment(2).bootstrap("attach = \"routed\""));
    let worker = &lab.workers[0];
    set(worker, "net/ipv4/conf/default/forwarding", "0");
    let pods = vec![worker.pod("a"), worker.pod("b"), lab.workers[1].pod("a")];
    let path = format!("net/ipv4/conf/{}/forwarding", pods[0].host_interface());
    assert_eq!(setting(worker, &path), "1");
    assert_flat(&pods, 1450);
}

#[test]
fn a_forwarding_setting_that_cannot_be_written_is_reported_with_file_and_command() {
    let mut lab = Lab::build(Topology::one_segment(1));
    let worker = &mut lab.workers[0];
    worker.node.shell(
        "sysctl -qw net.ipv4.ip_forward=1; file=/proc/sys/net/ipv4/conf/eth0/forwarding; echo 0 > $file; \
         echo 0 > /tmp/zero; mount --bind /tmp/zero $file; mount -o remount,ro,bind $file",
    );
    worker.start();
    let reason = worker.wait_for_status("the reason", |status| {
        let mut reasons = status["reasons"].as_array()?.iter().filter_map(|reason| reason.as_str());
        reasons.find(|reason| reason.contains("net/ipv4/conf/eth0/forwarding")).map(str::to_owned)
    });
    assert!(reason.contains("`sysctl -w net/ipv4/conf/eth0/forwarding=1`"), "{reason}");
    worker.node.shell("umount /proc/sys/net/ipv4/conf/eth0/forwarding");
    worker.wait_until_ready();
    assert_eq!(setting(worker, "net/ipv4/conf/eth0/forwarding"), "1");
}

fn texts(status: &Value) -> Vec<String> {
    let problems = status["problems"].as_array().into_iter().flatten();
    problems.map(|problem| problem.as_str().unwrap().to_owned()).collect()
}

/// Waits for a problem that contains all of these words, and returns it.
fn problem(worker: &Worker, words: &[&str]) -> String {
    worker.wait_for_status(&format!("a problem that contains {words:?}"), |status| {
        texts(status).into_iter().find(|text| words.iter().all(|word| text.contains(word)))
    })
}

/// Waits until the only problem contains `word`, and returns it. A wrong report would remain; a peer that is slow on a
/// busy machine answers again.
fn only_problem(worker: &Worker, word: &str) -> String {
    worker.wait_for_status(&format!("{word} to be the only problem"), |status| {
        match texts(status).as_slice() {
            [text] if text.contains(word) => Some(text.clone()),
            _ => None,
        }
    })
}

fn wait_for_no_problem(worker: &Worker) {
    worker.wait_for_status("no problem", |status| texts(status).is_empty().then_some(()));
}

/// The commands in a text: the parts between backquotes.
fn commands(text: &str) -> Vec<&str> {
    text.split('`').skip(1).step_by(2).collect()
}

/// A lab whose agents make a pass every second, with a pod on each node.
fn watched_lab(bootstrap: &str) -> (Lab, Vec<Pod>) {
    let mut lab = build_lab(bootstrap);
    lab.workers.iter().for_each(|worker| worker.configure_also("resync_seconds = 1"));
    lab.start_agents();
    let pods: Vec<Pod> = lab.workers.iter().map(|worker| worker.pod("a")).collect();
    assert_flat(&pods, 1450);
    (lab, pods)
}

/// Whether the pod of the first node reaches the pod of the second node over `family`.
fn reaches(pods: &[Pod], family: Family) -> bool {
    let to = pods[1].address_of(family).to_string();
    pods[0].command("ping").args(["-c1", "-W1", &to]).output().unwrap().status.success()
}

#[test]
fn foreign_routes_and_rules_that_disconnect_pods_are_reported_with_the_delete_command() {
    for attach in ATTACH {
        let (lab, pods) = watched_lab(attach);
        let (worker, peer) = (&lab.workers[0], &lab.workers[1]);
        for family in Family::BOTH {
            let (ip, to) = if family == Family::V4 {
                ("ip", pods[1].v4())
            } else {
                ("ip -6", pods[1].address_of(family))
            };
            let own = pods[0].address_of(family);
            let (bits, narrower) = if family == Family::V4 { (32, 28) } else { (128, 124) };
            let network = IpNetwork::new(to, narrower).unwrap();
            let narrower = format!("{}/{narrower}", network.network());
            let table = format!("{ip} route add blackhole default table 100");
            for (disturbance, words) in [
                (format!("{ip} route add {to}/{bits} dev lo"), format!("{to}/{bits} dev lo")),
                (
                    format!("{ip} route add {narrower} dev lo metric 500"),
                    format!("{narrower} dev lo metric 500"),
                ),
                (format!("{ip} route add blackhole {to}/{bits}"), format!("blackhole {to}/{bits}")),
                (
                    format!(
                        "ip link add odd type bridge; ip link set odd up; {ip} address add {to}/{bits} dev odd"
                    ),
                    format!("address del {to}/{bits} dev odd"),
                ),
                (format!("{table}; {ip} rule add pref 50 lookup 100"), "pref 50 lookup 100".to_owned()),
                (format!("{ip} rule add pref 50 from {own} lookup 100"), format!("pref 50 from {own}")),
                (
                    format!("{ip} rule add pref 50 to {narrower} blackhole"),
                    format!("pref 50 to {narrower} blackhole"),
                ),
            ] {
                worker.node.shell(&disturbance);
                let text = problem(worker, &[&words]);
                // The host itself replies for an address that it has.
                if disturbance.contains("dev odd") {
                    wait::until_true("the host to answer", || reaches(&pods, family));
                } else {
                    assert!(!reaches(&pods, family), "{disturbance} does no harm");
                }
                let messages = texts(&peer.status());
                assert!(
                    !messages.iter().any(|text| text.contains(&words)),
                    "{disturbance} is not the peer's: {messages:?}"
                );
                worker.node.shell(commands(&text)[0]);
                wait_for_no_problem(worker);
                worker.node.shell("ip link delete odd 2>/dev/null || true");
                wait::until_true("the pod to be reached again", || reaches(&pods, family));
            }
            worker.node.shell(&format!("{ip} rule del pref 32766"));
            let text = problem(worker, &["main routing table", &format!("{ip} rule add")]);
            worker.node.shell(commands(&text)[0]);
            wait_for_no_problem(worker);
        }
        assert_flat(&pods, 1450);
        // Routes and rules that do not affect a pod's path are not reported.
        let own = pods[0].v4();
        // Table 100 would block the host's own packets to etcd.
        worker.node.shell(&format!(
            "ip route add 10.244.0.0/18 via 10.10.1.254; ip route add {own}/32 dev lo table 101; ip rule add pref 51 \
             fwmark 1 \
             lookup 100; ip rule add pref 52 from 10.10.1.1 lookup 101; ip rule add pref 53 oif eth0 lookup 101; \
             ip route add blackhole default metric 4000"
        ));
        worker.node.shell("ip route add blackhole 10.244.255.255/32");
        let text = only_problem(worker, "10.244.255.255/32");
        worker.node.shell(commands(&text)[0]);
        wait_for_no_problem(worker);
    }
}

#[test]
fn a_change_inside_a_pods_namespace_is_reported_in_status_and_cluster_check() {
    for attach in ATTACH {
        let (lab, pods) = watched_lab(attach);
        let (worker, pod) = (&lab.workers[0], &pods[0]);
        let gateway = pod.gateway(pod.v4());
        let gateway_mac = pod.run("ip", &["neigh", "show", &gateway.to_string()]);
        let gateway_mac = gateway_mac.split(' ').nth(4).unwrap().to_owned();
        let sh = |command: &str| drop(pod.run("sh", &["-ec", command]));
        let mac = pod
            .run("sh", &["-c", "ip link show eth0 | grep -o 'ether [^ ]*' | cut -d' ' -f2"])
            .trim()
            .to_owned();
        let (v4, v6) = (pod.v4(), pod.address_of(Family::V6));
        let gateway6 = pod.gateway(v6);
        let restore = format!(
            "ip link set eth0 address {mac} up; ip address replace {v4}/32 dev eth0; \
             ip address replace {v6}/128 dev eth0 nodad noprefixroute; \
             ip neigh replace {gateway} lladdr {gateway_mac} dev eth0 nud permanent; \
             ip neigh replace {gateway6} lladdr {gateway_mac} dev eth0 nud permanent; \
             ip route replace default via {gateway} dev eth0 onlink; \
             ip -6 route replace default via {gateway6} dev eth0 onlink"
        );
        for (damage, words) in [
            ("ip route del default".to_owned(), "no default route"),
            ("ip -6 route del default".to_owned(), "no default route"),
            ("ip link set eth0 down".to_owned(), "eth0 in the pod is down"),
            (format!("ip address del {v4}/32 dev eth0"), "does not have the address"),
            (
                format!("ip neigh replace {gateway} lladdr 02:00:00:00:00:08 dev eth0 nud permanent"),
                "MAC address 02:00:00:00:00:08 instead of",
            ),
            ("ip link set eth0 address 02:00:00:00:00:09".to_owned(), "has MAC address 02:00:00:00:00:09"),
        ] {
            sh(&damage);
            let text = problem(worker, &[words, &v4.to_string()]);
            assert!(text.contains("`kubectl delete pod -n lab a`"), "{text}");
            // The other nodes do not report it.
            lab.workers[1..].iter().for_each(wait_for_no_problem);
            let (_, checked) = worker.ctl_verdict(&["ipam", "check"]);
            assert!(checked["deviations"].to_string().contains(words), "{checked}");
            sh(&restore);
            wait_for_no_problem(worker);
        }
        assert_flat(&pods, 1450);
        // The problem ends when the pod is deleted.
        sh("ip link set eth0 down");
        problem(worker, &["eth0 in the pod is down"]);
        worker.delete(pod);
        wait_for_no_problem(worker);
    }
}

#[test]
fn a_foreign_rule_that_drops_pod_packets_is_reported_on_any_hook() {
    for attach in ATTACH {
        let (lab, pods) = watched_lab(attach);
        let (worker, peer) = (&lab.workers[0], &lab.workers[1]);
        let name = if attach.contains("routed") { "pld*" } else { "polder0" };
        for (hook, family, rule) in [
            ("forward", Family::V4, "ip daddr 10.244.0.0/16 drop".to_owned()),
            ("forward", Family::V6, "ip6 saddr fd00:244::/56 counter reject".to_owned()),
            ("forward", Family::V4, format!("iifname \"eth0\" oifname \"{name}\" drop")),
            (
                "prerouting",
                Family::V4,
                "iifname \"eth0\" ip saddr 10.0.0.0/8 ip daddr 10.244.0.0/16 drop".to_owned(),
            ),
            ("prerouting", Family::V6, format!("iifname \"{name}\" ip6 daddr fd00:244::/56 drop")),
            ("postrouting", Family::V6, "oifname \"eth0\" ip6 saddr fd00:244::/56 drop".to_owned()),
        ] {
            worker.node.write(
                "/run/others.nft",
                &format!(
                    "table inet mine {{\nchain c {{\ntype filter hook {hook} priority -200\n{rule}\n}}\n}}\n"
                ),
            );
            worker.node.run("nft", &["-f", "/run/others.nft"]);
            problem(worker, &["chain c of table inet mine"]);
            assert!(!reaches(&pods, family), "{rule} on {hook} does no harm");
            assert!(!texts(&peer.status()).iter().any(|text| text.contains("mine")), "it is not the peer's");
            // Each command permits packets of one pool.
            wait::until("the commands to help", || match texts(&worker.try_status()?) {
                messages if messages.is_empty() => Ok(()),
                messages => {
                    let all = messages.iter().flat_map(|text| commands(text));
                    all.for_each(|command| drop(worker.node.shell(command)));
                    Err(format!("{messages:?}"))
                }
            });
            wait::until_true("the pod to be reached again", || reaches(&pods, family));
            worker.node.run("nft", &["delete", "table", "inet", "mine"]);
        }
        // Rules for single addresses, protocols and other networks are intentional and not reported.
        let to = pods[1].v4();
        worker.node.write(
            "/run/others.nft",
            &format!(
                "table inet mine {{\nchain c {{\ntype filter hook forward priority -200\nip daddr {to} tcp dport 25 \
                 drop\n\
                 ip daddr 192.0.2.0/24 drop\nip daddr != 10.0.0.0/8 ip saddr 10.244.0.0/16 tcp dport 25 drop\n\
                 ip saddr 10.244.255.255 drop\n}}\n}}\n"
            ),
        );
        worker.node.run("nft", &["-f", "/run/others.nft"]);
        worker.node.shell("ip route add blackhole 10.244.255.255/32");
        only_problem(worker, "10.244.255.255/32");
        assert_flat(&pods, 1450);
    }
}
