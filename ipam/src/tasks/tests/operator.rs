//! What an operator asks for.

mod nodes;
mod pools;
mod release;
