//! Errors of the configuration.

use std::path::{Path, PathBuf};

use polder_api::Family;
use polder_ipam::allocator::SHORTEST_COOL_DOWN;
use polder_ipam::record::MTU_RANGE;

use super::bootstrap::InvalidBootstrap;
use super::cni::InvalidCni;
use super::etcd::InvalidEtcd;
use super::kubernetes::InvalidKubernetes;
use crate::machine::MachineError;

/// A configuration that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The configuration file that `--config` names, or the default file, cannot be read.
    ///
    /// Remedy: correct the error at the end of the text, or set the path of the file with `--config`.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The error.
        #[source]
        source: std::io::Error,
    },
    /// The file is not TOML, or has an unknown key or a value of the wrong type. Each line of the text is
    /// one fault: file, line number and problem.
    ///
    /// Remedy: correct each named line of the file, and check it with `polder-agent --check-config`.
    #[error("{lines}", lines = fault_lines(path, faults))]
    Parse {
        /// The file.
        path: PathBuf,
        /// The faults, sorted by key.
        faults: Vec<FileFault>,
    },
    /// An environment variable with the prefix of Polder is invalid.
    ///
    /// Remedy: correct or remove the variable, and check the configuration with `polder-agent --check-config`.
    #[error("environment variable {name}: {problem}")]
    Variable {
        /// Name of the variable.
        name: String,
        /// The problem and the remedy.
        problem: InvalidVariable,
    },
    /// A value of the file or of a flag is invalid, or does not match other values.
    ///
    /// Remedy: correct the value, and check the configuration with `polder-agent --check-config`.
    #[error("{key}: {problem}")]
    Value {
        /// The key.
        key: &'static str,
        /// The problem and the remedy.
        problem: Box<InvalidValue>,
    },
    /// A value of an environment variable is invalid, or does not match other values.
    ///
    /// Remedy: correct the variable, and check the configuration with `polder-agent --check-config`.
    #[error("{key}: {problem} (set by the environment variable {variable})")]
    VariableValue {
        /// The key.
        key: &'static str,
        /// The problem and the remedy.
        problem: Box<InvalidValue>,
        /// Name of the variable.
        variable: String,
    },
    /// File, variables and flags are each valid, but their combination is not.
    ///
    /// Remedy: compare the named key in the file, in the variables that begin with `POLDER__`, and in the flags.
    #[error("the combination of file, variables and flags is invalid: {0}")]
    Merged(TomlFault),
    /// The combination of file, variables and flags cannot be written as TOML for `--print-config`.
    ///
    /// Remedy: correct the named key in the file, the variables or the flags.
    #[error("cannot print the configuration as TOML: {0}")]
    NotPrinted(toml::ser::Error),
    /// The default node name cannot be determined.
    #[error(transparent)]
    Machine(#[from] MachineError),
}

/// One line for each fault.
fn fault_lines(path: &Path, faults: &[FileFault]) -> String {
    let line = |fault: &FileFault| format!("{}:{}: {}", path.display(), fault.line, fault.problem);
    faults.iter().map(line).collect::<Vec<_>>().join("\n")
}

/// A fault of the configuration file.
#[derive(Debug)]
pub struct FileFault {
    /// Line number, from 1.
    pub line: usize,
    /// The problem.
    pub problem: InvalidEntry,
}

/// An invalid line of the configuration file.
#[derive(Debug, thiserror::Error)]
pub enum InvalidEntry {
    /// The line is not TOML, or its key is unknown.
    #[error(transparent)]
    Line(TomlFault),
    /// The value of a key is invalid.
    ///
    /// Remedy: set a value of the expected type, as in `docs/agent.toml`.
    #[error("{key}: {problem}")]
    Entry {
        /// The key, with its tables.
        key: String,
        /// The problem.
        problem: TomlFault,
    },
    /// The value of a key is not a number of seconds.
    #[error("{key}: {problem}: use a number of seconds, e.g. 60")]
    Seconds {
        /// The key, with its tables.
        key: String,
        /// The problem.
        problem: TomlFault,
    },
}

/// A text that is not TOML, or a value of the wrong type, as found by the TOML library.
///
/// Remedy: write the key and its value as in `docs/agent.toml`.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{problem}", problem = one_line(.0))]
pub struct TomlFault(pub toml::de::Error);

fn one_line(error: &toml::de::Error) -> String {
    let message = error.message().replace('\n', " ");
    let whole_number =
        |message: String, kind: &str| message.replace(&format!("expected {kind}"), "expected a whole number");
    ["u64", "u32", "u16", "u8"].into_iter().fold(message, whole_number)
}

/// Why the value of an environment variable is invalid.
#[derive(Debug, thiserror::Error)]
pub enum InvalidVariable {
    /// The value of the variable is not valid UTF-8.
    ///
    /// Remedy: set the variable to a text in UTF-8.
    #[error("the value is not UTF-8")]
    NotUtf8,
    /// Two variables set the same key: their names differ only in case, and names are case-insensitive.
    #[error("{other} sets the same key: remove one of them")]
    SameKey {
        /// The other variable.
        other: String,
    },
    /// The key needs a list, and the value begins like a list but is not TOML.
    #[error("{0}: use a TOML list, e.g. [\"a\", \"b\"]")]
    ListSyntax(TomlFault),
    /// The key needs a list.
    #[error("this is not a list: use a TOML list, e.g. [\"a\", \"b\"]")]
    NoList,
    /// The key needs a table, and the value begins like a table but is not TOML.
    #[error("{0}: use a TOML table, e.g. {{ key = \"value\" }}")]
    TableSyntax(TomlFault),
    /// The key needs a table.
    #[error("this is not a table: use a TOML table, e.g. {{ key = \"value\" }}")]
    NoTable,
    /// The key that the name of the variable contains is unknown, or the value has another type than the key.
    #[error(transparent)]
    Value(TomlFault),
}

/// Why a value is invalid, although its type is correct.
#[derive(Debug, thiserror::Error)]
pub enum InvalidValue {
    /// A released address would be allocated again while other nodes may still send to its last pod.
    #[error(
        "the cool-down is too short: set at least {least} s, or remove the key (default: 60 s)",
        least = SHORTEST_COOL_DOWN.as_secs()
    )]
    CoolDown,
    /// The number of seconds is 0.
    #[error("0 s is too short: set at least 1, or remove the key to use the default")]
    Zero,
    /// The MTU of the pods is too small or too large.
    #[error("{mtu} is out of range: use {least} to {most}", least = MTU_RANGE.start(), most = MTU_RANGE.end())]
    Mtu {
        /// The value, in bytes.
        mtu: u32,
    },
    /// Several underlay addresses of one family are configured, and peers use only one.
    #[error("more than one {0} address: set at most one per family")]
    TwoAddresses(Family),
    /// The path is relative. The plugins and `polderctl` have other working directories than the agent.
    #[error("{} is a relative path: use an absolute path, e.g. /run/polder", .0.display())]
    Relative(PathBuf),
    /// The key is in section `[etcd]`, or is `store`.
    #[error(transparent)]
    Etcd(#[from] InvalidEtcd),
    /// The key is in section `[cni]`.
    #[error(transparent)]
    Cni(#[from] InvalidCni),
    /// The key is in section `[kubernetes]`.
    #[error(transparent)]
    Kubernetes(#[from] InvalidKubernetes),
    /// The key is in section `[bootstrap]`.
    #[error(transparent)]
    Bootstrap(#[from] InvalidBootstrap),
}
