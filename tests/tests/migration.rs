//! The migration of a cluster from flannel, with the commands of docs/migrate.md.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

mod migration {
    pub(crate) mod page;
}

use std::collections::BTreeSet;
use std::slice;

use polder_tests::agent::{CNI_PLUGINS, Worker};
use polder_tests::fabric::Families;
use polder_tests::flannel::{self, CONFIGURATIONS, end_pod, run_pod};
use polder_tests::matrix::{Pair, listen, pairs};
use polder_tests::probe::{self, Echo, PORT, Stream};
use polder_tests::runtime::{ContainerdRelease, Runtime};
use polder_tests::{Lab, Pod, Topology, wait};
use serde_json::Value;

use migration::page::{
    DELETE, DELETE_LEFT, DIRECT, FORGET, MUST_BE_EMPTY, ONE_LINK, PREPARE, SWITCH, SWITCH_BACK, UNPREPARE,
    block, ctl, page, run,
};

/// Nodes with flannel, and with the agents configured as on the page. The agents do not run yet.
fn lab(topology: Topology) -> Lab {
    let lab = Lab::build(Topology { pools: vec!["10.245.0.0/16"], ..topology });
    for worker in &lab.workers {
        worker.node.shell(&format!("mount -t tmpfs tmpfs /opt; mkdir -p {CONFIGURATIONS}"));
        let configuration = worker.configuration().replace("/run/cni/net.d", CONFIGURATIONS);
        let (before, _) = configuration.split_once("[bootstrap]").unwrap();
        worker.configure(&format!(
            "resync_seconds = 1\n{before}\n{}\n[ipam]\ngrace_seconds = 5\n",
            block("the same in the agent's configuration:")
        ));
    }
    flannel::set_up(&lab);
    lab
}

/// Starts the agents, and waits until they are ready and know each other.
fn start_agents(lab: &mut Lab) {
    lab.workers.iter_mut().for_each(Worker::start);
    wait_until_ready(lab);
}

/// Waits until the nodes are ready and know each other.
fn wait_until_ready(lab: &Lab) {
    for worker in &lab.workers {
        worker.wait_for_status("readiness", |status| (status["ready"] == true).then_some(()));
        for peer in lab.workers.iter().filter(|peer| peer.name() != worker.name()) {
            wait::until_true("a path", || worker.has_path_to(peer.name(), "ipv4"));
        }
    }
}

/// The problems that `status` reports, if the agent answers.
fn problems(worker: &Worker) -> Result<Vec<String>, String> {
    let status = worker.try_status()?;
    let problems = status["problems"].as_array().into_iter().flatten().filter_map(Value::as_str);
    Ok(problems.map(str::to_owned).collect())
}

/// Waits until the problems that `status` reports are the expected one, or none.
fn wait_for_problems(worker: &Worker, expected: Option<&str>) {
    wait::until(&format!("{expected:?} on {}", worker.name()), || {
        let found = problems(worker)?;
        let is_expected = found.len() == usize::from(expected.is_some())
            && expected.is_none_or(|words| found[0].contains(words));
        if is_expected { Ok(()) } else { Err(format!("{found:?}")) }
    });
}

/// The problem of a node that is not moved yet, as the page names it.
fn not_moved() -> &'static str {
    let problem = "the container runtime may use /etc/cni/net.d/10-flannel.conflist instead of \
                   /etc/cni/net.d/99-polder.conflist";
    assert!(page().replace('\n', " ").contains(problem));
    problem
}

fn is_flannels(pod: &Pod) -> bool {
    pod.v4().to_string().starts_with("10.244.")
}

fn is_polders(pod: &Pod) -> bool {
    pod.v4().to_string().starts_with("10.245.")
}

