//! Packet filters of other programs that drop tunnel packets, or forwarded packets, which include pod packets.
//!
//! Rules of Polder cannot prevent that: in nftables, an accept in one table does not keep another table from dropping
//! the packet. So the filters are evaluated and reported.

mod firewalld;

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnetwork::IpNetwork;
use polder_api::{BRIDGE, Family, POD_INTERFACE_PREFIX};
use polder_ipam::record::AttachMode;
use polder_netlink::nft::TableFamily;
use polder_netlink::nft::foreign::{BaseChain, BaseHook, ForeignVerdict, NamePattern, Policy, RuleCondition};

use self::firewalld::RELOAD_WARNING;
use super::routing::PodTraffic;
use crate::kernel::foreign_state::Filter;
use crate::kernel::tunnel;

/// The kernel's limit of nested jumps (`NFT_JUMP_STACK_SIZE`).
const MAX_JUMP_DEPTH: usize = 16;

/// The chains of `ufw` for an operator's rules.
const UFW_CHAINS: [&str; 4] = ["ufw-user-forward", "ufw6-user-forward", "ufw-user-input", "ufw6-user-input"];

/// The direction of packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Direction {
    FromPods,
    ToPods,
}

/// Packets that pass this host in one direction, between pods of one pool.
#[derive(Debug, Clone, Copy)]
struct PacketClass<'a> {
    direction: Direction,
    /// The interface of this host on the path to the pods of other nodes.
    peer_interface: &'a str,
    /// The pool of the source and the destination address.
    pool: IpNetwork,
    /// The prefix length of the blocks of the pool.
    block_length: u8,
}

impl PacketClass<'_> {
    /// Whether packets of this class meet the condition.
    fn fulfils(self, condition: &RuleCondition, base_hook: BaseHook, attach: AttachMode) -> bool {
        let match_peer_interface = |patterns: &[NamePattern]| {
            patterns.iter().any(|pattern| names_interface(pattern, self.peer_interface))
        };
        let match_pod_interfaces =
            |patterns: &[NamePattern]| patterns.iter().any(|pattern| matches_pod_interfaces(pattern, attach));
        match (condition, self.direction) {
            // Before routing, the output interface is unknown; after routing, some kernels do not report the input
            // interface.
            (RuleCondition::Input(_), _) if base_hook == BaseHook::Outgoing => false,
            (RuleCondition::Output(_), _) if base_hook == BaseHook::Incoming => false,
            (RuleCondition::Input(patterns), Direction::FromPods)
            | (RuleCondition::Output(patterns), Direction::ToPods) => match_pod_interfaces(patterns),
            (RuleCondition::Input(patterns), Direction::ToPods)
            | (RuleCondition::Output(patterns), Direction::FromPods) => match_peer_interface(patterns),
            (RuleCondition::Family(family), _) => *family == Family::of(self.pool.ip()),
            (RuleCondition::Source(network) | RuleCondition::Destination(network), _) => {
                covers_block(*network, self.pool, self.block_length)
            }
            (RuleCondition::OtherReversePath | RuleCondition::Other, _) => false,
        }
    }
}

