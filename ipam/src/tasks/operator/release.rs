//! Releases an address for an operator, unless a running pod uses it.

use std::net::IpAddr;

use polder_api::ipam::Release;
use polder_api::message::{Refusal, RefusalKind};
use tracing::info;

use super::{ATTEMPTS, OperatorHost, invalid, store_failed};
use crate::key::{Key, Range};
use crate::node::Condition;
use crate::record::{Holder, ReservationRecord};
use crate::reservation;
use crate::store::{Outcome, StoreError};
use crate::tasks::orphan_collector::{self, Swept};
use crate::tasks::published::PublishedAddresses;
use crate::tasks::records::{Records, read_all};
use crate::tasks::{Me, ledger_failed};
use crate::view::View;

fn refuse<T>(problem: impl ToString) -> Result<T, Refusal> {
    Err(invalid(problem))
}

fn failed(error: StoreError) -> Refusal {
    store_failed(&error, error.to_string())
}

/// Releases the address, and returns a message with the result.
pub async fn release<H: OperatorHost>(
    host: &H,
    me: &Me,
    records: &impl Records,
    release: Release,
) -> Result<String, Refusal> {
    let Release { address, dead } = release;
    let (mut tried, mut is_refused) = (false, false);
    let mut failure = None;
    let mut meant: Option<ReservationRecord> = None;
    for _ in 0..ATTEMPTS {
        let view = read_all(records).await.map_err(failed)?;
        let found = view.reservations.get(&address);
        let is_meant = found
            .is_some_and(|found| meant.as_ref().is_none_or(|meant| is_the_same(meant, &found.record, dead)));
        let Some(known) = found.filter(|_| is_meant) else {
            if tried && found.is_none_or(|found| meant.is_some_and(|meant| meant.owner != found.record.owner))
            {
                return Ok(format!("the reservation of {address} is deleted"));
            }
            if found.is_some() {
                return Err(Refusal::try_again(format!(
                    "the reservation of {address} has changed: see polderctl ipam show {address}, and try \
                     again"
                )));
            }
            return of_a_block(host, me, &view, address).await;
        };
        if is_refused {
            break;
        }
        meant.get_or_insert_with(|| (*known.record).clone());
        if let Some(holder) = &known.record.holder {
            check_gone(host, me, records, &view, address, holder, dead).await?;
        }
        match records.commit(&reservation::give_up(address, known)).await {
            Ok(Outcome::Applied { .. }) => {
                let owner = &known.record.owner;
                info!(%address, owner, "reservation deleted");
                return Ok(format!("the reservation of {address} for {owner} is deleted"));
            }
            Ok(Outcome::Refused) => failure = None,
            Err(error) => {
                let needs_look = error.needs_look();
                tried |= needs_look;
                is_refused = !error.is_unknown();
                failure = Some(error);
                if !needs_look {
                    break;
                }
            }
        }
    }
    let problem = format!("cannot delete the reservation of {address}");
    Err(match failure {
        Some(error) => store_failed(&error, format!("{problem}: {error}")),
        None => Refusal::try_again(format!("{problem}: it keeps changing")),
    })
}

/// Whether the reservation is still the one that the operator meant: same owner and, with `dead`, no other holder.
fn is_the_same(meant: &ReservationRecord, now: &ReservationRecord, dead: bool) -> bool {
    meant.owner == now.owner && (!dead || now.holder.is_none() || now.holder == meant.holder)
}

/// Checks that the pod that holds a reserved address is gone, as far as this can be detected, or else that an operator
/// has confirmed it (`dead`).
async fn check_gone<H: OperatorHost>(
    host: &H,
    me: &Me,
    records: &impl Records,
    view: &View,
    address: IpAddr,
    holder: &Holder,
    dead: bool,
) -> Result<(), Refusal> {
    let Holder { node, incarnation, boot_id, attachment } = holder;
    let lives = |how: &str| {
        refuse(format!("{address} is held by {attachment} on node {node}, and {how}: delete that pod first"))
    };
    // An existing interface overrides the operator's confirmation.
    if *node == me.name && host.has_interface(attachment).await.map_err(Refusal::try_again)? {
        return lives("its interface exists");
    }
    let registered = view.nodes.get(node).filter(|known| known.record.incarnation == *incarnation);
    if registered.is_some_and(|known| known.record.boot_id == *boot_id) {
        let alive = Range::single(Key::Alive(node.clone()).to_string());
        let alive = !records.range(&alive).await.map_err(failed)?.entries.is_empty();
        let published =
            PublishedAddresses::read_range(records, &Key::addresses_of(node)).await.map_err(failed)?;
        if alive && published.all().any(|known| known == address) {
            return lives("that node is alive and reports it");
        }
    }
    if dead {
        return Ok(());
    }
    refuse(format!(
        "{address} is held by {attachment} on node {node}: delete that pod; if you know that it and its node \
         are gone for good, add --dead"
    ))
}

/// Releases an address of one of this node's blocks, unless its pod is running.
async fn of_a_block<H: OperatorHost>(
    host: &H,
    me: &Me,
    view: &View,
    address: IpAddr,
) -> Result<String, Refusal> {
    let condition = host.ledger(move |ipam, now| ipam.condition(address, now)).await;
    match condition.map_err(|error| ledger_failed(&error))? {
        Some(Condition::Held(held)) => {
            let attachment = &held.attachment;
            match orphan_collector::sweep(host, attachment, "requested by an operator")
                .await
                .map_err(Refusal::try_again)?
            {
                Swept::Released => Ok(format!("{attachment} is released: {address} is in cool-down")),
                Swept::Alive => {
                    refuse(format!("{address} is used by {attachment}, which is running: delete the pod"))
                }
                Swept::Busy => Err(Refusal::try_again(format!(
                    "another ADD or DEL of {attachment} is running: try again"
                ))),
            }
        }
        Some(Condition::Gateway) => {
            refuse(format!("{address} is the gateway address of this node's pods: drain its pool instead"))
        }
        Some(Condition::Probe) => refuse(format!(
            "{address} is used by this node's probe endpoint: set probe_peers = false to remove it"
        )),
        Some(Condition::Freed(_) | Condition::Unused | Condition::Excluded) => {
            Ok(format!("{address} is not in use: there is nothing to release"))
        }
        None => {
            let claim = view.blocks.iter().find(|(block, _)| block.cidr().has(address));
            match claim.map(|(block, claim)| (block, &claim.record.node)) {
                Some((block, node)) if *node != me.name => {
                    refuse(format!("{address} is in block {block} of node {node}: run this on that node"))
                }
                _ => Err(Refusal::new(
                    RefusalKind::Missing,
                    format!(
                        "{address} is neither reserved nor in a block of this node: there is nothing to release"
                    ),
                )),
            }
        }
    }
}
