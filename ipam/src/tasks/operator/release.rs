//! Releases an address for an operator, unless a running pod uses it.

use std::net::IpAddr;

use polder_api::ipam::Release;
use polder_api::message::{Refusal, RefusalKind, Refuse};
use polder_api::{Attachment, NodeName};
use tracing::info;

use super::{ATTEMPTS, OperatorHost};
use crate::Block;
use crate::cause::HostError;
use crate::key::{Key, Range};
use crate::node::AddressCondition;
use crate::record::{Holder, ReservationRecord};
use crate::release::NotReleased;
use crate::reservation;
use crate::store::{Outcome, StoreError};
use crate::tasks::orphan_collector::{self, SweepResult};
use crate::tasks::published::PublishedAddresses;
use crate::tasks::records::{RecordStore, read_all};
use crate::tasks::{LedgerUnusable, OwnNode};
use crate::view::View;

/// Why an address is not released for an operator.
#[derive(Debug, thiserror::Error)]
enum ReleaseRefused {
    /// The reservation got another owner or holder during the request.
    #[error("the reservation of {0} has changed: see polderctl ipam show {0}, and try again")]
    Changed(IpAddr),
    /// The datastore did not delete the reservation.
    /// Remedy: correct the error of the datastore, and repeat the command.
    #[error("cannot delete the reservation of {address}: {error}")]
    Store {
        /// The address.
        address: IpAddr,
        /// The error.
        #[source]
        error: StoreError,
    },
    /// Others changed the reservation in each attempt.
    /// Remedy: repeat the command.
    #[error("cannot delete the reservation of {0}: it keeps changing")]
    Contended(IpAddr),
    /// The pod that holds the reserved address has an interface on this node.
    #[error(
        "{address} is held by {attachment} on node {node}, and its interface exists: delete that pod first"
    )]
    HasInterface {
        /// The address.
        address: IpAddr,
        /// The attachment that holds it.
        attachment: Attachment,
        /// The node of the attachment.
        node: NodeName,
    },
    /// The node that holds the reserved address is alive and publishes the address as used.
    #[error(
        "{address} is held by {attachment} on node {node}, and that node is alive and reports it: delete that \
         pod first"
    )]
    Reported {
        /// The address.
        address: IpAddr,
        /// The attachment that holds it.
        attachment: Attachment,
        /// The node of the attachment.
        node: NodeName,
    },
    /// The pod that holds the reserved address may still run, and the operator has not confirmed that it is gone.
    #[error(
        "{address} is held by {attachment} on node {node}: delete that pod; if you know that it and its node \
         are permanently gone, add --dead"
    )]
    Held {
        /// The address.
        address: IpAddr,
        /// The attachment that holds it.
        attachment: Attachment,
        /// The node of the attachment.
        node: NodeName,
    },
    /// The kernel did not list the interfaces of this node.
    /// Remedy: check the error of the kernel in the text, and repeat the command.
    #[error(transparent)]
    Interface(HostError),
    /// The attachment of the address cannot be checked or released.
    #[error(transparent)]
    Attachment(#[from] NotReleased),
    /// A running pod of this node uses the address.
    #[error("{address} is used by {attachment}, which is running: delete the pod")]
    Running {
        /// The address.
        address: IpAddr,
        /// The attachment that uses it.
        attachment: Attachment,
    },
    /// The attachment of the address is locked by another request.
    #[error("another ADD or DEL of {0} is running: try again")]
    Busy(Attachment),
    /// The pods of this node use the address as their gateway.
    #[error("{0} is the gateway address of this node's pods: drain its pool instead")]
    Gateway(IpAddr),
    /// This node tests the paths to its peers with the address.
    #[error("{0} is used by this node's probe endpoint: set probe_peers = false to remove it")]
    Probe(IpAddr),
    /// The address belongs to another node, whose ledger is needed.
    #[error("{address} is in block {block} of node {node}: run this on that node")]
    OtherNode {
        /// The address.
        address: IpAddr,
        /// Its block.
        block: Block,
        /// The owner of the block.
        node: NodeName,
    },
    /// Neither a reservation nor a block of this node has the address.
    /// Remedy: none needed; check the address with polderctl ipam show.
    #[error("{0} is neither reserved nor in a block of this node: there is nothing to release")]
    Unknown(IpAddr),
}

impl Refuse for ReleaseRefused {
    fn kind(&self) -> RefusalKind {
        match self {
            Self::Store { error, .. } => error.kind(),
            Self::Changed(_)
            | Self::Contended(_)
            | Self::Interface(_)
            | Self::Attachment(_)
            | Self::Busy(_) => RefusalKind::TryAgain,
            Self::HasInterface { .. }
            | Self::Reported { .. }
            | Self::Held { .. }
            | Self::Running { .. }
            | Self::Gateway(_)
            | Self::Probe(_)
            | Self::OtherNode { .. } => RefusalKind::Invalid,
            Self::Unknown(_) => RefusalKind::Missing,
        }
    }
}

