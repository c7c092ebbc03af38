//! The commands of `polderctl`. Each is a file with its arguments, its question to the agent and how the answer is printed, and an
//! entry in the list below. What question has which answer is said in [`polder_api::ask`], and what the agent does about it in
//! `server.rs`.

use std::cell::OnceCell;
use std::path::Path;
use std::time::Duration;

use anyhow::anyhow;
use clap::{Subcommand, ValueEnum};
use comfy_table::Table;
use comfy_table::presets::NOTHING;
use polder_api::DEFAULT_SOCKET;
use polder_api::ask::Ask;
use polder_api::client::{AskError, Client};
use polder_api::credentials::EtcdCredentials;
use serde::Serialize;

use self::credentials::{CredentialArguments, NoCredentials};
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

/// Declares the list of commands.
macro_rules! commands {
    ($($(#[$about:meta])* $name:ident($module:ident),)+) => {
        /// A command.
        #[derive(Debug, Subcommand)]
        pub enum Command {
            $($(#[$about])* $name($module::Command),)+
        }

        impl Run for Command {
            fn run(&self, session: &Session<'_>) -> anyhow::Result<Printed> {
                match self {
                    $(Self::$name(command) => command.run(session),)+
                }
            }
        }
    };
}

commands! {
    /// How this node is, and what stands in its way
    Status(status),
    /// Whether the agent does its work, as a liveness probe asks; whether the node is ready is another question
    Live(live),
    /// What the next pass over the kernel would change; nothing, where all is as it should be
    Plan(plan),
    /// Takes away everything that the agent has made on this machine, and puts kernel settings back to what they were
    Uninstall(uninstall),
    /// The nodes of the cluster
    #[command(subcommand)]
    Node(node),
    /// The settings that all nodes share
    #[command(subcommand)]
    Cluster(cluster),
    /// The ranges that pods' addresses come from
    #[command(subcommand)]
    Pool(pool),
    /// The blocks of the pools that nodes have claimed
    #[command(subcommand)]
    Block(block),
    /// Who has which address, whether all is right, and giving one up
    #[command(subcommand)]
    Ipam(ipam),
}

/// Something that can be carried out.
pub trait Run {
    /// Carries it out.
    fn run(&self, session: &Session<'_>) -> anyhow::Result<Printed>;
}

/// An answer that can be printed: as JSON, or for people.
pub trait Render: Serialize {
    /// For people.
    fn table(&self) -> String;

    /// How a command ends that has this answer.
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

/// What was done, in words.
impl Render for String {
    fn table(&self) -> String {
        format!("{self}\n")
    }
}

/// How to print.
#[derive(Debug, Clone, Copy, ValueEnum)]
#[expect(missing_docs, reason = "clap would print them, and every --help a line for each argument")]
pub enum Output {
    Table,
    Json,
}

/// What is to be printed, and how the command ends.
#[derive(Debug)]
pub struct Printed {
    /// The text.
    pub text: String,
    /// How it ends.
    pub exit: Exit,
    /// Whether it only ends when it is told to.
    pub stays: bool,
}

/// An argument that is wrong, whatever the state of the cluster.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Usage(pub String);

/// The end of a command that could not be carried out.
pub fn exit_of(error: &anyhow::Error) -> Exit {
    if error.is::<Usage>() { Exit::Usage } else { Exit::Failed }
}

/// How long the agent has to answer: it asks all nodes, for a check.
const PATIENCE: Duration = Duration::from_secs(60);

/// Who asks, and how the answer is printed.
#[derive(Debug)]
pub struct Session<'a> {
    socket: Option<&'a Path>,
    output: Output,
    arguments: &'a CredentialArguments,
    /// Read once: a password can come from standard input.
    credentials: OnceCell<Option<EtcdCredentials>>,
}

impl<'a> Session<'a> {
    /// With these arguments.
    pub fn new(socket: Option<&'a Path>, output: Output, arguments: &'a CredentialArguments) -> Self {
        Self { socket, output, arguments, credentials: OnceCell::new() }
    }

    /// Asks the agent. Each question has a connection of its own: the agent does not wait for people.
    fn ask<A: Ask>(&self, ask: A) -> anyhow::Result<A::Answer> {
        let credentials = if A::BY_OPERATOR { self.credentials()? } else { None };
        let socket = self.socket.unwrap_or(Path::new(DEFAULT_SOCKET));
        let client = Client::connect(socket, PATIENCE)?;
        client.with_credentials(credentials).get(ask).map_err(|error| match error {
            AskError::Refused(refusal) => anyhow!(refusal),
            error => anyhow!(error),
        })
    }

    fn credentials(&self) -> anyhow::Result<Option<EtcdCredentials>> {
        if let Some(known) = self.credentials.get() {
            return Ok(known.clone());
        }
        let read = self.arguments.read().map_err(|problem| match problem {
            NoCredentials::Usage(problem) => anyhow!(Usage(problem)),
            NoCredentials::File(problem) => anyhow!(problem),
        })?;
        Ok(self.credentials.get_or_init(|| read).clone())
    }

    /// Prints the answer.
    fn print(&self, answer: &impl Render) -> anyhow::Result<Printed> {
        let text = match self.output {
            Output::Table => answer.table(),
            Output::Json => serde_json::to_string_pretty(answer)? + "\n",
        };
        Ok(Printed { text, exit: answer.exit(), stays: false })
    }

    /// Asks the agent, and prints its answer.
    fn show<A: Ask<Answer: Render>>(&self, ask: A) -> anyhow::Result<Printed> {
        self.print(&self.ask(ask)?)
    }
}

/// What is printed a line each.
fn lines(lines: &[String]) -> String {
    if lines.is_empty() { "nothing\n".to_owned() } else { lines.join("\n") + "\n" }
}

/// A table without lines.
fn table<const COLUMNS: usize>(header: [&str; COLUMNS]) -> Table {
    let mut table = Table::new();
    table.load_style(NOTHING).set_header(header);
    table
}

/// The table as text.
fn print(mut table: Table) -> String {
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
    use polder_api::message::{Question, Refusal, RefusalKind, Reply};

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        credentials: CredentialArguments,
        #[command(subcommand)]
        command: Command,
    }

    /// Carries a command out, with an agent that gives that answer to its only question.
    fn run(arguments: &[&str], reply: Reply) -> anyhow::Result<Printed> {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("agent.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let agent = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let asked: Result<Question, _> = frame::read(&mut stream);
            // Who has found a mistake asks nothing.
            if asked.is_ok() {
                frame::write(&mut stream, &reply).unwrap();
            }
        });
        let line = Line::parse_from([&["polderctl"], arguments].concat());
        let printed = line.command.run(&Session::new(Some(&socket), Output::Table, &line.credentials));
        // An agent that was asked nothing still waits.
        drop(std::os::unix::net::UnixStream::connect(&socket));
        agent.join().unwrap();
        printed
    }

    #[test]
    fn a_refusal_is_a_failure_and_a_wrong_argument_is_not() {
        for kind in [RefusalKind::Invalid, RefusalKind::TryAgain, RefusalKind::Missing] {
            let refused = run(&["pool", "list"], Reply::Refused(Refusal::new(kind, "no"))).unwrap_err();
            assert_eq!(exit_of(&refused), Exit::Failed);
            assert!(format!("{refused:#}").contains("no"), "{refused:#}");
        }
        let done = run(&["pool", "drain", "p"], Reply::Done("pool p is drained".to_owned())).unwrap();
        assert_eq!((done.text.as_str(), done.exit), ("pool p is drained\n", Exit::Fine));
        let wrong = run(&["--etcd-cert", "/nowhere", "pool", "drain", "p"], Reply::Deleted).unwrap_err();
        assert_eq!(exit_of(&wrong), Exit::Usage, "{wrong:#}");
    }

    #[test]
    fn the_files_of_credentials_are_read_for_changes_and_for_no_question() {
        let shown = ["--etcd-cert", "/nowhere", "--etcd-key", "/nowhere"];
        let with = |command: &[&str], reply| run(&[&shown, command].concat(), reply);
        assert_eq!(with(&["pool", "list"], Reply::Pools(Vec::new())).unwrap().exit, Exit::Fine);
        let unread = with(&["pool", "drain", "p"], Reply::Done("drained".to_owned())).unwrap_err();
        assert_eq!(exit_of(&unread), Exit::Failed);
        assert!(format!("{unread:#}").contains("/nowhere"), "{unread:#}");
    }
}
