//! The daemon of one node.
//!
//! It follows the cluster's records ([`follower`]), keeps the node registered and its blocks claimed ([`registrar`]),
//! makes the kernel what it should be ([`engine`]), and serves the plugin ([`service`]). Each is one task that owns
//! what it decides about, and tells the others on the [`board`]. [`daemon`] puts them together.

pub mod adoption;
pub mod agent;
pub mod bell;
pub mod board;
pub mod caller;
pub mod capability;
pub mod config;
pub mod conflist;
pub mod container;
pub mod ctl;
pub mod daemon;
pub mod disconnect;
pub mod dry_run;
pub mod endpoint;
pub mod engine;
pub mod etcd_addresses;
pub mod exit;
pub mod file;
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
pub mod published;
pub mod publisher;
pub mod recovery;
pub mod refused;
pub mod registrar;
pub mod release;
pub mod removal;
pub mod repair;
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
