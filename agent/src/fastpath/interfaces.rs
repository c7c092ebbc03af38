//! Attaches the BPF programs to interfaces. Blocks: runs on the thread of its owner.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use polder_fastpath::{Count, FastPathError, Programs};
use polder_netlink::link::Link;
use polder_netlink::program::{self, Direction};
use polder_netlink::{Error, IfIndex, Operation, RouteSocket};
use tracing::{debug, info};

use super::plan::{Change, Place, Survey, attached_name, direction};
use crate::kernel::state::Device;
use crate::local_pods::LocalPod;

/// The programs cannot be attached to the interfaces, or detached.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// The kernel does not answer what exists.
    ///
    /// Remedy: none, the agent tries again.
    #[error("cannot read which BPF programs run on the interfaces: {0}")]
    Read(#[source] Error),
    /// The kernel refuses to attach a program: another program uses the queueing discipline `ingress` there.
    ///
    /// Remedy: see the text. The agent tries again.
    #[error(
        "cannot attach a BPF program to interface {interface}: {source}. Delete the queueing discipline ingress of that \
         interface, or set fastpath = \"off\""
    )]
    Attach {
        /// Index of the interface.
        interface: IfIndex,
        /// The answer of the kernel.
        source: Error,
    },
    /// The maps of the programs cannot be changed.
    ///
    /// Remedy: correct the cause at the end of the text. The agent tries again.
    #[error("{0}")]
    Map(#[source] FastPathError),
}

/// The pods and paths for which programs run.
#[derive(Debug, Clone, Default)]
pub struct Users {
    /// The pods of this node whose interfaces are complete.
    pub pods: Vec<LocalPod>,
    /// The uplinks with a direct path to a peer.
    pub uplinks: BTreeSet<IfIndex>,
}

/// The interfaces of the host.
#[derive(Debug)]
pub struct Interfaces {
    routes: RouteSocket,
    /// `None`: only those of earlier agents are removed.
    programs: Option<Programs>,
    /// The interfaces of pods, by address, that the programs know.
    known: BTreeMap<IpAddr, IfIndex>,
}

impl Interfaces {
    /// The interfaces in the network namespace of the calling thread.
    pub fn open(programs: Option<Programs>) -> Result<Self, Error> {
        Ok(Self { routes: RouteSocket::open()?, programs, known: BTreeMap::new() })
    }

    /// Read-only access, without programs.
    pub fn open_to_read() -> Result<Self, Error> {
        Ok(Self { routes: RouteSocket::open_to_read()?, programs: None, known: BTreeMap::new() })
    }

    /// The netlink port ID of the socket.
    pub fn port(&self) -> Result<u32, Error> {
        self.routes.port()
    }

    /// The packets so far, by path. Empty without programs.
    pub fn counts(&self) -> Result<Vec<(Count, u64)>, FastPathError> {
        self.programs.as_ref().map(Programs::counts).transpose().map(Option::unwrap_or_default)
    }

    /// Compares all interfaces with what should run, and changes what differs. Returns the number of changes.
    pub fn check_all(&mut self, users: &Users) -> Result<usize, AttachError> {
        let survey = self.survey(users).map_err(AttachError::Read)?;
        self.apply(&survey)
    }

    /// Attaches the programs to the interfaces of these pods, and forgets the addresses for which `is_gone`. Does not
    /// depend on the number of other pods.
    pub fn add(
        &mut self,
        pods: Vec<LocalPod>,
        is_gone: impl Fn(IpAddr) -> bool,
    ) -> Result<usize, AttachError> {
        let mut survey = Survey::default();
        for pod in pods {
            let Some(link) = self.routes.link(pod.name.as_str()).map_err(AttachError::Read)? else {
                continue;
            };
            if self.routes.queue(link.index).map_err(AttachError::Read)?.is_some() {
                survey.queued.insert(link.index);
            }
            survey.pods.push((pod, link.index));
        }
        self.read_attached(survey.pods.iter().map(|(_, index)| *index).collect(), &mut survey)
            .map_err(AttachError::Read)?;
        let concerned = |address: &IpAddr| {
            is_gone(*address) || survey.pods.iter().any(|(pod, _)| pod.addresses.contains(address))
        };
        survey.known =
            self.known.iter().filter(|(address, _)| concerned(address)).map(|(a, i)| (*a, *i)).collect();
        self.apply(&survey)
    }

