//! Who owns which address.
//!
//! Ownership of blocks is decided in the cluster's store, in one transaction per claim. Addresses inside a node's
//! own blocks are decided by that node alone, and kept in its ledger. So an address can be handed out while the
//! store is away, and still never twice.
//!
//! All of it is pure: no clock, no randomness, no input or output. A decision says what is to change ([`change`]), and what
//! a store is asked for that is data, too ([`transaction`], [`store`]). [`node`] puts the allocator and a ledger ([`ledger`])
//! together. [`tasks`] carry it out over a trait that an agent implements with what the crate `polder-store` speaks to, and a
//! simulation with plain data.

pub mod alias;
pub mod allocator;
pub mod attempt;
pub mod bootstrap;
pub mod cause;
pub mod change;
pub mod cidr;
pub mod claim;
pub mod ids;
pub mod invariants;
pub mod key;
pub mod ledger;
pub mod missing;
pub mod moment;
pub mod needed;
pub mod node;
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
pub mod shortage;
pub mod special;
pub mod steward;
pub mod store;
pub mod tasks;
pub mod transaction;
pub mod view;

pub use cidr::Cidr;
pub use moment::Moment;
pub use pool::{Block, Pool};
pub use revision::Revision;
