//! The owner of each address as known by the test, independent of Polder.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Shortest cool-down of a released address.
const COOL_DOWN: Duration = Duration::from_secs(10);

/// A pod on a node.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Holder {
    /// Name of the node.
    pub node: String,
    /// Container ID.
    pub container: String,
}

/// The owner of each address, and the detected errors. A pod owns an address from the return of its ADD until just
/// before its end begins.
#[derive(Debug, Default)]
pub struct Truth(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    boots: BTreeMap<String, u64>,
    live: BTreeMap<IpAddr, Holder>,
    freed: BTreeMap<IpAddr, (Holder, Instant)>,
    wrong: Vec<String>,
}

impl Truth {
    fn state(&self) -> MutexGuard<'_, State> {
        // A panic elsewhere leaves the state consistent.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// To be called before the node is powered off: its pods end, and results of earlier ADDs become void. Returns the
    /// number of the next boot.
    pub fn boots(&self, node: &str) -> u64 {
        let mut state = self.state();
        state.live.retain(|_, holder| holder.node != node);
        state.freed.retain(|_, (holder, _)| holder.node != node);
        let boot = state.boots.entry(node.to_owned()).or_default();
        *boot += 1;
        *boot
    }

    /// Records the addresses returned by an ADD of that boot. Returns false if that boot has ended.
    pub fn record_add(&self, holder: &Holder, boot: u64, addresses: &[IpAddr]) -> bool {
        let mut state = self.state();
        if state.boots.get(&holder.node).copied().unwrap_or_default() != boot {
            return false;
        }
        for address in addresses {
            if let Some(other) = state.live.insert(*address, holder.clone()) {
                state.wrong.push(format!("{address} was given to {holder:?}, and {other:?} has it"));
            }
            if let Some((before, freed)) = state.freed.remove(address) {
                let rested = freed.elapsed();
                // A pod that is added again before its release is complete gets its own addresses.
                if rested < COOL_DOWN && before != *holder {
                    state.wrong.push(format!("{address} of {before:?} went to {holder:?} after {rested:?}"));
                }
            }
        }
        true
    }

    /// To be called before the end of the pod begins.
    pub fn record_end(&self, holder: &Holder) {
        let mut state = self.state();
        let (gone, live) =
            std::mem::take(&mut state.live).into_iter().partition(|(_, owner)| owner == holder);
        state.live = live;
        let gone: BTreeMap<IpAddr, Holder> = gone;
        let now = Instant::now();
        state.freed.extend(gone.into_iter().map(|(address, holder)| (address, (holder, now))));
    }

    /// Records an error.
    pub fn record_error(&self, what: String) {
        self.state().wrong.push(what);
    }

    /// The detected errors.
    pub fn wrong(&self) -> Vec<String> {
        self.state().wrong.clone()
    }

    /// Whether an error was detected: then the run can stop.
    pub fn is_known_to_be_wrong(&self) -> bool {
        !self.state().wrong.is_empty()
    }

    /// The owner of each address.
    pub fn live(&self) -> BTreeMap<IpAddr, Holder> {
        self.state().live.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn holder(node: &str, container: &str) -> Holder {
        Holder { node: node.to_owned(), container: container.to_owned() }
    }

    fn address(last: u8) -> IpAddr {
        IpAddr::from([10, 0, 0, last])
    }

    #[test]
    fn an_address_of_two_pods_is_detected() {
        let truth = Truth::default();
        assert!(truth.record_add(&holder("n1", "a"), 0, &[address(1)]));
        assert!(truth.record_add(&holder("n1", "b"), 0, &[address(2)]));
        assert!(truth.wrong().is_empty());
        truth.record_add(&holder("n2", "c"), 0, &[address(2)]);
        assert_eq!(truth.wrong().len(), 1);
    }

    #[test]
    fn reuse_without_cool_down_is_detected_except_by_the_same_pod() {
        let truth = Truth::default();
        truth.record_add(&holder("n1", "a"), 0, &[address(1)]);
        truth.record_end(&holder("n1", "a"));
        truth.record_add(&holder("n1", "a"), 0, &[address(1)]);
        assert!(truth.wrong().is_empty());
        truth.record_end(&holder("n1", "a"));
        truth.record_add(&holder("n1", "b"), 0, &[address(1)]);
        assert_eq!(truth.wrong().len(), 1);
    }

    #[test]
    fn a_reboot_ends_all_pods_and_adds_in_progress() {
        let truth = Truth::default();
        truth.record_add(&holder("n1", "a"), 0, &[address(1)]);
        truth.record_add(&holder("n2", "b"), 0, &[address(2)]);
        assert_eq!(truth.boots("n1"), 1);
        assert!(!truth.record_add(&holder("n1", "late"), 0, &[address(3)]));
        assert_eq!(truth.live().into_keys().collect::<Vec<_>>(), [address(2)]);
        assert!(truth.record_add(&holder("n1", "c"), 1, &[address(1)]));
        assert!(truth.wrong().is_empty());
    }
}
