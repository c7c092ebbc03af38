//! The agent's configuration: a file, variables of the environment that override it, and flags that override both, checked
//! as a whole before anything is touched.

use std::env;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Parser;
use polder_api::{DEFAULT_SOCKET, Family, NodeName};
use polder_ipam::allocator::{SHORTEST_REST, USUAL_REST};
use polder_ipam::bootstrap::Bootstrap;
use polder_ipam::pool::Labels;
use polder_ipam::prefix::Prefix;
use polder_ipam::record::MTU_RANGE;
use polder_ipam::special;
use polder_ipam::steward::Proof;
use polder_store::etcd::config::EtcdConfig;
use serde::{Deserialize, Serialize};

use self::cni::CniFile;
use self::etcd::EtcdFile;
use self::http::HttpAddress;
use self::layers::Layers;
use crate::conflist::{Conflist, Network};
use crate::kernel::sysctl;
use crate::machine::{MachineError, default_node_name};
use crate::state_dir::CONFLIST;

/// The flags of the daemon.
#[derive(Debug, Default, Parser)]
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
    pub http: Option<HttpAddress>,
    /// Check the configuration, say what is wrong with it, and exit
    #[arg(long)]
    pub check_config: bool,
    /// Print each value of the configuration and where it comes from, without secrets; check it, and exit
    #[arg(long)]
    pub print_config: bool,
    /// Print what the agent would do on this node (records, kernel, files), and exit; nothing is changed
    ///
    /// For a node on which no agent runs yet; a running one is asked by polderctl plan. Reads etcd and the kernel, and works on
    /// copies. Another node can claim blocks meanwhile: then this one gets others than are shown.
    #[arg(long, conflicts_with_all = ["check_config", "print_config"])]
    pub plan: bool,
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
    /// The file of the CNI configuration.
    pub cni_file: PathBuf,
    /// What the CNI configuration says.
    pub network: Network,
    /// Where the kernel's settings of the network are.
    pub proc_sys_net: PathBuf,
    /// Whether the ledger may be lost with the container.
    pub allow_ephemeral_state: bool,
    /// Where metrics and health are served.
    pub http: SocketAddr,
    /// Where the cluster's records are.
    pub store: StoreConfig,
    /// What the keys of the cluster's records start with.
    pub prefix: Prefix,
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
    /// Whether the kernel's NAT runs on while others flush all tables.
    pub keep_nat: bool,
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
    /// The file of the CNI configuration.
    pub cni_file: PathBuf,
    /// Where the kernel's settings of the network are.
    pub proc_sys_net: PathBuf,
    /// Whether the ledger may be lost with the container.
    pub allow_ephemeral_state: bool,
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
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct UnderlayConfig {
    /// Those of this interface.
    pub interface: Option<String>,
    /// These: at most one of a family.
    pub addresses: Vec<IpAddr>,
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
    #[error("{}", in_file(path, faults))]
    Parse {
        /// The file.
        path: PathBuf,
        /// What is wrong, and in which line.
        faults: Vec<(usize, String)>,
    },
    /// A variable of the environment is not what it should be.
    #[error("environment variable {name}: {problem}")]
    Variable {
        /// Its name.
        name: String,
        /// What is wrong, and the remedy.
        problem: String,
    },
    /// A value that is there does not make sense.
    #[error("{key}: {problem}")]
    Value {
        /// The key or flag.
        key: &'static str,
        /// What is wrong, and the remedy.
        problem: String,
    },
    /// File, variables and flags are each correct, and together they are not.
    #[error("file, variables and flags together: {0}")]
    Merged(String),
    /// The machine has no name.
    #[error(transparent)]
    Machine(#[from] MachineError),
}

/// One line for each fault.
fn in_file(path: &Path, faults: &[(usize, String)]) -> String {
    let line = |(line, problem): &(usize, String)| format!("{}:{line}: {problem}", path.display());
    faults.iter().map(line).collect::<Vec<_>>().join("\n")
}

/// All that can be set, as it is written, with the defaults of what is not.
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
struct File {
    node: Option<NodeName>,
    state_dir: PathBuf,
    socket: PathBuf,
    cni_conf_dir: PathBuf,
    cni: CniFile,
    proc_sys_net: PathBuf,
    allow_ephemeral_state: bool,
    http: HttpAddress,
    store: StoreKind,
    mtu: Option<u32>,
    resync_seconds: u64,
    probe_peers: bool,
    identity: Proof,
    etcd: EtcdFile,
    underlay: UnderlayConfig,
    ipam: IpamFile,
    nftables: NftablesFile,
    labels: Labels,
    bootstrap: Option<bootstrap::File>,
}

impl Default for File {
    fn default() -> Self {
        Self {
            node: None,
            state_dir: "/var/lib/polder".into(),
            socket: DEFAULT_SOCKET.into(),
            cni_conf_dir: "/etc/cni/net.d".into(),
            cni: CniFile::default(),
            proc_sys_net: sysctl::USUAL_FOLDER.into(),
            allow_ephemeral_state: false,
            http: HttpAddress::new(SocketAddr::from(([127, 0, 0, 1], 9474))),
            store: StoreKind::default(),
            mtu: None,
            resync_seconds: 30,
            probe_peers: true,
            identity: Proof::default(),
            etcd: EtcdFile::default(),
            underlay: UnderlayConfig::default(),
            ipam: IpamFile::default(),
            nftables: NftablesFile::default(),
            labels: Labels::new(),
            bootstrap: None,
        }
    }
}

#[derive(Debug, Default, Clone, Copy, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
enum StoreKind {
    #[default]
    Etcd,
    Embedded,
}

#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
struct IpamFile {
    cooldown_seconds: u64,
    grace_seconds: u64,
}

#[derive(Debug, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
struct NftablesFile {
    keep_nat: bool,
}

impl Default for IpamFile {
    fn default() -> Self {
        Self { cooldown_seconds: USUAL_REST.as_secs(), grace_seconds: 60 }
    }
}

impl Config {
    /// Reads the file that the flags name, and lets variables and flags override it.
    pub fn load(flags: &Flags) -> Result<Self, ConfigError> {
        Self::of(&Layers::read(flags, env::vars_os())?)
    }

    fn of(layers: &Layers) -> Result<Self, ConfigError> {
        Self::check(layers.file()?).map_err(|error| layers.locate(error))
    }

    fn check(file: File) -> Result<Self, ConfigError> {
        let cooldown = Duration::from_secs(file.ipam.cooldown_seconds);
        if cooldown < SHORTEST_REST {
            return value(
                "ipam.cooldown_seconds",
                format!("a freed address rests for at least {} s", SHORTEST_REST.as_secs()),
            );
        }
        if file.ipam.grace_seconds == 0 {
            return value("ipam.grace_seconds", "must be at least 1".to_owned());
        }
        if file.resync_seconds == 0 {
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
        let Places { node, state_dir, socket, cni_file, proc_sys_net, allow_ephemeral_state } =
            Places::of(&file)?;
        Ok(Self {
            node,
            state_dir,
            socket,
            cni_file,
            network: file.cni.check()?,
            proc_sys_net,
            allow_ephemeral_state,
            http: file.http.get(),
            prefix: file.etcd.prefix.clone(),
            store: match file.store {
                StoreKind::Etcd => StoreConfig::Etcd(file.etcd.check()?),
                StoreKind::Embedded => file.etcd.check_absent().map(|()| StoreConfig::Embedded)?,
            },
            underlay: file.underlay,
            mtu: file.mtu,
            cooldown,
            grace: Duration::from_secs(file.ipam.grace_seconds),
            resync: Duration::from_secs(file.resync_seconds),
            probe_peers: file.probe_peers,
            keep_nat: file.nftables.keep_nat,
            identity: file.identity,
            labels: file.labels,
            bootstrap: file.bootstrap.map(bootstrap::File::check).transpose()?,
        })
    }
}

impl Config {
    /// The file that lets runtimes find the network.
    pub fn conflist(&self) -> Conflist<'_> {
        Conflist::new(&self.cni_file, &self.socket, &self.network, self.state_dir.join(CONFLIST))
    }

    /// What may be wrong with it although it can be used, each with the remedy.
    pub fn warnings(&self) -> Vec<String> {
        let pools = self.bootstrap.iter().flat_map(|bootstrap| &bootstrap.pools);
        let doubts = pools.flat_map(|pool| special::doubts(pool.cidr()));
        let doubts = doubts.map(|doubt| format!("bootstrap.pools: {doubt}"));
        let in_clear = match &self.store {
            StoreConfig::Etcd(etcd) => etcd.credentials.is_some() && !etcd.is_secure(),
            StoreConfig::Embedded => false,
        };
        let words = "etcd.user: its password is sent without encryption: let etcd speak TLS, and write https:// endpoints (with etcd.discovery_srv: set etcd.ca)";
        doubts.chain(in_clear.then(|| words.to_owned())).collect()
    }
}

impl Places {
    /// From file, variables and flags, whatever else may be wrong with them.
    pub fn load(flags: &Flags) -> Result<Self, ConfigError> {
        let layers = Layers::read(flags, env::vars_os())?;
        Self::of(&layers.file()?).map_err(|error| layers.locate(error))
    }

    fn of(file: &File) -> Result<Self, ConfigError> {
        Ok(Self {
            node: file.node.clone().map_or_else(default_node_name, Ok)?,
            state_dir: absolute("state_dir", &file.state_dir)?,
            socket: absolute("socket", &file.socket)?,
            cni_file: absolute("cni_conf_dir", &file.cni_conf_dir)?.join(file.cni.file_name()?),
            proc_sys_net: absolute("proc_sys_net", &file.proc_sys_net)?,
            allow_ephemeral_state: file.allow_ephemeral_state,
        })
    }
}

/// The path, if it is absolute. The plugin and `polderctl` have other working directories than the agent.
fn absolute(key: &'static str, path: &Path) -> Result<PathBuf, ConfigError> {
    if path.is_absolute() {
        return Ok(path.to_owned());
    }
    value(key, format!("{} is a relative path: write it from the root, like /run/polder", path.display()))
}

fn value<T>(key: &'static str, problem: String) -> Result<T, ConfigError> {
    Err(ConfigError::Value { key, problem })
}

mod bootstrap;
mod cni;
mod etcd;
mod http;
mod layers;
mod print;
#[cfg(test)]
mod tests;

pub use print::printed;
