//! Runtimes that attach and detach pods on all nodes while everything else fails, in an order that one number decides.

pub mod census;
pub mod pace;
pub mod runtime;
pub mod script;
pub mod site;
pub mod tally;
pub mod truth;
