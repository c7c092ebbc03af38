//! Foreign routes and rules that divert pod packets from Polder's routes.
//!
//! They are not deleted: each is reported with the command that deletes it.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnetwork::IpNetwork;
use polder_api::{Family, is_host_interface};
use polder_ipam::Cidr;
use polder_netlink::route::metric;
use polder_netlink::routing::{AnyRoute, AnyRule, LOCAL, MAIN, RouteAction, RuleCoverage, RuleTarget};

use crate::kernel::foreign_state::Routing;
use crate::kernel::state::Device;

/// Maximum number of reported routes, and of reported rules.
const NAMED: usize = 8;

/// Default priority of the rule for the main table.
const USUAL_PRIORITY: u32 = 32766;

/// The addresses and interfaces whose routing must not be diverted.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PodTraffic {
    /// The pools, each with the prefix length of its blocks.
    pub pools: Vec<(Cidr, u8)>,
    /// Addresses that another plugin has assigned to its own interfaces on this node, and routes itself.
    pub leased: Vec<IpAddr>,
    /// Foreign interfaces on which pod packets arrive.
    pub ingress_interfaces: BTreeSet<String>,
}

/// The problems found, each with the command that removes its cause.
pub fn problems(routing: &Routing, pods: &PodTraffic) -> Vec<String> {
    let routes: Vec<String> = routing.routes.iter().filter_map(|route| routing.stray(route, pods)).collect();
    // A rule often applies to several pools.
    let mut rules = Vec::new();
    for (source, _) in &pods.pools {
        for (destination, _) in pods.pools.iter().filter(|(pool, _)| pool.family() == source.family()) {
            for problem in routing.misled((*source).into(), (*destination).into(), pods) {
                if !rules.contains(&problem) {
                    rules.push(problem);
                }
            }
        }
    }
    [(routes, "routes"), (rules, "routing rules")]
        .into_iter()
        .flat_map(|(problems, kind)| shortened(problems, kind))
        .collect()
}

/// The first [`NAMED`] problems, and one with the number of the others.
fn shortened(mut problems: Vec<String>, kind: &str) -> Vec<String> {
    let more = problems.len().saturating_sub(NAMED);
    problems.truncate(NAMED);
    if more > 0 {
        problems.push(format!(
            "{more} more problems with {kind} of other programs are not listed: correct the listed ones first"
        ));
    }
    problems
}

impl Routing {
    /// The problem of a route in table main or local, if it diverts pod packets.
    fn stray(&self, route: &AnyRoute, pods: &PodTraffic) -> Option<String> {
        let to = route.destination;
        let is_asked = route.table == MAIN || (route.table == LOCAL && route.action == RouteAction::Local);
        let own_device = self.device(route).is_some_and(|name| Device::named(name).is_some());
        // Polder's devices have the node's own addresses.
        if route.ours || !is_asked || (route.table == LOCAL && own_device) {
            return None;
        }
        let within = |(pool, _): &&(Cidr, u8)| contains((*pool).into(), to);
        let (pool, block) = pods.pools.iter().find(within)?;
        let is_taken = if self.own.contains(&to) {
            route.priority < metric(to)
        } else {
            // A route less specific than a block has no effect: Polder's routes are preferred.
            to.prefix() > *block
        };
        let is_leased = pods.leased.iter().any(|address| to.contains(*address));
        if !is_taken || is_leased {
            return None;
        }
        Some(format!(
            "foreign route {} takes precedence over Polder's routes: pods in {to} of pool {pool} are unreachable from \
             this node. Delete it with `{}`, and stop the program that creates it",
            self.describe(route),
            self.deletes(route)
        ))
    }

    fn device(&self, route: &AnyRoute) -> Option<&str> {
        self.interfaces.get(&route.index?).map(String::as_str)
    }

    /// The route in `ip route` syntax.
    fn describe(&self, route: &AnyRoute) -> String {
        let destination = match route.action {
            RouteAction::Forward => route.destination.to_string(),
            RouteAction::Local => format!("local {}", route.destination),
            RouteAction::Drop(kind) => format!("{kind} {}", route.destination),
        };
        // A blackhole-like route has no interface, although the kernel may report one.
        let device = self.device(route).filter(|_| !matches!(route.action, RouteAction::Drop(_)));
        let describe = [
            Some(destination),
            route.gateway.map(|gateway| format!("via {gateway}")),
            device.map(|device| format!("dev {device}")),
            (route.priority > 0).then(|| format!("metric {}", route.priority)),
            (route.table != MAIN).then(|| format!("table {}", route.table)),
        ];
        describe.into_iter().flatten().collect::<Vec<_>>().join(" ")
    }

    fn deletes(&self, route: &AnyRoute) -> String {
        let ip = ip(Family::of(route.destination.ip()));
        // A route to the host itself is added and deleted with its address.
        let address = self.addresses.iter().find(|found| found.address.ip() == route.destination.ip());
        match (route.action, address, address.and_then(|found| self.interfaces.get(&found.index))) {
            (RouteAction::Local, Some(found), Some(device)) => {
                format!("{ip} address del {} dev {device}", found.address)
            }
            _ => format!("{ip} route del {}", self.describe(route)),
        }
    }

