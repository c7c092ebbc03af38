//! Reasons why a node has no further step: it waits, conflicts with another node, or was removed.

use polder_api::{NodeName, PoolName};

use crate::Block;
use crate::cause::{HostError, SharedError};
use crate::claim::NoClaim;
use crate::ids::{ClusterId, Incarnation, MachineId};
use crate::record::Alive;

/// Reason for waiting. The node keeps using what it owns.
#[derive(Debug, Clone, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Waiting {
    /// No records were read yet.
    /// Remedy: none, it is temporary.
    #[error("reading the records")]
    Records,
    /// The datastore is unreachable, with the reason.
    #[error(transparent)]
    Silent(SharedError),
    /// Only the snapshot of an earlier agent is known.
    /// Remedy: check etcd and the network between this node and etcd.
    #[error("datastore unreachable: using the saved snapshot")]
    Away,
    /// The node's record cannot be written yet.
    #[error(transparent)]
    Presence(#[from] NoPresence),
    /// The pool of an owned block does not exist.
    #[error("pool {pool} of this node's block {block} is missing: add it again with polderctl pool add")]
    PoolGone {
        /// Name of the missing pool.
        pool: PoolName,
        /// The node's block in it.
        block: Block,
    },
    /// No block can be claimed.
    #[error(transparent)]
    NoClaim(#[from] NoClaim),
    /// Records were lost; their owners may still restore them.
    /// Remedy: none, it is temporary; find out who restored or emptied etcd.
    #[error("the datastore lost records: no claims until their owners have restored them")]
    HoldOff,
}

/// Why the node's record cannot be written yet.
#[derive(Debug, Clone, PartialEq, Eq, Hash, thiserror::Error)]
pub enum NoPresence {
    /// The node has no underlay address, with the reason.
    #[error(transparent)]
    Underlay(#[from] HostError),
    /// No cluster settings: tunnels and MTU depend on them.
    /// Remedy: start an agent whose configuration has [bootstrap].
    #[error("the cluster has no settings yet")]
    NoSettings,
    /// The node's addresses just changed, and records are validated against them.
    /// Remedy: none, it is temporary.
    #[error("the node's own addresses have just changed")]
    Moving,
}

/// The node conflicts with another node or machine.
#[derive(Debug, Clone, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Conflict {
    /// Two nodes have the same block.
    /// Remedy: drain one of the two nodes: it releases the block when its pods are gone.
    #[error(
        "block {own} of this node's ledger is also claimed by node {by} as {claimed}: no address is assigned \
         until one of the two releases it"
    )]
    Block {
        /// The block in this node's ledger.
        own: Block,
        /// The block of the claim, which overlaps it.
        claimed: Block,
        /// Owner of the claim.
        by: NodeName,
    },
    /// The ledger is from another cluster.
    #[error(
        "the state directory belongs to cluster {ledger}, but the datastore holds cluster {store}: configure \
         the right datastore, or drain the node and give it another state directory"
    )]
    Cluster {
        /// Cluster id in the ledger.
        ledger: ClusterId,
        /// Cluster id in the datastore.
        store: ClusterId,
    },
    /// The ledger belongs to another node name.
    #[error(
        "the state directory belongs to node {ledger}, but this is {me}: start the agent under its old name, \
         or drain the node and give it another state directory"
    )]
    Name {
        /// Node name in the ledger.
        ledger: NodeName,
        /// Configured name of this node.
        me: NodeName,
    },
    /// The ledger belongs to an earlier node of that name, or to another machine.
    #[error(
        "node {me} is registered as incarnation {registered} ({other}), but the ledger of this machine is of \
         incarnation {ledger}, which is older or belongs to another machine. If no pod runs here, stop the agent, \
         delete its state directory and start it; if the other machine is node {me}, also give this one \
         another name with --node"
    )]
    Incarnation {
        /// This node.
        me: NodeName,
        /// The incarnation registered with the name.
        registered: Incarnation,
        /// Machine id and boot id of the registered node.
        other: Alive,
        /// The incarnation of the ledger.
        ledger: Incarnation,
    },
    /// It is unknown whether the registered machine is alive.
    /// Remedy: check etcd and the network between this node and etcd.
    #[error(
        "node {me} is registered as another machine ({other}), and this node cannot check whether that one is \
         alive while the datastore is unreachable"
    )]
    Unasked {
        /// This node.
        me: NodeName,
        /// Machine id and boot id in its record.
        other: Alive,
    },
    /// Machine id and boot id both differ from the record, and the ledger could be a copy.
    #[error(
        "node {me} is registered as another machine ({other}). This machine ({own}) has the ledger of node \
         {me}, but machine id and boot id both differ: either a restart changed both, or this machine has a \
         copy of its disk. If the other machine is gone for good, run polderctl node adopt {me} on this \
         machine. If both ids change at each restart (kind), set identity = \"ledger\" in the agent's \
         configuration. If this is a copy, stop the agent, delete its state directory, and give it another \
         name with --node"
    )]
    Stranger {
        /// This node.
        me: NodeName,
        /// Machine id and boot id in its record.
        other: Alive,
        /// Machine id and boot id of this machine.
        own: Alive,
    },
    /// The same machine is alive in another boot.
    #[error(
        "node {me} is alive in another boot ({}): if this machine has just been rebooted, this clears within \
         seconds; if it is a clone, give it its own machine id and name",
        other.boot_id
    )]
    OtherBoot {
        /// This node.
        me: NodeName,
        /// The boot that is alive.
        other: Alive,
    },
    /// Another machine with this name is alive.
    #[error(
        "node {me} is alive as another machine ({other}): if this machine has just been restarted with \
         another machine id, this clears within seconds. If the other machine has replaced it, delete the \
         pods that still run here, stop the agent and delete its state directory; if this one is a copy, give \
         it another name with --node"
    )]
    OtherMachine {
        /// This node.
        me: NodeName,
        /// The machine that is alive.
        other: Alive,
    },
    /// The machine is registered under another name.
    #[error(
        "this machine (machine id {machine_id}) is registered as node {registered}: a clone needs its own \
         machine id: rm -f /etc/machine-id /var/lib/dbus/machine-id && systemd-machine-id-setup, and restart \
         the machine; if the node was renamed, remove {registered} with polderctl node remove"
    )]
    Clone {
        /// Machine id of this machine.
        machine_id: MachineId,
        /// The node registered with it.
        registered: NodeName,
    },
    /// The name is registered by another machine, and this machine has no ledger.
    #[error(
        "node {me} is registered as another machine ({other}), and this machine ({own}) has no ledger of it. \
         If the other machine is gone for good, run polderctl node remove {me} --dead on any node, also on \
         this one. If it still runs, run polderctl node remove {me} without --dead: it disconnects its pods \
         and confirms that. In both cases this machine then joins as the new node {me}. To keep the other \
         machine, give this one another name with --node"
    )]
    Taken {
        /// This node.
        me: NodeName,
        /// Machine id and boot id in its record.
        other: Alive,
        /// Machine id and boot id of this machine.
        own: Alive,
    },
}

