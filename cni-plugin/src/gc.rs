//! GC: takes away what the runtime does not know any more.

use std::time::Duration;

use polder_api::Attachment;
use polder_api::message::{Collection, Reply, Request};

use crate::add::unexpected;
use crate::command::Network;
use crate::delegate;
use crate::environment::Verb;
use crate::error::Error;

/// How long the agent has to answer. There may be hundreds of interfaces to delete.
const AGENT_PATIENCE: Duration = Duration::from_secs(60);

/// Takes away every attachment of the network that is not among the valid ones. Without a list of those nothing is
/// known, and nothing is taken away.
pub fn gc(network: &Network) -> Result<(), Error> {
    let own = match &network.conf.valid {
        Some(_) => collect(network),
        None => Ok(()),
    };
    let delegated = match &network.conf.delegate {
        Some(plugin) => delegate::call(network, plugin, Verb::Gc).map(drop),
        None => Ok(()),
    };
    match (own, delegated) {
        (Err(own), Err(delegated)) => Err(Error::Both(Box::new(own), Box::new(delegated))),
        (own, delegated) => own.and(delegated),
    }
}

fn collect(network: &Network) -> Result<(), Error> {
    let valid = network.conf.valid.iter().flatten().map(|valid| Attachment {
        network: network.conf.name.clone(),
        container: valid.container.clone(),
        interface: valid.interface.clone(),
    });
    let collection = Collection {
        network: network.conf.name.clone(),
        valid: valid.collect(),
        began_ms: u64::try_from(network.began.as_millis()).unwrap_or_default(),
    };
    match network.agent(AGENT_PATIENCE)?.ask(&Request::Collect(collection))? {
        Reply::Deleted => Ok(()),
        other => Err(unexpected(other)),
    }
}
