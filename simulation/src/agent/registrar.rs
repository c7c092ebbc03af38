//! The task of the registrar ([`polder_ipam::tasks::Registrar`]) on a simulated node, and the events that wake it.

use std::sync::Arc;

use polder_ipam::pool::{PoolState, Purpose};
use polder_ipam::tasks::Registrar;
use polder_ipam::view::View;

use super::SimHost;
use crate::requests::{ClaimRequest, ReserveRequest};
use crate::task::Wait;
use crate::world::ClosedPool;

/// Retry interval in milliseconds, for conditions that no record announces.
const RETRY_MS: u64 = 5_000;

/// Runs as long as the agent.
pub async fn run(host: SimHost) {
    let me = host.own_node();
    let mut registrar = Registrar::new(&host, &me);
    loop {
        let view = host.agent(|agent| {
            agent.must_check_records = false;
            agent.closed.clear();
            Arc::clone(&agent.view)
        });
        registrar.run_once().await;
        host.agent(|agent| {
            if agent.last_step == "Settled" {
                agent.closed = closed(&view);
            }
        });
        host.wait(Wait::News(host.clock() + RETRY_MS)).await;
        while let Some(ClaimRequest { wanted, reply }) = host.agent(|agent| agent.claims.pop_front()) {
            let served = registrar.serve(wanted, reply.is_some()).await;
            if let Some(reply) = reply {
                reply.send(served);
            }
        }
        let request = host.agent(|agent| agent.reservations.pop_front());
        if let Some(ReserveRequest { wanted, owner, attachment, reply }) = request {
            let answer = |came| reply.send(came);
            registrar.serve_reservation(&wanted, &owner, &attachment, answer).await;
            host.agent(|agent| agent.must_check_records = true);
        }
    }
}

/// The pools for blocks that are not active: no new allocation uses them.
fn closed(view: &View) -> Vec<ClosedPool> {
    let pools = view
        .pools
        .values()
        .filter(|known| known.record.state != PoolState::Active && known.record.purpose == Purpose::Blocks);
    let closed = pools.map(|known| ClosedPool {
        name: known.record.name.clone(),
        revision: known.revision,
        cidr: known.record.cidr(),
    });
    closed.collect()
}
