//! Effects of other software on a node's pods, and the problems that `status` reports about it.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use polder_tests::agent::Worker;
use polder_tests::fabric::Families;
use polder_tests::matrix::{assert_flat, listen, pairs};
use polder_tests::node::Process;
use polder_tests::traffic::without_packet_loss;
use polder_tests::{Lab, Pod, Topology, wait};
use serde_json::Value;

/// Two nodes on a link and one behind a router, with a pass every second, and a pod on each node.
fn lab(bootstrap: &str) -> (Lab, Vec<Pod>) {
    let mut lab = Lab::build(Topology::two_segments().families(Families::DUAL).bootstrap(bootstrap));
    lab.workers.iter().for_each(|worker| worker.configure_also("resync_seconds = 1"));
    lab.start_agents();
    let pods: Vec<Pod> = lab.workers.iter().map(|worker| worker.pod("a")).collect();
    assert_flat(&pods, 1450);
    (lab, pods)
}

fn texts(status: &Value) -> Vec<String> {
    let problems = status["problems"].as_array().into_iter().flatten();
    problems.map(|problem| problem.as_str().unwrap().to_owned()).collect()
}

/// Waits until `status` reports a problem that contains these words. Returns its text.
fn problem(worker: &Worker, words: &str) -> String {
    worker.wait_for_status(&format!("a problem that contains {words:?}"), |status| {
        texts(status).into_iter().find(|text| text.contains(words))
    })
}

fn wait_for_no_problem(worker: &Worker) {
    worker.wait_for_status("no problem", |status| texts(status).is_empty().then_some(()));
}

/// The commands in a text: the parts between backquotes.
fn commands(text: &str) -> Vec<&str> {
    text.split('`').skip(1).step_by(2).collect()
}

/// The pairs of pods that do not reach each other over these families, as node names: `n1 to n2`.
fn cut_off(pods: &[Pod], families: Families) -> Vec<String> {
    let _servers = listen(pods);
    let all = pairs(pods, families);
    let cut = all.iter().filter(|pair| pair.check(1450).is_err());
    cut.map(|pair| format!("{} to {}", pair.from.node(), pair.to.node())).collect()
}

fn nft(worker: &Worker, rules: &str) {
    worker.node.write("/run/others.nft", rules);
    worker.node.run("nft", &["-f", "/run/others.nft"]);
}

/// Docker's chain for forwarded packets: it drops everything except packets from Docker's own bridge and their replies.
fn docker(table: &str) -> String {
    format!(
        "table {table} filter {{\n\
         chain DOCKER {{\n}}\n\
         chain DOCKER-USER {{\ncounter return\n}}\n\
         chain FORWARD {{\ntype filter hook forward priority filter; policy drop;\n\
         counter jump DOCKER-USER\n\
         oifname \"docker0\" ct state related,established counter accept\n\
         oifname \"docker0\" counter jump DOCKER\n\
         iifname \"docker0\" oifname != \"docker0\" counter accept\n}}\n}}\n"
    )
}

/// Installs a filter on the first node that disconnects its pods. `status` must report a problem that contains all
/// `expected_words`, and the commands in its text must restore the connections.
fn assert_commands_restore(
    lab: &Lab,
    pods: &[Pod],
    families: Families,
    filter: &str,
    expected_words: &[&str],
) {
    let worker = &lab.workers[0];
    assert_eq!(texts(&worker.status()), Vec::<String>::new());
    nft(worker, filter);
    let cut = cut_off(pods, families);
    let of_node: Vec<&String> = cut.iter().filter(|pair| pair.contains("n1")).collect();
    assert_eq!(
        (of_node.len(), cut.len()),
        (4, 4),
        "the filter disconnects only the pods of the first node: {cut:?}"
    );
    let text = problem(worker, expected_words[0]);
    assert!(
        expected_words.iter().all(|words| text.contains(words)),
        "{text} does not contain all of {expected_words:?}"
    );
    assert_eq!(texts(&lab.workers[1].status()), Vec::<String>::new());
    let commands = commands(&text);
    assert_eq!(commands.len(), 2, "{text}");
    commands.iter().for_each(|command| drop(worker.node.shell(command)));
    assert_eq!(cut_off(pods, families), Vec::<String>::new(), "after {commands:?}");
    wait_for_no_problem(worker);
}

