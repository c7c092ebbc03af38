//! Types and messages shared by plugin, polderctl and agent.
//!
//! This crate is linked into the CNI plugin, which is executed for every pod, so it stays tiny: serde types,
//! framing and a blocking client, no runtime.

#[macro_use]
mod words;

mod add_mark;
pub mod ask;
mod attachment;
mod backend;
pub mod client;
pub mod credentials;
mod family;
pub mod frame;
pub mod ipam;
mod mac;
pub mod message;
pub mod mutant;
mod name;
pub mod pool;
pub mod status;

pub use add_mark::{AddMark, MarkedAdd, add_marks};
pub use attachment::{Attachment, Pod, is_host_interface, tombstone, tombstones};
pub use backend::{Backend, UnknownBackend};
pub use family::{Family, PerFamily};
pub use mac::{Mac, ParseMacError};
pub use name::{ContainerId, IfName, InvalidName, NetworkName, NodeName, PoolName};
pub use words::UnknownWord;

/// Default path of the agent's socket.
pub const DEFAULT_SOCKET: &str = "/run/polder/agent.sock";

/// The bridge that every pod's traffic passes; it carries the node's gateway addresses.
pub const BRIDGE: &str = "polder0";

/// Name prefix of every host-side pod interface.
pub const POD_INTERFACE_PREFIX: &str = "pld";

/// Host-side interface of the node's probe endpoint with `attach = "bridge"`.
pub const PROBE_INTERFACE: &str = "polder.probe";

/// The same with `attach = "routed"`, where filters match pods by the prefix of their interfaces.
pub const PROBE_INTERFACE_ROUTED: &str = "pldprobe";
