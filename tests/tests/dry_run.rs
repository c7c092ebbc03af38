//! `polder-agent --plan`: shows the changes that an agent would make on a node, before it is started there.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use polder_tests::agent::{CNI_CONF, Worker, dist};
use polder_tests::fabric::Families;
use polder_tests::kernel_state::{assert_unchanged, kernel_state};
use polder_tests::{Lab, Topology, wait};

/// Runs `polder-agent --plan`. Returns its exit code, standard output and standard error. It must delete its copies.
fn plan(worker: &Worker) -> (Option<i32>, String, String) {
    const COPIES: &str = "/run/copies";
    worker.node.run("mkdir", &["-p", COPIES]);
    let mut command = worker.node.command(dist().join("polder-agent"));
    let output = command.arg("--plan").env("TMPDIR", COPIES).output().unwrap();
    assert_eq!(worker.node.run("find", &[COPIES, "-mindepth", "1"]), "");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

/// The indented lines below the line that starts with `title`.
fn part<'a>(output: &'a str, title: &str) -> Vec<&'a str> {
    let after = output.lines().skip_while(|line| !line.starts_with(title)).skip(1);
    after.take_while(|line| line.starts_with(' ')).map(str::trim).collect()
}

/// All files of the agent on that node, each with its size and the time of its last change.
fn files(worker: &Worker) -> String {
    let folders = "/var/lib/polder /run/polder /run/cni/net.d";
    worker.node.shell(&format!("find {folders} -printf '%p %s %T@\n' 2>/dev/null | sort"))
}

/// All records except those in `alive`, which running agents write again and again.
fn records(lab: &Lab) -> Vec<String> {
    let keys = lab.etcd.keys("/polder/").into_iter().filter(|key| !key.contains("/alive/"));
    keys.map(|key| lab.etcd.ctl(&["get", &key])).collect()
}

#[test]
fn a_plan_on_a_new_node_lists_the_agents_later_changes_and_changes_nothing() {
    let mut lab = Lab::build(Topology::two_segments().families(Families::DUAL));
    lab.workers[0].start_and_wait();
    let worker = &lab.workers[1];
    let before = (kernel_state(worker), files(worker), records(&lab));
    let (code, output, error) = plan(worker);
    assert_eq!((code, error.as_str()), (Some(0), ""), "{output}");
    assert!(output.ends_with("Nothing was changed.\n"), "{output}");
    assert_unchanged(worker, &before.0);
    assert_eq!((files(worker), records(&lab)), (before.1, before.2));
    assert!(worker.node.read(CNI_CONF).is_err());

    assert!(output.contains("has no ledger"), "{output}");
    assert!(part(&output, "Underlay").iter().any(|line| line.contains("on eth0, MTU 1500")), "{output}");
    assert_eq!(
        part(&output, "Files").iter().filter(|line| line.contains("10-polder.conflist")).count(),
        1,
        "{output}"
    );
    assert!(part(&output, "Peers").iter().any(|line| line.contains("n1 (IPv4), n1 (IPv6)")), "{output}");

    // The agent makes all these changes when it starts.
    let worker = &mut lab.workers[1];
    worker.start_and_wait();
    let log = worker.log();
    for change in part(&output, "Kernel") {
        let kind = change.split(' ').next().unwrap();
        // The elements that are added to a set depend on the records that the pass has.
        let is_told = match change.split_once(" (now ") {
            Some((setting, _)) => log.contains(setting),
            None => log.contains(change),
        };
        assert!(
            is_told || change.starts_with("nft set ") && change.contains(": add "),
            "{kind}: {change}\n{output}"
        );
    }
    let created = part(&output, "Kernel").iter().filter(|change| change.starts_with("create ")).count();
    assert!(created >= 2, "a bridge and a tunnel: {output}");
    let written = part(&output, "Records");
    let keys = lab.etcd.keys("/polder/");
    for line in &written {
        let key = line.split(' ').nth(1).unwrap();
        assert!(keys.iter().any(|found| found == key), "{key} is not there: {keys:?}");
    }
    assert!(written.iter().any(|line| line.starts_with("write /polder/v1/nodes/n2 {")), "{output}");
    assert_eq!(
        written.iter().filter(|line| line.contains("/blocks/")).count(),
        2,
        "one of each family: {output}"
    );
}