#[test]
fn a_docker_style_filter_is_reported_with_working_commands() {
    let (lab, pods) = lab("");
    let chain = "chain FORWARD of table ip filter";
    let command = "`iptables -I DOCKER-USER -i polder0 -j ACCEPT`";
    assert_commands_restore(&lab, &pods, Families::V4, &docker("ip"), &[chain, command]);
    let chain = "chain FORWARD of table ip6 filter";
    let command = "`ip6tables -I DOCKER-USER -o polder0 -j ACCEPT`";
    assert_commands_restore(&lab, &pods, Families::V6, &docker("ip6"), &[chain, command]);
    // Not reported: a chain that accepts by policy and drops only TCP port 25 from eth0.
    nft(
        &lab.workers[0],
        "table inet others {\nchain watch {\ntype filter hook forward priority 10\niifname \"eth0\" tcp dport 25 \
         drop\n}\n}\n",
    );
    assert_eq!(cut_off(&pods, Families::DUAL), Vec::<String>::new());
    wait_for_no_problem(&lab.workers[0]);
}

#[test]
fn in_routed_mode_foreign_filters_are_reported_with_working_commands() {
    let (lab, pods) = lab("attach = \"routed\"");
    let filter = "table inet mine {\nchain ahead {\ntype filter hook forward priority -5; policy drop;\n\
                  ct state established accept\n}\n}\n";
    let command = "`nft insert rule inet mine ahead oifname 'pld*' accept`";
    let worker = &lab.workers[0];
    assert_commands_restore(&lab, &pods, Families::V4, filter, &["chain ahead of table inet mine", command]);
    // The forward chain of hosts that use iptables without Docker.
    let plain =
        "table ip filter {\nchain FORWARD {\ntype filter hook forward priority filter; policy drop;\n}\n}\n";
    assert_commands_restore(&lab, &pods, Families::V4, plain, &["`iptables -I FORWARD -i pld+ -j ACCEPT`"]);
    // Other notations of the same rules are recognised too.
    worker.node.shell("nft flush chain inet mine ahead");
    problem(worker, "chain ahead");
    worker.node.shell(
        "nft add rule inet mine ahead iifname vmap '{ \"nobody\" : drop }'; \
         nft add chain inet mine user; nft add rule inet mine ahead jump user; \
         nft add rule inet mine user 'iifname \"pld*\" log prefix \"pods\" counter accept'; \
         nft add rule inet mine user 'oifname \"p*\" accept comment \"to pods\"'",
    );
    assert_eq!(cut_off(&pods, Families::DUAL), Vec::<String>::new());
    wait_for_no_problem(worker);
}

/// The forwarding part of the rules of firewalld 1.3 with one zone. The default zone rejects. `zones` and `policies`
/// are the rules for `polder.xml` and `polder-pods.xml` of `deploy/host`.
fn firewalld(zones: &str, policies: &str) -> String {
    format!(
        "table inet firewalld {{}}\ndelete table inet firewalld\ntable inet firewalld {{\n\
         chain to_pods {{\naccept\n}}\n\
         chain policies_pre {{\n{policies}\n}}\n\
         chain filter_FWD_polder {{\njump policies_pre\naccept\n}}\n\
         chain filter_FWD_public {{\njump policies_pre\nreject with icmpx admin-prohibited\n}}\n\
         chain filter_FORWARD_ZONES {{\n{zones}\ngoto filter_FWD_public\n}}\n\
         chain filter_FORWARD {{\ntype filter hook forward priority filter + 10; policy accept;\n\
         ct state {{ established, related }} accept\nct status dnat accept\niifname \"lo\" accept\nct state invalid \
         drop\n\
         jump filter_FORWARD_ZONES\nreject with icmpx admin-prohibited\n}}\n}}\n"
    )
}

