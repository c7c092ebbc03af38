//! Answers a check: examines this node until the findings are stable, and repairs what it can.

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
use crate::host::insides::Looker;
use crate::node::Node;
use crate::node_state::NodeState;

/// Interval between two examinations.
const PAUSE: Duration = Duration::from_millis(500);

/// How long a deviation has to last to be reported: pods are created and deleted meanwhile, and their records follow
/// with a delay.
pub(super) const CERTAIN: Duration = Duration::from_secs(3);

/// How long records may be missing after the datastore lost some, without a report.
const PUTTING_BACK: Duration = Duration::from_secs(60);

/// Most deviations in one answer, unrepaired ones first, and the most bytes of each: together a few KiB.
const ROOM: usize = 16;
const LONGEST: usize = 240;

/// State for examining this node.
#[derive(Debug)]
pub struct Task {
    /// The node.
    pub node: Arc<Node>,
    /// Reads the network inside pods.
    pub looker: Looker,
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
        asked: Revision,
    ) -> impl Future<Output = Result<Outcome, StoreError>> + Send;
}

impl SelfExamination for Task {
    async fn examine(&self, is_restoring: bool) -> Result<OwnReport, NotExamined> {
        examine(&self.node, &self.looker, is_restoring).await
    }

    async fn carry_out(&self, repair: OwnRepair) {
        carry_out(&self.node, repair).await;
    }

    async fn answer(&self, record: AnswerRecord, asked: Revision) -> Result<Outcome, StoreError> {
        let node = self.node.config.node.clone();
        self.node.store.commit(&Change::AnswerInspection { node, record, asked }).await
    }
}

/// Answers checks until records are no longer published.
async fn answer_all<E: SelfExamination>(node_state: &NodeState, node: &E) {
    let mut views = node_state.records.changes();
    let mut answered: Option<Nonce> = None;
    let mut losses = (0, None);
    let mut known = false;
    loop {
        let view = Arc::clone(&views.borrow_and_update());
        if view.losses != losses.0 {
            losses = (view.losses, Some(Instant::now()));
        }
        // A node that does not match its record must not answer in its name.
        let asked = view.inspection.as_ref().filter(|_| node_state.membership.own_revision(&view).is_some());
        let is_new = asked.is_some_and(|asked| answered.as_ref() != Some(&asked.record.id));
        if let Some(asked) = asked.filter(|_| is_new) {
            answered = Some(asked.record.id.clone());
            // A request from before the start of this agent is not answered.
            if known {
                let is_restoring = losses.1.is_some_and(|lost: Instant| lost.elapsed() < PUTTING_BACK);
                answer(node, asked, is_restoring).await;
            }
        }
        known |= view.source == ViewSource::Store;
        if views.changed().await.is_err() {
            return;
        }
    }
}

async fn answer<E: SelfExamination>(node: &E, asked: &Versioned<InspectionRecord>, is_restoring: bool) {
    match check(node, asked.record.repairs, is_restoring).await {
        Ok((mut deviations, examine)) => {
            deviations.sort_by_key(|deviation| deviation.repaired);
            let left_out =
                deviations.iter().skip(ROOM).filter(|deviation| !deviation.repaired).count() as u64;
            let record = AnswerRecord {
                id: asked.record.id.clone(),
                attachments: examine.attachments,
                interfaces: examine.interfaces,
                deviations: deviations.into_iter().take(ROOM).map(short).collect(),
                left_out,
            };
            match node.answer(record, asked.revision).await {
                Ok(outcome) => debug!(?outcome, "answered a check"),
                Err(error) => warn!(%error, "cannot answer a check"),
            }
        }
        Err(error) => warn!(%error, "cannot check this node"),
    }
}

fn short(mut deviation: DeviationStatus) -> DeviationStatus {
    if deviation.what.len() > LONGEST {
        deviation.what.truncate(deviation.what.floor_char_boundary(LONGEST));
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
    let looking = Looking { node, is_restoring, until: Instant::now() + answer_timeout(repairs) };
    let (findings, last) = looking.settle().await?;
    if findings.is_empty() || repairs == RepairMode::None || Instant::now() >= looking.until {
        return Ok((findings.iter().map(|finding| status(finding, false)).collect(), last));
    }
    for finding in &findings {
        if let Some(repair) = finding.repair.clone() {
            node.carry_out(repair).await;
        }
    }
    let again = looking.examine().await?;
    let counts = OwnReport { findings: findings.clone(), ..again.clone() };
    let until = Instant::now() + CERTAIN;
    let mut left = again;
    while findings.iter().any(|finding| finding.repair.is_some() && has(&left, finding))
        && Instant::now() < until
    {
        sleep(PAUSE).await;
        left = looking.examine().await?;
    }
    let repaired = findings.iter().map(|finding| status(finding, !has(&left, finding)));
    Ok((
        repaired.collect(),
        OwnReport { attachments: left.attachments, interfaces: left.interfaces, ..counts },
    ))
}

/// Examines this node until the timeout of the check.
struct Looking<'a, E> {
    node: &'a E,
    is_restoring: bool,
    until: Instant,
}

impl<E: SelfExamination> Looking<'_, E> {
    /// Examines the node, and repeats it after an error until the timeout: the datastore may be slow.
    async fn examine(&self) -> Result<OwnReport, NotExamined> {
        loop {
            match self.node.examine(self.is_restoring).await {
                Err(error) if Instant::now() < self.until => {
                    debug!(%error, "cannot check this node yet");
                    sleep(PAUSE).await;
                }
                done => return done,
            }
        }
    }

    /// Examines the node until all remaining deviations have lasted for `CERTAIN`, or none is left.
    async fn settle(&self) -> Result<(Vec<Finding>, OwnReport), NotExamined> {
        let mut last = self.examine().await?;
        let mut findings = last.findings.clone();
        let until = Instant::now() + CERTAIN;
        while !findings.is_empty() && Instant::now() < until {
            sleep(PAUSE).await;
            last = self.examine().await?;
            findings.retain(|finding| has(&last, finding));
        }
        Ok((findings, last))
    }
}

/// Whether the examination has the same finding.
fn has(examine: &OwnReport, finding: &Finding) -> bool {
    examine.findings.iter().any(|other| other.deviation.what == finding.deviation.what)
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
