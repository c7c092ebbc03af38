//! Changes of Polder's kernel state by other programs: noticed at once, repaired within a second, and recorded.

use std::collections::{BTreeSet, VecDeque};
use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use polder_api::{Family, IfName};
use polder_netlink::nft::Element;
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::kernel::plan::KernelChange;
use crate::kernel::ruleset::pod_elements;
use crate::kernel::state::Device;
use crate::local_pods::LocalPod;

/// Shortest time between two repairs.
const SHORTEST_GAP: Duration = Duration::from_millis(150);

/// Longest time between two repairs; the time grows to it while another program keeps changing state.
const LONGEST_GAP: Duration = Duration::from_millis(700);

/// Time without a change after which the other program counts as stopped.
const CALM: Duration = Duration::from_secs(10);

/// Maximum number of repairs that are kept.
const REMEMBERED: usize = 16;

/// Maximum number of changes that are kept per repair.
const NAMED: usize = 8;

/// Wakes the engine when another program changed Polder's kernel state.
#[derive(Debug, Default)]
pub struct DriftSignal {
    notify: Notify,
    by: Mutex<BTreeSet<String>>,
}

impl DriftSignal {
    /// Wakes the engine; `by` names the process, if the kernel reports it.
    pub fn wake(&self, by: Option<String>) {
        self.processes().extend(by);
        self.notify.notify_one();
    }

    /// Waits until it is woken.
    pub async fn woken(&self) {
        self.notify.notified().await;
    }

    /// The processes recorded since the last call.
    pub fn take(&self) -> Vec<String> {
        std::mem::take(&mut *self.processes()).into_iter().collect()
    }

    fn processes(&self) -> std::sync::MutexGuard<'_, BTreeSet<String>> {
        // A panic elsewhere leaves the set of names consistent.
        self.by.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Text for a process: its id, and its name if known.
pub fn process(id: u32, name: Option<&str>) -> String {
    let comm = || std::fs::read_to_string(format!("/proc/{id}/comm")).ok();
    match name.map(str::to_owned).or_else(comm) {
        Some(name) => format!("process {id} ({})", name.trim()),
        None => format!("process {id} (ended)"),
    }
}

/// The changes that repair what another program changed: all but those of pods whose ADD or DEL may be in progress, for
/// the kernel state of those may be incomplete.
pub fn foreign_repairs(changes: &[KernelChange], changing: &[LocalPod]) -> Vec<KernelChange> {
    let has_name = |name: &IfName| changing.iter().any(|pod| pod.name == *name);
    let has_address = |address: &IpAddr| changing.iter().any(|pod| pod.addresses.contains(address));
    let elements: BTreeSet<Element> =
        changing.iter().flat_map(pod_elements).map(|(_, element)| element).collect();
    let without = |all: &[Element]| -> Vec<Element> {
        all.iter().filter(|element| !elements.contains(element)).cloned().collect()
    };
    let repair = |change: &KernelChange| {
        let is_of_pod = match change {
            KernelChange::SetPod(name, _)
            | KernelChange::DeletePod(name, _)
            | KernelChange::SetFdbEntry(Device::Pod(name), ..)
            | KernelChange::DeleteFdbEntry(Device::Pod(name), ..) => has_name(name),
            KernelChange::SetNeighbour(_, address, _) | KernelChange::DeleteNeighbour(_, address, _) => {
                has_address(address)
            }
            KernelChange::SetRoute(destination, _) | KernelChange::DeleteRoute(destination) => {
                let is_host = destination.prefix() == Family::of(destination.ip()).bits();
                is_host && has_address(&destination.ip())
            }
            KernelChange::UpdateSet { set, add, remove } => {
                let (add, remove) = (without(add), without(remove));
                let is_empty = add.is_empty() && remove.is_empty();
                return (!is_empty).then_some(KernelChange::UpdateSet { set, add, remove });
            }
            _ => false,
        };
        (!is_of_pod).then(|| change.clone())
    };
    changes.iter().filter_map(repair).collect()
}

/// A repair of kernel state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Repair {
    /// Time of the repair.
    pub at: SystemTime,
    /// Its first changes, at most eight.
    pub changes: Vec<String>,
    /// Number of further changes.
    pub more: usize,
    /// The processes that caused it, if the kernel reports them.
    pub by: Vec<String>,
}

/// The last repairs and the total number.
#[derive(Debug, Clone, Default)]
pub struct RepairLog {
    /// The last repairs, oldest first.
    pub last: VecDeque<Repair>,
    /// Number of repairs since the agent started.
    pub count: u64,
}

