//! Netfilter queues that rules of other programs pass packets to, and that no program reads: the kernel drops these
//! packets.

use std::collections::{BTreeMap, BTreeSet};

use polder_netlink::nft::foreign::{BaseChain, ForeignVerdict};

use crate::kernel::foreign_state::Filter;

/// The problems of these filters, one per queue. `read` are the queues that a program reads.
pub fn problems<'a>(filters: impl Iterator<Item = &'a Filter>, read: &BTreeSet<u16>) -> Vec<String> {
    let mut chains: BTreeMap<u16, BTreeSet<String>> = BTreeMap::new();
    for filter in filters {
        let BaseChain { family, table, name, .. } = &filter.base;
        for queue in needed_queues(filter).filter(|queue| !read.contains(queue)) {
            chains.entry(queue).or_default().insert(format!("{name} of table {family} {table}"));
        }
    }
    chains.iter().map(|(queue, chains)| problem(*queue, chains)).collect()
}

/// The queues whose packets the kernel drops while no program reads them.
fn needed_queues(filter: &Filter) -> impl Iterator<Item = u16> {
    let queues = filter.chains.values().flatten().filter_map(|rule| match rule.verdict {
        ForeignVerdict::Queue(queues) => Some(queues),
        _ => None,
    });
    queues
        .filter(|queues| !queues.bypass)
        .flat_map(|queues| queues.first..=queues.first.saturating_add(queues.count.saturating_sub(1)))
}

fn problem(queue: u16, chains: &BTreeSet<String>) -> String {
    let chains = chains.iter().map(String::as_str).collect::<Vec<_>>().join(", ");
    format!(
        "no program reads netfilter queue {queue}, and rules pass forwarded packets to it (chains: {chains}): the kernel \
         drops these packets, also those of pods. Start the program that made the rules; for NetworkPolicy, check the \
         pod of kube-network-policies on this node. If the program was removed, delete its rules"
    )
}

#[cfg(test)]
mod tests {
    use polder_netlink::nft::TableFamily;
    use polder_netlink::nft::foreign::{ForeignRule, PacketQueues, Policy, RuleCondition};

    use super::*;

    fn filter(name: &str, queues: &[PacketQueues]) -> Filter {
        let (table, name) = ("kube-network-policies".to_owned(), name.to_owned());
        let rule = |queues: &PacketQueues| ForeignRule {
            conditions: vec![RuleCondition::Other],
            verdict: ForeignVerdict::Queue(*queues),
        };
        let chains = BTreeMap::from([(name.clone(), queues.iter().map(rule).collect())]);
        Filter { base: BaseChain { family: TableFamily::Inet, table, name, policy: Policy::Accept }, chains }
    }

    #[test]
    fn a_queue_without_a_program_is_reported_once_with_its_chains() {
        let queues = PacketQueues { first: 98, count: 1, bypass: false };
        let filters = [filter("postrouting", &[queues, queues]), filter("prerouting", &[queues])];
        let found = problems(filters.iter(), &BTreeSet::from([97]));
        let [text] = &found[..] else { panic!("one problem: {found:?}") };
        let chains =
            ["postrouting", "prerouting"].map(|name| format!("{name} of table inet kube-network-policies"));
        assert!(text.contains("queue 98,") && text.contains(&chains.join(", ")), "{text}");
        assert_eq!(problems(filters.iter(), &BTreeSet::from([98])), Vec::<String>::new());
    }

    #[test]
    fn a_queue_that_lets_packets_pass_without_a_program_is_not_reported() {
        let filters = [filter("postrouting", &[PacketQueues { first: 98, count: 1, bypass: true }])];
        assert_eq!(problems(filters.iter(), &BTreeSet::new()), Vec::<String>::new());
    }

    #[test]
    fn every_queue_of_a_range_needs_a_program() {
        let filters = [filter("postrouting", &[PacketQueues { first: 0, count: 3, bypass: false }])];
        let found = problems(filters.iter(), &BTreeSet::from([0, 2]));
        assert!(found.len() == 1 && found[0].contains("queue 1,"), "{found:?}");
    }
}
