//! `polderctl plan`: the changes that the next pass would make to the kernel.

use clap::Args;
use polder_api::ask;
use serde::Serialize;

use super::{CommandOutput, Render, Run, Session, changes_as_text};
use crate::exit::Exit;

/// Takes no arguments.
#[derive(Debug, Args)]
pub struct Command {}

/// The changes in the order in which the pass makes them.
#[derive(Debug, Serialize)]
#[serde(transparent)]
struct Changes(Vec<String>);

impl Run for Command {
    fn run(&self, session: &Session<'_>) -> anyhow::Result<CommandOutput> {
        session.render(&Changes(session.ask(ask::Plan)?))
    }
}

impl Render for Changes {
    fn table(&self) -> String {
        changes_as_text(&self.0)
    }

    fn exit(&self) -> Exit {
        Exit::of_look(self.0.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plan_with_changes_is_a_problem() {
        assert_eq!(Changes(Vec::new()).exit(), Exit::Fine);
        assert_eq!(Changes(vec!["add a route".into()]).exit(), Exit::Problem);
    }
}
