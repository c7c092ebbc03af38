//! Pods whose own side is not as it was wired: looked into from time to time, a few at a time, and named.
//!
//! Nothing of it is repaired. Only whoever is privileged in the pod, or a plugin that runs after ours, can have changed it, and
//! may have meant to: an interface that is switched off and on again takes more with it than was wired. A new pod has all of it.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::Path;
use std::sync::Arc;

use nix::errno::Errno;
use polder_api::Attachment;
use polder_ipam::ledger::{Held, Kind};
use polder_ipam::record::ClusterRecord;
use polder_netlink::inside::Inside;
use polder_netlink::{Error, RouteSocket, namespace};
use polder_store::NodeIpam;
use tokio::task::spawn_blocking;
use tracing::{debug, info};

use crate::board::Membership;
use crate::capability::Capability;
use crate::in_flight::InFlight;
use crate::kernel::Kernel;
use crate::kernel::features::Features;
use crate::owner::Owner;
use crate::wiring::wiring;

/// Pods that are looked into at a time. One takes some 0.3 ms, on a thread that nobody waits for.
const AT_A_TIME: usize = 32;

/// Looks in a row that have to find the same difference: plugins that run after ours change this and that.
const LOOKS: usize = 2;

/// What became of a look into a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Look {
    /// All is as it was wired.
    Same,
    /// Something is not; what.
    Different(String),
    /// The namespace is gone, and its pod with it; or so much changes in it that nothing can be said.
    Gone,
    /// It cannot be looked into; why.
    Barred(String),
}

/// Looks into pods.
#[derive(Debug, Clone)]
pub struct Looker {
    /// The kernel, for what a single pod needs at once.
    pub pods: Owner<Kernel>,
    /// The node's addresses.
    pub ipam: Owner<NodeIpam>,
    /// Attachments that somebody works on.
    pub in_flight: Arc<InFlight>,
    /// Which node it is, and what it has.
    pub membership: Membership,
    /// What the kernel can do.
    pub features: Features,
}

/// What is known of pods' own sides.
#[derive(Debug, Default)]
pub struct Insides {
    /// The last one that was looked into in turn.
    last: Option<Attachment>,
    /// What was different, how often in a row, and what is to be said of it.
    different: BTreeMap<Attachment, (usize, String)>,
    /// Why pods could not be looked into, if that has been said.
    barred: Option<String>,
}

impl Insides {
    /// Looks into some more pods, and again into those that were different. Returns what is to be said of all. Looks into none
    /// where the agent may not: see [`not_looked_at`].
    pub async fn look(&mut self, looker: &Looker, cluster: &ClusterRecord) -> Vec<String> {
        if !Capability::SysAdmin.is_held() {
            return Vec::new();
        }
        let held: Vec<Held> = looker.ipam.run(|ipam| ipam.attachments().cloned().collect()).await;
        let idle: BTreeMap<Attachment, Held> = held
            .into_iter()
            .filter(|held| can_be_looked_into(held) && !looker.in_flight.has(&held.attachment))
            .map(|held| (held.attachment.clone(), held))
            .collect();
        self.different.retain(|attachment, _| idle.contains_key(attachment));
        for attachment in self.due(idle.keys()) {
            let held = &idle[&attachment];
            let found = looker.look_into(cluster, held).await;
            // Somebody may have begun to take it away meanwhile.
            self.take(held, found, !looker.in_flight.has(&held.attachment));
        }
        let certain = self.different.values().filter(|(looks, _)| *looks >= LOOKS);
        certain.map(|(_, problem)| problem.clone()).collect()
    }

    /// Which are to be looked into.
    fn due<'a>(&mut self, all: impl Iterator<Item = &'a Attachment> + Clone) -> BTreeSet<Attachment> {
        let is_next = |attachment: &&Attachment| self.last.as_ref().is_none_or(|last| *attachment > last);
        let mut due: Vec<Attachment> = all.clone().filter(is_next).take(AT_A_TIME).cloned().collect();
        if due.len() < AT_A_TIME {
            // From the beginning again.
            due.extend(all.take(AT_A_TIME - due.len()).cloned());
        }
        self.last = due.last().cloned();
        due.into_iter().chain(self.different.keys().take(AT_A_TIME).cloned()).collect()
    }

    fn take(&mut self, held: &Held, found: Look, is_idle: bool) {
        match found {
            Look::Different(what) if is_idle => {
                let looks = self.different.get(&held.attachment).map_or(0, |(looks, _)| *looks);
                self.different.insert(held.attachment.clone(), (looks + 1, problem(held, &what)));
            }
            Look::Barred(why) => {
                self.different.remove(&held.attachment);
                if self.barred.as_ref() != Some(&why) {
                    info!("pods cannot be looked into, so changes in them are not found: {why}");
                    self.barred = Some(why);
                }
            }
            other => {
                debug!(attachment = %held.attachment, ?other, "looked into a pod");
                self.different.remove(&held.attachment);
            }
        }
    }
}