    fn survey(&mut self, users: &Users) -> Result<Survey, Error> {
        let queues = self.routes.queues()?;
        let links = self.routes.links()?;
        let index = |name: &str| links.get(name).map(|link| link.index);
        let is_tunnel = |link: &&Link| matches!(Device::named(&link.name), Some(Device::Tunnel(_)));
        // The programs read Ethernet headers.
        let is_ethernet = |link: &&Link| link.mac.is_some();
        let is_transit = |link: &&Link| is_tunnel(link) || users.uplinks.contains(&link.index);
        let with_programs = self.programs.is_some();
        let pods = users.pods.iter().filter(|_| with_programs);
        let transit = links.values().filter(|_| with_programs).filter(is_transit).filter(is_ethernet);
        let mut survey = Survey {
            pods: pods.filter_map(|pod| Some((pod.clone(), index(pod.name.as_str())?))).collect(),
            queued: queues
                .iter()
                .filter(|(_, queues)| queues.root.is_some())
                .map(|(index, _)| *index)
                .collect(),
            transit: transit.map(|link| link.index).collect(),
            known: self.known.clone(),
            ..Survey::default()
        };
        let with_hooks = queues.iter().filter(|(_, queues)| queues.hooks == program::Hooks::Clsact);
        self.read_attached(with_hooks.map(|(index, _)| *index).collect(), &mut survey)?;
        Ok(survey)
    }

    fn read_attached(&mut self, interfaces: Vec<IfIndex>, survey: &mut Survey) -> Result<(), Error> {
        let both = |index| [Direction::Ingress, Direction::Egress].map(|direction| (index, direction));
        let places: Vec<Place> = interfaces.into_iter().flat_map(both).collect();
        let attached = self.routes.attached_programs(&places)?;
        survey.attached =
            places.into_iter().zip(attached).filter_map(|(place, found)| Some((place, found?))).collect();
        Ok(())
    }

    fn apply(&mut self, survey: &Survey) -> Result<usize, AttachError> {
        let Self { routes, programs, known } = self;
        let changes = survey.changes(|program| programs.as_ref().map_or(0, |programs| programs.id(program)));
        let mut operations: Vec<(IfIndex, Operation)> = Vec::new();
        let mut left = BTreeSet::new();
        for change in &changes {
            debug!("{change}");
            match (change, programs.as_mut()) {
                (Change::Attach(index, program), Some(programs)) => {
                    let name = attached_name(*program);
                    let descriptor = programs.descriptor(*program);
                    operations.push((*index, program::add_hooks(*index)));
                    operations
                        .push((*index, program::attach(*index, direction(*program), descriptor, &name)));
                }
                (Change::SetPod(address, index), Some(programs)) => {
                    programs.set_pod(*address, index.number()).map_err(AttachError::Map)?;
                    known.insert(*address, *index);
                }
                (Change::RemovePod(address), Some(programs)) => {
                    programs.remove_pod(*address).map_err(AttachError::Map)?;
                    known.remove(address);
                }
                (Change::Detach((index, direction)), _) => {
                    operations.push((*index, program::detach(*index, *direction)));
                    left.insert(*index);
                }
                // Nothing is wanted without programs.
                (_, None) => {}
            }
        }
        let (interfaces, operations): (Vec<_>, Vec<_>) = operations.into_iter().unzip();
        let outcomes = routes.execute(operations).map_err(AttachError::Read)?;
        let mut failed = None;
        for (interface, outcome) in interfaces.into_iter().zip(outcomes) {
            match outcome {
                // The interface is gone meanwhile, with its pod.
                Err(error) if error.is_missing() => {}
                Err(source) => failed = failed.or(Some(AttachError::Attach { interface, source })),
                Ok(()) => {}
            }
        }
        for index in left {
            delete_unused_hooks(routes, index).map_err(AttachError::Read)?;
        }
        if !changes.is_empty() {
            info!(changes = changes.len(), "changing the programs of the fast path");
        }
        failed.map_or(Ok(changes.len()), Err)
    }
}

/// Deletes `clsact` of an interface if it has no program any more, neither Polder's nor another's.
fn delete_unused_hooks(routes: &mut RouteSocket, index: IfIndex) -> Result<(), Error> {
    if routes.has_programs(index)? {
        return Ok(());
    }
    match routes.execute_all([program::delete_hooks(index)]) {
        Err(error) if error.is_missing() => Ok(()),
        outcome => outcome,
    }
}
