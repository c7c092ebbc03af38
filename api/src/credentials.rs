//! What an operator shows to etcd in the place of what the agent shows.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Credentials for etcd, for one request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EtcdCredentials {
    /// A client certificate, instead of the agent's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub certificate: Option<ClientCertificate>,
    /// A user to log in as.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<User>,
}

/// A client certificate with its key, each as PEM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClientCertificate {
    /// The certificate.
    pub certificate: String,
    /// Its key.
    pub key: Secret,
}

/// A user of etcd.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct User {
    /// The user's name.
    pub name: String,
    /// The password.
    pub password: Secret,
}

/// A text that is not printed.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Secret(pub String);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(_)")
    }
}

impl fmt::Display for EtcdCredentials {
    /// Who it is, as far as that is no secret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.user {
            Some(user) => write!(f, "etcd's user {}", user.name),
            None => f.write_str("a client certificate for etcd"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_secret_is_sent_and_not_printed() {
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
