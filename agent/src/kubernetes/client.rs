//! The client of the Kubernetes API server: every request has a timeout, and credentials are read again after a failure.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::stream::{BoxStream, StreamExt};
use k8s_openapi::api::core::v1::{Event, Node};
use kube::Api;
use kube::api::{ListParams, Patch, PatchParams, PostParams, WatchEvent, WatchParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use polder_api::NodeName;
use polder_ipam::cause::HostError;
use serde::Serialize;
use tokio::time::timeout;

use super::api::{NodeApi, NodeEvent, NodeWatch, OwnNode};
use super::error::{Action, ClientError};
use super::node_object::{NodeObject, ResourceVersion};
use super::settings::{ApiServer, Credentials, KubernetesConfig};

/// Timeout of a connection attempt.
const CONNECT: Duration = Duration::from_secs(5);

/// Timeout of a request until its answer is complete. For a watch: until the answer begins.
const ANSWER: Duration = Duration::from_secs(10);

/// A watch on which nothing arrives for this time is treated as lost. The API server sends a bookmark about once a
/// minute (`defaultBookmarkFrequency` in `k8s.io/apiserver/pkg/storage/cacher/cacher.go`).
const SILENCE: Duration = Duration::from_secs(150);

/// Objects in one answer of a list.
const PAGE: u32 = 200;

/// The namespace of Events about objects without a namespace (`legacyValidateEvent` of the API server).
const EVENTS: &str = "default";

/// A client for the agent's own Node, and for lists of all Nodes. Clones share the connection.
#[derive(Clone)]
pub struct Client {
    settings: Arc<KubernetesConfig>,
    node: NodeName,
    /// Made with the credentials as last read; `None` after a failure, so that they are read again.
    connected: Arc<Mutex<Option<kube::Client>>>,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client")
            .field("settings", &self.settings)
            .field("node", &self.node)
            .finish_non_exhaustive()
    }
}

impl Client {
    /// A client that has not connected yet.
    pub fn new(settings: KubernetesConfig, node: NodeName) -> Self {
        Self { settings: Arc::new(settings), node, connected: Arc::default() }
    }

    /// The settings.
    pub fn settings(&self) -> &KubernetesConfig {
        &self.settings
    }

    /// All Nodes whose names are names of nodes, in pages.
    pub async fn list_nodes(&self) -> Result<Vec<NodeObject>, ClientError> {
        let mut nodes = Vec::new();
        let mut page = ListParams::default().limit(PAGE);
        loop {
            let list = self.request(Action::ListNodes, async |kube| all(kube).list(&page).await).await?;
            nodes.extend(list.items.into_iter().filter_map(NodeObject::of));
            match list.metadata.continue_.filter(|token| !token.is_empty()) {
                Some(token) => page = page.continue_token(&token),
                None => return Ok(nodes),
            }
        }
    }

    /// The client of the library, made again after a failure.
    async fn connect(&self) -> Result<kube::Client, ClientError> {
        let kept = self.connected().clone();
        if let Some(kube) = kept {
            return Ok(kube);
        }
        let kube = kube::Client::try_from(self.config().await?).map_err(ClientError::credentials)?;
        *self.connected() = Some(kube.clone());
        Ok(kube)
    }

    fn connected(&self) -> MutexGuard<'_, Option<kube::Client>> {
        self.connected.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// After such a failure, the next request connects again.
    fn failed(&self, error: &ClientError) {
        if error.is_of_connection() {
            *self.connected() = None;
        }
    }

    async fn config(&self) -> Result<kube::Config, ClientError> {
        let mut config = match &self.settings.credentials {
            // The address of the environment may not exist.
            Credentials::ServiceAccount if self.settings.api_server.is_some() => {
                kube::Config::incluster_dns().map_err(ClientError::credentials)?
            }
            Credentials::ServiceAccount => kube::Config::incluster_env().map_err(ClientError::credentials)?,
            Credentials::Kubeconfig(path) => {
                let file = Kubeconfig::read_from(path).map_err(ClientError::credentials)?;
                let options = KubeConfigOptions::default();
                kube::Config::from_custom_kubeconfig(file, &options)
                    .await
                    .map_err(ClientError::credentials)?
            }
        };
        if config.auth_info.exec.is_some() || config.auth_info.auth_provider.is_some() {
            return Err(ClientError::ExternalProgram);
        }
        if let Some(server) = self.settings.api_server.as_ref().and_then(ApiServer::client_config) {
            config.cluster_url = server.cluster_url;
        }
        config.connect_timeout = Some(CONNECT);
        // The tasks retry with their own pauses.
        config.default_retry = false;
        Ok(config)
    }

    /// Sends one request.
    async fn request<T>(
        &self,
        action: Action,
        send: impl AsyncFnOnce(kube::Client) -> Result<T, kube::Error>,
    ) -> Result<T, ClientError> {
        let kube = self.connect().await?;
        let answer = match timeout(ANSWER, send(kube)).await {
            Ok(answer) => answer.map_err(|error| ClientError::of(action, error)),
            Err(_) => Err(ClientError::NoAnswer { action, seconds: ANSWER.as_secs() }),
        };
        answer.inspect_err(|error| self.failed(error))
    }

