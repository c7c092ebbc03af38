//! How often each thing may happen, so that what can happen has an end.

macro_rules! limits {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// How often each thing may happen.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
        pub struct Limits {
            $($(#[$doc])* pub $name: u8,)*
        }
    };
}

limits! {
    /// Pods that are added with an address of the node's blocks.
    pods,
    /// Pods that are added with the address that is reserved for them.
    reserved,
    /// Pods that end without anybody's saying so.
    ends,
    /// Agents that die and are started again.
    crashes,
    /// Machines that are booted again.
    reboots,
    /// Machines that are gone for good.
    deaths,
    /// Machines that begin under the name of another.
    newcomers,
    /// Machines that begin under the name of another, with a copy of its ledger.
    copies,
    /// Machines that take the place of one that is gone, by an operator's word.
    adoptions,
    /// Ledgers of removed nodes that are thrown away, so that they join again.
    rejoins,
    /// What an operator does to remove nodes.
    removals,
    /// Requests or replies that are lost.
    lost,
    /// Looks at what became of a transaction that see nothing.
    in_vain,
    /// Requests that take effect when nobody waits for them any more, or once more.
    late,
    /// Waits for the own view that end before it shows what was written.
    impatience,
    /// Blocks that are claimed before they are needed.
    appetite,
    /// Empty blocks that are given back.
    spares,
    /// Times that pass.
    ticks,
}
