//! The addresses, MAC address, pool, host ports and bandwidth requested for one pod.
//!
//! Precedence, highest first: `runtimeConfig` (which includes the pod's annotations), `args.cni` of the configuration,
//! `CNI_ARGS`.

use std::net::IpAddr;

use polder_api::{InvalidName, Mac, ParseMacError, PoolName, PortMapping};
use serde_json::{Map, Value};

use crate::environment::Arguments;
use crate::error::Error;
use crate::netconf::field;

use self::bandwidth::{Bandwidth, BandwidthProblem};
use self::ports::{PORT_MAPPINGS, PortProblem};

pub(crate) mod bandwidth;
mod ports;

/// The capability with which containerd and CRI-O pass the pod's annotations.
const ANNOTATIONS: &str = "io.kubernetes.cri.pod-annotations";

/// Annotation: the addresses of a pod, separated by commas.
const ADDRESS: &str = "polder.dev/address";

/// Annotation: the pool that the pod's addresses are allocated from.
const POOL: &str = "polder.dev/pool";

/// A property that was requested for the pod is invalid.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadOption {
    /// The pool in the annotation of the pod is not a valid name.
    /// Remedy: correct the annotation; `polderctl pool list` shows the names.
    #[error("annotation {POOL}: {0}")]
    Pool(InvalidName),
    /// A requested address is not an IP address.
    /// Remedy: correct the named annotation or key, e.g. 10.0.0.1 or 10.0.0.1/24.
    #[error("{key}: {text:?} is not an IP address")]
    Address {
        /// The annotation or key.
        key: &'static str,
        /// The given text.
        text: String,
    },
    /// The requested MAC address has another form.
    /// Remedy: write it as six pairs of hex digits joined by colons.
    #[error("{key}: {problem}")]
    Mac {
        /// The key.
        key: &'static str,
        /// The cause.
        problem: ParseMacError,
    },
    /// The requested MAC address is a multicast address, or zero.
    /// Remedy: use a MAC address whose first byte is even, e.g. 02:00:00:00:00:01.
    #[error("{key}: {mac} is not a unicast MAC address")]
    NotUnicast {
        /// The key.
        key: &'static str,
        /// The given MAC address.
        mac: Mac,
    },
    /// A requested host port is invalid.
    /// Remedy: correct the ports of the pod: protocol tcp, udp or sctp, ports from 1 to 65535, and a host address that
    /// is an IP address.
    #[error("{PORT_MAPPINGS}: {mapping}: {problem}")]
    Port {
        /// The entry, as JSON.
        mapping: String,
        /// The cause.
        problem: PortProblem,
    },
    /// Two requested host ports are the same, but lead to different ports of the pod.
    /// Remedy: give each port of the pod its own host port.
    #[error("{PORT_MAPPINGS}: {one} and {other} are the same host port")]
    SamePort {
        /// The first host port.
        one: PortMapping,
        /// The second host port.
        other: PortMapping,
    },
    /// A requested bandwidth limit is invalid.
    /// Remedy: correct the bandwidth annotations of the pod (`kubernetes.io/ingress-bandwidth` and egress-bandwidth).
    #[error("runtimeConfig.bandwidth: {key}: {problem}")]
    Bandwidth {
        /// The key.
        key: &'static str,
        /// The cause.
        problem: BandwidthProblem,
    },
}

/// The requested properties of one pod.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PodOptions {
    /// The requested addresses, at most one of each family.
    pub addresses: Vec<IpAddr>,
    /// The requested MAC address.
    pub mac: Option<Mac>,
    /// The requested pool, instead of the configuration's.
    pub pool: Option<PoolName>,
    /// The requested host ports.
    pub ports: Vec<PortMapping>,
    /// The requested bandwidth limits.
    pub bandwidth: Bandwidth,
}

impl PodOptions {
    /// Reads the requests from the configuration and `CNI_ARGS`.
    pub fn read(conf: &Map<String, Value>, arguments: &Arguments) -> Result<Self, Error> {
        let runtime = field::<Map<String, Value>>(conf, "runtimeConfig")?.unwrap_or_default();
        let args = field::<Map<String, Value>>(conf, "args")?.unwrap_or_default();
        let args = field::<Map<String, Value>>(&args, "cni")?.unwrap_or_default();
        let annotations = field::<Map<String, Value>>(&runtime, ANNOTATIONS)?.unwrap_or_default();
        let annotation = |key: &str| field::<String>(&annotations, key);
        let listed =
            annotation(ADDRESS)?.map(|text| text.split(',').map(|item| item.trim().to_owned()).collect());
        let addresses = first([
            ("runtimeConfig.ips", field::<Vec<String>>(&runtime, "ips")?),
            (ADDRESS, listed),
            ("args.cni.ips", field(&args, "ips")?),
            ("CNI_ARGS: IP", arguments.address.clone().map(|address| vec![address])),
        ]);
        let mac = first([
            ("runtimeConfig.mac", field::<String>(&runtime, "mac")?),
            ("args.cni.mac", field(&args, "mac")?),
            ("CNI_ARGS: MAC", arguments.mac.clone()),
        ]);
        Ok(Self {
            addresses: match addresses {
                Some((key, texts)) => distinct(key, &texts)?,
                None => Vec::new(),
            },
            mac: mac.map(|(key, text)| single(key, &text)).transpose()?,
            pool: match annotation(POOL)? {
                Some(name) => Some(name.parse().map_err(BadOption::Pool)?),
                None => None,
            },
            ports: ports::read(&runtime)?,
            bandwidth: bandwidth::read(&runtime)?,
        })
    }

