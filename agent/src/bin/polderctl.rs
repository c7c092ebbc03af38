//! Asks the agent of this node, and prints what it says.

use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use clap::error::ErrorKind;
use clap::{CommandFactory, Parser, Subcommand, ValueEnum};
use polder_agent::config::{Flags, Places};
use polder_agent::ctl;
use polder_agent::ctl::command::{BlockCommand, IpamCommand, PoolCommand};
use polder_agent::ctl::credentials::{CredentialArguments, NoCredentials};
use polder_agent::exit::{self, Exit};
use polder_agent::plugins;
use polder_agent::uninstall::{Attached, uninstall};
use polder_api::client::Client;
use polder_api::message::{Removal, Reply, Request};
use polder_api::{Backend, DEFAULT_SOCKET, NodeName};
use tokio::signal::unix::{SignalKind, signal};

/// How long the agent has to answer: it asks all nodes, for a check.
const PATIENCE: Duration = Duration::from_secs(60);

/// Looks after a Polder network.
#[derive(Debug, Parser)]
#[command(name = "polderctl", version, after_help = exit::HELP)]
struct Arguments {
    /// The agent's socket [default: /run/polder/agent.sock]
    #[arg(long, value_name = "PATH", global = true)]
    socket: Option<PathBuf>,
    /// How to print
    #[arg(short, value_enum, default_value_t = Output::Table, global = true)]
    output: Output,
    #[command(flatten)]
    credentials: CredentialArguments,
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
    /// What the next pass over the kernel would change; nothing, where all is as it should be
    Plan,
    /// Takes away everything that the agent has made on this machine, and puts kernel settings back to what they were
    Uninstall {
        /// The agent's configuration file [default: /etc/polder/agent.toml, if it is there]
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
        /// The agent's folder of state, if it was started with --state-dir
        #[arg(long, value_name = "DIR")]
        state_dir: Option<PathBuf>,
        /// Where the agent writes the CNI configuration, if it was started with --cni-conf-dir
        #[arg(long, value_name = "DIR")]
        cni_conf_dir: Option<PathBuf>,
        /// The node's name, if the agent was started with --node
        #[arg(long, value_name = "NAME")]
        node: Option<NodeName>,
        /// Cut off the pods that are still attached
        #[arg(long)]
        with_pods: bool,
        /// Delete the plugins from this folder, too
        #[arg(long, value_name = "DIR")]
        cni_bin_dir: Option<PathBuf>,
        /// Do not end when all is done, until told to: for a DaemonSet, which starts again what ends
        #[arg(long)]
        stay: bool,
    },
    /// The nodes of the cluster
    #[command(subcommand)]
    Node(NodeCommand),
    /// The settings that all nodes share
    #[command(subcommand)]
    Cluster(ClusterCommand),
    /// The ranges that pods' addresses come from
    #[command(subcommand)]
    Pool(PoolCommand),
    /// The blocks of the pools that nodes have claimed
    #[command(subcommand)]
    Block(BlockCommand),
    /// Who has which address, whether all is right, and giving one up
    #[command(subcommand)]
    Ipam(IpamCommand),
}

#[derive(Debug, Subcommand)]
enum ClusterCommand {
    /// Changes them while pods talk; no packet is lost
    Set {
        /// How nodes reach each other's pods: auto, direct or vxlan
        #[arg(long)]
        backend: Backend,
    },
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

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let exit = match run(&arguments) {
        Ok((text, exit)) => match io::stdout().write_all(text.as_bytes()) {
            Ok(()) => stay(&arguments.command).map_or(Exit::Failed, |()| exit),
            // Whoever reads has read enough.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => exit,
            Err(error) => {
                eprintln!("polderctl: the answer cannot be written to standard output: {error}");
                Exit::Failed
            }
        },
        Err(error) => {
            eprintln!("polderctl: {error:#}");
            Exit::Failed
        }
    };
    exit.into()
}

/// Waits until it is told to end, if it was asked to stay.
fn stay(command: &Command) -> io::Result<()> {
    if !matches!(command, Command::Uninstall { stay: true, .. }) {
        return Ok(());
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        signal(SignalKind::terminate())?.recv().await.ok_or(io::ErrorKind::BrokenPipe.into())
    })
}

/// Ends the program, because an argument is wrong: says what, as for what `clap` finds.
fn end_with_usage(problem: &str) -> ! {
    Arguments::command().error(ErrorKind::ValueValidation, problem).exit()
}

