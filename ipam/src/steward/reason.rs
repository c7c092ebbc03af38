//! Why a node has nothing to do: what it waits for, who else is it, or that it was removed.

use polder_api::{NodeName, PoolName};

use crate::Block;
use crate::cause::HostError;
use crate::claim::NoClaim;
use crate::ids::{ClusterId, Incarnation, MachineId};
use crate::record::Alive;

/// What a node waits for. What it owns it may use meanwhile.
#[derive(Debug, Clone, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Waiting {
    /// Nothing was read from the store yet.
    #[error("the records are being read")]
    Records,
    /// Nothing is heard from the store, for that reason.
    #[error("{0}")]
    Silent(String),
    /// Only what an earlier agent wrote down is known.
    #[error("the store is away, going by what was written down")]
    Away,
    /// The node cannot say how it is reached.
    #[error(transparent)]
    Presence(#[from] NoPresence),
    /// Nobody can claim a block of a pool that is not there.
    #[error("pool {pool} of this node's block {block} is gone: add it again with polderctl pool add")]
    PoolGone {
        /// The pool.
        pool: PoolName,
        /// The block, of which addresses are in use.
        block: Block,
    },
    /// There is no block to be had.
    #[error(transparent)]
    NoClaim(#[from] NoClaim),
    /// What is missing in the store may only not be there yet.
    #[error("the store has lost records: nothing is claimed before their owners have put them back")]
    Caution,
}

/// Why a node cannot say yet how it is reached.
#[derive(Debug, Clone, PartialEq, Eq, Hash, thiserror::Error)]
pub enum NoPresence {
    /// It has no address on the underlay, for that reason.
    #[error(transparent)]
    Underlay(#[from] HostError),
    /// The tunnels and the MTU depend on them.
    #[error("the cluster has no settings yet")]
    NoSettings,
    /// Which records can be believed depends on them.
    #[error("the node's own addresses have just changed")]
    Moving,
}

/// Somebody else is who a node says it is.
#[derive(Debug, Clone, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Conflict {
    /// Two nodes have the same addresses.
    #[error(
        "block {own} of this node's ledger is claimed by node {by} as {claimed}: no address is handed out before one of them \
         gives it up"
    )]
    Block {
        /// The block as this node has it.
        own: Block,
        /// The block of the claim.
        claimed: Block,
        /// Whose the claim is.
        by: NodeName,
    },
    /// The ledger is from another cluster.
    #[error(
        "the state folder belongs to cluster {ledger}, and the store holds cluster {store}: point the agent at the right \
         store, or drain the node and give it another folder"
    )]
    Cluster {
        /// That of the ledger.
        ledger: ClusterId,
        /// That of the store.
        store: ClusterId,
    },
    /// The ledger is another node's.
    #[error(
        "the state folder belongs to node {ledger}, and this is {me}: start the agent under its old name, or drain the \
         node and give it another folder"
    )]
    Name {
        /// Whose the ledger is.
        ledger: NodeName,
        /// This node.
        me: NodeName,
    },
    /// The ledger is of an earlier node of that name, or of another.
    #[error(
        "node {me} is registered as incarnation {registered} ({other}), and the ledger of this machine is of incarnation \
         {ledger}, which is older or another machine's. If no pod runs here, stop the agent, delete its state folder and start \
         it; if the other machine is node {me}, give this one another name with --node, too"
    )]
    Incarnation {
        /// This node.
        me: NodeName,
        /// The incarnation that has the name.
        registered: Incarnation,
        /// The machine that it is on.
        other: Alive,
        /// The incarnation of the ledger.
        ledger: Incarnation,
    },
    /// Nobody can say whether the machine of the record lives.
    #[error(
        "node {me} is registered as another machine ({other}), and whether that is alive cannot be asked while the store \
         is away"
    )]
    Unasked {
        /// This node.
        me: NodeName,
        /// The machine of its record.
        other: Alive,
    },
    /// Both ids are others than those of the record, and the ledger could be a copy.
    #[error(
        "node {me} is registered as another machine ({other}). This machine ({own}) has the ledger of node {me}, but both \
         ids are others: it is that node after a restart that changed them, or it has a copy of its disk. If the other machine \
         is gone for good, run polderctl node adopt {me} on this machine. If both ids change at each restart (kind), set \
         identity = \"ledger\" in the agent's configuration. If it is a copy, stop the agent, delete its state folder, and \
         give it another name with --node"
    )]
    Stranger {
        /// This node.
        me: NodeName,
        /// The machine of its record.
        other: Alive,
        /// This machine.
        own: Alive,
    },
    /// The same machine is alive in another boot.
    #[error(
        "node {me} is alive in another boot ({}): if this machine has just been rebooted, that ends within seconds; if it is \
         a clone, give it a machine id and a name of its own",
        other.boot_id
    )]
    OtherBoot {
        /// This node.
        me: NodeName,
        /// What lives.
        other: Alive,
    },
    /// Another machine lives under the name.
    #[error(
        "node {me} is alive as another machine ({other}): if this machine has just been restarted with another machine id, \
         that ends within seconds. If the other one has taken its place, delete the pods that still run here, stop the agent \
         and delete its state folder; if this one is a copy, give it another name with --node"
    )]
    OtherMachine {
        /// This node.
        me: NodeName,
        /// What lives.
        other: Alive,
    },
    /// The machine is registered under another name.
    #[error(
        "this machine (machine id {machine_id}) is registered as node {registered}: a clone needs a machine id of its own: rm -f \
         /etc/machine-id /var/lib/dbus/machine-id && systemd-machine-id-setup, and restart the machine; if the node was renamed, \
         remove {registered} with polderctl node remove"
    )]
    Clone {
        /// That of this machine.
        machine_id: MachineId,
        /// The node that has it.
        registered: NodeName,
    },
    /// The name is another machine's, and there is no ledger.
    #[error(
        "node {me} is registered as another machine ({other}), and this machine ({own}) has no ledger of it. If the other \
         machine is gone for good, run polderctl node remove {me} --dead on any node, also on this one. If it still runs, run \
         polderctl node remove {me} without --dead: it cuts its pods off and confirms that. Either way this machine then joins \
         as the new node {me}. If the other machine is to stay, give this one another name with --node"
    )]
    Taken {
        /// This node.
        me: NodeName,
        /// The machine of its record.
        other: Alive,
        /// This machine.
        own: Alive,
    },
}

