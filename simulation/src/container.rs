//! A container of a pod.

use polder_api::{Attachment, Pod};
use polder_ipam::ids::BootId;

/// A container, as the runtime sees it.
#[derive(Debug, Clone)]
pub struct Container {
    /// Its attachment.
    pub attachment: Attachment,
    /// Its pod.
    pub pod: Pod,
    /// Whether the pod keeps its address by name.
    pub reserved: bool,
    /// On which machine.
    pub machine: usize,
    /// In which boot of it.
    pub boot_id: BootId,
    /// Whether it is to live.
    pub is_wanted: bool,
    /// Whether the runtime was told that it is attached.
    pub is_attached: bool,
    /// The plugins that work for it.
    pub plugins: Vec<u64>,
}
