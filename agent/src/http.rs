//! Health and metrics over HTTP, for probes and Prometheus. Read-only.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::get;
use polder_api::status::{FastPathState, FastPathStatus, StoreStatus};
use polder_ipam::capacity::ClaimedCount;
use polder_ipam::pool::Purpose;
use polder_store::writes::Failures;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family as Metrics;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::time::sleep;
use tracing::{info, warn};

use crate::liveness::Threads;
use crate::node_state::set_if_changed;
use crate::reporter::Reporter;
use crate::status;

/// Interval between attempts to listen while the port is in use.
const RETRY_INTERVAL: Duration = Duration::from_secs(5);

/// State of the HTTP server.
#[derive(Debug)]
pub struct Task {
    /// Listen address.
    pub address: SocketAddr,
    /// Why the server does not listen; `None` if it listens. Pods do not depend on the server.
    pub listen_problem: watch::Sender<Option<String>>,
    /// The agent's threads.
    pub threads: Threads,
    /// Sources of the node's status.
    pub reporter: Reporter,
}

impl Task {
    /// Serves for ever.
    pub async fn run(self) {
        let listener = listen(self.address, &self.listen_problem).await;
        serve(self, listener).await;
    }
}

/// Listens on the address, as soon as no other program does.
async fn listen(address: SocketAddr, listen_problem: &watch::Sender<Option<String>>) -> TcpListener {
    loop {
        match TcpListener::bind(address).await {
            Ok(listener) => {
                if listen_problem.send_replace(None).is_some() {
                    info!(%address, "health and metrics are now served");
                }
                return listener;
            }
            Err(error) => {
                let problem = format!(
                    "health and metrics are not served at {address}: {error}. `ss -ltnp` shows the process that uses \
                     the port: stop it, or set another address with http in agent.toml or with --http"
                );
                if set_if_changed(listen_problem, Some(problem.clone())) {
                    warn!("{problem}");
                }
            }
        }
        sleep(RETRY_INTERVAL).await;
    }
}

/// An agent whose state is requested.
trait AgentState: Send + Sync + 'static {
    /// A text for each stuck thread of the agent, as for systemd's watchdog.
    fn stuck_threads(&self) -> impl Future<Output = Vec<String>> + Send;

    /// Why the node is not ready. Empty if it is ready.
    fn unready_reasons(&self) -> Vec<String>;

    /// All metrics.
    fn metrics(&self) -> impl Future<Output = Registry> + Send;
}

impl AgentState for Task {
    async fn stuck_threads(&self) -> Vec<String> {
        self.threads.stuck_threads().await
    }

    fn unready_reasons(&self) -> Vec<String> {
        self.reporter.readiness.reasons()
    }

    async fn metrics(&self) -> Registry {
        registry(&self.reporter).await
    }
}

async fn serve<A: AgentState>(agent: A, listener: TcpListener) {
    let router = Router::new()
        .route("/livez", get(live::<A>))
        .route("/readyz", get(ready::<A>))
        .route("/metrics", get(metrics::<A>))
        .with_state(Arc::new(agent));
    if let Err(error) = axum::serve(listener, router).await {
        warn!(%error, "the HTTP server for health and metrics has stopped");
    }
}

async fn live<A: AgentState>(State(agent): State<Arc<A>>) -> (StatusCode, String) {
    health_response(&agent.stuck_threads().await)
}

async fn ready<A: AgentState>(State(agent): State<Arc<A>>) -> (StatusCode, String) {
    health_response(&agent.unready_reasons())
}

/// Status 200 without problems, otherwise 503 with the texts.
fn health_response(problems: &[String]) -> (StatusCode, String) {
    if problems.is_empty() {
        (StatusCode::OK, "ok\n".to_owned())
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, problems.join("\n") + "\n")
    }
}

