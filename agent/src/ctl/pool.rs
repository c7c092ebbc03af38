//! Pools and blocks, for people.

use polder_api::pool::{ClaimStatus, PoolPurpose, PoolStatus};
use polder_ipam::pool::format_labels;

use super::{print, table};

/// The pools of the cluster.
pub fn pools(pools: &[PoolStatus]) -> String {
    let mut table =
        table(["POOL", "CIDR", "BLOCKS OF", "FOR", "STATE", "NODES", "BLOCKS CLAIMED", "ADDRESSES USED"]);
    for pool in pools {
        let for_blocks = pool.purpose == PoolPurpose::Blocks;
        let claimed = pool.blocks_owned + pool.blocks_resting;
        let resting = match pool.blocks_resting {
            0 => String::new(),
            resting => format!(" ({resting} rest)"),
        };
        table.add_row([
            pool.name.to_string(),
            pool.cidr.to_string(),
            if for_blocks { format!("/{}", pool.block_length) } else { "-".to_owned() },
            pool.purpose.to_string(),
            pool.state.to_string(),
            if pool.nodes.is_empty() { "all".to_owned() } else { format_labels(&pool.nodes) },
            if for_blocks { format!("{claimed} of {}{resting}", many(pool)) } else { "-".to_owned() },
            match (for_blocks, pool.addresses_used) {
                (_, None) => "?".to_owned(),
                (true, Some(used)) => used.to_string(),
                (false, Some(used)) => format!("{used} ({} reserved)", pool.reserved),
            },
        ]);
    }
    print(table)
}

/// How many blocks the pool has.
fn many(pool: &PoolStatus) -> String {
    match pool.block_length - pool.cidr.prefix() {
        bits @ 32.. => format!("2^{bits}"),
        _ => pool.blocks_total.to_string(),
    }
}

/// The blocks that are claimed.
pub fn blocks(blocks: &[ClaimStatus]) -> String {
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

#[cfg(test)]
mod tests {
    use polder_api::pool::PoolState;

    use super::*;

    #[test]
    fn a_pool_of_2_to_the_66_blocks_is_printed_in_few_digits() {
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
        assert!(text.contains("4 of 2^66 (1 rest)") && text.contains("zone=a"), "{text}");
    }
}