/// What a machine is told that wants to be a node which was removed.
const AGAIN: &str = "To let this machine join again, stop the agent, delete its state folder and start it";

/// A node was removed from its cluster.
#[derive(Debug, Clone, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Removed {
    /// Nothing is left to do.
    #[error(
        "node {node} was removed from the cluster, and its pods on this machine are cut off. {}{AGAIN}",
        named(node, namesake.as_ref())
    )]
    Done {
        /// Its name.
        node: NodeName,
        /// The machine that has the name now.
        namesake: Option<Alive>,
    },
    /// Its ledger could be a copy: the pods of the machine that was removed may live.
    #[error(
        "node {node} was removed from the cluster, and this machine has no pods of it. It cannot confirm for the machine that \
         was removed ({removed}), for both ids are others: its ledger could be a copy. If that machine is gone for good, run \
         polderctl node remove {node} --dead --earlier on any node. {AGAIN}"
    )]
    Stranger {
        /// Its name.
        node: NodeName,
        /// The machine that was removed.
        removed: Alive,
    },
    /// The store is away.
    #[error(
        "node {0} was removed from the cluster, and its pods on this machine are cut off. That is not confirmed yet: the \
         store is away. {AGAIN}"
    )]
    Unconfirmed(NodeName),
}

fn named(node: &NodeName, namesake: Option<&Alive>) -> String {
    match namesake {
        Some(now) => format!("Another machine is node {node} now ({now}): leave that one. "),
        None => String::new(),
    }
}
