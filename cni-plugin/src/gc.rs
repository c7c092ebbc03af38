//! GC: deletes the attachments that the runtime no longer lists.

use std::time::Duration;

use polder_api::Attachment;
use polder_api::message::{Collection, Reply, Request};
use polder_api::rule;

use crate::agent::unexpected;
use crate::call::Network;
use crate::delegate;
use crate::environment::Verb;
use crate::error::Error;

/// Timeout for the agent's answer: there may be hundreds of interfaces to delete.
const AGENT_TIMEOUT: Duration = Duration::from_secs(60);

rule! {
    /// Whether a GC without a list of valid attachments is treated as one with an empty list.
    fn no_list_is_an_empty_one() -> bool {
        false
    }
    NoListIsEmptyList => true
}

/// Deletes every attachment of the network that is not in the list of valid ones. Without a list, nothing is deleted.
pub fn gc(network: &Network) -> Result<(), Error> {
    let own = match &network.conf.valid {
        Some(_) => collect(network),
        None if no_list_is_an_empty_one() => collect(network),
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
    match network.agent(AGENT_TIMEOUT)?.ask(Request::Collect(collection))? {
        Reply::Deleted => Ok(()),
        other => Err(unexpected(other)),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::netconf::{NetConf, version};

    #[test]
    fn without_a_list_of_valid_attachments_the_agent_is_not_called() {
        let gc_with = |valid: serde_json::Value| {
            let mut conf =
                json!({"cniVersion": "1.1.0", "name": "n", "type": "polder", "socket": "/nowhere"});
            conf["cni.dev/valid-attachments"] = valid;
            let (version, conf) = version(&conf.to_string()).unwrap();
            let conf = NetConf::read(version, conf).unwrap();
            gc(&Network { conf, path: Vec::new(), trace: None, began: Duration::ZERO })
        };
        assert!(gc_with(serde_json::Value::Null).is_ok());
        assert!(gc_with(json!([])).unwrap_err().to_string().contains("/nowhere"), "it would have been asked");
    }
}
