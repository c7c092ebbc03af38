//! Foreign packet filters that drop forwarded packets, and so pod packets, or tunnel packets.
//!
//! Rules of Polder cannot prevent that: in nftables, an accept in one table does not keep another table from dropping
//! the packet. So the filters are evaluated and reported.

use std::collections::BTreeSet;

use ipnetwork::IpNetwork;
use polder_api::{BRIDGE, Family, POD_INTERFACE_PREFIX};
use polder_ipam::record::AttachMode;
use polder_netlink::nft::TableFamily;
use polder_netlink::nft::foreign::{BaseChain, BaseHook, ForeignVerdict, NamePattern, Policy, RuleCondition};

use super::routing::Pods;
use crate::kernel::foreign_state::Filter;
use crate::kernel::tunnel;

/// The kernel's limit of nested jumps (`NFT_JUMP_STACK_SIZE`).
const DEPTH: usize = 16;

/// The chains of `ufw` for an operator's rules.
const UFW: [&str; 4] = ["ufw-user-forward", "ufw6-user-forward", "ufw-user-input", "ufw6-user-input"];

/// The direction of packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Direction {
    FromPods,
    ToPods,
}

/// Packets between pods with known source and destination.
#[derive(Debug, Clone, Copy)]
struct Class<'a> {
    direction: Direction,
    /// The interface on the other side of this host.
    outside: &'a str,
    /// The pool of both addresses, and the prefix length of its blocks.
    pool: IpNetwork,
    block: u8,
}

impl Class<'_> {
    /// Whether packets of this class meet the condition.
    fn fulfils(self, condition: &RuleCondition, base_hook: BaseHook, attach: AttachMode) -> bool {
        let is_outside = |names: &[NamePattern]| {
            names.iter().any(|names| match names {
                NamePattern::Exactly(name) => name == self.outside,
                NamePattern::Prefixed(prefix) => self.outside.starts_with(prefix),
            })
        };
        let of_pods = |names: &[NamePattern]| names.iter().any(|names| are_pods(names, attach));
        match (condition, self.direction) {
            // Before routing, the output interface is unknown; after routing, some kernels do not report the input
            // interface.
            (RuleCondition::Input(_), _) if base_hook == BaseHook::Outgoing => false,
            (RuleCondition::Output(_), _) if base_hook == BaseHook::Incoming => false,
            (RuleCondition::Input(names), Direction::FromPods)
            | (RuleCondition::Output(names), Direction::ToPods) => of_pods(names),
            (RuleCondition::Input(names), Direction::ToPods)
            | (RuleCondition::Output(names), Direction::FromPods) => is_outside(names),
            (RuleCondition::Family(family), _) => *family == Family::of(self.pool.ip()),
            // A rule for single addresses is intentional.
            (RuleCondition::Source(network) | RuleCondition::Destination(network), _) => {
                let covers = network.prefix() <= self.pool.prefix() && network.contains(self.pool.ip());
                covers || (network.prefix() <= self.block && self.pool.contains(network.ip()))
            }
            (RuleCondition::OtherReversePath | RuleCondition::Other, _) => false,
        }
    }
}

/// The outcome for a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Accepted,
    Dropped,
}

/// The program that owns the filter. It determines the place for an operator's rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Owner {
    Firewalld,
    Docker,
    Ufw,
    Iptables,
    Other,
}

impl Filter {
    /// The problem, if the filter drops pod packets, as far as its rules are supported here.
    pub fn problem(&self, attach: AttachMode, beside_firewalld: bool) -> Option<String> {
        let drops = |direction: &Direction| {
            self.fate(&|condition| direction.fulfils(condition, attach)) == Fate::Dropped
        };
        let dropped: Vec<Direction> =
            [Direction::FromPods, Direction::ToPods].into_iter().filter(drops).collect();
        let what = match dropped.as_slice() {
            [] => return None,
            [Direction::FromPods] => "packets from pods",
            [Direction::ToPods] => "packets to pods",
            _ => "packets from or to pods",
        };
        let BaseChain { family, table, name, .. } = &self.base;
        Some(format!(
            "chain {name} of table {family} {table} drops forwarded packets by default (policy or last rule), and the \
             agent finds no rule that accepts {what}: pods may be unreachable. {}",
            self.remedy(&dropped, attach, beside_firewalld)
        ))
    }

