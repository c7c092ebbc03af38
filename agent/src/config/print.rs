//! Output of `--print-config`: each value and its source.

use std::env;

use toml::{Table, Value};

use super::layers::{KeyPath, Layers, Origin};
use super::{ConfigError, Flags, NodePaths};

/// Keys whose values are not printed.
const SECRETS: [&[&str]; 1] = [&["etcd", "password"]];

/// Each value that is set or has a default, in TOML, with its source. The values are not validated.
pub fn printed(flags: &Flags) -> Result<String, ConfigError> {
    print(&Layers::read(flags, env::vars_os())?)
}

pub(super) fn print(layers: &Layers) -> Result<String, ConfigError> {
    let file = layers.file()?;
    let name = file.node.clone().map_or_else(|| NodePaths::of(&file).map(|places| places.node), Ok);
    let mut table = Table::try_from(&file).map_err(ConfigError::NotPrinted)?;
    if let Ok(name) = name {
        table.insert("node".to_owned(), Value::String(name.to_string()));
    }
    let mut leaves = Vec::new();
    collect(&[], &table, &mut leaves);
    let lines = leaves.into_iter().map(|(path, value)| {
        let is_secret = SECRETS.iter().any(|secret| path.iter().eq(secret.iter()));
        let value = if is_secret { "\"(not shown)\"".to_owned() } else { value.to_string() };
        let origin = match layers.origin(&path) {
            Origin::Default if path == ["node"] => "default: the host name".to_owned(),
            origin => origin.to_string(),
        };
        (format!("{} = {value}", dotted(&path)), origin)
    });
    let lines: Vec<_> = lines.collect();
    let width = lines.iter().map(|(value, _)| value.chars().count()).filter(|width| *width <= 60).max();
    let width = width.unwrap_or_default();
    let lines: Vec<_> =
        lines.into_iter().map(|(value, origin)| format!("{value:width$}  # {origin}")).collect();
    Ok(lines.join("\n") + "\n")
}

/// All values that are not tables, with their keys. Values outside tables come first.
fn collect(path: &[String], table: &Table, leaves: &mut Vec<(KeyPath, Value)>) {
    let below = |key: &String| [path, std::slice::from_ref(key)].concat();
    for (key, value) in table {
        if !value.is_table() {
            leaves.push((below(key), value.clone()));
        }
    }
    for (key, value) in table {
        if let Value::Table(inner) = value {
            collect(&below(key), inner, leaves);
        }
    }
}

/// The key in TOML syntax.
fn dotted(path: &[String]) -> String {
    let is_bare = |part: &str| {
        !part.is_empty() && part.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '-')
    };
    let parts = path
        .iter()
        .map(|part| if is_bare(part) { part.clone() } else { Value::String(part.clone()).to_string() });
    parts.collect::<Vec<_>>().join(".")
}
