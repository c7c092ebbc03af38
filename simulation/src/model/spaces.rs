//! The explored spaces: each is small enough to be explored completely. Together they cover all known risks.

use super::limits::Limits;
use super::start::Start;
use super::tally::Happening::{
    self, Adopted, Beaten, Claimed, Confirmed, Conflict, Denied, FencedRefused, FoundMade, FoundUnmade,
    GivenBack, HandedOver, HandedOverRebooted, HandedOverRemoved, Inherited, LateApplied, LateRefused, LetGo,
    Registered, TakenOver,
};
use super::{Flaw, Space};

impl Space {
    /// All spaces, each with the events that must have occurred in it.
    #[expect(clippy::too_many_lines, reason = "a list, one entry for each space")]
    pub fn all() -> Vec<(Self, Vec<Happening>)> {
        let none = Limits::default();
        vec![
            (
                Self::new("first claims", Start::Empty, Limits { lost: 1, ..none }),
                vec![Claimed, Beaten, FoundMade, FoundUnmade],
            ),
            (
                Self::new(
                    "claims and crashes",
                    Start::One,
                    Limits { pods: 1, crashes: 1, lost: 1, late: 1, ..none },
                ),
                vec![Claimed, TakenOver, LateApplied, LateRefused, FoundMade, FoundUnmade],
            ),
            (
                Self::new(
                    "claims in doubt",
                    Start::One,
                    Limits { pods: 1, lost: 1, late: 1, in_vain: 1, impatience: 1, ..none },
                ),
                vec![Claimed, Beaten, TakenOver, LateApplied, FoundMade, FoundUnmade],
            ),
            (
                Self::new(
                    "spare blocks",
                    Start::One,
                    Limits { appetite: 1, spares: 1, pods: 1, late: 1, ..none },
                ),
                vec![Claimed, Beaten, GivenBack],
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
                vec![Confirmed, Inherited, FencedRefused],
            ),
            (
                Self::new(
                    "two removals",
                    Start::Settled,
                    Limits { removals: 2, deaths: 1, ticks: 1, ..none },
                ),
                vec![Confirmed, Inherited, FencedRefused],
            ),
            (
                Self::new(
                    "a name again",
                    Start::Settled,
                    Limits { removals: 1, newcomers: 1, ticks: 1, ..none },
                ),
                vec![Conflict, Registered, Confirmed, Inherited, Claimed],
            ),
            (
                Self::new(
                    "a machine again",
                    Start::Settled,
                    Limits { removals: 1, rejoins: 1, ticks: 1, pods: 1, ..none },
                ),
                vec![Confirmed, Inherited, Claimed],
            ),
            (
                Self::new(
                    "a name again on one kernel",
                    Start::OneKernel,
                    Limits { removals: 1, newcomers: 1, pods: 1, ..none },
                ),
                vec![Conflict, Registered, Confirmed],
            ),
            (
                Self::new(
                    "restarts on one kernel",
                    Start::OneKernel,
                    Limits { removals: 1, reboots: 1, pods: 1, ticks: 1, ..none },
                ),
                vec![Confirmed, Inherited],
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
                vec![HandedOver, Denied, LetGo, FoundMade, FoundUnmade, LateApplied, LateRefused],
            ),
            (
                Self::new(
                    "hand-overs that are given up",
                    Start::Settled,
                    Limits { reserved: 2, impatience: 1, lost: 1, ..none },
                ),
                vec![HandedOver, Denied, LetGo, FoundMade, FoundUnmade],
            ),
            (
                Self::new("late hand-overs", Start::Settled, Limits { reserved: 3, late: 1, ..none }),
                vec![HandedOver, Denied, LetGo, FoundMade, FoundUnmade, LateApplied, LateRefused],
            ),
            (
                Self::new(
                    "hand-overs and reboots",
                    Start::Settled,
                    Limits { reserved: 2, reboots: 1, ends: 1, ..none },
                ),
                vec![HandedOver, HandedOverRebooted, Denied, LetGo],
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
            Flaw::ForgetsNodeRecord => {
                (Start::One, Limits { removals: 1, appetite: 1, ..none }, "a removed node changes nothing")
            }
            Flaw::ForgetsBlocks => (Start::Empty, none, "a live address is its node's, or reserved for it"),
            Flaw::RepeatsBlindly => (Start::Empty, Limits { lost: 1, ..none }, "no wish is granted twice"),
            Flaw::IgnoresFences => {
                (Start::Settled, Limits { removals: 1, ..none }, "a removed node changes nothing")
            }
            Flaw::NeedsNoConfirmation | Flaw::NeedsNoRest => (
                Start::Settled,
                Limits { removals: 1, pods: 1, ticks: 1, ..none },
                "a removed node's blocks rest until its pods are gone",
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
                (Start::Settled, Limits { pods: 2, ..none }, "a DEL frees nothing of another")
            }
            Flaw::ConfirmsFirst => {
                (Start::Settled, Limits { removals: 1, pods: 1, ..none }, "what is said to be gone is gone")
            }
            Flaw::MatchesFencesByBoot => (
                Start::OneKernel,
                Limits { removals: 1, newcomers: 1, pods: 1, ..none },
                "what is said to be gone is gone",
            ),
            Flaw::BelievesCopies => (
                Start::Settled,
                Limits { removals: 1, copies: 1, pods: 1, ..none },
                "no address is on two live pods",
            ),
        };
        (Self::new("against a flaw", start, limits).with(flaw), property)
    }
}
