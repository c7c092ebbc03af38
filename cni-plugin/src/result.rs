//! The result of an ADD, in the format of each version (CNI specification, section 5).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;

use ipnetwork::IpNetwork;
use polder_api::message::{Attach, LeasedAddress, Wiring};
use polder_api::{BRIDGE, Family, IfName, Mac};
use serde_json::{Map, Value, json};

use crate::delegated::{DelegatedResult, DelegatedRoute};
use crate::netconf::NetConf;
use crate::pod::host_prefix;
use crate::version::Version;

/// The attachment that ADD made.
#[derive(Debug)]
pub struct AttachedPod<'a> {
    /// The wiring that the agent returned.
    pub wiring: &'a Wiring,
    /// The MAC address of the host end of the veth pair.
    pub host_mac: Option<Mac>,
    /// The name of the interface in the pod.
    pub interface: &'a IfName,
    /// The path of the pod's network namespace.
    pub netns: &'a Path,
    /// The result of a delegated IPAM plugin.
    pub given: Option<&'a DelegatedResult>,
}

/// The result of `polder`, appended to `prevResult`.
pub fn result(conf: &NetConf, made: &AttachedPod<'_>) -> String {
    let wiring = made.wiring;
    let mut result = Shape::behind(conf);
    let pod = result.interfaces(interfaces(conf.version, made));
    for own in &wiring.addresses {
        result.address(host_prefix(own.address), Some(own.gateway), pod);
    }
    let given = made.given.map_or(&[][..], |given| &given.routes);
    let firsts =
        Family::BOTH.map(|family| wiring.addresses.iter().find(move |own| Family::of(own.address) == family));
    for own in firsts.into_iter().flatten() {
        let family = Family::of(own.address);
        let of_family = |route: &&DelegatedRoute| Family::of(route.dst.ip()) == family;
        for route in given.iter().filter(of_family) {
            let mtu = route.mtu.unwrap_or(wiring.mtu);
            result.route(route.dst, own.gateway, mtu, route.advmss, route.priority);
        }
        if given.is_empty() {
            result.route(everywhere(family), own.gateway, wiring.mtu, None, None);
        }
    }
    result.text(made.given.and_then(|given| given.dns.as_ref()))
}

/// The abbreviated result of an IPAM plugin: addresses and routes for the interface.
pub fn ipam_result(conf: &NetConf, addresses: &[LeasedAddress]) -> String {
    let mut result = Shape::of(conf.version, Map::new(), conf.dns.clone());
    for leased in addresses {
        result.abbreviated_address(leased.address, Some(leased.gateway));
    }
    match &conf.routes {
        Some(routes) => routes.iter().for_each(|route| result.given_route(route)),
        None => {
            for leased in addresses {
                let everywhere = everywhere(Family::of(leased.gateway));
                result.given_route(&json!({ "dst": everywhere, "gw": leased.gateway }));
            }
        }
    }
    result.text(None)
}

/// The result of `loopback`: `prevResult` if it is set, else the interface with its addresses.
pub fn loopback_result(conf: &NetConf, netns: &Path, addresses: impl Iterator<Item = IpNetwork>) -> String {
    let mut result = Shape::behind(conf);
    if conf.previous.is_none() {
        let lo = result.interfaces(vec![json!({ "name": "lo", "mac": Mac([0; 6]), "sandbox": netns })]);
        addresses.for_each(|address| result.address(address, None, lo));
    }
    result.text(None)
}

/// A builder for a result in the format of one version.
struct Shape {
    version: Version,
    result: Map<String, Value>,
    dns: Option<Value>,
}

impl Shape {
    fn behind(conf: &NetConf) -> Self {
        Self::of(conf.version, conf.previous.clone().unwrap_or_default(), conf.dns.clone())
    }

    fn of(version: Version, mut result: Map<String, Value>, dns: Option<Value>) -> Self {
        result.insert("cniVersion".to_owned(), json!(version));
        Self { version, result, dns }
    }

    /// Whether the version is before 0.3.0: a result holds only one address of each family with its routes.
    fn is_old(&self) -> bool {
        self.version < Version::V0_3_0
    }

    /// Appends interfaces. Returns the index of the last.
    fn interfaces(&mut self, interfaces: Vec<Value>) -> usize {
        if self.is_old() {
            return 0;
        }
        let list = list(&mut self.result, "interfaces");
        list.extend(interfaces);
        list.len() - 1
    }

