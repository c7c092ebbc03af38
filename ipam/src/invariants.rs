//! What must hold of a cluster at every moment, whatever fails: checked after every step of the simulation, and on a
//! cluster that runs.
//!
//! Pure: from what is known, to what deviates. Not all of it has to be known: what cannot be decided is not judged. What
//! changes over time, like how long an address rested, is [`history`]'s.

pub mod history;
mod nodes;
mod sharing;
mod store;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;

pub use polder_api::ipam::Invariant;
use polder_api::{Attachment, NodeName};

use crate::allocator::Counts;
use crate::ids::BootId;
use crate::ledger::{Held, Identity, OwnedBlock};
use crate::record::AddressRecord;
use crate::view::View;

/// Something that does not hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Deviation {
    /// What should hold.
    pub invariant: Invariant,
    /// What does not.
    pub what: String,
    /// What to do about it.
    pub remedy: String,
    /// Which node it concerns, if it concerns one.
    pub node: Option<NodeName>,
    /// What would put it right without taking anything from the living.
    pub repair: Option<Repair>,
}

impl fmt::Display for Deviation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { invariant, what, remedy, .. } = self;
        write!(f, "{invariant}: {what}: {remedy}")
    }
}

/// What can be put right at once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Repair {
    /// Release an attachment of the deviation's node, of which nothing is left.
    Release(Attachment),
    /// Delete the record that says that the deviation's node has the address.
    Withdraw(IpAddr),
    /// Let go of a reserved address that nobody has.
    LetGo(IpAddr),
}

/// What is known.
#[derive(Debug, Clone, Default)]
pub struct Facts<'a> {
    /// The store's records.
    pub view: Option<&'a View>,
    /// Whether the store has lost records, and their owners are putting them back: what is missing is not judged.
    pub putting_back: bool,
    /// What the nodes say that they have, besides those of which more is known.
    pub published: &'a [Published],
    /// The nodes of which more is known than their records. Two can have the same name.
    pub nodes: &'a [NodeFacts],
}

/// A record of what has an address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Published {
    /// On which node.
    pub node: NodeName,
    /// The address.
    pub address: IpAddr,
    /// What has it.
    pub record: AddressRecord,
}

/// What is known of a node. Its parts are of one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeFacts {
    /// Its name.
    pub name: NodeName,
    /// In which boot it is.
    pub boot_id: BootId,
    /// What its ledger says.
    pub ledger: Option<LedgerFacts>,
    /// What its kernel has.
    pub kernel: Option<KernelFacts>,
    /// The attachments that somebody is working on, or has not noticed to be gone: what they are short of is no deviation
    /// yet.
    pub in_flight: BTreeSet<Attachment>,
    /// What runtimes were told that they have, and have not asked to be taken away.
    pub promised: BTreeMap<Attachment, Vec<IpAddr>>,
}

/// What a node's ledger says.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LedgerFacts {
    /// Whose it is.
    pub identity: Option<Identity>,
    /// The node's blocks, with what has become of their addresses. No counts, where nothing goes out of one.
    pub blocks: Vec<(OwnedBlock, Option<Counts>)>,
    /// The node's own addresses.
    pub gateways: Vec<IpAddr>,
    /// The attachments.
    pub attachments: Vec<Held>,
}

/// What a node's kernel has.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct KernelFacts {
    /// The pods' interfaces.
    pub interfaces: Vec<Interface>,
    /// The node's own addresses.
    pub gateways: Vec<IpAddr>,
    /// The network namespaces that there are, of those that the ledger names.
    pub namespaces: BTreeSet<String>,
}

/// An interface of a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    /// Whose it is.
    pub attachment: Attachment,
    /// The addresses behind it.
    pub addresses: Vec<IpAddr>,
}

/// What does not hold of what is known.
pub fn check(facts: &Facts<'_>) -> Vec<Deviation> {
    let mut found = Vec::new();
    sharing::check(facts, &mut found);
    store::check(facts, &mut found);
    for node in facts.nodes {
        nodes::check(facts, node, &mut found);
    }
    found
}

fn deviation(
    invariant: Invariant,
    node: Option<&NodeName>,
    what: impl Into<String>,
    remedy: &str,
) -> Deviation {
    let (what, remedy, node) = (what.into(), remedy.to_owned(), node.cloned());
    Deviation { invariant, what, remedy, node, repair: None }
}

#[cfg(test)]
mod tests;
