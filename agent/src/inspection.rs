//! `polderctl ipam check`: checks the records against each other, and each node's ledger and kernel.
//!
//! The agent that gets the command writes a request into the datastore, which every agent watches. Each agent checks
//! its node and writes its answer into the datastore. At the end, the request and all answers are deleted, also those
//! of an earlier check that did not finish.

mod answer;
mod own;
mod repair;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::Duration;

use polder_api::NodeName;
use polder_api::ipam::{Checked, DeviationStatus, NodeChecked, RepairMode};
use polder_api::message::{Refusal, RefusalKind, Refuse};
use polder_ipam::Revision;
use polder_ipam::change::{Change, MOST_RECORDS, Writer};
use polder_ipam::ids::Nonce;
use polder_ipam::invariants::{self, ClusterReport, Deviation, Invariant, PublishedAddress, Repair};
use polder_ipam::key::{Key, Name};
use polder_ipam::prefix;
use polder_ipam::record::{AnswerRecord, InspectionRecord};
use polder_ipam::store::{Outcome, StoreError};
use polder_ipam::tasks::published::PublishedAddresses;
use polder_ipam::tasks::records::read_all;
use polder_ipam::view::View;
use polder_store::Store;
use tokio::time::{Instant, sleep};
use tracing::{debug, warn};

use crate::leases;
use crate::machine::{MachineError, random_name};
use crate::node_state::Membership;

pub use answer::Task;

/// Timeout for the answers of the nodes; doubled for a check with repair.
const TIMEOUT: Duration = Duration::from_secs(10);

fn answer_timeout(repairs: RepairMode) -> Duration {
    match repairs {
        RepairMode::None => TIMEOUT,
        RepairMode::Safe => TIMEOUT * 2,
    }
}

/// Interval between reads of the answers.
const PAUSE: Duration = Duration::from_millis(200);

