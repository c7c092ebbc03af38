//! Finds pods whose network was changed from inside: inspects a few pods at a time and reports differences.
//!
//! Nothing is repaired. Only a privileged program in the pod, or a plugin that runs after Polder, can have changed it,
//! possibly on purpose. Setting an interface down and up again removes more than Polder configured. Recreating the pod
//! restores everything.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::errno::Errno;
use polder_api::Attachment;
use polder_ipam::cause::SharedError;
use polder_ipam::ledger::AttachmentEntry;
use polder_ipam::record::ClusterRecord;
use polder_netlink::inside::PodInterface;
use polder_netlink::{Error, RouteSocket, namespace};
use polder_store::NodeIpam;
use tokio::task::spawn_blocking;
use tracing::{debug, info};

use crate::capability::Capability;
use crate::in_flight::InFlight;
use crate::kernel::Kernel;
use crate::kernel::features::Features;
use crate::node_state::Membership;
use crate::owner::Owner;
use crate::wiring::wiring;

/// Number of pods that are inspected at a time. One takes about 0.3 ms, on a background thread.
const AT_A_TIME: usize = 16;

/// Consecutive inspections that must find a difference before it is reported: later plugins still change the pod during
/// an ADD.
const LOOKS: usize = 2;

/// The result of inspecting a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Comparison {
    /// Nothing was changed.
    Same,
    /// The difference, as text.
    Different(String),
    /// The namespace no longer exists, or changes too fast to be read.
    Gone,
    /// The inspection failed, for this reason.
    Barred(NotInspected),
}

/// Why a pod cannot be inspected from inside.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotInspected {
    /// The agent may not enter network namespaces.
    #[error("{error}: give the agent {capability}", capability = Capability::SysAdmin)]
    NotAllowed {
        /// Error of the kernel.
        error: SharedError,
    },
    /// The path of the namespace is a plain file in the agent's container, because the namespace is mounted elsewhere.
    #[error(
        "{} does not show the host's network namespaces: mount that host folder into the agent's container with \
         mountPropagation HostToContainer",
        folder.display()
    )]
    NotMounted {
        /// The folder of the namespace.
        folder: PathBuf,
    },
    /// The namespace cannot be opened, or its interfaces and addresses cannot be read.
    #[error(transparent)]
    Failed(SharedError),
}

impl NotInspected {
    fn failed(reason: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self::Failed(SharedError::new(reason))
    }
}

/// Inspects pods.
#[derive(Debug, Clone)]
pub struct PodInspector {
    /// The kernel connection for operations on single pods.
    pub pods: Owner<Kernel>,
    /// The node's addresses.
    pub ipam: Owner<NodeIpam>,
    /// Attachments with an operation in progress.
    pub in_flight: Arc<InFlight>,
    /// This node's identity and allocations.
    pub membership: Membership,
    /// Features that the kernel supports.
    pub features: Features,
}

/// Results of the inspections so far.
#[derive(Debug, Default)]
pub struct PodInspections {
    /// The attachment inspected last in the current round.
    last: Option<Attachment>,
    /// Changed attachments: the number of consecutive inspections that found the change, and the problem text.
    different: BTreeMap<Attachment, (usize, String)>,
    /// The logged reason why pods cannot be inspected.
    barred: Option<NotInspected>,
}

impl PodInspections {
    /// Inspects the next pods of the round, and those with a known change. Returns the problems of all pods. Without
    /// the permission it inspects none: see [`not_looked_at`].
    pub async fn check_all(&mut self, inspector: &PodInspector, cluster: &ClusterRecord) -> Vec<String> {
        if !Capability::SysAdmin.is_held() {
            return Vec::new();
        }
        let held: Vec<AttachmentEntry> =
            inspector.ipam.run(|ipam| ipam.attachments().cloned().collect()).await;
        let idle: BTreeMap<Attachment, AttachmentEntry> = held
            .into_iter()
            .filter(|held| can_be_looked_into(held) && !inspector.in_flight.has(&held.attachment))
            .map(|held| (held.attachment.clone(), held))
            .collect();
        self.different.retain(|attachment, _| idle.contains_key(attachment));
        for attachment in self.due(idle.keys()) {
            let held = &idle[&attachment];
            let found = inspector.look_into(cluster, held).await;
            // A DEL may have started meanwhile.
            self.take(held, found, !inspector.in_flight.has(&held.attachment));
        }
        let certain = self.different.values().filter(|(looks, _)| *looks >= LOOKS);
        certain.map(|(_, problem)| problem.clone()).collect()
    }

    /// The attachments to inspect now.
    fn due<'a>(&mut self, all: impl Iterator<Item = &'a Attachment> + Clone) -> BTreeSet<Attachment> {
        let is_next = |attachment: &&Attachment| self.last.as_ref().is_none_or(|last| *attachment > last);
        let mut due: Vec<Attachment> = all.clone().filter(is_next).take(AT_A_TIME).cloned().collect();
        if due.len() < AT_A_TIME {
            // Starts the next round.
            due.extend(all.take(AT_A_TIME - due.len()).cloned());
        }
        self.last = due.last().cloned();
        due.into_iter().chain(self.different.keys().take(AT_A_TIME).cloned()).collect()
    }

    fn take(&mut self, held: &AttachmentEntry, found: Comparison, is_idle: bool) {
        match found {
            Comparison::Different(what) if is_idle => {
                let looks = self.different.get(&held.attachment).map_or(0, |(looks, _)| *looks);
                self.different.insert(held.attachment.clone(), (looks + 1, problem(held, &what)));
            }
            Comparison::Barred(why) => {
                self.different.remove(&held.attachment);
                if self.barred.as_ref() != Some(&why) {
                    info!(
                        "cannot inspect the network namespaces of pods, so changes in them are not detected: {why}"
                    );
                    self.barred = Some(why);
                }
            }
            other => {
                debug!(attachment = %held.attachment, ?other, "inspected a pod");
                self.different.remove(&held.attachment);
            }
        }
    }
}

