//! Reads the foreign network state of the host. Other modules evaluate it; Polder never changes it.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{self, ErrorKind};

use ipnetwork::IpNetwork;
use polder_api::{BRIDGE, Family, PerFamily};
use polder_ipam::Cidr;
use polder_netlink::address::Address;
use polder_netlink::link::LinkKind;
use polder_netlink::nft::foreign::{BaseChain, BaseHook, ForeignRule, ForeignVerdict, RuleCondition};
use polder_netlink::routing::{AnyRoute, AnyRule};
use polder_netlink::{Error, IfIndex};

use super::{Kernel, ruleset, sysctl};

/// Maximum number of chains that are read per filter. On a host with more, pods' packets do not pass all of them.
const MAX_CHAINS: usize = 64;

/// A bridge forwards frames between at least this number of ports.
const PORTS_THAT_FORWARD: usize = 2;

/// The foreign network state of the host.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ForeignState {
    /// Routes and policy rules.
    pub routing: Routing,
    /// Foreign chains at hook forward.
    pub filters: Vec<Filter>,
    /// Foreign chains at hook input, for packets to the host itself. Read only while no peer answers through a tunnel.
    pub host_filters: Vec<Filter>,
    /// Foreign chains at hooks prerouting and postrouting.
    pub routing_filters: Vec<(BaseHook, Filter)>,
    /// The families for which legacy iptables has a table `filter`. Its contents cannot be read by netlink.
    pub legacy_filters: BTreeSet<Family>,
    /// Limits of the neighbour table; `None` outside the initial network namespace.
    pub neighbours: PerFamily<Option<NeighbourLimits>>,
    /// Number of ports of bridge `polder0`.
    pub bridge_ports: usize,
    /// Foreign bridges with ports on which iptables rules do not apply to bridged frames.
    pub bridges_without_rules: Vec<BridgeWithoutRules>,
    /// The name under `net.ipv4.conf` whose `rp_filter` can drop packets of peers: `all`, if
    /// `net.ipv4.conf.all.rp_filter` is not 0; otherwise the name of the uplink, if its `rp_filter` is 1 (strict);
    /// otherwise `None`. The kernel uses the larger value of both (`IN_DEV_MAXCONF` in `include/linux/inetdevice.h`).
    pub rp_filter_interface: Option<String>,
    /// The netfilter queues that a program reads. `None` if that cannot be read.
    pub read_queues: Option<BTreeSet<u16>>,
}

/// A foreign bridge with at least two ports, so that it can forward frames.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BridgeWithoutRules {
    /// Its name.
    pub name: String,
    /// The families whose rules do not apply to its frames, although the kernel supports it (module `br_netfilter`).
    pub families: BTreeSet<Family>,
}

/// Routes and policy rules.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Routing {
    /// The destinations of Polder's routes.
    pub own: BTreeSet<IpNetwork>,
    /// Foreign routes whose destination overlaps a pool.
    pub routes: Vec<AnyRoute>,
    /// All policy rules, in order.
    pub rules: Vec<AnyRule>,
    /// Interface names, by index.
    pub interfaces: BTreeMap<IfIndex, String>,
    /// The addresses of the host.
    pub addresses: Vec<Address>,
}

/// A foreign base chain, with the chains that it leads to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Filter {
    /// The chain at the netfilter hook.
    pub base: BaseChain,
    /// Rules of the base chain and of the chains that it leads to, by chain name.
    pub chains: BTreeMap<String, Vec<ForeignRule>>,
}

/// Limits of the kernel's neighbour table, for all network namespaces together.
///
/// Permanent entries, like Polder's entries for pods and tunnels, do not count (`exempt_from_gc` in
/// `net/core/neighbour.c`, Linux 5.0). Entries on the underlay do: peers with a direct path, and tunnel endpoints on
/// the same link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NeighbourLimits {
    /// `gc_thresh2`: with more entries, the kernel removes some every few seconds, including entries in use.
    pub soft: usize,
    /// `gc_thresh3`: with this many entries, the kernel adds no entry, and packets to a new neighbour are lost.
    pub hard: usize,
}

impl Kernel {
    /// Reads the foreign state. Routes: only those to the pools. `rp_filter`: only that of `conf/all` and of `uplink`.
    /// Chains at hook input: only if `no_tunnel_answers`.
    pub fn foreign_state(
        &mut self,
        pools: &[(Cidr, u8)],
        uplink: Option<&str>,
        no_tunnel_answers: bool,
    ) -> Result<ForeignState, Error> {
        let (bridge_ports, bridges_without_rules) = self.bridges()?;
        Ok(ForeignState {
            routing: self.routing(pools)?,
            filters: self.foreign_filters(BaseHook::Forwarded)?,
            routing_filters: self.routing_filters()?,
            host_filters: if no_tunnel_answers {
                self.foreign_filters(BaseHook::ForHost)?
            } else {
                Vec::new()
            },
            legacy_filters: Family::BOTH.into_iter().filter(|family| has_legacy_filter(*family)).collect(),
            neighbours: PerFamily::each(|family| self.neighbour_limits(family)),
            bridge_ports,
            bridges_without_rules,
            rp_filter_interface: self.rp_filter_interface(uplink),
            read_queues: read_queues(fs::read_to_string("/proc/net/netfilter/nfnetlink_queue")),
        })
    }

