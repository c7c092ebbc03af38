//! Decides which BPF program runs on which interface. No I/O.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;

use polder_fastpath::Program;
use polder_netlink::IfIndex;
use polder_netlink::program::{Attached, Direction};

use crate::local_pods::LocalPod;

/// Where a program runs.
pub(super) type Place = (IfIndex, Direction);

/// The beginning of the names of Polder's programs, by which they are recognised.
const PREFIX: &str = "polder_";

/// What exists in the kernel.
#[derive(Debug, Default)]
pub(super) struct Survey {
    /// The pods with the indexes of their interfaces on the host.
    pub(super) pods: Vec<(LocalPod, IfIndex)>,
    /// Interfaces with a queueing discipline, for example that of a bandwidth limit. The fast path to a pod would bypass
    /// it.
    pub(super) queued: BTreeSet<IfIndex>,
    /// The tunnels, and the uplinks with a direct path to a peer.
    pub(super) transit: BTreeSet<IfIndex>,
    /// What runs at Polder's place for programs.
    pub(super) attached: BTreeMap<Place, Attached>,
    /// The interfaces of pods, by address, that the programs know.
    pub(super) known: BTreeMap<IpAddr, IfIndex>,
}

/// A change that leads to the desired programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Change {
    /// Attaches a program, in place of an older one.
    Attach(IfIndex, Program),
    /// Removes a program.
    Detach(Place),
    /// Tells the programs the interface of the pod with that address.
    SetPod(IpAddr, IfIndex),
    /// Removes a pod from what the programs know.
    RemovePod(IpAddr),
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Attach(index, program) => write!(f, "attach {} to interface {index}", program.name()),
            Self::Detach((index, direction)) => {
                write!(f, "detach {direction:?} program of interface {index}")
            }
            Self::SetPod(address, index) => write!(f, "set interface of {address} to {index}"),
            Self::RemovePod(address) => write!(f, "remove {address}"),
        }
    }
}

/// The name under which a program is attached.
pub(super) fn attached_name(program: Program) -> String {
    format!("{PREFIX}{}", program.name())
}

/// The direction in which the packets of the program pass its interface.
pub(super) const fn direction(program: Program) -> Direction {
    match program {
        Program::FromPod | Program::FromNode => Direction::Ingress,
        Program::ToPod | Program::ToNode => Direction::Egress,
    }
}

impl Survey {
    /// The programs that should run.
    fn wanted(&self) -> BTreeMap<Place, Program> {
        let from_pods = self.pods.iter().map(|(_, index)| (*index, Program::FromPod));
        let is_free = |index: &IfIndex| !self.queued.contains(index);
        let to_pods = self.pods.iter().map(|(_, index)| *index).filter(is_free);
        let to_pods = to_pods.map(|index| (index, Program::ToPod));
        let transit = self
            .transit
            .iter()
            .flat_map(|index| [Program::FromNode, Program::ToNode].map(|end| (*index, end)));
        let all = from_pods.chain(to_pods).chain(transit);
        all.map(|(index, program)| ((index, direction(program)), program)).collect()
    }

