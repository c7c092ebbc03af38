//! The agent's configuration: a file, overridden by environment variables, overridden by flags. It is validated
//! completely before the agent changes anything.

use std::env;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Parser;
use polder_api::{DEFAULT_SOCKET, Family, NodeName};
use polder_ipam::allocator::{DEFAULT_COOL_DOWN, SHORTEST_COOL_DOWN};
use polder_ipam::bootstrap::Bootstrap;
use polder_ipam::membership::Proof;
use polder_ipam::pool::Labels;
use polder_ipam::prefix::Prefix;
use polder_ipam::record::MTU_RANGE;
use polder_ipam::special;
use polder_store::etcd::config::EtcdConfig;
use serde::{Deserialize, Serialize};

use self::cni::CniFile;
use self::error::InvalidValue;
use self::etcd::EtcdFile;
use self::http::HttpAddress;
use self::kubernetes::KubernetesFile;
use self::layers::Layers;
use crate::conflist::{Conflist, Network};
use crate::kernel::sysctl;
use crate::kubernetes::settings::KubernetesConfig;
use crate::machine::default_node_name;
use crate::state_dir::CONFLIST;

/// Command line flags of `polder-agent`.
#[derive(Debug, Default, Parser)]
pub struct Flags {
    /// Configuration file [default: /etc/polder/agent.toml, if it exists]
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Name of this node [default: the host name]
    #[arg(long, value_name = "NAME")]
    pub node: Option<NodeName>,
    /// Directory of the ledger and the cluster snapshot [default: /var/lib/polder]
    #[arg(long, value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
    /// Unix socket on which the agent serves the CNI plugins and polderctl [default: /run/polder/agent.sock]
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// URLs of the etcd members, separated by commas
    #[arg(long, value_name = "URL", value_delimiter = ',')]
    pub etcd: Option<Vec<String>>,
    /// Directory for the CNI configuration [default: /etc/cni/net.d]
    #[arg(long, value_name = "DIR")]
    pub cni_conf_dir: Option<PathBuf>,
    /// Listen address and port for metrics and health checks [default: 127.0.0.1:9474]
    #[arg(long, value_name = "ADDR")]
    pub http: Option<HttpAddress>,
    /// Check the configuration, print any errors and warnings, and exit
    #[arg(long)]
    pub check_config: bool,
    /// Print each configuration value and its source (secrets are hidden), check the configuration, and exit
    #[arg(long)]
    pub print_config: bool,
    /// Print what the agent would change on this node (records, kernel, files), and exit without changing anything
    ///
    /// Use it on a node where no agent is running. For a running agent, use polderctl plan instead. Reads etcd and the
    /// kernel, and changes only temporary copies. If other nodes claim blocks before the agent starts, this node can
    /// get other blocks than the plan shows.
    #[arg(long, conflicts_with_all = ["check_config", "print_config"])]
    pub plan: bool,
}

/// The checked configuration.
#[derive(Debug, Clone)]
pub struct Config {
    /// The node's name.
    pub node: NodeName,
    /// Directory of the ledger and the cluster snapshot.
    pub state_dir: PathBuf,
    /// Unix socket of the agent.
    pub socket: PathBuf,
    /// Path of the CNI configuration file.
    pub cni_file: PathBuf,
    /// Content of the CNI configuration.
    pub network: Network,
    /// Directory of the kernel's network settings, usually `/proc/sys/net`.
    pub proc_sys_net: PathBuf,
    /// Whether the ledger may be lost with the container.
    pub allow_ephemeral_state: bool,
    /// Listen address for metrics and health.
    pub http: SocketAddr,
    /// Datastore of the cluster's records.
    pub store: StoreConfig,
    /// Key prefix of the cluster's records.
    pub prefix: Prefix,
    /// Configured underlay addresses of the node.
    pub underlay: UnderlayConfig,
    /// MTU of the pods in bytes. `None`: derived from the underlay.
    pub mtu: Option<u32>,
    /// Cool-down of a released address.
    pub cooldown: Duration,
    /// Time after which the addresses of a missing pod are released without a DEL.
    pub grace: Duration,
    /// Interval of the periodic passes over the kernel state.
    pub resync: Duration,
    /// Whether readiness requires that a peer answers, if any peer is alive.
    pub probe_peers: bool,
    /// Whether the kernel's NAT stays loaded while other software flushes all nftables tables.
    pub keep_nat: bool,
    /// Required proof that this machine is the node of its ledger.
    pub identity: Proof,
    /// Whether the fast path is used.
    pub fastpath: FastPathSetting,
    /// Labels by which pools select the node.
    pub labels: Labels,
    /// The connection to the Kubernetes API server. `None`: not connected.
    pub kubernetes: Option<KubernetesConfig>,
    /// Initial settings of the cluster, used if the datastore has none.
    pub bootstrap: Option<Bootstrap>,
}

/// Node name and paths of the agent on this machine: the settings that `uninstall` needs.
#[derive(Debug, Clone)]
pub struct NodePaths {
    /// The node's name.
    pub node: NodeName,
    /// Directory of the ledger and the cluster snapshot.
    pub state_dir: PathBuf,
    /// Unix socket of the agent.
    pub socket: PathBuf,
    /// Path of the CNI configuration file.
    pub cni_file: PathBuf,
    /// Directory of the kernel's network settings, usually `/proc/sys/net`.
    pub proc_sys_net: PathBuf,
    /// Whether the ledger may be lost with the container.
    pub allow_ephemeral_state: bool,
}

