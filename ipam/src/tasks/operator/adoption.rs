//! Lets this machine take the place of another, as the node whose ledger it has.

use polder_api::NodeName;
use polder_api::message::{Refusal, RefusalKind};
use tracing::warn;

use super::{OperatorHost, current, invalid};
use crate::record::{Alive, Life};
use crate::steward;
use crate::tasks::Me;

/// What an operator's word comes to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Adoption {
    /// This machine is that node.
    Already(String),
    /// It becomes that node in place of that machine, once the registrar knows the word.
    InPlaceOf(Alive, String),
}

/// Whether this machine may become the node in place of the one that the records name, by an operator's word.
pub async fn adopt<H: OperatorHost>(host: &H, me: &Me, wanted: &NodeName) -> Result<Adoption, Refusal> {
    let view = current(host)?;
    let identity = host.ledger(|ipam, _| ipam.identity()).await;
    let identity = identity.map_err(|error| Refusal::new(RefusalKind::Failed, error.to_string()))?;
    let other = steward::adopt(&view, &me.name, wanted, identity.as_ref(), me.life()).map_err(invalid)?;
    let Some(other) = other else {
        return Ok(Adoption::Already(format!("this machine is already node {wanted}")));
    };
    let words = format!(
        "this machine becomes node {wanted} and replaces another ({}) as soon as that one is no longer alive: \
         see polderctl status",
        Life::from(&other)
    );
    warn!(node = %wanted, machine_id = %other.machine_id, boot_id = %other.boot_id, "an operator adopts the node on this machine");
    Ok(Adoption::InPlaceOf(other, words))
}
