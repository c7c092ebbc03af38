//! Exit codes of `polderctl` and `polder-agent --check-config`: the same set for every command and output format.

use std::process::ExitCode;

use crate::config::ConfigError;

/// Exit codes of `polderctl`, printed by `--help`.
pub const HELP: &str = "\
Exit codes:
  0  done, or no problem was found
  1  the command failed or cannot answer, for example because the agent or etcd is unreachable
  2  an argument is invalid
  3  a problem was found:
       status      the node is not ready, the datastore is unreachable, the last pass failed, or a problem is listed
       plan        the next pass would change something
       ipam check  a deviation is left, or a node was not checked
       live        a thread of the agent is stuck";

/// Exit codes of `polder-agent`, printed by `--help`.
pub const AGENT_HELP: &str = "\
Exit codes with --check-config, --print-config and --plan:
  0  the configuration is valid; with --plan, also: the node would become ready
  1  the configuration file cannot be read (78 without these flags); with --plan, also: an agent is
     already running, or etcd or the kernel cannot be read
  2  an argument is invalid
  3  the configuration is invalid; with --plan, also: the node would not become ready

Exit codes otherwise:
  0   the agent was stopped by a signal
  1   the agent failed: a restart can help
  2   an argument is invalid
  78  the configuration is invalid or cannot be read: a restart does not help
      (set RestartPreventExitStatus=78 in the systemd unit)";

/// Exit code of a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// Done, or no problem was found.
    Fine = 0,
    /// The command failed, or its answer is not available.
    Failed = 1,
    /// An argument is invalid, independent of the state of the cluster. `clap` uses the same code.
    Usage = 2,
    /// The command succeeded and found a problem.
    Problem = 3,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

impl Exit {
    /// Exit code of a command that checks for problems: `is_well` if it found none.
    pub fn of_look(is_well: bool) -> Self {
        if is_well { Self::Fine } else { Self::Problem }
    }

    /// Exit code of a failed configuration check.
    pub fn of_config(error: &ConfigError) -> Self {
        match error {
            ConfigError::Read { .. } | ConfigError::Machine(_) => Self::Failed,
            ConfigError::Parse { .. }
            | ConfigError::Variable { .. }
            | ConfigError::Value { .. }
            | ConfigError::VariableValue { .. }
            | ConfigError::Merged(_)
            | ConfigError::NotPrinted(_) => Self::Problem,
        }
    }
}