    /// The changes that lead to the desired programs; `id` is the kernel's number of each.
    ///
    /// A program of others at Polder's place is not replaced.
    pub(super) fn changes(&self, id: impl Fn(Program) -> u32) -> Vec<Change> {
        let wanted = self.wanted();
        let is_own = |attached: &Attached| attached.name.starts_with(PREFIX);
        let addresses: BTreeMap<IpAddr, IfIndex> = self
            .pods
            .iter()
            .flat_map(|(pod, index)| pod.addresses.iter().map(|found| (*found, *index)))
            .collect();
        let set = addresses.iter().filter(|(address, index)| self.known.get(address) != Some(index));
        let removed = self.known.keys().filter(|address| !addresses.contains_key(address));
        let attach = wanted.iter().filter(|(place, program)| match self.attached.get(place) {
            Some(attached) => is_own(attached) && attached.program != id(**program),
            None => true,
        });
        let detach =
            self.attached.iter().filter(|(place, attached)| is_own(attached) && !wanted.contains_key(place));
        // The addresses first: without them, no program records the flows of a pod.
        set.map(|(address, index)| Change::SetPod(*address, *index))
            .chain(removed.map(|address| Change::RemovePod(*address)))
            .chain(attach.map(|((index, _), program)| Change::Attach(*index, *program)))
            .chain(detach.map(|(place, _)| Change::Detach(*place)))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use polder_api::Mac;

    use super::*;

    const POD: IfIndex = IfIndex::new(11);
    const LIMITED: IfIndex = IfIndex::new(12);
    const UPLINK: IfIndex = IfIndex::new(2);

    fn pod(number: u8) -> LocalPod {
        LocalPod {
            name: format!("pld{number}").parse().unwrap(),
            mac: Mac([2, 0, 0, 0, 0, number]),
            addresses: vec![[10, 0, 0, number].into()],
            ports: Vec::new(),
        }
    }

    fn id(program: Program) -> u32 {
        100 + program as u32
    }

    /// Two pods, one of them with a bandwidth limit, and an uplink.
    fn survey() -> Survey {
        Survey {
            pods: vec![(pod(1), POD), (pod(2), LIMITED)],
            queued: [LIMITED, UPLINK].into(),
            transit: [UPLINK].into(),
            ..Survey::default()
        }
    }

    /// What exists after the changes of the survey.
    fn carried_out(mut survey: Survey) -> Survey {
        for change in survey.changes(id) {
            match change {
                Change::Attach(index, program) => {
                    let attached = Attached { program: id(program), name: attached_name(program) };
                    survey.attached.insert((index, direction(program)), attached);
                }
                Change::Detach(place) => drop(survey.attached.remove(&place)),
                Change::SetPod(address, index) => drop(survey.known.insert(address, index)),
                Change::RemovePod(address) => drop(survey.known.remove(&address)),
            }
        }
        survey
    }

    #[test]
    fn a_second_comparison_finds_no_change() {
        let survey = carried_out(survey());
        assert_eq!(survey.changes(id), []);
        assert_eq!(survey.attached.len(), 5);
        assert_eq!(survey.known, [([10, 0, 0, 1].into(), POD), ([10, 0, 0, 2].into(), LIMITED)].into());
    }

    #[test]
    fn packets_to_a_pod_with_a_queue_stay_on_the_normal_path() {
        let survey = carried_out(survey());
        assert!(survey.attached.contains_key(&(POD, Direction::Egress)));
        assert!(!survey.attached.contains_key(&(LIMITED, Direction::Egress)), "its queue would be bypassed");
        assert!(survey.attached.contains_key(&(LIMITED, Direction::Ingress)));
        assert!(
            survey.attached.contains_key(&(UPLINK, Direction::Egress)),
            "packets pass the queue of an uplink"
        );
    }

    #[test]
    fn the_programs_of_an_earlier_agent_are_replaced_and_those_of_others_are_not() {
        let mut survey = carried_out(survey());
        survey.attached.get_mut(&(POD, Direction::Ingress)).unwrap().program = 7;
        let foreign = Attached { program: 8, name: "other".to_owned() };
        survey.attached.insert((POD, Direction::Egress), foreign.clone());
        survey.attached.insert((IfIndex::new(30), Direction::Egress), foreign);
        assert_eq!(survey.changes(id), [Change::Attach(POD, Program::FromPod)]);
    }

    #[test]
    fn the_programs_of_an_unused_uplink_and_the_addresses_of_a_gone_pod_are_removed() {
        let mut survey = carried_out(survey());
        survey.pods.remove(0);
        survey.transit.clear();
        // The kernel removed the programs together with the pod's interface.
        survey.attached.retain(|(index, _), _| *index != POD);
        let expected = [
            Change::RemovePod([10, 0, 0, 1].into()),
            Change::Detach((UPLINK, Direction::Ingress)),
            Change::Detach((UPLINK, Direction::Egress)),
        ];
        assert_eq!(survey.changes(id), expected);
    }
}
