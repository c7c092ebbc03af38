//! An etcd that answers but refuses writes: it has no space left, or its users and roles do not permit them.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use polder_ipam::store::{Outcome, StoreError, Txn, Write};
use polder_store::Store;
use polder_store::etcd::Etcd;
use polder_store::etcd::config::{EtcdConfig, Pem};
use polder_tests::agent::Worker;
use polder_tests::tls::Authority;
use polder_tests::{Lab, Topology, cni, wait};
use serde_json::{Value, json};
use tokio::runtime;

/// Timeout until a refusal is noticed. A node without pending writes checks every 30 s.
const NOTICE_TIMEOUT: Duration = Duration::from_secs(120);

/// More pods than a block of the small pool has addresses.
const MANY: usize = 8;

/// More writes than an ADD attempts, including other writes at the same time. An ADD that treats a refusal as an
/// unknown outcome attempts one block after the other, up to 50.
const MANY_ATTEMPTS: u64 = 25;

/// The number of refused writes.
const REFUSED: &str = "polder_store_write_failures_total{result=\"refused\"}";

const NO_SPACE: &str = "database space exceeded";
const NO_PERMISSION: &str = "permission denied";

fn problem(worker: &Worker, words: &[&str]) -> Option<String> {
    let status = worker.try_status().ok()?;
    let problems = status["problems"].as_array()?.iter().filter_map(Value::as_str);
    let has_all =
        |problem: &&str| problem.contains("has refused") && words.iter().all(|word| problem.contains(word));
    problems.into_iter().find(has_all).map(str::to_owned)
}

fn wait_for_problem(worker: &Worker, words: &[&str]) -> String {
    wait::within(NOTICE_TIMEOUT, &format!("{} to report the write that etcd refuses", worker.name()), || {
        problem(worker, words).ok_or_else(|| worker.try_status().unwrap_or_default().to_string())
    })
}

fn wait_until_no_problem(worker: &Worker) {
    wait::within(NOTICE_TIMEOUT, &format!("{} to have no problem", worker.name()), || {
        let status = worker.try_status()?;
        let has_no_problem = status["problems"] == json!([]) && status["refused_writes"] == json!([]);
        if has_no_problem { Ok(()) } else { Err(status.to_string()) }
    });
}

/// The value of a metric; `name` includes its labels.
fn metric(worker: &Worker, name: &str) -> u64 {
    let (_, text) = worker.http("/metrics");
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    value.unwrap_or_else(|| panic!("{name} is not in {text}")).parse().unwrap()
}

fn of_small_pool() -> Value {
    cni::conf("1.1.0", &json!({ "pool": "small" }))
}

/// Adds a pool with blocks of four addresses, and one pod, so that the node owns a block.
fn add_small_pool(worker: &Worker) {
    worker.ctl(&["pool", "add", "small", "10.245.0.0/24", "--block-length", "30"]);
    wait::until_true("the pool to be known", || worker.ctl(&["pool", "list"]).to_string().contains("small"));
    worker.pod_with("first", &of_small_pool());
}

/// Adds pods until no address is left. Returns the error of the last ADD.
fn fill_block(worker: &Worker) -> Value {
    let mut pods = (0..MANY).map(|number| worker.try_pod(&format!("pod{number}"), &of_small_pool()));
    pods.find_map(Result::err).expect("the block is full at some time")
}

/// The number of lines in the agent's log that contain these words.
fn count_log_lines(worker: &Worker, words: &str) -> usize {
    worker.log().lines().filter(|line| line.contains(words)).count()
}

/// An ADD that needs a block reports etcd's reason and the remedy, and no other reason.
fn assert_true_reason(worker: &Worker, words: &str, remedy: &str) {
    let error = fill_block(worker);
    let message = error["msg"].as_str().unwrap();
    assert!(error["code"] == 11 && message.contains(words) && message.contains(remedy), "{error}");
    assert!(!message.contains("too slow") && !message.contains("does not answer"), "{error}");
    // A refusal ends the attempt: etcd would refuse other blocks too.
    let refused = || metric(worker, REFUSED);
    let before = refused();
    let again = worker.try_pod("again", &of_small_pool()).unwrap_err();
    let more = refused() - before;
    assert!(again["code"] == 11 && more < MANY_ATTEMPTS, "{more} writes were refused: {again}");
    let log = worker.log();
    assert!(!log.contains("other nodes were faster") && !log.contains("too slow"), "{log}");
}

/// Commands that write report the refusal, and not an unknown outcome.
fn assert_commands_refused(worker: &Worker, words: &str) {
    for arguments in [
        &["pool", "add", "another", "10.246.0.0/16"][..],
        &["pool", "drain", "small"],
        &["cluster", "set", "--backend", "vxlan"],
        &["node", "remove", "n2"],
        &["ipam", "check"],
    ] {
        let message = worker.try_ctl(arguments).expect_err(&format!("{arguments:?} was done"));
        assert!(message.contains(words), "{arguments:?}: {message}");
        assert!(
            !message.contains("known") && !message.contains("does not answer"),
            "{arguments:?}: {message}"
        );
    }
}

