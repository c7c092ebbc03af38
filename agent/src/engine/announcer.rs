//! Lets runtimes find the CNI configuration when the node is ready.

use std::sync::Arc;

use tokio::sync::watch;
use tracing::{info, warn};

use crate::board::set_if_changed;
use crate::config::Config;
use crate::conflist::NotWritten;
use crate::presence;
use crate::readiness::Readiness;

/// Writes the CNI configuration, and tells whether it is in place.
#[derive(Debug)]
pub struct Announcer {
    config: Arc<Config>,
    readiness: Readiness,
    announced: watch::Sender<Result<(), NotWritten>>,
    /// Whether this agent has put it in place.
    is_done: bool,
}

impl Announcer {
    /// One that has not written it yet.
    pub fn new(
        config: Arc<Config>,
        readiness: Readiness,
        announced: watch::Sender<Result<(), NotWritten>>,
    ) -> Self {
        Self { config, readiness, announced, is_done: false }
    }

    /// Takes the CNI configuration away: a node that was removed serves no pod. A runtime that has pods needs it to take them down
    /// (containerd 2.1: "cni plugin not initialized"), so it stays until there are none.
    pub(super) fn withdraw(&mut self) {
        if presence::may_be_there() {
            return;
        }
        let config = &self.config;
        let conflist = config.conflist();
        self.is_done = false;
        match conflist.withdraw() {
            Ok(true) => {
                info!(file = %config.cni_file.display(), "this node was removed: the CNI configuration is deleted");
            }
            Ok(false) => {}
            Err(error) => {
                warn!(file = %config.cni_file.display(), %error, "the CNI configuration is not deleted");
            }
        }
        set_if_changed(&self.announced, Err(NotWritten::NotYet));
    }

    /// Puts the CNI configuration in place once an ADD would be served, and again whenever it is not there any more.
    pub(super) fn announce(&mut self) {
        if !self.readiness.unannounced().is_empty() {
            return;
        }
        let config = &self.config;
        let conflist = config.conflist();
        let file = config.cni_file.display();
        // An agent that starts brings its own text, which may be newer.
        let written = if self.is_done { conflist.keep() } else { conflist.write() };
        let outcome = match written {
            Ok(written) => {
                if written && self.is_done {
                    warn!(%file, "the CNI configuration was deleted or damaged: written again");
                } else if !self.is_done {
                    info!(%file, "ready: the CNI configuration is in place");
                    let additions = conflist.additions();
                    if !additions.is_empty() {
                        info!(%file, plugins = additions.join(", "), "plugins that others have added are kept");
                    }
                    for other in conflist.others() {
                        warn!(other = %other.display(), "an earlier CNI configuration of this agent is beside it: delete it, a runtime takes the first by name");
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