/// The outcome for a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum PacketOutcome {
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
    pub fn problem(&self, attach: AttachMode, has_firewalld: bool) -> Option<String> {
        let drops = |direction: &Direction| {
            self.outcome(&|condition| direction.fulfils(condition, attach)) == PacketOutcome::Dropped
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
            self.remedy(&dropped, attach, has_firewalld)
        ))
    }

    /// The problem, if a rule of the filter drops packets between pods by address or interface, whatever its policy and
    /// hook.
    pub fn pod_rule_problem(
        &self,
        base_hook: BaseHook,
        attach: AttachMode,
        traffic: &PodTraffic,
    ) -> Option<String> {
        let mut classes = traffic.pools.iter().filter(|(pool, _)| self.applies_to(pool.family())).flat_map(
            |(pool, block_length)| {
                let peer_interfaces = traffic
                    .ingress_interfaces
                    .iter()
                    .map(String::as_str)
                    .chain(Family::BOTH.map(tunnel::name));
                peer_interfaces.flat_map(move |peer_interface| {
                    [Direction::FromPods, Direction::ToPods].map(|direction| PacketClass {
                        direction,
                        peer_interface,
                        pool: (*pool).into(),
                        block_length: *block_length,
                    })
                })
            },
        );
        let drops = |class: &PacketClass<'_>| {
            let fulfils = |condition: &RuleCondition| class.fulfils(condition, base_hook, attach);
            self.evaluate(&self.base.name, &fulfils, MAX_JUMP_DEPTH) == Some(PacketOutcome::Dropped)
        };
        let class = classes.find(drops)?;
        let BaseChain { family, table, name, .. } = &self.base;
        let ip = if class.pool.is_ipv4() { "ip" } else { "ip6" };
        let (what, condition) = match class.direction {
            Direction::FromPods => ("from", format!("{ip} saddr {}", class.pool)),
            Direction::ToPods => ("to", format!("{ip} daddr {}", class.pool)),
        };
        let remedy = match self.owner() {
            Owner::Firewalld => {
                "Remove that rule from firewalld: `firewall-cmd --list-all-zones` and `firewall-cmd \
                 --list-all-policies` show all rules"
                    .to_owned()
            }
            _ => format!(
                "Delete that rule, or insert an accept rule before it and make it persistent: `nft insert rule \
                 {family} {table} {name} {condition} accept`"
            ),
        };
        Some(format!(
            "a rule in chain {name} of table {family} {table}, or in a chain that it jumps to, drops packets {what} \
             pods (pool {}, interface {}): pods are unreachable, although probes of peers may succeed. {remedy}",
            class.pool, class.peer_interface
        ))
    }

    /// The problem, if the filter drops tunnel packets, as far as its rules are supported here. For filters of packets
    /// to the host, while no peer answers through a tunnel. `peers` are the underlay addresses of these peers.
    pub fn tunnel_problem(
        &self,
        port: u16,
        uplinks: &BTreeSet<String>,
        peers: &BTreeSet<IpAddr>,
    ) -> Option<String> {
        (self.outcome(&|_| false) == PacketOutcome::Dropped).then_some(())?;
        let BaseChain { family, table, name, .. } = &self.base;
        let remedy = match self.owner() {
            Owner::Firewalld => self.firewalld_port_remedy(port, uplinks, peers),
            Owner::Ufw => format!("`ufw allow {port}/udp`"),
            Owner::Docker | Owner::Iptables => {
                format!("`{} -I {name} -p udp --dport {port} -j ACCEPT`", self.iptables_program())
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
    pub fn applies_to(&self, family: Family) -> bool {
        match self.base.family {
            TableFamily::Ip => family == Family::V4,
            TableFamily::Ip6 => family == Family::V6,
            TableFamily::Inet => true,
        }
    }

    /// The outcome for a packet that meets exactly these conditions. A rule with further conditions is treated as not
    /// matching.
    fn outcome(&self, fulfils: &dyn Fn(&RuleCondition) -> bool) -> PacketOutcome {
        let policy_outcome = match self.base.policy {
            Policy::Accept => PacketOutcome::Accepted,
            Policy::Drop => PacketOutcome::Dropped,
        };
        self.evaluate(&self.base.name, fulfils, MAX_JUMP_DEPTH).unwrap_or(policy_outcome)
    }

    /// The outcome of the rules of a chain. `None` if the packet returns from it without a verdict, or if the chain is
    /// unknown or too deep.
    fn evaluate(
        &self,
        chain: &str,
        fulfils: &dyn Fn(&RuleCondition) -> bool,
        depth: usize,
    ) -> Option<PacketOutcome> {
        let depth = depth.checked_sub(1)?;
        for rule in self.chains.get(chain)? {
            if !rule.conditions.iter().all(fulfils) {
                continue;
            }
            match &rule.verdict {
                // The program behind a queue decides. A queue that no program reads is reported by itself.
                ForeignVerdict::Accept | ForeignVerdict::Queue(_) => return Some(PacketOutcome::Accepted),
                ForeignVerdict::Drop => return Some(PacketOutcome::Dropped),
                ForeignVerdict::Return => return None,
                ForeignVerdict::Goto(to) => return self.evaluate(to, fulfils, depth),
                ForeignVerdict::Jump(to) => {
                    if let Some(outcome) = self.evaluate(to, fulfils, depth) {
                        return Some(outcome);
                    }
                }
                ForeignVerdict::None => {}
            }
        }
        None
    }

    fn owner(&self) -> Owner {
        let BaseChain { family, table, name, .. } = &self.base;
        let has_chain = |chain: &str| self.chains.contains_key(chain);
        let is_iptables_chain = *family != TableFamily::Inet
            && table == "filter"
            && ["FORWARD", "INPUT"].contains(&name.as_str());
        match is_iptables_chain {
            _ if self.has_firewalld_chains() => Owner::Firewalld,
            true if has_chain("DOCKER-USER") => Owner::Docker,
            true if UFW_CHAINS.iter().any(|chain| has_chain(chain)) => Owner::Ufw,
            true => Owner::Iptables,
            false => Owner::Other,
        }
    }

    /// The iptables program for the family of the filter.
    fn iptables_program(&self) -> &'static str {
        if self.base.family == TableFamily::Ip6 { "ip6tables" } else { "iptables" }
    }

    /// The commands that make the filter accept pod packets.
    fn remedy(&self, dropped: &[Direction], attach: AttachMode, has_firewalld: bool) -> String {
        let BaseChain { family, table, name, .. } = &self.base;
        let iptables = self.iptables_program();
        let command = |direction: &Direction| match self.owner() {
            Owner::Firewalld => None,
            Owner::Docker => Some(direction.iptables_command(iptables, "DOCKER-USER", attach)),
            Owner::Ufw => Some(format!(
                "`ufw route allow {} on {}`",
                direction.ufw_direction(),
                pod_interface_pattern('+', attach)
            )),
            Owner::Iptables => Some(direction.iptables_command(iptables, "FORWARD", attach)),
            Owner::Other => Some(format!(
                "`nft insert rule {family} {table} {name} {} '{}' accept`",
                direction.nft_interface_key(),
                pod_interface_pattern('*', attach)
            )),
        };
        let commands: Vec<String> = dropped.iter().filter_map(command).collect();
        if commands.is_empty() {
            return format!(
                "Copy deploy/host/firewalld/zones/polder.xml to /etc/firewalld/zones, and \
                 deploy/host/firewalld/policies/polder-pods.xml to /etc/firewalld/policies, then run `firewall-cmd \
                 --reload`. {RELOAD_WARNING}. The folder deploy/host is in the Polder source; on a node where Polder \
                 is installed, it is /usr/share/doc/polder/host or /usr/local/share/doc/polder/host"
            );
        }
        if has_firewalld && matches!(self.owner(), Owner::Docker | Owner::Iptables) {
            let ip_version = if self.base.family == TableFamily::Ip6 { "ipv6" } else { "ipv4" };
            let permanent: Vec<String> =
                dropped.iter().map(|direction| direction.firewalld_command(ip_version, attach)).collect();
            return format!(
                "Accept these packets: {}. firewalld deletes all iptables rules when it starts and at each reload. To \
                 make the rules persistent, add them to firewalld: {}, then `firewall-cmd --reload`",
                commands.join(" and "),
                permanent.join(" and ")
            );
        }
        format!("Accept these packets, and make the rules persistent: {}", commands.join(" and "))
    }

    /// The problem, if the filter has a reverse path filter for one of these families: a family whose pods do not answer,
    /// or in which a direct path seems to drop packets. Such a filter drops packets that arrive on another interface
    /// than the host replies on. Packets between two nodes can arrive so: they may use a direct path in one direction
    /// and a tunnel in the other.
    pub fn reverse_path_problem(&self, families: &BTreeSet<Family>) -> Option<String> {
        let drops = |family: &Family| {
            let is_dropped = |is_asymmetric: bool| {
                let fulfils = |condition: &RuleCondition| match condition {
                    RuleCondition::Family(required) => required == family,
                    condition => is_asymmetric && *condition == RuleCondition::OtherReversePath,
                };
                self.evaluate(&self.base.name, &fulfils, MAX_JUMP_DEPTH) == Some(PacketOutcome::Dropped)
            };
            self.applies_to(*family) && is_dropped(true) && !is_dropped(false)
        };
        let family = families.iter().find(|family| drops(family))?;
        let BaseChain { family: table_family, table, name, .. } = &self.base;
        let remedy = match self.owner() {
            Owner::Firewalld => format!(
                "Set IPv6_rpfilter=no in /etc/firewalld/firewalld.conf, then run `firewall-cmd --reload`. \
                 {RELOAD_WARNING}"
            ),
            _ => "Delete that rule, or insert a rule before it that accepts packets from the nodes and from pods"
                .to_owned(),
        };
        Some(format!(
            "a reverse path filter in chain {name} of table {table_family} {table}, or in a chain that it jumps to, \
             drops {family} packets whose reply would leave through another interface, and peers' pods do not answer, or \
             do not answer on the direct path: packets between two nodes may use different interfaces in each \
             direction. {remedy}"
        ))
    }
}

impl Direction {
    /// Whether a packet in this direction, without further known properties, meets the condition.
    fn fulfils(self, condition: &RuleCondition, attach: AttachMode) -> bool {
        match (self, condition) {
            (Self::FromPods, RuleCondition::Input(patterns))
            | (Self::ToPods, RuleCondition::Output(patterns)) => {
                patterns.iter().any(|pattern| matches_pod_interfaces(pattern, attach))
            }
            _ => false,
        }
    }

    /// The `iptables` command that accepts packets of this direction.
    fn iptables_command(self, program: &str, chain: &str, attach: AttachMode) -> String {
        let option = match self {
            Self::FromPods => "-i",
            Self::ToPods => "-o",
        };
        format!("`{program} -I {chain} {option} {} -j ACCEPT`", pod_interface_pattern('+', attach))
    }

    /// The command for a permanent firewalld rule that accepts packets of this direction.
    fn firewalld_command(self, ip_version: &str, attach: AttachMode) -> String {
        let option = match self {
            Self::FromPods => "-i",
            Self::ToPods => "-o",
        };
        format!(
            "`firewall-cmd --permanent --direct --add-rule {ip_version} filter FORWARD 0 {option} {} -j ACCEPT`",
            pod_interface_pattern('+', attach)
        )
    }

    /// The direction in `ufw` syntax.
    fn ufw_direction(self) -> &'static str {
        match self {
            Self::FromPods => "in",
            Self::ToPods => "out",
        }
    }

    /// The key of the pod interface's name in `nft` syntax.
    fn nft_interface_key(self) -> &'static str {
        match self {
            Self::FromPods => "iifname",
            Self::ToPods => "oifname",
        }
    }
}