    fn address(&mut self, address: IpNetwork, gateway: Option<IpAddr>, interface: usize) {
        self.abbreviated_address(address, gateway);
        if !self.is_old() {
            let last = list(&mut self.result, "ips").last_mut();
            last.into_iter().for_each(|ip| ip["interface"] = json!(interface));
        }
    }

    fn abbreviated_address(&mut self, address: IpNetwork, gateway: Option<IpAddr>) {
        let family = Family::of(address.ip());
        let key = if self.is_old() { "ip" } else { "address" };
        let mut ip = json!({ key: address });
        if let Some(gateway) = gateway {
            ip["gateway"] = json!(gateway);
        }
        if self.is_old() {
            ip["routes"] = json!([]);
            self.result.insert(old_key(family).to_owned(), ip);
            return;
        }
        if self.version < Version::V1_0_0 {
            ip["version"] = json!(if family == Family::V4 { "4" } else { "6" });
        }
        list(&mut self.result, "ips").push(ip);
    }

    fn route(
        &mut self,
        to: IpNetwork,
        gateway: IpAddr,
        mtu: u32,
        advmss: Option<u32>,
        priority: Option<u32>,
    ) {
        let mut route = json!({ "dst": to, "gw": gateway });
        if self.version >= Version::V1_1_0 {
            let family = Family::of(gateway);
            route["mtu"] = json!(mtu);
            route["advmss"] = json!(advmss.unwrap_or(mtu - tcp_overhead(family)));
            route["priority"] = json!(priority.unwrap_or(usual_metric(family)));
            route["table"] = json!(MAIN_TABLE);
            route["scope"] = json!(UNIVERSE);
        }
        self.given_route(&route);
    }

    fn given_route(&mut self, route: &Value) {
        if !self.is_old() {
            return list(&mut self.result, "routes").push(route.clone());
        }
        let v6 = route["dst"].as_str().is_some_and(|to| to.contains(':'));
        let key = old_key(if v6 { Family::V6 } else { Family::V4 });
        if let Some(routes) = self.result.get_mut(key).and_then(|address| address["routes"].as_array_mut()) {
            routes.push(route.clone());
        }
    }

    fn text(mut self, dns: Option<&Value>) -> String {
        match self.dns.as_ref().or(dns) {
            Some(dns) => drop(self.result.insert("dns".to_owned(), dns.clone())),
            None => drop(self.result.entry("dns").or_insert_with(|| json!({}))),
        }
        format!("{:#}\n", Value::Object(self.result))
    }
}

/// `RT_TABLE_MAIN` (`include/uapi/linux/rtnetlink.h`).
const MAIN_TABLE: u32 = 254;

/// `RT_SCOPE_UNIVERSE`.
const UNIVERSE: u32 = 0;

/// The kernel's default metric of a route; for IPv6 it is `IP6_RT_PRIO_USER` (`include/uapi/linux/ipv6_route.h`).
const fn usual_metric(family: Family) -> u32 {
    match family {
        Family::V4 => 0,
        Family::V6 => 1024,
    }
}

/// Size of the IP and TCP headers, in bytes.
const fn tcp_overhead(family: Family) -> u32 {
    match family {
        Family::V4 => 40,
        Family::V6 => 60,
    }
}

const fn old_key(family: Family) -> &'static str {
    match family {
        Family::V4 => "ip4",
        Family::V6 => "ip6",
    }
}

/// The default route's destination: /0 of the family.
fn everywhere(family: Family) -> IpNetwork {
    let unspecified: IpAddr = match family {
        Family::V4 => Ipv4Addr::UNSPECIFIED.into(),
        Family::V6 => Ipv6Addr::UNSPECIFIED.into(),
    };
    IpNetwork::new(unspecified, 0).expect("0 is a length of every prefix")
}

