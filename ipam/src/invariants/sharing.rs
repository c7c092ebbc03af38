//! I1: each address is used by only one interface.

use std::collections::BTreeMap;
use std::net::IpAddr;

use polder_api::NodeName;

use super::{ClusterReport, Deviation, Invariant, NodeFacts, deviation};

/// A user of an address.
struct AddressUser<'a> {
    node: &'a NodeName,
    holder: String,
}

pub(super) fn check(facts: &ClusterReport<'_>, found: &mut Vec<Deviation>) {
    let mut users: BTreeMap<IpAddr, Vec<AddressUser<'_>>> = BTreeMap::new();
    for node in facts.nodes {
        for (address, holder) in uses(node) {
            users.entry(address).or_default().push(AddressUser { node: &node.name, holder: holder() });
        }
    }
    for (address, users) in users.iter().filter(|(_, users)| users.len() > 1) {
        let all: Vec<String> =
            users.iter().map(|AddressUser { node, holder }| format!("{holder} on {node}")).collect();
        found.push(deviation(
            Invariant::Unique,
            Some(users[0].node),
            format!("{address} is used by {}", all.join(" and by ")),
            "delete all of these pods but one",
        ));
    }
}

type Name<'a> = Box<dyn Fn() -> String + 'a>;

/// The addresses in use on a node: from its kernel, or from its ledger if the kernel's state is unknown.
fn uses(node: &NodeFacts) -> Vec<(IpAddr, Name<'_>)> {
    let gateway = |address: &IpAddr| (*address, Box::new(|| "the node itself".to_owned()) as Name<'_>);
    if let Some(kernel) = &node.kernel {
        let interfaces = kernel.interfaces.iter().flat_map(|interface| {
            let name = || Box::new(|| interface.attachment.to_string()) as Name<'_>;
            interface.addresses.iter().map(move |address| (*address, name()))
        });
        return interfaces.chain(kernel.gateways.iter().map(gateway)).collect();
    }
    let Some(ledger) = &node.ledger else { return Vec::new() };
    let attachments = ledger.attachments.iter().flat_map(|held| {
        let name = || Box::new(|| held.attachment.to_string()) as Name<'_>;
        held.addresses.iter().map(move |address| (*address, name()))
    });
    attachments.chain(ledger.gateways.iter().map(gateway)).collect()
}
