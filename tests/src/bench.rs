//! The benchmark: Polder beside other plugins, in interleaved rounds. It only reports figures; nothing passes or fails.

pub mod agents;
pub mod bars;
pub mod cluster;
pub mod contestant;
pub mod data;
pub mod follow;
pub mod machine;
pub mod peers;
pub mod plot;
pub mod pods;
pub mod progress;
pub mod results;
pub mod rounds;
pub mod runtime;
pub mod services;
pub mod setups;
pub mod statistics;
pub mod table;
pub mod traffic;
