//! Listens to the kernel, and rings for whom it concerns.

use std::sync::Arc;
use std::thread;

use polder_netlink::Error;
use polder_netlink::monitor::{Event, Monitor};
use tracing::{debug, warn};

use crate::agent::Agent;
use crate::kernel::state::Device;

/// Starts listening, on a thread of its own that lives as long as the process.
pub fn start(agent: &Arc<Agent>) -> Result<(), Error> {
    let mut monitor = Monitor::open()?;
    let agent = Arc::clone(agent);
    let listen = move || {
        loop {
            match monitor.wait() {
                Ok(events) => events.iter().for_each(|event| ring(&agent, event)),
                Err(error) => {
                    // Nothing is lost for good: every pass reads everything.
                    warn!(%error, "notifications of the kernel are not heard any more");
                    return;
                }
            }
        }
    };
    let spawned = thread::Builder::new().name("monitor".to_owned()).spawn(listen);
    spawned.map(drop).map_err(|source| Error::Socket { action: "start a thread for", source })
}

fn ring(agent: &Agent, event: &Event) {
    match event {
        Event::LinkGone { index, name } => {
            agent.reaper.is_gone(*index);
            if !is_ours(name) {
                agent.underlay_changed.notify_one();
            }
        }
        Event::Link { name, .. } if is_ours(name) => {}
        Event::Link { .. } | Event::Address { .. } | Event::ForeignRoute | Event::Overrun => {
            debug!(?event, "the underlay may have changed");
            agent.underlay_changed.notify_one();
        }
    }
}

fn is_ours(name: &str) -> bool {
    Device::named(name).is_some()
}
