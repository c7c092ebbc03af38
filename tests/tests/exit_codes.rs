//! Exit codes of `polderctl` and `polder-agent --check-config`: 0 success, 1 not carried out or no answer, 2 usage, 3 a
//! problem.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use polder_tests::agent::Worker;
use polder_tests::{Lab, Topology, wait};
use serde_json::{Value, json};

/// Runs `polderctl` with both output formats, which must end with the same code. Returns the code, and the output as a
/// table. Only for commands that can be repeated.
fn end(worker: &Worker, arguments: &[&str]) -> (i32, String) {
    let [(table, output), (json, _)] =
        [&[][..], &["-o", "json"]].map(|format| once(worker, &[arguments, format].concat()));
    assert_eq!(table, json, "{arguments:?} ends in another way with -o json: {output}");
    (table, output)
}

/// Runs `polderctl`. Returns its exit code and its output.
fn once(worker: &Worker, arguments: &[&str]) -> (i32, String) {
    let output = worker.program("polderctl", arguments);
    let text = [output.stdout, output.stderr].concat();
    (output.status.code().expect("an exit code"), String::from_utf8_lossy(&text).into_owned())
}

/// Each command must end with `code`, and its output must contain its words.
fn assert_ends(worker: &Worker, code: i32, commands: &[(&str, &str)]) {
    for (command, expected) in commands {
        let (ended, output) = end(worker, &command.split(' ').collect::<Vec<_>>());
        assert!(
            ended == code && output.contains(expected),
            "{command}: {ended} instead of {code}, {expected:?}: {output}"
        );
    }
}

/// Every command that sends a request to the agent.
const READING: [&str; 15] = [
    "live",
    "status",
    "plan",
    "node list",
    "node remove n9",
    "cluster show",
    "cluster set --backend auto",
    "pool list",
    "pool add more 10.250.0.0/24",
    "pool drain more",
    "pool remove more",
    "block list",
    "ipam show",
    "ipam check",
    "ipam release 10.244.0.9",
];

#[test]
fn commands_without_a_problem_exit_with_0() {
    let lab = Lab::start(Topology::one_segment(2));
    let worker = &lab.workers[0];
    let pod = worker.pod("a");
    wait::until_true("a status without problems", || once(worker, &["status"]).0 == 0);
    wait::until_true("a plan without changes", || once(worker, &["plan"]).0 == 0);
    wait::until_true("a check without deviations", || once(worker, &["ipam", "check"]).0 == 0);
    let show = format!("ipam show {}", pod.v4());
    assert_ends(
        worker,
        0,
        &[
            ("node list", "n2"),
            ("cluster set --backend auto", "auto"),
            ("pool list", "ipv4"),
            ("pool add more 10.250.0.0/24", "pool more is "),
            ("pool drain more", "pool more is drained"),
            ("block list", "owned"),
            ("ipam show", "ipv4"),
            ("ipam show node n2", "n2"),
            (&show, "polder/a/eth0"),
            ("--help", "3  a problem was found"),
            ("--version", "polderctl"),
        ],
    );
    assert_eq!(once(worker, &["pool", "remove", "more"]).0, 0);
    let gone = worker.pod("gone");
    worker.end_without_del(&gone);
    assert_ends(worker, 0, &[(&format!("ipam release {}", gone.v4()), "")]);
}

#[test]
fn commands_that_cannot_be_executed_exit_with_1() {
    let lab = Lab::start(Topology::one_segment(1));
    let worker = &lab.workers[0];
    let pod = worker.pod("a");
    assert_ends(
        worker,
        1,
        &[
            ("pool remove nope", "there is no pool nope"),
            ("pool drain nope", "there is no pool nope"),
            ("pool remove ipv4", "pool ipv4 is in use"),
            ("pool add more 10.244.0.0/17", "overlaps pool ipv4"),
            ("node remove nope", "there is no node nope"),
            ("ipam show pool nope", "there is no pool nope"),
            ("ipam show node nope", "there is no node nope"),
            ("ipam show pod lab/nope", "no address is known of pod lab/nope"),
            ("ipam release 192.0.2.9", "nothing to release"),
            (&format!("ipam release {}", pod.v4()), "which is running"),
            ("uninstall", "stop the agent first"),
            ("uninstall --config /nowhere.toml", "/nowhere.toml"),
        ],
    );
}