/// The bridge, the host end and the pod end. The pod end is last, and the only one with a sandbox.
fn interfaces(version: Version, made: &AttachedPod<'_>) -> Vec<Value> {
    let wiring = made.wiring;
    let mut pair = [
        json!({ "name": wiring.host_interface, "mac": made.host_mac }),
        json!({ "name": made.interface, "mac": wiring.mac, "sandbox": made.netns }),
    ];
    if version >= Version::V1_1_0 {
        pair.iter_mut().for_each(|interface| interface["mtu"] = json!(wiring.mtu));
    }
    let bridge = match wiring.attach {
        Attach::Bridge { .. } => Some(json!({ "name": BRIDGE, "mac": wiring.gateway_mac })),
        Attach::Routed => None,
    };
    bridge.into_iter().chain(pair).collect()
}

/// The list of that name, created if missing. A value that is not a list violates the specification and is replaced.
fn list<'a>(result: &'a mut Map<String, Value>, key: &str) -> &'a mut Vec<Value> {
    let value = result.entry(key).or_insert_with(|| json!([]));
    if !value.is_array() {
        *value = json!([]);
    }
    value.as_array_mut().expect("it was just made one")
}

#[cfg(test)]
mod tests {
    use polder_api::message::{Permission, PodAddress};

    use super::*;

    fn wiring() -> Wiring {
        let address = |address: &str, gateway: &str| PodAddress {
            address: address.parse().unwrap(),
            gateway: gateway.parse().unwrap(),
        };
        Wiring {
            host_interface: "pld0123456789ab".parse().unwrap(),
            alias: String::new(),
            attach: Attach::Bridge { locked: true },
            mac: "0a:58:0a:f4:00:05".parse().unwrap(),
            mtu: 1450,
            addresses: vec![address("10.244.0.5", "10.244.0.1"), address("fd00:244::5", "fd00:244::1")],
            gateway_mac: "06:00:00:00:00:01".parse().unwrap(),
            strays: Vec::new(),
            permission: Permission::Given,
        }
    }

    fn made(version: &str, previous: Option<Value>) -> Value {
        let conf = json!({ "cniVersion": version, "name": "n", "prevResult": previous });
        let conf =
            NetConf::read(Version::parse(version).unwrap(), conf.as_object().unwrap().clone()).unwrap();
        let (wiring, interface) = (wiring(), "eth0".parse().unwrap());
        let made = AttachedPod {
            wiring: &wiring,
            host_mac: "06:00:00:00:00:02".parse().ok(),
            interface: &interface,
            netns: Path::new("/run/netns/c1"),
            given: None,
        };
        serde_json::from_str(&result(&conf, &made)).unwrap()
    }

    /// The expected result, from `tests/golden`.
    fn golden(name: &str) -> Value {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
        let text =
            std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        serde_json::from_str(&text).unwrap()
    }

    #[test]
    fn an_add_result_has_the_format_of_its_cni_version() {
        for version in Version::ALL {
            assert_eq!(made(version.as_str(), None), golden(&format!("add-{version}.json")), "{version}");
        }
    }

    #[test]
    fn an_ipam_result_has_the_format_of_its_cni_version() {
        let leased = |address: &str, gateway: &str| LeasedAddress {
            address: address.parse().unwrap(),
            gateway: gateway.parse().unwrap(),
        };
        let addresses = [leased("10.244.0.5/26", "10.244.0.1"), leased("fd00:244::5/122", "fd00:244::1")];
        for version in Version::ALL {
            let conf = json!({ "cniVersion": version, "name": "n", "ipam": { "type": "polder-ipam" } });
            let conf = NetConf::read_ipam(version, conf.as_object().unwrap().clone()).unwrap();
            let result: Value = serde_json::from_str(&ipam_result(&conf, &addresses)).unwrap();
            assert_eq!(result, golden(&format!("ipam-{version}.json")), "{version}");
        }
    }

    #[test]
    fn the_results_of_earlier_plugins_are_passed_on() {
        let previous = json!({
            "cniVersion": "1.0.0",
            "interfaces": [{ "name": "net0", "sandbox": "/run/netns/c1" }],
            "ips": [{ "interface": 0, "address": "192.0.2.5/24" }],
            "dns": { "nameservers": ["192.0.2.1"] },
        });
        let result = made("1.0.0", Some(previous.clone()));
        assert_eq!(result["interfaces"][0], previous["interfaces"][0]);
        assert_eq!(result["ips"][0], previous["ips"][0]);
        assert_eq!(result["ips"][1]["interface"], 3);
        assert_eq!(result["interfaces"][3]["name"], "eth0");
        assert_eq!(result["dns"], previous["dns"]);
    }
}
