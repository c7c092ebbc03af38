//! `polderctl node`: list, remove and adopt nodes of the cluster.

use std::io::{self, IsTerminal};

use clap::Subcommand;
use polder_api::NodeName;
use polder_api::ask::{self, RemovalAnswer};
use polder_api::message::{Refusal, RefusalKind, Removal};
use polder_api::status::NodeStatus;

use super::{CommandOutput, Render, Run, Session, table, table_text};

/// Subcommands of `polderctl node`.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// List the nodes, with the path from this node to each
    List,
    /// Remove a node permanently: it disconnects its pods and confirms this, then its blocks are released
    Remove {
        /// Name of the node
        name: NodeName,
        /// Declare that the machine and its pods are permanently gone: release its blocks without waiting for the node
        /// (refused while the node is alive)
        #[arg(long)]
        dead: bool,
        /// Current number of pods of the node, to confirm that they lose their network (needed if the node is alive and
        /// has pods; at a terminal, the command asks for it)
        #[arg(long, value_name = "NUMBER")]
        disconnect_pods: Option<u64>,
        /// With --dead: declare this for an earlier machine of this name that is already removed; the current node of
        /// this name is not changed
        #[arg(long, requires = "dead")]
        earlier: bool,
    },
    /// Let this machine continue as an existing node. It must have the node's ledger, and the previous machine must be
    /// permanently gone
    ///
    /// Run it on the machine that continues as the node. It is needed if both the machine ID and the boot ID have
    /// changed, because the agent then cannot distinguish a restart from a copied disk. The agent continues as the node
    /// as soon as no other machine with this node name is alive. A machine without the ledger joins as a new node
    /// instead: run polderctl node remove first.
    Adopt {
        /// Name of the node
        name: NodeName,
    },
}

impl Run for Command {
    fn run(&self, session: &Session<'_>) -> anyhow::Result<CommandOutput> {
        match self {
            Self::List => session.show(ask::Nodes),
            Self::Remove { name, dead, disconnect_pods, earlier } => {
                let (node, disconnect_pods) = (name.clone(), *disconnect_pods);
                remove(session, Removal { node, dead: *dead, disconnect_pods, earlier: *earlier })
            }
            Self::Adopt { name } => session.show(ask::AdoptNode(name.clone())),
        }
    }
}

/// Removes a node. If it is alive and has pods, only after the operator has confirmed their number.
fn remove(session: &Session<'_>, removal: Removal) -> anyhow::Result<CommandOutput> {
    let removed = match session.ask(ask::RemoveNode(removal.clone()))? {
        RemovalAnswer::Unconfirmed { message, pods } if confirms(&message, pods)? => {
            session.ask(ask::RemoveNode(Removal { disconnect_pods: Some(pods), ..removal }))?
        }
        removed => removed,
    };
    match removed {
        RemovalAnswer::Done(what) => session.render(&what),
        // The text of the agent, as in its other refusals.
        RemovalAnswer::Unconfirmed { message, .. } => {
            Err(Refusal { kind: RefusalKind::Invalid, message }.into())
        }
    }
}

/// Asks for confirmation at the terminal. Returns false without a terminal.
fn confirms(message: &str, pods: u64) -> anyhow::Result<bool> {
    if !io::stdin().is_terminal() || !io::stdout().is_terminal() {
        return Ok(false);
    }
    eprint!("{message}\nOr type the number of pods to confirm: ");
    let mut typed = String::new();
    io::stdin().read_line(&mut typed)?;
    Ok(typed.trim() == pods.to_string())
}

impl Render for Vec<NodeStatus> {
    fn table(&self) -> String {
        nodes(self)
    }
}

/// Table of the nodes.
fn nodes(nodes: &[NodeStatus]) -> String {
    let header = ["NODE", "ALIVE", "STATE", "UNDERLAY", "GATEWAYS", "BLOCKS", "PATH", "VERSION"];
    let mut table = table(header);
    for node in nodes {
        let join = |items: Vec<String>| if items.is_empty() { "-".to_owned() } else { items.join("\n") };
        let alive = match node.alive {
            Some(true) => "yes",
            Some(false) => "no",
            None => "?",
        };
        let paths = node.paths.iter();
        let paths = paths.map(|path| format!("{} {} {} {}", path.family, path.path, path.via, path.probe));
        table.add_row([
            node.name.to_string(),
            alive.to_owned(),
            node.standing.to_string(),
            join(node.underlay.iter().map(ToString::to_string).collect()),
            join(node.gateways.iter().map(ToString::to_string).collect()),
            join(node.blocks.iter().map(ToString::to_string).collect()),
            join(paths.map(|path| path.trim_end().to_owned()).collect()),
            node.version.clone(),
        ]);
    }
    table_text(table)
}
