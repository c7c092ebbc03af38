//! The result of an ADD, in the shape of each version (CNI specification, section 5).

use std::path::Path;

use ipnetwork::IpNetwork;
use polder_api::message::{Attach, Wiring};
use polder_api::{BRIDGE, Family, IfName, Mac};
use serde_json::{Map, Value, json};

use crate::netconf::NetConf;
use crate::version::Version;

/// What was made.
#[derive(Debug)]
pub struct Made<'a> {
    /// The wiring.
    pub wiring: &'a Wiring,
    /// The MAC address of the host's end.
    pub host_mac: Option<Mac>,
    /// The pod's interface.
    pub interface: &'a IfName,
    /// Its namespace.
    pub netns: &'a Path,
}

/// The result, behind that of the plugins before this one.
pub fn result(conf: &NetConf, made: &Made<'_>) -> String {
    let mut result = conf.previous.clone().unwrap_or_default();
    result.insert("cniVersion".to_owned(), json!(conf.version));
    let before = list(&mut result, "interfaces").len();
    let interfaces = interfaces(conf.version, made);
    let pods = before + interfaces.len() - 1;
    list(&mut result, "interfaces").extend(interfaces);
    for address in &made.wiring.addresses {
        let family = Family::of(address.address);
        let prefix = IpNetwork::new(address.address, family.bits()).expect("the length of a whole address");
        let mut ip = json!({ "address": prefix, "gateway": address.gateway, "interface": pods });
        if conf.version < Version::V1_0_0 {
            ip["version"] = json!(if family == Family::V4 { "4" } else { "6" });
        }
        list(&mut result, "ips").push(ip);
        let everywhere = if family == Family::V4 { "0.0.0.0/0" } else { "::/0" };
        list(&mut result, "routes").push(json!({ "dst": everywhere, "gw": address.gateway }));
    }
    match &conf.dns {
        Some(dns) => drop(result.insert("dns".to_owned(), dns.clone())),
        None => drop(result.entry("dns").or_insert_with(|| json!({}))),
    }
    format!("{:#}\n", Value::Object(result))
}

/// The bridge, the host's end and the pod's, which is last and the only one that is in a sandbox.
fn interfaces(version: Version, made: &Made<'_>) -> Vec<Value> {
    let wiring = made.wiring;
    let mut interfaces = Vec::new();
    if let Attach::Bridge { .. } = wiring.attach {
        interfaces.push(json!({ "name": BRIDGE, "mac": wiring.gateway_mac }));
    }
    interfaces.push(json!({ "name": wiring.host_interface, "mac": made.host_mac }));
    interfaces.push(json!({ "name": made.interface, "mac": wiring.mac, "sandbox": made.netns }));
    if version >= Version::V1_1_0 {
        // The bridge has an MTU of its own, which is not ours to know.
        interfaces.iter_mut().rev().take(2).for_each(|interface| interface["mtu"] = json!(wiring.mtu));
    }
    interfaces
}

/// The list of that name, made if it is not there. What is there and no list is not the specification's.
fn list<'a>(result: &'a mut Map<String, Value>, key: &str) -> &'a mut Vec<Value> {
    let value = result.entry(key).or_insert_with(|| json!([]));
    if !value.is_array() {
        *value = json!([]);
    }
    value.as_array_mut().expect("it was just made one")
}

#[cfg(test)]
mod tests {
    use polder_api::message::PodAddress;

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
        }
    }

    fn made(version: &str, previous: Option<Value>) -> Value {
        let conf = json!({ "cniVersion": version, "name": "n", "prevResult": previous });
        let conf = NetConf::read(Version::parse(version).unwrap(), conf.as_object().unwrap()).unwrap();
        let (wiring, interface) = (wiring(), "eth0".parse().unwrap());
        let made = Made {
            wiring: &wiring,
            host_mac: "06:00:00:00:00:02".parse().ok(),
            interface: &interface,
            netns: Path::new("/run/netns/c1"),
        };
        serde_json::from_str(&result(&conf, &made)).unwrap()
    }

    #[test]
    fn each_version_has_its_shape() {
        for version in Version::ALL {
            let mut expected = json!({
                "cniVersion": version,
                "interfaces": [
                    { "name": "polder0", "mac": "06:00:00:00:00:01" },
                    { "name": "pld0123456789ab", "mac": "06:00:00:00:00:02" },
                    { "name": "eth0", "mac": "0a:58:0a:f4:00:05", "sandbox": "/run/netns/c1" },
                ],
                "ips": [
                    { "interface": 2, "address": "10.244.0.5/32", "gateway": "10.244.0.1" },
                    { "interface": 2, "address": "fd00:244::5/128", "gateway": "fd00:244::1" },
                ],
                "routes": [
                    { "dst": "0.0.0.0/0", "gw": "10.244.0.1" },
                    { "dst": "::/0", "gw": "fd00:244::1" },
                ],
                "dns": {},
            });
            if version < Version::V1_0_0 {
                expected["ips"][0]["version"] = json!("4");
                expected["ips"][1]["version"] = json!("6");
            }
            if version == Version::V1_1_0 {
                (1..3).for_each(|n| expected["interfaces"][n]["mtu"] = json!(1450));
            }
            assert_eq!(made(version.as_str(), None), expected);
        }
    }

    #[test]
    fn what_plugins_before_this_one_did_is_passed_on() {
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
