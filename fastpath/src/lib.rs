//! The BPF programs of the fast path: loads them into the kernel, and reads and writes their maps. `bpf/fastpath.c` says
//! what they do. No other crate calls bpf(2).
//!
//! Nothing is pinned: the kernel keeps programs and maps as long as they are attached to an interface, or a process has
//! them open.

use std::net::{IpAddr, Ipv6Addr};
use std::os::fd::{AsFd, BorrowedFd};
use std::{fmt, io};

use aya::maps::{Array, HashMap, MapData, MapError, PerCpuArray};
use aya::programs::{ProgramError, SchedClassifier};
use aya::{Ebpf, EbpfError};

/// The compiled programs.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/fastpath.o"));

/// A program, by the packets that it sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Program {
    /// Packets that arrive from a pod: ingress of its interface on the host.
    FromPod,
    /// Packets that the host sends to a pod: egress of its interface on the host.
    ToPod,
    /// Packets that arrive from other nodes: ingress of an uplink or tunnel.
    FromNode,
    /// Packets that the host sends to other nodes: egress of an uplink or tunnel.
    ToNode,
}

impl Program {
    /// All programs.
    pub const ALL: [Self; 4] = [Self::FromPod, Self::ToPod, Self::FromNode, Self::ToNode];

    /// Its name, as in `bpf/fastpath.c`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::FromPod => "from_pod",
            Self::ToPod => "to_pod",
            Self::FromNode => "from_node",
            Self::ToNode => "to_node",
        }
    }
}

/// What the programs count: packets, by the path that they took, and why. In the order of `enum count` in
/// `bpf/fastpath.c`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Count {
    /// Fast: from a pod to a pod of the same node.
    PodToPod,
    /// Fast: from a pod to another node.
    PodToNode,
    /// Fast: from another node to a pod.
    NodeToPod,
    /// Normal: the flow is new, or the host translates its addresses.
    NoRecord,
    /// Normal: one packet per second of each flow, and one after a change of paths.
    Expired,
    /// Normal: larger than every packet of its flow that the host forwarded within the second.
    Larger,
    /// Normal: the flow belongs to another interface.
    OtherSender,
    /// Normal: SYN, FIN or RST of TCP.
    Control,
    /// Normal: a fragment.
    Fragment,
    /// Normal: IPv4 options or IPv6 extension headers.
    Options,
    /// Normal: neither TCP nor UDP.
    Protocol,
    /// Normal: its time to live or hop limit ends at this host.
    LastHop,
    /// Of those on the normal path, packets whose addresses the host has translated.
    Changed,
    /// Of those on the normal path, packets whose flow was recorded.
    Recorded,
}

impl Count {
    /// All counts, in the order of the programs.
    pub const ALL: [Self; 14] = [
        Self::PodToPod,
        Self::PodToNode,
        Self::NodeToPod,
        Self::NoRecord,
        Self::Expired,
        Self::Larger,
        Self::OtherSender,
        Self::Control,
        Self::Fragment,
        Self::Options,
        Self::Protocol,
        Self::LastHop,
        Self::Changed,
        Self::Recorded,
    ];
}

/// The programs cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum FastPathError {
    /// The kernel refuses the programs or their maps: it is older than Linux 5.11, was built without BPF, or the agent
    /// may not call bpf(2).
    #[error("the kernel does not load the BPF programs")]
    Load(#[source] EbpfError),
    /// The kernel's verifier refuses a program.
    #[error("the kernel does not load the BPF program {name}")]
    Verify {
        /// The name of the program.
        name: &'static str,
        /// The answer of the kernel.
        #[source]
        source: ProgramError,
    },
    /// A map of the programs cannot be read or changed.
    #[error("cannot use the BPF map {name}")]
    Map {
        /// The name of the map.
        name: &'static str,
        /// The answer of the kernel.
        #[source]
        source: MapError,
    },
}

/// Loaded programs, with maps that are empty at first.
#[derive(Debug)]
pub struct Programs {
    loaded: Ebpf,
    ids: [u32; Program::ALL.len()],
}

impl Programs {
    /// Loads the programs, which takes the kernel some 40 ms. Needs the capabilities BPF and `NET_ADMIN`.
    pub fn load() -> Result<Self, FastPathError> {
        let mut loaded = Ebpf::load(OBJECT).map_err(FastPathError::Load)?;
        let mut ids = [0; Program::ALL.len()];
        for (program, id) in Program::ALL.into_iter().zip(&mut ids) {
            let name = program.name();
            let classifier: Result<&mut SchedClassifier, _> =
                loaded.program_mut(name).expect("the object has all programs").try_into();
            let loaded = classifier.and_then(|classifier| {
                classifier.load()?;
                classifier.info()
            });
            *id = loaded.map_err(|source| FastPathError::Verify { name, source })?.id();
        }
        Ok(Self { loaded, ids })
    }

