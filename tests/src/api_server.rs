//! A stand-in for the Kubernetes API server, over HTTPS. It answers only from the recordings of a real one in
//! `tests/stand-ins/api-server`: a request that no recording covers is an error of the test.
//!
//! It keeps nodes and events in memory and fills them into the recorded answers, and it can be stopped, frozen, slowed
//! down, and made to fail in the recorded ways.

mod answer;
mod connection;
mod objects;
mod patch;
mod recording;
mod server;

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::{Arc, MutexGuard};
use std::time::Duration;

use serde_json::{Value, json};

use crate::Node;
use crate::agent::Worker;
use crate::tls::Authority;
use crate::wait;

use self::recording::Recordings;
use self::server::{Shared, State};

pub use self::connection::Request;

/// Port of the API server.
pub const PORT: u16 = 6443;

/// The token that it accepts.
const TOKEN: &str = "token-of-the-lab";

/// Folder of a pod's service account. `/var/run` is a link to `/run` on every node of the lab.
const SERVICE_ACCOUNT: &str = "/run/secrets/kubernetes.io/serviceaccount";

/// An agent reports a change at most this much later.
pub const MAX_DELAY: Duration = Duration::from_secs(60);

/// How the API server treats requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Behaviour {
    /// It serves.
    Serving,
    /// It accepts connections and never answers.
    Frozen,
    /// It answers after that time.
    Slow(Duration),
    /// It answers every request with the recorded error of that HTTP status: 401, 403, 404, 429 or 500.
    Failing(u16),
    /// It answers every request with bytes that are neither JSON nor a status.
    Garbage,
    /// It answers every watch that names a resource version with the recorded `410 Gone`.
    Stale,
}

/// A running API server.
#[derive(Debug)]
pub struct ApiServer {
    machine: Node,
    address: IpAddr,
    folder: PathBuf,
    shared: Arc<Shared>,
}

impl ApiServer {
    /// Starts an API server on a machine at this address. Its certificates are in `folder`.
    pub fn start(machine: Node, address: IpAddr, folder: &Path) -> Self {
        let authority = Authority::new(folder, "kubernetes");
        let (certificate, key) = authority.sign("kube-apiserver", &[address]);
        let tls = connection::tls(&certificate, &key);
        let shared = Shared::new(Recordings::read(), tls, TOKEN);
        let server = Self { machine, address, folder: folder.to_owned(), shared };
        server.start_again();
        server
    }

    /// Its URL.
    pub fn url(&self) -> String {
        format!("https://{}", self.place())
    }

    fn place(&self) -> SocketAddr {
        (self.address, PORT).into()
    }

    /// Its machine.
    pub fn machine(&self) -> &Node {
        &self.machine
    }

    /// Makes it reachable for the agent of a node, as a pod's service account is mounted: variables and files.
    pub fn admit(&self, worker: &mut Worker) {
        let certificate = std::fs::read_to_string(self.folder.join("ca.pem")).expect("it was written");
        for (name, text) in [("ca.crt", certificate.as_str()), ("token", TOKEN), ("namespace", "polder")] {
            worker.node.write(&format!("{SERVICE_ACCOUNT}/{name}"), text);
        }
        for (name, value) in [("HOST", self.address.to_string()), ("PORT", PORT.to_string())] {
            worker.variables.push((format!("KUBERNETES_SERVICE_{name}"), value));
        }
    }

    /// Ends the process: connections break, new ones are refused.
    pub fn stop(&self) {
        self.shared.stop();
    }

    /// Starts it after [`stop`](Self::stop), with the same objects.
    pub fn start_again(&self) {
        let listener = self.machine.within(|| server::listen(self.place()));
        self.shared.serve(listener);
    }

    /// Changes how it treats requests from now on, and ends all watches, as a restarted server does.
    pub fn behave(&self, behaviour: Behaviour) {
        self.shared.behave(behaviour);
    }

    /// Ends all watches without an error, as the real one does after the timeout of each.
    pub fn end_watches(&self) {
        self.shared.end_watches();
    }

    /// Creates a Node like the recorded one, without taints.
    pub fn add_node(&self, name: &str) {
        let mut node = self.shared.recordings.node(name);
        patch::merge(&mut node, &json!({ "spec": { "taints": null } }));
        self.state().objects.create(node);
        self.shared.changed();
    }

    /// Deletes a Node.
    pub fn delete_node(&self, name: &str) {
        self.state().objects.delete(name);
        self.shared.changed();
    }

    /// The Node of that name.
    pub fn node(&self, name: &str) -> Value {
        let node = self.state().objects.node(name).cloned();
        node.unwrap_or_else(|| panic!("there is no Node {name}"))
    }

    /// Changes a Node as its owner, the kubelet or an operator does: with a merge patch.
    pub fn change(&self, name: &str, merge: &Value) {
        self.state().objects.change(name, |node| patch::merge(node, merge));
        self.shared.changed();
    }

    /// Sets a label of a Node; `None` removes it.
    pub fn label(&self, name: &str, key: &str, value: Option<&str>) {
        self.change(name, &json!({ "metadata": { "labels": { key: value } } }));
    }

    /// Adds a taint to a Node.
    pub fn taint(&self, name: &str, key: &str, effect: &str) {
        let mut taints = self.taints(name);
        taints.push(json!({ "key": key, "effect": effect }));
        self.change(name, &json!({ "spec": { "taints": taints } }));
    }

    /// The taints of a Node.
    pub fn taints(&self, name: &str) -> Vec<Value> {
        self.node(name)["spec"]["taints"].as_array().cloned().unwrap_or_default()
    }

    /// Sets the internal addresses of a Node.
    pub fn set_addresses(&self, name: &str, addresses: &[IpAddr]) {
        let one = |address: &IpAddr| json!({ "type": "InternalIP", "address": address });
        let addresses: Vec<Value> = addresses.iter().map(one).collect();
        self.change(name, &json!({ "status": { "addresses": addresses } }));
    }

    /// A condition of a Node.
    pub fn condition(&self, name: &str, kind: &str) -> Option<Value> {
        let node = self.node(name);
        let conditions = node["status"]["conditions"].as_array()?;
        conditions.iter().find(|condition| condition["type"] == kind).cloned()
    }

    /// Waits until a Node has a condition that `is_expected`. Returns it.
    pub fn wait_for_condition(&self, name: &str, kind: &str, is_expected: impl Fn(&Value) -> bool) -> Value {
        let what = format!("condition {kind} of Node {name}");
        // An agent writes some changes only when they persist.
        wait::within(2 * MAX_DELAY, &what, || match self.condition(name, kind) {
            Some(condition) if is_expected(&condition) => Ok(condition),
            other => Err(format!("{other:?}")),
        })
    }

    /// The Events, oldest first.
    pub fn events(&self) -> Vec<Value> {
        self.state().objects.events().cloned().collect()
    }

    /// All requests so far, oldest first, also those that got no answer.
    pub fn requests(&self) -> Vec<Request> {
        self.state().requests.clone()
    }

    /// Number of watches that are open.
    pub fn watches(&self) -> usize {
        self.state().watches
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.shared.state()
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        self.stop();
        let uncovered = std::mem::take(&mut self.state().uncovered);
        if !std::thread::panicking() {
            assert!(uncovered.is_empty(), "no recording covers these requests:\n{}", uncovered.join("\n"));
        } else if !uncovered.is_empty() {
            eprintln!("--- no recording covers these requests:\n{}", uncovered.join("\n"));
        }
    }
}
