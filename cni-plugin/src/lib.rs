//! The CNI plugins, which the container runtime executes for every pod.
//!
//! A plugin reads its environment and standard input, sends one request to the agent, configures one interface, prints
//! one result and exits. It is a static program without an async runtime. Before an ADD, the agent prepares everything
//! that does not depend on the pod.

pub mod action;
pub mod add;
pub mod agent;
pub mod call;
pub mod check;
pub mod command;
pub mod del;
pub mod delegate;
pub mod delegated;
pub mod environment;
pub mod error;
pub mod gc;
pub mod lease;
mod limit;
pub mod loopback;
pub mod netconf;
pub mod node;
pub mod options;
pub mod pod;
pub mod process;
pub mod result;
pub mod retry;
pub mod status;
pub mod version;
