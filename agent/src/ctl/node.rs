//! The nodes of the cluster.

use std::io::{self, IsTerminal};

use anyhow::bail;
use clap::Subcommand;
use polder_api::NodeName;
use polder_api::ask::{self, Removed};
use polder_api::message::Removal;
use polder_api::status::NodeStatus;

use super::{Printed, Render, Run, Session, print, table};

/// About nodes.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Lists them, and how this node reaches each
    List,
    /// Removes one that is not to come back: it cuts its pods off, and its blocks go back when it has confirmed that
    Remove {
        /// Its name
        name: NodeName,
        /// The node and its pods are gone for good, I know that: do not wait for its confirmation
        #[arg(long)]
        dead: bool,
        /// How many pods of a living node lose their network: it must be the number that it has now
        #[arg(long, value_name = "NUMBER")]
        disconnect_pods: Option<u64>,
        /// With --dead: say so of a machine that had this name before and was removed, not of the one that has it now
        #[arg(long, requires = "dead")]
        earlier: bool,
    },
    /// Lets this machine take the place of another, as the node of that name, whose ledger it has: the other machine is gone
    /// for good, I know that. To be run on the machine that takes over
    ///
    /// It is needed where machine id and boot id have both changed, so that the agent cannot tell a restart from a copied
    /// disk. The agent takes the node over when no other machine is alive under its name. A machine without the ledger
    /// joins as a new node instead, after polderctl node remove.
    Adopt {
        /// The node's name
        name: NodeName,
    },
}

impl Run for Command {
    fn run(&self, session: &Session<'_>) -> anyhow::Result<Printed> {
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

/// Removes a node. If it is alive and has pods, only after somebody has confirmed their number.
fn remove(session: &Session<'_>, removal: Removal) -> anyhow::Result<Printed> {
    let removed = match session.ask(ask::RemoveNode(removal.clone()))? {
        Removed::Unconfirmed { message, pods } if confirms(&message, pods)? => {
            session.ask(ask::RemoveNode(Removal { disconnect_pods: Some(pods), ..removal }))?
        }
        removed => removed,
    };
    match removed {
        Removed::Done(what) => session.print(&what),
        Removed::Unconfirmed { message, .. } => bail!("{message}"),
    }
}

/// Whether a person at the terminal confirms it. Where there is no terminal there is nobody to ask.
fn confirms(message: &str, pods: u64) -> anyhow::Result<bool> {
    if !io::stdin().is_terminal() || !io::stdout().is_terminal() {
        return Ok(false);
    }
    eprint!("{message}\nOr type the number of pods now: ");
    let mut typed = String::new();
    io::stdin().read_line(&mut typed)?;
    Ok(typed.trim() == pods.to_string())
}

impl Render for Vec<NodeStatus> {
    fn table(&self) -> String {
        nodes(self)
    }
}

/// The nodes of the cluster, for people.
fn nodes(nodes: &[NodeStatus]) -> String {
    let header = ["NODE", "ALIVE", "STANDING", "UNDERLAY", "GATEWAYS", "BLOCKS", "PATH", "VERSION"];
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
    print(table)
}
