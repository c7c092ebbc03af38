//! The explored spaces: each is small enough to be explored completely. Together they cover all known risks.

use super::limits::Limits;
use super::start::Start;
use super::tally::Occurrence::{
    self, Adopted, BlockReleased, BlockTakenOver, ClaimRefused, Claimed, Confirmed, Conflict, Denied,
    FencedRefused, FoundApplied, FoundNotApplied, HandedOver, HandedOverRebooted, HandedOverRemoved,
    HolderCleared, LateApplied, LateRefused, Registered, RemovedBlockReleased,
};
use super::{Flaw, Space};

impl Space {
    /// All spaces, each with the events that must have occurred in it.
    #[expect(clippy::too_many_lines, reason = "a list, one entry for each space")]
    pub fn all() -> Vec<(Self, Vec<Occurrence>)> {
        let none = Limits::default();
        vec![
            (
                Self::new("first claims", Start::Empty, Limits { lost: 1, ..none }),
                vec![Claimed, ClaimRefused, FoundApplied, FoundNotApplied],
            ),
            (
                Self::new(
                    "claims and crashes",
                    Start::One,
                    Limits { pods: 1, crashes: 1, lost: 1, late: 1, ..none },
                ),
                vec![Claimed, BlockTakenOver, LateApplied, LateRefused, FoundApplied, FoundNotApplied],
            ),
            (
                Self::new(
                    "claims with unknown outcome",
                    Start::One,
                    Limits { pods: 1, lost: 1, late: 1, failed_reads: 1, timeouts: 1, ..none },
                ),
                vec![Claimed, ClaimRefused, BlockTakenOver, LateApplied, FoundApplied, FoundNotApplied],
            ),
            (
                Self::new(
                    "spare blocks",
                    Start::One,
                    Limits { block_requests: 1, releases: 1, pods: 1, late: 1, ..none },
                ),
                vec![Claimed, ClaimRefused, BlockReleased],
            ),
            (
                Self::new("pods", Start::Settled, Limits { pods: 2, ends: 1, reboots: 1, ticks: 1, ..none }),
                vec![],
            ),
            (
                Self::new(
                    "removal",
                    Start::Settled,
                    Limits { removals: 1, pods: 1, ticks: 1, late: 1, ..none },
                ),
                vec![Confirmed, RemovedBlockReleased, FencedRefused],
            ),
            (
                Self::new(
                    "two removals",
                    Start::Settled,
                    Limits { removals: 2, deaths: 1, ticks: 1, ..none },
                ),
                vec![Confirmed, RemovedBlockReleased, FencedRefused],
            ),
            (
                Self::new(
                    "a name again",
                    Start::Settled,
                    Limits { removals: 1, starts: 1, ticks: 1, ..none },
                ),
                vec![Conflict, Registered, Confirmed, RemovedBlockReleased, Claimed],
            ),
            (
                Self::new(
                    "a machine again",
                    Start::Settled,
                    Limits { removals: 1, rejoins: 1, ticks: 1, pods: 1, ..none },
                ),
                vec![Confirmed, RemovedBlockReleased, Claimed],
            ),
            (
                Self::new(
                    "a name again on one kernel",
                    Start::OneKernel,
                    Limits { removals: 1, starts: 1, pods: 1, ..none },
                ),
                vec![Conflict, Registered, Confirmed],
            ),
            (
                Self::new(
                    "restarts on one kernel",
                    Start::OneKernel,
                    Limits { removals: 1, reboots: 1, pods: 1, ticks: 1, ..none },
                ),
                vec![Confirmed, RemovedBlockReleased],
            ),
            (
                Self::new(
                    "a copied ledger",
                    Start::Settled,
                    Limits { removals: 1, copies: 1, pods: 1, ..none },
                ),
                vec![Conflict, Confirmed],
            ),
            (
                Self::new(
                    "a copy in place of the original",
                    Start::Settled,
                    Limits { deaths: 1, copies: 1, adoptions: 1, pods: 1, ..none },
                ),
                vec![Conflict, Adopted],
            ),
            (
                Self::new(
                    "hand-overs and crashes",
                    Start::Settled,
                    Limits { reserved: 2, lost: 1, crashes: 1, ..none },
                ),
                vec![
                    HandedOver,
                    Denied,
                    HolderCleared,
                    FoundApplied,
                    FoundNotApplied,
                    LateApplied,
                    LateRefused,
                ],
            ),
            (
                Self::new(
                    "hand-overs that time out",
                    Start::Settled,
                    Limits { reserved: 2, timeouts: 1, lost: 1, ..none },
                ),
                vec![HandedOver, Denied, HolderCleared, FoundApplied, FoundNotApplied],
            ),
            (
                Self::new("late hand-overs", Start::Settled, Limits { reserved: 3, late: 1, ..none }),
                vec![
                    HandedOver,
                    Denied,
                    HolderCleared,
                    FoundApplied,
                    FoundNotApplied,
                    LateApplied,
                    LateRefused,
                ],
            ),
            (
                Self::new(
                    "hand-overs and reboots",
                    Start::Settled,
                    Limits { reserved: 2, reboots: 1, ends: 1, ..none },
                ),
                vec![HandedOver, HandedOverRebooted, Denied, HolderCleared],
            ),
            (
                Self::new(
                    "hand-overs and removals",
                    Start::Settled,
                    Limits { reserved: 2, removals: 1, late: 1, ..none },
                ),
                vec![HandedOver, HandedOverRemoved, Denied, Confirmed, FencedRefused],
            ),
        ]
    }

    /// The space in which the defect must be detected, and the property that it violates.
    pub fn against(flaw: Flaw) -> (Self, &'static str) {
        let none = Limits::default();
        let (start, limits, property) = match flaw {
            Flaw::ForgetsNodeRecord => (
                Start::One,
                Limits { removals: 1, block_requests: 1, ..none },
                "a removed node changes nothing",
            ),
            Flaw::ForgetsBlocks => (Start::Empty, none, "a live address is its node's, or reserved for it"),
            Flaw::RepeatsBlindly => {
                (Start::Empty, Limits { lost: 1, ..none }, "no block request is served twice")
            }
            Flaw::IgnoresFences => {
                (Start::Settled, Limits { removals: 1, ..none }, "a removed node changes nothing")
            }
            Flaw::NeedsNoConfirmation | Flaw::NeedsNoCoolDown => (
                Start::Settled,
                Limits { removals: 1, pods: 1, ticks: 1, ..none },
                "a removed node's blocks are held until its pods are gone",
            ),
            Flaw::NeedsNoProof => (
                Start::Settled,
                Limits { reserved: 2, ..none },
                "a live address is its node's, or reserved for it",
            ),
            Flaw::FreesFirst => {
                (Start::Settled, Limits { pods: 1, ..none }, "a live pod's address is used in the ledger")
            }
            Flaw::MatchesByName => {
                (Start::Settled, Limits { pods: 2, ..none }, "a DEL releases nothing of other pods")
            }
            Flaw::ConfirmsFirst => (
                Start::Settled,
                Limits { removals: 1, pods: 1, ..none },
                "a confirmed removal has no pods left",
            ),
            Flaw::MatchesFencesByBoot => (
                Start::OneKernel,
                Limits { removals: 1, starts: 1, pods: 1, ..none },
                "a confirmed removal has no pods left",
            ),
            Flaw::AcceptsCopies => (
                Start::Settled,
                Limits { removals: 1, copies: 1, pods: 1, ..none },
                "no address is on two live pods",
            ),
        };
        (Self::new("against a flaw", start, limits).with(flaw), property)
    }
}
