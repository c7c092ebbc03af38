//! Health and metrics over HTTP, for probes and Prometheus. It only tells.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use anyhow::Context;
use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::get;
use polder_api::status::StoreStatus;
use polder_ipam::pool::Purpose;
use polder_ipam::shortage::Claimed;
use polder_store::writes::Failures;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family as Metrics;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tracing::warn;

use crate::liveness::Threads;
use crate::reporter::Reporter;
use crate::status;

/// Makes the socket.
pub async fn bind(address: SocketAddr) -> anyhow::Result<TcpListener> {
    let hint = || format!("http {address}: cannot listen there, give another address with --http");
    TcpListener::bind(address).await.with_context(hint)
}

/// What it tells.
#[derive(Debug)]
pub struct Task {
    /// The agent's threads.
    pub threads: Threads,
    /// What is known of the node.
    pub reporter: Reporter,
}

impl Task {
    /// Serves for ever.
    pub async fn run(self, listener: TcpListener) {
        let router = Router::new()
            .route("/livez", get(live))
            .route("/readyz", get(ready))
            .route("/metrics", get(metrics))
            .with_state(Arc::new(self));
        if let Err(error) = axum::serve(listener, router).await {
            warn!(%error, "health and metrics are not served any more");
        }
    }
}

/// Whether the agent does its work: what systemd's watchdog is told, too.
async fn live(State(task): State<Arc<Task>>) -> (StatusCode, String) {
    let standstills = task.threads.standstills().await;
    if standstills.is_empty() {
        (StatusCode::OK, "ok\n".to_owned())
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, standstills.join("\n") + "\n")
    }
}

async fn ready(State(task): State<Arc<Task>>) -> (StatusCode, String) {
    let reasons = task.reporter.readiness.reasons();
    if reasons.is_empty() {
        (StatusCode::OK, "ok\n".to_owned())
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, reasons.join("\n") + "\n")
    }
}

async fn metrics(State(task): State<Arc<Task>>) -> (StatusCode, String) {
    let mut text = String::new();
    match encode(&mut text, &registry(&task.reporter).await) {
        Ok(()) => (StatusCode::OK, text),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
    }
}

/// The node's status as gauges. Made for every scrape, so that nothing has to be kept in step.
async fn registry(reporter: &Reporter) -> Registry {
    let status = status::status(reporter).await;
    let mut registry = Registry::with_prefix("polder");
    let mut gauge = |name: &str, help: &str, value: i64| {
        let gauge: Gauge = Gauge::default();
        gauge.set(value);
        registry.register(name, help, gauge);
    };
    let connected = matches!(status.store, StoreStatus::Connected { .. });
    let count = |number: usize| i64::try_from(number).unwrap_or(i64::MAX);
    gauge("ready", "Whether the node is ready", i64::from(status.ready));
    gauge("store_connected", "Whether the cluster's records are current", i64::from(connected));
    let refusing = i64::from(!status.refused_writes.is_empty());
    gauge("store_refusing_writes", "Whether the store refuses writes of this node", refusing);
    gauge("attachments", "Attachments in the ledger", count(status.pods));
    gauge(
        "problems",
        "Records refused, peers unreachable, changes failed, and what others on the host do",
        count(status.problems.len()),
    );
    if let Some(pass) = &status.last_pass {
        gauge("last_pass_writes", "Changes that the last pass made in the kernel", count(pass.writes));
        gauge("last_pass_failures", "Changes that the last pass could not make", count(pass.failures.len()));
    }
    let addresses: Metrics<[(&'static str, String); 2], Gauge> = Metrics::default();
    for block in &status.blocks {
        for (state, number) in [("used", block.used), ("resting", block.resting), ("free", block.free)] {
            let labels = [("pool", block.pool.to_string()), ("state", state.to_owned())];
            addresses.get_or_create(&labels).inc_by(i64::try_from(number).unwrap_or(i64::MAX));
        }
    }
    registry.register("addresses", "Addresses of this node's blocks", addresses);
    register_pools(&mut registry, reporter);
    register_failures(&mut registry, reporter.store.writes().failures());
    register_nodes(&mut registry, reporter);
    registry
}

/// Writes that have failed since the agent started.
fn register_failures(registry: &mut Registry, failures: Failures) {
    let writes: Metrics<[(&'static str, &'static str); 1], Counter> = Metrics::default();
    for (result, number) in [("refused", failures.refused), ("unknown", failures.unknown)] {
        writes.get_or_create(&[("result", result)]).inc_by(number);
    }
    let help = "Writes that the store has refused, or whose outcome is unknown, since the agent started";
    registry.register("store_write_failures", help, writes);
}

/// The cluster's nodes by whether their agents are alive. Absent while the store cannot tell.
fn register_nodes(registry: &mut Registry, reporter: &Reporter) {
    let view = reporter.board().view();
    let leases = reporter.told.leases.borrow().among(|name| view.nodes.contains_key(name));
    if !leases.are_known() {
        return;
    }
    let not_alive = leases.not_alive().count();
    let nodes: Metrics<[(&'static str, String); 1], Gauge> = Metrics::default();
    for (state, number) in [("alive", view.nodes.len() - not_alive), ("not_alive", not_alive)] {
        nodes.get_or_create(&[("state", state.to_owned())]).set(i64::try_from(number).unwrap_or(i64::MAX));
    }
    registry.register("nodes", "Nodes of the cluster, by whether their agents renew their leases", nodes);
}

/// A gauge that may be a fraction, or larger than any whole number that is counted with.
type Fraction = Gauge<f64, AtomicU64>;

/// What is claimed of the pools: an alarm at 80 % leaves time to add one.
fn register_pools(registry: &mut Registry, reporter: &Reporter) {
    let view = reporter.board().view();
    let blocks: Metrics<[(&'static str, String); 2], Fraction> = Metrics::default();
    let ratio: Metrics<[(&'static str, String); 1], Fraction> = Metrics::default();
    for known in view.every_pool().filter(|known| known.record.purpose == Purpose::Blocks) {
        let (pool, name) = (&known.record, known.record.name.to_string());
        let claimed = Claimed::of(&view, pool);
        for (state, number) in
            [("owned", claimed.owned), ("resting", claimed.resting), ("free", claimed.free())]
        {
            #[expect(clippy::cast_precision_loss, reason = "of 2^53 blocks one more or less is none")]
            blocks.get_or_create(&[("pool", name.clone()), ("state", state.to_owned())]).set(number as f64);
        }
        ratio.get_or_create(&[("pool", name)]).set(claimed.ratio());
    }
    registry.register("pool_blocks", "Blocks of each pool in the cluster", blocks);
    registry.register("pool_used_ratio", "Blocks of each pool that are claimed, of all that it has", ratio);
}