/// Sends between the pairs during the action. No packet may be lost.
fn none_lost<T>(pairs: &[(&Pod, &Pod)], action: impl FnOnce() -> T) -> T {
    let receivers: BTreeSet<_> = pairs.iter().map(|(_, to)| to.v4()).collect();
    let pod_of = |address| pairs.iter().map(|(_, to)| to).find(|to| to.v4() == address).unwrap();
    let _servers: Vec<Echo> =
        receivers.into_iter().map(|address| pod_of(address).within(|| Echo::start(address))).collect();
    let streams = pairs.iter().map(|(from, to)| from.within(|| Stream::start(from.v4(), to.v4()))).collect();
    let outcome = action();
    for ((from, to), (sent, received)) in pairs.iter().zip(Stream::finish(streams)) {
        println!("{} to {}: {sent} sent, {received} received", from.name(), to.name());
        assert_eq!(received, sent, "packets from {} to {} were lost", from.name(), to.name());
    }
    outcome
}

/// Checks that all pods reach each other. Returns the pairs whose receiver does not see the sender's own address, with
/// the address that it sees.
fn translated(pods: &[Pod]) -> Vec<(String, String, String)> {
    let _servers = listen(pods);
    let (mut translated, mut problems) = (Vec::new(), Vec::new());
    for pair in pairs(pods, Families::V4) {
        let Pair { from, to, .. } = pair;
        match pair.measure(1450) {
            Err(error) => problems.push(format!("{pair}: {error}")),
            Ok(seen) if seen.sources == BTreeSet::from([from.v4()]) => {}
            Ok(seen) => {
                let sources: Vec<_> = seen.sources.iter().map(ToString::to_string).collect();
                translated.push((from.name().to_owned(), to.name().to_owned(), sources.join(", ")));
            }
        }
    }
    assert!(problems.is_empty(), "{problems:#?}");
    translated
}

/// Checks that all pods reach each other, and that the receiver sees the sender's own address, except for the pairs that
/// the page names.
fn assert_all_reach(lab: &Lab, pods: &[Pod]) {
    let is_behind_router = |pod: &Pod| pod.node() == "n3";
    let address_of_node = |pair: &Pair<'_>| {
        let Pair { from, to, .. } = *pair;
        let number: usize = from.node()[1..].parse().unwrap();
        match (is_flannels(from), is_flannels(to)) {
            (true, false) if is_behind_router(from) != is_behind_router(to) => {
                let address = "ip -o -4 address show dev polder0 | sed 's|.* inet \\([^/]*\\)/.*|\\1|'";
                Some(lab.workers[number - 1].node.shell(address).trim().to_owned())
            }
            (false, true) if from.node() != to.node() => Some(format!("10.244.{number}.0")),
            _ => None,
        }
    };
    let pairs = pairs(pods, Families::V4);
    let expected = pairs.iter().filter_map(|pair| {
        Some((pair.from.name().to_owned(), pair.to.name().to_owned(), address_of_node(pair)?))
    });
    assert_eq!(translated(pods), expected.collect::<Vec<_>>());
}

/// Checks that a pod reaches another pod of its node through a Service, as kube-proxy implements it.
fn assert_service_works(worker: &Worker, client: &Pod, server: &Pod) {
    let own = server.v4();
    let rule = format!("PREROUTING -d 10.96.0.1 -p tcp --dport 80 -j DNAT --to-destination {own}:{PORT}");
    worker.node.shell(&format!("iptables -w -t nat -A {rule}"));
    {
        let _echo = server.within(|| Echo::start(own));
        let seen = client.within(|| probe::tcp_at("10.96.0.1".parse().unwrap(), 80, 100_000));
        assert_eq!(seen, Ok(client.v4()), "{} to {} of {}", client.name(), server.name(), worker.name());
    }
    worker.node.shell(&format!("iptables -w -t nat -D {rule}"));
}

