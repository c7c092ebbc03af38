//! The lab: nodes made of namespaces, connected by segments and a router, with a real etcd, real agents and the real
//! plugin.
//!
//! A node has its own network, mounts (`/run`, `/var/lib`, `/etc`), processes, host name, machine id and boot id. All
//! its processes end with the node, and the node ends with the program that created it, even if that is killed.

pub mod agent;
pub mod api_server;
pub mod bench;
pub mod booted;
pub mod caller;
pub mod cgroup;
pub mod churn;
pub mod cni;
pub mod disk;
pub mod errors;
pub mod etcd;
pub mod fabric;
pub mod flannel;
pub mod frame;
pub mod image;
pub mod kernel_state;
pub mod kubelet;
pub mod lab;
pub mod manifest;
pub mod matrix;
pub mod mounts;
pub mod node;
pub mod pod;
pub mod probe;
pub mod program;
pub mod queue;
pub mod random;
pub mod routes;
pub mod runtime;
pub mod sabotage;
pub mod scripted;
pub mod service_manager;
pub mod steps;
pub mod stopped_thread;
pub mod tls;
pub mod traces;
pub mod traffic;
pub mod wait;

pub use lab::{Lab, Topology};
pub use node::Node;
pub use pod::Pod;