/// What is not looked at, and why, if the agent may not look into pods.
pub fn not_looked_at() -> Option<String> {
    (!Capability::SysAdmin.is_held()).then(|| {
        format!(
            "pods are not looked at from inside, so what is changed there is not found: needs {} (podInspection of the Helm chart; pod-inspection.conf for the systemd service)",
            Capability::SysAdmin
        )
    })
}

/// Whether it is a pod of ours of which the namespace is known.
pub fn can_be_looked_into(held: &Held) -> bool {
    held.kind == Kind::Pod && !held.leaving && !held.netns.is_empty()
}

/// What is to be said of a pod.
pub fn problem(held: &Held, what: &str) -> String {
    let addresses: Vec<String> = held.addresses.iter().map(ToString::to_string).collect();
    let (pod, remedy) = match &held.pod {
        Some(pod) => (
            format!("pod {pod}"),
            format!("`kubectl delete pod -n {} {}`; whoever made it makes another", pod.namespace, pod.name),
        ),
        None => (format!("the pod of {}", held.attachment), "stop it, and let another be made".to_owned()),
    };
    format!(
        "{pod} ({}) is not as it was wired: {what}. Something in the pod, or a plugin after polder, has changed that, and it may \
         reach nobody. Make the pod anew: {remedy}",
        addresses.join(", ")
    )
}

impl Looker {
    /// Compares the pod's own side with what was wired, which is what CHECK compares, too.
    pub async fn look_into(&self, cluster: &ClusterRecord, held: &Held) -> Look {
        let wiring = wiring(&self.membership, self.features, cluster, held);
        let inside = Inside {
            interface: held.attachment.interface.clone(),
            mac: wiring.mac,
            addresses: wiring.addresses,
            gateway_mac: wiring.gateway_mac,
        };
        let netns = held.netns.clone();
        let looked = spawn_blocking(move || compare(Path::new(&netns), &inside)).await;
        match looked.unwrap_or_else(|error| Look::Barred(error.to_string())) {
            Look::Different(what) => {
                // Without its interface the pod is gone: that is the sweeper's business.
                let name = held.attachment.host_interface();
                let lives = self.pods.run(move |kernel: &mut Kernel| kernel.has_pod(&name)).await;
                if lives.is_ok_and(|lives| lives) { Look::Different(what) } else { Look::Gone }
            }
            other => other,
        }
    }
}

fn compare(netns: &Path, inside: &Inside) -> Look {
    let barred = |error: io::Error| match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::ENOENT) => Look::Gone,
        Some(Errno::EPERM | Errno::EACCES) => {
            Look::Barred(format!("{error}: let the agent have {}", Capability::SysAdmin))
        }
        // A file where the namespace is mounted elsewhere.
        Some(Errno::EINVAL) => Look::Barred(format!(
            "{} is no namespace here: give the agent that folder of the host with mountPropagation HostToContainer",
            netns.parent().unwrap_or(netns).display()
        )),
        _ => Look::Barred(error.to_string()),
    };
    let opened = namespace::open(netns).and_then(|file| namespace::within(&file, RouteSocket::open));
    let mut socket = match opened {
        Ok(Ok(socket)) => socket,
        Ok(Err(error)) => return Look::Barred(error.to_string()),
        Err(error) => return barred(error),
    };
    match inside.difference(&mut socket) {
        Ok(None) => Look::Same,
        Ok(Some(what)) => Look::Different(what),
        Err(Error::Interrupted(_)) => Look::Gone,
        Err(error) => Look::Barred(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attachments(count: usize) -> BTreeSet<Attachment> {
        (0..count).map(|number| format!("polder/c{number:03}/eth0").parse().unwrap()).collect()
    }

    #[test]
    fn all_pods_have_their_turn_and_those_that_were_different_are_looked_into_each_time() {
        let all = attachments(100);
        let mut insides = Insides::default();
        let odd = all.first().unwrap().clone();
        insides.different.insert(odd.clone(), (1, String::new()));
        let mut seen = BTreeSet::new();
        for _ in 0..4 {
            let due = insides.due(all.iter());
            assert!(due.len() <= AT_A_TIME + 1 && due.contains(&odd), "{due:?}");
            seen.extend(due);
        }
        assert_eq!(seen, all);
    }

    #[test]
    fn a_node_with_few_pods_has_all_looked_into_each_time() {
        let all = attachments(3);
        let mut insides = Insides::default();
        for _ in 0..3 {
            assert_eq!(insides.due(all.iter()), all);
        }
    }
}
