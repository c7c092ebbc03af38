//! The agent as a service, under a real systemd: the unit, and `scripts/install` on a running machine.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use polder_tests::agent::dist;
use polder_tests::booted::Booted;
use polder_tests::wait;
use serde_json::Value;

/// The top folder of the repository.
fn top() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize().unwrap()
}

/// The command that installs the binaries under test.
fn install(arguments: &str) -> String {
    format!("{}/scripts/install --from {} {arguments}", top().display(), dist().display())
}

#[test]
fn systemd_accepts_the_unit_and_rates_it_as_well_confined() {
    // The units of this machine, because our unit refers to some of them.
    let root = tempfile::tempdir().unwrap();
    let units = root.path().join("usr/lib/systemd");
    fs::create_dir_all(&units).unwrap();
    std::os::unix::fs::symlink("usr/lib", root.path().join("lib")).unwrap();
    let run = |program: &str, arguments: &[&str]| {
        let output = Command::new(program).args(arguments).output().unwrap();
        let message =
            [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes).into_owned());
        assert!(output.status.success(), "{program} {arguments:?}: {message:?}");
        message
    };
    run("cp", &["-r", "/lib/systemd/system", units.to_str().unwrap()]);
    let root = root.path().to_str().unwrap();
    let rooted = format!("--root={root}");
    let inspection = format!("{root}/etc/systemd/system/polder-agent.service.d");
    let install = |arguments: &str| run("sh", &["-ec", &install(&format!("--root {root} {arguments}"))]);
    let verify = || {
        let message = run("systemd-analyze", &["verify", "--man=no", &rooted, "polder-agent.service"]);
        assert_eq!(message, ["", ""], "systemd reports problems of the unit");
    };
    let exposure = |most: &str| {
        let threshold = format!("--threshold={most}");
        run(
            "systemd-analyze",
            &["security", "--offline=true", "--no-pager", &rooted, &threshold, "polder-agent.service"],
        );
    };
    install("");
    verify();
    // The exposure level in tenths; a service without any restriction has 96.
    exposure("24");
    fs::create_dir_all(&inspection).unwrap();
    fs::copy(top().join("deploy/systemd/pod-inspection.conf"), format!("{inspection}/pod-inspection.conf"))
        .unwrap();
    verify();
    exposure("27");
    fs::remove_dir_all(&inspection).unwrap();
    install("--uninstall");
    install("--prefix /opt/polder");
    verify();
}

/// A node booted by systemd, with Polder installed. The agent is not started.
fn booted() -> Booted {
    let machine = Booted::boot(&[&top(), &dist()]);
    let message = machine.shell(&format!("{} 2>&1", install("")));
    assert!(message.contains("systemctl enable --now polder-agent"), "{message}");
    assert_eq!(property(&machine, "ActiveState"), "inactive", "nothing is started that nobody asked for");
    machine.shell(
        "ip link add uplink type veth peer name segment; ip link set segment up; ip link set uplink up
         ip address add 192.0.2.10/24 dev uplink; mkdir -p /run/netns
         printf '%s\\n' 'store = \"embedded\"' '[bootstrap]' 'pools = [\"10.244.0.0/24\"]' >/etc/polder/agent.toml",
    );
    machine
}

fn property(machine: &Booted, name: &str) -> String {
    machine.shell(&format!("systemctl show --property {name} --value polder-agent")).trim().to_owned()
}

fn wait_until_ready(machine: &Booted) {
    wait::until("systemd to know that the node is ready", || {
        let status = property(machine, "StatusText");
        if status == "ready" { Ok(()) } else { Err(status) }
    });
}

fn status(machine: &Booted) -> Value {
    let output = machine.attempt("polderctl -o json status");
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"))
}

/// Calls the installed plugin for the pod `a`.
fn plugin(machine: &Booted, verb: &str) -> String {
    machine.shell(&format!(
        "export CNI_COMMAND={verb} CNI_CONTAINERID=a CNI_NETNS=/run/netns/a CNI_IFNAME=eth0 CNI_PATH=/opt/cni/bin
         echo '{{\"cniVersion\": \"1.0.0\", \"name\": \"polder\", \"type\": \"polder\"}}' | /opt/cni/bin/polder"
    ))
}

/// Creates the pod `a` and attaches it. It must reach its node.
fn attach(machine: &Booted) {
    machine.shell("ip netns add a");
    plugin(machine, "ADD");
    assert_pod_reaches_its_node(machine);
}

fn assert_pod_reaches_its_node(machine: &Booted) {
    machine.shell("ip netns exec a ping -c 1 -W 5 192.0.2.10");
}