/// Two nodes on a link and one behind a router after steps 1 and 2, and two pods of flannel on each node.
fn side_by_side() -> (Lab, Vec<Pod>) {
    let mut lab = lab(Topology::two_segments());
    let pods: Vec<Pod> = lab
        .workers
        .iter()
        .flat_map(|worker| ["a", "b"].map(|name| run_pod(worker, &format!("{}-{name}", worker.name()), None)))
        .collect();
    assert!(pods.iter().all(is_flannels));
    let [first, neighbour, other, _, third, _] = &pods[..] else { panic!("six pods") };
    none_lost(&[(first, neighbour), (first, other), (first, third), (third, first), (third, other)], || {
        for worker in &lab.workers {
            run(worker, PREPARE);
            // A second run changes nothing.
            let rules = worker.node.shell("iptables-save -t nat | grep -v '^#'");
            worker.node.shell("/etc/polder/beside-flannel");
            assert_eq!(worker.node.shell("iptables-save -t nat | grep -v '^#'"), rules);
        }
        start_agents(&mut lab);
        lab.workers.iter().for_each(|worker| wait_for_problems(worker, Some(not_moved())));
    });
    (lab, pods)
}

#[test]
fn flannel_goes_on_beside_polder_and_without_it_again() {
    let (mut lab, pods) = side_by_side();
    assert_all_reach(&lab, &pods);
    for (worker, pair) in lab.workers.iter().zip(pods.chunks(2)) {
        // The agent switches br_netfilter off for all bridges, but not for this one.
        let calls = worker.node.shell("cat /proc/sys/net/bridge/bridge-nf-call-iptables");
        assert_eq!(calls.trim(), "0");
        assert_service_works(worker, &pair[0], &pair[1]);
        // Pods still use flannel.
        let pod = run_pod(worker, "new", None);
        assert!(is_flannels(&pod));
        end_pod(worker, &pod);
    }
    // The rollback of step 2, and of step 1.
    let pairs = [(&pods[0], &pods[1]), (&pods[0], &pods[2]), (&pods[4], &pods[0])];
    none_lost(&pairs, || {
        for worker in &mut lab.workers {
            assert!(worker.stop());
            worker.ctl(&["uninstall"]);
            run(worker, UNPREPARE);
        }
    });
    for (worker, pair) in lab.workers.iter().zip(pods.chunks(2)) {
        let files = worker.node.shell(&format!("ls {CONFIGURATIONS}"));
        assert_eq!(files.trim(), "10-flannel.conflist");
        let left = worker.node.shell("ip link; ip route; iptables-save; nft list ruleset");
        assert!(!left.contains("polder") && !left.contains("10.245."), "{left}");
        assert_service_works(worker, &pair[0], &pair[1]);
    }
    assert_all_reach(&lab, &pods);
}

/// Deletes what flannel's pods left. Repeated, because the kernel deletes the interfaces of ended pods some time later.
fn delete_left(worker: &Worker) {
    wait::until("flannel's last pod to be gone", || match run(worker, DELETE_LEFT) {
        refusal if refusal.is_empty() => Ok(()),
        refusal => Err(refusal),
    });
}

/// Moves a node: its pods end, except for that of a DaemonSet, which ends after the switch. Returns the pod that replaces
/// it, and another new pod.
fn move_node(worker: &Worker, pods: &[Pod]) -> [Pod; 2] {
    let [drained, of_daemonset] = pods else { panic!("two pods") };
    end_pod(worker, drained);
    run(worker, SWITCH);
    end_pod(worker, of_daemonset);
    delete_left(worker);
    // flannel starts again, and writes its file.
    flannel::write_configuration(worker, worker.name()[1..].parse().unwrap());
    let new = ["x", "y"].map(|name| run_pod(worker, &format!("{}-{name}", worker.name()), None));
    assert!(new.iter().all(is_polders));
    wait_for_problems(worker, None);
    new
}

