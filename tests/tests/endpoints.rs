//! Endpoints of etcd other than the addresses of its members: SRV records and proxies.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use polder_tests::agent::Worker;
use polder_tests::node::Process;
use polder_tests::tls::Authority;
use polder_tests::{Lab, Topology, wait};
use serde_json::Value;

/// Names of the SRV records for etcd with TLS, and without TLS.
const WITH_TLS: &str = "_etcd-client-ssl._tcp.polder.test";
const WITHOUT_TLS: &str = "_etcd-client._tcp.polder.test";

/// Starts a name server on the machine of the first member, with `members` in the SRV records of the name `records`,
/// and with the addresses of all members.
fn serve_names(lab: &Lab, records: &str, members: &[u8]) -> Process {
    let node = lab.etcd.machine(0);
    let mut command = node.command("dnsmasq");
    command.args([
        "--keep-in-foreground",
        "--conf-file=/dev/null",
        "--pid-file=",
        "--user=root",
        "--no-resolv",
    ]);
    command.args(["--no-hosts", "--local=/polder.test/", "--log-queries", "--log-facility=-"]);
    let hosts =
        (0..3).map(|number| format!("--host-record=etcd{number}.polder.test,10.10.1.{}", 200 + number));
    let targets = members.iter().map(|number| format!("--srv-host={records},etcd{number}.polder.test,2379"));
    command.args(hosts.chain(targets));
    let process = node.spawn(&mut command, "dnsmasq.log");
    wait::until_true("the name server to listen", || node.shell("ss -Hlun 'sport = :53'").contains(":53"));
    process
}

fn wait_until_connected(worker: &Worker) {
    worker.wait_for_status("a connection to etcd", |status| {
        status["store"].to_string().contains("revision").then_some(())
    });
}

#[test]
fn srv_records_are_resolved_again_after_a_disconnection_and_only_with_tls() {
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::new(folder.path(), "polder-lab");
    let topology = Topology { etcd_members: 3, ..Topology::one_segment(1) };
    let mut lab = Lab::build_with_tls(topology, |_| Some(authority.for_etcd_named("*.polder.test")));
    let (cert, key) = authority.sign("n1", &[]);
    let [ca, cert, key] = [&authority.ca(), &cert, &key].map(|path| path.display().to_string());
    let config = lab.workers[0].configuration();
    let others: Vec<_> = config.lines().filter(|line| !line.starts_with("endpoints =")).collect();
    let etcd =
        format!("[etcd]\ndiscovery_srv = \"polder.test\"\nca = \"{ca}\"\ncert = \"{cert}\"\nkey = \"{key}\"");
    lab.workers[0].configure(&others.join("\n").replace("[etcd]", &etcd));
    // The host's /etc/resolv.conf may be a symbolic link that points outside the node.
    lab.workers[0].node.shell("rm -f /etc/resolv.conf; echo nameserver 10.10.1.200 > /etc/resolv.conf");

    let names = serve_names(&lab, WITH_TLS, &[0]);
    lab.workers[0].start_and_wait();
    let add = |lab: &Lab, name: &str, cidr: &str| {
        let worker = &lab.workers[0];
        wait::until(&format!("pool {name} to be added"), || worker.try_ctl(&["pool", "add", name, cidr]));
        wait_until_connected(worker);
    };
    add(&lab, "first", "10.245.0.0/16");
    // A pool must not contain an address that the SRV records point to.
    let message = lab.workers[0].try_ctl(&["pool", "add", "oops", "10.10.1.192/26"]).unwrap_err();
    assert!(message.contains("10.10.1.200, the address of etcd (etcd0.polder.test)"), "{message}");

    // The only member in the records is killed, and the records now name the other members.
    names.kill();
    let names = serve_names(&lab, WITH_TLS, &[1, 2]);
    lab.etcd.kill_member(0);
    add(&lab, "second", "10.246.0.0/16");
    lab.etcd.start_member(0);

    // The records for TLS are replaced by records without TLS: the agent keeps its known members and does not connect
    // without TLS.
    names.kill();
    let names = serve_names(&lab, WITHOUT_TLS, &[0, 1, 2]);
    lab.etcd.kill_member(1);
    add(&lab, "third", "10.247.0.0/16");
    lab.workers[0].kill();
    lab.workers[0].start();
    let reason = format!("cannot look up SRV records {WITH_TLS}: no records found");
    let is_reported = |status: &Value| status["store"].to_string().contains(&reason).then_some(());
    lab.workers[0].wait_for_status("the missing records to be named", is_reported);
    let asked = lab.etcd.machine(0).log("dnsmasq.log");
    assert!(asked.contains(&format!("query[SRV] {WITH_TLS}")), "{asked}");
    assert!(!asked.contains(&format!("query[SRV] {WITHOUT_TLS}")), "{asked}");

    // The records for TLS are back.
    names.kill();
    let _names = serve_names(&lab, WITH_TLS, &[0, 1, 2]);
    lab.workers[0].wait_until_ready();
    add(&lab, "fourth", "10.248.0.0/16");
}

