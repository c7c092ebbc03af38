//! How often each event may occur, so that the state space is finite.

macro_rules! limits {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// How often each event may occur.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
        pub struct Limits {
            $($(#[$doc])* pub $name: u8,)*
        }
    };
}

limits! {
    /// ADDs of pods with an address of the node's blocks.
    pods,
    /// ADDs of pods with the reserved address.
    reserved,
    /// Pods that end without a DEL.
    ends,
    /// Agent crashes, each followed by a restart.
    crashes,
    /// Machine reboots.
    reboots,
    /// Permanent failures of machines.
    deaths,
    /// Machines that join under the name of another.
    starts,
    /// Machines that join under the name of another, with a copy of its ledger.
    copies,
    /// Machines that replace a failed one, at an operator's request.
    adoptions,
    /// Deleted ledgers of removed nodes, so that they join again.
    rejoins,
    /// Operator actions that remove nodes.
    removals,
    /// Lost requests or replies.
    lost,
    /// Failed reads of a transaction's outcome.
    failed_reads,
    /// Requests that take effect after the task has stopped waiting, or a second time.
    late,
    /// Timeouts while a task waits for its view or for the registrar.
    timeouts,
    /// Blocks claimed before they are needed.
    block_requests,
    /// Empty blocks that are released.
    releases,
    /// Ticks of time.
    ticks,
}
