//! Sources of configuration values. Precedence: flags, environment variables, file.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use toml::de::{DeTable, DeValue};
use toml::{Table, Value};

use super::error::{FileFault, InvalidEntry, InvalidVariable, TomlFault};
use super::{ConfigError, File, Flags};

/// Default path of the configuration file. It need not exist.
const DEFAULT_FILE: &str = "/etc/polder/agent.toml";

/// Prefix of the environment variables. Two underscores, because Kubernetes gives pods variables like
/// `POLDER_ETCD_PORT` for a Service named polder-etcd, which are not configuration keys.
const PREFIX: &str = "POLDER__";

/// Separator between the levels of a key in a variable name.
const SEPARATOR: &str = "__";

/// The names of the tables around a key, and the key.
pub(super) type KeyPath = Vec<String>;

/// Source of a value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Origin {
    /// Not set: the default.
    Default,
    /// The configuration file.
    File(PathBuf),
    /// An environment variable, by name.
    Variable(String),
    /// A command line flag, by name.
    Flag(&'static str),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File(path) => write!(f, "file {}", path.display()),
            Self::Variable(name) => write!(f, "variable {name}"),
            Self::Flag(flag) => write!(f, "flag {flag}"),
        }
    }
}

/// All values that were set, and their sources.
#[derive(Debug, Default)]
pub(super) struct Layers {
    merged: Table,
    origins: BTreeMap<KeyPath, Origin>,
}

impl Layers {
    /// Reads the file that the flags name, the variables and the flags. Each layer is validated separately, so that an
    /// error names its cause and not a consequence.
    pub(super) fn read(
        flags: &Flags,
        environment: impl IntoIterator<Item = (OsString, OsString)>,
    ) -> Result<Self, ConfigError> {
        let mut layers = Self::default();
        let file =
            flags.config.clone().or_else(|| Some(DEFAULT_FILE.into()).filter(|path: &PathBuf| path.exists()));
        if let Some(path) = file {
            layers.merged = read_file(&path)?;
            layers.note(&[], &Value::Table(layers.merged.clone()), &Origin::File(path));
        }
        // Shorter paths first: a variable for a key inside a table overrides that part of the variable for the table.
        for (path, (name, text)) in variables(environment)? {
            let value = of_variable(&path, &text)
                .map_err(|problem| ConfigError::Variable { name: name.clone(), problem })?;
            layers.set(&path, value, &Origin::Variable(name));
        }
        for (flag, key, value) in of_flags(flags) {
            let path: KeyPath = key.split('.').map(str::to_owned).collect();
            layers.set(&path, value, &Origin::Flag(flag));
        }
        Ok(layers)
    }

    /// The merged configuration, with defaults.
    pub(super) fn file(&self) -> Result<File, ConfigError> {
        File::deserialize(Value::Table(self.merged.clone()))
            .map_err(|error| ConfigError::Merged(TomlFault(error)))
    }

    /// The source of a value.
    pub(super) fn origin(&self, path: &[String]) -> &Origin {
        self.origins.get(path).unwrap_or(&Origin::Default)
    }

    /// The error with the name of the variable that set the invalid value.
    pub(super) fn locate(&self, error: ConfigError) -> ConfigError {
        let ConfigError::Value { key, problem } = error else { return error };
        let path: KeyPath = key.split('.').map(str::to_owned).collect();
        match self.origin(&path) {
            Origin::Variable(name) => ConfigError::VariableValue { key, problem, variable: name.clone() },
            _ => ConfigError::Value { key, problem },
        }
    }

    fn set(&mut self, path: &[String], value: Value, origin: &Origin) {
        self.origins.retain(|known, _| !known.starts_with(path));
        self.note(path, &value, origin);
        let Some((key, tables)) = path.split_last() else { return };
        let mut table = &mut self.merged;
        for name in tables {
            let inner = table.entry(name).or_insert_with(|| Value::Table(Table::new()));
            // Each layer was validated separately: a key with subkeys is a table in all of them.
            let Value::Table(inner) = inner else { return };
            table = inner;
        }
        table.insert(key.clone(), value);
    }

    fn note(&mut self, path: &[String], value: &Value, origin: &Origin) {
        match value {
            Value::Table(table) => {
                table.iter().for_each(|(key, value)| {
                    self.note(&[path, std::slice::from_ref(key)].concat(), value, origin);
                });
            }
            _ => drop(self.origins.insert(path.to_vec(), origin.clone())),
        }
    }
}

fn read_file(path: &Path) -> Result<Table, ConfigError> {
    let text =
        fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
    let parse = |faults| ConfigError::Parse { path: path.to_owned(), faults };
    let whole = |error: toml::de::Error| FileFault {
        line: line(&text, error.span()),
        problem: InvalidEntry::Line(TomlFault(error)),
    };
    let table: Table = toml::from_str(&text).map_err(|error| parse(vec![whole(error)]))?;
    let Err(first) = toml::from_str::<File>(&text) else { return Ok(table) };
    let mut faults = Vec::new();
    if let Ok(keys) = DeTable::parse(&text) {
        collect_faults(&text, &mut Vec::new(), keys.get_ref(), &mut faults);
    }
    if faults.is_empty() {
        faults.push(whole(first));
    }
    Err(parse(faults))
}

