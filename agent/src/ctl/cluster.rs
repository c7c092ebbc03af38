//! The settings that all nodes share.

use clap::Subcommand;
use polder_api::{Backend, ask};

use super::{Printed, Run, Session};

/// About settings.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Changes them while pods talk; no packet is lost
    Set {
        /// How nodes reach each other's pods: auto, direct or vxlan
        #[arg(long)]
        backend: Backend,
    },
}

impl Run for Command {
    fn run(&self, session: &Session<'_>) -> anyhow::Result<Printed> {
        match self {
            Self::Set { backend } => session.show(ask::ChangeBackend(*backend)),
        }
    }
}
