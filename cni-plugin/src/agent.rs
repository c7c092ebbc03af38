//! Requests to the agent, and errors for unexpected replies.

use polder_api::message::{AddRequest, AddressSource, RefusalKind, Refuse, Reply};

use crate::call::Call;
use crate::error::Error;

/// The reply of the agent cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum BadReply {
    /// The agent sent the reply to another request: plugin and agent are of different releases.
    /// Remedy: install the plugins of the release of polder-agent.
    #[error("unexpected reply from polder-agent: {reply:?}")]
    Unexpected {
        /// The reply.
        reply: Box<Reply>,
    },
    /// The agent knows the attachment of the other plugin, but it has no address.
    /// Remedy: delete the pod; without a controller, also create it again.
    #[error("polder-agent returned no address")]
    NoAddress,
}

impl Refuse for BadReply {
    fn kind(&self) -> RefusalKind {
        match self {
            Self::Unexpected { .. } | Self::NoAddress => RefusalKind::Failed,
        }
    }
}

/// Requests one address of each family, with the pool and addresses that the pod or the network configuration names.
pub(crate) fn own_addresses(call: &Call) -> AddressSource {
    AddressSource::Pools {
        pool: call.options.pool.clone().or_else(|| call.network.conf.pool.clone()),
        addresses: call.options.addresses.clone(),
    }
}

/// The ADD request for an attachment.
pub(crate) fn add_request(call: &Call) -> AddRequest {
    let netns = call.environment.netns.as_deref().map(|path| path.to_string_lossy().into_owned());
    AddRequest {
        attachment: call.attachment(),
        netns: netns.unwrap_or_default(),
        pod: call.environment.arguments.pod.clone(),
        source: own_addresses(call),
        mac: call.options.mac,
        mtu: call.network.conf.mtu,
        ports: call.options.ports.clone(),
    }
}

/// The error for a reply of another type: the agent's refusal, or a protocol error.
pub(crate) fn unexpected(reply: Reply) -> Error {
    Error::Refused(match reply {
        Reply::Refused(refusal) => refusal,
        other => BadReply::Unexpected { reply: Box::new(other) }.into(),
    })
}
