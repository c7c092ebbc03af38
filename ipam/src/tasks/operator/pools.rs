//! Changes the cluster's pools and settings.

use polder_api::message::{Refusal, RefusalKind, Refuse};
use polder_api::pool::{NewPool, PoolChange};
use polder_api::rule;
use tracing::info;

use super::ATTEMPTS;
use crate::cidr::ParseCidrError;
use crate::pool::{InvalidPool, PoolState, usual_block_length};
use crate::pools::{self, Decision, NotChanged};
use crate::settings::ValidatedSettings;
use crate::store::{Outcome, StoreError};
use crate::tasks::records::{RecordStore, read_all};
use crate::view::View;
use crate::{Cidr, Pool, settings, special};

/// Why the request for a pool is invalid, independent of the records of the cluster.
#[derive(Debug, thiserror::Error)]
enum NoSuchPool {
    /// The range is not a network prefix.
    #[error(transparent)]
    Cidr(#[from] ParseCidrError),
    /// The block length does not fit the range.
    /// Remedy: give another --block-length, or another range.
    #[error("{0} (--block-length)")]
    BlockLength(#[source] InvalidPool),
    /// Pods cannot use addresses of the range.
    #[error(transparent)]
    Special(InvalidPool),
}

impl Refuse for NoSuchPool {
    fn kind(&self) -> RefusalKind {
        RefusalKind::Invalid
    }
}

impl Refuse for NotChanged {
    fn kind(&self) -> RefusalKind {
        RefusalKind::Invalid
    }
}

/// Why a change of pools or settings has no result.
#[derive(Debug, thiserror::Error)]
enum PoolNotChanged {
    /// The datastore failed, and the change was not made.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The datastore failed, and the change may have been made.
    #[error("{0}; it is unknown whether the last attempt took effect: check before you try again")]
    InDoubt(#[source] StoreError),
    /// Others changed the same records in each attempt.
    #[error("the records keep changing: try again")]
    Contended,
}

impl Refuse for PoolNotChanged {
    fn kind(&self) -> RefusalKind {
        match self {
            Self::Store(error) | Self::InDoubt(error) => error.kind(),
            Self::Contended => RefusalKind::TryAgain,
        }
    }
}

/// Changes the pools, and returns a message with the result. `known` is the view of this node: it has the underlay
/// addresses and the destinations that a pool must not cover.
pub async fn change_pools(
    records: &impl RecordStore,
    known: &View,
    change: PoolChange,
) -> Result<String, Refusal> {
    let success_message = match change {
        PoolChange::Add(new) => {
            let pool = parse_pool(new)?;
            let add = |view: &View| {
                let mut view = view.clone();
                view.own_addresses.clone_from(&known.own_addresses);
                view.needed.clone_from(&known.needed);
                pools::add(&view, &pool)
            };
            with_warnings(carry_out(records, add).await?, &special::warnings(pool.cidr()))
        }
        PoolChange::Drain(name) => carry_out(records, |view| pools::drain(view, &name)).await?,
        PoolChange::Remove(name) => carry_out(records, |view| pools::remove(view, &name)).await?,
    };
    info!("{success_message}");
    Ok(success_message)
}

/// Changes settings of the cluster, and returns a message with the result.
pub async fn change_settings(
    records: &impl RecordStore,
    wanted: &ValidatedSettings,
) -> Result<String, Refusal> {
    let success_message = carry_out(records, |view| settings::change(view, wanted)).await?;
    info!("{success_message}");
    Ok(success_message)
}

/// Appends the warnings to the message.
fn with_warnings(success_message: String, warnings: &[String]) -> String {
    let warnings = warnings.iter().map(|warning| format!("\nwarning: {warning}"));
    success_message + &warnings.collect::<String>()
}

/// The requested pool; or why it is invalid, independent of the records of the cluster.
pub fn parse_pool(new: NewPool) -> Result<Pool, Refusal> {
    let cidr: Cidr = new.cidr.to_string().parse().map_err(NoSuchPool::Cidr)?;
    let length = new.block_length.unwrap_or_else(|| usual_block_length(new.purpose, cidr));
    let mut pool = Pool::new(new.name, cidr, length, PoolState::Active).map_err(NoSuchPool::BlockLength)?;
    pool.purpose = new.purpose;
    pool.nodes = new.nodes;
    match pool.check_use() {
        Ok(()) => Ok(pool),
        Err(error @ InvalidPool::Special { .. }) => Err(NoSuchPool::Special(error).into()),
        Err(error) => Err(NoSuchPool::BlockLength(error).into()),
    }
}

rule! {
    /// Whether the outcome of an attempt without an answer is checked.
    fn looks_again() -> bool {
        true
    }
    NoAnswerIsYes => false
}

/// Carries a change out. Each attempt starts from the current records: a change that they already contain is reported
/// as done, and an earlier attempt that takes effect late is refused because the records have changed. After a refusal
/// by the datastore, the records are read once more, without another attempt.
async fn carry_out(
    records: &impl RecordStore,
    decide: impl Fn(&View) -> Result<Decision, NotChanged>,
) -> Result<String, Refusal> {
    let mut failure = None;
    let (mut unanswered, mut refused) = (None, None);
    for _ in 0..ATTEMPTS {
        let view = match read_all(records).await {
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
            // An attempt without an answer, or with a refusal, may have made the change.
            Ok(Decision::NothingToDo(already)) => return Ok(unanswered.or(refused).unwrap_or(already)),
            Err(not_changed) => return settle(unanswered.or(refused), &not_changed),
            // The datastore refused it, and the records do not contain it.
            Ok(Decision::Commit { .. }) if refused.is_some() => break,
            Ok(Decision::Commit { change, success_message }) => match records.commit(&change).await {
                Ok(Outcome::Applied { .. }) => return Ok(success_message),
                Ok(Outcome::Refused) => unanswered = None,
                Err(error) => {
                    let (is_unknown, needs_reread) = (error.is_unknown(), error.needs_reread());
                    failure = Some(error);
                    if is_unknown && !looks_again() {
                        return Ok(success_message);
                    } else if is_unknown {
                        unanswered = Some(success_message);
                    } else if needs_reread {
                        refused = Some(success_message);
                    } else {
                        break;
                    }
                }
            },
        }
    }
    let is_in_doubt = unanswered.is_some();
    Err(match failure {
        Some(error) if is_in_doubt => PoolNotChanged::InDoubt(error).into(),
        Some(error) => PoolNotChanged::Store(error).into(),
        None => PoolNotChanged::Contended.into(),
    })
}

/// The result if a change is not possible after an attempt of unknown outcome. `unanswered` is the message of that
/// attempt.
fn settle(unanswered: Option<String>, refused: &NotChanged) -> Result<String, Refusal> {
    match (unanswered, refused) {
        // That attempt has removed the pool.
        (Some(success_message), NotChanged::Unknown(_)) => Ok(success_message),
        _ => Err(refused.clone().into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_pool_counts_as_removed_by_the_unanswered_attempt() {
        let unknown = NotChanged::Unknown("p".parse().unwrap());
        assert_eq!(settle(Some("pool p is removed".into()), &unknown).unwrap(), "pool p is removed");
        assert!(settle(None, &unknown).unwrap_err().message.contains("there is no pool p"));
        assert!(settle(Some("pool p is added".into()), &NotChanged::NoCluster).is_err());
    }
}
