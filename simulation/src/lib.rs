//! The cluster's store as plain data, with the faults that a test chooses, and chance that happens the same way
//! twice.
//!
//! Nothing here has a clock, threads, or input and output. Whether [`etcd::Model`] answers as etcd does is found out
//! by asking both, with operations made up at random.

pub mod etcd;
pub mod follower;
pub mod random;

pub use etcd::Model;
pub use follower::Follower;
pub use random::Random;