    /// The problem, if a rule of the filter drops packets between pods by address or interface, whatever its policy and
    /// hook.
    pub fn problem_between(&self, base_hook: BaseHook, attach: AttachMode, pods: &Pods) -> Option<String> {
        let mut classes =
            pods.pools.iter().filter(|(pool, _)| self.judges(pool.family())).flat_map(|(pool, block)| {
                let outside =
                    pods.ingress_interfaces.iter().map(String::as_str).chain(Family::BOTH.map(tunnel::name));
                outside.flat_map(move |outside| {
                    [Direction::FromPods, Direction::ToPods].map(|direction| Class {
                        direction,
                        outside,
                        pool: (*pool).into(),
                        block: *block,
                    })
                })
            });
        let drops = |class: &Class<'_>| {
            let fulfils = |condition: &RuleCondition| class.fulfils(condition, base_hook, attach);
            self.walk(&self.base.name, &fulfils, DEPTH) == Some(Fate::Dropped)
        };
        let class = classes.find(drops)?;
        let BaseChain { family, table, name, .. } = &self.base;
        let ip = if class.pool.is_ipv4() { "ip" } else { "ip6" };
        let (what, condition) = match class.direction {
            Direction::FromPods => ("from", format!("{ip} saddr {}", class.pool)),
            Direction::ToPods => ("to", format!("{ip} daddr {}", class.pool)),
        };
        Some(format!(
            "a rule in chain {name} of table {family} {table}, or in a chain that it jumps to, drops packets {what} \
             pods (pool {}, interface {}): pods are unreachable, although probes of peers may succeed. Delete that \
             rule, or insert an accept rule before it and make it persistent: `nft insert rule {family} {table} \
             {name} {condition} accept`",
            class.pool, class.outside
        ))
    }

    /// The problem of a filter for packets to the host, while no peer answers through a tunnel: if it drops tunnel
    /// packets, as far as its rules are supported here.
    pub fn problem_of_tunnels(&self, port: u16, uplinks: &BTreeSet<String>) -> Option<String> {
        (self.fate(&|_| false) == Fate::Dropped).then_some(())?;
        let BaseChain { family, table, name, .. } = &self.base;
        let remedy = match self.owner() {
            Owner::Firewalld => {
                // Without a zone the command changes the default zone.
                let uplink = uplinks.first().map_or("the uplink", String::as_str);
                format!(
                    "`firewall-cmd --permanent --zone=$(firewall-cmd --get-zone-of-interface={uplink}) \
                     --add-port={port}/udp` and `firewall-cmd --reload`"
                )
            }
            Owner::Ufw => format!("`ufw allow {port}/udp`"),
            Owner::Docker | Owner::Iptables => {
                format!("`{} -I {name} -p udp --dport {port} -j ACCEPT`", self.iptables())
            }
            Owner::Other => format!("`nft insert rule {family} {table} {name} udp dport {port} accept`"),
        };
        Some(format!(
            "no peer answers through a tunnel, and chain {name} of table {family} {table} drops packets to this host \
             by default (policy or last rule). Check whether a rule accepts UDP port {port} from the other nodes. If \
             none does, add one and make it persistent: {remedy}"
        ))
    }

    /// Whether the filter applies to packets of that family.
    pub fn judges(&self, family: Family) -> bool {
        match self.base.family {
            TableFamily::Ip => family == Family::V4,
            TableFamily::Ip6 => family == Family::V6,
            TableFamily::Inet => true,
        }
    }

    /// The outcome for a packet that meets exactly these conditions. A rule with further conditions is treated as not
    /// matching.
    fn fate(&self, fulfils: &dyn Fn(&RuleCondition) -> bool) -> Fate {
        let of_policy = match self.base.policy {
            Policy::Accept => Fate::Accepted,
            Policy::Drop => Fate::Dropped,
        };
        self.walk(&self.base.name, fulfils, DEPTH).unwrap_or(of_policy)
    }

    fn walk(&self, chain: &str, fulfils: &dyn Fn(&RuleCondition) -> bool, depth: usize) -> Option<Fate> {
        let depth = depth.checked_sub(1)?;
        for rule in self.chains.get(chain)? {
            if !rule.conditions.iter().all(fulfils) {
                continue;
            }
            match &rule.verdict {
                ForeignVerdict::Accept => return Some(Fate::Accepted),
                ForeignVerdict::Drop => return Some(Fate::Dropped),
                ForeignVerdict::Return => return None,
                ForeignVerdict::Goto(to) => return self.walk(to, fulfils, depth),
                ForeignVerdict::Jump(to) => {
                    if let Some(fate) = self.walk(to, fulfils, depth) {
                        return Some(fate);
                    }
                }
                ForeignVerdict::None => {}
            }
        }
        None
    }

    fn owner(&self) -> Owner {
        let BaseChain { family, table, name, .. } = &self.base;
        let leads_to = |chain: &str| self.chains.contains_key(chain);
        let is_of_iptables = *family != TableFamily::Inet
            && table == "filter"
            && ["FORWARD", "INPUT"].contains(&name.as_str());
        match is_of_iptables {
            true if leads_to("DOCKER-USER") => Owner::Docker,
            true if UFW.iter().any(|chain| leads_to(chain)) => Owner::Ufw,
            true => Owner::Iptables,
            false if table == "firewalld" => Owner::Firewalld,
            false => Owner::Other,
        }
    }

    /// The iptables program for the family of the filter.
    fn iptables(&self) -> &'static str {
        if self.base.family == TableFamily::Ip6 { "ip6tables" } else { "iptables" }
    }

    /// The commands that make the filter accept pod packets.
    fn remedy(&self, dropped: &[Direction], attach: AttachMode, beside_firewalld: bool) -> String {
        let BaseChain { family, table, name, .. } = &self.base;
        let iptables = self.iptables();
        let command = |direction: &Direction| match self.owner() {
            Owner::Firewalld => None,
            Owner::Docker => Some(direction.iptables(iptables, "DOCKER-USER", attach)),
            Owner::Ufw => {
                Some(format!("`ufw route allow {} on {}`", direction.word(), wildcard('+', attach)))
            }
            Owner::Iptables => Some(direction.iptables(iptables, "FORWARD", attach)),
            Owner::Other => Some(format!(
                "`nft insert rule {family} {table} {name} {}name '{}' accept`",
                direction.interface(),
                wildcard('*', attach)
            )),
        };
        let commands: Vec<String> = dropped.iter().filter_map(command).collect();
        if commands.is_empty() {
            return "Copy deploy/host/firewalld/zones/polder.xml to /etc/firewalld/zones, and \
                    deploy/host/firewalld/policies/polder-pods.xml to /etc/firewalld/policies, then run \
                    `firewall-cmd --reload`. The folder deploy/host is in the Polder source; on a node where Polder \
                    is installed, it is /usr/share/doc/polder/host or /usr/local/share/doc/polder/host"
                .to_owned();
        }
        if beside_firewalld && matches!(self.owner(), Owner::Docker | Owner::Iptables) {
            let version = if self.base.family == TableFamily::Ip6 { "ipv6" } else { "ipv4" };
            let direct =
                dropped.iter().map(|direction| direction.direct(version, attach)).collect::<Vec<_>>();
            return format!(
                "Accept these packets: {}. firewalld deletes all iptables rules when it starts and at each reload. To \
                 make the rules persistent, add them to firewalld: {}, then `firewall-cmd --reload`",
                commands.join(" and "),
                direct.join(" and ")
            );
        }
        format!("Accept these packets, and make the rules persistent: {}", commands.join(" and "))
    }

    /// Whether it is a filter of firewalld.
    pub fn is_firewalld(&self) -> bool {
        self.owner() == Owner::Firewalld
    }

    /// The problem, if the filter drops packets that arrive on another interface than the host replies on (reverse path
    /// filter), while pods of these families do not answer: packets between two nodes may use a direct path in one
    /// direction and a tunnel in the other.
    pub fn reverse_path_problem(&self, failing: &BTreeSet<Family>) -> Option<String> {
        let drops = |family: &Family| {
            let is_dropped = |is_asymmetric: bool| {
                let fulfils = |condition: &RuleCondition| match condition {
                    RuleCondition::Family(of) => of == family,
                    condition => is_asymmetric && *condition == RuleCondition::OtherReversePath,
                };
                self.walk(&self.base.name, &fulfils, DEPTH) == Some(Fate::Dropped)
            };
            self.judges(*family) && is_dropped(true) && !is_dropped(false)
        };
        let family = failing.iter().find(|family| drops(family))?;
        let BaseChain { family: table_family, table, name, .. } = &self.base;
        let remedy = match self.owner() {
            Owner::Firewalld => {
                "Set IPv6_rpfilter=no in /etc/firewalld/firewalld.conf, then run `firewall-cmd --reload`"
                    .to_owned()
            }
            _ => {
                "Delete that rule, or insert a rule before it that accepts packets from the nodes".to_owned()
            }
        };
        Some(format!(
            "a reverse path filter in chain {name} of table {table_family} {table}, or in a chain that it jumps to, \
             drops {family} packets whose reply would leave through another interface, and peers' pods do not answer: \
             packets between two nodes may use different interfaces in each direction. {remedy}"
        ))
    }
}

