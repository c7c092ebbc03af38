//! The `[etcd]` of the configuration: where the cluster's records are, and what the agent shows there.

use std::path::{Path, PathBuf};

use polder_ipam::prefix::Prefix;
use polder_store::etcd::config::{Credentials, EtcdConfig, Password, Pem};
use polder_store::etcd::endpoint::Endpoint;
use polder_store::etcd::lookup::is_domain;
use serde::{Deserialize, Serialize};

use super::{ConfigError, absolute, value};

/// As it is written.
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
    /// Nothing, where the node has no etcd.
    pub(super) fn check_absent(&self) -> Result<(), ConfigError> {
        if !self.endpoints.is_empty() {
            return value("store", "\"embedded\" has no etcd endpoints: remove one or the other".to_owned());
        }
        if self.discovery_srv.is_some() {
            return value(
                "etcd.discovery_srv",
                "a store of the node's own has no etcd: remove it".to_owned(),
            );
        }
        if self.prefix != Prefix::default() {
            return value("etcd.prefix", "a store of the node's own has no etcd: remove it".to_owned());
        }
        Ok(())
    }

    /// How to reach etcd, if that makes sense.
    pub(super) fn check(self) -> Result<EtcdConfig, ConfigError> {
        let has_files = self.ca.is_some() || self.cert.is_some() || self.key.is_some();
        let is_secure = match &self.discovery_srv {
            Some(domain) => is_domain_alone(domain, &self.endpoints).map(|()| has_files)?,
            None => is_secure(&self.endpoints)?,
        };
        if !is_secure && has_files {
            return value("etcd.ca", "certificates are given, but the endpoints are http://".to_owned());
        }
        let identity = match (&self.cert, &self.key) {
            (Some(certificate), Some(key)) => {
                Some((named_pem("etcd.cert", certificate)?, named_pem("etcd.key", key)?))
            }
            (None, None) => None,
            _ => return value("etcd.cert", "a certificate and its key go together: set both".to_owned()),
        };
        let ca = self.ca.as_deref().map(|path| named_pem("etcd.ca", path)).transpose()?;
        if is_secure && ca.is_none() {
            return value("etcd.ca", "TLS needs the authority that signed etcd's certificate".to_owned());
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
        const HOW: &str = "give the password of etcd.user in etcd.password_file, or in etcd.password";
        let password = match (&self.password, &self.password_file) {
            (Some(_), Some(_)) => return value("etcd.password_file", format!("both are set: {HOW}")),
            (Some(password), None) => Some(Password::Inline(password.clone())),
            (None, Some(path)) => Some(Password::File(absolute("etcd.password_file", path)?)),
            (None, None) => None,
        };
        let (user, password) = match (&self.user, password) {
            (None, None) => return Ok(None),
            (None, Some(_)) => return value("etcd.user", "a password is set, and no user".to_owned()),
            (Some(_), None) => return value("etcd.password_file", HOW.to_owned()),
            (Some(user), Some(password)) => (user.clone(), password),
        };
        if user.is_empty() {
            return value("etcd.user", "is empty".to_owned());
        }
        match password.read() {
            Ok(text) if text.is_empty() => value("etcd.password", "is empty".to_owned()),
            Ok(_) => Ok(Some(Credentials { user, password })),
            Err(problem) => value("etcd.password_file", problem),
        }
    }
}

/// Fails unless the domain can have SRV records and stands for all members.
fn is_domain_alone(domain: &str, endpoints: &[String]) -> Result<(), ConfigError> {
    const KEY: &str = "etcd.discovery_srv";
    if !endpoints.is_empty() {
        return value(KEY, "etcd.endpoints is set, too: remove one of them".to_owned());
    }
    if !is_domain(domain) {
        return value(KEY, format!("{domain:?} is no domain: write a name like example.org"));
    }
    Ok(())
}

/// Whether TLS is used at the endpoints.
fn is_secure(endpoints: &[String]) -> Result<bool, ConfigError> {
    const KEY: &str = "etcd.endpoints";
    if endpoints.is_empty() {
        let problem = "no endpoint is given: set it, or --etcd, or etcd.discovery_srv, or store = \"embedded\" for a node of its own";
        return value(KEY, problem.to_owned());
    }
    for endpoint in endpoints {
        let has_scheme = endpoint.starts_with("http://") || endpoint.starts_with("https://");
        if !has_scheme || Endpoint::parse(endpoint).is_none() {
            let problem = format!("{endpoint:?} is not a URL: write http://HOST:PORT or https://HOST:PORT");
            return value(KEY, problem);
        }
    }
    let secure = endpoints.iter().filter(|endpoint| endpoint.starts_with("https://")).count();
    if secure != 0 && secure != endpoints.len() {
        return value(KEY, "http:// and https:// are mixed".to_owned());
    }
    Ok(secure != 0)
}

/// The file of PEM blocks that the key names, which can be read now.
fn named_pem(key: &'static str, path: &Path) -> Result<Pem, ConfigError> {
    let pem = Pem::File(absolute(key, path)?);
    match pem.read() {
        Ok(_) => Ok(pem),
        Err(problem) => value(key, problem),
    }
}
