//! `polderctl block`: the blocks that nodes have claimed from pools.

use clap::Subcommand;
use polder_api::ask;
use polder_api::pool::ClaimStatus;

use super::{CommandOutput, Render, Run, Session, table, table_text};

/// Subcommands of `polderctl block`.
#[derive(Debug, Clone, Copy, Subcommand)]
pub enum Command {
    /// List the claimed blocks and the node of each
    List,
}

impl Run for Command {
    fn run(&self, session: &Session<'_>) -> anyhow::Result<CommandOutput> {
        match self {
            Self::List => session.show(ask::Blocks),
        }
    }
}

impl Render for Vec<ClaimStatus> {
    fn table(&self) -> String {
        blocks(self)
    }
}

/// Table of the claimed blocks.
pub(super) fn blocks(blocks: &[ClaimStatus]) -> String {
    let mut table = table(["BLOCK", "POOL", "NODE", "INCARNATION", "USED", "STATE"]);
    for claim in blocks {
        table.add_row([
            claim.block.to_string(),
            claim.pool.to_string(),
            claim.node.to_string(),
            claim.incarnation.clone(),
            claim.addresses_used.map_or("?".to_owned(), |used| used.to_string()),
            claim.standing.to_string(),
        ]);
    }
    table_text(table)
}
