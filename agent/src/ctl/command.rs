//! What `polderctl` is told about pools, in the agent's terms.

use clap::{Args, Subcommand};
use polder_api::PoolName;
use polder_api::message::Request;
use polder_api::pool::{NewPool, PoolChange, PoolPurpose};
use polder_ipam::Cidr;

/// About pools.
#[derive(Debug, Subcommand)]
pub enum PoolCommand {
    /// Lists them, and how much of each is in use
    List,
    /// Adds one; one that is being drained, given again as it is, becomes active again
    Add(PoolArguments),
    /// Lets no more addresses of it go to new pods; existing ones keep theirs, and blocks that are empty go back
    Drain {
        /// Its name
        name: PoolName,
    },
    /// Removes one of which nothing is in use
    Remove {
        /// Its name
        name: PoolName,
    },
}

/// A pool that is to be added.
#[derive(Debug, Args)]
pub struct PoolArguments {
    /// Its name
    name: PoolName,
    /// Its range, like 10.245.0.0/16 or fd00:245::/56
    cidr: Cidr,
    /// The prefix length of its blocks [default: 26 for IPv4, 122 for IPv6]
    #[arg(long, value_name = "BITS")]
    block_length: Option<u8>,
    /// Only for nodes whose configuration has these [labels]
    #[arg(long, value_name = "LABEL=VALUE", value_delimiter = ',', value_parser = label)]
    nodes: Vec<(String, String)>,
    /// For workloads that keep their address by name: no node claims blocks of it
    #[arg(long)]
    reservations: bool,
}

fn label(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((label, value)) if !label.is_empty() => Ok((label.to_owned(), value.to_owned())),
        _ => Err("write a label and its value, like zone=a".to_owned()),
    }
}

impl PoolCommand {
    /// What is asked of the agent.
    pub fn request(&self) -> Request {
        match self {
            Self::List => Request::Pools,
            Self::Add(pool) => Request::ChangePool(PoolChange::Add(NewPool {
                name: pool.name.clone(),
                cidr: pool.cidr.into(),
                block_length: pool.block_length,
                purpose: match pool.reservations {
                    true => PoolPurpose::Reservations,
                    false => PoolPurpose::Blocks,
                },
                nodes: pool.nodes.iter().cloned().collect(),
            })),
            Self::Drain { name } => Request::ChangePool(PoolChange::Drain(name.clone())),
            Self::Remove { name } => Request::ChangePool(PoolChange::Remove(name.clone())),
        }
    }
}

/// About blocks.
#[derive(Debug, Clone, Copy, Subcommand)]
pub enum BlockCommand {
    /// Lists those that are claimed, and by whom
    List,
}