/// Releases the address, and returns a message with the result.
pub async fn release<H: OperatorHost>(
    host: &H,
    me: &OwnNode,
    records: &impl RecordStore,
    release: Release,
) -> Result<String, Refusal> {
    let Release { address, dead } = release;
    // Whether an earlier attempt may have deleted the reservation, and whether a further attempt would fail, too.
    let (mut may_be_deleted, mut is_last) = (false, false);
    let mut failure = None;
    // The reservation in the first view: the one that the operator requests to release.
    let mut first: Option<ReservationRecord> = None;
    for _ in 0..ATTEMPTS {
        let view = read_all(records).await?;
        let found = view.reservations.get(&address);
        let is_unchanged = found
            .is_some_and(|found| first.as_ref().is_none_or(|first| is_the_same(first, &found.record, dead)));
        let Some(known) = found.filter(|_| is_unchanged) else {
            // Without the record, or with one of another owner, the earlier attempt has succeeded.
            let is_deleted =
                found.is_none_or(|found| first.is_some_and(|first| first.owner != found.record.owner));
            if may_be_deleted && is_deleted {
                return Ok(format!("the reservation of {address} is deleted"));
            }
            if found.is_some() {
                return Err(ReleaseRefused::Changed(address).into());
            }
            return release_block_address(host, me, &view, address).await;
        };
        if is_last {
            break;
        }
        first.get_or_insert_with(|| (*known.record).clone());
        if let Some(holder) = &known.record.holder {
            check_gone(host, me, records, &view, address, holder, dead).await?;
        }
        match records.commit(&reservation::delete(address, known)).await {
            Ok(Outcome::Applied { .. }) => {
                let owner = &known.record.owner;
                info!(%address, owner, "reservation deleted");
                return Ok(format!("the reservation of {address} for {owner} is deleted"));
            }
            Ok(Outcome::Refused) => failure = None,
            Err(error) => {
                let needs_reread = error.needs_reread();
                may_be_deleted |= needs_reread;
                is_last = !error.is_unknown();
                failure = Some(error);
                if !needs_reread {
                    break;
                }
            }
        }
    }
    Err(match failure {
        Some(error) => ReleaseRefused::Store { address, error }.into(),
        None => ReleaseRefused::Contended(address).into(),
    })
}

/// Whether the reservation is still the one of the first view: same owner and, with `dead`, no other holder.
fn is_the_same(first: &ReservationRecord, now: &ReservationRecord, dead: bool) -> bool {
    first.owner == now.owner && (!dead || now.holder.is_none() || now.holder == first.holder)
}

/// Checks that the pod that holds a reserved address is gone, as far as this can be detected, or else that an operator
/// has confirmed it (`dead`).
async fn check_gone<H: OperatorHost>(
    host: &H,
    me: &OwnNode,
    records: &impl RecordStore,
    view: &View,
    address: IpAddr,
    holder: &Holder,
    dead: bool,
) -> Result<(), Refusal> {
    let Holder { node, incarnation, boot_id, attachment } = holder;
    let attachment_and_node = || (attachment.clone(), node.clone());
    // An existing interface overrides the operator's confirmation.
    if *node == me.name && host.has_interface(attachment).await.map_err(ReleaseRefused::Interface)? {
        let (attachment, node) = attachment_and_node();
        return Err(ReleaseRefused::HasInterface { address, attachment, node }.into());
    }
    let registered = view.nodes.get(node).filter(|known| known.record.incarnation == *incarnation);
    if registered.is_some_and(|known| known.record.boot_id == *boot_id) {
        let lease = Range::single(Key::Lease(node.clone()).to_string());
        let alive = !records.range(&lease).await?.entries.is_empty();
        let published = PublishedAddresses::read_range(records, &Key::addresses_of(node)).await?;
        if alive && published.all().any(|known| known == address) {
            let (attachment, node) = attachment_and_node();
            return Err(ReleaseRefused::Reported { address, attachment, node }.into());
        }
    }
    if dead {
        return Ok(());
    }
    let (attachment, node) = attachment_and_node();
    Err(ReleaseRefused::Held { address, attachment, node }.into())
}

/// Releases an address of one of this node's blocks, unless its pod is running.
async fn release_block_address<H: OperatorHost>(
    host: &H,
    me: &OwnNode,
    view: &View,
    address: IpAddr,
) -> Result<String, Refusal> {
    let condition = host.ledger(move |ipam, now| ipam.condition(address, now)).await;
    match condition.map_err(LedgerUnusable)? {
        Some(AddressCondition::Held(held)) => {
            let attachment = held.attachment;
            let swept = orphan_collector::sweep(host, &attachment, "requested by an operator").await;
            match swept.map_err(ReleaseRefused::from)? {
                SweepResult::Released => Ok(format!("{attachment} is released: {address} is in cool-down")),
                SweepResult::Alive => Err(ReleaseRefused::Running { address, attachment }.into()),
                SweepResult::Busy => Err(ReleaseRefused::Busy(attachment).into()),
            }
        }
        Some(AddressCondition::Gateway) => Err(ReleaseRefused::Gateway(address).into()),
        Some(AddressCondition::Probe) => Err(ReleaseRefused::Probe(address).into()),
        Some(AddressCondition::Freed(_) | AddressCondition::Unused | AddressCondition::Excluded) => {
            Ok(format!("{address} is not in use: there is nothing to release"))
        }
        None => {
            let claim = view.blocks.iter().find(|(block, _)| block.cidr().has(address));
            match claim.map(|(block, claim)| (*block, &claim.record.node)) {
                Some((block, node)) if *node != me.name => {
                    Err(ReleaseRefused::OtherNode { address, block, node: node.clone() }.into())
                }
                _ => Err(ReleaseRefused::Unknown(address).into()),
            }
        }
    }
}
