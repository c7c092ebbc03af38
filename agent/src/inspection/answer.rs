//! Answers a check (`polderctl ipam check`): examines this node until its findings are stable, makes the possible
//! repairs, and writes the result to the datastore.

use std::sync::Arc;
use std::time::Duration;

use polder_api::ipam::{DeviationStatus, RepairMode};
use polder_ipam::Revision;
use polder_ipam::change::Change;
use polder_ipam::ids::Nonce;
use polder_ipam::record::{AnswerRecord, InspectionRecord};
use polder_ipam::store::{Outcome, StoreError};
use polder_ipam::view::{Versioned, ViewSource};
use tokio::time::{Instant, sleep};
use tracing::{debug, warn};

use super::answer_timeout;
use super::own::{Finding, NotExamined, OwnRepair, OwnReport, examine};
use super::repair::carry_out;
use crate::host::pod_inspection::PodInspector;
use crate::node::Node;
use crate::node_state::NodeState;

/// Interval between two examinations.
const PAUSE: Duration = Duration::from_millis(500);

/// How long a deviation has to last to be reported: pods are created and deleted meanwhile, and their records follow
/// with a delay.
pub(super) const MIN_DEVIATION_TIME: Duration = Duration::from_secs(3);

/// How long records may be missing after the datastore lost some, without a report.
const RESTORE_TIME: Duration = Duration::from_secs(60);

/// Maximum number of deviations in one answer. Unrepaired ones are listed first. An answer has at most a few KiB.
const MAX_DEVIATIONS: usize = 16;

/// Maximum length of the text of a deviation, in bytes.
const MAX_DEVIATION_BYTES: usize = 240;

/// State for examining this node.
#[derive(Debug)]
pub struct Task {
    /// The node.
    pub node: Arc<Node>,
    /// Reads the network inside pods.
    pub inspector: PodInspector,
}

impl Task {
    /// Answers every check that is requested from now on, without end.
    pub async fn run(self) {
        answer_all(&self.node.node_state, &self).await;
    }
}

/// A node that examines itself.
trait SelfExamination {
    /// Examines the node. While lost records are being restored in the datastore, missing records are not reported.
    fn examine(&self, is_restoring: bool) -> impl Future<Output = Result<OwnReport, NotExamined>> + Send;

    /// Carries out a repair. The next examination shows whether it succeeded.
    fn carry_out(&self, repair: OwnRepair) -> impl Future<Output = ()> + Send;

    /// Answers the check that was requested at that revision.
    fn answer(
        &self,
        record: AnswerRecord,
        requested_at: Revision,
    ) -> impl Future<Output = Result<Outcome, StoreError>> + Send;
}

impl SelfExamination for Task {
    async fn examine(&self, is_restoring: bool) -> Result<OwnReport, NotExamined> {
        examine(&self.node, &self.inspector, is_restoring).await
    }

    async fn carry_out(&self, repair: OwnRepair) {
        carry_out(&self.node, repair).await;
    }

    async fn answer(&self, record: AnswerRecord, requested_at: Revision) -> Result<Outcome, StoreError> {
        let node = self.node.config.node.clone();
        self.node.store.commit(&Change::AnswerInspection { node, record, asked: requested_at }).await
    }
}

/// Answers checks until records are no longer published.
async fn answer_all<E: SelfExamination>(node_state: &NodeState, node: &E) {
    let mut views = node_state.records.changes();
    let mut answered: Option<Nonce> = None;
    let (mut losses, mut lost_at) = (0, None);
    let mut has_store_view = false;
    loop {
        let view = Arc::clone(&views.borrow_and_update());
        if view.losses != losses {
            (losses, lost_at) = (view.losses, Some(Instant::now()));
        }
        // If the record of this node belongs to another machine, this node must not answer for it.
        let request =
            view.inspection.as_ref().filter(|_| node_state.membership.own_revision(&view).is_some());
        let is_new = request.is_some_and(|request| answered.as_ref() != Some(&request.record.id));
        if let Some(request) = request.filter(|_| is_new) {
            answered = Some(request.record.id.clone());
            // A request from before the start of this agent is not answered.
            if has_store_view {
                let is_restoring = lost_at.is_some_and(|lost: Instant| lost.elapsed() < RESTORE_TIME);
                answer(node, request, is_restoring).await;
            }
        }
        has_store_view |= view.source == ViewSource::Store;
        if views.changed().await.is_err() {
            return;
        }
    }
}