    fn rp_filter_interface(&self, uplink: Option<&str>) -> Option<String> {
        let value = |name: &str| self.sysctls.get(&format!("net/ipv4/conf/{name}/rp_filter")).ok();
        if value("all").is_some_and(|value| value != "0") {
            return Some("all".to_owned());
        }
        uplink.filter(|name| value(name).as_deref() == Some("1")).map(str::to_owned)
    }

    /// Reads the routes to the pools, and all policy rules.
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

    /// The number of ports of `polder0`, and the foreign bridges without iptables rules.
    fn bridges(&mut self) -> Result<(usize, Vec<BridgeWithoutRules>), Error> {
        let links = self.routes.links()?;
        let ports = |bridge: IfIndex| links.values().filter(|link| link.controller == Some(bridge)).count();
        let own = links.get(BRIDGE).map_or(0, |bridge| ports(bridge.index));
        let is_off =
            |family: &Family| self.sysctls.get(sysctl::bridge_calls(*family)).is_ok_and(|value| value == "0");
        let off: BTreeSet<Family> = Family::BOTH.into_iter().filter(is_off).collect();
        if off.is_empty() {
            return Ok((own, Vec::new()));
        }
        let foreign = links.values().filter(|link| {
            link.kind == LinkKind::Bridge && link.name != BRIDGE && ports(link.index) >= PORTS_THAT_FORWARD
        });
        let without_rules = foreign.filter_map(|link| {
            let families: BTreeSet<Family> =
                off.iter().copied().filter(|family| !link.calls_iptables[*family]).collect();
            (!families.is_empty()).then(|| BridgeWithoutRules { name: link.name.clone(), families })
        });
        Ok((own, without_rules.collect()))
    }

    fn foreign_filters(&mut self, base_hook: BaseHook) -> Result<Vec<Filter>, Error> {
        let chains = self.filter.base_chains(base_hook)?;
        let foreign = chains
            .into_iter()
            .filter(|chain| ![ruleset::NAME, ruleset::ANCHOR].contains(&chain.table.as_str()));
        foreign.map(|base| self.foreign_filter(base)).collect()
    }

    /// Foreign chains at hooks prerouting and postrouting.
    fn routing_filters(&mut self) -> Result<Vec<(BaseHook, Filter)>, Error> {
        let mut filters = Vec::new();
        for base_hook in [BaseHook::Incoming, BaseHook::Outgoing] {
            filters.extend(self.foreign_filters(base_hook)?.into_iter().map(|filter| (base_hook, filter)));
        }
        Ok(filters)
    }

    /// Reads a chain and the chains that it leads to. Jumps with unknown conditions are not followed.
    fn foreign_filter(&mut self, base: BaseChain) -> Result<Filter, Error> {
        let mut chains = BTreeMap::new();
        let mut wanted = vec![base.name.clone()];
        while let Some(name) = wanted.pop().filter(|_| chains.len() < MAX_CHAINS) {
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
    match &rule.verdict {
        ForeignVerdict::Jump(chain) | ForeignVerdict::Goto(chain)
            if !rule.conditions.contains(&RuleCondition::Other) =>
        {
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

/// The queues in that file (`seq_show` in `net/netfilter/nfnetlink_queue.c`): one line each, which begins with the number
/// of the queue. Without the kernel's module there is no file, and no program can read a queue.
fn read_queues(file: io::Result<String>) -> Option<BTreeSet<u16>> {
    match file {
        Ok(lines) => lines.lines().map(|line| line.split_whitespace().next()?.parse().ok()).collect(),
        Err(error) => (error.kind() == ErrorKind::NotFound).then(BTreeSet::new),
    }
}

/// Whether the destination overlaps a pool.
fn is_wanted(pools: &[(Cidr, u8)], destination: IpNetwork) -> bool {
    let range = Cidr::containing(destination.ip(), destination.prefix());
    pools.iter().any(|(pool, _)| pool.overlaps(range))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_queues_that_a_program_reads_are_read_from_the_kernels_list() {
        let lines = "   98   4711     0 2   128     0     0       12  1\n65535 2147483650 3 1 0 0 0 0 1\n";
        assert_eq!(read_queues(Ok(lines.to_owned())), Some(BTreeSet::from([98, 65535])));
        assert_eq!(read_queues(Ok(String::new())), Some(BTreeSet::new()));
        assert_eq!(read_queues(Err(ErrorKind::NotFound.into())), Some(BTreeSet::new()));
        assert_eq!(read_queues(Err(ErrorKind::PermissionDenied.into())), None);
        assert_eq!(read_queues(Ok("no number\n".to_owned())), None);
    }
}
