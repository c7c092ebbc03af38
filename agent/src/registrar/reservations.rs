//! Hands reserved addresses over to pods of this node.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use polder_api::Attachment;
use polder_api::message::{Refusal, RefusalKind};
use polder_ipam::key::{Key, Range};
use polder_ipam::ledger::Standing;
use polder_ipam::record::{Holder, encode};
use polder_ipam::reservation::{self, Denied, HandOver};
use polder_ipam::store::Outcome;
use polder_ipam::view::{Source, View};
use polder_store::NodeIpam;
use tokio::time::timeout;
use tracing::info;

use super::Registrar;
use crate::requests::{ReserveRequest, Workload};

/// Attempts at a record that changes at the same time.
const ATTEMPTS: usize = 10;

fn denied(denied: &Denied) -> Refusal {
    let kind = match denied {
        Denied::Exhausted { .. } => RefusalKind::PoolExhausted,
        Denied::Unregistered { .. } => RefusalKind::TryAgain,
        Denied::Foreign { .. } | Denied::Held { .. } | Denied::Unfit { .. } => RefusalKind::AddressTaken,
    };
    Refusal::new(kind, denied.to_string())
}

impl Registrar {
    /// Hands an address over, if it is free for the workload.
    pub(super) async fn reserve(&self, request: ReserveRequest) {
        let ReserveRequest { wanted, owner, attachment, reply } = request;
        let result = self.hand_over(&wanted, &owner, &attachment).await;
        if let Err(refusal) = &result {
            info!(%attachment, owner, "no reserved address: {refusal}");
        }
        drop(reply.send(result));
    }

    async fn hand_over(
        &self,
        wanted: &Workload,
        owner: &str,
        attachment: &Attachment,
    ) -> Result<IpAddr, Refusal> {
        let mut views = self.agent.board.view.subscribe();
        for _ in 0..ATTEMPTS {
            let view = std::sync::Arc::clone(&views.borrow_and_update());
            let prepared = self.prepare(&view, wanted, owner, attachment).await?;
            let address = prepared.address;
            // Before the transaction: the steward lets go of what nobody expects.
            let whose = attachment.clone();
            self.agent.ipam.run(move |ipam| ipam.expect(address, &whose)).await;
            let whose = attachment.clone();
            let give_up = move |ipam: &mut NodeIpam| ipam.give_up(address, &whose);
            match self.carry_over(&prepared).await {
                Ok(true) => {
                    info!(%address, owner, %attachment, generation = prepared.record.generation, "handed over");
                    return Ok(address);
                }
                Ok(false) => {
                    self.agent.ipam.run(give_up).await;
                    let _ = timeout(Duration::from_millis(500), views.changed()).await;
                }
                Err(refusal) => {
                    self.agent.ipam.run(give_up).await;
                    return Err(refusal);
                }
            }
        }
        Err(Refusal::try_again("the reservation changes all the time"))
    }

    async fn prepare(
        &self,
        view: &View,
        wanted: &Workload,
        owner: &str,
        attachment: &Attachment,
    ) -> Result<HandOver, Refusal> {
        if view.source != Source::Store || view.lost.is_some() {
            let reason = view.lost.clone().unwrap_or_else(|| "the store is away".to_owned());
            return Err(Refusal::try_again(format!("a reserved address needs the store: {reason}")));
        }
        if self.is_cautious() {
            return Err(Refusal::try_again(
                "the store has lost records, and their owners are putting them back",
            ));
        }
        let (identity, held) = self
            .agent
            .ipam
            .run(|ipam| {
                let held: BTreeSet<Attachment> =
                    ipam.attachments().map(|held| held.attachment.clone()).collect();
                (ipam.identity(), held)
            })
            .await;
        let identity = identity.map_err(Refusal::try_again)?;
        let identity = identity.filter(|identity| identity.standing == Standing::Member);
        let (Some(identity), Some(node)) = (identity, view.nodes.get(&self.agent.config.node)) else {
            return Err(Refusal::try_again("the node is not registered"));
        };
        let address = match wanted {
            Workload::Address(address) => *address,
            Workload::Pool(name) => {
                let pool =
                    view.pools.get(name).ok_or_else(|| Refusal::try_again(format!("pool {name} is gone")))?;
                reservation::choose(view, pool, owner).map_err(|error| denied(&error))?
            }
        };
        let holder = Holder {
            node: identity.node,
            incarnation: identity.incarnation,
            boot_id: self.agent.machine.boot_id.clone(),
            attachment: attachment.clone(),
        };
        // What is not in the ledger has no interface: that goes first.
        let is_gone = |last: &Holder| last.attachment == *attachment || !held.contains(&last.attachment);
        reservation::hand_over(view, address, owner, &holder, node.revision, &is_gone)
            .map_err(|error| denied(&error))
    }

    /// Carries out a hand-over; true if it has taken place. An outcome that is not known is looked up.
    async fn carry_over(&self, prepared: &HandOver) -> Result<bool, Refusal> {
        match self.agent.store.commit(&prepared.txn).await {
            Ok(Outcome::Applied { .. }) => Ok(true),
            Ok(Outcome::Refused) => Ok(false),
            Err(error) if !error.needs_look() => Err(Refusal::try_again(&error)),
            Err(error) => {
                let range = Range::single(Key::Reservation(prepared.address).to_string());
                let found = self.agent.store.range(&range).await.map_err(|_| Refusal::try_again(&error))?;
                let made = found.entries.first().is_some_and(|entry| entry.value == encode(&prepared.record));
                // Not yet, perhaps: should it still come to pass, it is let go when it is seen.
                if made { Ok(true) } else { Err(Refusal::try_again(&error)) }
            }
        }
    }
}
