//! Operator actions on a node: the plan of the next changes, and the removal of everything.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use polder_tests::agent::Worker;
use polder_tests::fabric::Families;
use polder_tests::kernel_state::{assert_unchanged, kernel_state};
use polder_tests::matrix::assert_flat;
use polder_tests::routes::wait_for_routes;
use polder_tests::wait::TIMEOUT;
use polder_tests::{Lab, Pod, Topology};
use serde_json::{Value, json};

/// All files of Polder: state, runtime files and CNI configuration.
fn files(worker: &Worker) -> String {
    worker.node.shell("find /var/lib/polder /run/polder /run/cni/net.d -mindepth 1 2>/dev/null || true")
}

#[test]
fn an_uninstall_leaves_the_kernel_and_the_folders_as_they_were_before_the_agent() {
    let mut lab = Lab::build(Topology::two_segments().families(Families::DUAL));
    // The kernel changes these settings together with forwarding.
    lab.workers[1].node.shell(
        "echo 0 > /proc/sys/net/ipv4/conf/all/accept_redirects; echo 1 > /proc/sys/net/ipv6/conf/eth0/forwarding; \
         echo 1 > /proc/sys/net/ipv4/conf/eth0/forwarding",
    );
    let before: Vec<_> = lab.workers.iter().map(|worker| (kernel_state(worker), files(worker))).collect();
    lab.start_agents();
    let pods: Vec<Pod> = lab.workers.iter().map(|worker| worker.pod("a")).collect();
    assert_flat(&pods, 1450);
    // A route with Polder's protocol number, and a bridge with another name, are removed too.
    lab.workers[0]
        .node
        .shell("ip route add blackhole 198.51.100.0/24 proto 84; ip link set polder0 name other");

    let error = lab.workers[0].try_ctl(&["uninstall"]).unwrap_err();
    assert!(error.contains("stop the agent first"), "{error}");
    lab.workers.iter_mut().for_each(|worker| assert!(worker.stop()));
    let error = lab.workers[0].try_ctl(&["uninstall"]).unwrap_err();
    assert!(error.contains("1 pods are attached") && error.contains("--with-pods"), "{error}");
    assert_ne!(files(&lab.workers[0]), before[0].1, "nothing is half done");
    // Temporary files of an agent that was killed during a write.
    lab.workers[0].node.shell("touch /var/lib/polder/cluster.new /run/cni/net.d/.10-polder.conflist.new");
    for (worker, (kernel, files_before)) in lab.workers.iter().zip(&before) {
        let message = worker.ctl(&["uninstall", "--with-pods"]).to_string();
        assert!(message.contains(&format!("polderctl node remove {} --dead", worker.name())), "{message}");
        assert_unchanged(worker, kernel);
        assert_eq!(files(worker), *files_before);
        assert_eq!(worker.ctl(&["uninstall"]), json!([]), "the second time there is nothing to do");
    }

    // After the uninstall the machine joins again like a new node.
    lab.start_agents();
    let pods: Vec<Pod> = lab.workers.iter().map(|worker| worker.pod("again")).collect();
    // The earlier addresses are in cool-down, so the nodes use other ones.
    wait_for_routes(&lab, TIMEOUT);
    assert_flat(&pods, 1450);
}

#[test]
fn an_uninstall_detects_a_running_agent_with_other_folders() {
    let mut lab = Lab::build(Topology::one_segment(1));
    let worker = &mut lab.workers[0];
    worker.configure(&format!("state_dir = \"/var/lib/elsewhere\"\n{}", worker.configuration()));
    worker.start_and_wait();
    let uninstall = ["uninstall", "--config", "/dev/null", "--cni-conf-dir", "/run/cni/net.d"];
    let error = worker.try_ctl(&uninstall).unwrap_err();
    assert!(error.contains("/var/lib/polder") && error.contains("stop the agent first"), "{error}");
    worker.wait_until_ready();
    assert!(worker.stop());
    let arguments = [uninstall.as_slice(), &["--state-dir", "/var/lib/elsewhere", "--node", "n1"]].concat();
    let message = worker.ctl(&arguments).to_string();
    assert!(
        message.contains("/var/lib/elsewhere is deleted") && message.contains("node remove n1"),
        "{message}"
    );
    assert_eq!(worker.node.shell("find /var/lib/elsewhere 2>/dev/null || true"), "");
}