impl Direction {
    /// Whether a packet in this direction, without further known properties, meets the condition.
    fn fulfils(self, condition: &RuleCondition, attach: AttachMode) -> bool {
        match (self, condition) {
            (Self::FromPods, RuleCondition::Input(names)) | (Self::ToPods, RuleCondition::Output(names)) => {
                names.iter().any(|names| are_pods(names, attach))
            }
            _ => false,
        }
    }

    /// The `iptables` command that accepts packets of this direction.
    fn iptables(self, program: &str, chain: &str, attach: AttachMode) -> String {
        let side = match self {
            Self::FromPods => "-i",
            Self::ToPods => "-o",
        };
        format!("`{program} -I {chain} {side} {} -j ACCEPT`", wildcard('+', attach))
    }

    /// The permanent firewalld rule that accepts packets of this direction.
    fn direct(self, version: &str, attach: AttachMode) -> String {
        let side = match self {
            Self::FromPods => "-i",
            Self::ToPods => "-o",
        };
        format!(
            "`firewall-cmd --permanent --direct --add-rule {version} filter FORWARD 0 {side} {} -j ACCEPT`",
            wildcard('+', attach)
        )
    }

    /// The direction in `ufw` syntax.
    fn word(self) -> &'static str {
        match self {
            Self::FromPods => "in",
            Self::ToPods => "out",
        }
    }

    /// The interface prefix in `nft` syntax.
    fn interface(self) -> &'static str {
        match self {
            Self::FromPods => "iif",
            Self::ToPods => "oif",
        }
    }
}

