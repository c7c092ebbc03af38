//! The registrar's task ([`polder_ipam::tasks`]) on a node: what it looks at, what it asks of the rest of the agent, and who
//! wakes it.

use std::sync::Arc;
use std::time::Duration;

use polder_api::Attachment;
use polder_api::message::{Refusal, RefusalKind};
use polder_ipam::Moment;
use polder_ipam::key::Range;
use polder_ipam::record::Alive;
use polder_ipam::registration::{Holdings, Registration};
use polder_ipam::reservation::Denied;
use polder_ipam::steward::Presence;
use polder_ipam::store::{Contents, Outcome, StoreError, Txn};
use polder_ipam::tasks::{Host, Me, Registrar, Unreserved};
use polder_ipam::view::View;
use polder_store::NodeIpam;
use polder_store::ledger::Sqlite;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{sleep, timeout};
use tracing::{info, warn};

use crate::agent::Agent;
use crate::board::set_if_changed;
use crate::kernel::Kernel;
use crate::kernel::desired::{pod_mtu, vtep_mac};
use crate::machine::{now, random_name};
use crate::requests::{ClaimRequest, ReserveRequest};
use crate::teardown;

/// Between looks while something is waited for that no record announces.
const RETRY: Duration = Duration::from_secs(5);

/// How long the own view of the records may be behind what was just written.
const CATCH_UP: Duration = Duration::from_secs(5);

/// Runs for ever.
pub async fn run(
    agent: Arc<Agent>,
    mut claims: mpsc::Receiver<ClaimRequest>,
    mut reservations: mpsc::Receiver<ReserveRequest>,
) {
    let mut view = agent.board.view.subscribe();
    let mut underlay = agent.board.underlay.subscribe();
    let me = Me {
        name: agent.config.node.clone(),
        machine_id: agent.machine.machine_id.clone(),
        boot_id: agent.machine.boot_id.clone(),
        proof: agent.config.identity,
        labels: agent.config.labels.clone(),
        bootstrap: agent.config.bootstrap.clone(),
        cooldown: agent.config.cooldown,
    };
    let mut registrar = Registrar::new(Node(Arc::clone(&agent)), Arc::new(me));
    loop {
        view.mark_unchanged();
        underlay.mark_unchanged();
        registrar.look().await;
        // Cancel-safe, all of them: what is not taken is seen the next time.
        tokio::select! {
            _ = view.changed() => {}
            _ = underlay.changed() => {}
            () = agent.holdings_changed.notified() => {}
            request = claims.recv() => {
                let Some(request) = request else { return };
                claim(&registrar, request).await;
                while let Ok(request) = claims.try_recv() {
                    claim(&registrar, request).await;
                }
            }
            request = reservations.recv() => {
                let Some(request) = request else { return };
                reserve(&registrar, request).await;
            }
            () = sleep(RETRY) => {}
        }
    }
}

async fn claim(registrar: &Registrar<Node>, request: ClaimRequest) {
    let ClaimRequest { wanted, reply } = request;
    if reply.as_ref().is_some_and(oneshot::Sender::is_closed) {
        // Whoever waited has given up, and been told that he gets nothing.
        return;
    }
    match (registrar.serve(wanted, reply.is_some()).await, reply) {
        (result, Some(reply)) => drop(reply.send(result)),
        (Err(error), None) => warn!("few addresses are left: {error}"),
        (Ok(()), None) => {}
    }
}

async fn reserve(registrar: &Registrar<Node>, request: ReserveRequest) {
    let ReserveRequest { wanted, owner, attachment, reply } = request;
    let result = registrar.hand_over(&wanted, &owner, &attachment).await.map_err(|why| refusal(&why));
    if let Err(refusal) = &result {
        info!(%attachment, owner, "no reserved address: {refusal}");
    }
    drop(reply.send(result));
}