#[test]
fn an_uninstall_does_not_release_addresses_of_other_plugins_interfaces() {
    let mut lab = Lab::start(Topology::one_segment(1));
    let worker = &mut lab.workers[0];
    let netns = worker.namespace("leased");
    let conf = json!({ "cniVersion": "1.1.0", "name": "other", "type": "bridge", "ipam": { "type": "polder-ipam" } });
    let variables = [
        ("CNI_COMMAND", "ADD"),
        ("CNI_CONTAINERID", "leased"),
        ("CNI_NETNS", netns.as_str()),
        ("CNI_IFNAME", "eth0"),
        ("CNI_PATH", "/nowhere"),
    ];
    let added = worker.any_plugin("polder-ipam", &variables, &conf.to_string());
    assert!(added.status.success(), "{added:?}");
    assert!(worker.stop());
    let error = worker.try_ctl(&["uninstall"]).unwrap_err();
    assert!(error.contains("1 interfaces of another plugin"), "{error}");
    // Its pod is deleted while no agent runs.
    worker.node.shell("ip netns delete leased");
    let message = worker.ctl(&["uninstall"]).to_string();
    assert!(message.contains("is deleted"), "{message}");
}

#[test]
fn an_uninstall_succeeds_with_an_unreadable_ledger() {
    let mut lab = Lab::start(Topology::one_segment(1));
    let worker = &mut lab.workers[0];
    assert!(worker.stop());
    worker.node.shell("rm /var/lib/polder/ledger.db*; echo broken > /var/lib/polder/ledger.db");
    let error = worker.try_ctl(&["uninstall"]).unwrap_err();
    assert!(error.contains("ledger.db") && error.contains("--with-pods"), "{error}");
    let message = worker.ctl(&["uninstall", "--with-pods"]).to_string();
    assert!(message.contains("kernel settings are not restored"), "{message}");
    assert_eq!(files(worker), "");
    assert!(!worker.node.shell("ip link; nft list ruleset").contains("polder"));
}

#[test]
fn a_plan_lists_the_changes_of_the_next_pass_and_changes_nothing() {
    let mut lab = Lab::start(Topology::one_segment(1));
    let worker = &lab.workers[0];
    worker.wait_for_status("a pass that finds nothing", |status| {
        (status["last_pass"]["writes"] == 0).then_some(())
    });
    assert_eq!(worker.ctl(&["plan"]), json!([]));
    // A change that every pass attempts, and that fails.
    worker.node.shell(
        "echo 0 > /tmp/zero; mount --bind /tmp/zero /proc/sys/net/ipv4/ip_forward; \
         mount -o remount,ro,bind /proc/sys/net/ipv4/ip_forward",
    );
    let plan = || worker.ctl(&["plan"]);
    assert_eq!(plan(), json!(["set net/ipv4/ip_forward to 1 (now 0)"]));
    let written = |status: &Value| status["last_pass"]["written"].clone();
    let failed = worker.wait_for_status("the failure", |status| {
        status["reasons"].to_string().contains("set net/ipv4/ip_forward to 1").then(|| written(status))
    });
    assert_ne!(failed, json!(null));
    assert_eq!(plan(), json!(["set net/ipv4/ip_forward to 1 (now 0)"]));

    // An agent that leaves the kernel unchanged reports the reason.
    lab.etcd.kill();
    lab.workers[0].kill();
    lab.workers[0].node.shell("umount /proc/sys/net/ipv4/ip_forward; rm -r /var/lib/polder");
    lab.workers[0].start();
    lab.workers[0].wait_for_status("the socket", |_| Some(()));
    let error = lab.workers[0].try_ctl(&["plan"]).unwrap_err();
    assert!(error.contains("kernel state is left unchanged"), "{error}");
}
