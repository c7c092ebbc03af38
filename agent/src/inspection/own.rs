//! Examines this node: compares its ledger with its kernel, and both with the records.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;

use polder_api::{Attachment, NodeName};
use polder_ipam::Revision;
use polder_ipam::invariants::{
    ClusterReport, Deviation, Interface, Invariant, KernelFacts, LedgerFacts, NodeFacts, PublishedAddress,
    Repair, check,
};
use polder_ipam::key::Key;
use polder_ipam::ledger::{AttachmentEntry, LedgerError};
use polder_ipam::recovery::LivingPod;
use polder_ipam::store::StoreError;
use polder_ipam::tasks::published::PublishedAddresses;
use polder_ipam::view::View;

use crate::host::pod_inspection::{self, PodInspector};
use crate::kernel::Kernel;
use crate::kernel::inspection::SeenPod;
use crate::machine::now;
use crate::node::Node;
use crate::presence::Presence;

/// A deviation and its repair.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Finding {
    /// The deviation.
    pub deviation: Deviation,
    /// A repair that takes nothing from running pods, if possible.
    pub repair: Option<OwnRepair>,
}

/// Repairs that the node can make by itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum OwnRepair {
    /// Release an attachment that no longer exists on the node.
    Release(Attachment),
    /// Publish that the attachment has the address.
    Publish(AttachmentEntry, IpAddr),
    /// Delete a record of an address, if it still has that revision.
    Withdraw {
        /// The key of the record.
        key: String,
        /// The revision of the record.
        revision: Revision,
    },
    /// Add a running pod to the ledger.
    Restore(LivingPod),
    /// Wake the registrar, which checks the node's records and its ledger.
    Reconcile,
}

/// Result of an examination.
#[derive(Debug, Clone, Default)]
pub(super) struct OwnReport {
    /// The deviations.
    pub findings: Vec<Finding>,
    /// Number of attachments in the ledger.
    pub attachments: u64,
    /// Number of pod interfaces on the host.
    pub interfaces: u64,
}

/// The examined state of a node, all of it read at about the same time.
struct ExaminedState {
    ledger: LedgerFacts,
    astray: Vec<AttachmentEntry>,
    seen: Vec<SeenPod>,
    unknown: Unknown,
    gateways: Vec<IpAddr>,
    published: PublishedAddresses,
}

/// Running pods that are not in the ledger, by attachment; `None` if no namespace with the pod's interface was found.
type Unknown = BTreeMap<Attachment, Option<LivingPod>>;