    /// The problems of rules that the kernel uses before Polder's routes, for packets from `source` to `destination`.
    fn misled(&self, source: IpNetwork, destination: IpNetwork, pods: &PodTraffic) -> Vec<String> {
        let (mut problems, mut skip_to, mut perhaps_main) = (Vec::new(), 0, false);
        let family = Family::of(source.ip());
        for rule in self.rules.iter().filter(|rule| rule.family == family) {
            if rule.priority < skip_to {
                continue;
            }
            let applies = applies(rule, source, destination, pods);
            if applies == RuleCoverage::Never {
                continue;
            }
            match &rule.action {
                RuleTarget::Table(MAIN, suppressed) => {
                    // The main table always has a route to the pool, so only its prefix length counts.
                    let counts = suppressed.is_none_or(|length| u32::from(destination.prefix()) > length);
                    match (applies, counts) {
                        (RuleCoverage::Always, true) => return problems,
                        (_, true) => perhaps_main = true,
                        _ => {}
                    }
                }
                RuleTarget::Table(LOCAL, _) | RuleTarget::Continue => {}
                RuleTarget::Table(table, suppressed) => {
                    let leads = self.routes.iter().find(|route| {
                        let counts =
                            suppressed.is_none_or(|length| u32::from(route.destination.prefix()) > length);
                        route.table == *table && counts && overlap(route.destination, destination)
                    });
                    problems.extend(
                        leads.map(|route| misleads(rule, &format!("route {}", self.describe(route)))),
                    );
                }
                RuleTarget::Drop(word) => problems.push(misleads(rule, word)),
                RuleTarget::Goto(to) => {
                    if applies == RuleCoverage::Always {
                        skip_to = *to;
                    }
                }
            }
        }
        if !perhaps_main {
            let ip = ip(family);
            problems.push(format!(
                "no {family} routing rule sends pods' packets to the main routing table, which has the routes to pods: \
                 pods are unreachable. Add one and make it persistent: `{ip} rule add pref {USUAL_PRIORITY} lookup \
                 main`"
            ));
        }
        problems
    }
}

/// The problem of a rule; `result` is the effect on pods' packets.
fn misleads(rule: &AnyRule, result: &str) -> String {
    let describe = describe(rule);
    format!(
        "foreign routing rule \"{describe}\" takes precedence over Polder's routes (result for pods' packets: \
         {result}): pods may be unreachable. Delete it with `{} rule del {describe}`, and stop the program that \
         creates it; or add a rule with a smaller pref number that sends packets between pods to table main",
        ip(rule.family)
    )
}

/// Whether a rule applies to all, some or no packets between pods of these pools.
fn applies(rule: &AnyRule, source: IpNetwork, destination: IpNetwork, pods: &PodTraffic) -> RuleCoverage {
    let among = |asked: Option<IpNetwork>, pool: IpNetwork| match asked {
        None => RuleCoverage::Always,
        Some(asked) if contains(asked, pool) => RuleCoverage::Always,
        Some(asked) if overlap(asked, pool) => RuleCoverage::Perhaps,
        Some(_) => RuleCoverage::Never,
    };
    let input = match rule.input.as_deref() {
        None => RuleCoverage::Always,
        Some(name) if Device::named(name).is_some() || is_host_interface(name) => RuleCoverage::Perhaps,
        Some(name) if pods.ingress_interfaces.contains(name) => RuleCoverage::Perhaps,
        Some(_) => RuleCoverage::Never,
    };
    let all = [among(rule.source, source), among(rule.destination, destination), input, rule.otherwise];
    match (all.into_iter().min().unwrap_or(RuleCoverage::Always), rule.inverted) {
        (applies, false) => applies,
        (RuleCoverage::Never, true) => RuleCoverage::Always,
        (RuleCoverage::Always, true) => RuleCoverage::Never,
        (RuleCoverage::Perhaps, true) => RuleCoverage::Perhaps,
    }
}

/// The rule in `ip rule` syntax, as far as its parts are known.
fn describe(rule: &AnyRule) -> String {
    let action = match &rule.action {
        RuleTarget::Table(table, _) => Some(format!("lookup {table}")),
        RuleTarget::Drop(kind) => Some((*kind).to_owned()),
        RuleTarget::Goto(to) => Some(format!("goto {to}")),
        RuleTarget::Continue => None,
    };
    let describe = [
        Some(format!("pref {}", rule.priority)),
        rule.inverted.then(|| "not".to_owned()),
        rule.source.map(|source| format!("from {source}")),
        rule.destination.map(|destination| format!("to {destination}")),
        rule.input.as_ref().map(|input| format!("iif {input}")),
        action,
    ];
    describe.into_iter().flatten().collect::<Vec<_>>().join(" ")
}

const fn ip(family: Family) -> &'static str {
    match family {
        Family::V4 => "ip",
        Family::V6 => "ip -6",
    }
}

fn contains(outer: IpNetwork, inner: IpNetwork) -> bool {
    outer.prefix() <= inner.prefix() && outer.contains(inner.network())
}

fn overlap(one: IpNetwork, other: IpNetwork) -> bool {
    contains(one, other) || contains(other, one)
}

#[cfg(test)]
mod tests;
