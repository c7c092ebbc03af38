//! The `[bootstrap]` of the configuration: the first settings of a cluster.

use std::fmt;

use polder_api::{Backend, Family, PoolName};
use polder_ipam::Cidr;
use polder_ipam::cidr::ParseCidrError;
use polder_ipam::pool::{InvalidPool, Pool, PoolState, default_block_length};
use polder_ipam::record::{AttachMode, Masquerade, VxlanSettings};
use serde::de::value::MapAccessDeserializer;
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer};

use super::{Bootstrap, ConfigError, value};

const POOLS: &str = "bootstrap.pools";

/// As it is written.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct File {
    pools: Vec<PoolFile>,
    #[serde(default)]
    backend: Backend,
    #[serde(default)]
    attach: AttachMode,
    #[serde(default)]
    vxlan: VxlanFile,
    #[serde(default = "yes")]
    masquerade: bool,
    #[serde(default)]
    masquerade_except: Vec<String>,
}

fn yes() -> bool {
    true
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct VxlanFile {
    vni: Option<u32>,
    port: Option<u16>,
}

/// A pool: its range alone, or a table.
#[derive(Debug)]
struct PoolFile(PoolTable);

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct PoolTable {
    cidr: String,
    name: Option<PoolName>,
    block_length: Option<u8>,
}

impl<'de> Deserialize<'de> for PoolFile {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Either;

        impl<'de> Visitor<'de> for Either {
            type Value = PoolTable;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a range like \"10.244.0.0/16\", or a table with cidr, name and block_length")
            }

            fn visit_str<E: serde::de::Error>(self, cidr: &str) -> Result<PoolTable, E> {
                Ok(PoolTable { cidr: cidr.to_owned(), name: None, block_length: None })
            }

            fn visit_map<A: MapAccess<'de>>(self, table: A) -> Result<PoolTable, A::Error> {
                PoolTable::deserialize(MapAccessDeserializer::new(table))
            }
        }

        deserializer.deserialize_any(Either).map(Self)
    }
}

impl File {
    /// The settings, if they make sense.
    pub(super) fn check(self) -> Result<Bootstrap, ConfigError> {
        let mut pools: Vec<Pool> = Vec::new();
        for PoolFile(table) in self.pools {
            let pool = pool(table, &pools)?;
            pools.push(pool);
        }
        if pools.is_empty() {
            return value(POOLS, "give at least one, like \"10.244.0.0/16\"".to_owned());
        }
        let usual = VxlanSettings::default();
        let vni = self.vxlan.vni.unwrap_or(usual.vni);
        let port = self.vxlan.port.unwrap_or(usual.port);
        if vni == 0 || vni >= 1 << 24 {
            return value("bootstrap.vxlan.vni", format!("{vni} is not in 1 to {}", (1 << 24) - 1));
        }
        if port == 0 {
            return value("bootstrap.vxlan.port", "0 is no port".to_owned());
        }
        let except = self.masquerade_except.iter().map(|text| {
            text.parse()
                .or_else(|error: ParseCidrError| value("bootstrap.masquerade_except", error.to_string()))
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

/// The pool of the table, beside those before it.
fn pool(table: PoolTable, others: &[Pool]) -> Result<Pool, ConfigError> {
    let cidr: Cidr = table.cidr.parse().or_else(|error: ParseCidrError| value(POOLS, error.to_string()))?;
    if let Some(other) = others.iter().find(|other| other.cidr().overlaps(cidr)) {
        return value(POOLS, format!("{cidr} and {} overlap: every address is in one pool", other.cidr()));
    }
    let of_family = others.iter().filter(|other| other.family() == cidr.family()).count();
    let name = table.name.unwrap_or_else(|| pool_name(cidr.family(), of_family));
    if let Some(other) = others.iter().find(|other| other.name == name) {
        return value(POOLS, format!("{cidr} and {} have the same name, {name}", other.cidr()));
    }
    let length = table.block_length.unwrap_or_else(|| default_block_length(cidr.family()));
    let wrong = |error: InvalidPool| match error {
        InvalidPool::Special { .. } => error.to_string(),
        other => format!("{other} ({{ cidr = \"{cidr}\", block_length = ... }})"),
    };
    Pool::new(name, cidr, length, PoolState::Active)
        .and_then(|pool| pool.check_use().map(|()| pool))
        .or_else(|error| value(POOLS, wrong(error)))
}

/// `ipv4`, `ipv6`; further ones of a family are numbered from 2.
fn pool_name(family: Family, others: usize) -> PoolName {
    let family = family.to_string().to_lowercase();
    let name = if others == 0 { family } else { format!("{family}-{}", others + 1) };
    name.parse().expect("letters, digits and a dash")
}
