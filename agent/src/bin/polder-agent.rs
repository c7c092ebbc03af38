//! The daemon of one node.

use std::io::IsTerminal;
use std::process::ExitCode;

use clap::Parser;
use polder_agent::config::{Config, ConfigError, Flags, printed};
use polder_agent::exit::Exit;
use polder_agent::memory;
use tracing::{error, warn};
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    memory::share();
    let flags = Flags::parse();
    let check = flags.check_config || flags.print_config;
    let refuse = |error: ConfigError| {
        let exit = Exit::of_config(&error);
        eprintln!("polder-agent: {:#}", anyhow::Error::from(error));
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
    if check {
        return ExitCode::SUCCESS;
    }
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let colours = std::io::stderr().is_terminal();
    tracing_subscriber::fmt().with_env_filter(filter).with_ansi(colours).with_writer(std::io::stderr).init();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    config.warnings().iter().for_each(|warning| warn!("{warning}"));
    let outcome = runtime.map_err(anyhow::Error::from).and_then(|runtime| {
        let outcome = runtime.block_on(polder_agent::agent::run(config));
        // Threads that wait for the kernel must not keep the process.
        runtime.shutdown_background();
        outcome
    });
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}
