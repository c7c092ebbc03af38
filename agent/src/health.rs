//! The agent's answer to STATUS: whether an ADD would be served. Uses local knowledge only: etcd is not read.

use polder_api::message::{Health, HealthRequest, Needed};
use polder_api::{Family, PoolName};
use polder_ipam::allocator::CoolDown;
use polder_ipam::capacity;
use polder_ipam::ledger::{AttachmentEntry, AttachmentKind};
use polder_ipam::registration::Registration;
use polder_ipam::tasks::could_claim;

use crate::machine::now;
use crate::reporter::Reporter;

/// The node's health for a runtime: why an ADD would be refused
/// ([`NodeState::obstacles`](crate::node_state::NodeState::obstacles)), and for which families no address is available.
pub async fn health(reporter: &Reporter, request: &HealthRequest) -> Health {
    let mut health = Health { unavailable: reporter.node_state().obstacles(), limited: Vec::new() };
    if let Registration::Conflict(reason) = reporter.node_state().registration() {
        health.limited.push(reason.to_string());
    }
    if let Some(pass) = reporter.node_state().pass() {
        health.limited.extend(pass.local_failures.iter().map(ToString::to_string));
    }
    if let (Needed::Addresses(pool), true) = (&request.pools, health.unavailable.is_empty()) {
        health.unavailable = shortfalls(reporter, pool.as_ref()).await;
    }
    // The plugin finds pods by their interfaces in the kernel and cannot recognise those of other plugins. Only the
    // agent knows that these pods run; they would be evicted if STATUS failed.
    let is_lease = |held: &AttachmentEntry| held.kind == AttachmentKind::Lease && !held.leaving;
    if !health.unavailable.is_empty() && reporter.ipam.run(move |ipam| ipam.attachments().any(is_lease)).await
    {
        return Health::default();
    }
    health
}

/// A text for each family in which a new pod would get no address; only for `pool`, if one is given.
pub async fn shortfalls(reporter: &Reporter, pool: Option<&PoolName>) -> Vec<String> {
    let view = reporter.node_state().view();
    let named = pool.and_then(|name| view.pools.get(name)).map(|pool| pool.record.family());
    let families = named.map_or_else(|| view.families(), |family| [family].into());
    let mut shortfalls = Vec::new();
    for family in families {
        shortfalls.extend(exhausted(reporter, family, pool).await);
    }
    shortfalls
}

/// Why no address of that family is available; `None` if one is available.
async fn exhausted(reporter: &Reporter, family: Family, pool: Option<&PoolName>) -> Option<String> {
    let view = reporter.node_state().view();
    let wanted = pool.cloned();
    let (there_is_one, counts) = reporter
        .ipam
        .run(move |ipam| {
            let at = now();
            (
                ipam.could_allocate(family, wanted.as_ref(), CoolDown::Shortest, at),
                ipam.total(family, wanted.as_ref(), at),
            )
        })
        .await;
    if there_is_one {
        return None;
    }
    let why =
        could_claim(&view, &reporter.config.node, &reporter.node_state().properties.labels(), family, pool)
            .err()?;
    Some(format!("{}; {why}. {}", capacity::own_share(family, counts), capacity::REMEDY))
}
