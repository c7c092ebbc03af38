//! The result of a delegated IPAM plugin.

use std::net::IpAddr;

use ipnetwork::IpNetwork;
use serde::Deserialize;
use serde_json::Value;

/// The result of a delegated IPAM plugin, independent of its version.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct DelegatedResult {
    /// The addresses for the pod.
    pub addresses: Vec<IpAddr>,
    /// The routes for the pod. If empty, the main plugin chooses them.
    pub routes: Vec<DelegatedRoute>,
    /// DNS settings, passed on in the result.
    pub dns: Option<Value>,
}

/// A route requested by a delegated IPAM plugin. Its gateway is ignored: the next hop of a pod is always its node.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct DelegatedRoute {
    /// The destination prefix.
    pub dst: IpNetwork,
    /// The route MTU, in bytes.
    pub mtu: Option<u32>,
    /// The advertised TCP maximum segment size, in bytes.
    pub advmss: Option<u32>,
    /// The route metric.
    pub priority: Option<u32>,
}
