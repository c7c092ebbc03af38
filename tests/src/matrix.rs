//! All pairs of pods: whether each reaches the other at its own address, and is seen with its own address.

use std::collections::BTreeSet;
use std::fmt;
use std::net::IpAddr;

use crate::fabric::Families;
use crate::pod::Pod;
use crate::probe::{self, Echo};

/// A pair of pods, with one address of each.
#[derive(Debug)]
pub struct Pair<'a> {
    /// The sending pod.
    pub from: &'a Pod,
    /// Address of the sending pod.
    pub from_address: IpAddr,
    /// The answering pod.
    pub to: &'a Pod,
    /// Address of the answering pod.
    pub to_address: IpAddr,
}

/// All ordered pairs of different pods, once for each family. Every pod must have an address of each family.
pub fn pairs(pods: &[Pod], families: Families) -> Vec<Pair<'_>> {
    let mut pairs = Vec::new();
    for from in pods {
        for to in pods.iter().filter(|to| to.netns() != from.netns() || to.node() != from.node()) {
            pairs.extend(families.each().map(|family| Pair {
                from,
                from_address: from.address_of(family),
                to,
                to_address: to.address_of(family),
            }));
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

/// Results of a successful check.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// Round-trip time as printed by `ping`.
    pub round_trip: String,
    /// The addresses of the sender that the receiver saw, over UDP and TCP.
    pub sources: BTreeSet<IpAddr>,
}

/// Sends ping, UDP and TCP between all pairs, in both directions, also with the largest packet that the MTU permits.
/// Fails with all problems. If one pod has a family, all pods must have it.
pub fn assert_flat(pods: &[Pod], mtu: usize) {
    let addresses = pods.iter().flat_map(Pod::addresses);
    assert_flat_over(Families::of(addresses.map(|address| address.to_string())), pods, mtu);
}

/// Sends a datagram between all pairs, in both directions, and checks the reply: for more pods than [`assert_flat`] can
/// check in time. The receiver must see the sender's own address.
pub fn assert_reachable(pods: &[Pod], families: Families) {
    let servers = listen(pods);
    let pairs = pairs(pods, families);
    let mut problems = Vec::new();
    for from in pods {
        let own = pairs.iter().filter(|pair| std::ptr::eq(pair.from, from));
        let check = |pair: &Pair<'_>| match probe::udp(pair.from_address, pair.to_address, 100) {
            Ok((seen, _)) if seen == pair.from_address => None,
            Ok((seen, _)) => Some(format!("{pair}: the sender is seen as {seen}")),
            Err(error) => Some(format!("{pair}: {error}")),
        };
        problems.extend(from.within(|| own.filter_map(check).collect::<Vec<_>>()));
    }
    drop(servers);
    assert!(problems.is_empty(), "{} of {} pairs: {problems:#?}", problems.len(), pairs.len());
}

/// Like [`assert_flat`], for these families: fails if a pod lacks one of them.
pub fn assert_flat_over(families: Families, pods: &[Pod], mtu: usize) {
    let servers = listen(pods);
    let pairs = pairs(pods, families);
    let expected = pods.len() * (pods.len() - 1) * families.each().count();
    assert!(pairs.len() == expected && expected > 0, "{} pairs instead of {expected}", pairs.len());
    let check = |pair: &Pair<'_>| {
        let problem = pair.check(mtu).err()?;
        let [from, to] = [pair.from, pair.to].map(|pod| probe::drops(pod.command("sh")));
        Some(format!("{problem}; dropped in the sender: {from:?}, in the receiver: {to:?}"))
    };
    let problems: Vec<String> = pairs.iter().filter_map(check).collect();
    drop(servers);
    assert!(problems.is_empty(), "{} of {} pairs: {problems:#?}", problems.len(), pairs.len());
}

impl Pair<'_> {
    /// Sends ping, UDP and TCP: whether all of them arrive, and the receiver sees only the sender's own address.
    pub fn check(&self, mtu: usize) -> Result<Seen, String> {
        let seen = self.measure(mtu).and_then(|seen| {
            let own = seen.sources == BTreeSet::from([self.from_address]);
            if own { Ok(seen) } else { Err(format!("the sender is seen as {:?}", seen.sources)) }
        });
        seen.map_err(|problem| format!("{self}: {problem}"))
    }

    /// Sends ping, UDP and TCP to the receiver, small and in the largest packet that the MTU permits. The echo servers
    /// must run.
    pub fn measure(&self, mtu: usize) -> Result<Seen, String> {
        let Pair { from, from_address, to_address, .. } = *self;
        let headers = if from_address.is_ipv4() { 20 + 8 } else { 40 + 8 };
        let mut round_trip = String::new();
        for bytes in [mtu - headers, 56] {
            round_trip = probe::ping(from.command("ping"), to_address, bytes)
                .map_err(|error| format!("ping of {bytes}: {error}"))?;
        }
        let mut sources = BTreeSet::new();
        from.within(|| {
            for bytes in [10, mtu - headers] {
                sources.insert(probe::udp(from_address, to_address, bytes)?.0);
            }
            for bytes in [10, 300_000] {
                sources.insert(probe::tcp(to_address, bytes)?);
            }
            Ok::<_, String>(())
        })?;
        Ok(Seen { round_trip, sources })
    }
}

impl fmt::Display for Pair<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Pair { from, from_address, to, to_address } = self;
        let (from, to) = ((from.name(), from.node()), (to.name(), to.node()));
        write!(f, "{} on {} to {} on {} ({from_address} to {to_address})", from.0, from.1, to.0, to.1)
    }
}
