//! Reading what is on the host and not ours. It is judged elsewhere, and never changed.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use ipnetwork::IpNetwork;
use polder_api::{BRIDGE, Family, PerFamily};
use polder_ipam::Cidr;
use polder_netlink::address::Address;
use polder_netlink::nft::foreign::{BaseChain, Condition, ForeignRule, Judged, Judgement};
use polder_netlink::routing::{AnyRoute, AnyRule};
use polder_netlink::{Error, IfIndex};

use super::{Kernel, ruleset};

/// Chains of one filter that are read: somebody who has more does not lead pods' packets through all of them.
const CHAINS: usize = 64;

/// What is on the host and not ours.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Surroundings {
    /// Routes and rules.
    pub routing: Routing,
    /// Chains of others that judge what is forwarded.
    pub filters: Vec<Filter>,
    /// Those that judge what is for the host itself.
    pub host_filters: Vec<Filter>,
    /// Those that judge all that comes in, or all that goes out.
    pub other_filters: Vec<(Judged, Filter)>,
    /// The families of which legacy iptables has a table `filter`. Netlink does not tell what is in it.
    pub legacy_filters: BTreeSet<Family>,
    /// How many neighbours the kernel keeps. Unknown outside of the machine's first network namespace.
    pub neighbours: PerFamily<Option<NeighbourLimits>>,
    /// Ports of our bridge.
    pub bridge_ports: usize,
    /// Whether the source address of what comes in is checked on all interfaces.
    pub filters_all_sources: bool,
}

/// Routes and rules.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Routing {
    /// The destinations of our routes.
    pub own: BTreeSet<IpNetwork>,
    /// Routes of others to addresses of pools, or to more than those.
    pub routes: Vec<AnyRoute>,
    /// All rules, in order.
    pub rules: Vec<AnyRule>,
    /// The names of the interfaces.
    pub interfaces: BTreeMap<IfIndex, String>,
    /// The addresses of the host.
    pub addresses: Vec<Address>,
}

/// A chain of others that judges packets, with the chains that it jumps to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Filter {
    /// Where it hangs.
    pub base: BaseChain,
    /// The rules of the chain and of those that it leads to, by the name of the chain.
    pub chains: BTreeMap<String, Vec<ForeignRule>>,
}

/// How many neighbours the kernel keeps, in all network namespaces together.
///
/// Permanent entries, as ours of pods and tunnels are, do not count (`exempt_from_gc` in `net/core/neighbour.c`, Linux
/// 5.0). Those on the underlay do: peers that are reached directly, or to whose tunnel the way is direct.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NeighbourLimits {
    /// `gc_thresh2`: with more, the kernel forgets some every few seconds, those in use not excepted.
    pub soft: usize,
    /// `gc_thresh3`: with so many there is no new one, and what is sent there is lost.
    pub hard: usize,
}

impl Kernel {
    /// Reads all of it, of routes those to the pools. What is for the host itself is of interest only where tunnels are closed.
    pub fn surroundings(
        &mut self,
        pools: &[(Cidr, u8)],
        tunnels_are_closed: bool,
    ) -> Result<Surroundings, Error> {
        Ok(Surroundings {
            routing: self.routing(pools)?,
            filters: self.foreign_filters(Judged::Forwarded)?,
            other_filters: self.other_filters()?,
            host_filters: if tunnels_are_closed {
                self.foreign_filters(Judged::ForHost)?
            } else {
                Vec::new()
            },
            legacy_filters: Family::BOTH.into_iter().filter(|family| has_legacy_filter(*family)).collect(),
            neighbours: PerFamily::each(|family| self.neighbour_limits(family)),
            bridge_ports: self.bridge_ports()?,
            filters_all_sources: self
                .sysctls
                .get("net/ipv4/conf/all/rp_filter")
                .is_ok_and(|value| value != "0"),
        })
    }

    /// Routes to pools, and all rules.
    fn routing(&mut self, pools: &[(Cidr, u8)]) -> Result<Routing, Error> {
        let found = self.routes.any_routes(|destination| is_wanted(pools, destination))?;
        let (own, routes): (Vec<_>, Vec<_>) = found.into_iter().partition(|route| route.ours);
        let interfaces = self.routes.links()?.into_values().map(|link| (link.index, link.name));
        Ok(Routing {
            own: own.into_iter().map(|route| route.destination).collect(),
            routes,
            rules: self.routes.any_rules()?,
            interfaces: interfaces.collect(),
            addresses: self.routes.addresses()?,
        })
    }

    fn neighbour_limits(&self, family: Family) -> Option<NeighbourLimits> {
        let limit = |name: &str| {
            let folder = match family {
                Family::V4 => "net/ipv4/neigh/default",
                Family::V6 => "net/ipv6/neigh/default",
            };
            self.sysctls.get(&format!("{folder}/{name}")).ok()?.parse().ok()
        };
        Some(NeighbourLimits { soft: limit("gc_thresh2")?, hard: limit("gc_thresh3")? })
    }

    fn bridge_ports(&mut self) -> Result<usize, Error> {
        let links = self.routes.links()?;
        let bridge = links.get(BRIDGE).map(|bridge| bridge.index);
        Ok(links.values().filter(|link| bridge.is_some() && link.controller == bridge).count())
    }

    fn foreign_filters(&mut self, judged: Judged) -> Result<Vec<Filter>, Error> {
        let chains = self.filter.base_chains(judged)?;
        let of_others = chains
            .into_iter()
            .filter(|chain| ![ruleset::NAME, ruleset::ANCHOR].contains(&chain.table.as_str()));
        of_others.map(|base| self.foreign_filter(base)).collect()
    }

    /// Chains that see pods' packets before and after they are forwarded.
    fn other_filters(&mut self) -> Result<Vec<(Judged, Filter)>, Error> {
        let mut filters = Vec::new();
        for judged in [Judged::Incoming, Judged::Outgoing] {
            filters.extend(self.foreign_filters(judged)?.into_iter().map(|filter| (judged, filter)));
        }
        Ok(filters)
    }

    /// Reads a chain and those that it leads to, as far as it can be told that it does.
    fn foreign_filter(&mut self, base: BaseChain) -> Result<Filter, Error> {
        let mut chains = BTreeMap::new();
        let mut wanted = vec![base.name.clone()];
        while let Some(name) = wanted.pop().filter(|_| chains.len() < CHAINS) {
            if let Entry::Vacant(entry) = chains.entry(name) {
                let rules = self.filter.rules_of(base.family, &base.table, entry.key())?;
                wanted.extend(rules.iter().filter_map(leads_to));
                entry.insert(rules);
            }
        }
        Ok(Filter { base, chains })
    }
}

fn leads_to(rule: &ForeignRule) -> Option<String> {
    match &rule.judgement {
        Judgement::Jump(chain) | Judgement::Goto(chain) if !rule.conditions.contains(&Condition::Other) => {
            Some(chain.clone())
        }
        _ => None,
    }
}

fn has_legacy_filter(family: Family) -> bool {
    let names = match family {
        Family::V4 => "/proc/net/ip_tables_names",
        Family::V6 => "/proc/net/ip6_tables_names",
    };
    fs::read_to_string(names).is_ok_and(|names| names.lines().any(|name| name == "filter"))
}

/// Whether routes to that destination are of interest.
fn is_wanted(pools: &[(Cidr, u8)], destination: IpNetwork) -> bool {
    let range = Cidr::around(destination.ip(), destination.prefix());
    pools.iter().any(|(pool, _)| pool.overlaps(range))
}