#[test]
fn a_cluster_moves_from_flannel_to_polder_node_by_node_and_loses_no_packet() {
    let (lab, pods) = side_by_side();
    let [n1, n2, n3] = &lab.workers[..] else { panic!("three nodes") };
    let [flannel1, flannel2, flannel3] = [&pods[0..2], &pods[2..4], &pods[4..6]];

    // The first node is moved. A pod of each network on that node meanwhile.
    let others = [(&flannel2[0], &flannel2[1]), (&flannel2[0], &flannel3[0]), (&flannel3[0], &flannel2[1])];
    let mixed = none_lost(&others, || {
        end_pod(n1, &flannel1[0]);
        run(n1, SWITCH);
        run_pod(n1, "n1-early", None)
    });
    assert!(is_polders(&mixed));
    assert!(run(n1, DELETE_LEFT).contains("a pod of flannel is left"));
    assert_all_reach(&lab, &[slice::from_ref(&mixed), &pods[1..]].concat());
    assert_service_works(n1, &mixed, &flannel1[1]);
    assert_service_works(n1, &flannel1[1], &mixed);

    // Rollback of that node.
    none_lost(&others, || {
        end_pod(n1, &mixed);
        run(n1, SWITCH_BACK);
    });
    wait_for_problems(n1, Some(not_moved()));
    let back = run_pod(n1, "n1-back", None);
    assert!(is_flannels(&back));
    assert_all_reach(&lab, &[slice::from_ref(&back), &pods[1..]].concat());

    // One node after the other.
    let polder1 = none_lost(&others, || move_node(n1, &[back, flannel1[1].clone()]));
    assert_all_reach(&lab, &[&polder1, flannel2, flannel3].concat());
    let others = [
        (&polder1[0], &polder1[1]),
        (&polder1[0], &flannel3[0]),
        (&flannel3[0], &polder1[0]),
        (&flannel3[0], &flannel3[1]),
    ];
    let polder2 = none_lost(&others, || move_node(n2, flannel2));
    assert_all_reach(&lab, &[&polder1, &polder2, flannel3].concat());
    let others = [(&polder1[0], &polder2[0]), (&polder2[0], &polder1[0])];
    let polder3 = none_lost(&others, || move_node(n3, flannel3));

    // Without flannel.
    let all = [polder1, polder2, polder3].concat();
    let others = [(&all[0], &all[1]), (&all[0], &all[2]), (&all[0], &all[4]), (&all[4], &all[2])];
    none_lost(&others, || {
        for worker in &lab.workers {
            assert_eq!(run(worker, MUST_BE_EMPTY), "");
            run(worker, DELETE);
            assert!(is_polders(&run_pod(worker, "after", None)));
        }
        ctl(n1, FORGET);
    });
    assert_all_reach(&lab, &all);
    for worker in &lab.workers {
        let left = worker.node.shell(&format!(
            "ip link; ip route; ip neighbour; iptables-save; ls -R {CONFIGURATIONS} /run /var/lib/cni /etc/polder \
             /etc/systemd/system /opt | grep -v '^/run/netns'"
        ));
        assert!(!left.contains("flannel") && !left.contains("cni0") && !left.contains("10.244."), "{left}");
        let files = worker.node.shell(&format!("ls {CONFIGURATIONS}"));
        assert_eq!(files.trim(), "99-polder.conflist");
        wait_for_problems(worker, None);
    }
    assert_eq!(n1.ctl(&["cluster", "show"])["masquerade_except"], serde_json::json!([]));
    let (is_clean, found) = n1.ctl_verdict(&["ipam", "check"]);
    assert!(is_clean, "{found}");
}

#[test]
fn on_one_link_pods_of_both_networks_reach_each_other_without_nat() {
    let mut lab = lab(Topology::one_segment(2));
    lab.workers.iter().for_each(|worker| drop(run(worker, PREPARE)));
    start_agents(&mut lab);
    let flannels = lab.workers.iter().map(|worker| run_pod(worker, &format!("{}-a", worker.name()), None));
    let flannels: Vec<Pod> = flannels.collect();
    lab.workers.iter().for_each(|worker| drop(run(worker, SWITCH)));
    let polders = lab.workers.iter().map(|worker| run_pod(worker, &format!("{}-x", worker.name()), None));
    let all: Vec<Pod> = flannels.iter().cloned().chain(polders).collect();
    assert_all_reach(&lab, &all);
    none_lost(&[(&all[0], &all[1]), (&all[2], &all[1]), (&all[0], &all[3])], || {
        ctl(&lab.workers[0], DIRECT);
        lab.workers.iter().for_each(|worker| drop(run(worker, ONE_LINK)));
    });
    assert_eq!(translated(&all), []);
    // The bridge was there before its first pod, as after a boot.
    assert_service_works(&lab.workers[0], &run_pod_of_flannel(&lab.workers[0]), &all[0]);
    // Strict filters on the way are loosened when the node boots.
    for worker in &lab.workers {
        worker.node.shell(
            "for name in eth0 flannel.1 cni0; do echo 1 > /proc/sys/net/ipv4/conf/$name/rp_filter; done",
        );
    }
    let server = &all[3];
    let lost = {
        let _echo = server.within(|| Echo::start(server.v4()));
        all[0].within(|| probe::udp(all[0].v4(), server.v4(), 100))
    };
    assert!(lost.is_err(), "strict filters do no harm: they need not be loosened");
    lab.workers.iter().for_each(|worker| drop(worker.node.shell("/etc/polder/beside-flannel")));
    assert_eq!(translated(&all), []);
}

