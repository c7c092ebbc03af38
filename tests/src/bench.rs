//! The benchmark: Polder beside other plugins, in interleaved rounds. It only reports figures; nothing passes or fails.

pub mod bars;
pub mod contestant;
pub mod machine;
pub mod plot;
pub mod pods;
pub mod progress;
pub mod results;
pub mod runtime;
pub mod statistics;
pub mod table;
