//! What another IPAM plugin has given.

use std::net::IpAddr;

use ipnetwork::IpNetwork;
use serde::Deserialize;
use serde_json::Value;

/// What another IPAM plugin has given.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Given {
    /// Addresses.
    pub addresses: Vec<IpAddr>,
    /// The routes that the pod is to have; none says that it is the main plugin's choice.
    pub routes: Vec<GivenRoute>,
    /// For the pod's resolver.
    pub dns: Option<Value>,
}

/// A route that another IPAM plugin wants. Whichever router it names, the way out of a pod is its node.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct GivenRoute {
    /// Where to.
    pub dst: IpNetwork,
    /// The longest packet, in bytes.
    pub mtu: Option<u32>,
    /// The longest TCP segment, in bytes.
    pub advmss: Option<u32>,
    /// Its metric.
    pub priority: Option<u32>,
}