#[test]
fn the_agent_works_as_a_confined_service_and_pods_outlive_its_restarts() {
    let machine = booted();
    machine.shell("systemctl start polder-agent");
    wait_until_ready(&machine);
    let first = status(&machine);
    assert_eq!(first["problems"], serde_json::json!([]), "{first}");
    attach(&machine);
    machine.shell("touch /run/polder/stays");
    machine.shell("systemctl restart polder-agent");
    assert_pod_reaches_its_node(&machine);
    wait_until_ready(&machine);
    machine.shell("test -e /run/polder/stays; rm /run/polder/stays");
    assert_eq!(status(&machine)["pods"], 1);
    // Changes by other programs are repaired, in the kernel and below /proc/sys/net.
    machine
        .shell("ip neigh flush dev polder0 nud permanent; sysctl -q net.ipv4.conf.polder0.send_redirects=1");
    wait::until_true("the setting to be restored", || {
        machine.shell("sysctl -n net.ipv4.conf.polder0.send_redirects").trim() == "0"
    });
    wait::until_true("the pod to be reached again", || {
        machine.attempt("ip netns exec a ping -c 1 -W 1 192.0.2.10").status.success()
    });

    // The agent sends no watchdog messages.
    machine.shell(
        "mkdir -p /run/systemd/system/polder-agent.service.d
         printf '[Service]\nWatchdogSec=10\n' >/run/systemd/system/polder-agent.service.d/watchdog.conf
         systemctl daemon-reload; systemctl restart polder-agent",
    );
    wait_until_ready(&machine);
    machine.shell("kill -STOP $(systemctl show --property MainPID --value polder-agent)");
    wait::until_true("systemd to restart the agent", || property(&machine, "NRestarts") != "0");
    wait_until_ready(&machine);
    assert_pod_reaches_its_node(&machine);

    // With a wrong configuration, systemd does not try again.
    machine.shell(
        "echo no_such_key = 1 | cat - /etc/polder/agent.toml >/tmp/wrong; cp /tmp/wrong \
                   /etc/polder/agent.toml",
    );
    assert!(!machine.attempt("systemctl restart polder-agent").status.success());
    assert_eq!(
        (property(&machine, "ActiveState"), property(&machine, "ExecMainStatus")),
        ("failed".into(), "78".into())
    );
    assert!(property(&machine, "StatusText").contains("journalctl -u polder-agent"));
    machine.shell("sed -i /no_such_key/d /etc/polder/agent.toml; systemctl start polder-agent");
    wait_until_ready(&machine);
    assert_pod_reaches_its_node(&machine);
}

#[test]
fn units_ordered_after_the_agent_start_while_the_agent_waits_for_etcd() {
    let machine = booted();
    machine.shell(
        "printf '%s\n' '[etcd]' 'endpoints = [\"http://192.0.2.20:2379\"]' >/etc/polder/agent.toml
         printf '%s\n' '[Unit]' 'Wants=polder-agent.service' '[Service]' 'Type=oneshot' 'ExecStart=/bin/sh \
         -c \"polderctl status >/run/seen 2>&1; true\"' \
             >/run/systemd/system/kubelet.service
         systemctl daemon-reload
         systemctl start kubelet",
    );
    let seen = machine.shell("cat /run/seen");
    assert!(seen.contains("ready") && seen.contains("192.0.2.20:2379"), "the agent answered: {seen}");
    assert_eq!(property(&machine, "ActiveState"), "active");
    assert!(property(&machine, "StatusText").starts_with("not ready: "));
}

#[test]
fn scripts_install_upgrades_a_running_agent_and_uninstalls_when_no_pod_is_left() {
    let machine = booted();
    machine.shell("systemctl enable --now polder-agent 2>&1");
    wait_until_ready(&machine);
    attach(&machine);
    let process = || property(&machine, "MainPID");
    let first = process();
    machine.shell(&install(""));
    assert_eq!(process(), first, "the same release does not restart the agent");
    machine.shell(&format!(
        "mkdir /tmp/other; cd {}; cp polder polder-ipam polder-agent polderctl /tmp/other
         for program in /tmp/other/*; do echo >>$program; done",
        dist().display()
    ));
    let upgrade = install("").replace(&format!("--from {}", dist().display()), "--from /tmp/other");
    let message = machine.shell(&format!("{upgrade} 2>&1"));
    assert!(message.contains("restarting the agent"), "{message}");
    wait_until_ready(&machine);
    assert_ne!(process(), first);
    assert_pod_reaches_its_node(&machine);
    machine.shell(&install("--rollback"));
    wait_until_ready(&machine);
    assert_pod_reaches_its_node(&machine);

    let refused = |word: &str| {
        let output = machine.attempt(&install("--uninstall"));
        let message = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && message.contains(word), "{word} in {message}");
    };
    refused("systemctl disable --now polder-agent");
    machine.shell("systemctl disable --now polder-agent 2>&1");
    refused("1 pods are attached");
    assert_pod_reaches_its_node(&machine);
    machine.shell("systemctl start polder-agent");
    plugin(&machine, "DEL");
    machine.shell("ip netns delete a; systemctl stop polder-agent");
    machine.shell(&install("--uninstall"));
    let left = machine.shell(
        "ls -d /usr/local/bin/polder* /usr/local/libexec/polder /usr/local/lib/systemd/system/polder* \
         /opt/cni/bin/polder* \
             /etc/cni/net.d/* /var/lib/polder/* /run/polder /sys/class/net/polder* 2>/dev/null || true",
    );
    assert_eq!(left, "");
    machine.shell("test -s /etc/polder/agent.toml");
}
