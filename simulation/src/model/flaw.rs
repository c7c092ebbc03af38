//! Deliberate defects, to verify that the model detects them.

/// A defect. It modifies the input or the output of production code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Flaw {
    /// Transactions do not compare the node record.
    ForgetsNodeRecord,
    /// A claim does not compare whether the block is already claimed.
    ForgetsBlocks,
    /// A transaction with unknown outcome is treated as refused.
    RepeatsBlindly,
    /// All fences are ignored.
    IgnoresFences,
    /// A removed node's blocks are released without its confirmation.
    NeedsNoConfirmation,
    /// Blocks of removed nodes have no cool-down.
    NeedsNoCoolDown,
    /// A reserved address is handed over without proof that its holder is gone.
    NeedsNoProof,
    /// A DEL releases the addresses before it deletes the interface.
    FreesFirst,
    /// A DEL matches the pod by name.
    MatchesByName,
    /// A removed node confirms before it has disconnected its pods.
    ConfirmsFirst,
    /// A machine without a ledger uses a fence with its name and boot id as its own.
    MatchesFencesByBoot,
    /// A ledger is accepted as proof of identity even if both ids differ.
    AcceptsCopies,
}

impl Flaw {
    /// All defects.
    pub const ALL: [Self; 12] = [
        Self::ForgetsNodeRecord,
        Self::ForgetsBlocks,
        Self::RepeatsBlindly,
        Self::IgnoresFences,
        Self::NeedsNoConfirmation,
        Self::NeedsNoCoolDown,
        Self::NeedsNoProof,
        Self::FreesFirst,
        Self::MatchesByName,
        Self::ConfirmsFirst,
        Self::MatchesFencesByBoot,
        Self::AcceptsCopies,
    ];
}