/// Why the examination failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum NotExamined {
    /// The published addresses of this node cannot be read from the datastore.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The database of the ledger returned an error.
    ///
    /// Remedy: check free space and errors of the file system with the state directory. The check is retried.
    #[error("cannot read the ledger: {0}")]
    Ledger(#[from] LedgerError),
    /// The kernel returned an error when its interfaces and their addresses were read.
    ///
    /// Remedy: correct the cause that the kernel reports at the end of the text. The check is retried.
    #[error("cannot list the interfaces: {0}")]
    Interfaces(#[source] polder_netlink::Error),
    /// The network of a pod that is not in the ledger cannot be read from the kernel.
    ///
    /// Remedy: correct the cause that the kernel reports at the end of the text. The check is retried.
    #[error("cannot read the network of a pod: {0}")]
    Inside(#[source] polder_netlink::Error),
}

/// Examines the node. While its pods change, a single examination can report deviations that do not persist: only those
/// that a second one confirms are valid.
pub(super) async fn examine(
    node: &Node,
    inspector: &PodInspector,
    is_restoring: bool,
) -> Result<OwnReport, NotExamined> {
    let range = Key::addresses_of(&node.config.node);
    let published = PublishedAddresses::read_range(&node.store, &range).await?;
    let before = node.in_flight.all();
    let read =
        node.ipam.run(|ipam| Ok::<_, LedgerError>((ipam.facts(now())?, ipam.differing_attachments()?))).await;
    let (ledger, astray) = read?;
    let kernel =
        node.pods.kernel.run(|kernel: &mut Kernel| Ok((kernel.seen_pods()?, kernel.gateways()?))).await;
    let (seen, gateways) = kernel.map_err(NotExamined::Interfaces)?;
    let in_flight = before.union(&node.in_flight.all()).cloned().collect();
    let mut unknown = Unknown::new();
    for attachment in seen.iter().filter_map(SeenPod::attachment) {
        if !ledger.attachments.iter().any(|held| held.attachment == attachment) {
            let sought = attachment.clone();
            let inside = node.pods.kernel.run(move |kernel: &mut Kernel| kernel.look_inside(&sought)).await;
            unknown.insert(attachment, inside.map_err(NotExamined::Inside)?);
        }
    }
    let inside = changed_inside(node, inspector, &ledger, &in_flight).await;
    let read = ExaminedState { ledger, astray, seen, unknown, gateways, published };
    let mut examine = judge(node, &node.node_state.view(), read, in_flight, is_restoring);
    examine.findings.extend(inside);
    Ok(examine)
}

/// Pods whose network inside the namespace differs from its setup.
async fn changed_inside(
    node: &Node,
    inspector: &PodInspector,
    ledger: &LedgerFacts,
    in_flight: &BTreeSet<Attachment>,
) -> Vec<Finding> {
    let Some(cluster) = node.node_state.view().cluster.as_ref().map(|cluster| Arc::clone(&cluster.record))
    else {
        return Vec::new();
    };
    let idle = |held: &&AttachmentEntry| {
        pod_inspection::can_be_looked_into(held) && !in_flight.contains(&held.attachment)
    };
    let mut findings = Vec::new();
    for held in ledger.attachments.iter().filter(idle) {
        if let pod_inspection::Comparison::Different(what) = inspector.look_into(&cluster, held).await {
            let what =
                format!("{} on {} was changed after its setup: {what}", held.attachment, node.config.node);
            let remedy = "recreate the pod: delete it, and let its controller create another";
            let deviation = deviation(Invariant::Wired, &node.config.node, what, remedy);
            findings.push(Finding { deviation, repair: None });
        }
    }
    findings
}

fn judge(
    node: &Node,
    view: &View,
    read: ExaminedState,
    in_flight: BTreeSet<Attachment>,
    is_restoring: bool,
) -> OwnReport {
    let ExaminedState { ledger, astray, seen, unknown, gateways, published } = read;
    let me = &node.config.node;
    let interfaces: Vec<Interface> = seen.iter().filter_map(|pod| interface(pod, &ledger)).collect();
    let namespaces = ledger.attachments.iter().map(|held| held.netns.clone());
    let kernel = KernelFacts {
        interfaces,
        gateways,
        // An invisible namespace is not reported as gone.
        namespaces: namespaces.filter(|path| Presence::of(Path::new(path)) != Presence::Gone).collect(),
    };
    let judged = NodeFacts {
        name: me.clone(),
        boot_id: node.node_state.membership.me().boot_id.clone(),
        ledger: Some(ledger.clone()),
        kernel: Some(kernel),
        in_flight: in_flight.clone(),
        promised: BTreeMap::new(),
    };
    let records: Vec<PublishedAddress> =
        published.records.iter().map(|(published, _)| published.clone()).collect();
    let facts = ClusterReport { view: Some(view), is_restoring, published: &records, nodes: &[judged] };
    // The agent that runs the check reports inconsistencies among the records themselves.
    let among = ClusterReport { view: Some(view), is_restoring, published: &[], nodes: &[] };
    let others = check(&among);
    let own = check(&facts).into_iter().filter(|deviation| !others.contains(deviation));
    let mut findings: Vec<Finding> = own.map(|deviation| mendable(deviation, &published, me)).collect();
    findings.extend(nameless(&seen, &ledger, me));
    findings.extend(unwritten(&unknown, &ledger, &in_flight, view, me));
    findings.extend(unpublished(&ledger, &records, &in_flight, is_restoring, me));
    findings.extend(published.unreadable.iter().map(|(key, reason, revision)| Finding {
        deviation: deviation(
            Invariant::NoLeak,
            me,
            format!("record {key} of this node's addresses cannot be read: {reason}"),
            "delete it",
        ),
        repair: Some(OwnRepair::Withdraw { key: key.clone(), revision: *revision }),
    }));
    let busy = |held: &&AttachmentEntry| !in_flight.contains(&held.attachment);
    findings.extend(astray.iter().filter(busy).map(|held| Finding {
        deviation: deviation(
            Invariant::Durable,
            me,
            format!("the agent of {me} and its ledger file differ about {}", held.attachment),
            "the ledger was changed from outside: restart the agent, and check that pod",
        ),
        repair: None,
    }));
    OwnReport { findings, attachments: ledger.attachments.len() as u64, interfaces: seen.len() as u64 }
}

fn deviation(invariant: Invariant, me: &NodeName, what: String, remedy: &str) -> Deviation {
    Deviation { invariant, what, remedy: remedy.to_owned(), node: Some(me.clone()), repair: None }
}

/// The attachment that owns the interface, according to the ledger or else to the interface's alias.
fn owner(pod: &SeenPod, ledger: &LedgerFacts) -> Option<Attachment> {
    let mut held = ledger.attachments.iter().map(|held| &held.attachment);
    held.find(|attachment| attachment.host_interface() == pod.name).cloned().or_else(|| pod.attachment())
}

fn interface(pod: &SeenPod, ledger: &LedgerFacts) -> Option<Interface> {
    Some(Interface { attachment: owner(pod, ledger)?, addresses: pod.addresses.clone() })
}

/// The deviation, with the repair for its invariant.
fn mendable(deviation: Deviation, published: &PublishedAddresses, me: &NodeName) -> Finding {
    let repair = match &deviation.repair {
        Some(Repair::Release(attachment)) => Some(OwnRepair::Release(attachment.clone())),
        Some(Repair::ReleaseReservation(_)) => Some(OwnRepair::Reconcile),
        Some(Repair::Withdraw(address)) => {
            let record = published.records.iter().find(|(published, _)| published.address == *address);
            record.map(|(_, revision)| OwnRepair::Withdraw {
                key: Key::Address(me.clone(), *address).to_string(),
                revision: *revision,
            })
        }
        None if deviation.invariant == Invariant::Owner => Some(OwnRepair::Reconcile),
        None => None,
    };
    Finding { deviation, repair }
}

/// Pod interfaces without a known owner.
fn nameless(seen: &[SeenPod], ledger: &LedgerFacts, me: &NodeName) -> Vec<Finding> {
    let nameless = seen.iter().filter(|pod| owner(pod, ledger).is_none());
    let finding = |pod: &SeenPod| {
        let alias = pod.alias.as_deref().unwrap_or("none");
        let what = format!("interface {} on {me} has no known owner (ifalias: {alias})", pod.name);
        let remedy = "delete the pod at its other end, or delete the interface with ip link delete";
        Finding { deviation: deviation(Invariant::Durable, me, what, remedy), repair: None }
    };
    nameless.map(finding).collect()
}

/// Running pods that are not in the ledger.
fn unwritten(
    unknown: &Unknown,
    ledger: &LedgerFacts,
    in_flight: &BTreeSet<Attachment>,
    view: &View,
    me: &NodeName,
) -> Vec<Finding> {
    let free = |address: &IpAddr| {
        let held = ledger.attachments.iter().any(|held| held.addresses.contains(address));
        let own = ledger.blocks.iter().any(|(owned, _)| owned.block.cidr().has(*address));
        let pooled = view.every_pool().any(|pool| pool.record.cidr().has(*address));
        !held && !ledger.gateways.contains(address) && (own || !pooled)
    };
    let idle = unknown.iter().filter(|(attachment, _)| !in_flight.contains(attachment));
    let finding = |(attachment, pod): (&Attachment, &Option<LivingPod>)| {
        let restorable = pod.clone().filter(|pod| pod.addresses.iter().all(free));
        let addresses = match pod {
            Some(pod) => {
                let addresses: Vec<String> = pod.addresses.iter().map(ToString::to_string).collect();
                addresses.join(", ")
            }
            None => "unknown addresses".to_owned(),
        };
        let what = format!("{attachment} runs on {me} with {addresses}, but is not in the ledger");
        let remedy = match restorable {
            Some(_) => "polderctl ipam check --repair adds it to the ledger; or delete the pod",
            None => "delete the pod: its addresses are unknown, or belong to another pod",
        };
        Finding {
            deviation: deviation(Invariant::Durable, me, what, remedy),
            repair: restorable.map(OwnRepair::Restore),
        }
    };
    idle.map(finding).collect()
}

/// Addresses of attachments without a record in the datastore.
fn unpublished(
    ledger: &LedgerFacts,
    records: &[PublishedAddress],
    in_flight: &BTreeSet<Attachment>,
    is_restoring: bool,
    me: &NodeName,
) -> Vec<Finding> {
    let mut findings = Vec::new();
    let held =
        ledger.attachments.iter().filter(|held| !held.leaving && !in_flight.contains(&held.attachment));
    for held in held.filter(|_| !is_restoring) {
        for address in &held.addresses {
            let says = |published: &&PublishedAddress| {
                published.address == *address && published.record.attachment == held.attachment
            };
            if !records.iter().any(|published| says(&published)) {
                let what =
                    format!("the datastore has no record that {} on {me} has {address}", held.attachment);
                let remedy = "polderctl ipam check --repair publishes it; restarting the agent does, too";
                findings.push(Finding {
                    deviation: deviation(Invariant::Durable, me, what, remedy),
                    repair: Some(OwnRepair::Publish(held.clone(), *address)),
                });
            }
        }
    }
    findings
}
