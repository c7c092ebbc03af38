//! A pod of the lab: a network namespace that the plugin has attached.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::Command;

use polder_api::{Attachment, Family};
use serde_json::Value;

use crate::node::{Node, within};

/// A pod.
#[derive(Debug, Clone)]
pub struct Pod {
    name: String,
    node: String,
    netns: String,
    outside: PathBuf,
    enter: Vec<String>,
    conf: Value,
    result: Value,
}

impl Pod {
    /// The pod that the plugin has attached with this result.
    pub fn new(node: &Node, name: &str, netns: &str, conf: Value, result: Value) -> Self {
        let command = node.command_in(Path::new(netns), "");
        let words = std::iter::once(command.get_program()).chain(command.get_args());
        let mut enter: Vec<String> = words.map(|word| word.to_string_lossy().into_owned()).collect();
        enter.pop();
        Self {
            name: name.to_owned(),
            node: node.name().to_owned(),
            netns: netns.to_owned(),
            outside: node.path_on_host(Path::new(netns)),
            enter,
            conf,
            result,
        }
    }

    /// Name of the pod, also its container ID.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The name of its node.
    pub fn node(&self) -> &str {
        &self.node
    }

    /// Path of its namespace in the node.
    pub fn netns(&self) -> &str {
        &self.netns
    }

    /// The configuration that it was attached with.
    pub fn conf(&self) -> &Value {
        &self.conf
    }

    /// The result of the ADD.
    pub fn result(&self) -> &Value {
        &self.result
    }

    /// The configuration that a runtime passes after the ADD: with the result as `prevResult`.
    pub fn later_conf(&self) -> Value {
        let mut conf = self.conf.clone();
        conf["prevResult"] = self.result.clone();
        conf
    }

    /// The entries of the addresses in the result. Before CNI 0.3.0 it had one per family, under other keys.
    fn ips(&self) -> impl Iterator<Item = &Value> {
        let old = ["ip4", "ip6"].into_iter().filter_map(|key| self.result.get(key));
        self.result["ips"].as_array().into_iter().flatten().chain(old)
    }

    /// Addresses of the pod.
    pub fn addresses(&self) -> Vec<IpAddr> {
        let address = |ip: &Value| {
            let text = ip.get("address").or_else(|| ip.get("ip"))?.as_str()?;
            text.split('/').next()?.parse().ok()
        };
        self.ips().filter_map(address).collect()
    }

    /// Its address of that family. Panics if it has none.
    pub fn address_of(&self, family: Family) -> IpAddr {
        let found = self.addresses().into_iter().find(|address| Family::of(*address) == family);
        found.unwrap_or_else(|| panic!("{} on {} has no {family} address", self.name, self.node))
    }

    /// Its address of the same family as `other`.
    pub fn address_like(&self, other: IpAddr) -> IpAddr {
        self.address_of(Family::of(other))
    }

    /// Its IPv4 address.
    pub fn v4(&self) -> IpAddr {
        self.address_of(Family::V4)
    }

    /// Its gateway of the same family as `address`.
    pub fn gateway(&self, address: IpAddr) -> IpAddr {
        let mut gateways = self.ips().filter_map(|ip| ip["gateway"].as_str()?.parse::<IpAddr>().ok());
        gateways.find(|gateway| gateway.is_ipv4() == address.is_ipv4()).expect("a gateway")
    }

    /// The attachment of its `eth0`.
    pub fn attachment(&self) -> Attachment {
        Attachment {
            network: self.conf["name"].as_str().expect("a network").parse().expect("a network's name"),
            container: self.name.parse().expect("a container's name"),
            interface: "eth0".parse().expect("an interface's name"),
        }
    }

    /// The host interface of its `eth0`. Not read from the result, which has no interfaces before CNI 0.3.0.
    pub fn host_interface(&self) -> String {
        self.attachment().host_interface().as_str().to_owned()
    }

    /// A command that runs in the pod.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new(&self.enter[0]);
        command.args(&self.enter[1..]).arg(program);
        command
    }

    /// Command with which a user enters the pod.
    pub fn how_to_enter(&self) -> String {
        self.enter.join(" ").trim_end_matches(" --").to_owned()
    }

    /// Runs a command in the pod and returns its output.
    pub fn run(&self, program: &str, arguments: &[&str]) -> String {
        crate::node::output(self.command(program).args(arguments))
    }

    /// Runs a job on a thread in the pod's network namespace.
    pub fn within<T: Send>(&self, job: impl FnOnce() -> T + Send) -> T {
        within(&self.outside, job)
    }
}
