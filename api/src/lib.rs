//! Types and messages shared by plugin, polderctl and agent.
//!
//! This crate is linked into the CNI plugin, which is executed for every pod, so it must stay small: serde types,
//! framing and a blocking client, no async runtime.

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
mod port;
pub mod status;

pub use add_mark::{AddMark, MarkedAdd, add_marks};
pub use attachment::{Attachment, Pod, is_host_interface, tombstone, tombstones};
pub use backend::{Backend, UnknownBackend};
pub use family::{Family, PerFamily};
pub use mac::{Mac, ParseMacError};
pub use name::{ContainerId, IfName, InvalidName, NetworkName, NodeName, PoolName};
pub use port::{ParsePortError, PortMapping, TransportProtocol};
pub use words::UnknownWord;

/// Default path of the agent's socket.
pub const DEFAULT_SOCKET: &str = "/run/polder/agent.sock";

/// Name of the bridge. It has the node's gateway addresses and, with `attach = "bridge"`, the pod interfaces as ports.
pub const BRIDGE: &str = "polder0";

/// Name prefix of every host-side pod interface.
pub const POD_INTERFACE_PREFIX: &str = "pld";

/// Host-side interface of the node's probe endpoint with `attach = "bridge"`.
pub const PROBE_INTERFACE: &str = "polder.probe";

/// Host-side interface of the node's probe endpoint with `attach = "routed"`. It has the prefix of the pod interfaces,
/// because filters match pods by this prefix.
pub const PROBE_INTERFACE_ROUTED: &str = "pldprobe";
