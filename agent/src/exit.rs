//! How `polderctl` and `polder-agent --check-config` end: one set of exit codes, whatever the command and the output format.

use std::process::ExitCode;

use crate::config::ConfigError;

/// The exit codes in words, for `--help`.
pub const HELP: &str = "\
Exit codes:
  0  done, or no problem was found
  1  the command could not be carried out, or the question could not be answered
  2  an argument is wrong
  3  a problem was found: see docs/polderctl.md for each command";

/// The exit codes of the agent in words, for `--help`.
pub const AGENT_HELP: &str = "\
Exit codes with --check-config, --print-config and --plan:
  0  the configuration is correct; with --plan, the node would become ready
  1  the configuration file, or with --plan anything else that is needed, cannot be read
  2  an argument is wrong
  3  the configuration is wrong; with --plan, or the node would not become ready

Exit codes otherwise:
  0   the agent was asked to stop
  1   the agent cannot go on: a restart can help
  2   an argument is wrong
  78  the configuration is wrong or cannot be read: a restart does not help
      (for RestartPreventExitStatus= of systemd)";

/// How a command ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// It is done; or the question is answered, and there is no problem.
    Fine = 0,
    /// It could not be carried out, or the question could not be answered.
    Failed = 1,
    /// An argument is wrong, whatever the state of the cluster. `clap` ends with the same code.
    Usage = 2,
    /// The question is answered, and there is a problem.
    Problem = 3,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

impl Exit {
    /// The end of a command that looks for problems.
    pub fn of_look(is_well: bool) -> Self {
        if is_well { Self::Fine } else { Self::Problem }
    }

    /// The end of a check of the configuration.
    pub fn of_config(error: &ConfigError) -> Self {
        match error {
            ConfigError::Read { .. } | ConfigError::Machine(_) => Self::Failed,
            ConfigError::Parse { .. }
            | ConfigError::Variable { .. }
            | ConfigError::Value { .. }
            | ConfigError::Merged(_) => Self::Problem,
        }
    }
}
