//! Reads and changes the kernel of this node. All calls block: run them on an [`Owner`]'s thread.
//!
//! [`state`] has the types, [`desired`] computes the desired state, [`plan`] the changes; these do no I/O. [`Kernel`]
//! reads the kernel and applies the changes.
//!
//! [`Owner`]: crate::owner::Owner

pub mod desired;
pub mod endpoint;
pub mod features;
pub mod guard;
pub mod inspection;
pub mod plan;
pub mod reaper;
mod remove;
pub mod ruleset;
pub mod state;
pub mod sysctl;
pub mod tunnel;
pub mod unreachable;

pub mod apply;
pub mod foreign_state;
pub mod snapshot;

use std::collections::BTreeMap;
use std::net::IpAddr;

use polder_fastpath::Records;
use polder_netlink::nft::{Element, FilterSocket, Transaction};
use polder_netlink::route::RouteLookup;
use polder_netlink::{Error, RouteSocket};

use self::apply::Failure;
use self::plan::KernelChange;
use self::ruleset::pod_elements;
use self::sysctl::Sysctls;
use crate::local_pods::{LocalPod, LocalPods};

/// The sockets to one node's kernel.
#[derive(Debug)]
pub struct Kernel {
    routes: RouteSocket,
    filter: FilterSocket,
    sysctls: Sysctls,
    /// How the host has just forwarded flows, if the fast path is used.
    flows: Option<Records>,
}

impl Kernel {
    /// Opens sockets in the network namespace of the calling thread.
    pub fn open(sysctls: &Sysctls) -> Result<Self, Error> {
        let (routes, filter) = (RouteSocket::open()?, FilterSocket::open()?);
        Ok(Self { routes, filter, sysctls: sysctls.clone(), flows: None })
    }

    /// Opens read-only sockets: every change is refused.
    pub fn open_to_read(sysctls: &Sysctls) -> Result<Self, Error> {
        let (routes, filter) = (RouteSocket::open_to_read()?, FilterSocket::open_to_read()?);
        Ok(Self { routes, filter, sysctls: sysctls.read_only(), flows: None })
    }

    /// Every change of paths makes these records of the fast path invalid.
    pub fn forget_on_changes(&mut self, flows: Option<Records>) {
        self.flows = flows;
    }

    /// The netlink port IDs of the sockets. The kernel's notifications contain the ID of the socket that made the
    /// change.
    pub fn ports(&self) -> Result<[u32; 2], Error> {
        Ok([self.routes.port()?, self.filter.port()?])
    }

    /// The route that the host would use for each of the addresses.
    pub fn look_up(&mut self, addresses: &[IpAddr]) -> Result<Vec<(IpAddr, Option<RouteLookup>)>, Error> {
        let look_up = |address: &IpAddr| Ok((*address, self.routes.look_up(*address)?));
        addresses.iter().map(look_up).collect()
    }
}

/// Adds a pod's addresses and host ports to the packet filter, while the plugin creates its interface. Host ports of an
/// earlier pod whose elements remain are replaced.
pub fn admit_pod(filter: &mut FilterSocket, pod: &LocalPod) -> Result<(), Error> {
    match filter.commit(change(pod_elements(pod), [])) {
        Err(error) if error.is_exists() => {}
        result => return result,
    }
    for (set, element) in pod_elements(pod) {
        // Other data of the same key. The kernel finds it by the key alone.
        delete_all(filter, &[(set, element.clone())])?;
        filter.commit(change([(set, element)], []))?;
    }
    Ok(())
}

