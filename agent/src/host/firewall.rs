//! Packet filters of others that drop what is forwarded, pods' packets with it.
//!
//! No rule of ours could help: in nftables accepting a packet does not keep another table from dropping it. So what there
//! is is judged, and said.

use std::collections::BTreeMap;

use polder_api::{BRIDGE, Family, POD_INTERFACE_PREFIX};
use polder_ipam::record::AttachMode;
use polder_netlink::nft::foreign::{
    Condition, ForeignRule, ForwardChain, Judgement, Names, Policy, TableFamily,
};

/// The kernel's own limit of jumps within jumps (`NFT_JUMP_STACK_SIZE`).
const DEPTH: usize = 16;

/// A chain that judges what is forwarded, with the chains that it jumps to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Filter {
    /// Where it hangs.
    pub base: ForwardChain,
    /// The rules of the chain and of those that it leads to, by the name of the chain.
    pub chains: BTreeMap<String, Vec<ForeignRule>>,
}

/// Which packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    FromPods,
    ToPods,
}

/// What becomes of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Accepted,
    Dropped,
}

/// Whose filter it is, and so where a rule of the operator's belongs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Owner {
    Firewalld,
    Docker,
    Ufw,
    Iptables,
    Somebody,
}

impl Filter {
    /// What is to be said of it, if it drops pods' packets as far as its rules can be told.
    pub fn problem(&self, attach: AttachMode) -> Option<String> {
        let dropped: Vec<Way> = [Way::FromPods, Way::ToPods]
            .into_iter()
            .filter(|way| self.fate(*way, attach) == Fate::Dropped)
            .collect();
        let what = match dropped.as_slice() {
            [] => return None,
            [Way::FromPods] => "what comes from pods",
            [Way::ToPods] => "what goes to pods",
            _ => "what comes from pods or goes to them",
        };
        let ForwardChain { family, table, name, .. } = &self.base;
        Some(format!(
            "chain {name} of table {family} {table} drops forwarded packets that no rule of it accepts, and none is \
             known to accept {what}: pods may not be reached. {}",
            self.remedy(&dropped, attach)
        ))
    }

    /// What happens to a packet of which nothing is known but that it comes from a pod, or goes to one. A rule that asks for
    /// more is taken not to apply.
    fn fate(&self, way: Way, attach: AttachMode) -> Fate {
        let of_policy = match self.base.policy {
            Policy::Accept => Fate::Accepted,
            Policy::Drop => Fate::Dropped,
        };
        self.walk(&self.base.name, way, attach, DEPTH).unwrap_or(of_policy)
    }

    fn walk(&self, chain: &str, way: Way, attach: AttachMode, depth: usize) -> Option<Fate> {
        let depth = depth.checked_sub(1)?;
        for rule in self.chains.get(chain)? {
            if !rule.conditions.iter().all(|condition| way.fulfils(condition, attach)) {
                continue;
            }
            match &rule.judgement {
                Judgement::Accept => return Some(Fate::Accepted),
                Judgement::Drop => return Some(Fate::Dropped),
                Judgement::Return => return None,
                Judgement::Goto(to) => return self.walk(to, way, attach, depth),
                Judgement::Jump(to) => {
                    if let Some(fate) = self.walk(to, way, attach, depth) {
                        return Some(fate);
                    }
                }
                Judgement::None => {}
            }
        }
        None
    }

    fn owner(&self) -> Owner {
        let ForwardChain { family, table, name, .. } = &self.base;
        let leads_to = |chain: &str| self.chains.contains_key(chain);
        let is_of_iptables = *family != TableFamily::Inet && table == "filter" && name == "FORWARD";
        match is_of_iptables {
            true if leads_to("DOCKER-USER") => Owner::Docker,
            true if leads_to("ufw-user-forward") || leads_to("ufw6-user-forward") => Owner::Ufw,
            true => Owner::Iptables,
            false if table == "firewalld" => Owner::Firewalld,
            false => Owner::Somebody,
        }
    }

