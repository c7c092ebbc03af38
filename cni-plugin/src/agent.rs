//! What the agent is asked for, and what its answer means.

use polder_api::message::{AddRequest, AddressSource, Refusal, RefusalKind, Reply};

use crate::call::Call;
use crate::error::Error;

/// One address of each family, as this pod and this network want them.
pub(crate) fn own_addresses(call: &Call) -> AddressSource {
    AddressSource::Pools {
        pool: call.wishes.pool.clone().or_else(|| call.network.conf.pool.clone()),
        addresses: call.wishes.addresses.clone(),
    }
}

/// What the agent is told of an attachment.
pub(crate) fn add_request(call: &Call) -> AddRequest {
    let netns = call.environment.netns.as_deref().map(|path| path.to_string_lossy().into_owned());
    AddRequest {
        attachment: call.attachment(),
        netns: netns.unwrap_or_default(),
        pod: call.environment.arguments.pod.clone(),
        source: own_addresses(call),
        mac: call.wishes.mac,
        mtu: call.network.conf.mtu,
    }
}

/// What an answer is that is not the one that was asked for.
pub(crate) fn unexpected(reply: Reply) -> Error {
    Error::Refused(match reply {
        Reply::Refused(refusal) => refusal,
        other => Refusal::new(RefusalKind::Failed, format!("the agent answered something else: {other:?}")),
    })
}