#[test]
fn a_plan_after_the_agent_stopped_is_empty_or_lists_the_damage() {
    let mut lab = Lab::start(Topology::one_segment(2));
    let worker = &lab.workers[0];
    let (code, output, error) = plan(worker);
    assert_eq!((code, output.as_str()), (Some(1), ""));
    assert!(error.contains("polderctl plan"), "{error}");

    let pod = worker.pod("a");
    // The agent ends as in a crash: changes that are not yet in the file of its ledger are in a file beside it.
    lab.workers[0].kill();
    let worker = &lab.workers[0];
    let (code, output, error) = plan(worker);
    assert_eq!(code, Some(0), "{output}{error}");
    assert_eq!((part(&output, "Kernel"), part(&output, "Records")), (vec!["none"], vec!["none"]), "{output}");
    worker.node.shell("ip link delete polder0");
    let before = (kernel_state(worker), files(worker), records(&lab));
    let (code, output, _) = plan(worker);
    assert_eq!(code, Some(0), "{output}");
    let kernel = part(&output, "Kernel");
    assert!(kernel.iter().any(|change| change.starts_with("create ")), "{output}");
    assert!(
        kernel.iter().any(|change| change.contains(&pod.host_interface())),
        "the ledger was read: {output}"
    );
    assert_unchanged(worker, &before.0);
    assert_eq!((files(worker), records(&lab)), (before.1, before.2));
}

#[test]
fn a_plan_states_why_the_node_would_not_become_ready() {
    let mut lab = Lab::build(Topology::one_segment(1));
    let good = lab.workers[0].configuration();
    let no_settings =
        good.lines().take_while(|line| !line.starts_with("[bootstrap]")).collect::<Vec<_>>().join("\n");
    lab.workers[0].configure(&no_settings);
    let (code, output, _) = plan(&lab.workers[0]);
    let reasons = part(&output, "The node would not become ready").join("\n");
    assert!(code == Some(3) && reasons.contains("settings"), "{output}");
    assert_eq!((part(&output, "Kernel"), part(&output, "Records")), (vec!["none"], vec!["none"]), "{output}");

    lab.workers[0].configure(&format!("mtu = 5\n{good}"));
    let (code, _, error) = plan(&lab.workers[0]);
    assert!(code == Some(3) && error.contains("mtu: 5 is out of range"), "{error}");

    lab.workers[0].configure(&good);
    lab.etcd.kill();
    let (code, output, error) = plan(&lab.workers[0]);
    assert_eq!((code, output.as_str()), (Some(1), ""));
    assert!(error.contains(":2379") && error.contains("cannot read the records"), "{error}");
}

#[test]
fn a_plan_on_a_removed_node_deletes_nothing() {
    let mut lab = Lab::start(Topology::one_segment(3));
    let pod = lab.workers[0].pod("a");
    for (number, pods) in [(0, 1), (1, 0)] {
        assert!(lab.workers[number].stop());
        lab.workers[2].remove_node(lab.workers[number].name(), pods);
    }
    wait::until_true("the bridge without a port to have no carrier", || {
        lab.workers[1].node.run("ip", &["link", "show", "polder0"]).contains("NO-CARRIER")
    });
    for (worker, pods) in lab.workers[..2].iter().zip(["(1)", "(0)"]) {
        let before = (kernel_state(worker), files(worker), records(&lab));
        let (code, output, error) = plan(worker);
        let reasons = part(&output, "The node would not become ready").join("\n");
        assert!(code == Some(3) && reasons.contains("was removed from the cluster"), "{output}{error}");
        assert!(reasons.contains(&format!("its pods {pods}")), "{reasons}");
        assert_unchanged(worker, &before.0);
        assert_eq!((files(worker), records(&lab)), (before.1, before.2));
    }
    assert!(lab.workers[0].node.run("ip", &["-o", "link"]).contains(&pod.host_interface()));

    // An agent has disconnected the pods in the meantime.
    let worker = &mut lab.workers[0];
    worker.start();
    worker.wait_for_status("the removal", |status| {
        status["reasons"].to_string().contains("was removed").then_some(())
    });
    assert!(worker.stop());
    let (code, output, _) = plan(&lab.workers[0]);
    assert!(code == Some(3) && output.contains("was removed from the cluster"), "{output}");
}

#[test]
fn a_plan_uses_the_configured_datastore_and_not_an_old_embedded_file() {
    let mut lab = Lab::build(Topology::one_segment(1));
    let with_etcd = lab.workers[0].configuration();
    let (top, _) = with_etcd.split_once("[etcd]").unwrap();
    let alone = format!("store = \"embedded\"\n{top}[bootstrap]\npools = [\"10.77.0.0/16\"]\n");
    lab.workers[0].configure(&alone);
    lab.workers[0].start_and_wait();
    assert!(lab.workers[0].stop());
    let (code, output, error) = plan(&lab.workers[0]);
    assert_eq!((code, part(&output, "Records")), (Some(0), vec!["none"]), "{output}{error}");
    // Only the file of the embedded datastore is left.
    lab.workers[0].node.shell("cd /var/lib/polder; rm -f ledger.db* cluster.json; ip link delete polder0");
    lab.workers[0].configure(&with_etcd);
    let (code, output, error) = plan(&lab.workers[0]);
    let made = part(&output, "Records").join("\n");
    assert!(code == Some(0) && made.contains("10.244.0.0/16") && !made.contains("10.77."), "{output}{error}");
}
