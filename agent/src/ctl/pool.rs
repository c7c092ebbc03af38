//! `polderctl pool`: list, add, drain and remove pools, the address ranges for pods.

use clap::{Args, Subcommand};
use polder_api::pool::{NewPool, PoolChange, PoolPurpose, PoolStatus};
use polder_api::{PoolName, ask};
use polder_ipam::Cidr;
use polder_ipam::pool::format_labels;
use polder_ipam::tasks::operator;

use super::{CommandOutput, Render, Run, Session, Usage, table, table_text};

/// Subcommands of `polderctl pool`.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// List the pools, with the number of blocks and addresses in use
    List,
    /// Add a pool, or reactivate a draining pool (with its original arguments)
    Add(PoolArguments),
    /// Stop assigning addresses of a pool to new pods. Existing pods keep theirs; empty blocks are released
    Drain {
        /// Name of the pool
        name: PoolName,
    },
    /// Remove a pool that has no blocks or addresses in use
    Remove {
        /// Name of the pool
        name: PoolName,
    },
}

/// Arguments of `polderctl pool add`.
#[derive(Debug, Args)]
pub struct PoolArguments {
    /// Name of the pool
    name: PoolName,
    /// Address range, such as `10.245.0.0/16` or `fd00:245::/56`
    cidr: Cidr,
    /// Prefix length of the blocks [default: 26 for IPv4, 122 for IPv6]
    #[arg(long, value_name = "BITS")]
    block_length: Option<u8>,
    /// Use the pool only on nodes that have all these labels, comma-separated. Labels are set in section `[labels]` of
    /// agent.toml, not in Kubernetes [default: all nodes]
    #[arg(long, value_name = "LABEL=VALUE", value_delimiter = ',', value_parser = label)]
    nodes: Vec<(String, String)>,
    /// Use the pool only for reservations (addresses kept for one pod name): no node claims blocks of it
    #[arg(long)]
    reservations: bool,
}

/// An argument of `--nodes` is invalid.
#[derive(Debug, thiserror::Error)]
enum InvalidLabel {
    /// The argument has no equals sign, or no label before it.
    /// Remedy: write it in this form; separate several labels by commas.
    #[error("write LABEL=VALUE, like zone=a")]
    Format,
}

fn label(text: &str) -> Result<(String, String), InvalidLabel> {
    match text.split_once('=') {
        Some((label, value)) if !label.is_empty() => Ok((label.to_owned(), value.to_owned())),
        _ => Err(InvalidLabel::Format),
    }
}

impl Run for Command {
    fn run(&self, session: &Session<'_>) -> anyhow::Result<CommandOutput> {
        let change = match self {
            Self::List => return session.show(ask::Pools),
            Self::Add(pool) => PoolChange::Add(pool.new_pool()?),
            Self::Drain { name } => PoolChange::Drain(name.clone()),
            Self::Remove { name } => PoolChange::Remove(name.clone()),
        };
        session.show(ask::ChangePool(change))
    }
}

impl PoolArguments {
    /// Returns the pool, or the error that can be found without the cluster's state.
    fn new_pool(&self) -> Result<NewPool, Usage> {
        let new = NewPool {
            name: self.name.clone(),
            cidr: self.cidr.into(),
            block_length: self.block_length,
            purpose: if self.reservations { PoolPurpose::Reservations } else { PoolPurpose::Blocks },
            nodes: self.nodes.iter().cloned().collect(),
        };
        operator::parse_pool(new.clone()).map_err(Usage::Pool)?;
        Ok(new)
    }
}

impl Render for Vec<PoolStatus> {
    fn table(&self) -> String {
        pools(self)
    }
}

/// Table of the pools.
pub(super) fn pools(pools: &[PoolStatus]) -> String {
    let mut table = table([
        "POOL",
        "CIDR",
        "BLOCK SIZE",
        "PURPOSE",
        "STATE",
        "NODES",
        "BLOCKS CLAIMED",
        "ADDRESSES USED",
    ]);
    for pool in pools {
        let for_blocks = pool.purpose == PoolPurpose::Blocks;
        let claimed = pool.blocks_owned + pool.blocks_resting;
        let resting = match pool.blocks_resting {
            0 => String::new(),
            resting => format!(" ({resting} in cool-down after node removal)"),
        };
        table.add_row([
            pool.name.to_string(),
            pool.cidr.to_string(),
            if for_blocks { format!("/{}", pool.block_length) } else { "-".to_owned() },
            pool.purpose.to_string(),
            pool.state.to_string(),
            if pool.nodes.is_empty() { "all".to_owned() } else { format_labels(&pool.nodes) },
            if for_blocks {
                format!("{claimed} of {}{resting}", format_block_count(pool))
            } else {
                "-".to_owned()
            },
            match (for_blocks, pool.addresses_used) {
                (_, None) => "?".to_owned(),
                (true, Some(used)) => used.to_string(),
                (false, Some(used)) => format!("{used} ({} reserved)", pool.reserved),
            },
        ]);
    }
    table_text(table)
}

/// Number of blocks of the pool, as a power of two if it is large.
fn format_block_count(pool: &PoolStatus) -> String {
    match pool.block_length - pool.cidr.prefix() {
        bits @ 32.. => format!("2^{bits}"),
        _ => pool.blocks_total.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use polder_api::pool::PoolState;

    use super::*;

    #[test]
    fn a_pool_of_2_to_the_66_blocks_is_printed_as_a_power() {
        let pool = PoolStatus {
            name: "ipv6".parse().unwrap(),
            cidr: "fd00:244::/56".parse().unwrap(),
            block_length: 122,
            purpose: PoolPurpose::Blocks,
            state: PoolState::Active,
            nodes: [("zone".to_owned(), "a".to_owned())].into(),
            blocks_owned: 3,
            blocks_resting: 1,
            blocks_total: u64::MAX,
            reserved: 0,
            addresses_used: Some(7),
        };
        let text = pools(&[pool]);
        assert!(
            text.contains("4 of 2^66 (1 in cool-down after node removal)") && text.contains("zone=a"),
            "{text}"
        );
    }
}
