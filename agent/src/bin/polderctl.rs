//! Asks the agent of this node, and prints what it says.

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::{Parser, Subcommand, ValueEnum};
use polder_agent::ctl;
use polder_agent::ctl::command::{BlockCommand, PoolCommand};
use polder_api::client::Client;
use polder_api::message::{Removal, Reply, Request};
use polder_api::{DEFAULT_SOCKET, NodeName};

/// Looks after a Polder network.
#[derive(Debug, Parser)]
#[command(name = "polderctl", version)]
struct Arguments {
    /// The agent's socket
    #[arg(long, value_name = "PATH", default_value = DEFAULT_SOCKET, global = true)]
    socket: PathBuf,
    /// How to print
    #[arg(short, value_enum, default_value_t = Output::Table, global = true)]
    output: Output,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Output {
    Table,
    Json,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// How this node is, and what stands in its way
    Status,
    /// The nodes of the cluster
    #[command(subcommand)]
    Node(NodeCommand),
    /// The ranges that pods' addresses come from
    #[command(subcommand)]
    Pool(PoolCommand),
    /// The blocks of the pools that nodes have claimed
    #[command(subcommand)]
    Block(BlockCommand),
}

#[derive(Debug, Subcommand)]
enum NodeCommand {
    /// Lists them, and how this node reaches each
    List,
    /// Removes one that is not to come back: it cuts its pods off, and its blocks go back when it has confirmed that
    Remove {
        /// Its name
        name: NodeName,
        /// The node and its pods are gone for good, I know that: do not wait for its confirmation
        #[arg(long)]
        dead: bool,
    },
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(text) => match io::stdout().write_all(text.as_bytes()) {
            Ok(()) => ExitCode::SUCCESS,
            // Whoever reads has read enough.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
            Err(_) => ExitCode::FAILURE,
        },
        Err(error) => {
            eprintln!("polderctl: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> anyhow::Result<String> {
    let request = match &arguments.command {
        Command::Status => Request::Status,
        Command::Node(NodeCommand::List) => Request::Nodes,
        Command::Node(NodeCommand::Remove { name, dead }) => {
            Request::RemoveNode(Removal { node: name.clone(), dead: *dead })
        }
        Command::Pool(command) => command.request(),
        Command::Block(BlockCommand::List) => Request::Blocks,
    };
    let mut client = Client::connect(&arguments.socket, Duration::from_secs(15))
        .context("is polder-agent running on this node, and are you root?")?;
    Ok(match (client.ask(&request)?, arguments.output) {
        (Reply::Status(status), Output::Table) => ctl::status(&status),
        (Reply::Status(status), Output::Json) => serde_json::to_string_pretty(&status)? + "\n",
        (Reply::Nodes(nodes), Output::Table) => ctl::nodes(&nodes),
        (Reply::Nodes(nodes), Output::Json) => serde_json::to_string_pretty(&nodes)? + "\n",
        (Reply::Pools(pools), Output::Table) => ctl::pool::pools(&pools),
        (Reply::Pools(pools), Output::Json) => serde_json::to_string_pretty(&pools)? + "\n",
        (Reply::Blocks(blocks), Output::Table) => ctl::pool::blocks(&blocks),
        (Reply::Blocks(blocks), Output::Json) => serde_json::to_string_pretty(&blocks)? + "\n",
        (Reply::Done(what), Output::Table) => what + "\n",
        (Reply::Done(what), Output::Json) => serde_json::to_string_pretty(&what)? + "\n",
        (Reply::Refused(refusal), _) => bail!(refusal),
        (other, _) => bail!("the agent answered something else: {other:?}"),
    })
}