fn refusal(why: &Unreserved) -> Refusal {
    let kind = match why {
        Unreserved::Denied(Denied::Exhausted { .. }) => RefusalKind::PoolExhausted,
        Unreserved::TryAgain(_) | Unreserved::Denied(Denied::Unregistered { .. }) => RefusalKind::TryAgain,
        Unreserved::Denied(Denied::Foreign { .. } | Denied::Held { .. } | Denied::Unfit { .. }) => {
            RefusalKind::AddressTaken
        }
    };
    Refusal::new(kind, why.to_string())
}

/// What the agent is to its tasks.
#[derive(Debug)]
struct Node(Arc<Agent>);

impl Host for Node {
    type Ledger = Sqlite;

    fn now(&self) -> Moment {
        now()
    }

    fn fresh_name(&self) -> Result<String, String> {
        random_name().map_err(|error| error.to_string())
    }

    fn view(&self) -> Arc<View> {
        self.0.board.view()
    }

    async fn changed(&self, view: &Arc<View>, patience: Duration) {
        let mut views = self.0.board.view.subscribe();
        let _ = timeout(patience, views.wait_for(|now| !Arc::ptr_eq(now, view))).await;
    }

    async fn caught_up(&self, revision: i64) -> Result<(), StoreError> {
        let mut views = self.0.board.view.subscribe();
        match timeout(CATCH_UP, views.wait_for(|view| view.revision >= revision)).await {
            Ok(Ok(_)) => Ok(()),
            _ => Err(StoreError::NoAnswer {
                store: self.0.store.name(),
                reason: format!("what was written is not seen within {} s", CATCH_UP.as_secs()),
            }),
        }
    }

    async fn commit(&self, txn: &Txn) -> Result<Outcome, StoreError> {
        self.0.store.commit(txn).await
    }

    async fn range(&self, range: &Range) -> Result<Contents, StoreError> {
        self.0.store.range(range).await
    }

    async fn ledger<T: Send + 'static>(
        &self,
        job: impl FnOnce(&mut NodeIpam, Moment) -> T + Send + 'static,
    ) -> T {
        self.0.ipam.run(|ipam| job(ipam, now())).await
    }

    fn presence(&self, view: &View) -> Result<Presence, String> {
        let config = &self.0.config;
        let underlay = self.0.board.underlay()?;
        let Some(cluster) = &view.cluster else { return Err("the cluster has no settings yet".to_owned()) };
        if view.own != underlay.addresses() {
            return Err("the node's own addresses have just changed".to_owned());
        }
        Ok(Presence {
            underlay: underlay.addresses(),
            vtep_mac: vtep_mac(&cluster.record, &config.node),
            mtu: pod_mtu(&underlay, cluster.record.backend, config.mtu).ok_or("the underlay has no MTU")?,
            version: env!("CARGO_PKG_VERSION").to_owned(),
        })
    }

    fn surroundings(&self, view: &View) -> Result<(), String> {
        let underlay = self.0.board.underlay()?;
        if view.own != underlay.addresses() || view.needed != underlay.needed {
            return Err("this node's own addresses are being read".to_owned());
        }
        Ok(())
    }

    fn adopted(&self) -> Option<Alive> {
        self.0.board.adopted.borrow().clone()
    }

    fn registration(&self) -> Registration {
        self.0.board.registration.borrow().clone()
    }

    fn register(&self, registration: Registration) {
        self.0.board.registration.send_replace(registration);
    }

    fn announce(&self, holdings: Holdings) {
        set_if_changed(&self.0.board.holdings, Arc::new(holdings));
    }

    async fn detach(&self, attachment: &Attachment) -> Result<(), String> {
        teardown::del(&self.0, attachment).await.map(drop).map_err(|refusal| refusal.message)
    }

    async fn remove_gateways(&self) -> Result<(), String> {
        self.0.kernel.run(Kernel::remove_gateways).await.map_err(|error| error.to_string())
    }
}
