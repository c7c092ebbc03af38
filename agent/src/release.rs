//! Gives an address up, for an operator. Never one that lives.

use std::net::IpAddr;

use polder_api::ipam::Release;
use polder_api::message::{Refusal, RefusalKind};
use polder_ipam::key::{Key, Range};
use polder_ipam::node::Condition;
use polder_ipam::record::Holder;
use polder_ipam::reservation;
use polder_ipam::store::{Outcome, StoreError};
use polder_ipam::tasks::ledger_failed;
use polder_ipam::tasks::sweeper::{self, Swept};
use polder_ipam::view::View;
use polder_store::Store;
use tracing::info;

use crate::kernel::Kernel;
use crate::machine::now;
use crate::node::Node;
use crate::pools;
use crate::published::Addresses;
use crate::refused;

/// Attempts at a record that changes meanwhile, or whose change has an unknown outcome.
const ATTEMPTS: usize = 8;

fn refuse<T>(problem: impl Into<String>) -> Result<T, Refusal> {
    Err(Refusal::new(RefusalKind::Invalid, problem))
}

fn store_failed(error: StoreError) -> Refusal {
    refused::answer(&error, error.to_string())
}

/// Gives the address up. Says what has come of it.
pub async fn release(own: &Node, store: &Store, release: Release) -> Result<String, Refusal> {
    let (mut tried, mut is_refused) = (false, false);
    let mut failure = None;
    for _ in 0..ATTEMPTS {
        let address = release.address;
        let view = pools::read(store).await.map_err(store_failed)?;
        let Some(known) = view.reservations.get(&address) else {
            if tried {
                return Ok(format!("the reservation of {address} is given up"));
            }
            return of_a_block(own, &view, address).await;
        };
        if is_refused {
            break;
        }
        if let Some(holder) = &known.record.holder {
            check_gone(own, store, &view, address, holder, release.dead).await?;
        }
        match store.commit(&reservation::give_up(address, known)).await {
            Ok(Outcome::Applied { .. }) => {
                let owner = &known.record.owner;
                info!(%address, owner, "the reservation is given up");
                return Ok(format!("the reservation of {address} for {owner} is given up"));
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
    let problem = format!("the reservation of {} cannot be given up", release.address);
    Err(match failure {
        Some(error) => refused::answer(&error, format!("{problem}: {error}")),
        None => Refusal::try_again(format!("{problem}: others change it all the time")),
    })
}

/// Whether the pod that holds a reserved address is gone, as far as anybody can know, or an operator says so.
async fn check_gone(
    own: &Node,
    store: &Store,
    view: &View,
    address: IpAddr,
    holder: &Holder,
    dead: bool,
) -> Result<(), Refusal> {
    let Holder { node, incarnation, boot_id, attachment } = holder;
    let lives = |how: &str| {
        refuse(format!("{address} is held by {attachment} on node {node}, and {how}: delete that pod first"))
    };
    // No word is as good as what can be seen.
    if *node == own.config.node {
        let interfaces = own.pods.kernel.run(Kernel::pod_interfaces).await.map_err(Refusal::try_again)?;
        if interfaces.contains(&attachment.host_interface()) {
            return lives("its interface is there");
        }
    }
    let registered = view.nodes.get(node).filter(|known| known.record.incarnation == *incarnation);
    if registered.is_some_and(|known| known.record.boot_id == *boot_id) {
        let alive = Range::single(Key::Alive(node.clone()).to_string());
        let alive = !store.range(&alive).await.map_err(store_failed)?.entries.is_empty();
        let published = Addresses::read_range(store, &Key::addresses_of(node)).await.map_err(store_failed)?;
        if alive && published.all().any(|known| known == address) {
            return lives("that node is alive and says so");
        }
    }
    if dead {
        return Ok(());
    }
    refuse(format!(
        "{address} is held by {attachment} on node {node}: delete that pod; if it and its node are gone for good and you \
         know that, say --dead"
    ))
}

/// Releases an address of one of this node's blocks, if nothing lives that has it.
async fn of_a_block(own: &Node, view: &View, address: IpAddr) -> Result<String, Refusal> {
    let condition = own.ipam.run(move |ipam| ipam.condition(address, now())).await;
    match condition.map_err(|error| ledger_failed(&error))? {
        Some(Condition::Held(held)) => {
            let attachment = &held.attachment;
            match sweeper::sweep(own, attachment, "an operator asks for it")
                .await
                .map_err(Refusal::try_again)?
            {
                Swept::Released => Ok(format!("{attachment} is released: {address} rests")),
                Swept::Alive => {
                    refuse(format!("{address} is that of {attachment}, which lives: delete the pod"))
                }
                Swept::Busy => Err(Refusal::try_again(format!("{attachment} is being worked on: try again"))),
            }
        }
        Some(Condition::Gateway) => {
            refuse(format!("{address} is this node's own, the gateway of its pods: drain its pool instead"))
        }
        Some(Condition::Probe) => refuse(format!(
            "{address} is that of this node's probe endpoint: probe_peers = false does without one"
        )),
        Some(Condition::Freed(_) | Condition::Unused | Condition::Excluded) => {
            Ok(format!("nobody has {address}: there is nothing to release"))
        }
        None => {
            let claim = view.blocks.iter().find(|(block, _)| block.cidr().has(address));
            match claim.map(|(block, claim)| (block, &claim.record.node)) {
                Some((block, node)) if *node != own.config.node => {
                    refuse(format!("{address} is of block {block} of node {node}: ask there"))
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
