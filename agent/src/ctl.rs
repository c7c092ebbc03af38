//! The commands of `polderctl`. Each command has an entry in the list below and a file with its arguments, its request
//! to the agent and its output format. [`polder_api::ask`] pairs each request with the type of its answer; `server.rs`
//! handles requests.

use std::cell::OnceCell;
use std::path::Path;
use std::time::Duration;

use clap::{Subcommand, ValueEnum};
use comfy_table::Table;
use comfy_table::presets::NOTHING;
use polder_api::DEFAULT_SOCKET;
use polder_api::ask::Ask;
use polder_api::client::Client;
use polder_api::credentials::EtcdCredentials;
use polder_api::message::Refusal;
use serde::Serialize;

use self::credentials::{CredentialArguments, CredentialUsage, NoCredentials};
use self::ipam::NoSubject;
use crate::exit::Exit;

mod block;
mod cluster;
pub mod credentials;
mod ipam;
mod live;
mod node;
mod plan;
mod pool;
mod status;
mod uninstall;

/// Declares the top-level commands: help text, variant and module of each.
macro_rules! commands {
    ($($(#[$about:meta])* $name:ident($module:ident),)+) => {
        /// A top-level command of `polderctl`.
        #[derive(Debug, Subcommand)]
        pub enum Command {
            $($(#[$about])* $name($module::Command),)+
        }

        impl Run for Command {
            fn run(&self, session: &Session<'_>) -> anyhow::Result<CommandOutput> {
                match self {
                    $(Self::$name(command) => command.run(session),)+
                }
            }
        }
    };
}

commands! {
    /// Show the state of this node: readiness, datastore, underlay, blocks, repairs and problems
    Status(status),
    /// Check that no thread of the agent is stuck, for a liveness probe (does not check whether the node is ready)
    Live(live),
    /// List the changes that the next pass would make to the kernel (none if there is no drift)
    Plan(plan),
    /// Remove everything that the agent created on this machine, and restore the previous kernel settings
    Uninstall(uninstall),
    /// List and remove nodes, or let this machine continue as an existing node
    #[command(subcommand)]
    Node(node),
    /// Show and change the settings that all nodes share
    #[command(subcommand)]
    Cluster(cluster),
    /// List, add, drain and remove pools (the address ranges for pods)
    #[command(subcommand)]
    Pool(pool),
    /// List the blocks that nodes have claimed from pools
    #[command(subcommand)]
    Block(block),
    /// Show, check and release address allocations
    #[command(subcommand)]
    Ipam(ipam),
}

/// A command that can be executed.
pub trait Run {
    /// Executes the command and returns its output and exit code.
    fn run(&self, session: &Session<'_>) -> anyhow::Result<CommandOutput>;
}

/// An answer that can be printed as a table or as JSON.
pub trait Render: Serialize {
    /// The answer as text for people.
    fn table(&self) -> String;

    /// Exit code of a command with this answer.
    fn exit(&self) -> Exit {
        Exit::Fine
    }
}

impl<T: Render> Render for Box<T> {
    fn table(&self) -> String {
        (**self).table()
    }

    fn exit(&self) -> Exit {
        (**self).exit()
    }
}

/// A sentence that reports a completed change.
impl Render for String {
    fn table(&self) -> String {
        format!("{self}\n")
    }
}

/// Output format.
#[derive(Debug, Clone, Copy, ValueEnum)]
#[expect(
    missing_docs,
    reason = "clap prints doc comments of values in every --help, with extra lines for each argument"
)]
pub enum OutputFormat {
    Table,
    Json,
}

/// Output and exit code of a command.
#[derive(Debug)]
pub struct CommandOutput {
    /// Text for standard output.
    pub text: String,
    /// Exit code.
    pub exit: Exit,
    /// Whether the program waits for SIGTERM after printing.
    pub waits_for_sigterm: bool,
}

/// An invalid argument, independent of the state of the cluster.
#[derive(Debug, thiserror::Error)]
pub enum Usage {
    /// The arguments with the operator credentials contradict each other or are incomplete.
    #[error(transparent)]
    Credentials(#[from] CredentialUsage),
    /// The pool to be added is invalid.
    #[error(transparent)]
    Pool(Refusal),
    /// The subject of `polderctl ipam show` is unknown.
    #[error(transparent)]
    Subject(#[from] NoSubject),
}

/// Exit code of a command that failed with this error.
pub fn exit_of(error: &anyhow::Error) -> Exit {
    if error.is::<Usage>() { Exit::Usage } else { Exit::Failed }
}

/// Timeout for an answer of the agent. A check takes longest: the agent asks all nodes.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);

/// Connection and output settings of one `polderctl` call.
#[derive(Debug)]
pub struct Session<'a> {
    socket: Option<&'a Path>,
    output: OutputFormat,
    arguments: &'a CredentialArguments,
    /// Read only once, because a password can come from standard input.
    credentials: OnceCell<Option<EtcdCredentials>>,
}

impl<'a> Session<'a> {
    /// A session with these arguments.
    pub fn new(socket: Option<&'a Path>, output: OutputFormat, arguments: &'a CredentialArguments) -> Self {
        Self { socket, output, arguments, credentials: OnceCell::new() }
    }

    /// Sends a request to the agent. Each request has its own connection, so that none stays open while a user types.
    fn ask<A: Ask>(&self, ask: A) -> anyhow::Result<A::Answer> {
        let credentials = if A::NEEDS_CREDENTIALS { self.credentials()? } else { None };
        let socket = self.socket.unwrap_or(Path::new(DEFAULT_SOCKET));
        let client = Client::connect(socket, ANSWER_TIMEOUT)?;
        Ok(client.with_credentials(credentials).get(ask)?)
    }

    fn credentials(&self) -> anyhow::Result<Option<EtcdCredentials>> {
        if let Some(known) = self.credentials.get() {
            return Ok(known.clone());
        }
        let read = self.arguments.read().map_err(|problem| match problem {
            NoCredentials::Usage(problem) => anyhow::Error::from(Usage::from(problem)),
            NoCredentials::File(problem) => problem.into(),
        })?;
        Ok(self.credentials.get_or_init(|| read).clone())
    }

    /// Formats the answer.
    fn render(&self, answer: &impl Render) -> anyhow::Result<CommandOutput> {
        let text = match self.output {
            OutputFormat::Table => answer.table(),
            OutputFormat::Json => serde_json::to_string_pretty(answer)? + "\n",
        };
        Ok(CommandOutput { text, exit: answer.exit(), waits_for_sigterm: false })
    }

    /// Sends a request to the agent and formats its answer.
    fn show<A: Ask<Answer: Render>>(&self, ask: A) -> anyhow::Result<CommandOutput> {
        self.render(&self.ask(ask)?)
    }
}

/// One change per line, or `nothing to do`.
fn changes_as_text(changes: &[String]) -> String {
    if changes.is_empty() { "nothing to do\n".to_owned() } else { changes.join("\n") + "\n" }
}

/// A table without borders.
fn table<const COLUMNS: usize>(header: [&str; COLUMNS]) -> Table {
    let mut table = Table::new();
    table.load_style(NOTHING).set_header(header);
    table
}

/// The table as text.
fn table_text(mut table: Table) -> String {
    table.column_iter_mut().for_each(|column| {
        column.set_padding((0, 2));
    });
    table.trim_fmt() + "\n"
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::thread;

    use clap::Parser;
    use polder_api::frame;
    use polder_api::message::{Question, RefusalKind, Reply};

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        credentials: CredentialArguments,
        #[command(subcommand)]
        command: Command,
    }

    /// Executes a command against an agent that answers its only request with `reply`.
    fn run(arguments: &[&str], reply: Reply) -> anyhow::Result<CommandOutput> {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("agent.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let agent = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let asked: Result<Question, _> = frame::read(&mut stream);
            // A command with an invalid argument sends no request.
            if asked.is_ok() {
                frame::write(&mut stream, &reply).unwrap();
            }
        });
        let line = Line::parse_from([&["polderctl"], arguments].concat());
        let printed = line.command.run(&Session::new(Some(&socket), OutputFormat::Table, &line.credentials));
        // Unblocks an agent that got no request.
        drop(std::os::unix::net::UnixStream::connect(&socket));
        agent.join().unwrap();
        printed
    }

    #[test]
    fn a_refused_request_exits_as_failed_and_a_wrong_argument_as_usage_error() {
        for kind in [RefusalKind::Invalid, RefusalKind::TryAgain, RefusalKind::Missing] {
            let refused =
                run(&["pool", "list"], Reply::Refused(Refusal { kind, message: "no".into() })).unwrap_err();
            assert_eq!(exit_of(&refused), Exit::Failed);
            assert!(format!("{refused:#}").contains("no"), "{refused:#}");
        }
        let done = run(&["pool", "drain", "p"], Reply::Done("pool p is drained".to_owned())).unwrap();
        assert_eq!((done.text.as_str(), done.exit), ("pool p is drained\n", Exit::Fine));
        let wrong = run(&["--etcd-cert", "/nowhere", "pool", "drain", "p"], Reply::Deleted).unwrap_err();
        assert_eq!(exit_of(&wrong), Exit::Usage, "{wrong:#}");
    }

    #[test]
    fn credential_files_are_read_for_changes_but_not_for_queries() {
        let credential_arguments = ["--etcd-cert", "/nowhere", "--etcd-key", "/nowhere"];
        let run_with_credentials =
            |command: &[&str], reply| run(&[&credential_arguments, command].concat(), reply);
        let listed = run_with_credentials(&["pool", "list"], Reply::Pools(Vec::new())).unwrap();
        assert_eq!(listed.exit, Exit::Fine);
        let unread =
            run_with_credentials(&["pool", "drain", "p"], Reply::Done("drained".to_owned())).unwrap_err();
        assert_eq!(exit_of(&unread), Exit::Failed);
        assert!(format!("{unread:#}").contains("/nowhere"), "{unread:#}");
    }
}
