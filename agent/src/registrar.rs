//! The registrar's task ([`polder_ipam::tasks::Registrar`]) on a node: who wakes it.

use std::sync::Arc;
use std::time::Duration;

use polder_ipam::tasks::Registrar;
use tokio::sync::{mpsc, oneshot};
use tokio::time::sleep;
use tracing::{info, warn};

use crate::agent::Agent;
use crate::requests::{ClaimRequest, ReserveRequest};

/// Between looks while something is waited for that no record announces.
const RETRY: Duration = Duration::from_secs(5);

/// Runs for ever.
pub async fn run(
    agent: Arc<Agent>,
    mut claims: mpsc::Receiver<ClaimRequest>,
    mut reservations: mpsc::Receiver<ReserveRequest>,
) {
    let mut view = agent.board.view.subscribe();
    let mut underlay = agent.board.underlay.subscribe();
    let mut registrar = Registrar::new(&*agent, &agent.me);
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

async fn claim(registrar: &Registrar<'_, Agent>, request: ClaimRequest) {
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

async fn reserve(registrar: &Registrar<'_, Agent>, request: ReserveRequest) {
    let ReserveRequest { wanted, owner, attachment, reply } = request;
    let result = registrar.hand_over(&wanted, &owner, &attachment).await;
    if let Err(why) = &result {
        info!(%attachment, owner, "no reserved address: {why}");
    }
    drop(reply.send(result));
}
