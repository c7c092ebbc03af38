//! Section `[etcd]`: endpoints and credentials of etcd.

use std::path::{Path, PathBuf};

use polder_ipam::prefix::Prefix;
use polder_store::etcd::config::{Credentials, EtcdConfig, FileNotRead, Password, Pem};
use polder_store::etcd::endpoint::EtcdEndpoint;
use polder_store::etcd::lookup::is_domain;
use serde::{Deserialize, Serialize};

use super::{ConfigError, absolute, value};

/// Why a value of the section is invalid.
#[derive(Debug, thiserror::Error)]
pub enum InvalidEtcd {
    /// The embedded datastore is selected, and etcd's endpoints are set, too.
    #[error("\"embedded\" cannot be combined with etcd.endpoints: remove one of them")]
    EmbeddedEndpoints,
    /// The embedded datastore does not use the key.
    #[error("not allowed with store = \"embedded\": remove it")]
    Embedded,
    /// Certificates are for TLS, which http:// endpoints do not use.
    #[error(
        "certificates are set, but the endpoints are http://: use https:// endpoints, or remove the certificates"
    )]
    UnusedCertificates,
    /// A client certificate needs its private key, and the reverse.
    #[error("only one of etcd.cert and etcd.key is set: set both")]
    HalfIdentity,
    /// Polder does not use the CAs of the system, only the CA of etcd.
    #[error("TLS needs the CA that signed etcd's certificate: set the path of its PEM file")]
    NoCa,
    /// The password is set twice.
    #[error("etcd.password is also set: remove one of them")]
    TwoPasswords,
    /// A password belongs to a user.
    #[error("a password is set without a user: set etcd.user")]
    NoUser,
    /// A user is set without a password. etcd authenticates the user with a password.
    #[error(
        "etcd.user is set without a password: set etcd.password_file or etcd.password, or remove etcd.user"
    )]
    NoPassword,
    /// The value is an empty string.
    #[error("the value is empty: set it, or remove etcd.user and the password if etcd has no authentication")]
    Empty,
    /// The file with a certificate, a key or the password cannot be used.
    #[error(transparent)]
    File(FileNotRead),
    /// etcd's members are found either by DNS or by a list of endpoints.
    #[error("etcd.endpoints is also set: remove one of them")]
    DiscoveryAndEndpoints,
    /// The value is not the name of a domain with SRV records.
    #[error("{domain:?} is not a domain name: use e.g. example.org")]
    NoDomain {
        /// The value.
        domain: String,
    },
    /// No datastore is configured.
    #[error(
        "no endpoint is set: set etcd.endpoints, --etcd or etcd.discovery_srv, or store = \"embedded\" for a single \
         node without etcd"
    )]
    NoEndpoint,
    /// The endpoint has no scheme, no port or an invalid host.
    #[error("{endpoint:?} is not a URL: use http://HOST:PORT or https://HOST:PORT")]
    NoUrl {
        /// The endpoint.
        endpoint: String,
    },
    /// Some endpoints use TLS and others do not.
    #[error("http:// and https:// endpoints are mixed: use one of them for all")]
    MixedSchemes,
}

/// The section as written.
#[derive(Debug, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct EtcdFile {
    endpoints: Vec<String>,
    discovery_srv: Option<String>,
    pub(super) prefix: Prefix,
    ca: Option<PathBuf>,
    cert: Option<PathBuf>,
    key: Option<PathBuf>,
    user: Option<String>,
    password: Option<String>,
    password_file: Option<PathBuf>,
}

impl EtcdFile {
    /// Fails if a key is set that the embedded store does not use.
    pub(super) fn check_absent(&self) -> Result<(), ConfigError> {
        if !self.endpoints.is_empty() {
            return value("store", InvalidEtcd::EmbeddedEndpoints);
        }
        if self.discovery_srv.is_some() {
            return value("etcd.discovery_srv", InvalidEtcd::Embedded);
        }
        if self.prefix != Prefix::default() {
            return value("etcd.prefix", InvalidEtcd::Embedded);
        }
        Ok(())
    }