/// The problem of a table `filter` of legacy iptables, which the agent cannot read.
pub fn unreadable(family: Family, attach: AttachMode) -> String {
    let (names, iptables) = match family {
        Family::V4 => ("ip_tables_names", "iptables-legacy"),
        Family::V6 => ("ip6_tables_names", "ip6tables-legacy"),
    };
    let commands = [Direction::FromPods, Direction::ToPods]
        .map(|direction| direction.iptables(iptables, "FORWARD", attach));
    format!(
        "legacy iptables has rules that the agent cannot read (table filter in /proc/net/{names}): run `{iptables} \
         -S FORWARD`. If the policy or the last rule drops packets, pods may be unreachable; then accept packets of \
         pods: {}",
        commands.join(" and ")
    )
}

/// The name pattern of pod interfaces; `rest` is the wildcard character.
fn wildcard(rest: char, attach: AttachMode) -> String {
    match attach {
        AttachMode::Bridge => BRIDGE.to_owned(),
        AttachMode::Routed => format!("{POD_INTERFACE_PREFIX}{rest}"),
    }
}

/// Whether the names match all pod interfaces.
fn are_pods(names: &NamePattern, attach: AttachMode) -> bool {
    match (names, attach) {
        (NamePattern::Exactly(name), AttachMode::Bridge) => name == BRIDGE,
        (NamePattern::Exactly(_), AttachMode::Routed) => false,
        (NamePattern::Prefixed(prefix), AttachMode::Bridge) => BRIDGE.starts_with(prefix),
        (NamePattern::Prefixed(prefix), AttachMode::Routed) => POD_INTERFACE_PREFIX.starts_with(prefix),
    }
}

#[cfg(test)]
mod tests;
