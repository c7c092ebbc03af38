//! Lets runtimes find the CNI configuration when the node is ready.

use std::sync::Arc;

use tokio::sync::watch;
use tracing::{info, warn};

use crate::board::set_if_changed;
use crate::config::Config;
use crate::conflist::{Conflist, NotWritten};
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

    /// Puts the CNI configuration in place once an ADD would be served, and again whenever it is not there any more.
    pub(super) fn announce(&mut self) {
        if !self.readiness.unannounced().is_empty() {
            return;
        }
        let config = &self.config;
        let conflist = Conflist::new(&config.cni_file, &config.socket, &config.network);
        let file = config.cni_file.display();
        // An agent that starts brings its own text, which may be newer.
        let written = if self.is_done { conflist.keep() } else { conflist.write() };
        let outcome = match written {
            Ok(written) => {
                if written && self.is_done {
                    warn!(%file, "the CNI configuration was deleted or damaged: written again");
                } else if !self.is_done {
                    info!(%file, "ready: the CNI configuration is in place");
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
