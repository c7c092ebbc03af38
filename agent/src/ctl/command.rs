//! What `polderctl` is told about pools and addresses, in the agent's terms.

use std::net::IpAddr;

use clap::{Args, Subcommand};
use polder_api::PoolName;
use polder_api::ipam::{Release, Repairs, Subject};
use polder_api::message::Request;
use polder_api::pool::{NewPool, PoolChange, PoolPurpose};
use polder_ipam::Cidr;

use crate::pools;

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
    /// Its range, like `10.245.0.0/16` or `fd00:245::/56`
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
    /// What is asked of the agent; or what is wrong with the arguments, whatever the state of the cluster.
    pub fn request(&self) -> Result<Request, String> {
        Ok(match self {
            Self::List => Request::Pools,
            Self::Add(pool) => Request::ChangePool(PoolChange::Add(pool.new_pool()?)),
            Self::Drain { name } => Request::ChangePool(PoolChange::Drain(name.clone())),
            Self::Remove { name } => Request::ChangePool(PoolChange::Remove(name.clone())),
        })
    }
}

impl PoolArguments {
    fn new_pool(&self) -> Result<NewPool, String> {
        let new = NewPool {
            name: self.name.clone(),
            cidr: self.cidr.into(),
            block_length: self.block_length,
            purpose: if self.reservations { PoolPurpose::Reservations } else { PoolPurpose::Blocks },
            nodes: self.nodes.iter().cloned().collect(),
        };
        pools::parse(new.clone()).map_err(|refusal| refusal.message)?;
        Ok(new)
    }
}

/// About blocks.
#[derive(Debug, Clone, Copy, Subcommand)]
pub enum BlockCommand {
    /// Lists those that are claimed, and by whom
    List,
}

/// About addresses.
#[derive(Debug, Subcommand)]
pub enum IpamCommand {
    /// Says who has which address, since when and why
    Show {
        /// cluster, pool NAME, block CIDR, node NAME, pod NAMESPACE/NAME, or an address [default: cluster]
        #[arg(num_args = 0..=2, value_name = "WHAT")]
        subject: Vec<String>,
    },
    /// Compares the records of the cluster with ledger and kernel of every node, and says what deviates
    Check {
        /// Put right what can be put right without taking anything from a pod that lives
        #[arg(long)]
        repair: bool,
    },
    /// Gives an address up: a reserved one, or one of a pod of this node that is gone
    Release {
        /// The address
        address: IpAddr,
        /// The pod that holds it is gone for good, I know that
        #[arg(long)]
        dead: bool,
    },
}

impl IpamCommand {
    /// What is asked of the agent; or what is wrong with the arguments.
    pub fn request(&self) -> Result<Request, String> {
        Ok(match self {
            Self::Show { subject } => Request::Show(parse(subject)?),
            Self::Check { repair: true } => Request::Inspect(Repairs::Safe),
            Self::Check { repair: false } => Request::Inspect(Repairs::None),
            Self::Release { address, dead } => Request::Release(Release { address: *address, dead: *dead }),
        })
    }
}

/// What is to be shown.
fn parse(words: &[String]) -> Result<Subject, String> {
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let failed = |error: &dyn std::fmt::Display| error.to_string();
    match words.as_slice() {
        [] | ["cluster"] => Ok(Subject::Cluster),
        ["pool", name] => name.parse().map(Subject::Pool).map_err(|error| failed(&error)),
        ["block", cidr] => {
            let cidr: Result<Cidr, _> = cidr.parse();
            cidr.map(|cidr| Subject::Block(cidr.into())).map_err(|error| failed(&error))
        }
        ["node", name] => name.parse().map(Subject::Node).map_err(|error| failed(&error)),
        ["pod", name] if name.split('/').count() == 2 => Ok(Subject::Pod((*name).to_owned())),
        [address] if let Ok(address) = address.parse() => Ok(Subject::Address(address)),
        _ => Err(format!(
            "{:?} cannot be shown: write cluster, pool NAME, block CIDR, node NAME, pod NAMESPACE/NAME or an address",
            words.join(" ")
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn subject(words: &str) -> Result<Subject, String> {
        parse(&words.split(' ').filter(|word| !word.is_empty()).map(str::to_owned).collect::<Vec<_>>())
    }

    #[test]
    fn what_is_to_be_shown_is_named_in_one_or_two_words() {
        assert_eq!(subject(""), Ok(Subject::Cluster));
        assert_eq!(subject("pool ipv4"), Ok(Subject::Pool("ipv4".parse().unwrap())));
        assert_eq!(subject("block 10.0.0.0/26"), Ok(Subject::Block("10.0.0.0/26".parse().unwrap())));
        assert_eq!(subject("10.0.0.5"), Ok(Subject::Address("10.0.0.5".parse().unwrap())));
        assert_eq!(subject("pod default/web-0"), Ok(Subject::Pod("default/web-0".into())));
        assert!(subject("block 10.0.0.1/26").unwrap_err().contains("did you mean 10.0.0.0/26?"));
        for wrong in ["pod web-0", "block", "something", "node a/b"] {
            assert!(subject(wrong).is_err(), "{wrong} was taken");
        }
    }
}
