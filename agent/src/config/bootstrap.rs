//! Section `[bootstrap]`: the initial settings of a cluster.

use std::fmt;

use polder_api::{Backend, Family, PoolName};
use polder_ipam::Cidr;
use polder_ipam::bootstrap::Bootstrap;
use polder_ipam::cidr::ParseCidrError;
use polder_ipam::pool::{InvalidPool, Labels, Pool, PoolState, Purpose, usual_block_length};
use polder_ipam::record::{AttachMode, Masquerade, VxlanSettings};
use serde::de::value::MapAccessDeserializer;
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

use super::{ConfigError, value};

/// Why a value of the section is invalid.
#[derive(Debug, thiserror::Error)]
pub enum InvalidBootstrap {
    /// The section needs a pool, because pods get their addresses from it.
    #[error("no pool is set: give at least one, e.g. \"10.244.0.0/16\"")]
    NoPool,
    /// The VXLAN network identifier has 24 bits, and 0 is not used.
    #[error("{vni} is out of range: use 1 to {most}", most = (1 << 24) - 1)]
    Vni {
        /// The value.
        vni: u32,
    },
    /// UDP has no port 0.
    #[error("0 is not a valid port: use 1 to 65535")]
    Port,
    /// The text is not a network in CIDR notation.
    #[error(transparent)]
    Cidr(ParseCidrError),
    /// Two pools have addresses in common.
    ///
    /// Remedy: remove one of the two pools, or set ranges without a common address.
    #[error("{cidr} and {other} overlap: an address can be in one pool only")]
    Overlap {
        /// Range of the pool.
        cidr: Cidr,
        /// Range of a pool that is listed before it.
        other: Cidr,
    },
    /// Two pools have one name.
    #[error("{cidr} and {other} have the same name, {name}: give each pool its own name")]
    SameName {
        /// Range of the pool.
        cidr: Cidr,
        /// Range of a pool that is listed before it.
        other: Cidr,
        /// The name.
        name: PoolName,
    },
    /// Pods cannot use the addresses of the range.
    #[error(transparent)]
    SpecialRange(InvalidPool),
    /// The block length does not match the range of the pool, or its purpose.
    ///
    /// Remedy: set `block_length` of the pool as the text shows.
    #[error("{error} ({{ cidr = \"{cidr}\", block_length = ... }})")]
    Pool {
        /// The problem.
        error: InvalidPool,
        /// Range of the pool.
        cidr: Cidr,
    },
}

const POOLS: &str = "bootstrap.pools";

/// The section as written, with defaults.
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct File {
    pools: Vec<PoolFile>,
    backend: Backend,
    attach: AttachMode,
    vxlan: VxlanFile,
    masquerade: bool,
    masquerade_except: Vec<String>,
}

impl Default for File {
    fn default() -> Self {
        Self {
            pools: Vec::new(),
            backend: Backend::default(),
            attach: AttachMode::default(),
            vxlan: VxlanFile::default(),
            masquerade: true,
            masquerade_except: Vec::new(),
        }
    }
}

#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
struct VxlanFile {
    vni: u32,
    port: u16,
}

impl Default for VxlanFile {
    fn default() -> Self {
        let VxlanSettings { vni, port } = VxlanSettings::default();
        Self { vni, port }
    }
}

/// A pool: only its range, or a table.
#[derive(Debug, Serialize)]
#[serde(transparent)]
struct PoolFile(PoolTable);

#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct PoolTable {
    cidr: String,
    name: Option<PoolName>,
    block_length: Option<u8>,
    #[serde(default)]
    purpose: Purpose,
    #[serde(default, skip_serializing_if = "Labels::is_empty")]
    nodes: Labels,
}

impl<'de> Deserialize<'de> for PoolFile {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Either;

        impl<'de> Visitor<'de> for Either {
            type Value = PoolTable;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(
                    "a range like \"10.244.0.0/16\", or a table with cidr, name, block_length, purpose and \
                             nodes",
                )
            }

            fn visit_str<E: serde::de::Error>(self, cidr: &str) -> Result<PoolTable, E> {
                Ok(PoolTable {
                    cidr: cidr.to_owned(),
                    name: None,
                    block_length: None,
                    purpose: Purpose::default(),
                    nodes: Labels::new(),
                })
            }

            fn visit_map<A: MapAccess<'de>>(self, table: A) -> Result<PoolTable, A::Error> {
                PoolTable::deserialize(MapAccessDeserializer::new(table))
            }
        }

        deserializer.deserialize_any(Either).map(Self)
    }
}

impl File {
    /// The validated settings.
    pub(super) fn check(self) -> Result<Bootstrap, ConfigError> {
        let mut pools: Vec<Pool> = Vec::new();
        for PoolFile(table) in self.pools {
            let pool = pool(table, &pools)?;
            pools.push(pool);
        }
        if pools.is_empty() {
            return value(POOLS, InvalidBootstrap::NoPool);
        }
        let VxlanFile { vni, port } = self.vxlan;
        if vni == 0 || vni >= 1 << 24 {
            return value("bootstrap.vxlan.vni", InvalidBootstrap::Vni { vni });
        }
        if port == 0 {
            return value("bootstrap.vxlan.port", InvalidBootstrap::Port);
        }
        let except = self.masquerade_except.iter().map(|text| {
            text.parse().or_else(|error| value("bootstrap.masquerade_except", InvalidBootstrap::Cidr(error)))
        });
        Ok(Bootstrap {
            pools,
            backend: self.backend,
            attach: self.attach,
            vxlan: VxlanSettings { vni, port },
            masquerade: Masquerade { enabled: self.masquerade, except: except.collect::<Result<_, _>>()? },
        })
    }
}

/// The pool of a table, checked against the pools listed before it.
fn pool(table: PoolTable, others: &[Pool]) -> Result<Pool, ConfigError> {
    let cidr: Cidr = table.cidr.parse().or_else(|error| value(POOLS, InvalidBootstrap::Cidr(error)))?;
    if let Some(other) = others.iter().find(|other| other.cidr().overlaps(cidr)) {
        return value(POOLS, InvalidBootstrap::Overlap { cidr, other: other.cidr() });
    }
    let of_family = others.iter().filter(|other| other.family() == cidr.family()).count();
    let name = table.name.unwrap_or_else(|| pool_name(cidr.family(), of_family));
    if let Some(other) = others.iter().find(|other| other.name == name) {
        return value(POOLS, InvalidBootstrap::SameName { cidr, other: other.cidr(), name });
    }
    let length = table.block_length.unwrap_or_else(|| usual_block_length(table.purpose, cidr));
    let wrong = |error: InvalidPool| match error {
        InvalidPool::Special { .. } => InvalidBootstrap::SpecialRange(error),
        error => InvalidBootstrap::Pool { error, cidr },
    };
    Pool::new(name, cidr, length, PoolState::Active)
        .and_then(|mut pool| {
            (pool.purpose, pool.nodes) = (table.purpose, table.nodes);
            pool.check_use().map(|()| pool)
        })
        .or_else(|error| value(POOLS, wrong(error)))
}

/// `ipv4` or `ipv6`; further pools of a family are numbered from 2.
fn pool_name(family: Family, others: usize) -> PoolName {
    let family = family.to_string().to_lowercase();
    let name = if others == 0 { family } else { format!("{family}-{}", others + 1) };
    name.parse().expect("letters, digits and a dash")
}
