//! The cluster's pools and settings, as an operator sees and changes them.

use std::collections::BTreeMap;

use polder_api::message::{Refusal, RefusalKind};
use polder_api::pool::{
    self as answer, BlockStanding, ClaimStatus, NewPool, PoolChange, PoolPurpose, PoolStatus,
};
use polder_api::{Backend, NodeName};
use polder_ipam::cidr::ParseCidrError;
use polder_ipam::key::Key;
use polder_ipam::peers::believe;
use polder_ipam::pool::{InvalidPool, PoolState, Purpose};
use polder_ipam::pools::{self, Decision, NotChanged};
use polder_ipam::shortage::Claimed;
use polder_ipam::store::{Outcome, StoreError, Update};
use polder_ipam::view::View;
use polder_ipam::{Cidr, Pool, settings, special};
use polder_store::Store;
use tracing::info;

use crate::board::Records;
use crate::published::Addresses;
use crate::refused;

/// How often a change is tried whose grounds others change meanwhile, or whose outcome is not known.
const ATTEMPTS: usize = 8;

/// Changes the pools, and says what has come of it.
pub async fn change(records: &Records, store: &Store, change: PoolChange) -> Result<String, Refusal> {
    let done = match change {
        PoolChange::Add(new) => {
            let pool = parse(new)?;
            let known = records.view();
            let done = apply(store, |view| {
                let mut view = view.clone();
                view.own.clone_from(&known.own);
                view.needed.clone_from(&known.needed);
                pools::add(&view, &pool)
            });
            with_warnings(done.await?, &special::doubts(pool.cidr()))
        }
        PoolChange::Drain(name) => apply(store, |view| pools::drain(view, &name)).await?,
        PoolChange::Remove(name) => apply(store, |view| pools::remove(view, &name)).await?,
    };
    info!("{done}");
    Ok(done)
}

/// Changes how the nodes reach each other's pods, and says what has come of it.
pub async fn change_backend(store: &Store, backend: Backend) -> Result<String, Refusal> {
    let done = apply(store, |view| settings::change_backend(view, backend)).await?;
    info!("{done}");
    Ok(done)
}

/// What was done, and what may be wrong with it.
fn with_warnings(done: String, warnings: &[String]) -> String {
    let warnings = warnings.iter().map(|warning| format!("\nwarning: {warning}"));
    done + &warnings.collect::<String>()
}

/// The pool that is asked for; or what is wrong with it, whatever else the cluster has.
pub fn parse(new: NewPool) -> Result<Pool, Refusal> {
    let invalid = |problem: String| Refusal::new(RefusalKind::Invalid, problem);
    let cidr: Cidr =
        new.cidr.to_string().parse().map_err(|error: ParseCidrError| invalid(error.to_string()))?;
    let purpose = match new.purpose {
        PoolPurpose::Blocks => Purpose::Blocks,
        PoolPurpose::Reservations => Purpose::Reservations,
    };
    let length = new.block_length.unwrap_or_else(|| purpose.usual_block_length(cidr));
    let mut pool = Pool::new(new.name, cidr, length, PoolState::Active)
        .map_err(|error| invalid(format!("{error} (--block-length)")))?;
    pool.purpose = purpose;
    pool.nodes = new.nodes;
    match pool.check_use() {
        Ok(()) => Ok(pool),
        Err(error @ InvalidPool::Special { .. }) => Err(invalid(error.to_string())),
        Err(error) => Err(invalid(format!("{error} (--block-length)"))),
    }
}

/// Carries a change out. Whatever becomes of an attempt, the next one begins with what is there: what it finds done
/// is done, and one that takes effect late finds its grounds changed. A refusal is the last attempt.
async fn apply(
    store: &Store,
    decide: impl Fn(&View) -> Result<Decision, NotChanged>,
) -> Result<String, Refusal> {
    let mut failure = None;
    let (mut said, mut refused) = (None, None);
    for _ in 0..ATTEMPTS {
        let view = match read(store).await {
            Ok(view) => view,
            Err(error) => {
                let is_lasting = error.is_lasting();
                failure = Some(error);
                if is_lasting {
                    break;
                }
                continue;
            }
        };
        match decide(&view) {
            // An attempt whose answer was lost has done it.
            Ok(Decision::Already(already)) => return Ok(said.or(refused).unwrap_or(already)),
            Err(not_changed) => return settle(said.or(refused), &not_changed),
            // It was refused, and is not there.
            Ok(Decision::Commit { .. }) if refused.is_some() => break,
            Ok(Decision::Commit { change, done }) => match store.commit(&change).await {
                Ok(Outcome::Applied { .. }) => return Ok(done),
                Ok(Outcome::Refused) => said = None,
                Err(error) => {
                    let (is_unknown, needs_look) = (error.is_unknown(), error.needs_look());
                    failure = Some(error);
                    if is_unknown {
                        said = Some(done);
                    } else if needs_look {
                        refused = Some(done);
                    } else {
                        break;
                    }
                }
            },
        }
    }
    let unknown = match said {
        Some(_) => "; whether the last attempt has taken effect is not known: look whether it has",
        None => "",
    };
    Err(match failure {
        Some(error) => refused::answer(&error, format!("{error}{unknown}")),
        None => {
            let problem = format!("others change the records all the time: try again{unknown}");
            Refusal::new(RefusalKind::TryAgain, problem)
        }
    })
}

