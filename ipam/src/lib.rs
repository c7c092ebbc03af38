//! IP address management: the owner of each block and of each address.
//!
//! Ownership of blocks is decided in the datastore, in one transaction per claim. Addresses in a node's own blocks
//! are allocated by that node alone, and recorded in its ledger. So a node can allocate addresses while the datastore
//! is unreachable, and no address is allocated twice.
//!
//! Decisions are pure: no clock, no randomness, no I/O. A decision returns the changes to make ([`change`]); requests
//! to a datastore are data, too ([`transaction`], [`store`]). [`node`] combines the allocator and a ledger
//! ([`ledger`]). [`tasks`] carry out the decisions through a trait, which an agent implements with the crate
//! `polder-store`, and a simulation with plain data.

pub mod alias;
pub mod allocator;
pub mod attempt;
pub mod bootstrap;
pub mod capacity;
pub mod cause;
pub mod change;
pub mod cidr;
pub mod claim;
pub mod departure;
pub mod ids;
pub mod invariants;
pub mod key;
pub mod ledger;
pub mod membership;
pub mod moment;
pub mod needed;
pub mod node;
pub mod orphans;
pub mod peers;
pub mod pool;
pub mod pools;
pub mod prefix;
pub mod publication;
pub mod readiness;
pub mod record;
pub mod recovery;
pub mod registration;
pub mod release;
pub mod removal;
pub mod reservation;
pub mod revision;
pub mod settings;
pub mod special;
pub mod store;
pub mod tasks;
pub mod transaction;
pub mod view;

pub use cidr::Cidr;
pub use moment::Moment;
pub use pool::{Block, Pool};
pub use revision::Revision;
