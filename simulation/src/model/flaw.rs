//! Deliberate defects, to see that the model finds them.

/// A defect. What production decides is bent on its way in or out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Flaw {
    /// Transactions do not rest on the node's record.
    ForgetsNodeRecord,
    /// A claim does not ask whether the block is claimed.
    ForgetsBlocks,
    /// A transaction whose outcome is unknown counts as one that was refused.
    RepeatsBlindly,
    /// Nobody looks at fences.
    IgnoresFences,
    /// A removed node's blocks are given back without its confirmation.
    NeedsNoConfirmation,
    /// Blocks of removed nodes do not rest.
    NeedsNoRest,
    /// A reserved address is handed over without proof that its holder is gone.
    NeedsNoProof,
    /// A DEL frees the addresses before the interface is gone.
    FreesFirst,
    /// A DEL takes away the pod by its name.
    MatchesByName,
    /// A removed node confirms before it has cut its pods off.
    ConfirmsFirst,
    /// A machine without a ledger takes a fence of its name and boot for its own.
    MatchesFencesByBoot,
    /// A ledger is proof, also where both ids are others.
    BelievesCopies,
}

impl Flaw {
    /// All of them.
    pub const ALL: [Self; 12] = [
        Self::ForgetsNodeRecord,
        Self::ForgetsBlocks,
        Self::RepeatsBlindly,
        Self::IgnoresFences,
        Self::NeedsNoConfirmation,
        Self::NeedsNoRest,
        Self::NeedsNoProof,
        Self::FreesFirst,
        Self::MatchesByName,
        Self::ConfirmsFirst,
        Self::MatchesFencesByBoot,
        Self::BelievesCopies,
    ];
}