#[test]
fn firewalld_is_reported_although_its_chain_policy_accepts() {
    let (lab, pods) = lab("");
    let worker = &lab.workers[0];
    nft(worker, &firewalld("", ""));
    assert_eq!(cut_off(&pods, Families::DUAL).len(), 8);
    let text = problem(worker, "chain filter_FORWARD of table inet firewalld");
    for file in ["zones/polder.xml", "policies/polder-pods.xml"] {
        assert!(text.contains(&format!("deploy/host/firewalld/{file}")), "{text}");
    }
    let zones = "iifname \"polder.vx\" goto filter_FWD_polder\niifname \"polder0\" goto filter_FWD_polder";
    nft(worker, &firewalld(zones, ""));
    problem(worker, "no rule that accepts packets to pods");
    let policies = "oifname { \"polder0\", \"polder.vx\", \"polder.vx6\" } jump to_pods";
    nft(worker, &firewalld(zones, policies));
    assert_eq!(cut_off(&pods, Families::DUAL), Vec::<String>::new());
    wait_for_no_problem(worker);
    // A zone of a source precedes the zones of interfaces.
    let sources = format!("ip saddr 10.244.0.0/16 goto filter_FWD_public\n{zones}");
    nft(worker, &firewalld(&sources, policies));
    assert_ne!(cut_off(&pods, Families::V4), Vec::<String>::new());
    let text = problem(worker, "zone public of firewalld has the source 10.244.0.0/16");
    assert!(text.contains("`firewall-cmd --zone=public --remove-source=10.244.0.0/16`"), "{text}");
    nft(worker, &firewalld(zones, policies));
    wait_for_no_problem(worker);
}

/// Adds firewalld's reverse path filter for IPv6, `IPv6_rpfilter=yes`, as the nftables backend creates it.
fn filter_reverse_paths(worker: &Worker) {
    nft(
        worker,
        "table inet firewalld {\nchain filter_PREROUTING {\n\
         type filter hook prerouting priority filter + 10; policy accept;\n\
         icmpv6 type { nd-router-advert, nd-neighbor-solicit } accept\n\
         meta nfproto ipv6 fib saddr . mark . iif oif missing drop\n}\n}\n",
    );
}

/// Adds the same filter as the iptables backend creates it.
fn filter_reverse_paths_with_iptables(worker: &Worker) {
    worker.node.shell(
        "ip6tables -t mangle -N PREROUTING_ZONES; \
         ip6tables -t mangle -A PREROUTING -p ipv6-icmp -m icmp6 --icmpv6-type 134 -j ACCEPT; \
         ip6tables -t mangle -A PREROUTING -p ipv6-icmp -m icmp6 --icmpv6-type 135 -j ACCEPT; \
         ip6tables -t mangle -A PREROUTING -m rpfilter --validmark --invert -j DROP; \
         ip6tables -t mangle -A PREROUTING -j PREROUTING_ZONES",
    );
}

#[test]
fn reverse_path_filters_that_keep_two_nodes_on_the_tunnel_are_reported_by_both() {
    let (lab, pods) = lab("");
    let (first, second) = (&lab.workers[0], &lab.workers[1]);
    let wait_for_paths = |ipv4: &str, ipv6: &str| {
        for (worker, other) in [(first, "n2"), (second, "n1")] {
            wait::until_true(&format!("{ipv4} and {ipv6} paths to {other}"), || {
                worker.path_to(other, "ipv4") == ipv4 && worker.path_to(other, "ipv6") == ipv6
            });
        }
    };
    first.ctl(&["cluster", "set", "--backend", "vxlan"]);
    wait_for_paths("vxlan", "vxlan");
    filter_reverse_paths(first);
    filter_reverse_paths_with_iptables(second);
    first.ctl(&["cluster", "set", "--backend", "auto"]);
    wait_for_paths("direct", "vxlan");
    for worker in [first, second] {
        let text = problem(worker, "a reverse path filter in chain");
        assert!(text.contains("IPv6_rpfilter=no"), "{text}");
        problem(worker, "a reverse path filter or rp_filter, correct that first");
    }
    assert_eq!(cut_off(&pods, Families::DUAL), Vec::<String>::new());
    wait_for_paths("direct", "vxlan");
    first.node.shell("nft delete table inet firewalld");
    second.node.shell("ip6tables -t mangle -F");
    wait_for_paths("direct", "direct");
    wait_for_no_problem(first);
    wait_for_no_problem(second);
}

