//! Deliberate defects. Each breaks one promise, and for each there is a test that must fail under it: `docs/mutants.md`
//! says which, and `scripts/test` sees to it.
//!
//! They are there only in builds for tests: the feature `mutants`, which a release build refuses. There the environment
//! variable `POLDER_MUTANT` names the one that is at work.

#[cfg(all(feature = "mutants", not(debug_assertions)))]
compile_error!("deliberate defects are only for tests: build without the feature `mutants`");

macro_rules! mutants {
    ($($(#[doc = $words:literal])+ $name:ident,)+) => {
        /// A defect.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Mutant { $($(#[doc = $words])+ $name,)+ }

        impl Mutant {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$name,)+];
        }
    };
}

mutants! {
    /// A claim does not rest on the node's record.
    ClaimIgnoresNode,
    /// A claim does not rest on the pool's record.
    ClaimIgnoresPool,
    /// A claim does not ask whether the block is claimed.
    ClaimIgnoresClaims,
    /// A claim does not ask whether a larger block around it is claimed.
    ClaimIgnoresLargerClaims,
    /// The removal of a pool does not ask whether blocks of it are claimed.
    RemovalIgnoresClaims,
    /// A pool that is drained gives addresses to new pods.
    DrainedPoolGives,
    /// A change whose outcome is not known is made, to the operator.
    NoAnswerIsYes,
    /// A claim whose outcome is not known is taken for made, whatever stands behind the key.
    ClaimIsPresumed,
    /// What a node writes, besides claims, does not rest on its record.
    WriteIgnoresNode,
    /// A node does not look whether it was removed.
    FenceIsIgnored,
    /// A machine without a ledger takes a fence of its name and boot for its own, and confirms.
    FenceMatchedByBootId,
    /// A machine takes a node over by its ledger alone, which may be a copy.
    CopyIsBelieved,
    /// A removed node's blocks are given back although nobody has said that its pods are gone.
    SilenceConfirms,
    /// A removed node's blocks do not rest.
    RemovedBlocksDoNotRest,
    /// A block is given back although addresses of it are used.
    UsedBlockIsSpare,
    /// A claim that the store has lost is not put back.
    LostClaimStaysLost,
    /// Blocks are claimed while the owners of lost records put them back.
    NoCaution,
    /// A block that the ledger has lost is handed out at once.
    AdoptedBlockDoesNotRest,
    /// A machine with an old copy of a ledger hands out at once what the machine before it may have had.
    OldCopyDoesNotRest,
    /// A node's address of its own is forgotten when its ledger is opened.
    GatewayIsForgotten,
    /// A resting address counts as free.
    RestIsSkipped,
    /// What rests is forgotten when the ledger is opened.
    RestIsForgotten,
    /// A reserved address is handed over without proof that its holder is gone.
    NoProof,
    /// What was attached in another boot counts as attached.
    BootIsIgnored,
    /// Addresses are freed before the interface is gone.
    FreedFirst,
    /// A DEL gives up on an ADD that hangs.
    DelGivesUp,
    /// What misses its interface once is released.
    MissedOnce,
    /// A release takes away all attachments of the pod.
    ReleaseByPod,
    /// A GC takes away what was added since it began.
    YoungIsStale,
    /// A GC without a list of what is valid takes everything away.
    NoListIsEmptyList,
    /// Following goes on in a store that is another one, or was set back.
    WitnessIsIgnored,
    /// A watch that has not told of everything is believed.
    WatchIsBelieved,
    /// A node takes a record over from another boot without looking whether that lives.
    DoubleIsIgnored,
    /// A node's own record counts in whichever boot of it, and on whichever machine.
    AnyBootIsOwn,
    /// The sign of life is put whether or not the node's record is as it was.
    SignIgnoresNode,
}

/// Whether that defect is at work.
#[cfg(feature = "mutants")]
pub fn is(mutant: Mutant) -> bool {
    static AT_WORK: std::sync::LazyLock<Option<Mutant>> = std::sync::LazyLock::new(|| {
        let name = std::env::var("POLDER_MUTANT").ok()?;
        let found = Mutant::ALL.iter().copied().find(|mutant| format!("{mutant:?}") == name);
        Some(found.unwrap_or_else(|| panic!("unknown mutant {name}")))
    });
    *AT_WORK == Some(mutant)
}

/// Whether that defect is at work: in this build, none is.
#[cfg(not(feature = "mutants"))]
pub const fn is(_: Mutant) -> bool {
    false
}

/// A rule that a deliberate defect can break. In builds for tests, and only there, the last expression takes the place of the rule's
/// body while that defect is at work.
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

/// What a rule demands, unless that defect leaves it out.
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