    /// The validated connection settings of etcd.
    pub(super) fn check(self) -> Result<EtcdConfig, ConfigError> {
        let has_files = self.ca.is_some() || self.cert.is_some() || self.key.is_some();
        let is_secure = match &self.discovery_srv {
            Some(domain) => check_domain_alone(domain, &self.endpoints).map(|()| has_files)?,
            None => is_secure(&self.endpoints)?,
        };
        if !is_secure && has_files {
            return value("etcd.ca", InvalidEtcd::UnusedCertificates);
        }
        let identity = match (&self.cert, &self.key) {
            (Some(certificate), Some(key)) => {
                Some((named_pem("etcd.cert", certificate)?, named_pem("etcd.key", key)?))
            }
            (None, None) => None,
            _ => return value("etcd.cert", InvalidEtcd::HalfIdentity),
        };
        let ca = self.ca.as_deref().map(|path| named_pem("etcd.ca", path)).transpose()?;
        if is_secure && ca.is_none() {
            return value("etcd.ca", InvalidEtcd::NoCa);
        }
        let credentials = self.credentials()?;
        Ok(EtcdConfig {
            endpoints: self.endpoints,
            discovery_srv: self.discovery_srv,
            ca,
            identity,
            credentials,
        })
    }

    fn credentials(&self) -> Result<Option<Credentials>, ConfigError> {
        let password = match (&self.password, &self.password_file) {
            (Some(_), Some(_)) => {
                return value("etcd.password_file", InvalidEtcd::TwoPasswords);
            }
            (Some(password), None) => Some(Password::Inline(password.clone())),
            (None, Some(path)) => Some(Password::File(absolute("etcd.password_file", path)?)),
            (None, None) => None,
        };
        let (user, password) = match (&self.user, password) {
            (None, None) => return Ok(None),
            (None, Some(_)) => {
                return value("etcd.user", InvalidEtcd::NoUser);
            }
            (Some(_), None) => return value("etcd.password_file", InvalidEtcd::NoPassword),
            (Some(user), Some(password)) => (user.clone(), password),
        };
        if user.is_empty() {
            return value("etcd.user", InvalidEtcd::Empty);
        }
        match password.read() {
            Ok(text) if text.is_empty() => value("etcd.password", InvalidEtcd::Empty),
            Ok(_) => Ok(Some(Credentials { user, password })),
            Err(problem) => value("etcd.password_file", InvalidEtcd::File(problem)),
        }
    }
}

/// Fails unless the value is a domain name and no endpoints are set.
fn check_domain_alone(domain: &str, endpoints: &[String]) -> Result<(), ConfigError> {
    const KEY: &str = "etcd.discovery_srv";
    if !endpoints.is_empty() {
        return value(KEY, InvalidEtcd::DiscoveryAndEndpoints);
    }
    if !is_domain(domain) {
        return value(KEY, InvalidEtcd::NoDomain { domain: domain.to_owned() });
    }
    Ok(())
}

/// Whether TLS is used at the endpoints.
fn is_secure(endpoints: &[String]) -> Result<bool, ConfigError> {
    const KEY: &str = "etcd.endpoints";
    if endpoints.is_empty() {
        return value(KEY, InvalidEtcd::NoEndpoint);
    }
    for endpoint in endpoints {
        let has_scheme = endpoint.starts_with("http://") || endpoint.starts_with("https://");
        if !has_scheme || EtcdEndpoint::parse(endpoint).is_none() {
            return value(KEY, InvalidEtcd::NoUrl { endpoint: endpoint.clone() });
        }
    }
    let secure = endpoints.iter().filter(|endpoint| endpoint.starts_with("https://")).count();
    if secure != 0 && secure != endpoints.len() {
        return value(KEY, InvalidEtcd::MixedSchemes);
    }
    Ok(secure != 0)
}

/// The PEM file that `key` names. Fails if it cannot be read.
fn named_pem(key: &'static str, path: &Path) -> Result<Pem, ConfigError> {
    let pem = Pem::File(absolute(key, path)?);
    match pem.read() {
        Ok(_) => Ok(pem),
        Err(problem) => value(key, InvalidEtcd::File(problem)),
    }
}
