//! The agent's configuration: a file, and flags that override it, checked as a whole before anything is touched.

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Parser;
use polder_api::{Backend, DEFAULT_SOCKET, Family, NodeName};
use polder_ipam::allocator::{SHORTEST_REST, USUAL_REST};
use polder_ipam::pool::{Labels, Pool};
use polder_ipam::record::{AttachMode, MTU_RANGE, Masquerade, VxlanSettings};
use polder_ipam::special;
use polder_ipam::steward::Proof;
use polder_ipam::store::etcd::EtcdConfig;
use serde::Deserialize;

use crate::exit::AGENT_HELP;
use crate::machine::{MachineError, default_node_name};

/// Where the configuration is unless a flag says otherwise. It may be missing there.
const DEFAULT_FILE: &str = "/etc/polder/agent.toml";

/// The daemon of one node of a Polder network.
#[derive(Debug, Default, Parser)]
#[command(version, about, after_help = AGENT_HELP)]
pub struct Flags {
    /// The configuration file [default: /etc/polder/agent.toml, if it is there]
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// The node's name [default: the host name]
    #[arg(long, value_name = "NAME")]
    pub node: Option<NodeName>,
    /// Where the ledger and the snapshot of the cluster are [default: /var/lib/polder]
    #[arg(long, value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
    /// Where the agent listens for the plugin and polderctl [default: /run/polder/agent.sock]
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// The etcd members
    #[arg(long, value_name = "URL", value_delimiter = ',')]
    pub etcd: Option<Vec<String>>,
    /// Where the CNI configuration is written [default: /etc/cni/net.d]
    #[arg(long, value_name = "DIR")]
    pub cni_conf_dir: Option<PathBuf>,
    /// Where metrics and health are served [default: 127.0.0.1:9474]
    #[arg(long, value_name = "ADDR")]
    pub http: Option<SocketAddr>,
    /// Check the configuration, say what is wrong with it, and exit
    #[arg(long)]
    pub check_config: bool,
}

/// The configuration, checked.
#[derive(Debug, Clone)]
pub struct Config {
    /// The node's name.
    pub node: NodeName,
    /// Where the ledger and the snapshot of the cluster are.
    pub state_dir: PathBuf,
    /// Where the agent listens.
    pub socket: PathBuf,
    /// Where the CNI configuration is written.
    pub cni_conf_dir: PathBuf,
    /// Where metrics and health are served.
    pub http: SocketAddr,
    /// Where the cluster's records are.
    pub store: StoreConfig,
    /// What was said about the node's own addresses.
    pub underlay: UnderlayConfig,
    /// MTU of the pods, in bytes, instead of the one that fits the underlay.
    pub mtu: Option<u32>,
    /// How long a freed address rests.
    pub cooldown: Duration,
    /// How long a pod has to be gone before its addresses are freed without a DEL.
    pub grace: Duration,
    /// Time between two passes over the kernel's state that nothing else asked for.
    pub resync: Duration,
    /// Whether a node is ready only when a peer answers, if there are any that live.
    pub probe_peers: bool,
    /// What proves that this machine is the node of its ledger.
    pub identity: Proof,
    /// What pools may choose the node by.
    pub labels: Labels,
    /// What the cluster is to be, if it is not yet.
    pub bootstrap: Option<Bootstrap>,
}

/// Where on this machine the agent keeps what, and as which node: all that it takes to undo what it did.
#[derive(Debug, Clone)]
pub struct Places {
    /// The node's name.
    pub node: NodeName,
    /// Where the ledger and the snapshot of the cluster are.
    pub state_dir: PathBuf,
    /// Where the agent listens.
    pub socket: PathBuf,
    /// Where the CNI configuration is written.
    pub cni_conf_dir: PathBuf,
}

/// Where the cluster's records are.
#[derive(Debug, Clone)]
pub enum StoreConfig {
    /// In etcd.
    Etcd(EtcdConfig),
    /// In a file of this node alone.
    Embedded,
}

/// Which of the node's addresses peers are to use.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct UnderlayConfig {
    /// Those of this interface.
    pub interface: Option<String>,
    /// These: at most one of a family.
    pub addresses: Vec<IpAddr>,
}

/// The first settings of a cluster, written where there are none.
#[derive(Debug, Clone)]
pub struct Bootstrap {
    /// Its pools.
    pub pools: Vec<Pool>,
    /// How nodes reach each other.
    pub backend: Backend,
    /// How pods hang on their node.
    pub attach: AttachMode,
    /// The tunnels.
    pub vxlan: VxlanSettings,
    /// What pods look like from outside.
    pub masquerade: Masquerade,
}

