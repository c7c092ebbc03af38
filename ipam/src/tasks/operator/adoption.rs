//! Lets this machine replace another as the node named in its ledger.

use polder_api::NodeName;
use polder_api::message::{Refusal, RefusalKind, Refuse};
use tracing::warn;

use super::{OperatorHost, current};
use crate::ledger::LedgerError;
use crate::membership::{self, NotAdopted};
use crate::record::{Boot, LeaseRecord};
use crate::tasks::OwnNode;

/// The result of an operator's request to adopt a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Adoption {
    /// This machine already is the node. The text is the answer to the operator.
    AlreadyAdopted(String),
    /// It replaces the machine of this record, once the registrar has the record. The text is the answer to the
    /// operator.
    InPlaceOf(LeaseRecord, String),
}

impl Refuse for NotAdopted {
    fn kind(&self) -> RefusalKind {
        RefusalKind::Invalid
    }
}

impl Refuse for LedgerError {
    fn kind(&self) -> RefusalKind {
        RefusalKind::Failed
    }
}

/// Checks whether this machine may become the node at an operator's request, and replace the machine named in the
/// records.
pub async fn adopt<H: OperatorHost>(host: &H, me: &OwnNode, wanted: &NodeName) -> Result<Adoption, Refusal> {
    let view = current(host)?;
    let identity = host.ledger(|ipam, _| ipam.identity()).await?;
    let other = membership::adopt(&view, &me.name, wanted, identity.as_ref(), me.boot())?;
    let Some(other) = other else {
        return Ok(Adoption::AlreadyAdopted(format!("this machine is already node {wanted}")));
    };
    let message = format!(
        "this machine becomes node {wanted} and replaces another ({}) as soon as that one is no longer alive: \
         see polderctl status",
        Boot::from(&other)
    );
    let LeaseRecord { machine_id, boot_id, .. } = &other;
    warn!(node = %wanted, %machine_id, %boot_id, "an operator adopts the node on this machine");
    Ok(Adoption::InPlaceOf(other, message))
}