/// Datastore of the cluster's records.
#[derive(Debug, Clone)]
pub enum StoreConfig {
    /// In etcd.
    Etcd(EtcdConfig),
    /// In a file on this node, for a cluster of one node.
    Embedded,
}

/// Underlay addresses of this node, by interface or by address.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct UnderlayConfig {
    /// Use the addresses of this interface.
    pub interface: Option<String>,
    /// Use these addresses, at most one per family.
    pub addresses: Vec<IpAddr>,
}

/// All settings as written in the file, with defaults for those that are not set.
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
    fastpath: FastPathSetting,
    etcd: EtcdFile,
    underlay: UnderlayConfig,
    ipam: IpamFile,
    nftables: NftablesFile,
    labels: Labels,
    kubernetes: Option<KubernetesFile>,
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
            fastpath: FastPathSetting::default(),
            etcd: EtcdFile::default(),
            underlay: UnderlayConfig::default(),
            ipam: IpamFile::default(),
            nftables: NftablesFile::default(),
            labels: Labels::new(),
            kubernetes: None,
            bootstrap: None,
        }
    }
}

/// Whether pods' packets may skip the host's IP stack.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum FastPathSetting {
    /// Where the kernel allows it.
    Auto,
    /// Never.
    #[default]
    Off,
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
        Self { cooldown_seconds: DEFAULT_COOL_DOWN.as_secs(), grace_seconds: 60 }
    }
}

impl Config {
    /// Reads the file that the flags name, and applies variables and flags to it.
    pub fn load(flags: &Flags) -> Result<Self, ConfigError> {
        Self::of(&Layers::read(flags, env::vars_os())?)
    }

    fn of(layers: &Layers) -> Result<Self, ConfigError> {
        Self::check(layers.file()?).map_err(|error| layers.locate(error))
    }

    fn check(file: File) -> Result<Self, ConfigError> {
        let cooldown = Duration::from_secs(file.ipam.cooldown_seconds);
        if cooldown < SHORTEST_COOL_DOWN {
            return value("ipam.cooldown_seconds", InvalidValue::CoolDown);
        }
        if file.ipam.grace_seconds == 0 {
            return value("ipam.grace_seconds", InvalidValue::Zero);
        }
        if file.resync_seconds == 0 {
            return value("resync_seconds", InvalidValue::Zero);
        }
        if let Some(mtu) = file.mtu.filter(|mtu| !MTU_RANGE.contains(mtu)) {
            return value("mtu", InvalidValue::Mtu { mtu });
        }
        for family in Family::BOTH {
            if file.underlay.addresses.iter().filter(|address| Family::of(**address) == family).count() > 1 {
                return value("underlay.addresses", InvalidValue::TwoAddresses(family));
            }
        }
        let NodePaths { node, state_dir, socket, cni_file, proc_sys_net, allow_ephemeral_state } =
            NodePaths::of(&file)?;
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
            fastpath: file.fastpath,
            labels: file.labels,
            kubernetes: file.kubernetes.map(KubernetesFile::check).transpose()?.flatten(),
            bootstrap: file.bootstrap.map(bootstrap::File::check).transpose()?,
        })
    }
}

impl Config {
    /// The CNI configuration file of this node.
    pub fn conflist(&self) -> Conflist<'_> {
        Conflist::new(&self.cni_file, &self.socket, &self.network, self.state_dir.join(CONFLIST))
    }

    /// Warnings about a usable configuration, each with a remedy.
    pub fn warnings(&self) -> Vec<String> {
        let pools = self.bootstrap.iter().flat_map(|bootstrap| &bootstrap.pools);
        let warnings = pools.flat_map(|pool| special::warnings(pool.cidr()));
        let warnings = warnings.map(|warning| format!("bootstrap.pools: {warning}"));
        let in_clear = match &self.store {
            StoreConfig::Etcd(etcd) => etcd.credentials.is_some() && !etcd.is_secure(),
            StoreConfig::Embedded => false,
        };
        let words = "etcd.user: the password is sent without encryption: enable TLS in etcd and use https:// endpoints \
                     (with etcd.discovery_srv: set etcd.ca)";
        let server = self.kubernetes.as_ref().and_then(|kubernetes| kubernetes.api_server.as_ref());
        let is_open = server.is_some_and(|server| !server.is_secure());
        let open = "kubernetes.api_server: the agent's credentials are sent without encryption: use https://";
        let in_clear = in_clear.then_some(words);
        warnings.chain(in_clear.into_iter().chain(is_open.then_some(open)).map(str::to_owned)).collect()
    }
}

impl NodePaths {
    /// Reads the settings from file, variables and flags. Other settings are not validated.
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

/// Returns the path if it is absolute. The plugin and `polderctl` have other working directories than the agent.
fn absolute(key: &'static str, path: &Path) -> Result<PathBuf, ConfigError> {
    if path.is_absolute() {
        return Ok(path.to_owned());
    }
    value(key, InvalidValue::Relative(path.to_owned()))
}

fn value<T>(key: &'static str, problem: impl Into<InvalidValue>) -> Result<T, ConfigError> {
    Err(ConfigError::Value { key, problem: Box::new(problem.into()) })
}

mod bootstrap;
mod cni;
mod error;
mod etcd;
mod http;
mod kubernetes;
mod layers;
mod print;
#[cfg(test)]
mod tests;

pub use error::ConfigError;
pub use print::printed;
