//! What the Kubernetes task needs of the API server. Implemented by the client, and by tests.

use std::future::Future;

use k8s_openapi::api::core::v1::Event;

use super::error::ClientError;
use super::node_object::{NodeObject, ResourceVersion};

/// The agent's own Node as read.
#[derive(Debug, Clone, PartialEq)]
pub struct OwnNode {
    /// The Node, if it exists.
    pub node: Option<NodeObject>,
    /// The version from which a watch continues.
    pub version: ResourceVersion,
}

/// A change of the own Node.
#[derive(Debug, Clone, PartialEq)]
pub enum NodeEvent {
    /// It was created or changed.
    Changed(NodeObject),
    /// It was deleted.
    Deleted(ResourceVersion),
    /// Nothing changed up to this version.
    Bookmark(ResourceVersion),
}

/// Requests about the agent's own Node.
pub trait NodeApi {
    /// A watch on the Node.
    type Watch: NodeWatch + Send;

    /// Reads the Node.
    fn own(&self) -> impl Future<Output = Result<OwnNode, ClientError>> + Send;

    /// Watches the Node from a version. The API server ends the watch after a number of seconds.
    fn watch(
        &self,
        from: &ResourceVersion,
        seconds: u32,
    ) -> impl Future<Output = Result<Self::Watch, ClientError>> + Send;

    /// Changes a condition with a strategic merge patch of the status: conditions are merged by type. Returns the
    /// changed Node.
    fn patch_condition(
        &self,
        patch: &serde_json::Value,
    ) -> impl Future<Output = Result<Option<NodeObject>, ClientError>> + Send;

    /// Changes the Node with a JSON merge patch, whose `resourceVersion` is the precondition. Returns the changed Node.
    fn patch_node(
        &self,
        patch: &serde_json::Value,
    ) -> impl Future<Output = Result<Option<NodeObject>, ClientError>> + Send;

    /// Creates an Event. If one of the same name exists, changes its count and its last time.
    fn put_event(&self, event: &Event) -> impl Future<Output = Result<(), ClientError>> + Send;
}

/// A watch on the agent's own Node.
pub trait NodeWatch {
    /// Waits for the next change. `None`: the API server has ended the watch, at its time or before. Cancel-safe.
    fn next(&mut self) -> impl Future<Output = Result<Option<NodeEvent>, ClientError>> + Send;
}