#[test]
fn nodes_keep_their_networks_over_a_reboot_in_the_middle_of_the_migration() {
    let (mut lab, pods) = side_by_side();
    pods[0..2].iter().for_each(|pod| end_pod(&lab.workers[0], pod));
    run(&lab.workers[0], SWITCH);
    // The first node is moved, the third one is not.
    let runs = [(0, "n1"), (2, "n3")].map(|(number, name)| {
        lab.reboot(number);
        // As the service does it, before flannel and before the agent.
        lab.workers[number].node.shell("/etc/polder/beside-flannel");
        flannel::set_up_node(&lab, number + 1);
        lab.workers[number].start();
        (number, name)
    });
    wait_until_ready(&lab);
    // For some time after a boot, the tunnel is used instead of the direct path.
    let [n1, n2, _] = &lab.workers[..] else { panic!("three nodes") };
    wait::within(wait::TIMEOUT * 3, "direct paths", || {
        let paths = [n1.path_to("n2", "ipv4"), n2.path_to("n1", "ipv4")];
        if paths == ["direct", "direct"] { Ok(()) } else { Err(paths.join(", ")) }
    });
    let new = runs.map(|(number, name)| {
        ["x", "y"].map(|pod| run_pod(&lab.workers[number], &format!("{name}-{pod}"), None))
    });
    assert!(new[0].iter().all(is_polders) && new[1].iter().all(is_flannels));
    wait_for_problems(&lab.workers[0], None);
    assert_service_works(&lab.workers[2], &new[1][0], &new[1][1]);
    assert_all_reach(&lab, &[&new[0], &pods[2..4], &new[1]].concat());
}

/// Runs another pod of flannel on a node that is switched to Polder.
fn run_pod_of_flannel(worker: &Worker) -> Pod {
    run(worker, SWITCH_BACK);
    let pod = run_pod(worker, "again", None);
    run(worker, SWITCH);
    assert!(is_flannels(&pod));
    pod
}

#[test]
fn a_filter_that_only_flannels_rules_pass_is_reported_before_a_node_is_moved() {
    let mut lab = lab(Topology::one_segment(2));
    for worker in &lab.workers {
        worker.node.shell("iptables -w -P FORWARD DROP");
        run(worker, PREPARE);
    }
    lab.workers.iter_mut().for_each(Worker::start);
    for worker in &lab.workers {
        let text = wait::until("the filter to be reported", || {
            let found = problems(worker)?;
            found.iter().find(|text| text.contains("FORWARD")).cloned().ok_or(format!("{found:?}"))
        });
        text.split('`').skip(1).step_by(2).for_each(|command| drop(worker.node.shell(command)));
    }
    wait_until_ready(&lab);
    lab.workers.iter().for_each(|worker| wait_for_problems(worker, Some(not_moved())));
    let pod = |worker: &Worker, name| run_pod(worker, &format!("{}-{name}", worker.name()), None);
    let flannels: Vec<Pod> = lab.workers.iter().map(|worker| pod(worker, "a")).collect();
    lab.workers.iter().for_each(|worker| drop(run(worker, SWITCH)));
    let polders = lab.workers.iter().map(|worker| pod(worker, "x"));
    assert_all_reach(&lab, &flannels.into_iter().chain(polders).collect::<Vec<_>>());
}

