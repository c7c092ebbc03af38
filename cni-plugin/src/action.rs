//! The actions that can fail: the errors [`Error::Kernel`](crate::error::Error::Kernel) and
//! [`Error::File`](crate::error::Error::File) have the form "cannot", action, cause.

use std::path::PathBuf;

use polder_api::IfName;

/// A netlink request of the plugin, as a verb phrase that follows "cannot".
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KernelAction {
    /// ADD needs a netlink socket in the network namespace of the host.
    /// Remedy: check that the runtime runs the plugin as root; the rest of the message is the kernel's cause.
    #[error("open a netlink socket on the host")]
    OpenHost,
    /// ADD, DEL and CHECK need a netlink socket in the network namespace of the pod.
    /// Remedy: check that the runtime runs the plugin as root; the rest of the message is the kernel's cause.
    #[error("open a netlink socket in the pod's namespace")]
    OpenPod,
    /// ADD creates the veth pair of the pod.
    /// Remedy: correct the kernel's cause at the end of the message; the runtime repeats the ADD.
    #[error("create {host} and {interface} in the pod")]
    CreatePair {
        /// The name of the host end.
        host: IfName,
        /// The name of the pod end.
        interface: IfName,
    },
    /// ADD adds the routes, neighbour entries and FDB entry to the pod.
    /// Remedy: correct the kernel's cause at the end of the message; the runtime repeats the ADD.
    #[error("add the routes, neighbour and FDB entries for {host}")]
    ReachPod {
        /// The name of the host end.
        host: IfName,
    },
    /// ADD limits the bandwidth to the pod: the rate at which the host end of the pair sends.
    /// Remedy: correct the kernel's cause at the end of the message; the runtime repeats the ADD.
    #[error("limit the bandwidth to the pod on {host}")]
    LimitToPod {
        /// The name of the host end.
        host: IfName,
    },
    /// ADD limits the bandwidth from the pod: the rate at which the pod end of the pair sends.
    /// Remedy: correct the kernel's cause at the end of the message; the runtime repeats the ADD.
    #[error("limit the bandwidth of {interface} in the pod")]
    LimitFromPod {
        /// The name of the pod end.
        interface: IfName,
    },
    /// ADD reads an interface of the host.
    /// Remedy: correct the kernel's cause at the end of the message; the runtime repeats the ADD.
    #[error("read interface {name}")]
    ReadInterface {
        /// The name of the interface.
        name: String,
    },
    /// ADD waits until the host end of the pair has a carrier.
    /// Remedy: none, the runtime repeats the ADD; if it persists, check the load of the node.
    #[error("wait for the carrier of {name}")]
    WaitForCarrier {
        /// The name of the host end.
        name: String,
    },
    /// ADD and CHECK read the interface in the network namespace of the pod.
    /// Remedy: correct the kernel's cause at the end of the message; the runtime repeats the call.
    #[error("read interface {interface} in the pod")]
    ReadPodInterface {
        /// The name of the pod end.
        interface: IfName,
    },
    /// ADD sets the addresses, the neighbour entry of the gateway and the routes in the pod.
    /// Remedy: correct the kernel's cause at the end of the message; the runtime repeats the ADD.
    #[error("configure {interface} in the pod")]
    ConfigurePod {
        /// The name of the pod end.
        interface: IfName,
    },
    /// CHECK reads the addresses, neighbour entries, routes and rules in the pod.
    /// Remedy: correct the kernel's cause at the end of the message; the runtime repeats the CHECK.
    #[error("read the network state of the pod")]
    ReadPod,
    /// CHECK reads interfaces and neighbour entries of the host.
    /// Remedy: correct the kernel's cause at the end of the message; the runtime repeats the CHECK.
    #[error("read the host's interfaces")]
    ReadHost,
    /// CHECK reads the bandwidth limit of the host end of the pair.
    /// Remedy: correct the kernel's cause at the end of the message; the runtime repeats the CHECK.
    #[error("read the bandwidth limit of {host}")]
    ReadLimit {
        /// The name of the host end.
        host: String,
    },
    /// CHECK reads the bridge and its FDB entries.
    /// Remedy: correct the kernel's cause at the end of the message; the runtime repeats the CHECK.
    #[error("read the host's bridge")]
    ReadBridge,
    /// CHECK reads Polder's routes of the host.
    /// Remedy: correct the kernel's cause at the end of the message; the runtime repeats the CHECK.
    #[error("read the host's routes")]
    ReadRoutes,
    /// DEL deletes the host end of the pair itself, because the agent is unreachable.
    /// Remedy: correct the kernel's cause at the end of the message; the runtime repeats the DEL.
    #[error("delete {host}")]
    Delete {
        /// The name of the host end.
        host: IfName,
    },
    /// The loopback plugin reads the addresses of lo for its result.
    /// Remedy: correct the kernel's cause at the end of the message; the runtime repeats the ADD.
    #[error("read the addresses of lo in the pod")]
    ReadLoopbackAddresses,
    /// CHECK of the loopback plugin reads whether lo is up.
    /// Remedy: correct the kernel's cause at the end of the message; the runtime repeats the CHECK.
    #[error("read lo in the pod")]
    ReadLoopback,
    /// ADD of the loopback plugin sets lo up, DEL sets it down.
    /// Remedy: correct the kernel's cause at the end of the message; the runtime repeats the call.
    #[error("set lo in the pod up or down")]
    SetLoopback,
    /// STATUS reads whether pods are connected, because an ADD would fail.
    /// Remedy: check that the runtime runs the plugin as root; the rest of the message is the kernel's cause.
    #[error("read this node's interfaces and routes")]
    ReadNode,
}

/// An operation on a file or a namespace, as a verb phrase that follows "cannot".
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FileAction {
    /// ADD marks itself as in progress, in a file beside the agent's socket.
    /// Remedy: check that the directory of the agent's socket (/run/polder) is writable and not full.
    #[error("register this ADD as in progress")]
    Mark,
    /// ADD enables IPv6 on the host end, because new interfaces of this host have it disabled.
    /// Remedy: mount /proc/sys writable for the runtime, or set `net.ipv6.conf.default.disable_ipv6` to 0.
    #[error("set {path} to 0")]
    EnableIpv6 {
        /// The file of the setting.
        path: String,
    },
    /// ADD lets the host end carry packets of the host from 127.0.0.1 to a host port of the pod.
    /// Remedy: mount /proc/sys writable for the runtime.
    #[error("set {path} to 1")]
    AllowLoopback {
        /// The file of the setting.
        path: String,
    },
    /// ADD sets an IPv6 setting of the interface in the pod.
    /// Remedy: correct the kernel's cause at the end of the message; the runtime repeats the ADD.
    #[error("set {path} to {value} in the pod")]
    SetInPod {
        /// The file of the setting.
        path: String,
        /// The value.
        value: &'static str,
    },
    /// DEL reports itself with a tombstone to the agent, which is unreachable.
    /// Remedy: check that the directory of the agent's socket (/run/polder) is writable and not full.
    #[error("write the tombstone {}", path.display())]
    WriteTombstone {
        /// The file.
        path: PathBuf,
    },
    /// The delegated IPAM plugin was found, but cannot be executed.
    /// Remedy: check that the file is executable, and for the CPU architecture of this node.
    #[error("run {}", program.display())]
    RunPlugin {
        /// The file of the plugin.
        program: PathBuf,
    },
}
