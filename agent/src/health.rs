//! What the agent says for STATUS: whether an ADD would be served. Answered from what is known here: etcd is not asked.

use polder_api::message::{Health, HealthRequest, Needed};
use polder_api::{Family, PoolName};
use polder_ipam::allocator::Rest;
use polder_ipam::ledger::{Held, Kind};
use polder_ipam::registration::Registration;
use polder_ipam::shortage;
use polder_ipam::tasks::could_claim;

use crate::machine::now;
use crate::reporter::Reporter;

/// How this node is, for a runtime: what an ADD would be refused for ([`Board::obstacles`](crate::board::Board::obstacles)),
/// and whether there is an address for it.
pub async fn health(reporter: &Reporter, request: &HealthRequest) -> Health {
    let mut health = Health { unavailable: reporter.board().obstacles(), limited: Vec::new() };
    if let Registration::Conflict(reason) = reporter.board().registration() {
        health.limited.push(reason.to_string());
    }
    if let Some(pass) = reporter.board().pass() {
        health.limited.extend(pass.local_failures.iter().cloned());
    }
    if let (Needed::Addresses(pool), true) = (&request.pools, health.unavailable.is_empty()) {
        health.unavailable = shortfalls(reporter, pool.as_ref()).await;
    }
    // Interfaces of other plugins cannot be told from others in the kernel, where the plugin looks for pods: that such pods
    // run, and would be evicted if STATUS failed, is known here alone.
    let is_lease = |held: &Held| held.kind == Kind::Lease && !held.leaving;
    if !health.unavailable.is_empty() && reporter.ipam.run(move |ipam| ipam.attachments().any(is_lease)).await
    {
        return Health::default();
    }
    health
}

/// The families of which a new pod would get no address, in words; of that pool, if one is named.
pub async fn shortfalls(reporter: &Reporter, pool: Option<&PoolName>) -> Vec<String> {
    let view = reporter.board().view();
    let named = pool.and_then(|name| view.pools.get(name)).map(|pool| pool.record.family());
    let families = named.map_or_else(|| view.families(), |family| [family].into());
    let mut shortfalls = Vec::new();
    for family in families {
        shortfalls.extend(exhausted(reporter, family, pool).await);
    }
    shortfalls
}

/// Why there is no address of that family, if there is none.
async fn exhausted(reporter: &Reporter, family: Family, pool: Option<&PoolName>) -> Option<String> {
    let view = reporter.board().view();
    let wanted = pool.cloned();
    let (there_is_one, counts) = reporter
        .ipam
        .run(move |ipam| {
            let at = now();
            (
                ipam.could_allocate(family, wanted.as_ref(), Rest::Shortest, at),
                ipam.total(family, wanted.as_ref(), at),
            )
        })
        .await;
    if there_is_one {
        return None;
    }
    let why = could_claim(&view, &reporter.config.node, &reporter.config.labels, family, pool).err()?;
    Some(format!("{}; {why}. {}", shortage::own_share(family, counts), shortage::REMEDY))
}