/// Why the cluster is not checked.
#[derive(Debug, thiserror::Error)]
enum NotChecked {
    /// The kernel provides no random id for the check.
    ///
    /// Remedy: correct the error at the end of the text, and repeat the command.
    #[error("cannot check the cluster: {0}")]
    NoId(#[from] MachineError),
    /// A request of the check to the datastore failed.
    ///
    /// Remedy: correct the datastore's error at the end of the text, and repeat the command.
    #[error("cannot check the cluster: {0}")]
    Store(#[from] StoreError),
    /// Another operator started a check. Its request replaced the request of this check.
    #[error("cannot check the cluster: another check started at the same time. Try again")]
    Replaced,
}

impl Refuse for NotChecked {
    fn kind(&self) -> RefusalKind {
        match self {
            Self::Store(error) if error.is_lasting() => RefusalKind::Failed,
            Self::NoId(_) | Self::Store(_) | Self::Replaced => RefusalKind::TryAgain,
        }
    }
}

/// Checks the cluster.
pub async fn check(membership: &Membership, store: &Store, repairs: RepairMode) -> Result<Checked, Refusal> {
    let id = Nonce::new(random_name().map_err(NotChecked::from)?);
    let record = InspectionRecord { id: id.clone(), repairs };
    let sent = store.commit(&Change::AskInspection(record)).await;
    // If the outcome is unknown, the answers show it: without the request there are no answers.
    let checked = match sent {
        Ok(_) => ask(membership, store, &id, repairs).await,
        // The request is not in the datastore.
        Err(error) if !error.needs_reread() => return Err(NotChecked::Store(error).into()),
        Err(error) => Err(NotChecked::Store(error)),
    };
    if let Err(error) = clean_up(store, &id).await {
        warn!(%error, "cannot delete the records of this check: the next check deletes them");
    }
    Ok(checked?)
}

async fn ask(
    membership: &Membership,
    store: &Store,
    id: &Nonce,
    repairs: RepairMode,
) -> Result<Checked, NotChecked> {
    let started = Instant::now();
    let view = read_all(store).await?;
    let alive = leases::with_lease(store).await?;
    let members: BTreeSet<NodeName> = view.nodes.keys().cloned().collect();
    let unregistered = membership.own_revision(&view).is_none().then(|| membership.me().name.clone());
    let mut among = look(&view, store).await?;
    let answer_timeout = answer_timeout(repairs);
    let mut answers = BTreeMap::new();
    loop {
        let (silent, absent) = unanswered(&members, &alive, &answers);
        // An agent without a lease can answer, too: the datastore may have refused the lease.
        let is_over =
            silent.is_empty() && (absent.is_empty() || started.elapsed() >= answer::MIN_DEVIATION_TIME);
        if is_over || started.elapsed() >= answer_timeout {
            break;
        }
        sleep(PAUSE).await;
        match read_answers(store, id, &members).await {
            Ok(read) => answers = read,
            Err(error) if started.elapsed() >= answer_timeout => return Err(error.into()),
            Err(error) => debug!(%error, "cannot read the answers to a check yet"),
        }
    }
    while !among.is_empty() && started.elapsed() < answer::MIN_DEVIATION_TIME {
        sleep(PAUSE).await;
    }
    // While blocks and addresses change, a single examination can report inconsistencies that do not persist.
    let view = read_all(store).await?;
    if view.inspection.as_ref().is_none_or(|asked| asked.record.id != *id) {
        return Err(NotChecked::Replaced);
    }
    if !among.is_empty() {
        let again = look(&view, store).await?;
        among.retain(|found| again.iter().any(|other| other.deviation.what == found.deviation.what));
    }
    let (silent, absent) = unanswered(&members, &alive, &answers);
    let mut checked = Checked { silent, absent, unregistered, ..Checked::default() };
    for (name, answer) in answers {
        checked.nodes.push(NodeChecked {
            name,
            attachments: answer.attachments,
            interfaces: answer.interfaces,
        });
        checked.left_out += answer.left_out;
        checked.deviations.extend(answer.deviations);
    }
    for found in among {
        if checked.deviations.iter().any(|known| known.what == found.deviation.what) {
            continue;
        }
        let repaired = repairs == RepairMode::Safe && withdraw(store, &view, &found).await;
        checked.deviations.push(found.status(repaired));
    }
    Ok(checked)
}

/// The members that have not answered: first those that are alive, then the others.
fn unanswered<T>(
    members: &BTreeSet<NodeName>,
    alive: &BTreeSet<NodeName>,
    answers: &BTreeMap<NodeName, T>,
) -> (Vec<NodeName>, Vec<NodeName>) {
    let unanswered = members.iter().filter(|name| !answers.contains_key(*name));
    unanswered.cloned().partition(|name| alive.contains(name))
}

/// An inconsistency between records.
struct Found {
    deviation: Deviation,
    /// The record of an address that no attachment can have, with its revision.
    record: Option<(Name, Revision)>,
}

impl Found {
    fn status(self, repaired: bool) -> DeviationStatus {
        let Deviation { invariant, what, remedy, node, .. } = self.deviation;
        DeviationStatus { invariant, node, what, remedy, repaired }
    }
}

/// Finds inconsistencies between records.
async fn look(view: &View, store: &Store) -> Result<Vec<Found>, StoreError> {
    let addresses = PublishedAddresses::read(store).await?;
    let published: Vec<PublishedAddress> =
        addresses.records.iter().map(|(published, _)| published.clone()).collect();
    let facts = ClusterReport { view: Some(view), is_restoring: false, published: &published, nodes: &[] };
    let revision = |deviation: &Deviation| match (&deviation.repair, &deviation.node) {
        (Some(Repair::Withdraw(address)), Some(node)) => {
            let records = addresses.records.iter();
            let mut same = records.filter(|(known, _)| known.address == *address && known.node == *node);
            let (_, revision) = same.next()?;
            Some((Name::Key(Key::Address(node.clone(), *address)), *revision))
        }
        _ => None,
    };
    let mut found: Vec<Found> = invariants::check(&facts)
        .into_iter()
        .map(|deviation| Found { record: revision(&deviation), deviation })
        .collect();
    found.extend(view.refused.iter().map(|(key, reason)| unreadable(key, reason, None)));
    let unreadable_addresses = addresses.unreadable.iter();
    found
        .extend(unreadable_addresses.map(|(key, reason, revision)| unreadable(key, reason, Some(*revision))));
    Ok(found)
}

fn unreadable(key: &str, reason: &dyn fmt::Display, revision: Option<Revision>) -> Found {
    // The node of an unreadable address record reports it, too, with the same text.
    let node = key.strip_prefix(prefix::in_use()).and_then(|key| key.strip_prefix("addresses/"));
    let node: Option<NodeName> = node.and_then(|rest| rest.split('/').next()?.parse().ok());
    let what = match &node {
        Some(_) => format!("record {key} of this node's addresses cannot be read: {reason}"),
        None => format!("record {key} cannot be read: {reason}"),
    };
    let (invariant, remedy) = (Invariant::NoLeak, "correct or delete it".to_owned());
    Found {
        deviation: Deviation { invariant, what, remedy, node, repair: None },
        record: revision.map(|revision| (Name::from(key), revision)),
    }
}

/// Deletes the record of an address if its node is not registered: no other agent would withdraw it.
async fn withdraw(store: &Store, view: &View, found: &Found) -> bool {
    let (Some((name, revision)), Some(node)) = (&found.record, &found.deviation.node) else { return false };
    if view.nodes.contains_key(node) {
        return false;
    }
    let change = Change::WithdrawAddresses {
        by: Writer::AnyNode(node.clone()),
        records: vec![(name.clone(), Some(*revision))],
    };
    matches!(store.commit(&change).await, Ok(Outcome::Applied { .. }))
}

/// The answers to that check from members of the cluster. Unreadable answers are ignored.
async fn read_answers(
    store: &Store,
    id: &Nonce,
    members: &BTreeSet<NodeName>,
) -> Result<BTreeMap<NodeName, AnswerRecord>, StoreError> {
    let contents = store.range(&Key::all_answers()).await?;
    let answers = contents.entries.iter().filter_map(|entry| {
        let Ok(Key::Answer(name)) = entry.key.parse() else { return None };
        let answer: AnswerRecord = serde_json::from_slice(&entry.value).ok()?;
        (answer.id == *id && members.contains(&name)).then_some((name, answer))
    });
    Ok(answers.collect())
}

/// Deletes the request and all answers, also those to earlier requests. A newer request is kept.
async fn clean_up(store: &Store, id: &Nonce) -> Result<(), StoreError> {
    let view = read_all(store).await?;
    if let Some(asked) = &view.inspection {
        if asked.record.id != *id {
            return Ok(());
        }
        store.commit(&Change::EndInspection { revision: asked.revision }).await?;
    }
    let answers = store.range(&Key::all_answers()).await?;
    for some in answers.entries.chunks(MOST_RECORDS) {
        let names = some.iter().map(|entry| Name::from(entry.key.as_str())).collect();
        store.commit(&Change::ForgetAnswers(names)).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(names: &[&str]) -> Vec<NodeName> {
        names.iter().map(|name| name.parse().unwrap()).collect()
    }

    #[test]
    fn members_without_an_answer_are_silent_if_alive_and_absent_otherwise() {
        let set = |list: &[&str]| names(list).into_iter().collect();
        let answers = names(&["n1", "n4"]).into_iter().map(|name| (name, ())).collect();
        let (silent, absent) =
            unanswered(&set(&["n1", "n2", "n3", "n4"]), &set(&["n1", "n3", "n9"]), &answers);
        assert_eq!((silent, absent), (names(&["n3"]), names(&["n2"])));
    }
}