#[test]
fn every_command_exits_with_1_if_the_agent_does_not_answer() {
    let mut lab = Lab::build(Topology::one_segment(1));
    lab.etcd.kill();
    let worker = &mut lab.workers[0];
    for command in READING {
        assert_ends(worker, 1, &[(command, "start polder-agent on this node")]);
        let elsewhere = format!("--socket /run/nowhere.sock {command}");
        assert_ends(worker, 1, &[(&elsewhere, "/run/nowhere.sock")]);
    }
    // An agent that has read no records can answer only the first two.
    worker.start();
    wait::until("the agent to answer", || worker.try_status());
    assert_ends(worker, 3, &[("status", "ready     no")]);
    assert_ends(worker, 0, &[("live", "ok")]);
    for command in &READING[2..] {
        assert_ends(worker, 1, &[(command, "")]);
    }
}

#[test]
fn a_wrong_argument_exits_with_2_without_a_request_to_the_agent() {
    let lab = Lab::build(Topology::one_segment(1));
    // No agent runs: usage errors are detected without a request.
    assert_ends(
        &lab.workers[0],
        2,
        &[
            ("", ""),
            ("state", "unrecognized subcommand"),
            ("status --colour", "--colour"),
            ("-o yaml status", "yaml"),
            ("node remove", "NAME"),
            ("node remove not/a/name", "not/a/name"),
            ("cluster set --backend carrier-pigeon", "carrier-pigeon"),
            ("pool add more 10.245.0.1/24", "did you mean 10.245.0.0/24?"),
            ("pool add more 10.245.0.0/28", "--block-length"),
            ("pool add more 10.245.0.0/24 --block-length 40", "--block-length"),
            ("pool add more 10.245.0.0/24 --nodes zone", "like zone=a"),
            ("pool drain", "NAME"),
            ("ipam show something", "cannot be shown: use cluster, pool NAME"),
            ("ipam show pod web-0", "pod NAMESPACE/NAME"),
            ("ipam show node a/b", "a/b"),
            ("ipam show block 10.0.0.1/26", "did you mean 10.0.0.0/26?"),
            ("ipam release nobody", "nobody"),
            ("uninstall --node a/b", "a/b"),
        ],
    );
}

#[test]
fn status_exits_with_3_if_not_ready_or_with_a_problem() {
    let mut lab = Lab::start(Topology::one_segment(1));
    let worker = &lab.workers[0];
    wait::until_true("a status without problems", || once(worker, &["status"]).0 == 0);
    let key = "/polder/v1/nodes/evil";
    lab.etcd.ctl(&["put", key, "{"]);
    worker.wait_for_status("the record to be named", |status| {
        status["problems"].to_string().contains(key).then_some(())
    });
    assert_ends(worker, 3, &[("status", "ready     yes")]);
    lab.etcd.ctl(&["del", key]);
    wait::until_true("the problem to be gone", || once(worker, &["status"]).0 == 0);

    lab.etcd.kill();
    wait::until_true("the store to be missed", || worker.status()["store"]["state"] == "disconnected");
    assert_ends(worker, 3, &[("status", "is unreachable")]);
    assert_ends(worker, 1, &[("ipam check", "cannot check the cluster"), ("pool drain ipv4", "")]);

    lab.workers[0].kill();
    let worker = &mut lab.workers[0];
    worker.node.shell("rm -r /var/lib/polder");
    worker.start();
    wait::until("the agent to answer", || worker.try_status());
    assert_ends(worker, 3, &[("status", "ready     no")]);
}

