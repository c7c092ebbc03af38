//! Every pair of pods: whether each reaches the other at its own address, and is seen at its own.

use std::net::IpAddr;

use crate::pod::Pod;
use crate::probe::{self, Echo};

/// A pair of pods, and how it went.
#[derive(Debug)]
pub struct Pair<'a> {
    /// Who sends.
    pub from: &'a Pod,
    /// His address.
    pub from_address: IpAddr,
    /// Who answers.
    pub to: &'a Pod,
    /// His address.
    pub to_address: IpAddr,
}

/// All ordered pairs of different pods, once for each family.
pub fn pairs(pods: &[Pod]) -> Vec<Pair<'_>> {
    let mut pairs = Vec::new();
    for from in pods {
        for to in pods.iter().filter(|to| to.netns() != from.netns() || to.node() != from.node()) {
            for from_address in from.addresses() {
                let to_address = to.address_like(from_address);
                pairs.push(Pair { from, from_address, to, to_address });
            }
        }
    }
    pairs
}

/// Starts echo servers on all addresses of all pods. They end when they are dropped.
pub fn listen(pods: &[Pod]) -> Vec<Echo> {
    pods.iter()
        .flat_map(|pod| pod.addresses().into_iter().map(|address| pod.within(|| Echo::start(address))))
        .collect()
}

/// Ping, UDP and TCP between all pairs, in both directions, with the largest packet that the MTU allows, too. Fails
/// with all that went wrong.
pub fn assert_flat(pods: &[Pod], mtu: usize) {
    let servers = listen(pods);
    let pairs = pairs(pods);
    assert!(pairs.len() >= pods.len() * (pods.len() - 1), "no pairs, no proof");
    let problems: Vec<String> = pairs.iter().filter_map(|pair| check(pair, mtu).err()).collect();
    drop(servers);
    assert!(problems.is_empty(), "{} of {} pairs: {problems:#?}", problems.len(), pairs.len());
}

/// One pair.
pub fn check(pair: &Pair<'_>, mtu: usize) -> Result<(), String> {
    let Pair { from, from_address, to_address, .. } = *pair;
    let names = format!("{} on {} to {} on {}", from.name(), from.node(), pair.to.name(), pair.to.node());
    let wrong = |problem: String| format!("{names} ({from_address} to {to_address}): {problem}");
    let own = |what: &str, seen: IpAddr| {
        if seen == from_address { Ok(()) } else { Err(wrong(format!("{what} is seen from {seen}"))) }
    };
    let headers = if from_address.is_ipv4() { 20 + 8 } else { 40 + 8 };
    for bytes in [56, mtu - headers] {
        probe::ping(from.command("ping"), to_address, bytes)
            .map_err(|error| wrong(format!("ping of {bytes}: {error}")))?;
    }
    from.within(|| {
        for bytes in [10, mtu - headers] {
            own("udp", probe::udp(from_address, to_address, bytes).map_err(wrong)?.0)?;
        }
        for bytes in [10, 300_000] {
            own("tcp", probe::tcp(to_address, bytes).map_err(wrong)?)?;
        }
        Ok(())
    })
}
