//! The owner of each address, according to all sources: the kernel, the ledgers and etcd.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnetwork::IpNetwork;
use serde_json::Value;

use crate::Lab;
use crate::agent::Worker;
use crate::churn::truth::Holder;
use crate::etcd::Etcd;

/// The state of all sources at about the same time.
#[derive(Debug, Default)]
pub struct Census {
    /// The addresses of pods in the kernel.
    pub pods: BTreeMap<IpAddr, Holder>,
    /// The nodes, by name.
    pub nodes: BTreeMap<String, NodeCensus>,
    /// The addresses in etcd, each with its node.
    pub published: BTreeSet<(String, IpAddr)>,
    /// The claims in etcd, each with its node.
    pub claims: BTreeSet<(IpNetwork, String)>,
    /// Addresses that two pods have, as texts.
    pub twice: Vec<String>,
}

/// A node.
#[derive(Debug)]
pub struct NodeCensus {
    /// The node's own addresses on the bridge.
    pub gateways: Vec<IpAddr>,
    /// Number of namespaces with a pod interface.
    pub interfaces: usize,
    /// Number of pod interfaces on the host.
    pub ends: usize,
    /// Number of attachments in the ledger.
    pub attachments: u64,
    /// Number of used addresses in the ledger.
    pub used: u64,
    /// The blocks in the ledger.
    pub blocks: BTreeSet<IpNetwork>,
    /// Why the node is not ready; empty if it is ready.
    pub reasons: String,
}

impl Census {
    /// Reads all sources.
    pub fn take(lab: &Lab) -> Result<Self, String> {
        let mut census =
            Self { published: published(&lab.etcd)?, claims: claims(&lab.etcd)?, ..Self::default() };
        for worker in &lab.workers {
            census.add(worker)?;
        }
        Ok(census)
    }

    fn add(&mut self, worker: &Worker) -> Result<(), String> {
        let status = worker.try_status()?;
        let inside = "for name in $(ls /run/netns); do \
                      ip -n $name -o address show dev eth0 scope global 2>/dev/null | sed \"s/^/$name /\"; done";
        let mut containers = BTreeSet::new();
        for line in worker.node.shell(inside).lines() {
            let (container, address) = first_and_address(line).ok_or_else(|| line.to_owned())?;
            let holder = Holder { node: worker.name().to_owned(), container };
            containers.insert(holder.container.clone());
            if let Some(other) = self.pods.insert(address, holder.clone()) {
                self.twice.push(format!("{address} is that of {holder:?} and of {other:?}"));
            }
        }
        let own = worker.node.shell("ip -o address show dev polder0 scope global 2>/dev/null || true");
        let blocks = status["blocks"].as_array().ok_or_else(|| status.to_string())?;
        let block = |block: &Value| block["block"].as_str()?.parse::<IpNetwork>().ok();
        self.nodes.insert(
            worker.name().to_owned(),
            NodeCensus {
                gateways: own.lines().filter_map(first_and_address).map(|(_, address)| address).collect(),
                interfaces: containers.len(),
                ends: worker
                    .node
                    .run("ip", &["-o", "link"])
                    .lines()
                    .filter(|line| line.contains(": pld"))
                    .count(),
                attachments: status["pods"].as_u64().unwrap_or_default(),
                used: blocks.iter().filter_map(|block| block["used"].as_u64()).sum(),
                blocks: blocks.iter().filter_map(block).collect(),
                reasons: if status["ready"] == true { String::new() } else { status["reasons"].to_string() },
            },
        );
        Ok(())
    }

