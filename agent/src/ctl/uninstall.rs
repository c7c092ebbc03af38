//! Takes everything away that the agent has made on this machine. The agent is not asked.

use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Args;
use polder_api::NodeName;
use serde::Serialize;

use super::{Printed, Render, Run, Session, lines};
use crate::config::{Flags, Places};
use crate::plugins;
use crate::uninstall::{Attached, uninstall};

/// What is to be taken away.
#[derive(Debug, Args)]
pub struct Command {
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
}

/// What was done.
#[derive(Debug, Serialize)]
#[serde(transparent)]
struct Steps(Vec<String>);

impl Render for Steps {
    fn table(&self) -> String {
        lines(&self.0)
    }
}

impl Run for Command {
    fn run(&self, session: &Session<'_>) -> anyhow::Result<Printed> {
        let places = Places::load(&Flags {
            config: self.config.clone(),
            node: self.node.clone(),
            state_dir: self.state_dir.clone(),
            socket: session.socket.map(Path::to_owned),
            cni_conf_dir: self.cni_conf_dir.clone(),
            ..Flags::default()
        })?;
        let attached = if self.with_pods { Attached::CutOff } else { Attached::Stay };
        let mut done = uninstall(&places, attached)?;
        if let Some(folder) = &self.cni_bin_dir {
            let deleted = plugins::remove(folder)
                .with_context(|| format!("delete the plugins in {}", folder.display()))?;
            done.extend(deleted.iter().map(|path| format!("{} is deleted", path.display())));
        }
        Ok(Printed { stays: self.stay, ..session.print(&Steps(done))? })
    }
}