/// What comes of a change that is refused, after an attempt of unknown outcome that would have done what is `said`.
fn settle(said: Option<String>, refused: &NotChanged) -> Result<String, Refusal> {
    match (said, refused) {
        // That attempt has removed the pool.
        (Some(done), NotChanged::Unknown(_)) => Ok(done),
        _ => Err(Refusal::new(RefusalKind::Invalid, refused.to_string())),
    }
}

/// All records that agents follow, as the store has them now.
pub async fn read(store: &Store) -> Result<View, StoreError> {
    let mut view = View::default();
    view.apply(Update::Loaded(store.range(&Key::followed()).await?));
    Ok(view)
}

/// The pools, as this node knows them.
pub async fn list(records: &Records, store: &Store) -> Result<Vec<PoolStatus>, Refusal> {
    let (view, used) = (records.read()?, Addresses::read(store).await.ok());
    Ok(view.every_pool().map(|known| status(&view, &known.record, used.as_ref())).collect())
}

/// One pool.
pub fn status(view: &View, pool: &Pool, used: Option<&Addresses>) -> PoolStatus {
    let claimed = Claimed::of(view, pool);
    PoolStatus {
        name: pool.name.clone(),
        cidr: pool.cidr().into(),
        block_length: pool.block_length(),
        purpose: match pool.purpose {
            Purpose::Blocks => PoolPurpose::Blocks,
            Purpose::Reservations => PoolPurpose::Reservations,
        },
        state: match pool.state {
            PoolState::Active => answer::PoolState::Active,
            PoolState::Draining => answer::PoolState::Draining,
            PoolState::Retired => answer::PoolState::Retired,
        },
        nodes: pool.nodes.clone(),
        blocks_owned: claimed.owned,
        blocks_resting: claimed.resting,
        blocks_total: claimed.total,
        reserved: view.reservations.keys().filter(|address| pool.cidr().has(**address)).count() as u64,
        addresses_used: used.map(|used| used.count_in(pool.cidr())),
    }
}

/// The blocks that are claimed, as this node knows them.
pub async fn blocks(me: &NodeName, records: &Records, store: &Store) -> Result<Vec<ClaimStatus>, Refusal> {
    let (view, used) = (records.read()?, Addresses::read(store).await.ok());
    Ok(claims(me, &view, used.as_ref()))
}

/// The claims of all blocks.
pub fn claims(me: &NodeName, view: &View, used: Option<&Addresses>) -> Vec<ClaimStatus> {
    let problems = believe(view, me).problems.into_iter();
    let refused: BTreeMap<String, String> = problems.map(|problem| (problem.key, problem.reason)).collect();
    let mut counts: BTreeMap<Cidr, u64> = BTreeMap::new();
    let mut blocks: Vec<Cidr> = view.blocks.keys().map(|block| block.cidr()).collect();
    blocks.sort();
    for address in used.into_iter().flat_map(Addresses::all) {
        // Blocks do not overlap, or are refused: the last that begins at or before the address has it, or none.
        let behind = blocks.partition_point(|block| *block <= Cidr::around(address, u8::MAX));
        if let Some(block) =
            behind.checked_sub(1).map(|index| blocks[index]).filter(|block| block.has(address))
        {
            *counts.entry(block).or_default() += 1;
        }
    }
    let claims = view.blocks.iter().map(|(block, known)| {
        let claim = &*known.record;
        let standing = if view.fences.contains_key(&claim.incarnation) {
            BlockStanding::Rests
        } else {
            let reason = refused.get(&Key::Block(*block).to_string());
            reason.cloned().map_or(BlockStanding::Owned, BlockStanding::Refused)
        };
        ClaimStatus {
            block: block.cidr().into(),
            pool: claim.pool.clone(),
            node: claim.node.clone(),
            incarnation: claim.incarnation.to_string(),
            revision: known.revision,
            addresses_used: used.map(|_| counts.get(&block.cidr()).copied().unwrap_or(0)),
            standing,
        }
    });
    claims.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pool_that_is_not_there_was_removed_by_the_attempt_whose_answer_was_lost() {
        let unknown = NotChanged::Unknown("p".parse().unwrap());
        assert_eq!(settle(Some("pool p is removed".into()), &unknown).unwrap(), "pool p is removed");
        assert!(settle(None, &unknown).unwrap_err().message.contains("there is no pool p"));
        assert!(settle(Some("pool p is added".into()), &NotChanged::NoCluster).is_err());
    }
}
