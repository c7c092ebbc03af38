//! Reading what is on the host and not ours. It is judged elsewhere, and never changed.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fs;
use std::path::Path;

use polder_api::{BRIDGE, Family};
use polder_netlink::Error;
use polder_netlink::nft::foreign::{BaseChain, Condition, ForeignRule, Judged, Judgement};

use super::{Kernel, ruleset};
use crate::host::firewall::Filter;
use crate::host::limits::NeighbourLimits;
use crate::host::managers;
use crate::host::routing::{Pods, Routing, is_wanted};
use crate::host::{Facts, Needs};

/// Chains of one filter that are read: somebody who has more does not lead pods' packets through all of them.
const CHAINS: usize = 64;

impl Kernel {
    /// Reads all of it. What is for the host itself is of interest only where tunnels are closed.
    pub fn host_facts(&mut self, needs: &Needs) -> Result<Facts, Error> {
        let closed = !needs.closed_tunnels.is_empty();
        Ok(Facts {
            routing: self.routing(&needs.pods)?,
            filters: self.foreign_filters(Judged::Forwarded)?,
            other_filters: self.other_filters()?,
            host_filters: if closed { self.foreign_filters(Judged::ForHost)? } else { Vec::new() },
            legacy_filters: Family::BOTH.into_iter().filter(|family| has_legacy_filter(*family)).collect(),
            neighbours: Family::BOTH.into_iter().filter_map(|family| self.neighbour_limits(family)).collect(),
            bridge_ports: self.bridge_ports()?,
            gaps: managers::gaps(Path::new("/")),
            filters_all_sources: self
                .sysctls
                .get("net/ipv4/conf/all/rp_filter")
                .is_ok_and(|value| value != "0"),
        })
    }

    /// Routes to pools, and all rules.
    fn routing(&mut self, pods: &Pods) -> Result<Routing, Error> {
        let found = self.routes.any_routes(|destination| is_wanted(&pods.pools, destination))?;
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

    fn neighbour_limits(&self, family: Family) -> Option<(Family, NeighbourLimits)> {
        let limit = |name: &str| {
            let folder = match family {
                Family::V4 => "net/ipv4/neigh/default",
                Family::V6 => "net/ipv6/neigh/default",
            };
            self.sysctls.get(&format!("{folder}/{name}")).ok()?.parse().ok()
        };
        Some((family, NeighbourLimits { soft: limit("gc_thresh2")?, hard: limit("gc_thresh3")? }))
    }

    fn bridge_ports(&mut self) -> Result<usize, Error> {
        let links = self.routes.links()?;
        let bridge = links.get(BRIDGE).map(|bridge| bridge.index);
        Ok(links.values().filter(|link| bridge.is_some() && link.controller == bridge).count())
    }

    fn foreign_filters(&mut self, judged: Judged) -> Result<Vec<Filter>, Error> {
        let chains = self.filter.base_chains(judged)?;
        let of_others = chains.into_iter().filter(|chain| chain.table != ruleset::NAME);
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
