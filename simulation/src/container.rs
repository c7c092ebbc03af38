//! The containers of the simulated pods.

use polder_api::{Attachment, Pod};
use polder_ipam::ids::BootId;

/// A container, as its runtime records it.
#[derive(Debug, Clone)]
pub struct Container {
    /// The attachment of the container.
    pub attachment: Attachment,
    /// The pod of the container.
    pub pod: Pod,
    /// Whether the pod keeps its address by name.
    pub reserved: bool,
    /// Index of the machine.
    pub machine: usize,
    /// Boot id of the machine when the container was created.
    pub boot_id: BootId,
    /// Whether the container should run.
    pub is_wanted: bool,
    /// Whether the runtime received a successful ADD.
    pub is_attached: bool,
    /// Numbers of the plugins that run for the container.
    pub plugins: Vec<u64>,
}
