//! Reasons why a node has no further step: it waits, conflicts with another node, or was removed.

use polder_api::{NodeName, PoolName};

use super::claim_owner::ClaimOwner;
use crate::Block;
use crate::cause::HostError;
use crate::claim::NoClaim;
use crate::ids::{ClusterId, Incarnation, MachineId};
use crate::record::LeaseRecord;
use crate::store::position::Interruption;

/// Reason for waiting. The node keeps using what it owns.
#[derive(Debug, Clone, PartialEq, Eq, Hash, thiserror::Error)]
pub enum WaitReason {
    /// No records were read yet.
    /// Remedy: none, it is temporary.
    #[error("reading the records from the datastore")]
    Records,
    /// The datastore is unreachable, with the reason.
    #[error(transparent)]
    Unreachable(Interruption),
    /// Only the snapshot of an earlier agent is known.
    #[error(
        "the datastore was not reached since the agent started, using the snapshot on disk: check etcd, and [etcd] in \
         agent.toml"
    )]
    NotReached,
    /// The node's record cannot be written yet.
    #[error(transparent)]
    Presence(#[from] NoPresence),
    /// The pool of an owned block does not exist.
    #[error(
        "pool {pool} of this node's block {block} is missing: add it again with the same range and the same --nodes, \
         polderctl pool add {pool} CIDR --block-length {}",
        block.cidr().length()
    )]
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
    #[error(
        "the datastore lost records: this node claims no block for 60 s, while all nodes restore their records"
    )]
    HoldOff,
}

/// Why the node's record cannot be written yet.
#[derive(Debug, Clone, PartialEq, Eq, Hash, thiserror::Error)]
pub enum NoPresence {
    /// The node has no underlay address, with the reason.
    #[error(transparent)]
    Underlay(#[from] HostError),
    /// No cluster settings: tunnels and MTU depend on them.
    #[error("the cluster has no settings yet: start an agent whose configuration has [bootstrap]")]
    NoSettings,
    /// The node's addresses just changed, and records are validated against them.
    /// Remedy: none, it is temporary.
    #[error("this node's underlay addresses have just changed: the records are checked against them first")]
    Moving,
}

/// The node conflicts with another node or machine.
#[derive(Debug, Clone, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Conflict {
    /// Two nodes have the same block. The remedy depends on the records: whether the other node is a member and alive, was
    /// removed, or has no record.
    #[error(
        "block {own} of this node's ledger overlaps block {claimed}, which node {by} has claimed: this node serves no \
         pods. {}",
        owner.remedy(by, *claimed)
    )]
    Block {
        /// The block in this node's ledger.
        own: Block,
        /// The block of the claim, which overlaps it.
        claimed: Block,
        /// Owner of the claim.
        by: NodeName,
        /// What the records show about that node.
        owner: ClaimOwner,
    },
    /// The ledger is from another cluster.
    #[error(
        "the state directory belongs to cluster {ledger}, but the datastore to cluster {store}: correct [etcd] in \
         agent.toml. To move this node to cluster {store}, drain it with kubectl drain, stop the agent, delete the \
         state directory and start the agent"
    )]
    Cluster {
        /// Cluster id in the ledger.
        ledger: ClusterId,
        /// Cluster id in the datastore.
        store: ClusterId,
    },
    /// The ledger belongs to another node name.
    #[error(
        "the state directory belongs to node {ledger}, but the name of this node is {me}: start the agent with \
         --node {ledger}. To rename the node, drain it with kubectl drain, run polderctl node remove {ledger} while \
         its agent runs with the old name, and wait until polderctl node list shows that its pods are gone. Then stop \
         the agent, delete the state directory and start the agent"
    )]
    Name {
        /// Node name in the ledger.
        ledger: NodeName,
        /// Configured name of this node.
        me: NodeName,
    },
    /// The ledger belongs to an earlier node of that name, or to another machine.
    #[error(
        "the ledger of this machine does not belong to the registered node {me} ({other}): it is older, or from \
         another machine. Delete the pods that still run on this machine, stop the agent, delete its state directory \
         and start it. If the registered machine is to keep the name {me}, start the agent on this machine with --node \
         OTHERNAME. Incarnation of the registered node: {registered}; of the ledger: {ledger}"
    )]
    Incarnation {
        /// This node.
        me: NodeName,
        /// The incarnation registered with the name.
        registered: Incarnation,
        /// Machine id and boot id of the registered node.
        other: LeaseRecord,
        /// The incarnation of the ledger.
        ledger: Incarnation,
    },
    /// It is unknown whether the registered machine is alive.
    #[error(
        "node {me} is registered as another machine ({other}). The datastore is unreachable, so it is unknown whether \
         that machine is alive: check etcd, and [etcd] in agent.toml"
    )]
    Unasked {
        /// This node.
        me: NodeName,
        /// Machine id and boot id in its record.
        other: LeaseRecord,
    },
    /// Machine id and boot id both differ from the record, and the ledger could be a copy.
    #[error(
        "node {me} is registered as another machine ({other}). This machine ({own}) has the ledger of node {me}, but \
         machine id and boot id both differ: (1) if the other machine is permanently gone, run polderctl node adopt \
         {me} on this machine; (2) if both ids change at each restart (kind), set identity = \"ledger\" in agent.toml; \
         (3) if this disk is a copy, stop the agent, delete its state directory and start it with --node OTHERNAME"
    )]
    Stranger {
        /// This node.
        me: NodeName,
        /// Machine id and boot id in its record.
        other: LeaseRecord,
        /// Machine id and boot id of this machine.
        own: LeaseRecord,
    },
    /// The same machine is alive in another boot.
    #[error(
        "node {me} is alive in another boot (boot id {}): (1) if this machine has just been rebooted, wait 15 s until \
         the lease of the previous boot has expired; (2) if this machine is a clone, stop the agent, delete its state \
         directory, run `{NEW_MACHINE_ID}`, reboot, and start the agent with --node OTHERNAME",
        other.boot_id
    )]
    OtherBoot {
        /// This node.
        me: NodeName,
        /// The boot that is alive.
        other: LeaseRecord,
    },
    /// Another machine with this name is alive.
    #[error(
        "node {me} is alive as another machine ({other}): (1) if this machine has just been restarted with a new \
         machine id, wait 15 s until the previous lease has expired; (2) if the other machine has replaced this one, \
         delete the pods that still run on this machine, stop the agent and delete its state directory; (3) if this \
         disk is a copy, stop the agent, delete its state directory and start it with --node OTHERNAME"
    )]
    OtherMachine {
        /// This node.
        me: NodeName,
        /// The machine that is alive.
        other: LeaseRecord,
    },
    /// The machine is registered under another name.
    #[error(
        "this machine (machine id {machine_id}) is registered as node {registered}: (1) if this machine is a clone, \
         run `{NEW_MACHINE_ID}` and reboot; (2) if the node was renamed, run polderctl node remove {registered}"
    )]
    Clone {
        /// Machine id of this machine.
        machine_id: MachineId,
        /// The node registered with it.
        registered: NodeName,
    },
    /// The name is registered by another machine, and this machine has no ledger.
    #[error(
        "node {me} is registered as another machine ({other}), and this machine ({own}) has no ledger of node {me}: \
         (1) if the other machine is permanently gone, run polderctl node remove {me} --dead on any node or on this \
         machine; (2) if the other machine still runs, run polderctl node remove {me}, which disconnects its pods; \
         after (1) or (2), this machine joins as the new node {me}; (3) to keep the other machine, start the agent on \
         this machine with --node OTHERNAME"
    )]
    Taken {
        /// This node.
        me: NodeName,
        /// Machine id and boot id in its record.
        other: LeaseRecord,
        /// Machine id and boot id of this machine.
        own: LeaseRecord,
    },
}

