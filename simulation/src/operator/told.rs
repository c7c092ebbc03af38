//! The replies to operators, and whether they are correct.

use polder_api::message::{Refusal, RefusalKind};
use polder_api::pool::PoolChange;
use polder_ipam::Pool;
use polder_ipam::Revision;
use polder_ipam::invariants::{Deviation, Invariant};
use polder_ipam::pool::PoolState;

use super::OperatorRequest;
use crate::world::World;

const ADDED: &str = "told that a pool is added";
const DRAINED: &str = "told that a pool is drained";
const REMOVED: &str = "told that a drained pool is removed";
const IN_USE: &str = "told that a pool in use is not removed";
const BACKEND: &str = "told that the backend is changed";
const GIVEN_UP: &str = "told that a reservation is given up";
const RELEASED: &str = "told that a pod that is gone is released";
const LIVES: &str = "told that an address that lives is not released";
const GONE: &str = "told that a node is removed";
const UNKNOWN: &str = "told that it is not known whether it was done";

/// Counted outcomes of operator requests; each should occur in some run.
pub const OUTCOMES: [&str; 10] =
    [ADDED, DRAINED, REMOVED, IN_USE, BACKEND, GIVEN_UP, RELEASED, LIVES, GONE, UNKNOWN];

/// The state when the operator sent the request.
#[derive(Debug)]
pub(super) struct Begun {
    revision: Revision,
    set_backs: u64,
    /// The pool to change, if it existed.
    pool: Option<Pool>,
}

impl Begun {
    pub(super) fn new(world: &World, wish: &OperatorRequest) -> Self {
        let name = match wish {
            OperatorRequest::Pools(PoolChange::Drain(name) | PoolChange::Remove(name)) => Some(name),
            _ => None,
        };
        let pool = name.and_then(|name| world.truth.pools.get(name)).map(|known| (*known.record).clone());
        Self { revision: world.etcd.revision(), set_backs: world.set_backs, pool }
    }
}

/// Counts the outcome of a request, and checks the reply against the records.
pub(super) fn check(
    world: &mut World,
    wish: &OperatorRequest,
    begun: &Begun,
    answer: &Result<String, Refusal>,
) {
    if let Some(outcome) = outcome(wish, begun, answer) {
        world.count(outcome);
    }
    let Ok(told) = answer else { return };
    if world.set_backs == begun.set_backs && !is_so(world, wish, begun.revision, told) {
        world.found.push(Deviation {
            invariant: Invariant::Durable,
            what: format!("an operator who asks for {wish:?} is told: {told}; and it is not so"),
            remedy: "report it".to_owned(),
            node: None,
            repair: None,
        });
    }
}

fn outcome(wish: &OperatorRequest, begun: &Begun, answer: &Result<String, Refusal>) -> Option<&'static str> {
    let pool_was = |state| begun.pool.as_ref().is_some_and(|pool| pool.state == state);
    Some(match (wish, answer) {
        (_, Err(refusal)) if refusal.message.contains("is unknown whether") => UNKNOWN,
        (OperatorRequest::Pools(PoolChange::Add(_)), Ok(told)) if told.contains("is added") => ADDED,
        (OperatorRequest::Pools(PoolChange::Drain(_)), Ok(_)) if pool_was(PoolState::Active) => DRAINED,
        (OperatorRequest::Pools(PoolChange::Remove(_)), Ok(_)) if pool_was(PoolState::Draining) => REMOVED,
        (OperatorRequest::Pools(PoolChange::Remove(_)), Err(refusal))
            if refusal.message.contains("is in use") =>
        {
            IN_USE
        }
        (OperatorRequest::Backend(_), Ok(told)) if told.contains("(was ") => BACKEND,
        (OperatorRequest::Release(_), Ok(told)) if told.contains("is deleted") => GIVEN_UP,
        (OperatorRequest::Release(_), Ok(told)) if told.contains("is released") => RELEASED,
        (OperatorRequest::Release(_), Err(refusal)) if refusal.kind == RefusalKind::Invalid => LIVES,
        (OperatorRequest::Remove(_), Ok(_)) => GONE,
        _ => return None,
    })
}

/// Whether the records match the reply. A record changed after `since` is accepted: another request may have changed
/// it back.
fn is_so(world: &World, wish: &OperatorRequest, since: Revision, told: &str) -> bool {
    let truth = &world.truth;
    let is_new = |revision: Revision| revision > since;
    let pool = |name| truth.pools.get(name);
    match wish {
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
            !told.contains("is deleted") || reservation.is_none_or(|known| is_new(known.revision))
        }
        OperatorRequest::Remove(removal) => {
            truth.nodes.get(&removal.node).is_none_or(|known| is_new(known.revision))
        }
    }
}