    /// The program's file descriptor, by which it is attached.
    pub fn descriptor(&self, program: Program) -> BorrowedFd<'_> {
        let found = self.loaded.program(program.name()).expect("the object has all programs");
        found.fd().expect("all programs are loaded").as_fd()
    }

    /// The kernel's identifier of the program.
    pub fn id(&self, program: Program) -> u32 {
        self.ids[program as usize]
    }

    /// Declares the interface on the host of the pod with that address. Replaces another one.
    pub fn set_pod(&mut self, address: IpAddr, interface: u32) -> Result<(), FastPathError> {
        self.pods()?.insert(key(address), interface, 0).map_err(of_pods)
    }

    /// Removes the pod with that address. Succeeds if it is unknown.
    pub fn remove_pod(&mut self, address: IpAddr) -> Result<(), FastPathError> {
        match self.pods()?.remove(&key(address)) {
            Err(MapError::SyscallError(error)) if error.io_error.kind() == io::ErrorKind::NotFound => Ok(()),
            outcome => outcome.map_err(of_pods),
        }
    }

    fn pods(&mut self) -> Result<HashMap<&mut MapData, [u8; 16], u32>, FastPathError> {
        self.loaded.map_mut(PODS).expect("the object has all maps").try_into().map_err(of_pods)
    }

    /// The records of flows. Only the first call returns them.
    pub fn take_records(&mut self) -> Option<Records> {
        let map = self.loaded.take_map(GENERATION)?;
        Some(Records { generation: map.try_into().expect("it is an array of numbers") })
    }

    /// The packets since the programs were loaded, of all processors.
    pub fn counts(&self) -> Result<Vec<(Count, u64)>, FastPathError> {
        let failed = |source| FastPathError::Map { name: COUNTERS, source };
        let map = self.loaded.map(COUNTERS).expect("the object has all maps");
        let counters: PerCpuArray<_, u64> = map.try_into().map_err(failed)?;
        let total = |count: Count| {
            let of_each = counters.get(&(count as u32), 0).map_err(failed)?;
            Ok((count, of_each.iter().sum()))
        };
        Count::ALL.into_iter().map(total).collect()
    }
}

/// What the programs know of flows: how the host forwarded the last packet of each.
pub struct Records {
    generation: Array<MapData, u32>,
}

impl Records {
    /// Makes all records invalid. Each flow's next packet takes the normal path. To be called between a change of the
    /// routes and the removal of what only earlier routes need.
    pub fn forget(&mut self) -> Result<(), FastPathError> {
        let failed = |source| FastPathError::Map { name: GENERATION, source };
        let current = self.generation.get(&0, 0).map_err(failed)?;
        self.generation.set(0, current.wrapping_add(1), 0).map_err(failed)
    }
}

impl fmt::Debug for Records {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Records").finish_non_exhaustive()
    }
}

const PODS: &str = "pods";
const GENERATION: &str = "generation";
const COUNTERS: &str = "counters";

fn of_pods(source: MapError) -> FastPathError {
    FastPathError::Map { name: PODS, source }
}

/// The address as the programs have it: in the form of IPv6, in network byte order.
fn key(address: IpAddr) -> [u8; 16] {
    let address: Ipv6Addr = match address {
        IpAddr::V4(address) => address.to_ipv6_mapped(),
        IpAddr::V6(address) => address,
    };
    address.octets()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_loads_all_programs_and_counts_nothing_yet() {
        let mut programs = Programs::load().expect("tests of the kernel need root");
        let ids: std::collections::BTreeSet<u32> = Program::ALL.map(|program| programs.id(program)).into();
        assert_eq!(ids.len(), Program::ALL.len());
        assert_eq!(programs.counts().unwrap(), Count::ALL.map(|count| (count, 0)));
        let address = "10.0.0.1".parse().unwrap();
        programs.remove_pod(address).unwrap();
        programs.set_pod(address, 7).unwrap();
        programs.set_pod(address, 8).unwrap();
        assert_eq!(programs.pods().unwrap().get(&key(address), 0).unwrap(), 8);
        programs.remove_pod(address).unwrap();
        assert!(programs.pods().unwrap().get(&key(address), 0).is_err());
    }

    #[test]
    fn each_call_of_forget_begins_a_new_generation() {
        let mut programs = Programs::load().expect("tests of the kernel need root");
        let mut records = programs.take_records().unwrap();
        assert!(programs.take_records().is_none());
        for expected in [1, 2] {
            records.forget().unwrap();
            assert_eq!(records.generation.get(&0, 0).unwrap(), expected);
        }
    }

    #[test]
    fn the_counts_are_those_of_the_programs() {
        let source = include_str!("../bpf/fastpath.c");
        let (_, rest) = source.split_once("enum count {").unwrap();
        let names: Vec<&str> = rest
            .split_once("COUNTS")
            .unwrap()
            .0
            .lines()
            .filter_map(|line| line.trim().split_once(','))
            .map(|(name, _)| name)
            .collect();
        let ours = Count::ALL.map(|count| format!("{count:?}"));
        let in_capitals = |name: &str| {
            name.chars()
                .enumerate()
                .flat_map(|(at, letter)| {
                    let gap = (at > 0 && letter.is_uppercase()).then_some('_');
                    gap.into_iter().chain([letter.to_ascii_uppercase()])
                })
                .collect::<String>()
        };
        assert_eq!(names, ours.iter().map(|name| in_capitals(name)).collect::<Vec<_>>());
    }
}
