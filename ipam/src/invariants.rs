//! Invariants of a cluster at any time and after any failure. The simulation checks them after every step, and agents
//! check them on a running cluster.
//!
//! Pure: a function from known facts to deviations. The facts may be incomplete: an invariant that they do not decide
//! is not checked. Invariants over time, for example the cool-down of addresses, are in [`history`].

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
use crate::ledger::{AttachmentEntry, NodeIdentity, OwnedBlock};
use crate::record::AddressRecord;
use crate::view::View;

/// A violated invariant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Deviation {
    /// The violated invariant.
    pub invariant: Invariant,
    /// Description of the violation, with its objects.
    pub what: String,
    /// Remedy for the operator.
    pub remedy: String,
    /// The affected node, if it is a single one.
    pub node: Option<NodeName>,
    /// A repair that does not affect running pods, if any.
    pub repair: Option<Repair>,
}

impl fmt::Display for Deviation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { invariant, what, remedy, .. } = self;
        write!(f, "{invariant}: {what}: {remedy}")
    }
}

/// A repair that is possible at once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Repair {
    /// Release an attachment of the deviation's node whose interface or namespace is gone.
    Release(Attachment),
    /// Delete the record that lists the address for the deviation's node.
    Withdraw(IpAddr),
    /// Release a reserved address that no attachment has.
    ReleaseReservation(IpAddr),
}

/// The facts to check.
#[derive(Debug, Clone, Default)]
pub struct ClusterReport<'a> {
    /// The datastore's records; `None` if they are unknown.
    pub view: Option<&'a View>,
    /// Whether the datastore lost records and their owners are restoring them: missing records are no deviation then.
    pub is_restoring: bool,
    /// The addresses that nodes list in the datastore.
    pub published: &'a [PublishedAddress],
    /// The nodes with known ledgers or kernels. Two can have the same name.
    pub nodes: &'a [NodeFacts],
}

/// A record that lists an address for an attachment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PublishedAddress {
    /// The node that wrote it.
    pub node: NodeName,
    /// The address.
    pub address: IpAddr,
    /// Contents of the record.
    pub record: AddressRecord,
}

/// Facts about a node, all from the same time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeFacts {
    /// Name of the node.
    pub name: NodeName,
    /// Current boot of its machine.
    pub boot_id: BootId,
    /// Contents of its ledger; `None` if unknown.
    pub ledger: Option<LedgerFacts>,
    /// State of its kernel; `None` if unknown.
    pub kernel: Option<KernelFacts>,
    /// The attachments that a task works on, or whose removal is not detected yet: missing parts of these are no
    /// deviation.
    pub in_flight: BTreeSet<Attachment>,
    /// Addresses that ADD returned to the runtime, and for which there was no DEL yet.
    pub promised: BTreeMap<Attachment, Vec<IpAddr>>,
}

/// Contents of a node's ledger.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LedgerFacts {
    /// Identity of the node; `None` before the first registration.
    pub identity: Option<NodeIdentity>,
    /// The node's blocks with the counts of their addresses. `None` if nothing is allocated from the block.
    pub blocks: Vec<(OwnedBlock, Option<Counts>)>,
    /// The node's gateway addresses and those of its probe endpoint.
    pub gateways: Vec<IpAddr>,
    /// The pods' attachments.
    pub attachments: Vec<AttachmentEntry>,
}

/// State of a node's kernel.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct KernelFacts {
    /// The interfaces of pods.
    pub interfaces: Vec<Interface>,
    /// The node's gateway addresses.
    pub gateways: Vec<IpAddr>,
    /// The existing network namespaces, of those in the ledger.
    pub namespaces: BTreeSet<String>,
}

/// An interface of a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    /// The attachment that it belongs to.
    pub attachment: Attachment,
    /// The pod addresses behind it.
    pub addresses: Vec<IpAddr>,
}

/// Checks all invariants that need only the facts of one moment.
pub fn check(facts: &ClusterReport<'_>) -> Vec<Deviation> {
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
