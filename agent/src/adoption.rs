//! Lets this machine take the place of another, as the node whose ledger it has: on an operator's word.

use polder_api::NodeName;
use polder_api::message::{Refusal, RefusalKind};
use polder_ipam::record::{Alive, Life};
use polder_ipam::steward;
use polder_ipam::view::Source;
use tokio::sync::watch;
use tracing::warn;

use crate::node::Node;

/// Takes down the operator's word in `adopted`; the registrar acts by it. Says what happens now.
///
/// The word is about the machine that the record names at this moment. It ends with the agent, and with any other
/// machine's taking the node over.
pub async fn adopt(
    node: &Node,
    adopted: &watch::Sender<Option<Alive>>,
    wanted: &NodeName,
) -> Result<String, Refusal> {
    let view = node.board.view();
    if view.source != Source::Store || view.lost.is_some() {
        let why = view.lost.clone().unwrap_or_else(|| "it has not been read yet".to_owned());
        return Err(Refusal::new(RefusalKind::TryAgain, format!("{}: {why}", node.store.name())));
    }
    let failed = |error: &dyn std::error::Error| Refusal::new(RefusalKind::Failed, error.to_string());
    let identity = node.ipam.run(|ipam| ipam.identity()).await.map_err(|error| failed(&error))?;
    let life = node.board.membership.me().life();
    let other = steward::adopt(&view, &node.config.node, wanted, identity.as_ref(), life)
        .map_err(|error| Refusal::new(RefusalKind::Invalid, error.to_string()))?;
    let Some(other) = other else { return Ok(format!("this machine is node {wanted} already")) };
    let words = format!(
        "this machine becomes node {wanted} in place of another ({}), as soon as that one is not alive: see polderctl status",
        Life::from(&other)
    );
    warn!(node = %wanted, machine_id = other.machine_id, boot_id = other.boot_id, "an operator says that this machine is in its place");
    adopted.send_replace(Some(other));
    node.calls.registrar.ring();
    Ok(words)
}
