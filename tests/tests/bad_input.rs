//! Errors are reported with their remedy, and failed steps leave no partial changes.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use std::io::ErrorKind;
use std::net::TcpListener;

use polder_tests::agent::{CNI_CONF, Worker};
use polder_tests::matrix::assert_flat;
use polder_tests::tls::Authority;
use polder_tests::{Lab, Topology, wait};
use serde_json::{Value, json};

/// Starts the agent of the first node, which must end by itself. Returns its exit code and its log output.
fn refuses_to_start(lab: &mut Lab, config: &str) -> (Option<i32>, String) {
    let worker = &mut lab.workers[0];
    let length_before = worker.log().len();
    worker.configure(config);
    worker.start();
    let (code, message) = worker.wait_until_ended();
    (code, message[length_before..].to_owned())
}

/// Polder has no objects in the kernel and no records in etcd.
fn assert_untouched(lab: &Lab) {
    let worker = &lab.workers[0];
    let kernel = worker.node.shell("ip link; ip route show proto 84; nft list ruleset");
    assert!(!kernel.contains("polder"), "{kernel}");
    assert!(worker.node.read(CNI_CONF).is_err(), "the CNI configuration is there");
    assert_eq!(lab.etcd.keys("/polder/"), Vec::<String>::new());
}

/// Waits until the reasons why the node is not ready contain `expected`. Returns the reasons.
fn reasons(worker: &Worker, expected: &str) -> String {
    worker.wait_for_status(&format!("a reason with {expected:?}"), |status| {
        let reasons = status["reasons"].to_string();
        reasons.contains(expected).then_some(reasons)
    })
}

#[test]
fn an_invalid_configuration_ends_the_agent_before_it_changes_anything() {
    let mut lab = Lab::build(Topology::one_segment(1));
    let good = lab.workers[0].configuration();
    let bootstrap = |pools: &str| {
        format!("[etcd]\nendpoints = [\"http://10.10.1.200:2379\"]\n[bootstrap]\npools = [{pools}]\n")
    };
    for (config, expected) in [
        (format!("colour = \"red\"\n{good}"), "agent.toml:1: unknown field `colour`"),
        (format!("mtu = \"large\"\n{good}"), "agent.toml:1: mtu: invalid type: string \"large\""),
        ("node = \"n1\"\n".to_owned(), "etcd.endpoints: no endpoint is set"),
        (bootstrap("\"10.244.0.0/16\", \"10.244.7.0/24\""), "10.244.7.0/24 and 10.244.0.0/16 overlap"),
        (bootstrap("\"10.244.0.0\""), "\"10.244.0.0\" is not a network"),
        (bootstrap("\"10.244.0.0/27\""), "pool 10.244.0.0/27 is smaller than one block of /26"),
    ] {
        let (code, message) = refuses_to_start(&mut lab, &config);
        assert_eq!(code, Some(78), "{message}");
        assert!(message.contains(expected), "{message:?} does not say {expected:?}");
        assert_eq!(message.trim().lines().count(), 1, "one clear error: {message}");
        assert_untouched(&lab);
    }
}

