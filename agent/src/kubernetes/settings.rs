//! The settings of the connection to the Kubernetes API server.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// How the agent connects to the API server, and what it does there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KubernetesConfig {
    /// The credentials.
    pub credentials: Credentials,
    /// The address of the API server. `None`: that of the credentials.
    pub api_server: Option<ApiServer>,
    /// Who removes a node whose Node object was deleted.
    pub remove_nodes: RemoveNodes,
}

/// The source of the credentials. The files are read again when the API server refuses the credentials.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Credentials {
    /// The service account of the agent's pod.
    ServiceAccount,
    /// A kubeconfig file: its current context.
    Kubeconfig(PathBuf),
}

/// Who removes a node whose Node object was deleted.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum RemoveNodes {
    /// An operator, with `polderctl node remove`.
    #[default]
    Manual,
    /// One of the agents.
    Automatic,
}

/// The address of an API server: `https://HOST`, with a port if it is not 443.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiServer(String);

/// The value is not the address of an API server.
#[derive(Debug, thiserror::Error)]
#[error("{given:?} is not a URL: use https://HOST or https://HOST:PORT")]
pub struct InvalidApiServer {
    /// The value.
    given: String,
}

impl ApiServer {
    /// The address as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether the connection is encrypted.
    pub fn is_secure(&self) -> bool {
        self.0.starts_with("https://")
    }

    /// The configuration of a client of this server without credentials.
    pub(super) fn client_config(&self) -> Option<kube::Config> {
        let config = kube::Config::new(self.0.parse().ok()?);
        let url = &config.cluster_url;
        let host = url.host().filter(|host| !host.is_empty())?;
        // The library accepts a port that is not a number.
        let has_valid_port =
            url.port_u16().is_some() || url.authority().is_some_and(|all| all.as_str() == host);
        has_valid_port.then_some(config)
    }
}

impl FromStr for ApiServer {
    type Err = InvalidApiServer;

    fn from_str(given: &str) -> Result<Self, InvalidApiServer> {
        let server = Self(given.to_owned());
        let has_scheme = given.starts_with("http://") || given.starts_with("https://");
        match server.client_config() {
            Some(_) if has_scheme => Ok(server),
            _ => Err(InvalidApiServer { given: given.to_owned() }),
        }
    }
}

impl fmt::Display for ApiServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_needs_a_scheme_and_a_host() {
        for good in
            ["https://10.0.0.1:6443", "https://api.example.org", "https://[fd00::1]:6443", "http://a:1"]
        {
            let server: ApiServer = good.parse().unwrap();
            assert_eq!((server.as_str(), server.is_secure()), (good, good.starts_with("https")));
        }
        for bad in ["", "10.0.0.1:6443", "https://", "ftp://a", "https://a b", "https://a:port"] {
            let error = bad.parse::<ApiServer>().expect_err(bad).to_string();
            assert!(error.ends_with("is not a URL: use https://HOST or https://HOST:PORT"), "{error}");
        }
    }
}
