//! How `polderctl` and `polder-agent --check-config` end: one set of exit codes, whatever the command and the output format.

use std::process::ExitCode;

use polder_api::message::Reply;

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

    /// The end of a command that the agent has answered.
    pub fn of(reply: &Reply) -> Self {
        match reply {
            Reply::Status(status) => Self::of_look(status.is_well()),
            Reply::Planned(changes) => Self::of_look(changes.is_empty()),
            Reply::Checked(checked) => Self::of_look(checked.is_clean()),
            Reply::Nodes(_) | Reply::Pools(_) | Reply::Blocks(_) | Reply::Shown(_) | Reply::Done(_) => {
                Self::Fine
            }
            // The others are for plugins, and answer no question of polderctl.
            Reply::Unconfirmed { .. }
            | Reply::Refused(_)
            | Reply::Wiring(_)
            | Reply::Leased(_)
            | Reply::Deleted
            | Reply::Health(_) => Self::Failed,
        }
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

#[cfg(test)]
mod tests {
    use polder_api::ipam::{Checked, NodeChecked};
    use polder_api::message::{Refusal, RefusalKind};
    use polder_api::status::{PassStatus, Status, StoreStatus};

    use super::*;

    fn healthy() -> Status {
        Status {
            node: "n1".parse().unwrap(),
            version: "0".into(),
            ready: true,
            reasons: Vec::new(),
            problems: Vec::new(),
            refused_writes: Vec::new(),
            cluster: None,
            store: StoreStatus::Connected { store: "etcd".into(), revision: 1 },
            underlay: Vec::new(),
            not_underlay: Vec::new(),
            mtu: None,
            blocks: Vec::new(),
            pods: 0,
            missing_features: Vec::new(),
            last_pass: None,
            repairs: Vec::new(),
            repair_count: 0,
        }
    }

    fn end_of(change: impl FnOnce(&mut Status)) -> Exit {
        let mut status = healthy();
        change(&mut status);
        Exit::of(&Reply::Status(Box::new(status)))
    }

    #[test]
    fn a_status_is_a_problem_if_it_says_not_ready_or_names_one() {
        assert_eq!(end_of(|_| ()), Exit::Fine);
        assert_eq!(end_of(|status| status.ready = false), Exit::Problem);
        assert_eq!(end_of(|status| status.problems = vec!["the peer is silent".into()]), Exit::Problem);
        let away = StoreStatus::Disconnected { store: "etcd".into(), reason: "refused".into() };
        assert_eq!(end_of(|status| status.store = away), Exit::Problem);
        let pass = |failures| PassStatus { count: 1, writes: 0, written: 0, took_us: 1, failures };
        assert_eq!(end_of(|status| status.last_pass = Some(pass(vec!["no route".into()]))), Exit::Problem);
        assert_eq!(end_of(|status| status.last_pass = Some(pass(Vec::new()))), Exit::Fine);
    }

    #[test]
    fn what_a_kernel_lacks_and_what_was_repaired_is_no_problem() {
        assert_eq!(
            end_of(|status| status.missing_features = vec!["ports cannot be locked".into()]),
            Exit::Fine
        );
        assert_eq!(end_of(|status| status.repair_count = 7), Exit::Fine);
    }

    #[test]
    fn a_plan_with_changes_is_a_problem() {
        assert_eq!(Exit::of(&Reply::Planned(Vec::new())), Exit::Fine);
        assert_eq!(Exit::of(&Reply::Planned(vec!["add a route".into()])), Exit::Problem);
    }

    #[test]
    fn a_check_is_fine_only_if_every_member_was_checked() {
        let name = |name: &str| name.parse().unwrap();
        let checked = NodeChecked { name: name("n1"), attachments: 0, interfaces: 0 };
        let all = Checked { nodes: vec![checked], ..Checked::default() };
        let end = |checked: &Checked| Exit::of(&Reply::Checked(Box::new(checked.clone())));
        assert_eq!(end(&all), Exit::Fine);
        assert_eq!(end(&Checked { absent: vec![name("n2")], ..all.clone() }), Exit::Problem);
        assert_eq!(end(&Checked { silent: vec![name("n2")], ..all.clone() }), Exit::Problem);
        assert_eq!(end(&Checked { unregistered: Some(name("n2")), ..all.clone() }), Exit::Problem);
        assert_eq!(end(&Checked { left_out: 1, ..all }), Exit::Problem);
        assert_eq!(end(&Checked::default()), Exit::Problem, "nobody was checked");
    }

    #[test]
    fn a_refusal_is_a_failure() {
        for kind in [RefusalKind::Invalid, RefusalKind::TryAgain, RefusalKind::Missing] {
            assert_eq!(Exit::of(&Reply::Refused(Refusal::new(kind, "no"))), Exit::Failed);
        }
        assert_eq!(Exit::of(&Reply::Done("added".into())), Exit::Fine);
    }
}