#[test]
fn check_config_reports_the_problem_and_changes_nothing() {
    let lab = Lab::build(Topology::one_segment(1));
    let worker = &lab.workers[0];
    let check = || {
        let output = worker.program("polder-agent", &["--check-config"]);
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    assert_eq!(check().0, Some(0));
    let good = worker.configuration();
    for (config, expected) in [
        ("resync_seconds = 0\n".to_owned(), "resync_seconds"),
        (format!("socket = \"run/b.sock\"\n{good}"), "socket: run/b.sock is a relative path"),
        (format!("state_dir = \"lib\"\n{good}"), "state_dir: lib is a relative path"),
        (good.replace("/run/cni/net.d", "net.d"), "cni_conf_dir: net.d is a relative path"),
        (good.replace("10.244.0.0/16", "224.0.0.0/16"), "224.0.0.0/16 cannot be a pool"),
    ] {
        worker.configure(&config);
        let (code, message) = check();
        assert!(code == Some(3) && message.contains(expected), "{message}");
    }
    worker.configure(&good.replace("10.244.0.0/16", "10.96.0.0/16"));
    let (code, message) = check();
    assert!(
        code == Some(0) && message.contains("warning: bootstrap.pools: 10.96.0.0/16 overlaps"),
        "{message}"
    );
    assert_untouched(&lab);
}

#[test]
fn the_error_names_a_folder_that_is_not_writable() {
    let mut lab = Lab::build(Topology::one_segment(1));
    let good = lab.workers[0].configuration();
    lab.workers[0].node.shell("mkdir /run/sealed; mount -t tmpfs -o ro tmpfs /run/sealed; touch /run/file");
    for (folder, expected) in
        [("/run/sealed/state", "Read-only file system"), ("/run/file/state", "Not a directory")]
    {
        let (code, message) = refuses_to_start(&mut lab, &format!("state_dir = \"{folder}\"\n{good}"));
        assert_eq!(code, Some(1), "{message}");
        assert!(message.contains(&format!("state_dir {folder}: cannot be written")), "{message}");
        assert!(message.contains(expected), "{message}");
        assert_untouched(&lab);
    }
}

#[test]
fn a_second_agent_on_the_same_node_is_refused() {
    let mut lab = Lab::start(Topology::one_segment(2));
    let second = |worker: &Worker, arguments: &[&str]| {
        let output = worker.program("polder-agent", arguments);
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    let worker = &lab.workers[0];
    assert!(second(worker, &[]).contains("state_dir /var/lib/polder: another polder-agent uses it"));
    let message = second(worker, &["--state-dir", "/run/other"]);
    assert!(
        message.contains("socket /run/polder/agent.sock: another polder-agent answers there"),
        "{message}"
    );
    let elsewhere =
        ["--state-dir", "/run/other", "--socket", "/run/other/agent.sock", "--http", "127.0.0.1:9999"];
    let message = second(worker, &elsewhere);
    assert!(
        message.contains("another polder-agent runs on this node") && message.contains("Stop that one"),
        "{message}"
    );
    assert!(worker.node.read("/run/other/ledger.db").is_err(), "it has begun to be an agent");
    assert_eq!(worker.status()["ready"], true);
    let error =
        worker.try_ctl(&["--socket", "/run/other/agent.sock", "uninstall", "--state-dir", "/run/other"]);
    assert!(error.unwrap_err().contains("stop the agent first"));

    // The locks end with the agent that held them, and other nodes on this machine have their own.
    let worker = &mut lab.workers[0];
    worker.kill();
    worker.start_and_wait();
    assert!(worker.stop());
    worker.start_and_wait();
    assert_eq!(lab.workers[1].status()["ready"], true);
}

#[test]
fn an_occupied_health_port_is_reported_and_pods_are_served() {
    let mut lab = Lab::build(Topology::one_segment(1));
    let worker = &mut lab.workers[0];
    let other = worker.node.within(|| TcpListener::bind("127.0.0.1:9474").unwrap());
    worker.start_and_wait();
    let problem = worker.wait_for_status("the port", |status| {
        let problem = status["problems"][0].as_str()?.to_owned();
        problem.contains("127.0.0.1:9474").then_some(problem)
    });
    assert!(problem.contains("in use") && problem.contains("--http"), "{problem}");
    worker.pod("a");
    drop(other);
    worker.wait_for_status("no problem", |status| (status["problems"] == json!([])).then_some(()));
    assert_eq!(worker.http("/livez").0, 200);
}

#[test]
fn a_deleted_socket_is_recreated_and_a_stopped_agent_deletes_it() {
    let mut lab = Lab::start(Topology::one_segment(1));
    let socket = "/run/polder/agent.sock";
    lab.workers[0].node.run("rm", &[socket]);
    wait::until("the agent to answer again", || lab.workers[0].try_status());
    let pod = lab.workers[0].pod("a");
    lab.workers[0].delete(&pod);
    assert!(lab.workers[0].stop());
    assert!(lab.workers[0].node.read(socket).is_err_and(|error| error.kind() == ErrorKind::NotFound));
}

#[test]
fn a_wrong_log_filter_is_reported_and_the_agent_runs() {
    let mut lab = Lab::build(Topology::one_segment(1));
    let worker = &mut lab.workers[0];
    worker.variables.push(("RUST_LOG".to_owned(), "polder=loud".to_owned()));
    worker.start_and_wait();
    let log = worker.log();
    let named = log.lines().find(|line| line.contains("RUST_LOG"));
    assert!(named.is_some_and(|line| line.contains("polder=loud") && line.contains("info")), "{log}");
    assert!(!log.contains('\u{1b}'), "colours in a file: {log}");
}

#[test]
fn an_agent_without_etcd_waits_and_reports_it_on_every_interface() {
    let mut lab = Lab::build(Topology::one_segment(1));
    lab.etcd.kill();
    lab.workers[0].start();
    let worker = &lab.workers[0];
    let reason = reasons(worker, "Connection refused");
    assert!(
        reason.contains("etcd at http://10.10.1.200:2379")
            && reason.contains("check that etcd is running there"),
        "{reason}"
    );
    let (code, ready) = worker.http("/readyz");
    assert!(code == 503 && ready.contains("Connection refused"), "{code}: {ready}");
    assert_eq!(worker.http("/livez").0, 200);
    assert!(worker.http("/metrics").1.contains("\npolder_ready 0\n"));
    let error = worker.try_pod("a", &Worker::netconf("1.1.0")).unwrap_err();
    assert_eq!(error["code"], 11);
    assert!(error["msg"].as_str().unwrap().contains("Connection refused"), "{error}");
    assert!(worker.node.read(CNI_CONF).is_err());
    lab.etcd.start_again();
    lab.workers[0].wait_until_ready();
    assert_eq!(lab.workers[0].http("/readyz"), (200, "ok\n".to_owned()));
    assert!(lab.workers[0].http("/metrics").1.contains("\npolder_ready 1\n"));
}

#[test]
fn a_wrong_authority_or_client_certificate_is_reported_with_the_key_to_set() {
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::new(folder.path(), "polder-lab");
    let other = Authority::new(&folder.path().join("other"), "somebody-else");
    let mut lab =
        Lab::build_with_tls(Topology::one_segment(1), |addresses| Some(authority.for_etcd(addresses)));
    let (client, stranger) = (authority.sign("client", &[]), other.sign("stranger", &[]));
    let good = lab.workers[0].configuration();
    let config = |ca: &std::path::Path, identity: Option<&(std::path::PathBuf, std::path::PathBuf)>| {
        let mut lines = format!("[etcd]\nca = {ca:?}\n");
        if let Some((certificate, key)) = identity {
            lines += &format!("cert = {certificate:?}\nkey = {key:?}\n");
        }
        good.replace("[etcd]\n", &lines)
    };
    for (config, parts) in [
        (config(&other.ca(), Some(&client)), ["UnknownIssuer", "etcd.ca is the CA"]),
        (config(&authority.ca(), None), ["if etcd requires client certificates", "etcd.cert and etcd.key"]),
        (
            config(&authority.ca(), Some(&stranger)),
            ["if etcd requires client certificates", "the CA that etcd trusts"],
        ),
    ] {
        lab.workers[0].configure(&config);
        lab.workers[0].start();
        let reason = reasons(&lab.workers[0], parts[0]);
        assert!(reason.contains(parts[1]), "{reason}");
        assert!(lab.workers[0].node.read(CNI_CONF).is_err());
        lab.workers[0].kill();
    }
    // A certificate that is renewed in its file is used without a restart.
    lab.workers[0].start();
    reasons(&lab.workers[0], "if etcd requires client certificates");
    for (of_client, of_stranger) in [(&client.0, &stranger.0), (&client.1, &stranger.1)] {
        std::fs::copy(of_client, of_stranger).unwrap();
    }
    lab.workers[0].wait_until_ready();
    lab.workers[0].pod("a");
}

#[test]
fn an_agent_waits_for_the_cluster_settings_and_reports_the_remedy() {
    let mut lab = Lab::build(Topology::one_segment(1));
    let config = lab.workers[0].configuration();
    lab.workers[0].configure(config.split("[bootstrap]").next().unwrap());
    lab.workers[0].start();
    let reason = reasons(&lab.workers[0], "no settings yet");
    assert!(reason.contains("no [bootstrap]"), "{reason}");
    assert_untouched(&lab);
}

#[test]
fn an_unreadable_record_is_reported_and_affects_no_other_record() {
    let lab = Lab::start(Topology::one_segment(2));
    let pods: Vec<_> = lab.workers.iter().map(|worker| worker.pod("a")).collect();
    let claims = lab.etcd.ctl(&["get", "--prefix", "--print-value-only", "/polder/v1/blocks/"]);
    let claim = claims.lines().next().unwrap();
    let mut coloured: Value = serde_json::from_str(claim).unwrap();
    coloured["colour"] = json!("red");
    for (key, value, expected) in [
        ("/polder/v1/nodes/evil", "{".to_owned(), "EOF while parsing"),
        (
            "/polder/v1/pools/evil",
            json!({ "cidr": "10.9.0.0/16" }).to_string(),
            "missing field `block_length`",
        ),
        ("/polder/v1/what/is/this", "{}".to_owned(), "not a key of a known kind"),
        ("/polder/v1/blocks/4-0a09000a-26", claim.to_owned(), "not a key of a known kind"),
        ("/polder/v1/blocks/4-0af4fe00-26", coloured.to_string(), "unknown field `colour`"),
        ("/polder/v1/blocks/4-0a090000-26", claim.to_owned(), "is not a /26 inside 10.244.0.0/16"),
    ] {
        lab.etcd.ctl(&["put", key, &value]);
        for worker in &lab.workers {
            let problem = worker.wait_for_status("the record to be named", |status| {
                let problems = status["problems"].as_array()?.iter();
                problems.filter_map(Value::as_str).find(|problem| problem.contains(key)).map(str::to_owned)
            });
            assert!(problem.contains(expected), "{problem:?} does not say {expected:?}");
            let routes = worker.node.run("ip", &["route"]);
            assert!(!routes.contains("10.9.0"), "the record is applied: {routes}");
        }
        lab.etcd.ctl(&["del", key]);
    }
    for worker in &lab.workers {
        worker.wait_for_status("the node to be ready without problems", |status| {
            (status["ready"] == true && status["problems"] == json!([])).then_some(())
        });
    }
    assert_flat(&pods, 1450);
}

#[test]
fn a_new_machine_cannot_use_the_name_of_a_registered_node() {
    let mut lab = Lab::start(Topology::one_segment(2));
    let old = lab.workers[0].pod("a");
    let config = lab.workers[0].configuration();
    let newcomer = lab.add_worker(1);
    newcomer.configure(&config);
    newcomer.start();
    let reason = reasons(&lab.workers[2], "is registered as another machine");
    assert!(reason.contains("node n1") && reason.contains("--node"), "{reason}");
    let kernel = lab.workers[2].node.shell("ip link; nft list ruleset");
    assert!(!kernel.contains("polder"), "the newcomer touched its kernel: {kernel}");
    let other = lab.workers[1].pod("b");
    assert_flat(&[old, other], 1450);
}

#[test]
fn a_node_that_cannot_determine_its_own_address_reports_the_key_to_set() {
    let mut lab = Lab::build(Topology::one_segment(1));
    // Two addresses, an etcd endpoint with a name instead of an address, and no route that shows which address peers
    // use.
    let worker = &lab.workers[0];
    worker.node.shell("ip address add 192.0.2.1/24 dev eth0; echo 10.10.1.200 etcd.example >> /etc/hosts");
    let config = worker.configuration().replace("10.10.1.200", "etcd.example");
    worker.configure(&config);
    lab.workers[0].start();
    let reason = reasons(&lab.workers[0], "cannot determine the underlay address");
    assert!(reason.contains("10.10.1.1 on eth0") && reason.contains("Set underlay.interface"), "{reason}");
    lab.workers[0].kill();
    lab.workers[0].configure(&format!("{config}[underlay]\naddresses = [\"10.10.1.77\"]\n"));
    lab.workers[0].start();
    reasons(&lab.workers[0], "underlay.addresses: no interface that is up has 10.10.1.77");
    lab.workers[0].kill();
    lab.workers[0].configure(&format!("{config}[underlay]\naddresses = [\"10.10.1.1\"]\n"));
    lab.workers[0].start_and_wait();
}

#[test]
fn a_first_pool_that_contains_the_nodes_own_address_is_refused() {
    let mut lab = Lab::build(Topology { pools: vec!["10.0.0.0/8"], ..Topology::one_segment(1) });
    lab.workers[0].start();
    let reason = reasons(&lab.workers[0], "10.10.1.1, this node's own address,");
    assert!(reason.contains("bootstrap.pools") && reason.contains("10.0.0.0/8"), "{reason}");
    let kernel = lab.workers[0].node.shell("ip route; ip link");
    assert!(!kernel.contains("unreachable") && !kernel.contains("polder"), "{kernel}");
    assert_untouched(&lab);
}

#[test]
fn an_mtu_above_that_of_the_underlay_is_reported_and_not_used() {
    let mut lab = Lab::build(Topology::one_segment(1));
    lab.workers[0].configure_also("mtu = 9000");
    lab.start_agents();
    let status = lab.workers[0].status();
    assert_eq!(status["mtu"], 1450);
    let problem = "mtu = 9000 in agent.toml exceeds the MTU of 1450 bytes that the underlay permits, which pods use \
                   instead: lower mtu, or raise the MTU of the underlay interfaces";
    assert_eq!(status["problems"][0], problem);
}

#[test]
fn a_plugin_call_that_is_wrong_gets_one_error_object_and_has_no_effect() {
    let lab = Lab::start(Topology::one_segment(1));
    let worker = &lab.workers[0];
    worker.namespace("a");
    let all = [
        ("CNI_COMMAND", "ADD"),
        ("CNI_CONTAINERID", "a"),
        ("CNI_NETNS", "/run/netns/a"),
        ("CNI_IFNAME", "eth0"),
    ];
    let with = |name: &'static str, value: &'static str| {
        let mut variables = all.to_vec();
        variables.retain(|(other, _)| *other != name);
        variables.push((name, value));
        variables
    };
    let conf = |more: Value| {
        let mut conf = Worker::netconf("1.1.0");
        more.as_object().unwrap().iter().for_each(|(key, value)| conf[key] = value.clone());
        conf.to_string()
    };
    let good = conf(json!({}));
    for (variables, input, code, expected) in [
        (with("CNI_COMMAND", "JUMP"), good.clone(), 4, "CNI_COMMAND"),
        (with("CNI_IFNAME", "much-too-long-name"), good.clone(), 4, "CNI_IFNAME"),
        (with("CNI_CONTAINERID", "some-%%id"), good.clone(), 4, "CNI_CONTAINERID"),
        (with("CNI_NETNS", ""), good.clone(), 4, "CNI_NETNS is not set"),
        (with("CNI_NETNS", "/run/netns/nobody"), good.clone(), 4, "CNI_NETNS /run/netns/nobody"),
        (with("CNI_NETNS", "/etc/passwd"), good.clone(), 4, "is not a network namespace"),
        (with("CNI_NETNS", "/proc/self/ns/net"), good.clone(), 4, "the plugin itself runs in"),
        (with("CNI_ARGS", "FOO=BAR"), good.clone(), 4, "FOO"),
        (all.to_vec(), "{".to_owned(), 6, "not a JSON object"),
        (all.to_vec(), conf(json!({ "cniVersion": "9.9.9" })), 1, "9.9.9"),
        (all.to_vec(), conf(json!({ "name": "" })), 7, "name"),
        (all.to_vec(), conf(json!({ "name": null })), 7, "name is missing"),
        (
            all.to_vec(),
            conf(json!({ "bridge": { "name": "cni0" } })),
            2,
            "\"bridge\" with value {\"name\":\"cni0\"}",
        ),
        (all.to_vec(), conf(json!({ "mtu": "big" })), 7, "mtu"),
        (all.to_vec(), conf(json!({ "mtu": 9000 })), 7, "576 to 1450"),
        (all.to_vec(), conf(json!({ "pool": "nobody" })), 7, "there is no pool nobody"),
        (all.to_vec(), conf(json!({ "socket": "/run/nobody.sock" })), 11, "/run/nobody.sock"),
    ] {
        let output = worker.plugin(&variables, &input);
        let error: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{output:?}"));
        assert!(!output.status.success());
        assert_eq!(error["code"], code, "{error}");
        assert!(error["msg"].as_str().unwrap().contains(expected), "{error} does not say {expected:?}");
        assert!(output.stderr.is_empty(), "{output:?}");
        assert_eq!(worker.node.shell("ip -n a -o link | wc -l").trim(), "1", "the pod was touched");
    }
    assert_eq!(worker.status()["pods"], 0);
    wait::until_true("nothing to be left", || !worker.node.run("ip", &["link"]).contains("pld"));
}