    /// The differences between the sources, and from `live`, the state known by the test. Changes in progress can cause
    /// differences.
    pub fn differences(&self, live: &BTreeMap<IpAddr, Holder>) -> Vec<String> {
        let mut differences = self.twice.clone();
        let mut differ =
            |what: String, one: &dyn std::fmt::Debug, other: &dyn std::fmt::Debug, same: bool| {
                if !same {
                    differences.push(format!("{what}: {one:?} and {other:?}"));
                }
            };
        for address in self.pods.keys().chain(live.keys()).collect::<BTreeSet<_>>() {
            let (kernel, test) = (self.pods.get(address), live.get(address));
            differ(format!("{address} in the kernel and in truth"), &kernel, &test, kernel == test);
        }
        let wired: BTreeSet<_> =
            self.pods.iter().map(|(address, holder)| (holder.node.clone(), *address)).collect();
        let too_many: Vec<_> = self.published.difference(&wired).collect();
        let too_few: Vec<_> = wired.difference(&self.published).collect();
        let same = too_many.is_empty() && too_few.is_empty();
        differ("addresses in etcd alone and in the kernel alone".to_owned(), &too_many, &too_few, same);
        let owned = self.nodes.iter();
        let owned: BTreeSet<_> =
            owned.flat_map(|(name, node)| node.blocks.iter().map(|block| (*block, name.clone()))).collect();
        differ("claims in etcd and blocks in ledgers".to_owned(), &self.claims, &owned, self.claims == owned);
        let blocks: Vec<_> = owned.iter().map(|(block, _)| *block).collect();
        for (one, other) in blocks.iter().zip(blocks.iter().skip(1)) {
            differ("blocks that follow each other".to_owned(), one, other, !one.contains(other.network()));
        }
        for (name, node) in &self.nodes {
            let pods =
                self.pods.iter().filter(|(_, holder)| holder.node == *name).map(|(address, _)| address);
            let all: Vec<_> = pods.chain(&node.gateways).collect();
            let used = node.used == all.len() as u64;
            differ(
                format!("used addresses of {name}, and interfaces' addresses"),
                &node.used,
                &all.len(),
                used,
            );
            let ends = [node.attachments, node.interfaces as u64, node.ends as u64];
            let same = ends.iter().all(|count| *count == ends[0]);
            differ(format!("attachments of {name}, interfaces and their ends"), &ends[0], &&ends[1..], same);
            let homeless: Vec<_> = all
                .into_iter()
                .filter(|address| !node.blocks.iter().any(|own| own.contains(**address)))
                .collect();
            differ(
                format!("addresses of {name} and its blocks"),
                &homeless,
                &node.blocks,
                homeless.is_empty(),
            );
            differ(format!("readiness of {name}"), &node.reasons, &"", node.reasons.is_empty());
        }
        differences
    }
}

/// The first word of a line of `ip -o address`, and the address in the line.
fn first_and_address(line: &str) -> Option<(String, IpAddr)> {
    let mut words = line.split_whitespace();
    let first = words.next()?.to_owned();
    let address = words.skip_while(|word| !word.starts_with("inet")).nth(1)?;
    Some((first, address.split('/').next()?.parse().ok()?))
}

fn published(etcd: &Etcd) -> Result<BTreeSet<(String, IpAddr)>, String> {
    let prefix = "/polder/v1/addresses/";
    let printed = etcd.try_ctl(&["get", "--prefix", "--keys-only", prefix])?;
    let keys = printed.lines().filter(|line| !line.is_empty()).map(|key| {
        let (node, address) = key.strip_prefix(prefix)?.split_once('/')?;
        Some((node.to_owned(), address.parse().ok()?))
    });
    keys.collect::<Option<_>>().ok_or_else(|| format!("keys under {prefix} that name no address"))
}

fn claims(etcd: &Etcd) -> Result<BTreeSet<(IpNetwork, String)>, String> {
    let prefix = "/polder/v1/blocks/";
    let printed = etcd.try_ctl(&["get", "--prefix", prefix])?;
    let lines: Vec<_> = printed.lines().collect();
    let claim = |pair: &[&str]| {
        let mut words = pair.first()?.strip_prefix(prefix)?.split('-');
        let (family, base, length) = (words.next()?, words.next()?, words.next()?);
        let address: IpAddr = match family {
            "4" | "v4" | "ipv4" => u32::from_str_radix(base, 16).ok().map(|bits| IpAddr::V4(bits.into()))?,
            _ => u128::from_str_radix(base, 16).ok().map(|bits| IpAddr::V6(bits.into()))?,
        };
        let record: Value = serde_json::from_str(pair.get(1)?).ok()?;
        Some((IpNetwork::new(address, length.parse().ok()?).ok()?, record["node"].as_str()?.to_owned()))
    };
    let claims = lines.chunks(2).map(claim).collect::<Option<_>>();
    claims.ok_or_else(|| format!("claims that are none: {printed}"))
}
