//! Deliberate defects. Each violates one rule, and one test must fail with it: `docs/mutants.md` lists the tests, and
//! `scripts/test` runs them.
//!
//! The defects exist only in test builds with the feature `mutants`; a release build refuses it. The environment
//! variable `POLDER_MUTANT` selects the active defect by name.

#[cfg(all(feature = "mutants", not(debug_assertions)))]
compile_error!("deliberate defects are only for tests: build without the feature `mutants`");

macro_rules! mutants {
    ($($(#[doc = $words:literal])+ $name:ident,)+) => {
        /// A defect.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Mutant { $($(#[doc = $words])+ $name,)+ }

        impl Mutant {
            /// All defects, in the order of the table in `docs/mutants.md`.
            pub const ALL: &[Self] = &[$(Self::$name,)+];
        }
    };
}

mutants! {
    /// A claim does not require the node's record to be unchanged.
    ClaimIgnoresNode,
    /// A claim does not require the pool's record to be unchanged.
    ClaimIgnoresPool,
    /// A claim does not check whether the block is claimed.
    ClaimIgnoresClaims,
    /// A claim does not check whether a larger block that contains it is claimed.
    ClaimIgnoresLargerClaims,
    /// The removal of a pool does not check whether its blocks are claimed.
    RemovalIgnoresClaims,
    /// A drained pool allocates addresses to new pods.
    DrainedPoolGives,
    /// A change with an unknown outcome is reported to the operator as made.
    NoAnswerIsYes,
    /// A claim with an unknown outcome is treated as made, even if the record has another value.
    ClaimIsPresumed,
    /// Writes of a node other than claims do not require its record to be unchanged.
    WriteIgnoresNode,
    /// A node does not check whether it was removed.
    FenceIsIgnored,
    /// A machine without a ledger treats a fence with its name and boot id as its own, and confirms the removal.
    FenceMatchedByBootId,
    /// A machine takes over a node with only its ledger as proof, which may be a copy.
    CopyIsAccepted,
    /// A removed node's blocks are released although its pods are not confirmed to be gone.
    UnconfirmedCountsAsGone,
    /// A removed node's blocks are released without cool-down.
    RemovedBlocksSkipCoolDown,
    /// A block is released although addresses of it are used.
    UsedBlockIsSpare,
    /// A claim that the datastore has lost is not restored.
    LostClaimStaysLost,
    /// Blocks are claimed while the owners of lost records restore them.
    NoCaution,
    /// Addresses of a block that the ledger has lost are allocated without cool-down.
    AdoptedBlockDoesNotRest,
    /// A machine with an old copy of a ledger allocates, without cool-down, addresses that the earlier machine may have
    /// used.
    OldCopyDoesNotRest,
    /// A node's gateway addresses are not marked as used when its ledger is opened.
    GatewayIsForgotten,
    /// An address in cool-down counts as free.
    RestIsSkipped,
    /// Cool-downs are forgotten when the ledger is opened.
    RestIsForgotten,
    /// A reserved address is handed over without proof that its holder is gone.
    NoProof,
    /// Attachments of another boot count as existing.
    BootIsIgnored,
    /// Addresses are released before the interface is deleted.
    FreedFirst,
    /// A DEL fails if the ADD of its attachment hangs.
    DelGivesUp,
    /// An attachment is released after its interface was missing once.
    MissedOnce,
    /// A release deletes all attachments of the pod.
    ReleaseByPod,
    /// A GC deletes attachments that were added after it began.
    YoungIsStale,
    /// A GC without a list of valid attachments deletes all attachments.
    NoListIsEmptyList,
    /// A watch continues on a datastore that was emptied or restored to an earlier state.
    WitnessIsIgnored,
    /// A watch that did not report a deletion is trusted.
    WatchIsBelieved,
    /// A node takes over its record from another boot without checking whether that boot is still alive.
    NameConflictIsIgnored,
    /// A node treats its record as its own even if it is from another boot or machine.
    AnyBootIsOwn,
    /// The key `alive/NODE` is written even if the node's record has changed.
    LeaseIgnoresNode,
}

/// Whether that defect is active.
#[cfg(feature = "mutants")]
pub fn is(mutant: Mutant) -> bool {
    static ACTIVE: std::sync::LazyLock<Option<Mutant>> = std::sync::LazyLock::new(|| {
        let name = std::env::var("POLDER_MUTANT").ok()?;
        let found = Mutant::ALL.iter().copied().find(|mutant| format!("{mutant:?}") == name);
        Some(found.unwrap_or_else(|| panic!("unknown mutant {name}")))
    });
    *ACTIVE == Some(mutant)
}

/// Whether that defect is active: never in this build.
#[cfg(not(feature = "mutants"))]
pub const fn is(_: Mutant) -> bool {
    false
}

/// A rule that a deliberate defect can violate. In test builds the last expression replaces the body of the rule while
/// that defect is active.
#[macro_export]
macro_rules! rule {
    (
        $(#[$about:meta])*
        $visibility:vis fn $name:ident $(<$life:lifetime>)? ($($argument:ident: $type:ty),* $(,)?) -> $result:ty $body:block
        $defect:ident => $broken:expr
    ) => {
        $(#[$about])*
        $visibility fn $name $(<$life>)? ($($argument: $type),*) -> $result {
            if $crate::mutant::is($crate::mutant::Mutant::$defect) {
                return $broken;
            }
            $body
        }
    };
}

/// The condition of a rule; `None` if that defect is active.
pub fn unless<T>(defect: Mutant, demand: T) -> Option<T> {
    (!is(defect)).then_some(demand)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_has_a_row_for_each_defect() {
        let table = include_str!("../../docs/mutants.md");
        let rows = table.lines().filter_map(|line| line.strip_prefix("| `")?.split_once('`'));
        let rows: Vec<&str> = rows.map(|(name, _)| name).collect();
        let all: Vec<String> = Mutant::ALL.iter().map(|mutant| format!("{mutant:?}")).collect();
        assert_eq!(rows, all);
    }
}
