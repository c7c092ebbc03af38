//! Zones of firewalld, read from its rules, and the commands that change them.
//!
//! Both backends of firewalld 1.3 select the zone of a packet by rules like `ip saddr 10.0.0.0/8 goto filter_IN_work`
//! (nftables) or `-s 10.0.0.0/8 -g IN_work` (iptables). Zones of sources precede zones of interfaces; the last rule
//! selects the default zone.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnetwork::IpNetwork;
use polder_api::Family;
use polder_ipam::Cidr;
use polder_netlink::nft::TableFamily;
use polder_netlink::nft::foreign::{BaseChain, ForeignVerdict, RuleCondition};

use super::{MAX_JUMP_DEPTH, Owner, PacketOutcome, covers_block, names_interface};
use crate::kernel::foreign_state::Filter;

/// The chains that only firewalld's iptables backend creates. In tables of the nftables backend, which is the default,
/// the table itself is named `firewalld`.
const IPTABLES_CHAINS: [&str; 3] = ["FORWARD_ZONES", "INPUT_ZONES", "PREROUTING_ZONES"];

/// The beginnings of the names of zone chains, with both backends: packets to the host, and forwarded packets.
const ZONE_CHAINS: [&str; 4] = ["filter_IN_", "IN_", "filter_FWD_", "FWD_"];

/// The effect of `firewall-cmd --reload`, which is part of a remedy (`FlushAllOnReload=yes`, the default).
pub(super) const RELOAD_WARNING: &str = "A reload undoes what was set without --permanent, such as the zone of an \
                                         interface: set what you need with --permanent before";

/// The zone of some packets.
#[derive(Debug, PartialEq, Eq)]
enum Zone<'a> {
    Known(&'a str),
    /// It depends on a condition that is not decoded, such as an ipset or a MAC address.
    Uncertain,
}

impl Filter {
    /// Whether firewalld created the chain, with either backend.
    pub fn is_firewalld(&self) -> bool {
        self.owner() == Owner::Firewalld
    }

    /// Whether the chain is one of firewalld.
    pub(super) fn has_firewalld_chains(&self) -> bool {
        let BaseChain { family, table, .. } = &self.base;
        table == "firewalld"
            || *family != TableFamily::Inet
                && IPTABLES_CHAINS.iter().any(|chain| self.chains.contains_key(*chain))
    }

    /// The command that opens the port of the tunnels for packets from these peers. It is given with and without
    /// `--permanent`, so that no reload is needed.
    pub(super) fn firewalld_port_remedy(
        &self,
        port: u16,
        uplinks: &BTreeSet<String>,
        peers: &BTreeSet<IpAddr>,
    ) -> String {
        let packets = peers
            .iter()
            .filter(|peer| self.applies_to(Family::of(**peer)))
            .flat_map(|peer| uplinks.iter().map(move |uplink| (*peer, uplink.as_str())));
        let mut zones = BTreeSet::new();
        for (peer, uplink) in packets {
            match self.zone_of_packet(&self.base.name, peer, uplink, MAX_JUMP_DEPTH) {
                Some(Zone::Known(zone)) => zones.insert(zone),
                Some(Zone::Uncertain) | None => return undetermined_zone_remedy(port, uplinks),
            };
        }
        if zones.is_empty() {
            return undetermined_zone_remedy(port, uplinks);
        }
        let commands = zones.iter().map(|zone| {
            let command = |option| format!("`firewall-cmd {option}--zone={zone} --add-port={port}/udp`");
            format!("{} and {}", command(""), command("--permanent "))
        });
        commands.collect::<Vec<_>>().join(", ")
    }

