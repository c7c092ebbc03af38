//! Measures the costs of pods: pods per second, writes to etcd, and bytes in ledger and etcd.
//!
//! The first figures are for the real plugin, called through `nsenter` as by a runtime. The last ones are for requests
//! sent to the agent without creating interfaces: they leave the same traces in ledger and etcd.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use clap::Parser;
use polder_api::client::Client;
use polder_api::message::{AddRequest, AddressSource, Reply, Request};
use polder_api::{Attachment, Pod};
use polder_tests::agent::Worker;
use polder_tests::fabric::Families;
use polder_tests::{Lab, Topology, wait};
use serde_json::Value;

/// Measures the costs of pods on one node with a dual-stack pool.
#[derive(Debug, Parser)]
struct Arguments {
    /// Pods for each rate
    #[arg(long, default_value_t = 100)]
    pods: u32,
    /// Attachments that are requested from the agent only, without interfaces
    #[arg(long, default_value_t = 10_000)]
    lives: u32,
}

/// Number of concurrent ADDs.
const AT_ONCE: usize = 8;

/// Longer than any request to the agent takes.
const TIMEOUT: Duration = Duration::from_secs(60);

fn main() -> anyhow::Result<()> {
    let Arguments { pods, lives } = Arguments::parse();
    let mut lab = Lab::build(Topology::one_segment(1).families(Families::DUAL));
    lab.workers[0].configure_also("ipam.cooldown_seconds = 10");
    lab.start_agents();

    rates(&lab, "etcd up", pods)?;
    writes(&lab, pods)?;
    // Blocks are claimed as long as possible.
    hold_at_once(&lab.workers[0], 3 * pods)?;
    wait::within(TIMEOUT, "addresses to have rested", || {
        let free = sum(&lab.workers[0].status(), "free");
        // Free addresses of both families, one of each for every pod of two rounds.
        if free > 4 * u64::from(pods) { Ok(()) } else { Err(format!("{free} are free")) }
    });
    lab.etcd.kill();
    rates(&lab, "etcd dead", pods)?;
    lab.etcd.start_again();
    lab.workers[0]
        .wait_for_status("etcd's return", |status| (status["store"]["state"] == "connected").then_some(()));

    sizes(&lab, "before")?;
    let (begin, revision) = (Instant::now(), revision(&lab)?);
    live(&lab.workers[0], lives)?;
    let took = begin.elapsed().as_secs_f64();
    wait::until_true("etcd to be told of the last end", || {
        lab.etcd.keys("/polder/v1/addresses/").is_empty() && sum(&lab.workers[0].status(), "used") == 2
    });
    let written = self::revision(&lab)? - revision;
    println!(
        "{lives} lives in the agent alone: {:.0}/s, {written} revisions of etcd",
        f64::from(lives) / took
    );
    sizes(&lab, "after")
}

/// ADDs and DELs per second, sequential and concurrent.
fn rates(lab: &Lab, state: &str, pods: u32) -> anyhow::Result<()> {
    let worker = &lab.workers[0];
    for at_once in [1, AT_ONCE] {
        let names: Vec<String> = (0..pods).map(|number| format!("p{at_once}-{number}")).collect();
        names.iter().for_each(|name| drop(worker.namespace(name)));
        for verb in ["ADD", "DEL"] {
            let begin = Instant::now();
            let call = |name: &String| {
                let netns = format!("/run/netns/{name}");
                let outcome = worker.cni(verb, name, &netns, &Worker::netconf("1.1.0"));
                outcome.map(drop).map_err(|error| anyhow::anyhow!("{verb} of {name}: {error}"))
            };
            let share = |number: usize| names.iter().skip(number).step_by(at_once).try_for_each(call);
            let share = &share;
            let calls: anyhow::Result<Vec<()>> = std::thread::scope(|scope| {
                let threads: Vec<_> = (0..at_once).map(|number| scope.spawn(move || share(number))).collect();
                threads.into_iter().map(|thread| thread.join().expect("a caller does not panic")).collect()
            });
            calls?;
            let rate = f64::from(pods) / begin.elapsed().as_secs_f64();
            println!("{state}, {at_once} at once: {rate:.0} {verb}s/s");
        }
        names.iter().for_each(|name| drop(worker.node.run("ip", &["netns", "delete", name])));
    }
    Ok(())
}

