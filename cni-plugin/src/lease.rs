//! `polder-ipam`: allocates addresses of Polder's pools for the interfaces of another plugin (CNI specification,
//! section 4).

use std::time::Duration;

use polder_api::client::ClientError;
use polder_api::message::{AddRequest, LeasedAddress, Reply, Request};

use crate::agent::{BadReply, add_request, unexpected};
use crate::call::Call;
use crate::check::check_previous;
use crate::del;
use crate::error::Error;
use crate::result::ipam_result;
use crate::retry::retry;

/// Timeout for the agent's answer: it may have to claim a block first.
const AGENT_TIMEOUT: Duration = Duration::from_secs(30);

/// Allocates addresses for the container's interface.
pub fn add(call: &Call) -> Result<String, Error> {
    // The plugin that creates the interface is responsible for host ports.
    let request = Request::Lease(AddRequest { ports: Vec::new(), ..add_request(call) });
    // Without an answer the outcome of the attempt is unknown: only a DEL undoes it, so do not retry.
    let passes =
        |error: &Error| error.passes() && !matches!(error, Error::Agent(ClientError::NoAnswer { .. }));
    let addresses = retry(passes, || leased(call.network.agent(AGENT_TIMEOUT)?.ask(request.clone())?))?;
    Ok(ipam_result(&call.network.conf, &addresses))
}

/// Releases the addresses. Succeeds if the attachment has no addresses.
pub fn del(call: &Call) -> Result<(), Error> {
    del::interface(call)
}

/// Checks that `prevResult` has the addresses in the ledger. Skips the comparison if the agent is unreachable.
pub fn check(call: &Call) -> Result<(), Error> {
    let request = Request::Leased(call.attachment());
    let asked = call.network.agent(AGENT_TIMEOUT).and_then(|mut agent| leased(agent.ask(request)?));
    match asked {
        Ok(addresses) => check_previous(call, addresses.iter().map(|leased| leased.address.ip())),
        // The agent is unreachable, so the ledger cannot be compared.
        Err(error) if error.passes() => check_previous(call, std::iter::empty()),
        Err(error) => Err(error),
    }
}

fn leased(reply: Reply) -> Result<Vec<LeasedAddress>, Error> {
    match reply {
        Reply::Leased(addresses) if addresses.is_empty() => Err(Error::Refused(BadReply::NoAddress.into())),
        Reply::Leased(addresses) => Ok(addresses),
        other => Err(unexpected(other)),
    }
}
