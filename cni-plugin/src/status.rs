//! STATUS: whether an ADD would be served.

use std::time::Duration;

use polder_api::message::{Health, HealthRequest, Needed, Reply, Request};

use crate::add::unexpected;
use crate::command::{Network, Program};
use crate::delegate;
use crate::environment::Verb;
use crate::error::Error;

/// How long the agent has to answer. It does so from memory; runtimes ask every few seconds, and hold a lock meanwhile.
const AGENT_PATIENCE: Duration = Duration::from_millis(500);

/// Succeeds if an ADD would be served.
pub fn status(program: Program, network: &Network) -> Result<(), Error> {
    let health = ask(network).map_err(|error| Error::NotAvailable(with_causes(&error)))?;
    // Of running pods only those whose interfaces are ours are known to be well or not.
    if program == Program::Polder && !health.limited.is_empty() {
        return Err(Error::Limited(health.limited.join("; ")));
    }
    if !health.unavailable.is_empty() {
        return Err(Error::NotAvailable(health.unavailable.join("; ")));
    }
    match &network.conf.delegate {
        Some(plugin) => delegate::call(network, plugin, Verb::Status).map(drop),
        None => Ok(()),
    }
}

fn ask(network: &Network) -> Result<Health, Error> {
    let pools = match network.conf.delegate {
        None => Needed::Addresses(network.conf.pool.clone()),
        Some(_) => Needed::Nothing,
    };
    match network.agent(AGENT_PATIENCE)?.ask(&Request::Health(HealthRequest { pools }))? {
        Reply::Health(health) => Ok(health),
        other => Err(unexpected(other)),
    }
}

/// The agent that cannot be asked is the reason here, and what lies behind it is part of it.
fn with_causes(error: &Error) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}
