//! What a new cluster begins with.

use polder_ipam::Pool;
use polder_ipam::ids::ClusterId;
use polder_ipam::pool::{PoolState, Purpose};
use polder_ipam::record::{AttachMode, Backend, ClusterRecord, Masquerade, VxlanSettings};

use crate::Random;

/// The network of all containers.
pub const NETWORK: &str = "net";

/// The pool for pods that keep their address by name.
pub const RESERVED: &str = "reserved";

/// The settings of a new cluster.
pub fn first_settings() -> ClusterRecord {
    ClusterRecord {
        id: ClusterId("cluster".to_owned()),
        backend: Backend::Auto,
        attach: AttachMode::Bridge,
        vxlan: VxlanSettings::default(),
        masquerade: Masquerade::default(),
    }
}

/// An active pool.
pub fn pool(name: &str, cidr: &str, block_length: u8) -> Pool {
    let (name, cidr) = (name.parse().expect("a name"), cidr.parse().expect("a range"));
    Pool::new(name, cidr, block_length, PoolState::Active).expect("a pool that can be")
}

/// The pools of a new cluster: one of each purpose, and sometimes one of the other family.
pub fn first_pools(random: &mut Random) -> Vec<Pool> {
    let mut reserved = pool(RESERVED, "10.9.0.0/29", 29);
    reserved.purpose = Purpose::Reservations;
    let mut pools = vec![pool("main", "10.0.0.0/26", *random.one_of(&[29, 30])), reserved];
    if random.once_in(3) {
        pools.push(pool("six", "fd00::/121", 125));
    }
    pools
}