/// Instruction for the machine of a removed node.
const AGAIN: &str = "To let this machine join again, stop the agent, delete its state directory and start it";

/// A node was removed from its cluster.
#[derive(Debug, Clone, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Removed {
    /// Nothing is left to do.
    #[error(
        "node {node} was removed from the cluster, and its pods on this machine are disconnected. {}{AGAIN}",
        named(node, namesake.as_ref())
    )]
    Done {
        /// Name of the removed node.
        node: NodeName,
        /// The machine registered with the name now, if any.
        namesake: Option<Alive>,
    },
    /// The ledger could be a copy: pods of the removed machine may still run.
    #[error(
        "node {node} was removed from the cluster, and this machine has no pods of it. It cannot confirm \
         for the removed machine ({removed}) that its pods are gone: machine id and boot id both differ, so its \
         ledger could be a copy. If that machine is gone for good, run polderctl node remove {node} --dead \
         --earlier on any node. {AGAIN}"
    )]
    Stranger {
        /// Name of the removed node.
        node: NodeName,
        /// Machine id and boot id in the fence.
        removed: Alive,
    },
    /// The datastore is unreachable.
    #[error(
        "node {0} was removed from the cluster, and its pods on this machine are disconnected. This is not \
         confirmed yet: the datastore is unreachable. {AGAIN}"
    )]
    Unconfirmed(NodeName),
}

fn named(node: &NodeName, namesake: Option<&Alive>) -> String {
    match namesake {
        Some(now) => format!("Another machine is node {node} now ({now}): do not change that one. "),
        None => String::new(),
    }
}