/// Command that replaces the machine id.
const NEW_MACHINE_ID: &str = "rm -f /etc/machine-id /var/lib/dbus/machine-id && systemd-machine-id-setup";

/// Instruction for the machine of a removed node.
const JOIN_AGAIN: &str =
    "To let this machine join again: stop the agent, delete its state directory and start it";

/// A node was removed from its cluster.
#[derive(Debug, Clone, PartialEq, Eq, Hash, thiserror::Error)]
pub enum RemovedState {
    /// Nothing is left to do.
    #[error(
        "node {node} was removed from the cluster, and its pods on this machine are disconnected. {}{JOIN_AGAIN}",
        named(node, namesake.as_ref())
    )]
    Done {
        /// Name of the removed node.
        node: NodeName,
        /// The machine registered with the name now, if any.
        namesake: Option<LeaseRecord>,
    },
    /// The ledger could be a copy: pods of the removed machine may still run.
    #[error(
        "node {node} was removed from the cluster, and this machine has no pods of it. This machine cannot confirm \
         that the pods of the removed machine ({removed}) are gone, because machine id and boot id both differ: if \
         the removed machine is permanently gone, run polderctl node remove {node} --dead --earlier on any node. \
         {JOIN_AGAIN}"
    )]
    Stranger {
        /// Name of the removed node.
        node: NodeName,
        /// Machine id and boot id in the fence.
        removed: LeaseRecord,
    },
    /// The datastore is unreachable.
    #[error(
        "node {0} was removed from the cluster, and its pods on this machine are disconnected. This is not confirmed \
         yet, because the datastore is unreachable: restore access to etcd first. {JOIN_AGAIN}"
    )]
    Unconfirmed(NodeName),
}

fn named(node: &NodeName, namesake: Option<&LeaseRecord>) -> String {
    match namesake {
        Some(now) => {
            format!("The name {node} now belongs to another machine ({now}): do not change that machine. ")
        }
        None => String::new(),
    }
}