    /// Reads what CHECK compares with the kernel: the bandwidth limits. An invalid value counts as none, because the
    /// pod is attached already.
    pub fn read_to_check(conf: &Map<String, Value>) -> Self {
        let runtime = field::<Map<String, Value>>(conf, "runtimeConfig").ok().flatten().unwrap_or_default();
        Self { bandwidth: bandwidth::read(&runtime).unwrap_or_default(), ..Self::default() }
    }
}

/// The first value that is set, with the name of its key.
fn first<T, const N: usize>(found: [(&'static str, Option<T>); N]) -> Option<(&'static str, T)> {
    found.into_iter().find_map(|(key, value)| Some((key, value?)))
}

/// Parses the addresses and removes duplicates, which podman's `network reload` sends.
fn distinct(key: &'static str, texts: &[String]) -> Result<Vec<IpAddr>, Error> {
    let mut addresses = Vec::new();
    for text in texts {
        let address = address(key, text)?;
        if !addresses.contains(&address) {
            addresses.push(address);
        }
    }
    Ok(addresses)
}

/// Parses an address, with or without a prefix length.
fn address(key: &'static str, text: &str) -> Result<IpAddr, Error> {
    let address = text.split_once('/').map_or(text, |(address, _)| address);
    address.parse().map_err(|_| BadOption::Address { key, text: text.to_owned() }.into())
}

/// Parses a unicast MAC address.
fn single(key: &'static str, text: &str) -> Result<Mac, Error> {
    let mac: Mac = text.parse().map_err(|problem| BadOption::Mac { key, problem })?;
    if mac.0[0] & 1 != 0 || mac.0 == [0; 6] {
        return Err(BadOption::NotUnicast { key, mac }.into());
    }
    Ok(mac)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(conf: &Value, arguments: &Arguments) -> Result<PodOptions, Error> {
        PodOptions::read(conf.as_object().unwrap(), arguments)
    }

    fn arguments() -> Arguments {
        Arguments { pod: None, address: Some("10.0.0.4".into()), mac: Some("02:00:00:00:00:04".into()) }
    }

    #[test]
    fn runtime_options_override_configuration_and_arguments() {
        let mut conf = json!({
            "runtimeConfig": {
                "ips": ["10.0.0.1/24", "fd00::1"], "mac": "02:00:00:00:00:01",
                ANNOTATIONS: { ADDRESS: "10.0.0.2, fd00::2", POOL: "blue" },
            },
            "args": { "cni": { "ips": ["10.0.0.3"], "mac": "02:00:00:00:00:03" } },
        });
        let mut seen = |last: u8| {
            let options = read(&conf, &arguments()).unwrap();
            assert_eq!(options.addresses[0], IpAddr::from([10, 0, 0, last]));
            let step = conf["runtimeConfig"].as_object_mut().unwrap();
            match last {
                1 => drop(step.remove("ips")),
                2 => drop(step.remove(ANNOTATIONS)),
                _ => drop(conf.as_object_mut().unwrap().remove("args")),
            }
            options
        };
        assert_eq!(seen(1).pool.unwrap().as_str(), "blue");
        assert_eq!(seen(2).addresses.len(), 2);
        assert_eq!(seen(3).mac.unwrap().to_string(), "02:00:00:00:00:01");
        assert_eq!(seen(4).addresses.len(), 1);
    }

    #[test]
    fn check_reads_the_bandwidth_and_ignores_what_is_invalid() {
        let read = |runtime: Value| {
            let conf = json!({ "runtimeConfig": runtime, "args": 1 });
            PodOptions::read_to_check(conf.as_object().unwrap()).bandwidth
        };
        let limits = read(json!({ "ips": "?", "bandwidth": { "IngressRate": 8000 } }));
        assert_eq!(limits.ingress.map(|limit| limit.rate), Some(1000));
        for invalid in [json!({ "bandwidth": { "ingressRate": -1 } }), json!({ "bandwidth": [] }), json!(7)] {
            assert_eq!(read(invalid), Bandwidth::default());
        }
    }

    #[test]
    fn a_repeated_address_counts_once() {
        let conf = json!({ "runtimeConfig": { "ips": ["10.0.0.1", "fd00::1", "10.0.0.1/24"] } });
        let addresses = read(&conf, &Arguments::default()).unwrap().addresses;
        assert_eq!(addresses, ["10.0.0.1".parse::<IpAddr>().unwrap(), "fd00::1".parse().unwrap()]);
    }

    #[test]
    fn the_error_about_an_invalid_option_names_its_key() {
        for (conf, expected) in [
            (json!({ "runtimeConfig": { "ips": ["10.0.0.256"] } }), "runtimeConfig.ips: \"10.0.0.256\""),
            (json!({ "runtimeConfig": { "ips": "10.0.0.1" } }), "ips: "),
            (
                json!({ "runtimeConfig": { "mac": "01:00:00:00:00:01" } }),
                "runtimeConfig.mac: 01:00:00:00:00:01",
            ),
            (
                json!({ "runtimeConfig": { ANNOTATIONS: { ADDRESS: "here" } } }),
                "polder.dev/address: \"here\"",
            ),
            (json!({ "runtimeConfig": { ANNOTATIONS: { POOL: "a/b" } } }), "annotation polder.dev/pool"),
            (json!({ "args": { "cni": { "mac": "x" } } }), "args.cni.mac: "),
        ] {
            let error = read(&conf, &Arguments::default()).expect_err(&conf.to_string());
            assert!(error.code() == 7 && error.to_string().contains(expected), "{conf}: {error}");
        }
    }
}
