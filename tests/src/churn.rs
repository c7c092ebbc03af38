//! Runtimes that attach and detach pods on all nodes while faults happen, in an order determined by a seed.

pub mod census;
pub mod pace;
pub mod runtime;
pub mod script;
pub mod site;
pub mod tally;
pub mod truth;