async fn answer<E: SelfExamination>(node: &E, request: &Versioned<InspectionRecord>, is_restoring: bool) {
    match check(node, request.record.repairs, is_restoring).await {
        Ok((mut deviations, report)) => {
            deviations.sort_by_key(|deviation| deviation.repaired);
            let left_out =
                deviations.iter().skip(MAX_DEVIATIONS).filter(|deviation| !deviation.repaired).count() as u64;
            let record = AnswerRecord {
                id: request.record.id.clone(),
                attachments: report.attachments,
                interfaces: report.interfaces,
                deviations: deviations.into_iter().take(MAX_DEVIATIONS).map(shorten).collect(),
                left_out,
            };
            match node.answer(record, request.revision).await {
                Ok(outcome) => debug!(?outcome, "answered a check"),
                Err(error) => warn!(%error, "cannot answer a check"),
            }
        }
        Err(error) => warn!(%error, "cannot check this node"),
    }
}

/// Limits the length of the deviation's text.
fn shorten(mut deviation: DeviationStatus) -> DeviationStatus {
    if deviation.what.len() > MAX_DEVIATION_BYTES {
        deviation.what.truncate(deviation.what.floor_char_boundary(MAX_DEVIATION_BYTES));
        deviation.what.push_str(" ...");
    }
    deviation
}

/// The deviations on this node, with the result of their repair.
async fn check<E: SelfExamination>(
    node: &E,
    repairs: RepairMode,
    is_restoring: bool,
) -> Result<(Vec<DeviationStatus>, OwnReport), NotExamined> {
    let examiner = Examiner { node, is_restoring, deadline: Instant::now() + answer_timeout(repairs) };
    let (findings, last) = examiner.stable_findings().await?;
    if findings.is_empty() || repairs == RepairMode::None || Instant::now() >= examiner.deadline {
        return Ok((findings.iter().map(|finding| status(finding, false)).collect(), last));
    }
    for finding in &findings {
        if let Some(repair) = finding.repair.clone() {
            node.carry_out(repair).await;
        }
    }
    let mut last = examiner.examine().await?;
    let deadline = Instant::now() + MIN_DEVIATION_TIME;
    while findings.iter().any(|finding| finding.repair.is_some() && contains(&last, finding))
        && Instant::now() < deadline
    {
        sleep(PAUSE).await;
        last = examiner.examine().await?;
    }
    let deviations = findings.iter().map(|finding| status(finding, !contains(&last, finding))).collect();
    Ok((deviations, OwnReport { findings, ..last }))
}

/// Examines this node until the timeout of the check.
struct Examiner<'a, E> {
    node: &'a E,
    is_restoring: bool,
    deadline: Instant,
}

impl<E: SelfExamination> Examiner<'_, E> {
    /// Examines the node, and repeats it after an error until the timeout: the datastore may be slow.
    async fn examine(&self) -> Result<OwnReport, NotExamined> {
        loop {
            match self.node.examine(self.is_restoring).await {
                Err(error) if Instant::now() < self.deadline => {
                    debug!(%error, "cannot check this node yet");
                    sleep(PAUSE).await;
                }
                done => return done,
            }
        }
    }

    /// Examines the node until all remaining deviations have lasted for `MIN_DEVIATION_TIME`, or none is left.
    async fn stable_findings(&self) -> Result<(Vec<Finding>, OwnReport), NotExamined> {
        let mut last = self.examine().await?;
        let mut findings = last.findings.clone();
        let deadline = Instant::now() + MIN_DEVIATION_TIME;
        while !findings.is_empty() && Instant::now() < deadline {
            sleep(PAUSE).await;
            last = self.examine().await?;
            findings.retain(|finding| contains(&last, finding));
        }
        Ok((findings, last))
    }
}

/// Whether the report has the same finding.
fn contains(report: &OwnReport, finding: &Finding) -> bool {
    report.findings.iter().any(|other| other.deviation.what == finding.deviation.what)
}

fn status(finding: &Finding, repaired: bool) -> DeviationStatus {
    let deviation = &finding.deviation;
    DeviationStatus {
        invariant: deviation.invariant,
        node: deviation.node.clone(),
        what: deviation.what.clone(),
        remedy: deviation.remedy.clone(),
        repaired,
    }
}

#[cfg(test)]
mod tests;
