//! The labels and addresses of this node, from its configuration and its Node object.
//!
//! The agent keeps the last ones of the Node object in a file, so that a start without the API server changes neither the
//! pools that select the node nor its underlay.

use std::io;
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;

use polder_ipam::membership::NodeObjectState;
use polder_ipam::pool::Labels;
use tokio::sync::watch;
use tracing::warn;

use super::node_object::NodeFacts;
use super::settings::KubernetesConfig;
use crate::file;
use crate::state_dir::NODE_OBJECT;

/// The properties of this node.
#[derive(Debug, Clone)]
pub struct Properties {
    /// Labels in the configuration. They override those of the Node object.
    configured: Labels,
    /// Those of the Node object as last known; empty if it was never read.
    node_object: watch::Receiver<Arc<NodeFacts>>,
}

impl Properties {
    /// Reads the value that the Kubernetes task publishes.
    pub fn new(configured: Labels, node_object: watch::Receiver<Arc<NodeFacts>>) -> Self {
        Self { configured, node_object }
    }

    /// The labels by which pools select the node.
    pub fn labels(&self) -> Labels {
        let mut labels = self.node_object.borrow().labels.clone();
        labels.extend(self.configured.iter().map(|(label, value)| (label.clone(), value.clone())));
        labels
    }

    /// The addresses of the Node object.
    pub fn addresses(&self) -> Vec<IpAddr> {
        self.node_object.borrow().addresses.clone()
    }

    /// What is known of the Node object. `connection` is the configuration of the connection to Kubernetes.
    pub fn node_object(&self, connection: Option<&KubernetesConfig>) -> NodeObjectState {
        match (connection, &self.node_object.borrow().uid) {
            (None, _) => NodeObjectState::NotUsed,
            (Some(_), None) => NodeObjectState::Unknown,
            (Some(_), Some(uid)) => NodeObjectState::Known(uid.clone()),
        }
    }

    /// Receiver of future changes.
    pub fn changes(&self) -> PropertyChanges {
        let mut changes = self.node_object.clone();
        changes.mark_unchanged();
        PropertyChanges(changes)
    }
}

/// Receives changes of the properties.
#[derive(Debug)]
pub struct PropertyChanges(watch::Receiver<Arc<NodeFacts>>);

impl PropertyChanges {
    /// All changes so far are known.
    pub fn mark_unchanged(&mut self) {
        self.0.mark_unchanged();
    }

    /// Waits for a change, without end if the agent does not connect to Kubernetes. Cancel-safe.
    pub async fn changed(&mut self) {
        if self.0.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

/// What the file has. Empty if it does not exist, or cannot be used.
pub fn read(state_dir: &Path) -> NodeFacts {
    let path = state_dir.join(NODE_OBJECT);
    let facts = match std::fs::read(&path) {
        Ok(text) => serde_json::from_slice(&text).map_err(io::Error::other),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return NodeFacts::default(),
        Err(error) => Err(error),
    };
    facts.unwrap_or_else(|error| {
        warn!(path = %path.display(), %error, "ignoring the kept labels and addresses of the Node object");
        NodeFacts::default()
    })
}

/// Replaces the file.
pub fn write(state_dir: &Path, facts: &NodeFacts) {
    let path = state_dir.join(NODE_OBJECT);
    let written = serde_json::to_vec(facts).map_err(io::Error::other);
    if let Err(error) = written.and_then(|text| file::replace(&path, &text, 0o600)) {
        warn!(
            path = %path.display(), %error,
            "cannot keep the labels and addresses of the Node object for a start without the API server"
        );
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn labels(labels: &[(&str, &str)]) -> Labels {
        labels.iter().map(|(label, value)| ((*label).to_owned(), (*value).to_owned())).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn a_configured_label_overrides_that_of_the_node_object() {
        let entry = watch::Sender::default();
        let properties = Properties::new(labels(&[("zone", "a")]), entry.subscribe());
        assert_eq!(properties.labels(), labels(&[("zone", "a")]));
        let mut changes = properties.changes();
        let of_node =
            NodeFacts { labels: labels(&[("zone", "b"), ("disk", "ssd")]), addresses: Vec::new(), uid: None };
        entry.send_replace(Arc::new(of_node));
        assert_eq!(properties.labels(), labels(&[("zone", "a"), ("disk", "ssd")]));
        changes.changed().await;
        drop(entry);
        let waits = tokio::time::timeout(Duration::from_secs(60), changes.changed());
        assert!(waits.await.is_err(), "an entry without a writer changes");
    }

    #[test]
    fn the_last_labels_and_addresses_are_kept_for_the_next_start() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(read(folder.path()), NodeFacts::default());
        let facts = NodeFacts {
            labels: labels(&[("zone", "b")]),
            addresses: vec!["192.0.2.1".parse().unwrap()],
            uid: None,
        };
        write(folder.path(), &facts);
        assert_eq!(read(folder.path()), facts);
        std::fs::write(folder.path().join(NODE_OBJECT), "{").unwrap();
        assert_eq!(read(folder.path()), NodeFacts::default());
    }
}