    /// What makes it let pods' packets pass.
    fn remedy(&self, dropped: &[Way], attach: AttachMode) -> String {
        let ForwardChain { family, table, name, .. } = &self.base;
        let iptables = if *family == TableFamily::Ip6 { "ip6tables" } else { "iptables" };
        let command = |way: &Way| match self.owner() {
            Owner::Firewalld => None,
            Owner::Docker => Some(way.iptables(iptables, "DOCKER-USER", attach)),
            Owner::Ufw => Some(format!("`ufw route allow {} on {}`", way.word(), wildcard('+', attach))),
            Owner::Iptables => Some(way.iptables(iptables, "FORWARD", attach)),
            Owner::Somebody => Some(format!(
                "`nft insert rule {family} {table} {name} {}name '{}' accept`",
                way.interface(),
                wildcard('*', attach)
            )),
        };
        let commands: Vec<String> = dropped.iter().filter_map(command).collect();
        if commands.is_empty() {
            return "Install deploy/host/firewalld/zones/polder.xml and deploy/host/firewalld/policies/polder-pods.xml in the \
                    same folders of /etc/firewalld, then `firewall-cmd --reload`"
                .to_owned();
        }
        format!("Let them pass, and make that last: {}", commands.join(" and "))
    }
}

impl Way {
    /// Whether a packet that goes this way, and of which nothing else is known, meets the condition.
    fn fulfils(self, condition: &Condition, attach: AttachMode) -> bool {
        match (self, condition) {
            (Self::FromPods, Condition::Input(names)) | (Self::ToPods, Condition::Output(names)) => {
                names.iter().any(|names| are_pods(names, attach))
            }
            _ => false,
        }
    }

    /// The rule in the words of `iptables`.
    fn iptables(self, program: &str, chain: &str, attach: AttachMode) -> String {
        let side = match self {
            Self::FromPods => "-i",
            Self::ToPods => "-o",
        };
        format!("`{program} -I {chain} {side} {} -j ACCEPT`", wildcard('+', attach))
    }

    /// In the words of `ufw`.
    fn word(self) -> &'static str {
        match self {
            Self::FromPods => "in",
            Self::ToPods => "out",
        }
    }

    /// In the words of `nft`.
    fn interface(self) -> &'static str {
        match self {
            Self::FromPods => "iif",
            Self::ToPods => "oif",
        }
    }
}

/// What is to be said of a table `filter` of legacy iptables.
pub fn unreadable(family: Family, attach: AttachMode) -> String {
    let (names, iptables) = match family {
        Family::V4 => ("ip_tables_names", "iptables-legacy"),
        Family::V6 => ("ip6_tables_names", "ip6tables-legacy"),
    };
    let commands = [Way::FromPods, Way::ToPods].map(|way| way.iptables(iptables, "FORWARD", attach));
    format!(
        "legacy iptables has a table filter (/proc/net/{names}), which cannot be read from here: should `{iptables} -S \
         FORWARD` show that it drops what no rule accepts, pods may not be reached. Let them pass then: {}",
        commands.join(" and ")
    )
}

/// The interfaces of pods, with what stands for the rest of a name.
fn wildcard(rest: char, attach: AttachMode) -> String {
    match attach {
        AttachMode::Bridge => BRIDGE.to_owned(),
        AttachMode::Routed => format!("{POD_INTERFACE_PREFIX}{rest}"),
    }
}

/// Whether all interfaces of pods have one of these names.
fn are_pods(names: &Names, attach: AttachMode) -> bool {
    match (names, attach) {
        (Names::Exactly(name), AttachMode::Bridge) => name == BRIDGE,
        (Names::Exactly(_), AttachMode::Routed) => false,
        (Names::Prefixed(prefix), AttachMode::Bridge) => BRIDGE.starts_with(prefix),
        (Names::Prefixed(prefix), AttachMode::Routed) => POD_INTERFACE_PREFIX.starts_with(prefix),
    }
}

#[cfg(test)]
mod tests;
