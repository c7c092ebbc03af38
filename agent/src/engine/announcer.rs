//! Writes the CNI configuration for container runtimes when the node is ready.

use std::sync::Arc;

use tokio::sync::watch;
use tracing::{info, warn};

use crate::config::Config;
use crate::conflist::NotWritten;
use crate::node_state::set_if_changed;
use crate::presence;
use crate::readiness::Readiness;

/// Writes the CNI configuration, and publishes whether it is in place.
#[derive(Debug)]
pub struct Announcer {
    config: Arc<Config>,
    readiness: Readiness,
    announced: watch::Sender<Result<(), NotWritten>>,
    /// Whether this agent has written it.
    is_done: bool,
}

impl Announcer {
    /// An announcer that has not written the file yet.
    pub fn new(
        config: Arc<Config>,
        readiness: Readiness,
        announced: watch::Sender<Result<(), NotWritten>>,
    ) -> Self {
        Self { config, readiness, announced, is_done: false }
    }

    /// Deletes the CNI configuration of a removed node. A runtime needs it to delete the node's pods (containerd 2.1:
    /// "cni plugin not initialized"), so it stays until no pod is left.
    pub(super) fn withdraw(&mut self) {
        if presence::may_be_there() {
            return;
        }
        let config = &self.config;
        let conflist = config.conflist();
        self.is_done = false;
        match conflist.withdraw() {
            Ok(true) => {
                info!(file = %config.cni_file.display(), "this node was removed: CNI configuration deleted");
            }
            Ok(false) => {}
            Err(error) => {
                let file = config.cni_file.display();
                warn!(%file, %error, "this node was removed: cannot delete the CNI configuration");
            }
        }
        set_if_changed(&self.announced, Err(NotWritten::NotYet));
    }

    /// Writes the CNI configuration once an ADD would be served, and again whenever it is missing.
    pub(super) fn announce(&mut self) {
        if !self.readiness.unannounced().is_empty() {
            return;
        }
        let config = &self.config;
        let conflist = config.conflist();
        let file = config.cni_file.display();
        // A starting agent writes its own version, which may be newer.
        let written = if self.is_done { conflist.keep() } else { conflist.write() };
        let outcome = match written {
            Ok(written) => {
                if written && self.is_done {
                    warn!(%file, "the CNI configuration was deleted or damaged: written again");
                } else if !self.is_done {
                    info!(%file, "ready: the CNI configuration is in place");
                    let additions = conflist.additions();
                    if !additions.is_empty() {
                        info!(%file, plugins = additions.join(", "), "keeping the plugins that other programs added");
                    }
                    for other in conflist.others() {
                        warn!(
                            other = %other.display(),
                            "found an earlier CNI configuration of this agent: delete it, because runtimes use the \
                             first file by name"
                        );
                    }
                }
                self.is_done = true;
                Ok(())
            }
            Err(error) => Err(conflist.not_written(error)),
        };
        let failed = outcome.clone().err();
        if set_if_changed(&self.announced, outcome)
            && let Some(reason) = failed
        {
            warn!("{reason}");
        }
    }
}