/// Deletes the addresses and host ports of pods whose interfaces are gone from the packet filter. Missing ones are
/// ignored. The kernel waits some 15 ms in each transaction that deletes, so one call takes many pods.
pub fn forget_pods(filter: &mut FilterSocket, pods: &[LocalPod]) -> Result<(), Error> {
    let elements: Vec<(&'static str, Element)> = pods.iter().flat_map(pod_elements).collect();
    delete_all(filter, &elements)
}

/// Deletes elements, each with its set. The kernel refuses the transaction if one does not exist: then each half is
/// tried, so that a few missing elements cost few transactions.
fn delete_all(filter: &mut FilterSocket, elements: &[(&'static str, Element)]) -> Result<(), Error> {
    match filter.commit(change([], elements.iter().cloned())) {
        Err(error) if error.is_missing() => {}
        result => return result,
    }
    if elements.len() < 2 {
        return Ok(());
    }
    let (first, second) = elements.split_at(elements.len() / 2);
    delete_all(filter, first)?;
    delete_all(filter, second)
}

/// Updates the sets with elements of single pods, as a pass has planned. Call it where pods are admitted and forgotten:
/// the plan may be older than the last pod. An element whose key belongs to one of `pods` is not deleted, and not
/// replaced by other data, because the kernel deletes an element of a map whatever its data are.
pub fn update_pods(filter: &mut FilterSocket, changes: Vec<KernelChange>, pods: &LocalPods) -> Vec<Failure> {
    let mut failures = Vec::new();
    let current: Vec<(&str, Element)> = pods.all().iter().flat_map(pod_elements).collect();
    for change in changes {
        let KernelChange::UpdateSet { set, add, remove } = &change else { continue };
        let current = current.iter().filter(|(name, _)| name == set);
        let of_pod: BTreeMap<&[u8], &Element> =
            current.map(|(_, element)| (element.key(), element)).collect();
        let is_free = |new: &&Element| of_pod.get(new.key()).is_none_or(|own| own == new);
        let add: Vec<&Element> = add.iter().filter(is_free).collect();
        let remove: Vec<&Element> = remove.iter().filter(|old| !of_pod.contains_key(old.key())).collect();
        if let Err(error) = update_set(filter, set, &add, &remove) {
            failures.push(Failure { change, reason: error.into(), remedy: None, follows: false });
        }
    }
    failures
}

fn update_set(
    filter: &mut FilterSocket,
    set: &'static str,
    add: &[&Element],
    remove: &[&Element],
) -> Result<(), Error> {
    let (to_add, to_remove) = (add.iter().copied(), remove.iter().copied());
    match filter.commit(ruleset::pod_sets().change(set, to_add.clone(), to_remove.clone())) {
        // A pod was released after the plan was made: its elements are gone.
        Err(error) if error.is_missing() && !remove.is_empty() => {
            filter.commit(change(to_add.map(|element| (set, element.clone())), []))?;
            let to_remove: Vec<_> = to_remove.map(|element| (set, element.clone())).collect();
            delete_all(filter, &to_remove)
        }
        outcome => outcome,
    }
}

/// The transaction that adds and removes elements of pods, each with its set.
fn change(
    add: impl IntoIterator<Item = (&'static str, Element)>,
    remove: impl IntoIterator<Item = (&'static str, Element)>,
) -> Transaction {
    let mut sets: BTreeMap<&'static str, (Vec<Element>, Vec<Element>)> = BTreeMap::new();
    for (set, element) in add {
        sets.entry(set).or_default().0.push(element);
    }
    for (set, element) in remove {
        sets.entry(set).or_default().1.push(element);
    }
    let table = ruleset::pod_sets();
    let changes = sets.iter().map(|(set, (add, remove))| table.change(set, add, remove));
    changes.fold(Transaction::default(), Transaction::and)
}

#[cfg(test)]
mod tests {
    use polder_api::{IfName, Mac};
    use polder_ipam::ids::ClusterId;
    use polder_ipam::record::ClusterRecord;
    use polder_netlink::namespace;
    use polder_netlink::nft::{Elements, TableState};

    use super::*;

    fn pod(number: u8, ports: &[&str]) -> LocalPod {
        LocalPod {
            name: IfName::try_from(format!("pld{number:012}")).unwrap(),
            mac: Mac([2, 0, 0, 0, 0, number]),
            addresses: vec![[10, 0, 0, number].into()],
            ports: ports.iter().map(|port| port.parse().unwrap()).collect(),
        }
    }

    /// The elements of these pods, by set.
    fn elements(pods: &[&LocalPod]) -> BTreeMap<&'static str, Vec<Element>> {
        let mut sets: BTreeMap<&'static str, Vec<Element>> = BTreeMap::new();
        for (set, element) in pods.iter().copied().flat_map(pod_elements) {
            sets.entry(set).or_default().push(element);
        }
        sets
    }

    /// Runs `check` with an installed packet filter, in its own network namespace. Needs root.
    fn with_filter(check: impl FnOnce(&mut FilterSocket) + Send) {
        namespace::run_in_new(|| {
            let mut filter = FilterSocket::open().unwrap();
            filter.commit(table().install(&Elements::new())).unwrap();
            check(&mut filter);
        })
        .unwrap();
    }

    fn table() -> polder_netlink::nft::Table {
        ruleset::table(&ClusterRecord::new(ClusterId::new("c")), &ruleset::lengths([]))
    }

    /// Checks that the packet filter has the elements of these pods and no others.
    fn assert_has(filter: &mut FilterSocket, pods: &[&LocalPod]) {
        let TableState::Intact(found) = filter.table_state(&table()).unwrap() else { panic!("it differs") };
        let found: BTreeMap<_, Vec<Element>> = found
            .into_iter()
            .filter(|(_, elements)| !elements.is_empty())
            .map(|(set, elements)| (set, elements.into_iter().collect()))
            .collect();
        assert_eq!(found, elements(pods));
    }

    #[test]
    fn a_pod_is_admitted_although_an_earlier_one_left_its_host_ports() {
        with_filter(|filter| {
            let (old, new) = (pod(1, &["80:80/tcp", "81:81/udp"]), pod(2, &["80:8080/tcp"]));
            admit_pod(filter, &old).unwrap();
            admit_pod(filter, &old).unwrap();
            assert_has(filter, &[&old]);
            admit_pod(filter, &new).unwrap();
            forget_pods(filter, &[pod(1, &["81:81/udp"]), pod(3, &["9:9/tcp"])]).unwrap();
            assert_has(filter, &[&new]);
            forget_pods(filter, &[new]).unwrap();
            assert_has(filter, &[]);
        });
    }

    #[test]
    fn a_plan_that_is_older_than_a_release_adds_and_removes_the_rest() {
        with_filter(|filter| {
            let [released, unwanted, new] = [1, 2, 3].map(|number| pod(number, &[]));
            admit_pod(filter, &unwanted).unwrap();
            let of = |pods: &[&LocalPod]| elements(pods)["senders4"].clone();
            let change = KernelChange::UpdateSet {
                set: "senders4",
                add: of(&[&new]),
                remove: of(&[&released, &unwanted]),
            };
            let failures = update_pods(filter, vec![change], &LocalPods::default());
            assert!(failures.is_empty(), "{failures:?}");
            assert_has(filter, &[&new]);
        });
    }

    #[test]
    fn a_plan_that_is_older_than_a_pod_does_not_take_its_host_port() {
        with_filter(|filter| {
            let (old, new) = (pod(1, &["80:80/tcp"]), pod(2, &["80:80/tcp"]));
            let pods = LocalPods::default();
            pods.add(new.clone());
            admit_pod(filter, &new).unwrap();
            let change = |add: &LocalPod, remove: &LocalPod| {
                let of = |pod: &LocalPod| elements(&[pod])["ports4"].clone();
                vec![KernelChange::UpdateSet { set: "ports4", add: of(add), remove: of(remove) }]
            };
            // The plan saw the port of a pod that is gone, or does not know the pod that has it now.
            let nobody = pod(3, &["82:82/tcp"]);
            admit_pod(filter, &nobody).unwrap();
            assert!(update_pods(filter, change(&nobody, &old), &pods).is_empty());
            assert!(update_pods(filter, change(&old, &nobody), &pods).is_empty());
            forget_pods(filter, &[nobody]).unwrap();
            assert_has(filter, &[&new]);
        });
    }
}
