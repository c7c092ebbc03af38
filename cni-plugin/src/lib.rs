//! The CNI plugins: what a container runtime calls for every pod.
//!
//! It is executed, reads its environment and standard input, asks the agent once, wires one interface, prints one
//! result and ends. So it is a static program without a runtime, and everything that can be done before an ADD is
//! done by the agent before an ADD.

pub mod add;
pub mod agent;
pub mod call;
pub mod check;
pub mod command;
pub mod del;
pub mod delegate;
pub mod environment;
pub mod error;
pub mod gc;
pub mod given;
pub mod lease;
pub mod loopback;
pub mod netconf;
pub mod node;
pub mod patience;
pub mod pod;
pub mod process;
pub mod result;
pub mod status;
pub mod version;
pub mod wishes;
