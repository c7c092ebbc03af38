//! The daemon of one node.

use std::env;
use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::bail;
use clap::{Parser, Subcommand};
use polder_agent::config::{Config, ConfigError, Flags, printed};
use polder_agent::exit::{AGENT_HELP, Exit};
use polder_agent::{dry_run, memory, plugins, systemd};
use tokio::signal::unix::{SignalKind, signal};
use tracing::{error, warn};
use tracing_subscriber::EnvFilter;

/// The daemon of one node of a Polder network.
///
/// Each key of the configuration file can also be set by an environment variable: `POLDER__` and the key, with `__` between the
/// levels, like `POLDER__UNDERLAY__INTERFACE=eth1`. A flag overrides the variable, the variable the file.
///
/// The log goes to standard error. `RUST_LOG` sets its level: error, warn, info (the default), debug or trace. `NO_COLOR` turns
/// colours off.
#[derive(Debug, Parser)]
#[command(version, after_help = AGENT_HELP, args_conflicts_with_subcommands = true)]
struct Arguments {
    #[command(flatten)]
    flags: Flags,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Copies the CNI plugins polder and polder-ipam to where the container runtime looks for them, and exits
    ///
    /// Puts loopback there, too, where there is none. Each is written under another name and renamed, with its mode: a runtime
    /// finds the old one or the new one. To be run before the agent, which writes the CNI configuration that names them.
    InstallPlugins {
        /// Where the container runtime looks for plugins
        #[arg(long, value_name = "DIR", default_value = plugins::USUAL_FOLDER)]
        to: PathBuf,
        /// Where the plugins are [default: the folder of polder-agent itself]
        #[arg(long, value_name = "DIR")]
        from: Option<PathBuf>,
    },
}

fn main() -> ExitCode {
    memory::share();
    let Arguments { flags, command } = Arguments::parse();
    match command {
        Some(Command::InstallPlugins { to, from }) => install_plugins(from, to),
        None => serve(flags),
    }
}

/// What the log level is unless the variable says otherwise.
const LEVEL: &str = "info";

/// Writes the log to standard error, in colours on a terminal.
fn start_log() {
    let wanted = env::var(EnvFilter::DEFAULT_ENV).ok().filter(|text| !text.is_empty());
    let (filter, unusable) = match wanted.map(|text| EnvFilter::try_new(&text).map_err(|error| (text, error)))
    {
        None => (EnvFilter::new(LEVEL), None),
        Some(Ok(filter)) => (filter, None),
        Some(Err(unusable)) => (EnvFilter::new(LEVEL), Some(unusable)),
    };
    // https://no-color.org
    let is_plain = env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    let colours = std::io::stderr().is_terminal() && !is_plain;
    tracing_subscriber::fmt().with_env_filter(filter).with_ansi(colours).with_writer(std::io::stderr).init();
    if let Some((text, error)) = unusable {
        warn!(
            "environment variable RUST_LOG: {text:?} is no filter ({error}): the level is {LEVEL}. Write a level, like debug, or \
             polder_agent=debug,warn"
        );
    }
}

fn install_plugins(from: Option<PathBuf>, to: PathBuf) -> ExitCode {
    match plugins::install(from.as_deref(), &to) {
        Ok(written) => {
            written.iter().for_each(|path| println!("{} is installed", path.display()));
            if written.is_empty() {
                println!("the plugins in {} are the same already", to.display());
            }
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("polder-agent: {:#}", anyhow::Error::from(error));
            ExitCode::FAILURE
        }
    }
}

fn plan(config: Config) -> ExitCode {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let planned = runtime.map_err(anyhow::Error::from).and_then(|runtime| {
        // However it ends, its copies of the ledger and the records go with it.
        let planned = runtime.block_on(async {
            let mut terminate = signal(SignalKind::terminate())?;
            tokio::select! {
                planned = dry_run::run(config) => planned,
                _ = terminate.recv() => bail!("terminated"),
                _ = tokio::signal::ctrl_c() => bail!("interrupted"),
            }
        });
        runtime.shutdown_background();
        planned
    });
    match planned {
        Ok(planned) => {
            println!("{planned}");
            Exit::of_look(planned.would_serve()).into()
        }
        Err(error) => {
            eprintln!("polder-agent: {error:#}");
            Exit::Failed.into()
        }
    }
}

fn serve(flags: Flags) -> ExitCode {
    // Whoever asks a question is no service, and systemd would not start it again.
    let check = flags.check_config || flags.print_config || flags.plan;
    let refuse = |error: ConfigError| {
        let exit = Exit::of_config(&error);
        let why = format!("{:#}", anyhow::Error::from(error));
        eprintln!("polder-agent: {why}");
        if !check {
            // Every user can read it, and the reason can quote a secret.
            systemd::failed("the configuration is wrong: journalctl -u polder-agent says where");
        }
        // EX_CONFIG of sysexits.h: a restart does not help.
        if check { exit.into() } else { ExitCode::from(78) }
    };
    if flags.print_config {
        match printed(&flags) {
            Ok(text) => print!("{text}"),
            Err(error) => return refuse(error),
        }
    }
    let config = match Config::load(&flags) {
        Ok(config) => config,
        Err(error) => return refuse(error),
    };
    if check {
        config.warnings().iter().for_each(|warning| eprintln!("polder-agent: warning: {warning}"));
    }
    if flags.check_config {
        eprintln!("polder-agent: the configuration is fine");
    }
    if flags.plan {
        return plan(config);
    }
    if check {
        return ExitCode::SUCCESS;
    }
    start_log();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    config.warnings().iter().for_each(|warning| warn!("{warning}"));
    let outcome = runtime.map_err(anyhow::Error::from).and_then(|runtime| {
        let outcome = runtime.block_on(polder_agent::daemon::run(config));
        // Threads that wait for the kernel must not keep the process.
        runtime.shutdown_background();
        outcome
    });
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            error!("{error:#}");
            systemd::failed(&format!("{error:#}"));
            ExitCode::FAILURE
        }
    }
}
