//! Tests of operator requests.

mod nodes;
mod pools;
mod release;