#[test]
fn a_filter_that_drops_tunnel_packets_is_reported_with_a_working_command() {
    let (lab, pods) = lab("");
    let worker = &lab.workers[2];
    nft(
        worker,
        "table inet mine {\nchain in {\ntype filter hook input priority 0; policy drop;\n\
         iifname { \"lo\", \"polder0\", \"polder.vx\", \"polder.vx6\" } accept\n\
         meta l4proto { icmp, ipv6-icmp, tcp } accept\n}\n}\n",
    );
    let text = problem(worker, "chain in of table inet mine");
    assert_eq!(
        cut_off(&pods, Families::V4).len(),
        4,
        "the filter drops all tunnel packets to the third node"
    );
    worker.node.shell(commands(&text)[0]);
    wait_for_no_problem(worker);
    assert_eq!(cut_off(&pods, Families::DUAL), Vec::<String>::new());
    // The input chain is reported only while no peer answers. A second filter is added as a marker: when it is
    // reported, a new check has run, and must not report the input chain any more.
    nft(
        worker,
        "table inet later {\nchain ahead {\ntype filter hook forward priority 0; policy drop;\n}\n}\n",
    );
    problem(worker, "chain ahead of table inet later");
    let messages = texts(&worker.status());
    assert!(!messages.iter().any(|text| text.contains("chain in of table inet mine")), "{messages:?}");
}

#[test]
fn interface_managers_are_reported_until_they_ignore_polders_interfaces() {
    let mut lab = Lab::build(Topology::one_segment(1));
    lab.workers[0].configure_also("resync_seconds = 1");
    lab.start_agents();
    let worker = &lab.workers[0];
    assert_eq!(texts(&worker.status()), Vec::<String>::new());
    // Files that the managers create there while they run.
    worker.node.write("/run/systemd/netif/state", "OPER_STATE=routable\n");
    worker.node.write("/run/NetworkManager/no-stub-resolv.conf", "");
    let shipped = concat!(env!("CARGO_MANIFEST_DIR"), "/..");
    for words in
        ["systemd-networkd is running and no .network", "deletes foreign routes", "NetworkManager is running"]
    {
        let text = problem(worker, words);
        // Follows the remedy in the text: copies the file into the folder.
        let file = text.split(' ').find(|word| word.starts_with("deploy/host/")).unwrap();
        let folder = text.split([' ', ',']).find(|word| word.starts_with("/etc/")).unwrap();
        worker.node.shell(&format!("mkdir -p {folder} && cp {shipped}/{file} {folder}/"));
        worker.wait_for_status(&format!("no problem that contains {words:?}"), |status| {
            (!texts(status).iter().any(|text| text.contains(words))).then_some(())
        });
    }
    wait_for_no_problem(worker);
    assert!(worker.log().contains("resolved: NetworkManager is running"), "{}", worker.log());
}

/// Starts systemd-networkd. Returns when it has configured the node's uplink.
fn networkd(worker: &Worker, log: &str) -> Process {
    let mut command = worker.node.command("/lib/systemd/systemd-networkd");
    let networkd = worker.node.spawn(command.env("SYSTEMD_LOG_LEVEL", "debug"), log);
    wait::until("networkd to have set up the uplink", || {
        let message = worker.node.log(log);
        if message.contains("eth0: State changed: configuring -> configured") { Ok(()) } else { Err(message) }
    });
    networkd
}

/// A `.network` file for interfaces of that name; `keep` is the value of `KeepConfiguration=`.
fn file_for(name: &str, keep: &str, address: &str) -> String {
    format!("[Match]\nName={name}\n[Network]\nKeepConfiguration={keep}\nAddress={address}\n")
}

