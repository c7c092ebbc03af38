//! Informs Kubernetes about this node, and reads the node's own Node object.

pub mod api;
pub mod client;
pub mod error;
pub mod node_object;
pub mod settings;