#[test]
fn a_plan_with_changes_exits_with_3() {
    let lab = Lab::start(Topology::one_segment(1));
    let worker = &lab.workers[0];
    wait::until_true("a plan without changes", || once(worker, &["plan"]).0 == 0);
    // A change that every pass tries and that fails. The kernel may drop a new mount in /proc/sys.
    wait::until_true("a plan with a change", || {
        worker.node.shell(
            "echo 0 > /tmp/zero; mount --bind /tmp/zero /proc/sys/net/ipv4/ip_forward; \
             mount -o remount,ro,bind /proc/sys/net/ipv4/ip_forward",
        );
        once(worker, &["plan"]).0 == 3
    });
    assert_ends(worker, 3, &[("plan", "set net/ipv4/ip_forward to 1")]);
    worker.wait_for_status("the failure", |status| (status["ready"] == false).then_some(()));
    assert_ends(worker, 3, &[("status", "net/ipv4/ip_forward")]);
}

#[test]
fn a_check_with_findings_or_silent_nodes_exits_with_3() {
    let mut lab = Lab::start(Topology::one_segment(2));
    let worker = &lab.workers[0];
    wait::until_true("a check without deviations", || once(worker, &["ipam", "check"]).0 == 0);
    let record = json!({ "attachment": { "network": "polder", "container": "ghost", "interface": "eth0" } });
    let key = "/polder/v1/addresses/n9/10.244.0.9";
    lab.etcd.ctl(&["put", key, &record.to_string()]);
    assert_ends(worker, 3, &[("ipam check", "polder/ghost/eth0")]);
    let (ended, output) = once(worker, &["ipam", "check", "--repair"]);
    assert_eq!(ended, 0, "all that deviated was repaired: {output}");
    assert_ends(worker, 0, &[("ipam check", "2 of 2 nodes checked")]);

    lab.workers[1].kill();
    wait::until_true("the lease to run out", || lab.etcd.keys("/polder/v1/alive/n2").is_empty());
    assert_ends(&lab.workers[0], 3, &[("ipam check", "1 of 2 nodes checked")]);
}

#[test]
fn a_check_on_a_node_outside_the_cluster_does_not_report_success() {
    let mut lab = Lab::build(Topology::one_segment(1));
    lab.etcd.kill();
    let worker = &mut lab.workers[0];
    worker.configure(
        "store = \"embedded\"\ncni_conf_dir = \"/run/cni/net.d\"\n[underlay]\ninterface = \"nothing\"\n\
         [bootstrap]\npools = [\"10.244.0.0/24\"]\n",
    );
    worker.start();
    worker.wait_for_status("the reason", |status| (status["ready"] == false).then_some(()));
    let (ended, output) = wait::until("a check", || match once(worker, &["ipam", "check"]) {
        (1, output) => Err(output),
        answered => Ok(answered),
    });
    assert!(
        ended == 3 && output.contains("0 of 1 nodes checked") && !output.contains("deviation"),
        "{output}"
    );
    assert!(output.contains("n1 (this node) is not registered"), "{output}");
    let (_, checked) = worker.ctl_verdict(&["ipam", "check"]);
    assert_eq!(checked["unregistered"], Value::from("n1"), "{checked}");
}

#[test]
fn check_config_has_the_same_exit_codes() {
    let lab = Lab::build(Topology::one_segment(1));
    let worker = &lab.workers[0];
    let good = worker.configuration();
    let check = |arguments: &[&str]| {
        let output = worker.program("polder-agent", &[&["--check-config"], arguments].concat());
        (output.status.code().unwrap(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    assert_eq!(check(&[]).0, 0);
    let (code, output) = check(&["--config", "/nowhere.toml"]);
    assert!(code == 1 && output.contains("/nowhere.toml"), "{code}: {output}");
    let (code, output) = check(&["--node", "a/b"]);
    assert!(code == 2 && output.contains("a/b"), "{code}: {output}");
    for (config, expected) in [
        (format!("colour = \"red\"\n{good}"), "colour"),
        (format!("mtu = 1\n{good}"), "mtu: 1 is out of range"),
    ] {
        worker.configure(&config);
        let (code, output) = check(&[]);
        assert!(code == 3 && output.contains(expected), "{code}: {output}");
    }
}
