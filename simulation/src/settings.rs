//! The initial settings of a new cluster.

use polder_api::pool::NewPool;
use polder_ipam::Pool;
use polder_ipam::ids::ClusterId;
use polder_ipam::pool::{PoolState, Purpose};
use polder_ipam::record::ClusterRecord;

use crate::Random;

/// The network of all containers.
pub const NETWORK: &str = "net";

/// The pool for pods that keep their address by name.
pub const RESERVED: &str = "reserved";

/// The settings of a new cluster.
pub fn first_settings() -> ClusterRecord {
    ClusterRecord::new(ClusterId::new("cluster"))
}

/// An active pool; `block_length` is a prefix length.
pub fn pool(name: &str, cidr: &str, block_length: u8) -> Pool {
    let (name, cidr) = (name.parse().expect("a name"), cidr.parse().expect("a range"));
    Pool::new(name, cidr, block_length, PoolState::Active).expect("a pool that can be")
}

/// Pools that operators can add: one that nodes use before the others, the same with another block length, one that
/// overlaps it, and one for reservations.
pub fn more_pools() -> [NewPool; 4] {
    let mut kept = pool("kept", "10.9.1.0/29", 29);
    kept.purpose = Purpose::Reservations;
    let blocks = [("extra", "10.1.0.0/27", 30), ("extra", "10.1.0.0/27", 29), ("half", "10.1.0.16/28", 30)];
    let [extra, other, half] = blocks.map(|(name, cidr, length)| new_pool(&pool(name, cidr, length)));
    [extra, other, half, new_pool(&kept)]
}

/// The request to add that pool.
pub fn new_pool(pool: &Pool) -> NewPool {
    NewPool {
        name: pool.name.clone(),
        cidr: pool.cidr().into(),
        block_length: Some(pool.block_length()),
        purpose: pool.purpose,
        nodes: pool.nodes.clone(),
    }
}

/// The pools of a new cluster: one of each purpose, and in a third of the runs one IPv6 pool.
pub fn first_pools(random: &mut Random) -> Vec<Pool> {
    let mut reserved = pool(RESERVED, "10.9.0.0/29", 29);
    reserved.purpose = Purpose::Reservations;
    let mut pools = vec![pool("main", "10.0.0.0/26", *random.one_of(&[29, 30])), reserved];
    if random.once_in(3) {
        pools.push(pool("six", "fd00::/121", 125));
    }
    pools
}
