//! `polderctl uninstall`: removes everything that the agent created on this machine. Works without the agent.

use std::io;
use std::path::{Path, PathBuf};

use clap::Args;
use polder_api::NodeName;
use serde::Serialize;

use super::{CommandOutput, Render, Run, Session, changes_as_text};
use crate::config::{Flags, NodePaths};
use crate::plugins;
use crate::uninstall::{Attached, uninstall};

/// Arguments of `polderctl uninstall`.
#[derive(Debug, Args)]
pub struct Command {
    /// Configuration file of the agent [default: /etc/polder/agent.toml, if it exists]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// State directory of the agent, if it was started with --state-dir
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// Directory of the CNI configuration, if the agent was started with --cni-conf-dir
    #[arg(long, value_name = "DIR")]
    cni_conf_dir: Option<PathBuf>,
    /// Name of this node, if the agent was started with --node
    #[arg(long, value_name = "NAME")]
    node: Option<NodeName>,
    /// Also disconnect pods that are still attached. Without this flag, uninstall fails if a pod is attached
    #[arg(long)]
    with_pods: bool,
    /// Also delete the CNI plugins from this directory
    #[arg(long, value_name = "DIR")]
    cni_bin_dir: Option<PathBuf>,
    /// After the removal, wait for SIGTERM before exiting. For a DaemonSet, because Kubernetes restarts its containers
    /// when they exit
    #[arg(long)]
    stay: bool,
}

/// The plugins were not deleted, although the uninstall itself is complete.
#[derive(Debug, thiserror::Error)]
enum PluginsNotDeleted {
    /// A file of the plugins cannot be deleted.
    /// Remedy: check that the directory is mounted writable, and run the uninstall again.
    #[error("cannot delete the plugins in {}", folder.display())]
    File {
        /// The directory.
        folder: PathBuf,
        /// The error.
        #[source]
        source: io::Error,
    },
}

/// The steps that were done, one sentence each.
#[derive(Debug, Serialize)]
#[serde(transparent)]
struct Steps(Vec<String>);

impl Render for Steps {
    fn table(&self) -> String {
        changes_as_text(&self.0)
    }
}

impl Run for Command {
    fn run(&self, session: &Session<'_>) -> anyhow::Result<CommandOutput> {
        let places = NodePaths::load(&Flags {
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
                .map_err(|source| PluginsNotDeleted::File { folder: folder.clone(), source })?;
            done.extend(deleted.iter().map(|path| format!("{} is deleted", path.display())));
        }
        Ok(CommandOutput { waits_for_sigterm: self.stay, ..session.render(&Steps(done))? })
    }
}
