//! The blocks of the pools that nodes have claimed.

use clap::Subcommand;
use polder_api::ask;
use polder_api::pool::ClaimStatus;

use super::{Printed, Render, Run, Session, print, table};

/// About blocks.
#[derive(Debug, Clone, Copy, Subcommand)]
pub enum Command {
    /// Lists those that are claimed, and by whom
    List,
}

impl Run for Command {
    fn run(&self, session: &Session<'_>) -> anyhow::Result<Printed> {
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

/// The blocks that are claimed.
pub(super) fn blocks(blocks: &[ClaimStatus]) -> String {
    let mut table = table(["BLOCK", "POOL", "NODE", "SINCE INCARNATION", "USED", "STANDING"]);
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
    print(table)
}
