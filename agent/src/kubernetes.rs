//! Informs Kubernetes about this node, and reads the node's own Node object.

pub mod api;
pub mod client;
pub mod condition;
pub mod error;
pub mod events;
#[cfg(test)]
mod fixture;
pub mod node_object;
pub mod properties;
pub mod removal;
pub mod retry;
pub mod settings;
pub mod taint;
pub mod task;
mod text;

use self::client::Client;
use self::task::NodeReports;
use crate::reporter::Reporter;
use crate::status;

/// The task of an agent.
pub type Task = task::Task<Client, OnNode>;

/// The node as the task sees it.
#[derive(Debug)]
pub struct OnNode {
    /// Readiness and problems.
    pub reporter: Reporter,
}

impl NodeReports for OnNode {
    fn reasons(&self) -> Vec<String> {
        self.reporter.readiness.reasons()
    }

    async fn problems(&self) -> Vec<String> {
        status::problems(&self.reporter).await
    }
}
