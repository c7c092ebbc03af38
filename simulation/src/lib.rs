//! Deterministic simulation: many nodes, a store that is plain data, and operators. Faults can occur at every step;
//! the same seed replays the same run.
//!
//! The simulation has no real clock, no threads, and no input or output. It runs the decisions and the tasks of
//! `polder-ipam` that a node runs ([`polder_ipam::tasks`]): registrar, ADD and DEL, orphan collector, publisher,
//! and the requests of operators to an agent ([`operator`]). Kernel and store are data ([`agent`]). Some clusters are
//! one node with its records in a local file. Tests with random operations compare [`etcd::Model`] with a real etcd.
//! [`model`] explores every order of events for a few nodes.

pub mod agent;
pub mod container;
pub mod disk;
pub mod etcd;
pub mod fault;
pub mod faults;
pub mod heal;
pub mod in_flight;
pub mod model;
pub mod operator;
pub mod random;
pub mod requests;
pub mod run;
pub mod runtime;
pub mod schedule;
mod serving;
pub mod settings;
pub mod store_request;
pub mod task;
pub mod violations;
pub mod watcher;
pub mod world;

pub use etcd::Model;
pub use random::Random;
pub use watcher::Watcher;