impl RepairLog {
    /// Adds a repair.
    pub fn add(&mut self, changes: &[String], by: Vec<String>) {
        let named = changes.iter().take(NAMED).cloned().collect();
        let more = changes.len().saturating_sub(NAMED);
        self.last.push_back(Repair { at: SystemTime::now(), changes: named, more, by });
        if self.last.len() > REMEMBERED {
            self.last.pop_front();
        }
        self.count += 1;
    }
}

/// Limits the rate of repairs, so that a program that keeps changing state does not use up the node's CPU time.
#[derive(Debug, Default)]
pub struct Pace {
    last: Option<Instant>,
    gap: Duration,
}

impl Pace {
    /// Earliest time of the next repair.
    pub fn next(&self, now: Instant) -> Instant {
        self.last.map_or(now, |last| (last + self.gap).max(now))
    }

    /// Records a complete check, and whether something was repaired.
    pub fn note(&mut self, now: Instant, repaired: bool) {
        let calm = self.last.is_none_or(|last| now.duration_since(last) > CALM);
        self.gap = match (calm, repaired) {
            (true, _) => SHORTEST_GAP,
            (false, true) => (self.gap * 2).min(LONGEST_GAP),
            (false, false) => self.gap.max(SHORTEST_GAP),
        };
        self.last = Some(now);
    }
}

#[cfg(test)]
mod tests {
    use polder_api::Mac;
    use polder_netlink::IfIndex;
    use polder_netlink::neighbour::Destination;

    use super::*;

    #[test]
    fn changes_of_pods_that_are_being_added_or_deleted_are_no_foreign_repairs() {
        let mac = Mac([2, 0, 0, 0, 0, 1]);
        let [changing, other] = ["10.0.0.1", "10.0.0.2"].map(|address| {
            let address: IpAddr = address.parse().unwrap();
            let name: IfName = format!("pld{}", address.to_string().replace('.', "")).parse().unwrap();
            LocalPod { name, mac, addresses: vec![address], ports: Vec::new() }
        });
        let of = |pod: &LocalPod| {
            let (name, address) = (pod.name.clone(), pod.addresses[0]);
            vec![
                KernelChange::SetPod(name.clone(), None),
                KernelChange::DeletePod(name.clone(), IfIndex::new(7)),
                KernelChange::SetFdbEntry(Device::Pod(name.clone()), mac, Destination::Port),
                KernelChange::DeleteFdbEntry(Device::Pod(name), mac, Destination::Port),
                KernelChange::SetNeighbour(Device::Bridge, address, mac),
                KernelChange::DeleteNeighbour(Device::Bridge, address, mac),
                KernelChange::DeleteRoute(address.into()),
            ]
        };
        let element = |pod: &LocalPod| pod_elements(pod).next().unwrap().1;
        let set = |add: Vec<Element>| KernelChange::UpdateSet { set: "senders4", add, remove: Vec::new() };
        let block = KernelChange::DeleteRoute("10.0.0.0/26".parse().unwrap());
        let mut expected = of(&other);
        expected.extend([set(vec![element(&other)]), block.clone()]);
        let mut all = [of(&changing), of(&other)].concat();
        all.extend([set(vec![element(&changing), element(&other)]), set(vec![element(&changing)]), block]);
        assert_eq!(foreign_repairs(&all, &[changing]), expected);
    }

    #[test]
    fn the_first_repair_is_immediate_and_repeated_ones_are_slower_but_within_a_second() {
        let mut pace = Pace::default();
        let start = Instant::now();
        assert_eq!(pace.next(start), start);
        let mut now = start;
        let mut gaps = Vec::new();
        for _ in 0..5 {
            pace.note(now, true);
            let next = pace.next(now);
            gaps.push((next - now).as_millis());
            now = next;
        }
        assert_eq!(gaps, [150, 300, 600, 700, 700]);
        now += CALM * 2;
        assert_eq!(pace.next(now), now);
        pace.note(now, true);
        assert_eq!(pace.next(now) - now, SHORTEST_GAP, "it was calm in between");
    }

    #[test]
    fn checks_without_a_difference_do_not_delay_the_next_repair() {
        let mut pace = Pace::default();
        let mut now = Instant::now();
        for _ in 0..20 {
            pace.note(now, false);
            assert_eq!(pace.next(now) - now, SHORTEST_GAP);
            now = pace.next(now);
        }
    }

    #[test]
    fn only_the_last_repairs_are_kept_and_all_are_counted() {
        let mut repairs = RepairLog::default();
        let changes: Vec<String> = (0..NAMED + 2).map(|number| number.to_string()).collect();
        (0..REMEMBERED + 3).for_each(|_| repairs.add(&changes, Vec::new()));
        assert_eq!((repairs.last.len(), repairs.count), (REMEMBERED, REMEMBERED as u64 + 3));
        assert_eq!((repairs.last[0].changes.len(), repairs.last[0].more), (NAMED, 2));
    }
}