fn is_alive(observer: &Worker, name: &str) -> bool {
    let nodes = observer.ctl(&["node", "list"]);
    nodes.as_array().unwrap().iter().any(|node| node["name"] == name && node["alive"] == true)
}

#[test]
fn etcd_without_space_is_reported_by_all_nodes_and_by_an_add() {
    let mut lab = Lab::start(Topology::one_segment(2));
    add_small_pool(&lab.workers[0]);
    lab.etcd.run_out_of_space();
    // The second node has nothing to write: it detects the refusal by its own check.
    for worker in &lab.workers {
        let problem = wait_for_problem(worker, &[NO_SPACE]);
        for part in ["no new block", "not published", "no lease", "etcdctl alarm disarm"] {
            assert!(problem.contains(part), "{part}: {problem}");
        }
        assert_eq!(worker.status()["ready"], true);
        assert_eq!(metric(worker, "polder_store_refusing_writes"), 1);
        assert!(metric(worker, REFUSED) > 0);
        assert_eq!(count_log_lines(worker, "writes are refused"), 1, "{}", worker.log());
    }
    assert_true_reason(&lab.workers[0], NO_SPACE, "etcdctl alarm disarm");
    assert_commands_refused(&lab.workers[0], NO_SPACE);

    lab.workers[0].kill();
    wait::until_true("the lease to run out", || !is_alive(&lab.workers[1], "n1"));
    // After the reboot the node must write its record again, and first check whether its name is alive elsewhere.
    lab.reboot(0);
    lab.workers[0].start_and_wait();
    wait_for_problem(&lab.workers[0], &[NO_SPACE]);
    assert!(!is_alive(&lab.workers[1], "n1"));

    lab.etcd.have_space_again();
    lab.workers.iter().for_each(wait_until_no_problem);
    wait::until_true("the node to be alive", || is_alive(&lab.workers[1], "n1"));
    lab.workers[0].pod_with("last", &of_small_pool());
    for worker in &lab.workers {
        assert_eq!(metric(worker, "polder_store_refusing_writes"), 0);
        assert!(count_log_lines(worker, "accepts writes again") > 0, "{}", worker.log());
    }
}

#[test]
fn a_removed_node_does_not_serve_while_it_cannot_confirm_that_its_pods_are_gone() {
    let mut lab = Lab::start(Topology::one_segment(2));
    lab.workers[1].pod("before");
    lab.workers[1].kill();
    lab.workers[0].remove_node("n2", 1);
    lab.etcd.run_out_of_space();
    lab.workers[1].start();
    let removed = &lab.workers[1];
    let reports =
        |words: &str| removed.try_status().is_ok_and(|status| status["reasons"].to_string().contains(words));
    wait::until_true("the confirmation to be refused", || count_log_lines(removed, NO_SPACE) > 0);
    wait::until_true("the node to report its removal", || reports("was removed from the cluster"));
    let error = removed.try_pod("after", &Worker::netconf("1.1.0")).map(drop).unwrap_err();
    assert!(error["code"] == 103 && error["msg"].as_str().unwrap().contains("was removed"), "{error}");

    lab.etcd.have_space_again();
    let fences = || lab.etcd.ctl(&["get", "--prefix", "/polder/v1/fences/n2/", "--print-value-only"]);
    wait::until_true("the removal to be confirmed", || fences().contains("confirmed"));
}

/// A key prefix other than the default.
const PREFIX: &str = "/clusters/blue/";

/// Grants `polder` this permission on the prefix, which replaces the previous one.
fn permit(lab: &Lab, permission: &str, prefix: &str) {
    lab.etcd.change_users(&["role", "grant-permission", "polder", "--prefix=true", permission, prefix]);
}

/// A lab whose etcd identifies clients by their certificates: `polder` may read and write under the prefix only.
fn lab_with_users(folder: &Path, prefix: &str) -> Lab {
    let authority = Authority::new(folder, "polder-lab");
    let mut lab =
        Lab::build_with_tls(Topology::one_segment(2), |addresses| Some(authority.for_etcd(addresses)));
    let (root, client) = (authority.sign("root", &[]), authority.sign("polder", &[]));
    lab.etcd.identify(&root.0, &root.1);
    for arguments in [
        &["user", "add", "root:secret"][..],
        &["user", "grant-role", "root", "root"],
        &["role", "add", "polder"],
        &["user", "add", "polder:secret"],
        &["user", "grant-role", "polder", "polder"],
    ] {
        lab.etcd.change_users(arguments);
    }
    permit(&lab, "readwrite", prefix);
    lab.etcd.change_users(&["auth", "enable"]);
    let ca = authority.ca();
    let [ca, cert, key] = [ca.display(), client.0.display(), client.1.display()];
    let tls = format!("[etcd]\nca = \"{ca}\"\ncert = \"{cert}\"\nkey = \"{key}\"\nprefix = \"{prefix}\"\n");
    for worker in &lab.workers {
        worker.configure(&worker.configuration().replace("[etcd]\n", &tls));
    }
    lab
}