async fn metrics<A: AgentState>(State(agent): State<Arc<A>>) -> (StatusCode, String) {
    let mut text = String::new();
    match encode(&mut text, &agent.metrics().await) {
        Ok(()) => (StatusCode::OK, text),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
    }
}

/// The node's status as gauges. Computed for every scrape, so that no values have to be kept up to date.
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
    gauge(
        "store_connected",
        "Whether the datastore is connected, and the cluster's records are current",
        i64::from(connected),
    );
    let refusing = i64::from(!status.refused_writes.is_empty());
    gauge("store_refusing_writes", "Whether the datastore refuses writes of this node", refusing);
    gauge("attachments", "Attachments in the ledger", count(status.pods));
    gauge(
        "problems",
        "Refused records, unreachable peers, failed changes, and interference of other software on the host",
        count(status.problems.len()),
    );
    if let Some(pass) = &status.last_pass {
        gauge("last_pass_writes", "Kernel changes that the last pass made", count(pass.writes));
        gauge(
            "last_pass_failures",
            "Kernel changes that failed in the last pass",
            count(pass.failures.len()),
        );
    }
    let addresses: Metrics<[(&'static str, String); 2], Gauge> = Metrics::default();
    for block in &status.blocks {
        for (state, number) in [("used", block.used), ("resting", block.resting), ("free", block.free)] {
            let labels = [("pool", block.pool.to_string()), ("state", state.to_owned())];
            addresses.get_or_create(&labels).inc_by(i64::try_from(number).unwrap_or(i64::MAX));
        }
    }
    registry.register("addresses", "Addresses of this node's blocks, by state", addresses);
    register_pools(&mut registry, reporter);
    register_packets(&mut registry, &status.fast_path);
    register_failures(&mut registry, reporter.store.writes().failures());
    register_nodes(&mut registry, reporter);
    registry
}

/// Packets on the fast path and on the normal path, by reason.
fn register_packets(registry: &mut Registry, fast_path: &FastPathStatus) {
    let in_use: Gauge = Gauge::default();
    in_use.set(i64::from(fast_path.state == FastPathState::On));
    registry.register(
        "fastpath_in_use",
        "Whether pods' packets skip the host's IP stack where they can",
        in_use,
    );
    let packets: Metrics<[(&'static str, String); 2], Counter> = Metrics::default();
    for counted in &fast_path.packets {
        let labels = [("path", counted.path.to_string()), ("reason", counted.reason.clone())];
        packets.get_or_create(&labels).inc_by(counted.packets);
    }
    let help = "Packets from and to pods by the path that they took, and why, since the agent started";
    registry.register("fastpath_packets", help, packets);
}

/// Failed writes since the agent started.
fn register_failures(registry: &mut Registry, failures: Failures) {
    let writes: Metrics<[(&'static str, &'static str); 1], Counter> = Metrics::default();
    for (result, number) in [("refused", failures.refused), ("unknown", failures.unknown)] {
        writes.get_or_create(&[("result", result)]).inc_by(number);
    }
    let help = "Writes that the datastore refused, or whose outcome is unknown, since the agent started";
    registry.register("store_write_failures", help, writes);
}

/// The cluster's nodes by whether their agents are alive. Absent while the leases are unknown.
fn register_nodes(registry: &mut Registry, reporter: &Reporter) {
    let view = reporter.node_state().view();
    let leases = reporter.published.leases.borrow().among(|name| view.nodes.contains_key(name));
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

/// A gauge for fractions, and for numbers larger than an integer gauge can hold.
type FloatGauge = Gauge<f64, AtomicU64>;

/// Usage of the pools: an alarm at 80 % leaves time to add a pool.
fn register_pools(registry: &mut Registry, reporter: &Reporter) {
    let view = reporter.node_state().view();
    let blocks: Metrics<[(&'static str, String); 2], FloatGauge> = Metrics::default();
    let ratio: Metrics<[(&'static str, String); 1], FloatGauge> = Metrics::default();
    for known in view.every_pool().filter(|known| known.record.purpose == Purpose::Blocks) {
        let (pool, name) = (&known.record, known.record.name.to_string());
        let claimed = ClaimedCount::of(&view, pool);
        for (state, number) in
            [("owned", claimed.owned.into()), ("resting", claimed.resting.into()), ("free", claimed.free())]
        {
            #[expect(
                clippy::cast_precision_loss,
                reason = "above 2^53 blocks, a rounding error does not matter"
            )]
            blocks.get_or_create(&[("pool", name.clone()), ("state", state.to_owned())]).set(number as f64);
        }
        ratio.get_or_create(&[("pool", name)]).set(claimed.ratio());
    }
    registry.register("pool_blocks", "Blocks of each pool in the cluster, by state", blocks);
    registry.register("pool_used_ratio", "Claimed share of the blocks of each pool, 0 to 1", ratio);
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;

    use super::*;

    /// An agent with these stuck threads and these reasons for not being ready.
    #[derive(Debug, Clone, Default)]
    struct Fake {
        stuck_threads: Vec<String>,
        unready_reasons: Vec<String>,
    }

    impl AgentState for Fake {
        async fn stuck_threads(&self) -> Vec<String> {
            self.stuck_threads.clone()
        }

        fn unready_reasons(&self) -> Vec<String> {
            self.unready_reasons.clone()
        }

        async fn metrics(&self) -> Registry {
            let mut registry = Registry::with_prefix("polder");
            registry.register("ready", "Whether the node is ready", Gauge::<i64>::default());
            registry
        }
    }

    /// Sends a request. Returns the status line and the body.
    async fn get(agent: Fake, path: &str) -> (String, String) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut stream = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let serving = tokio::spawn(serve(agent, listener));
        let request = format!("GET {path} HTTP/1.1\r\nHost: node\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        serving.abort();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head.lines().next().unwrap().to_owned(), body.to_owned())
    }

    #[tokio::test]
    async fn a_working_agent_is_alive_although_its_node_is_not_ready() {
        let unready_reasons = vec!["no etcd".to_owned(), "no path".to_owned()];
        let agent = Fake { unready_reasons, ..Fake::default() };
        assert_eq!(get(agent.clone(), "/livez").await, ("HTTP/1.1 200 OK".to_owned(), "ok\n".to_owned()));
        let (status, body) = get(agent, "/readyz").await;
        assert_eq!(
            (status.as_str(), body.as_str()),
            ("HTTP/1.1 503 Service Unavailable", "no etcd\nno path\n")
        );
        assert_eq!(get(Fake::default(), "/readyz").await.1, "ok\n");
    }

    #[tokio::test(start_paused = true)]
    async fn a_used_port_is_reported_and_retried() {
        let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = taken.local_addr().unwrap();
        let (listen_problem, receiver) = watch::channel(None);
        let waiting = tokio::spawn(async move { listen(address, &listen_problem).await });
        sleep(RETRY_INTERVAL / 2).await;
        let problem = receiver.borrow().clone().unwrap();
        assert!(problem.contains(&address.to_string()) && problem.contains("--http"), "{problem}");
        drop(taken);
        assert_eq!(waiting.await.unwrap().local_addr().unwrap(), address);
        assert_eq!(*receiver.borrow(), None);
    }

    #[tokio::test]
    async fn a_blocked_agent_is_not_alive_but_still_serves_metrics() {
        let agent = Fake { stuck_threads: vec!["the ledger".to_owned()], ..Fake::default() };
        let (status, body) = get(agent.clone(), "/livez").await;
        assert_eq!((status.as_str(), body.as_str()), ("HTTP/1.1 503 Service Unavailable", "the ledger\n"));
        let (status, body) = get(agent, "/metrics").await;
        assert_eq!(status, "HTTP/1.1 200 OK");
        assert!(body.contains("polder_ready 0"), "{body}");
    }
}
