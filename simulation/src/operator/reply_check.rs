//! The replies to operators, and whether they are correct.

use polder_api::message::{Refusal, RefusalKind};
use polder_api::pool::PoolChange;
use polder_ipam::Pool;
use polder_ipam::Revision;
use polder_ipam::invariants::{Deviation, Invariant};
use polder_ipam::pool::PoolState;

use super::OperatorRequest;
use crate::world::World;

const ADDED: &str = "reply: pool added";
const DRAINED: &str = "reply: pool drained";
const REMOVED: &str = "reply: drained pool removed";
const IN_USE: &str = "reply: pool in use not removed";
const BACKEND: &str = "reply: backend changed";
const RESERVATION_RELEASED: &str = "reply: reservation released";
const RELEASED: &str = "reply: address of a deleted pod released";
const NOT_RELEASED: &str = "reply: address in use not released";
const NODE_REMOVED: &str = "reply: node removed";
const UNKNOWN: &str = "reply: outcome unknown";

/// Counted outcomes of operator requests; each should occur in some run.
pub const OUTCOMES: [&str; 10] = [
    ADDED,
    DRAINED,
    REMOVED,
    IN_USE,
    BACKEND,
    RESERVATION_RELEASED,
    RELEASED,
    NOT_RELEASED,
    NODE_REMOVED,
    UNKNOWN,
];

/// The state when the operator sent the request.
#[derive(Debug)]
pub(super) struct RequestStart {
    revision: Revision,
    store_losses: u64,
    /// The pool to change, if it existed.
    pool: Option<Pool>,
}

impl RequestStart {
    pub(super) fn new(world: &World, request: &OperatorRequest) -> Self {
        let name = match request {
            OperatorRequest::Pools(PoolChange::Drain(name) | PoolChange::Remove(name)) => Some(name),
            _ => None,
        };
        let pool = name.and_then(|name| world.truth.pools.get(name)).map(|known| (*known.record).clone());
        Self { revision: world.etcd.revision(), store_losses: world.store_losses, pool }
    }
}

/// Counts the outcome of a request, and checks the reply against the records.
pub(super) fn check(
    world: &mut World,
    request: &OperatorRequest,
    started: &RequestStart,
    answer: &Result<String, Refusal>,
) {
    if let Some(outcome) = outcome(request, started, answer) {
        world.count(outcome);
    }
    let Ok(text) = answer else { return };
    if world.store_losses == started.store_losses && !matches_records(world, request, started.revision, text)
    {
        world.found.push(Deviation {
            invariant: Invariant::Durable,
            what: format!("the reply to request {request:?} does not match the records: {text}"),
            remedy: "report it".to_owned(),
            node: None,
            repair: None,
        });
    }
}

fn outcome(
    request: &OperatorRequest,
    started: &RequestStart,
    answer: &Result<String, Refusal>,
) -> Option<&'static str> {
    let pool_was = |state| started.pool.as_ref().is_some_and(|pool| pool.state == state);
    Some(match (request, answer) {
        (_, Err(refusal)) if refusal.message.contains("is unknown whether") => UNKNOWN,
        (OperatorRequest::Pools(PoolChange::Add(_)), Ok(text)) if text.contains("is added") => ADDED,
        (OperatorRequest::Pools(PoolChange::Drain(_)), Ok(_)) if pool_was(PoolState::Active) => DRAINED,
        (OperatorRequest::Pools(PoolChange::Remove(_)), Ok(_)) if pool_was(PoolState::Draining) => REMOVED,
        (OperatorRequest::Pools(PoolChange::Remove(_)), Err(refusal))
            if refusal.message.contains("is in use") =>
        {
            IN_USE
        }
        (OperatorRequest::Backend(_), Ok(text)) if text.contains("(was ") => BACKEND,
        (OperatorRequest::Release(_), Ok(text)) if text.contains("is deleted") => RESERVATION_RELEASED,
        (OperatorRequest::Release(_), Ok(text)) if text.contains("is released") => RELEASED,
        (OperatorRequest::Release(_), Err(refusal)) if refusal.kind == RefusalKind::Invalid => NOT_RELEASED,
        (OperatorRequest::Remove(_), Ok(_)) => NODE_REMOVED,
        _ => return None,
    })
}

/// Whether the records match the reply. A record changed after `since` is accepted: another request may have changed
/// it back.
fn matches_records(world: &World, request: &OperatorRequest, since: Revision, text: &str) -> bool {
    let truth = &world.truth;
    let is_new = |revision: Revision| revision > since;
    let pool = |name| truth.pools.get(name);
    match request {
        OperatorRequest::Pools(PoolChange::Add(new)) => pool(&new.name)
            .is_none_or(|known| known.record.state == PoolState::Active || is_new(known.revision)),
        OperatorRequest::Pools(PoolChange::Drain(name)) => {
            pool(name).is_none_or(|known| known.record.state != PoolState::Active || is_new(known.revision))
        }
        OperatorRequest::Pools(PoolChange::Remove(name)) => {
            pool(name).is_none_or(|known| is_new(known.revision))
        }
        OperatorRequest::Backend(backend) => {
            let settings = truth.cluster.as_ref();
            settings.is_some_and(|known| known.record.backend == *backend || is_new(known.revision))
        }
        OperatorRequest::Release(release) => {
            let reservation = truth.reservations.get(&release.address);
            !text.contains("is deleted") || reservation.is_none_or(|known| is_new(known.revision))
        }
        OperatorRequest::Remove(removal) => {
            truth.nodes.get(&removal.node).is_none_or(|known| is_new(known.revision))
        }
    }
}