    /// The zone of packets from this address that arrive on this interface. `None` if no rule selects a zone.
    fn zone_of_packet(&self, chain: &str, from: IpAddr, interface: &str, depth: usize) -> Option<Zone<'_>> {
        let depth = depth.checked_sub(1)?;
        let fulfils = |condition: &RuleCondition| match condition {
            RuleCondition::Input(patterns) => {
                patterns.iter().any(|pattern| names_interface(pattern, interface))
            }
            RuleCondition::Family(family) => *family == Family::of(from),
            RuleCondition::Source(network) => network.contains(from),
            RuleCondition::Other => true,
            _ => false,
        };
        for rule in self.chains.get(chain)?.iter().filter(|rule| rule.conditions.iter().all(fulfils)) {
            let (ForeignVerdict::Jump(to) | ForeignVerdict::Goto(to)) = &rule.verdict else { continue };
            let zone = match zone_name(to) {
                Some(_) if rule.conditions.contains(&RuleCondition::Other) => Some(Zone::Uncertain),
                Some(zone) => Some(Zone::Known(zone)),
                None => self.zone_of_packet(to, from, interface, depth),
            };
            if zone.is_some() {
                return zone;
            }
        }
        None
    }

    /// The problem, if packets from pods belong to a zone because of their addresses, and that zone does not accept
    /// all packets. For filters of forwarded packets.
    pub fn source_zone_problem(&self, pools: &[(Cidr, u8)]) -> Option<String> {
        self.is_firewalld().then_some(())?;
        let mut zones =
            pools.iter().map(|(pool, block_length)| self.zone_of_pods((*pool).into(), *block_length));
        let (zone, source) = zones.find_map(|zone| zone)?;
        let remove = |option| format!("`firewall-cmd {option}--zone={zone} --remove-source={source}`");
        Some(format!(
            "zone {zone} of firewalld has the source {source}, which contains addresses of pods: the zone of a source \
             precedes the zone of an interface, so zone {zone} applies to packets from these pods, and drops what it \
             does not accept. Remove that source, and add narrower ones if other hosts need the zone: {} and {}",
            remove(""),
            remove("--permanent ")
        ))
    }

    /// The first zone that applies to pods of the pool because of their addresses, and does not accept all packets,
    /// with its source.
    fn zone_of_pods(&self, pool: IpNetwork, block_length: u8) -> Option<(&str, IpNetwork)> {
        for rule in self.chains.values().flatten() {
            let (ForeignVerdict::Jump(chain) | ForeignVerdict::Goto(chain)) = &rule.verdict else { continue };
            let source = rule.conditions.iter().find_map(|condition| match condition {
                RuleCondition::Source(network) => Some(*network),
                _ => None,
            });
            let (Some(zone), Some(source)) = (zone_name(chain), source) else { continue };
            // A host with very many chains: this one was not read.
            let is_unknown = !self.chains.contains_key(chain);
            if is_unknown || !covers_block(source, pool, block_length) {
                continue;
            }
            if self.evaluate(chain, &|_| false, MAX_JUMP_DEPTH) != Some(PacketOutcome::Accepted) {
                return Some((zone, source));
            }
            // The zones of later rules do not apply to any pod.
            if source.prefix() <= pool.prefix() {
                return None;
            }
        }
        None
    }
}

/// The command that opens the port of the tunnels in a zone that the operator selects.
fn undetermined_zone_remedy(port: u16, uplinks: &BTreeSet<String>) -> String {
    let uplink = uplinks.first().map_or("the uplink", String::as_str);
    format!(
        "`firewall-cmd --zone=ZONE --add-port={port}/udp` and `firewall-cmd --permanent --zone=ZONE \
         --add-port={port}/udp`. In the list of `firewall-cmd --get-active-zones`, ZONE is the one with the other \
         nodes' addresses as sources, otherwise the one with interface {uplink}; if none has either, it is the \
         default zone (`firewall-cmd --get-default-zone`)"
    )
}

/// The name of the zone whose rules are in this chain.
fn zone_name(chain: &str) -> Option<&str> {
    let name = ZONE_CHAINS.iter().find_map(|beginning| chain.strip_prefix(beginning))?;
    // The nftables backend has chains of policies, too.
    (!name.starts_with("policy_")).then_some(name)
}

#[cfg(test)]
mod tests;