    async fn patch<P: Serialize + fmt::Debug>(
        &self,
        action: Action,
        patch: Patch<P>,
    ) -> Result<Option<NodeObject>, ClientError> {
        let (name, parameters) = (self.node.as_str(), PatchParams::default());
        let patched = self.request(action, async |kube| match action {
            Action::PatchStatus => all(kube).patch_status(name, &parameters, &patch).await,
            _ => all(kube).patch(name, &parameters, &patch).await,
        });
        Ok(NodeObject::of(patched.await?))
    }
}

fn all(kube: kube::Client) -> Api<Node> {
    Api::all(kube)
}

impl NodeApi for Client {
    type Watch = Watch;

    async fn own(&self) -> Result<OwnNode, ClientError> {
        // A list of one object, because only a list has a version from which a watch can surely start. The API server
        // reads it with one key (`ListPredicate` in `k8s.io/apiserver/pkg/registry/generic/registry/store.go`).
        let only = ListParams::default().fields(&format!("metadata.name={}", self.node));
        let list = self.request(Action::ListNodes, async |kube| all(kube).list(&only).await).await?;
        Ok(OwnNode {
            node: list.items.into_iter().find_map(NodeObject::of),
            version: ResourceVersion(list.metadata.resource_version.unwrap_or_default()),
        })
    }

    async fn watch(&self, from: &ResourceVersion, seconds: u32) -> Result<Watch, ClientError> {
        let only = WatchParams::default().fields(&format!("metadata.name={}", self.node)).timeout(seconds);
        let version = from.0.as_str();
        let watch =
            self.request(Action::WatchNodes, async |kube| all(kube).watch(&only, version).await).await?;
        Ok(Watch { events: watch.boxed(), client: self.clone() })
    }

    async fn patch_condition(&self, patch: &serde_json::Value) -> Result<Option<NodeObject>, ClientError> {
        self.patch(Action::PatchStatus, Patch::Strategic(patch)).await
    }

    async fn patch_node(&self, patch: &serde_json::Value) -> Result<Option<NodeObject>, ClientError> {
        self.patch(Action::PatchNode, Patch::Merge(patch)).await
    }

    async fn put_event(&self, event: &Event) -> Result<(), ClientError> {
        let name = event.metadata.name.clone().unwrap_or_default();
        let events = |kube| Api::<Event>::namespaced(kube, EVENTS);
        let created = self
            .request(Action::CreateEvent, async |kube| {
                events(kube).create(&PostParams::default(), event).await
            })
            .await;
        match created {
            Err(error) if error.already_exists() => {}
            created => return created.map(drop),
        }
        let again = serde_json::json!({ "count": event.count, "lastTimestamp": event.last_timestamp });
        let parameters = PatchParams::default();
        self.request(Action::PatchEvent, async |kube| {
            events(kube).patch(&name, &parameters, &Patch::Merge(&again)).await
        })
        .await
        .map(drop)
    }
}

/// A watch on the agent's own Node.
pub struct Watch {
    events: BoxStream<'static, Result<WatchEvent<Node>, kube::Error>>,
    client: Client,
}

impl fmt::Debug for Watch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watch").field("client", &self.client).finish_non_exhaustive()
    }
}

impl NodeWatch for Watch {
    async fn next(&mut self) -> Result<Option<NodeEvent>, ClientError> {
        loop {
            let event = match timeout(SILENCE, self.events.next()).await {
                Err(_) => Err(ClientError::Silent { seconds: SILENCE.as_secs() }),
                Ok(None) => return Ok(None),
                Ok(Some(event)) => event.map_err(|error| ClientError::of(Action::WatchNodes, error)),
            };
            let event = match event {
                Ok(event) => event,
                Err(error) => {
                    self.client.failed(&error);
                    return Err(error);
                }
            };
            match event {
                WatchEvent::Added(node) | WatchEvent::Modified(node) => {
                    if let Some(node) = NodeObject::of(node) {
                        return Ok(Some(NodeEvent::Changed(node)));
                    }
                }
                WatchEvent::Deleted(node) => {
                    if let Some(node) = NodeObject::of(node) {
                        return Ok(Some(NodeEvent::Deleted(node.version)));
                    }
                }
                WatchEvent::Bookmark(mark) => {
                    return Ok(Some(NodeEvent::Bookmark(ResourceVersion(mark.metadata.resource_version))));
                }
                WatchEvent::Error(status) => {
                    return Err(ClientError::of(Action::WatchNodes, kube::Error::Api(status)));
                }
            }
        }
    }
}

impl ClientError {
    fn credentials(error: impl std::error::Error + Send + Sync + 'static) -> Self {
        Self::Credentials(HostError::new(error))
    }
}
