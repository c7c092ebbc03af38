//! `polderctl live`: checks that all threads of the agent make progress.

use clap::Args;
use polder_api::ask;
use serde::Serialize;

use super::{CommandOutput, Render, Run, Session};
use crate::exit::Exit;

/// Takes no arguments.
#[derive(Debug, Args)]
pub struct Command {}

/// Threads of the agent that make no progress, one sentence each.
#[derive(Debug, Serialize)]
#[serde(transparent)]
struct Standstills(Vec<String>);

impl Run for Command {
    fn run(&self, session: &Session<'_>) -> anyhow::Result<CommandOutput> {
        session.render(&Standstills(session.ask(ask::Live)?))
    }
}

impl Render for Standstills {
    fn table(&self) -> String {
        if self.0.is_empty() { "ok\n".to_owned() } else { self.0.join("\n") + "\n" }
    }

    fn exit(&self) -> Exit {
        Exit::of_look(self.0.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_agent_with_a_blocked_task_is_a_problem() {
        let well = Standstills(Vec::new());
        assert_eq!((well.table().as_str(), well.exit()), ("ok\n", Exit::Fine));
        let still = Standstills(vec!["the ledger".to_owned()]);
        assert_eq!((still.table().as_str(), still.exit()), ("the ledger\n", Exit::Problem));
    }
}
