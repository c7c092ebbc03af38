//! Credentials of an operator for etcd, used instead of those of the agent.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Credentials for etcd, for one request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EtcdCredentials {
    /// Client certificate, instead of the agent's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub certificate: Option<ClientCertificate>,
    /// etcd user for the login.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<User>,
}

/// A client certificate and its key, each as PEM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClientCertificate {
    /// Certificate, as PEM.
    pub certificate: String,
    /// Private key, as PEM.
    pub key: Secret,
}

/// An etcd user with its password.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct User {
    /// Name of the etcd user.
    pub name: String,
    /// Password of the etcd user.
    pub password: Secret,
}

/// A text that `Debug` does not print.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Secret(pub String);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(_)")
    }
}

impl fmt::Display for EtcdCredentials {
    /// The identity, without secrets.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.user {
            Some(user) => write!(f, "etcd user {}", user.name),
            None => f.write_str("a client certificate for etcd"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_sent_but_not_printed() {
        let credentials = EtcdCredentials {
            certificate: Some(ClientCertificate {
                certificate: "public".into(),
                key: Secret("hidden-key".into()),
            }),
            user: Some(User { name: "admin".into(), password: Secret("hidden-password".into()) }),
        };
        let sent = serde_json::to_string(&credentials).unwrap();
        assert_eq!(serde_json::from_str::<EtcdCredentials>(&sent).unwrap(), credentials);
        let printed = format!("{credentials:?} {credentials}");
        assert!(
            printed.contains("admin") && printed.contains("public") && !printed.contains("hidden"),
            "{printed}"
        );
    }
}