/// The problem of a table `filter` of legacy iptables, which the agent cannot read.
pub fn legacy_iptables_problem(family: Family, attach: AttachMode) -> String {
    let (names, iptables) = match family {
        Family::V4 => ("ip_tables_names", "iptables-legacy"),
        Family::V6 => ("ip6_tables_names", "ip6tables-legacy"),
    };
    let commands = [Direction::FromPods, Direction::ToPods]
        .map(|direction| direction.iptables_command(iptables, "FORWARD", attach));
    format!(
        "legacy iptables has rules that the agent cannot read (table filter in /proc/net/{names}): run `{iptables} \
         -S FORWARD`. If the policy or the last rule drops packets, pods may be unreachable; then accept packets of \
         pods: {}",
        commands.join(" and ")
    )
}

/// Whether the pattern matches this name.
fn names_interface(pattern: &NamePattern, interface: &str) -> bool {
    match pattern {
        NamePattern::Exactly(name) => name == interface,
        NamePattern::Prefixed(prefix) => interface.starts_with(prefix),
    }
}

/// Whether the network contains all addresses of the pool, or of at least one of its blocks. A rule for less than a
/// block, such as a single address, is intentional: it is not reported.
fn covers_block(network: IpNetwork, pool: IpNetwork, block_length: u8) -> bool {
    let covers_pool = network.prefix() <= pool.prefix() && network.contains(pool.ip());
    covers_pool || (network.prefix() <= block_length && pool.contains(network.ip()))
}

/// The name pattern of pod interfaces, with this wildcard character.
fn pod_interface_pattern(wildcard: char, attach: AttachMode) -> String {
    match attach {
        AttachMode::Bridge => BRIDGE.to_owned(),
        AttachMode::Routed => format!("{POD_INTERFACE_PREFIX}{wildcard}"),
    }
}

/// Whether the pattern matches the names of all pod interfaces.
fn matches_pod_interfaces(pattern: &NamePattern, attach: AttachMode) -> bool {
    match (pattern, attach) {
        (NamePattern::Exactly(name), AttachMode::Bridge) => name == BRIDGE,
        (NamePattern::Exactly(_), AttachMode::Routed) => false,
        (NamePattern::Prefixed(prefix), AttachMode::Bridge) => BRIDGE.starts_with(prefix),
        (NamePattern::Prefixed(prefix), AttachMode::Routed) => POD_INTERFACE_PREFIX.starts_with(prefix),
    }
}

#[cfg(test)]
mod tests;
