//! Section `[kubernetes]`: the connection to the Kubernetes API server.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{ConfigError, absolute, value};
use crate::kubernetes::settings::{ApiServer, Credentials, InvalidApiServer, KubernetesConfig, RemoveNodes};

/// Why a value of the section is invalid.
#[derive(Debug, thiserror::Error)]
pub enum InvalidKubernetes {
    /// The value is not the address of an API server.
    #[error(transparent)]
    ApiServer(#[from] InvalidApiServer),
}

/// The section as written.
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct KubernetesFile {
    enabled: bool,
    kubeconfig: Option<PathBuf>,
    api_server: Option<String>,
    remove_nodes: RemoveNodes,
}

impl Default for KubernetesFile {
    fn default() -> Self {
        Self { enabled: true, kubeconfig: None, api_server: None, remove_nodes: RemoveNodes::default() }
    }
}

impl KubernetesFile {
    /// The validated settings; `None` if the agent does not connect to the API server.
    pub(super) fn check(self) -> Result<Option<KubernetesConfig>, ConfigError> {
        let credentials = match &self.kubeconfig {
            Some(path) => Credentials::Kubeconfig(absolute("kubernetes.kubeconfig", path)?),
            None => Credentials::ServiceAccount,
        };
        let api_server = match self.api_server.as_deref().map(str::parse::<ApiServer>) {
            None => None,
            Some(Ok(server)) => Some(server),
            Some(Err(problem)) => {
                return value("kubernetes.api_server", InvalidKubernetes::ApiServer(problem));
            }
        };
        let config = KubernetesConfig { credentials, api_server, remove_nodes: self.remove_nodes };
        Ok(self.enabled.then_some(config))
    }
}