/// The missing check and its reason, if the agent lacks the permission to inspect pods.
pub fn not_looked_at() -> Option<String> {
    (!Capability::SysAdmin.is_held()).then(|| {
        format!(
            "changes inside pods' network namespaces are not detected, because polder-agent lacks {}: set \
             podInspection in the Helm chart, or install pod-inspection.conf for the systemd service (in \
             /usr/share/doc/polder or /usr/local/share/doc/polder)",
            Capability::SysAdmin
        )
    })
}

/// Whether the attachment is a pod of Polder with a known namespace.
pub fn can_be_looked_into(held: &AttachmentEntry) -> bool {
    held.has_interface() && !held.netns.is_empty()
}

/// The problem text of a changed pod.
pub fn problem(held: &AttachmentEntry, what: &str) -> String {
    let addresses: Vec<String> = held.addresses.iter().map(ToString::to_string).collect();
    let (pod, remedy) = match &held.pod {
        Some(pod) => (
            format!("pod {pod}"),
            format!(
                "run `kubectl delete pod -n {} {}`; its controller creates a new one",
                pod.namespace, pod.name
            ),
        ),
        None => (format!("the pod of {}", held.attachment), "stop the pod and start a new one".to_owned()),
    };
    format!(
        "the network inside {pod} ({}) was changed by a program in the pod, or by a CNI plugin that runs after polder: \
         {what}. The pod may have no connectivity: {remedy}",
        addresses.join(", ")
    )
}

impl PodInspector {
    /// Compares the network inside the pod with Polder's configuration, as CHECK does.
    pub async fn look_into(&self, cluster: &ClusterRecord, held: &AttachmentEntry) -> Comparison {
        let wiring = wiring(&self.membership, self.features, cluster, held);
        let inside = PodInterface {
            interface: held.attachment.interface.clone(),
            mac: wiring.mac,
            addresses: wiring.addresses,
            gateway_mac: wiring.gateway_mac,
        };
        let netns = held.netns.clone();
        let looked = spawn_blocking(move || compare(Path::new(&netns), &inside)).await;
        match looked.unwrap_or_else(|error| Comparison::Barred(NotInspected::failed(error))) {
            Comparison::Different(what) => {
                // Without its host interface the pod is gone, and the orphan collector releases it.
                let name = held.attachment.host_interface();
                let lives = self.pods.run(move |kernel: &mut Kernel| kernel.has_pod(&name)).await;
                if lives.is_ok_and(|lives| lives) { Comparison::Different(what) } else { Comparison::Gone }
            }
            other => other,
        }
    }
}

fn compare(netns: &Path, inside: &PodInterface) -> Comparison {
    let barred = |error: io::Error| match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::ENOENT) => Comparison::Gone,
        Some(Errno::EPERM | Errno::EACCES) => {
            Comparison::Barred(NotInspected::NotAllowed { error: SharedError::new(error) })
        }
        Some(Errno::EINVAL) => Comparison::Barred(NotInspected::NotMounted {
            folder: netns.parent().unwrap_or(netns).to_owned(),
        }),
        _ => Comparison::Barred(NotInspected::failed(error)),
    };
    let opened = namespace::open(netns).and_then(|file| namespace::within(&file, RouteSocket::open));
    let mut socket = match opened {
        Ok(Ok(socket)) => socket,
        Ok(Err(error)) => return Comparison::Barred(NotInspected::failed(error)),
        Err(error) => return barred(error),
    };
    match inside.difference(&mut socket) {
        Ok(None) => Comparison::Same,
        Ok(Some(difference)) => Comparison::Different(difference.to_string()),
        Err(Error::Interrupted(_)) => Comparison::Gone,
        Err(error) => Comparison::Barred(NotInspected::failed(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attachments(count: usize) -> BTreeSet<Attachment> {
        (0..count).map(|number| format!("polder/c{number:03}/eth0").parse().unwrap()).collect()
    }

    #[test]
    fn all_pods_are_inspected_in_turn_and_changed_pods_every_time() {
        let all = attachments(100);
        let mut inspections = PodInspections::default();
        let odd = all.first().unwrap().clone();
        inspections.different.insert(odd.clone(), (1, String::new()));
        let mut seen = BTreeSet::new();
        for _ in 0..all.len().div_ceil(AT_A_TIME) {
            let due = inspections.due(all.iter());
            assert!(due.len() <= AT_A_TIME + 1 && due.contains(&odd), "{due:?}");
            seen.extend(due);
        }
        assert_eq!(seen, all);
    }

    #[test]
    fn on_a_node_with_few_pods_all_are_inspected_every_time() {
        let all = attachments(3);
        let mut inspections = PodInspections::default();
        for _ in 0..3 {
            assert_eq!(inspections.due(all.iter()), all);
        }
    }
}