/// What is printed a line each.
fn lines(lines: &[String], output: Output) -> anyhow::Result<String> {
    Ok(match output {
        Output::Table if lines.is_empty() => "nothing\n".to_owned(),
        Output::Table => lines.join("\n") + "\n",
        Output::Json => serde_json::to_string_pretty(lines)? + "\n",
    })
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

/// What is to be printed, and how the command ends.
fn run(arguments: &Arguments) -> anyhow::Result<(String, Exit)> {
    let request = match &arguments.command {
        Command::Uninstall { config, state_dir, cni_conf_dir, node, with_pods, cni_bin_dir, stay: _ } => {
            let places = Places::load(&Flags {
                config: config.clone(),
                node: node.clone(),
                state_dir: state_dir.clone(),
                socket: arguments.socket.clone(),
                cni_conf_dir: cni_conf_dir.clone(),
                ..Flags::default()
            })?;
            let attached = if *with_pods { Attached::CutOff } else { Attached::Stay };
            let mut done = uninstall(&places, attached)?;
            if let Some(folder) = cni_bin_dir {
                let deleted = plugins::remove(folder)
                    .with_context(|| format!("delete the plugins in {}", folder.display()))?;
                done.extend(deleted.iter().map(|path| format!("{} is deleted", path.display())));
            }
            return Ok((lines(&done, arguments.output)?, Exit::Fine));
        }
        Command::Status => Request::Status,
        Command::Plan => Request::Plan,
        Command::Node(NodeCommand::List) => Request::Nodes,
        Command::Node(NodeCommand::Remove { name, dead, disconnect_pods, earlier }) => {
            let (node, disconnect_pods) = (name.clone(), *disconnect_pods);
            Request::RemoveNode(Removal { node, dead: *dead, disconnect_pods, earlier: *earlier })
        }
        Command::Node(NodeCommand::Adopt { name }) => Request::AdoptNode(name.clone()),
        Command::Cluster(ClusterCommand::Set { backend }) => Request::ChangeBackend(*backend),
        Command::Pool(command) => command.request().unwrap_or_else(|problem| end_with_usage(&problem)),
        Command::Block(BlockCommand::List) => Request::Blocks,
        Command::Ipam(command) => command.request().unwrap_or_else(|problem| end_with_usage(&problem)),
    };
    let credentials = arguments.credentials.read(&request).or_else(|problem| match problem {
        NoCredentials::Usage(problem) => end_with_usage(&problem),
        NoCredentials::File(problem) => Err(anyhow!(problem)),
    })?;
    let socket = arguments.socket.as_deref().unwrap_or(Path::new(DEFAULT_SOCKET));
    let mut client = Client::connect(socket, PATIENCE)
        .context("is polder-agent running on this node, and are you root?")?
        .with_credentials(credentials.clone());
    let mut reply = client.ask(&request)?;
    if let (Reply::Unconfirmed { message, pods }, Request::RemoveNode(removal)) = (&reply, &request) {
        if !confirms(message, *pods)? {
            bail!("{message}");
        }
        let removal = Removal { disconnect_pods: Some(*pods), ..removal.clone() };
        // The agent does not wait for people.
        client = Client::connect(socket, PATIENCE)?.with_credentials(credentials);
        reply = client.ask(&Request::RemoveNode(removal))?;
    }
    let exit = Exit::of(&reply);
    let text = match (reply, arguments.output) {
        (Reply::Status(status), Output::Table) => ctl::status(&status),
        (Reply::Status(status), Output::Json) => serde_json::to_string_pretty(&status)? + "\n",
        (Reply::Planned(changes), output) => lines(&changes, output)?,
        (Reply::Nodes(nodes), Output::Table) => ctl::nodes(&nodes),
        (Reply::Nodes(nodes), Output::Json) => serde_json::to_string_pretty(&nodes)? + "\n",
        (Reply::Pools(pools), Output::Table) => ctl::pool::pools(&pools),
        (Reply::Pools(pools), Output::Json) => serde_json::to_string_pretty(&pools)? + "\n",
        (Reply::Blocks(blocks), Output::Table) => ctl::pool::blocks(&blocks),
        (Reply::Blocks(blocks), Output::Json) => serde_json::to_string_pretty(&blocks)? + "\n",
        (Reply::Done(what), Output::Table) => what + "\n",
        (Reply::Done(what), Output::Json) => serde_json::to_string_pretty(&what)? + "\n",
        (Reply::Shown(shown), Output::Table) => ctl::ipam::shown(&shown),
        (Reply::Shown(shown), Output::Json) => serde_json::to_string_pretty(&shown)? + "\n",
        (Reply::Checked(checked), Output::Table) => ctl::ipam::checked(&checked),
        (Reply::Checked(checked), Output::Json) => serde_json::to_string_pretty(&checked)? + "\n",
        (Reply::Refused(refusal), _) => bail!(refusal),
        (other, _) => bail!("the agent answered something else: {other:?}"),
    };
    Ok((text, exit))
}
