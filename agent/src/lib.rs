//! The Polder node agent as a library: the daemon, and the commands of `polderctl`.
//!
//! Each task is a struct with what it owns and reads, and is told to run by [`daemon`]. What it finds out it writes into its own
//! entries, which others read ([`board`], [`readiness`]). `assembly` makes the channels.
//!
//! | task | does |
//! |---|---|
//! | [`follower`] | follows the cluster's records |
//! | [`etcd_addresses`] | finds out where etcd is |
//! | [`leases`] | asks which agents are alive |
//! | [`registrar`] | keeps the node registered and its blocks claimed |
//! | [`publisher`] | tells the store that the node lives, and who has which address |
//! | [`sweeper`](polder_ipam::tasks::sweeper) | takes away what ended without a DEL |
//! | [`engine`] | makes the kernel what it should be |
//! | [`monitor`] | hears what changes in the kernel |
//! | [`endpoint`] | keeps the node's probe endpoint |
//! | [`probe`] | probes the paths to the peers |
//! | [`host`] | looks at what others on the host do to pods |
//! | [`inspection`] | looks at this node, when the cluster is checked |
//! | [`server`] | serves the plugin ([`service`], [`teardown`](polder_ipam::tasks::teardown)) and [operators](polder_ipam::tasks::operator) |
//! | [`http`], [`systemd`] | tell monitoring and systemd |

mod assembly;
pub mod bell;
pub mod board;
pub mod caller;
pub mod capability;
pub mod config;
pub mod conflist;
pub mod container;
pub mod ctl;
pub mod daemon;
pub mod dry_run;
pub mod endpoint;
pub mod engine;
pub mod etcd_addresses;
pub mod exit;
pub mod file;
#[cfg(test)]
mod fixture;
pub mod follower;
pub mod health;
pub mod host;
pub mod http;
pub mod in_flight;
pub mod inspection;
pub mod kernel;
pub mod leases;
pub mod liveness;
pub mod lock;
pub mod machine;
pub mod memory;
pub mod monitor;
pub mod node;
pub mod owner;
pub mod plugins;
pub mod pools;
pub mod presence;
pub mod probe;
pub mod publisher;
pub mod readiness;
pub mod recovery;
pub mod refused;
pub mod registrar;
pub mod repair;
pub mod reporter;
pub mod requests;
pub mod server;
pub mod service;
pub mod show;
pub mod state_dir;
pub mod status;
pub mod systemd;
pub mod underlay;
pub mod uninstall;
pub mod wiring;
