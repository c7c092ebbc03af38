//! Section `[etcd]`: endpoints and credentials of etcd.

use std::path::{Path, PathBuf};

use polder_ipam::prefix::Prefix;
use polder_store::etcd::config::{Credentials, EtcdConfig, Password, Pem};
use polder_store::etcd::endpoint::Endpoint;
use polder_store::etcd::lookup::is_domain;
use serde::{Deserialize, Serialize};

use super::{ConfigError, absolute, value};

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
            return value(
                "store",
                "\"embedded\" cannot be combined with etcd.endpoints: remove one of them".to_owned(),
            );
        }
        if self.discovery_srv.is_some() {
            return value(
                "etcd.discovery_srv",
                "not allowed with store = \"embedded\": remove it".to_owned(),
            );
        }
        if self.prefix != Prefix::default() {
            return value("etcd.prefix", "not allowed with store = \"embedded\": remove it".to_owned());
        }
        Ok(())
    }

    /// The validated connection settings of etcd.
    pub(super) fn check(self) -> Result<EtcdConfig, ConfigError> {
        let has_files = self.ca.is_some() || self.cert.is_some() || self.key.is_some();
        let is_secure = match &self.discovery_srv {
            Some(domain) => is_domain_alone(domain, &self.endpoints).map(|()| has_files)?,
            None => is_secure(&self.endpoints)?,
        };
        if !is_secure && has_files {
            return value("etcd.ca", "certificates are set, but the endpoints are http://: use https:// endpoints, or remove the certificates".to_owned());
        }
        let identity = match (&self.cert, &self.key) {
            (Some(certificate), Some(key)) => {
                Some((named_pem("etcd.cert", certificate)?, named_pem("etcd.key", key)?))
            }
            (None, None) => None,
            _ => return value("etcd.cert", "only one of etcd.cert and etcd.key is set: set both".to_owned()),
        };
        let ca = self.ca.as_deref().map(|path| named_pem("etcd.ca", path)).transpose()?;
        if is_secure && ca.is_none() {
            return value(
                "etcd.ca",
                "TLS needs the CA that signed etcd's certificate: set the path of its PEM file".to_owned(),
            );
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
        const HOW: &str = "set the password of etcd.user in etcd.password_file or in etcd.password";
        let password = match (&self.password, &self.password_file) {
            (Some(_), Some(_)) => {
                return value(
                    "etcd.password_file",
                    format!("etcd.password is also set: remove one of them. {HOW}"),
                );
            }
            (Some(password), None) => Some(Password::Inline(password.clone())),
            (None, Some(path)) => Some(Password::File(absolute("etcd.password_file", path)?)),
            (None, None) => None,
        };
        let (user, password) = match (&self.user, password) {
            (None, None) => return Ok(None),
            (None, Some(_)) => {
                return value("etcd.user", "a password is set without a user: set etcd.user".to_owned());
            }
            (Some(_), None) => return value("etcd.password_file", HOW.to_owned()),
            (Some(user), Some(password)) => (user.clone(), password),
        };
        if user.is_empty() {
            return value("etcd.user", "must not be empty".to_owned());
        }
        match password.read() {
            Ok(text) if text.is_empty() => value("etcd.password", "must not be empty".to_owned()),
            Ok(_) => Ok(Some(Credentials { user, password })),
            Err(problem) => value("etcd.password_file", problem),
        }
    }
}

/// Fails unless the value is a domain name and no endpoints are set.
fn is_domain_alone(domain: &str, endpoints: &[String]) -> Result<(), ConfigError> {
    const KEY: &str = "etcd.discovery_srv";
    if !endpoints.is_empty() {
        return value(KEY, "etcd.endpoints is also set: remove one of them".to_owned());
    }
    if !is_domain(domain) {
        return value(KEY, format!("{domain:?} is not a domain name: use e.g. example.org"));
    }
    Ok(())
}

/// Whether TLS is used at the endpoints.
fn is_secure(endpoints: &[String]) -> Result<bool, ConfigError> {
    const KEY: &str = "etcd.endpoints";
    if endpoints.is_empty() {
        let problem = "no endpoint is set: set etcd.endpoints, --etcd or etcd.discovery_srv, or store = \"embedded\" for a \
                       single node without etcd";
        return value(KEY, problem.to_owned());
    }
    for endpoint in endpoints {
        let has_scheme = endpoint.starts_with("http://") || endpoint.starts_with("https://");
        if !has_scheme || Endpoint::parse(endpoint).is_none() {
            let problem = format!("{endpoint:?} is not a URL: use http://HOST:PORT or https://HOST:PORT");
            return value(KEY, problem);
        }
    }
    let secure = endpoints.iter().filter(|endpoint| endpoint.starts_with("https://")).count();
    if secure != 0 && secure != endpoints.len() {
        return value(KEY, "http:// and https:// endpoints are mixed: use one of them for all".to_owned());
    }
    Ok(secure != 0)
}

/// The PEM file that `key` names. Fails if it cannot be read.
fn named_pem(key: &'static str, path: &Path) -> Result<Pem, ConfigError> {
    let pem = Pem::File(absolute(key, path)?);
    match pem.read() {
        Ok(_) => Ok(pem),
        Err(problem) => value(key, problem),
    }
}