#[test]
fn a_host_port_moves_with_its_daemonset_in_both_directions() {
    let (lab, pods) = side_by_side();
    let (worker, client) = (&lab.workers[0], &lab.workers[1]);
    let seen = |pod: &Pod| {
        let _echo = pod.within(|| Echo::start(pod.v4()));
        client.node.within(|| probe::tcp_at(lab.underlay(0, false), 8081, 1000))
    };
    let before = run_pod(worker, "n1-ds1", Some(8081));
    assert_eq!(seen(&before), Ok(lab.underlay(1, false)));
    for pod in &pods[0..2] {
        end_pod(worker, pod);
    }
    run(worker, SWITCH);
    end_pod(worker, &before);
    let moved = run_pod(worker, "n1-ds2", Some(8081));
    assert!(
        seen(&moved).is_err(),
        "portmap's rule for the ended pod takes the port: the next block is of no use"
    );
    delete_left(worker);
    assert_eq!(seen(&moved), Ok(lab.underlay(1, false)));
    assert_eq!(worker.node.shell("ls /var/lib/cni/networks/cbr0 | grep -c ^10.244 || true").trim(), "0");
    run(worker, SWITCH_BACK);
    end_pod(worker, &moved);
    let back = run_pod(worker, "n1-ds3", Some(8081));
    assert!(is_flannels(&back));
    assert_eq!(seen(&back), Ok(lab.underlay(1, false)));
    worker.wait_for_status("the address of the former pod to be released", |status| {
        (status["pods"] == 0).then_some(())
    });
}

#[test]
fn containerd_follows_the_link_in_both_directions() {
    let mut lab = lab(Topology::one_segment(1));
    // The lab's containerd reads another folder.
    let folders = "mkdir -p /run/cni/net.d /run/cni/bin; mount --bind /run/cni/net.d /etc/cni/net.d";
    let plugins = format!("cd {CNI_PLUGINS} && ln -s $PWD/bridge $PWD/host-local $PWD/portmap /run/cni/bin/");
    lab.workers[0].node.shell(&format!("{folders}; {plugins}"));
    flannel::write_configuration(&lab.workers[0], 1);
    start_agents(&mut lab);
    let worker = &lab.workers[0];
    let runtime = Runtime::start(worker, &ContainerdRelease::Installed);
    let next_pod = |range: &str| {
        wait::until(&format!("a pod with an address of {range}"), || {
            let pod = runtime.run_pod(&format!("pod-{}", runtime.next_attempt()));
            if pod.addresses[0].starts_with(range) {
                return Ok(pod);
            }
            runtime.remove_pod(&pod);
            Err(pod.addresses[0].clone())
        })
    };
    let [of_flannel, moved_later] = [next_pod("10.244."), next_pod("10.244.")];
    run(worker, SWITCH);
    let of_polder = next_pod("10.245.");
    // Pods of flannel end after the switch, and a pod of Polder after the rollback.
    runtime.remove_pod(&of_flannel);
    assert!(run(worker, DELETE_LEFT).contains("a pod of flannel is left"));
    runtime.remove_pod(&moved_later);
    delete_left(worker);
    run(worker, SWITCH_BACK);
    let again = next_pod("10.244.");
    runtime.remove_pod(&of_polder);
    runtime.remove_pod(&again);
    assert_eq!(runtime.network_problem(), None);
}

#[test]
fn the_settings_for_helm_are_those_of_the_agents_configuration() {
    let values: Value = serde_saphyr::from_str(&block("in addition to those of your etcd:")).unwrap();
    let configuration = block("the same in the agent's configuration:");
    let bootstrap = &values["bootstrap"];
    let expected = format!(
        "{}\n[bootstrap]\npools = {}\nmasquerade_except = {}\n\n[bootstrap.vxlan]\nvni = {}\nport = {}\n",
        values["extraConfig"].as_str().unwrap(),
        bootstrap["pools"],
        bootstrap["masqueradeExcept"],
        bootstrap["vxlan"]["vni"],
        bootstrap["vxlan"]["port"],
    );
    assert_eq!(configuration, expected);
}
