//! Many nodes over a store that is plain data, and operators, through every fault at every step, the same way twice for the same seed.
//!
//! Nothing here has a clock, threads, or input and output. What decides is `polder-ipam`'s, as on a node, and so are the tasks that
//! carry it out ([`polder_ipam::tasks`]): the registrar, ADD and DEL, the sweeper, the publisher, and what operators ask an agent for
//! ([`operator`]). What they work with is data ([`agent`]). Some clusters are one node whose records are in a file of its own. Whether
//! [`etcd::Model`] answers as etcd does is found out by asking both, with operations made up at random. What a few nodes do in every
//! order of things is explored in [`model`].

pub mod agent;
pub mod container;
pub mod disk;
pub mod etcd;
pub mod fault;
pub mod faults;
pub mod follower;
pub mod heal;
pub mod in_flight;
pub mod judge;
pub mod model;
pub mod operator;
pub mod play;
pub mod random;
pub mod requests;
pub mod runtime;
pub mod schedule;
mod serving;
pub mod settings;
pub mod store_request;
pub mod task;
pub mod world;

pub use etcd::Model;
pub use follower::Follower;
pub use random::Random;