/// Writes the files for networkd: one for the uplink, one for all interfaces, as in many images, and the files that
/// Polder ships. The first two set `KeepConfiguration=`, because its default depends on the host.
fn configure_networkd(worker: &Worker, uplink: &str) {
    worker.node.shell(
        "install -d -o systemd-network -g systemd-network /run/systemd/netif /run/systemd/netif/links \
         /run/systemd/netif/leases",
    );
    let folder = "/etc/systemd/network";
    worker.node.write(&format!("{folder}/10-uplink.network"), uplink);
    worker.node.write(&format!("{folder}/50-all.network"), &file_for("*", "no", "192.0.2.6/24"));
    let shipped = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/host/systemd");
    worker.node.shell(&format!("cp -r {shipped}/* /etc/systemd/"));
}

#[test]
fn networkd_with_udev_keeps_polders_neighbour_entries_and_next_hops() {
    let (lab, pods) = lab("");
    let worker = &lab.workers[0];
    let uplink = worker.node.run("ip", &["-o", "-br", "address", "show", "dev", "eth0", "scope", "global"]);
    let addresses = uplink.split_whitespace().skip(2).collect::<Vec<_>>().join("\nAddress=");
    configure_networkd(worker, &file_for("eth0", "no", &addresses));
    let _udev = worker.node.spawn(&mut worker.node.command("/lib/systemd/systemd-udevd"), "udev");
    wait::until_true("udev to know the interfaces", || {
        worker
            .node
            .shell("udevadm trigger --subsystem-match=net --action=add; udevadm settle; ls /run/udev/data")
            // udev's files for network interfaces begin with "n", e.g. n2.
            .contains('n')
    });
    // networkd deletes these on an uplink that it manages, even with `ManageForeignRoutes=no`.
    worker.node.shell(
        "ip neighbour add 10.10.1.77 lladdr 02:00:00:00:00:77 nud permanent dev eth0; \
         ip nexthop add id 77 via 10.10.1.77 dev eth0; ip route add 198.51.100.0/24 nhid 77",
    );
    without_packet_loss(&pods, || networkd(worker, "networkd").kill());
    let left = worker
        .node
        .shell("ip neighbour show nud permanent dev eth0; ip nexthop; ip route show 198.51.100.0/24");
    assert_eq!(left, "", "{}", worker.node.log("networkd"));
    assert_eq!(worker.status()["repairs"], serde_json::json!([]), "{}", worker.node.log("networkd"));
    wait_for_no_problem(worker);
}

#[test]
fn networkd_ignores_polders_interfaces_only_with_the_shipped_files() {
    let (lab, pods) = lab("");
    let worker = &lab.workers[0];
    // networkd waits for udev unless /sys is read-only, as in a container. This test has no udev, so /sys is made
    // read-only.
    worker.node.shell("mount -o remount,bind,ro /sys");
    configure_networkd(worker, &file_for("eth0", "yes", "192.0.2.5/24"));
    without_packet_loss(&pods, || networkd(worker, "networkd").kill());
    assert_eq!(worker.status()["repairs"], serde_json::json!([]), "{}", worker.node.log("networkd"));
    wait_for_no_problem(worker);

    worker.node.shell("rm /etc/systemd/network/00-polder.network");
    // networkd may be stopped before the repair is recorded: try again.
    let mut attempts = 0;
    wait::until("the repair of networkd's changes", || {
        attempts += 1;
        let networkd = networkd(worker, &format!("networkd-{attempts}"));
        let repairs = worker.status()["repairs"].clone();
        networkd.kill();
        let is_repair_of_networkd = |repair: &Value| repair["changes"].to_string().contains("192.0.2.6");
        let is_repaired = repairs.as_array().unwrap().iter().any(is_repair_of_networkd);
        if is_repaired { Ok(()) } else { Err(repairs.to_string()) }
    });
    problem(worker, "systemd-networkd is running and no .network");
    // The repair of networkd's last changes may still be in progress.
    wait::until("all pods to reach each other again", || match cut_off(&pods, Families::DUAL) {
        cut if cut.is_empty() => Ok(()),
        cut => Err(format!("{cut:?}")),
    });
}