/// Starts an `etcd grpc-proxy` on the machine of etcd, on that port.
fn start_proxy(lab: &Lab, port: u16, arguments: &[&str]) -> Process {
    let node = lab.etcd.machine(0);
    let mut command = node.command("etcd");
    command.args(["grpc-proxy", "start", "--endpoints", "http://10.10.1.200:2379"]);
    command.args(["--listen-addr", &format!("10.10.1.200:{port}")]).args(arguments);
    let process = node.spawn(&mut command, "proxy.log");
    let listening = format!("ss -Hltn 'sport = :{port}'");
    wait::until_true("the proxy to listen", || node.shell(&listening).contains(&port.to_string()));
    process
}

#[test]
fn a_grpc_proxy_is_reported_and_only_real_members_are_used() {
    let mut lab = Lab::build(Topology::one_segment(1));
    let _usual = start_proxy(&lab, 3379, &[]);
    let _hidden = start_proxy(&lab, 3380, &["--advertise-client-url", ""]);
    let config = lab.workers[0].configuration();
    let member = "\"http://10.10.1.200:2379\"";
    let with = |endpoints: &str| config.replace(member, endpoints);
    let refused = |worker: &Worker, words: &str| {
        worker.wait_for_status("the proxy to be named", |status| {
            let store = status["store"].to_string();
            (store.contains(words) && store.contains("etcd.endpoints")).then_some(())
        });
    };

    let proxy = "\"http://10.10.1.200:3379\"";
    lab.workers[0].configure(&with(proxy));
    lab.workers[0].start();
    refused(&lab.workers[0], "this is an etcd grpc-proxy");
    let message = lab.workers[0].try_ctl(&["pool", "add", "more", "10.245.0.0/16"]).unwrap_err();
    assert!(
        message.contains("this is an etcd grpc-proxy") && !message.contains("unknown whether"),
        "{message}"
    );
    assert!(lab.etcd.keys("/polder/").is_empty(), "something was written through the proxy");
    assert_eq!(lab.workers[0].log().matches("datastore unreachable").count(), 1);
    assert!(lab.workers[0].stop());

    lab.workers[0].configure(&with(&format!("{proxy}, {member}")));
    lab.workers[0].start_and_wait();
    wait_until_connected(&lab.workers[0]);
    // A request with its own credentials does not repeat the detection. This etcd has no users, and accepts any
    // credentials.
    let check = ["--etcd-user", "root", "ipam", "check"];
    lab.workers[0].try_ctl_with(&[("POLDERCTL_ETCD_PASSWORD", "secret")], &check).unwrap();
    assert!(lab.workers[0].stop());

    // A proxy that does not identify itself is detected because it sends no watch messages.
    lab.workers[0].configure(&with("\"http://10.10.1.200:3380\""));
    lab.workers[0].start();
    refused(
        &lab.workers[0],
        "no watch messages for 15 s, but reads are answered; if this is an etcd grpc-proxy",
    );
}