/// The line number of the start of `span`, from 1.
fn line(text: &str, span: Option<Range<usize>>) -> usize {
    let before = span.and_then(|span| text.get(..span.start)).unwrap_or_default();
    before.matches('\n').count() + 1
}

/// Validates each value of the file separately, so that all faults are reported at once.
fn collect_faults(text: &str, path: &mut KeyPath, table: &DeTable<'_>, faults: &mut Vec<FileFault>) {
    for (key, value) in table {
        path.push(key.get_ref().to_string());
        match value.get_ref() {
            DeValue::Table(inner) => collect_faults(text, path, inner, faults),
            _ => {
                let value = toml::from_str::<Table>(&format!("value = {}", &text[value.span()]));
                let value = value.ok().and_then(|mut table| table.remove("value"));
                if let Some(Err(problem)) = value.map(|value| takes(path, value)) {
                    let problem = with_key(path, problem);
                    // Reported once, because all keys of an unknown table have the same fault.
                    if !faults.iter().any(|known| known.problem.to_string() == problem.to_string()) {
                        faults.push(FileFault { line: line(text, Some(key.span())), problem });
                    }
                }
            }
        }
        path.pop();
    }
}

/// The problem with its key, and a hint for the correct value.
fn with_key(path: &[String], problem: TomlFault) -> InvalidEntry {
    if problem.to_string().starts_with("unknown field") {
        return InvalidEntry::Line(problem);
    }
    let key = path.join(".");
    if key.ends_with("_seconds") {
        InvalidEntry::Seconds { key, problem }
    } else {
        InvalidEntry::Entry { key, problem }
    }
}

/// Whether the value is valid for the key.
fn takes(path: &[String], value: Value) -> Result<(), TomlFault> {
    let nested =
        path.iter().rev().fold(value, |value, key| Value::Table(Table::from_iter([(key.clone(), value)])));
    File::deserialize(nested).map(drop).map_err(TomlFault)
}

/// Polder's environment variables: key path, with name and value of the variable.
fn variables(
    environment: impl IntoIterator<Item = (OsString, OsString)>,
) -> Result<BTreeMap<KeyPath, (String, String)>, ConfigError> {
    let mut variables: BTreeMap<KeyPath, (String, String)> = BTreeMap::new();
    for (name, text) in environment {
        let name = name.to_string_lossy().into_owned();
        let Some(key) = name.strip_prefix(PREFIX) else { continue };
        let path: KeyPath = key.split(SEPARATOR).map(str::to_lowercase).collect();
        let refuse = |problem: InvalidVariable| Err(ConfigError::Variable { name: name.clone(), problem });
        let Ok(text) = text.into_string() else { return refuse(InvalidVariable::NotUtf8) };
        if let Some((other, _)) = variables.get(&path) {
            return refuse(InvalidVariable::SameKey { other: other.clone() });
        }
        variables.insert(path, (name, text));
    }
    Ok(variables)
}

/// The value of a variable: as TOML, or a string without quotes, depending on the type of the key.
fn of_variable(path: &[String], text: &str) -> Result<Value, InvalidVariable> {
    let literal: Result<Value, _> = text.trim().parse();
    let check = |value: Value| takes(path, value.clone()).map(|()| value);
    let as_string = || check(Value::String(text.to_owned()));
    match literal {
        Ok(value) => {
            check(value).or_else(|problem| as_string().map_err(|_| problem)).map_err(InvalidVariable::Value)
        }
        Err(error) => as_string().map_err(|problem| {
            let begins_with = |sign: char| text.trim_start().starts_with(sign);
            let words = problem.to_string();
            if words.contains("expected a sequence") {
                if begins_with('[') {
                    InvalidVariable::ListSyntax(TomlFault(error))
                } else {
                    InvalidVariable::NoList
                }
            } else if words.contains("expected struct") || words.contains("expected a map") {
                if begins_with('{') {
                    InvalidVariable::TableSyntax(TomlFault(error))
                } else {
                    InvalidVariable::NoTable
                }
            } else {
                InvalidVariable::Value(problem)
            }
        }),
    }
}

/// The values set by flags: flag, key in the file, and value.
fn of_flags(flags: &Flags) -> impl Iterator<Item = (&'static str, &'static str, Value)> {
    let text = |value: &dyn fmt::Display| Value::String(value.to_string());
    // Clap accepts paths that are not UTF-8. The lossy name does not exist, and the error message shows it.
    let path = |path: &PathBuf| text(&path.display());
    let list = |items: &Vec<String>| Value::Array(items.iter().map(|item| text(item)).collect());
    let values = [
        ("--node", "node", flags.node.as_ref().map(|name| text(name))),
        ("--state-dir", "state_dir", flags.state_dir.as_ref().map(path)),
        ("--socket", "socket", flags.socket.as_ref().map(path)),
        ("--etcd", "etcd.endpoints", flags.etcd.as_ref().map(list)),
        ("--cni-conf-dir", "cni_conf_dir", flags.cni_conf_dir.as_ref().map(path)),
        ("--http", "http", flags.http.as_ref().map(|address| text(address))),
    ];
    values.into_iter().filter_map(|(flag, key, value)| Some((flag, key, value?)))
}

#[cfg(test)]
mod tests;