/// Revisions of etcd per pod: for single pods, and for many pods at once.
fn writes(lab: &Lab, pods: u32) -> anyhow::Result<()> {
    let worker = &lab.workers[0];
    let published = |count: u32| {
        wait::until_true("etcd to be told", || {
            lab.etcd.keys("/polder/v1/addresses/").len() == count as usize
        });
    };
    published(0);
    let before = revision(lab)?;
    for _ in 0..pods / 5 {
        let pod = worker.pod("alone");
        published(2);
        worker.delete(&pod);
        published(0);
    }
    let alone = revision(lab)? - before;
    let together: Vec<_> = (0..pods).map(|number| worker.pod(&format!("t{number}"))).collect();
    published(2 * pods);
    together.iter().for_each(|pod| worker.delete(pod));
    published(0);
    let all = revision(lab)? - before - alone;
    println!("revisions of etcd for the life of a pod alone: {:.2}", f64::from(alone) / f64::from(pods / 5));
    println!("revisions of etcd for the life of one of many pods: {:.2}", f64::from(all) / f64::from(pods));
    Ok(())
}

fn client(worker: &Worker) -> anyhow::Result<Client> {
    let socket = worker.node.path_on_host(Path::new(polder_api::DEFAULT_SOCKET));
    Ok(Client::connect(&socket, TIMEOUT)?)
}

/// Adds and deletes attachments without interfaces, one after the other.
fn live(worker: &Worker, lives: u32) -> anyhow::Result<()> {
    let mut client = client(worker)?;
    for number in 0..lives {
        let attachment = attach(&mut client, number)?;
        detach(&mut client, attachment)?;
    }
    Ok(())
}

/// Adds this number of attachments, and then deletes them.
fn hold_at_once(worker: &Worker, count: u32) -> anyhow::Result<()> {
    let mut held = Vec::new();
    for number in 0..count {
        let mut client = client(worker)?;
        let attachment = attach(&mut client, number)?;
        held.push((client, attachment));
    }
    held.into_iter().try_for_each(|(mut client, attachment)| detach(&mut client, attachment))
}

fn attach(client: &mut Client, number: u32) -> anyhow::Result<Attachment> {
    let attachment: Attachment = format!("polder/life{number}/eth0").parse()?;
    let name = format!("life{number}");
    let request = AddRequest {
        attachment: attachment.clone(),
        netns: format!("/run/netns/{name}"),
        pod: Some(Pod { namespace: "lab".to_owned(), name, uid: None }),
        source: AddressSource::Pools { pool: None, addresses: Vec::new() },
        mac: None,
        mtu: None,
        ports: Vec::new(),
    };
    match client.ask(Request::Add(request))? {
        Reply::Wiring(_) => {}
        other => bail!("ADD of {attachment}: {other:?}"),
    }
    match client.receive()? {
        Reply::Permitted => Ok(attachment),
        other => bail!("permission of {attachment}: {other:?}"),
    }
}

fn detach(client: &mut Client, attachment: Attachment) -> anyhow::Result<()> {
    let reply = client.ask(Request::Del(attachment))?;
    ensure!(reply == Reply::Deleted, "DEL: {reply:?}");
    Ok(())
}

fn sum(status: &Value, what: &str) -> u64 {
    status["blocks"].as_array().into_iter().flatten().filter_map(|block| block[what].as_u64()).sum()
}

fn endpoint(lab: &Lab) -> anyhow::Result<Value> {
    let status = lab.etcd.ctl(&["endpoint", "status", "--write-out", "json"]);
    let status: Value = serde_json::from_str(&status)?;
    Ok(status[0]["Status"].clone())
}

fn revision(lab: &Lab) -> anyhow::Result<u32> {
    let revision = endpoint(lab)?["header"]["revision"].as_u64().context("etcd's revision")?;
    Ok(u32::try_from(revision)?)
}

fn sizes(lab: &Lab, when: &str) -> anyhow::Result<()> {
    let files = lab.workers[0].node.shell("cd /var/lib/polder; stat -c '%n %s' ledger.db*");
    let files: Vec<_> = files.lines().collect();
    let status = lab.workers[0].status();
    let blocks = status["blocks"].as_array().map_or(0, Vec::len);
    let etcd = &endpoint(lab)?;
    println!(
        "{when}: {} bytes; etcd {} bytes, {} of them in use; {blocks} blocks",
        files.join(", "),
        etcd["dbSize"],
        etcd["dbSizeInUse"]
    );
    Ok(())
}
