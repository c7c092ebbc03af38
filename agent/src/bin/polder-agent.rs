//! The node agent: parses arguments, loads the configuration and starts the daemon.

use std::env;
use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use polder_agent::config::{Config, ConfigError, Flags, printed};
use polder_agent::exit::{AGENT_HELP, Exit};
use polder_agent::{dry_run, memory, plugins, systemd};
use tokio::signal::unix::{SignalKind, signal};
use tracing::{error, warn};
use tracing_subscriber::EnvFilter;

/// Polder node agent: assigns pod addresses and programs this node's routes, tunnels and packet filter
///
/// Each key of the configuration file can also be set by an environment variable: `POLDER__` followed by the key, with
/// `__` between the levels, for example `POLDER__UNDERLAY__INTERFACE=eth1`. A flag overrides the variable, the variable
/// overrides the file.
///
/// Logs go to standard error. Set the level with `RUST_LOG`: error, warn, info (default), debug or trace. Set
/// `NO_COLOR` to turn colours off.
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
    /// Install the CNI plugins polder and polder-ipam into the container runtime's plugin directory, and exit
    ///
    /// Also installs loopback if the directory has no such plugin. Each file is replaced atomically: the runtime always
    /// finds the complete old or the complete new plugin. Run this before the agent, because the agent writes the CNI
    /// configuration that names the plugins.
    InstallPlugins {
        /// Plugin directory of the container runtime
        #[arg(long, value_name = "DIR", default_value = plugins::USUAL_FOLDER)]
        to: PathBuf,
        /// Directory to copy the plugins from [default: the directory of polder-agent]
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

/// Log level if `RUST_LOG` is not set or invalid.
const LEVEL: &str = "info";

/// The crate that exchanges messages with the Kubernetes API server.
const KUBE_CLIENT: &str = "kube_client";

/// Writes the log to standard error, in colours on a terminal.
fn start_log() {
    let wanted = env::var(EnvFilter::DEFAULT_ENV).ok().filter(|text| !text.is_empty());
    let (filter, unusable) = match wanted.map(|text| EnvFilter::try_new(&text).map_err(|error| (text, error)))
    {
        None => (EnvFilter::new(LEVEL), None),
        Some(Ok(filter)) => (filter, None),
        Some(Err(unusable)) => (EnvFilter::new(LEVEL), Some(unusable)),
    };
    // The client of the Kubernetes API server logs each failure, with the answer. The agent reports failures itself.
    let is_wanted = env::var(EnvFilter::DEFAULT_ENV).is_ok_and(|text| text.contains(KUBE_CLIENT));
    let quiet = format!("{KUBE_CLIENT}=off").parse().ok().filter(|_| !is_wanted);
    let filter = quiet.into_iter().fold(filter, EnvFilter::add_directive);
    // https://no-color.org
    let is_plain = env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    let colours = std::io::stderr().is_terminal() && !is_plain;
    tracing_subscriber::fmt().with_env_filter(filter).with_ansi(colours).with_writer(std::io::stderr).init();
    if let Some((text, error)) = unusable {
        warn!(
            "environment variable RUST_LOG: invalid filter {text:?} ({error}), using level {LEVEL}: set a level such \
             as debug, or a filter such as polder_agent=debug,warn"
        );
    }
}

fn install_plugins(from: Option<PathBuf>, to: PathBuf) -> ExitCode {
    match plugins::install(from.as_deref(), &to) {
        Ok(written) => {
            written.iter().for_each(|path| println!("{} is installed", path.display()));
            if written.is_empty() {
                println!("the plugins in {} are already up to date", to.display());
            }
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("polder-agent: {:#}", anyhow::Error::from(error));
            ExitCode::FAILURE
        }
    }
}

/// The plan was not completed.
#[derive(Debug, thiserror::Error)]
enum Stopped {
    /// The program got SIGTERM.
    #[error("terminated by SIGTERM before the plan was complete; nothing was changed: run the command again")]
    Terminated,
    /// The program got SIGINT, for example by Ctrl-C.
    #[error("interrupted by SIGINT before the plan was complete; nothing was changed: run the command again")]
    Interrupted,
}

fn plan(config: Config) -> ExitCode {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let planned = runtime.map_err(anyhow::Error::from).and_then(|runtime| {
        // The dry run works on copies of the ledger and the records; they are dropped however it ends.
        let planned = runtime.block_on(async {
            let mut terminate = signal(SignalKind::terminate())?;
            tokio::select! {
                planned = dry_run::run(config) => planned,
                _ = terminate.recv() => Err(Stopped::Terminated.into()),
                _ = tokio::signal::ctrl_c() => Err(Stopped::Interrupted.into()),
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
    // These flags print an answer and exit: no service, so no message to systemd and no restart.
    let check = flags.check_config || flags.print_config || flags.plan;
    let rejected = |error: ConfigError| {
        let exit = Exit::of_config(&error);
        let why = format!("{:#}", anyhow::Error::from(error));
        eprintln!("polder-agent: {why}");
        if !check {
            // Every user can read this status, and the reason can quote a secret.
            systemd::failed("invalid configuration: for details run journalctl -u polder-agent");
        }
        // EX_CONFIG of sysexits.h: a restart does not help.
        if check { exit.into() } else { ExitCode::from(78) }
    };
    if flags.print_config {
        match printed(&flags) {
            Ok(text) => print!("{text}"),
            Err(error) => return rejected(error),
        }
    }
    let config = match Config::load(&flags) {
        Ok(config) => config,
        Err(error) => return rejected(error),
    };
    if check {
        config.warnings().iter().for_each(|warning| eprintln!("polder-agent: warning: {warning}"));
    }
    if flags.check_config {
        eprintln!("polder-agent: the configuration is valid");
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
