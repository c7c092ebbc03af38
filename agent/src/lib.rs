//! The Polder node agent as a library: the daemon, and the commands of `polderctl`.
//!
//! Each task is a struct with the state that it owns and its inputs. [`daemon`] starts the tasks. A task publishes its
//! results in its own entries, which other tasks read ([`node_state`], [`readiness`]). `assembly` creates the channels.
//!
//! | task | purpose |
//! |---|---|
//! | [`watcher`] | follows the cluster's records |
//! | [`etcd_addresses`] | looks up etcd's addresses |
//! | [`leases`] | reads which agents are alive |
//! | [`registrar`] | keeps the node registered and its blocks claimed |
//! | [`publisher`] | renews the node's lease and publishes the owner of each address |
//! | [`orphan_collector`](polder_ipam::tasks::orphan_collector) | cleans up attachments that ended without a DEL |
//! | [`engine`] | reconciles the kernel with the desired state |
//! | [`monitor`] | receives the kernel's notifications |
//! | [`endpoint`] | keeps the node's probe endpoint |
//! | [`probe`] | probes the paths to the peers |
//! | [`host`] | checks for effects of other software on pods |
//! | [`inspection`] | checks this node when the cluster is checked |
//! | [`server`] | serves the plugin ([`service`], [teardown]) and [operators] |
//! | [`http`], [`systemd`] | report to monitoring and to systemd |
//! | [`kubernetes`] | follows the own Node object, and reports to Kubernetes |
//!
//! [teardown]: polder_ipam::tasks::teardown
//! [operators]: polder_ipam::tasks::operator

mod assembly;
pub mod caller;
pub mod capability;
pub mod config;
pub mod conflist;
pub mod connections;
pub mod container;
pub mod ctl;
pub mod daemon;
pub mod dry_run;
pub mod endpoint;
pub mod engine;
pub mod etcd_addresses;
pub mod exit;
pub mod fastpath;
pub mod file;
#[cfg(test)]
mod fixture;
pub mod health;
pub mod host;
pub mod http;
pub mod in_flight;
pub mod inspection;
pub mod kernel;
pub mod kubernetes;
pub mod leases;
pub mod liveness;
pub mod local_pods;
pub mod lock;
pub mod machine;
pub mod memory;
pub mod monitor;
pub mod node;
pub mod node_state;
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
pub mod wake;
pub mod watcher;
pub mod wiring;