/// A configuration that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The file is not what it should be.
    #[error("{}:{line}: {message}", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where in it.
        line: usize,
        /// What is wrong.
        message: String,
    },
    /// A value that is there does not make sense.
    #[error("{key}: {problem}")]
    Value {
        /// The key or flag.
        key: &'static str,
        /// What is wrong, and the remedy.
        problem: String,
    },
    /// The machine has no name.
    #[error(transparent)]
    Machine(#[from] MachineError),
}

/// The file as it is written.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct File {
    node: Option<NodeName>,
    state_dir: Option<PathBuf>,
    socket: Option<PathBuf>,
    cni_conf_dir: Option<PathBuf>,
    http: Option<SocketAddr>,
    store: StoreKind,
    mtu: Option<u32>,
    resync_seconds: Option<u64>,
    probe_peers: Option<bool>,
    identity: Proof,
    etcd: EtcdFile,
    underlay: UnderlayConfig,
    ipam: IpamFile,
    labels: Labels,
    bootstrap: Option<bootstrap::File>,
}

#[derive(Debug, Default, Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum StoreKind {
    #[default]
    Etcd,
    Embedded,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct EtcdFile {
    endpoints: Vec<String>,
    ca: Option<PathBuf>,
    cert: Option<PathBuf>,
    key: Option<PathBuf>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct IpamFile {
    cooldown_seconds: Option<u64>,
    grace_seconds: Option<u64>,
}

impl Config {
    /// Reads the file that the flags name, and lets the flags override it.
    pub fn load(flags: Flags) -> Result<Self, ConfigError> {
        Self::check(File::named_by(&flags)?, flags)
    }

    fn check(file: File, flags: Flags) -> Result<Self, ConfigError> {
        let resync = file.resync_seconds.unwrap_or(30);
        let cooldown = file.ipam.cooldown_seconds.map_or(USUAL_REST, Duration::from_secs);
        if cooldown < SHORTEST_REST {
            return value(
                "ipam.cooldown_seconds",
                format!("a freed address rests for at least {} s", SHORTEST_REST.as_secs()),
            );
        }
        let grace = file.ipam.grace_seconds.unwrap_or(60);
        if grace == 0 {
            return value("ipam.grace_seconds", "must be at least 1".to_owned());
        }
        if resync == 0 {
            return value("resync_seconds", "must be at least 1".to_owned());
        }
        if let Some(mtu) = file.mtu.filter(|mtu| !MTU_RANGE.contains(mtu)) {
            return value("mtu", format!("{mtu} is not in {} to {}", MTU_RANGE.start(), MTU_RANGE.end()));
        }
        for family in Family::BOTH {
            if file.underlay.addresses.iter().filter(|address| Family::of(**address) == family).count() > 1 {
                return value("underlay.addresses", format!("more than one {family} address"));
            }
        }
        let Places { node, state_dir, socket, cni_conf_dir } = Places::of(&file, &flags)?;
        Ok(Self {
            node,
            state_dir,
            socket,
            cni_conf_dir,
            http: flags.http.or(file.http).unwrap_or_else(|| SocketAddr::from(([127, 0, 0, 1], 9474))),
            store: store(file.store, file.etcd, flags.etcd)?,
            underlay: file.underlay,
            mtu: file.mtu,
            cooldown,
            grace: Duration::from_secs(grace),
            resync: Duration::from_secs(resync),
            probe_peers: file.probe_peers.unwrap_or(true),
            identity: file.identity,
            labels: file.labels,
            bootstrap: file.bootstrap.map(bootstrap::File::check).transpose()?,
        })
    }
}

impl Config {
    /// What may be wrong with it although it can be used, each with the remedy.
    pub fn warnings(&self) -> Vec<String> {
        let pools = self.bootstrap.iter().flat_map(|bootstrap| &bootstrap.pools);
        let doubts = pools.flat_map(|pool| special::doubts(pool.cidr()));
        doubts.map(|doubt| format!("bootstrap.pools: {doubt}")).collect()
    }
}

impl Places {
    /// From the file that the flags name, and the flags, whatever else may be wrong with them.
    pub fn load(flags: &Flags) -> Result<Self, ConfigError> {
        Self::of(&File::named_by(flags)?, flags)
    }

    fn of(file: &File, flags: &Flags) -> Result<Self, ConfigError> {
        let path = |key, flag: &Option<PathBuf>, file: &Option<PathBuf>, usual: &str| {
            absolute(key, flag.as_ref().or(file.as_ref()).cloned().unwrap_or_else(|| usual.into()))
        };
        Ok(Self {
            node: flags.node.as_ref().or(file.node.as_ref()).cloned().map_or_else(default_node_name, Ok)?,
            state_dir: path("state_dir", &flags.state_dir, &file.state_dir, "/var/lib/polder")?,
            socket: path("socket", &flags.socket, &file.socket, DEFAULT_SOCKET)?,
            cni_conf_dir: path("cni_conf_dir", &flags.cni_conf_dir, &file.cni_conf_dir, "/etc/cni/net.d")?,
        })
    }
}

impl File {
    fn named_by(flags: &Flags) -> Result<Self, ConfigError> {
        match &flags.config {
            Some(path) => read(path),
            None if Path::new(DEFAULT_FILE).exists() => read(Path::new(DEFAULT_FILE)),
            None => Ok(Self::default()),
        }
    }
}

/// The path, if it is absolute. The plugin and `polderctl` have other working directories than the agent.
fn absolute(key: &'static str, path: PathBuf) -> Result<PathBuf, ConfigError> {
    if path.is_absolute() {
        return Ok(path);
    }
    value(key, format!("{} is a relative path: write it from the root, like /run/polder", path.display()))
}

fn value<T>(key: &'static str, problem: String) -> Result<T, ConfigError> {
    Err(ConfigError::Value { key, problem })
}

fn read(path: &Path) -> Result<File, ConfigError> {
    let text =
        fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
    toml::from_str(&text).map_err(|error| {
        let before = error.span().and_then(|span| text.get(..span.start)).unwrap_or_default();
        ConfigError::Parse {
            path: path.to_owned(),
            line: before.matches('\n').count() + 1,
            message: error.message().replace('\n', " "),
        }
    })
}

fn store(kind: StoreKind, file: EtcdFile, flag: Option<Vec<String>>) -> Result<StoreConfig, ConfigError> {
    let endpoints = flag.unwrap_or(file.endpoints);
    if matches!(kind, StoreKind::Embedded) {
        if !endpoints.is_empty() {
            return value("store", "\"embedded\" has no etcd endpoints: remove one or the other".to_owned());
        }
        return Ok(StoreConfig::Embedded);
    }
    if endpoints.is_empty() {
        let problem =
            "no endpoint is given: set it, or --etcd, or store = \"embedded\" for a node of its own";
        return value("etcd.endpoints", problem.to_owned());
    }
    for endpoint in &endpoints {
        if !endpoint.starts_with("http://") && !endpoint.starts_with("https://") {
            let problem = format!("{endpoint:?} is not a URL: write http://HOST:PORT or https://HOST:PORT");
            return value("etcd.endpoints", problem);
        }
    }
    let secure = endpoints.iter().filter(|endpoint| endpoint.starts_with("https://")).count();
    if secure != 0 && secure != endpoints.len() {
        return value("etcd.endpoints", "http:// and https:// are mixed".to_owned());
    }
    let has_files = file.ca.is_some() || file.cert.is_some() || file.key.is_some();
    if secure == 0 && has_files {
        return value("etcd.ca", "certificates are given, but the endpoints are http://".to_owned());
    }
    let identity = match (&file.cert, &file.key) {
        (Some(certificate), Some(key)) => Some((pem("etcd.cert", certificate)?, pem("etcd.key", key)?)),
        (None, None) => None,
        _ => return value("etcd.cert", "a certificate and its key go together: set both".to_owned()),
    };
    let ca = file.ca.as_deref().map(|path| pem("etcd.ca", path)).transpose()?;
    if secure > 0 && ca.is_none() {
        return value("etcd.ca", "https:// needs the authority that signed etcd's certificate".to_owned());
    }
    Ok(StoreConfig::Etcd(EtcdConfig { endpoints, ca, identity }))
}

/// Reads a file of PEM blocks.
fn pem(key: &'static str, path: &Path) -> Result<Vec<u8>, ConfigError> {
    match fs::read(absolute(key, path.to_owned())?) {
        Ok(bytes) if String::from_utf8_lossy(&bytes).contains("-----BEGIN ") => Ok(bytes),
        Ok(_) => value(key, format!("{} holds no PEM block", path.display())),
        Err(error) => value(key, format!("{}: {error}", path.display())),
    }
}

mod bootstrap;
#[cfg(test)]
mod tests;
