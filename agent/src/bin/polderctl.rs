//! `polderctl`: sends a command to the agent of this node and prints the answer.

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{CommandFactory, Parser};
use polder_agent::ctl::credentials::CredentialArguments;
use polder_agent::ctl::{Command, CommandOutput, OutputFormat, Run, Session, exit_of};
use polder_agent::exit::{self, Exit};
use tokio::signal::unix::{SignalKind, signal};

/// Inspect and manage a Polder pod network
#[derive(Debug, Parser)]
#[command(name = "polderctl", version, after_help = exit::HELP)]
struct Arguments {
    /// Unix socket of the agent [default: /run/polder/agent.sock]
    #[arg(long, value_name = "PATH", global = true, help_heading = "Global options")]
    socket: Option<PathBuf>,
    /// Output format
    #[arg(short, value_enum, default_value_t = OutputFormat::Table, global = true, help_heading = "Global options")]
    output: OutputFormat,
    #[command(flatten)]
    credentials: CredentialArguments,
    #[command(subcommand)]
    command: Command,
}

/// The output was not written completely.
#[derive(Debug, thiserror::Error)]
enum NotPrinted {
    /// Standard output refused the output, for example because its disk is full.
    /// Remedy: check the target of the redirection. A change that the command made is not undone.
    #[error("cannot write to standard output: {0}")]
    Output(io::Error),
}

fn main() -> ExitCode {
    let Arguments { socket, output, credentials, command } = Arguments::parse();
    let exit = match command.run(&Session::new(socket.as_deref(), output, &credentials)) {
        Ok(CommandOutput { text, exit, waits_for_sigterm }) => {
            match io::stdout().write_all(text.as_bytes()) {
                Ok(()) if waits_for_sigterm => stay().map_or(Exit::Failed, |()| exit),
                Ok(()) => exit,
                // The reader closed the pipe (for example `head`): not an error.
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => exit,
                Err(error) => {
                    eprintln!("polderctl: {}", NotPrinted::Output(error));
                    Exit::Failed
                }
            }
        }
        Err(error) => match exit_of(&error) {
            Exit::Usage => end_with_usage(&error),
            exit => {
                eprintln!("polderctl: {error:#}");
                exit
            }
        },
    };
    exit.into()
}

/// Waits for SIGTERM.
fn stay() -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        signal(SignalKind::terminate())?.recv().await.ok_or(io::ErrorKind::BrokenPipe.into())
    })
}

/// Reports an invalid argument in the format of `clap`, with its exit code, and ends the program.
fn end_with_usage(problem: &anyhow::Error) -> ! {
    Arguments::command().error(ErrorKind::ValueValidation, problem).exit()
}