#[test]
fn a_read_only_role_is_reported_with_the_refused_writes_and_the_missing_grant() {
    let folder = tempfile::tempdir().unwrap();
    let mut lab = lab_with_users(folder.path(), PREFIX);
    lab.start_agents();
    add_small_pool(&lab.workers[0]);
    permit(&lab, "read", PREFIX);
    let grant = format!("etcdctl role grant-permission ROLE --prefix=true readwrite {PREFIX}");
    for worker in &lab.workers {
        // A refused write is reported as soon as it was attempted; the lease may be the last.
        wait_for_problem(worker, &[NO_PERMISSION, &grant, "no lease"]);
        assert_eq!(worker.status()["ready"], true);
    }
    assert_true_reason(&lab.workers[0], NO_PERMISSION, "grant-permission");
    assert_commands_refused(&lab.workers[0], NO_PERMISSION);
    // The refused commands are over; the node's own writes are still refused.
    lab.workers[0].kill();
    wait::until_true("the lease to run out", || !is_alive(&lab.workers[1], "n1"));
    lab.workers[0].start_and_wait();
    wait_for_problem(&lab.workers[0], &[NO_PERMISSION, "no lease"]);

    // All permissions are revoked: the existing watch continues.
    lab.etcd.change_users(&["role", "revoke-permission", "polder", "--prefix=true", PREFIX]);
    wait_for_problem(&lab.workers[1], &[NO_PERMISSION]);

    permit(&lab, "readwrite", PREFIX);
    lab.workers.iter().for_each(wait_until_no_problem);
    wait::until_true("the node to be alive", || is_alive(&lab.workers[1], "n1"));
    lab.workers[0].pod_with("last", &of_small_pool());
}

/// Sets a flag when it is dropped, also if the test fails.
struct SetOnDrop<'a>(&'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// The configuration of an etcd client with the certificate of `polder`.
fn etcd_config(lab: &Lab, folder: &Path) -> EtcdConfig {
    let read = |name: &str| std::fs::read(folder.join(name)).unwrap();
    EtcdConfig {
        endpoints: lab.etcd.endpoints(),
        ca: Some(Pem::Inline(read("ca.pem"))),
        identity: Some((Pem::Inline(read("polder.pem")), Pem::Inline(read("polder.key")))),
        ..EtcdConfig::default()
    }
}

#[test]
fn a_write_during_a_change_of_users_is_applied_or_refused_for_certain() {
    const WRITERS: usize = 12;
    const CHANGES: u64 = 60;
    let folder = tempfile::tempdir().unwrap();
    let lab = lab_with_users(folder.path(), "/polder/v1/");
    let (done, written) = (AtomicBool::new(false), AtomicUsize::new(0));
    let write = async |store: &Store, writer: usize| {
        for number in 0.. {
            if done.load(Ordering::Relaxed) {
                break;
            }
            let key = format!("/polder/v1/blocks/{writer}-{number}");
            let put = Write::Put { key, value: b"{}".to_vec() };
            match store.transact(&Txn { compares: Vec::new(), writes: vec![put] }).await {
                Ok(Outcome::Applied { .. }) => drop(written.fetch_add(1, Ordering::Relaxed)),
                // The users changed twice in a row.
                Err(StoreError::Refused { refusal, .. }) => {
                    assert!(refusal.message.contains("revision of auth store is old"), "{refusal}");
                }
                other => panic!("nobody knows what became of it: {other:?}"),
            }
        }
    };
    let machine = lab.etcd.nodes().next().unwrap();
    std::thread::scope(|scope| {
        let writers = scope.spawn(|| {
            machine.within(|| {
                let runtime = runtime::Builder::new_current_thread().enable_all().build().unwrap();
                runtime.block_on(async {
                    let store = Store::Etcd(Etcd::new(&etcd_config(&lab, folder.path())).await.unwrap());
                    let store = &store;
                    let mut tasks: Vec<_> =
                        (0..WRITERS).map(|writer| Box::pin(write(store, writer))).collect();
                    std::future::poll_fn(|context| {
                        tasks.retain_mut(|task| task.as_mut().poll(context).is_pending());
                        if tasks.is_empty() { std::task::Poll::Ready(()) } else { std::task::Poll::Pending }
                    })
                    .await;
                    assert_eq!(store.writes().failures().unknown, 0);
                    // With one attempt per write, several writers would be refused at each change; with a retry, hardly
                    // any.
                    let refused = store.writes().failures().refused;
                    assert!(refused < CHANGES, "{refused} writes were refused at {CHANGES} changes");
                });
            });
        });
        // Even if this thread panics, the writers must end.
        let end = SetOnDrop(&done);
        for number in 0..CHANGES {
            lab.etcd.change_users(&["role", "add", &format!("role{number}")]);
            if writers.is_finished() {
                break;
            }
        }
        drop(end);
        writers.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
    let there = lab.etcd.keys("/polder/v1/blocks/").len();
    assert_eq!(there, written.load(Ordering::Relaxed), "what was refused must not be there");
    assert!(there > WRITERS, "hardly anything was written");
}
