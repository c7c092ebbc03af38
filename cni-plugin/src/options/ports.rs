//! The host ports of a pod: the capability `portMappings` of the CNI conventions.

use std::net::IpAddr;
use std::num::NonZeroU16;

use polder_api::{PortMapping, TransportProtocol};
use serde::Deserialize;
use serde_json::{Map, Value};

use super::BadOption;
use crate::error::Error;
use crate::netconf::{BadConfig, field};

/// The key in `runtimeConfig`, which is also the name of the capability.
pub(super) const PORT_MAPPINGS: &str = "portMappings";

/// Why an entry of `portMappings` is not a host port.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PortProblem {
    /// The protocol has no ports, or is unknown.
    /// Remedy: use tcp, udp or sctp.
    #[error("protocol {0:?} is not tcp, udp or sctp")]
    Protocol(String),
    /// The port of the container is missing or out of range.
    /// Remedy: use a port from 1 to 65535.
    #[error("the port of the container is not 1 to 65535")]
    ContainerPort,
    /// The port of the host is out of range.
    /// Remedy: use a port from 1 to 65535.
    #[error("the port of the host is not 1 to 65535")]
    HostPort,
    /// The host address is not an IP address.
    /// Remedy: use an address of the node, or omit it for all its addresses.
    #[error("{0:?} is not an IP address")]
    Address(String),
}

/// An entry, with the field names of the CNI conventions or with those of Go, which containerd sends.
#[derive(Debug, Deserialize)]
struct Entry {
    #[serde(alias = "HostPort", rename = "hostPort", default)]
    host_port: i64,
    #[serde(alias = "ContainerPort", rename = "containerPort", default)]
    container_port: i64,
    #[serde(alias = "Protocol", rename = "protocol", default)]
    protocol: String,
    #[serde(alias = "HostIP", rename = "hostIP", default)]
    host_address: String,
}

/// The host ports in `runtimeConfig`. A container port without a host port is none.
pub(super) fn read(runtime: &Map<String, Value>) -> Result<Vec<PortMapping>, Error> {
    let mut ports: Vec<PortMapping> = Vec::new();
    for value in field::<Vec<Value>>(runtime, PORT_MAPPINGS)?.unwrap_or_default() {
        let bad = |problem| BadOption::Port { mapping: value.to_string(), problem };
        let entry: Entry = serde_json::from_value(value.clone())
            .map_err(|problem| BadConfig::BadValue { key: PORT_MAPPINGS.to_owned(), problem })?;
        let Some(port) = entry.mapping().map_err(bad)? else { continue };
        let same = ports.iter_mut().find(|known| known.is_same_port(&port));
        match same {
            Some(known) if known.container_port != port.container_port => {
                return Err(BadOption::SamePort { one: *known, other: port }.into());
            }
            // The same port of one family and of both.
            Some(known) if known.host_address.is_some() && port.host_address.is_none() => *known = port,
            Some(known) if known.host_address == port.host_address || known.host_address.is_none() => {}
            _ => ports.push(port),
        }
    }
    Ok(ports)
}

impl Entry {
    fn mapping(&self) -> Result<Option<PortMapping>, PortProblem> {
        if self.host_port == 0 {
            return Ok(None);
        }
        let port = |number: i64| u16::try_from(number).ok().and_then(NonZeroU16::new);
        let protocol = match self.protocol.to_ascii_lowercase() {
            name if name.is_empty() => TransportProtocol::Tcp,
            name => *TransportProtocol::ALL
                .iter()
                .find(|known| known.as_str() == name)
                .ok_or_else(|| PortProblem::Protocol(self.protocol.clone()))?,
        };
        let host_address = match self.host_address.as_str() {
            "" => None,
            text => Some(text.parse::<IpAddr>().map_err(|_| PortProblem::Address(text.to_owned()))?),
        };
        Ok(Some(PortMapping {
            protocol,
            host_address: host_address.map(|address| address.to_canonical()),
            host_port: port(self.host_port).ok_or(PortProblem::HostPort)?,
            container_port: port(self.container_port).ok_or(PortProblem::ContainerPort)?,
        }))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn mappings(entries: Value) -> Result<Vec<String>, Error> {
        let runtime = json!({ PORT_MAPPINGS: entries });
        Ok(read(runtime.as_object().unwrap())?.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn both_spellings_of_the_fields_are_read() {
        let found = mappings(json!([
            { "hostPort": 8080, "containerPort": 80, "protocol": "tcp", "hostIP": "192.0.2.1" },
            { "HostPort": 53, "ContainerPort": 5353, "Protocol": "UDP", "HostIP": "" },
            { "HostPort": 0, "ContainerPort": 9090, "Protocol": "tcp", "HostIP": "" },
            { "hostPort": 81, "containerPort": 81 },
            { "hostPort": 9, "containerPort": 9, "protocol": "sctp", "hostIP": "::" },
        ]));
        assert_eq!(found.unwrap(), ["192.0.2.1:8080:80/tcp", "53:5353/udp", "81:81/tcp", "[::]:9:9/sctp"]);
    }

    #[test]
    fn a_repeated_host_port_counts_once_and_two_different_ones_are_refused() {
        let port = |container: u16, address: &str| json!({ "hostPort": 80, "containerPort": container, "protocol": "tcp", "hostIP": address });
        for repeated in
            [[port(1, ""), port(1, "")], [port(1, "0.0.0.0"), port(1, "")], [port(1, ""), port(1, "::")]]
        {
            assert_eq!(mappings(json!(repeated)).unwrap(), ["80:1/tcp"]);
        }
        assert_eq!(mappings(json!([port(1, "0.0.0.0"), port(1, "::")])).unwrap().len(), 2);
        assert_eq!(
            mappings(json!([port(1, "192.0.2.1"), port(2, "192.0.2.2"), port(3, "")])).unwrap().len(),
            3
        );
        for others in ["", "0.0.0.0"] {
            let error = mappings(json!([port(1, ""), port(2, others)])).unwrap_err();
            assert!(error.code() == 7 && error.to_string().contains("80:2/tcp"), "{error}");
        }
    }

    #[test]
    fn the_error_about_an_invalid_port_has_the_entry_and_the_cause() {
        for (entry, expected) in [
            (json!({ "hostPort": 80, "containerPort": 0 }), "container"),
            (json!({ "hostPort": 70000, "containerPort": 80 }), "host"),
            (json!({ "hostPort": -1, "containerPort": 80 }), "host"),
            (json!({ "hostPort": 80, "containerPort": 80, "protocol": "icmp" }), "icmp"),
            (json!({ "hostPort": 80, "containerPort": 80, "hostIP": "node1" }), "node1"),
            (json!({ "hostPort": "80", "containerPort": 80 }), "invalid type"),
        ] {
            let error = mappings(json!([entry])).expect_err(&entry.to_string());
            let text = error.to_string();
            assert!(error.code() == 7 && text.contains(expected) && text.contains("portMappings"), "{text}");
        }
    }
}
