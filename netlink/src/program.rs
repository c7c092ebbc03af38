//! BPF programs that the kernel runs for the packets of an interface: the queueing discipline `clsact`, and classifiers of
//! kind `bpf` with direct action: `tc-bpf(8)`, `net/sched/sch_ingress.c`, `net/sched/cls_bpf.c`.
//!
//! The kernel keeps an attached program until it is detached or the interface is deleted, also after the process that
//! attached it has ended.

use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, BorrowedFd};

use netlink_packet_core::{NLM_F_CREATE, NLM_F_ECHO, NLM_F_REPLACE};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::tc::{
    TcAttribute, TcBpfFlags, TcFilterBpf, TcFilterBpfOption, TcHandle, TcMessage, TcOption,
};
use nix::errno::Errno;

use crate::{Error, IfIndex, Operation, RouteSocket};

/// The name of the queueing discipline.
const CLSACT: &str = "clsact";

/// Another discipline, which only has programs for arriving packets. It takes the same place.
const INGRESS: &str = "ingress";

/// Disciplines that the kernel sets by itself, and that keep no packet.
const WITHOUT_QUEUE: [&str; 2] = ["noqueue", "noop"];

/// The preference of Polder's classifiers. Those of others come first: they have lower ones, and the kernel assigns 49,152
/// and less.
const PREFERENCE: u16 = 65_000;

/// The handle of Polder's classifiers, the only ones at this preference.
const HANDLE: u32 = 1;

/// `ETH_P_ALL` (`include/uapi/linux/if_ether.h`).
const ALL_PROTOCOLS: u16 = 3;

/// The packets for which a program runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Direction {
    /// Those that arrive on the interface.
    Ingress,
    /// Those that the host sends through the interface.
    Egress,
}

impl Direction {
    fn parent(self) -> TcHandle {
        let minor = match self {
            Self::Ingress => TcHandle::MIN_INGRESS,
            Self::Egress => TcHandle::MIN_EGRESS,
        };
        TcHandle { minor, ..TcHandle::CLSACT }
    }
}

/// An attached program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attached {
    /// The kernel's number of the program.
    pub program: u32,
    /// The name under which it is attached.
    pub name: String,
}

/// The queueing disciplines of an interface.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Queues {
    /// The kind of the root discipline. `None` if it keeps no packet.
    pub root: Option<String>,
    /// What takes programs.
    pub hooks: Hooks,
}

/// The discipline that takes programs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Hooks {
    /// There is none.
    #[default]
    None,
    /// `clsact`, for both directions.
    Clsact,
    /// `ingress`, for arriving packets only.
    Ingress,
}

/// Creates `clsact`. Succeeds if it exists. Fails with `EINVAL` if the interface has the discipline `ingress`.
pub fn add_hooks(index: IfIndex) -> Operation {
    // Without NLM_F_EXCL and NLM_F_REPLACE, the kernel compares the kind of an existing discipline (`tc_modify_qdisc` in
    // net/sched/sch_api.c).
    Operation::new(RouteNetlinkMessage::NewQueueDiscipline(hooks(index)), NLM_F_CREATE)
}

/// Deletes `clsact` with all programs. Fails if it does not exist ([`Error::is_missing`]).
pub fn delete_hooks(index: IfIndex) -> Operation {
    Operation::new(RouteNetlinkMessage::DelQueueDiscipline(hooks(index)), 0)
}

/// Attaches a program under that name. Replaces the one that was attached before; each packet passes one of them.
pub fn attach(index: IfIndex, direction: Direction, program: BorrowedFd<'_>, name: &str) -> Operation {
    let mut message = classifier(index, direction);
    message.attributes.push(TcAttribute::Options(vec![
        TcOption::Bpf(TcFilterBpfOption::ProgFd(program.as_raw_fd().cast_unsigned())),
        TcOption::Bpf(TcFilterBpfOption::ProgName(name.to_owned())),
        TcOption::Bpf(TcFilterBpfOption::Flags(TcBpfFlags::DirectAction)),
    ]));
    Operation::new(RouteNetlinkMessage::NewTrafficFilter(message), NLM_F_CREATE | NLM_F_REPLACE)
}

/// Detaches the program. Fails if there is none ([`Error::is_missing`]).
pub fn detach(index: IfIndex, direction: Direction) -> Operation {
    Operation::new(RouteNetlinkMessage::DelTrafficFilter(classifier(index, direction)), 0)
}

impl RouteSocket {
    /// The programs that [`attach`] has attached at these places, in this order.
    pub fn attached_programs(
        &mut self,
        places: &[(IfIndex, Direction)],
    ) -> Result<Vec<Option<Attached>>, Error> {
        let requests = places
            .iter()
            .map(|(index, direction)| RouteNetlinkMessage::GetTrafficFilter(classifier(*index, *direction)));
        let answers = self.get_each(requests)?;
        answers
            .into_iter()
            .map(|answer| match answer {
                Ok(RouteNetlinkMessage::NewTrafficFilter(message)) => Ok(attached(&message)),
                Ok(_) | Err(Error::NoAnswer) => Ok(None),
                // EINVAL: it has no `clsact`.
                Err(error) if error.is_missing() || error.errno() == Some(Errno::EINVAL) => Ok(None),
                Err(error) => Err(error),
            })
            .collect()
    }

    /// Whether a program of anybody is attached to the interface, in either direction.
    pub fn has_programs(&mut self, index: IfIndex) -> Result<bool, Error> {
        for direction in [Direction::Ingress, Direction::Egress] {
            let mut message = TcMessage::with_index(index.number().cast_signed());
            message.header.parent = direction.parent();
            let found = self.dump(RouteNetlinkMessage::GetTrafficFilter(message), |message| match message {
                RouteNetlinkMessage::NewTrafficFilter(_) => Some(()),
                _ => None,
            });
            match found {
                Ok(found) if found.is_empty() => {}
                Ok(_) => return Ok(true),
                Err(error) if error.is_missing() || error.errno() == Some(Errno::EINVAL) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(false)
    }

    /// The queueing disciplines of all interfaces that have any.
    pub fn queues(&mut self) -> Result<BTreeMap<IfIndex, Queues>, Error> {
        let request = RouteNetlinkMessage::GetQueueDiscipline(TcMessage::default());
        let found = self.dump(request, |message| match message {
            RouteNetlinkMessage::NewQueueDiscipline(message) => Some(message),
            _ => None,
        })?;
        let mut queues: BTreeMap<IfIndex, Queues> = BTreeMap::new();
        for message in found {
            let (Some(kind), Ok(index)) = (kind(&message), u32::try_from(message.header.index)) else {
                continue;
            };
            let of_interface = queues.entry(IfIndex::new(index)).or_default();
            match kind {
                CLSACT => of_interface.hooks = Hooks::Clsact,
                INGRESS => of_interface.hooks = Hooks::Ingress,
                kind if message.header.parent == TcHandle::ROOT && !WITHOUT_QUEUE.contains(&kind) => {
                    of_interface.root = Some(kind.to_owned());
                }
                _ => {}
            }
        }
        Ok(queues)
    }

    /// The kind of the interface's root queueing discipline. `None` if it keeps no packet.
    pub fn queue(&mut self, index: IfIndex) -> Result<Option<String>, Error> {
        let mut message = TcMessage::with_index(index.number().cast_signed());
        message.header.parent = TcHandle::ROOT;
        // Without the flag, the kernel only sends a notification (`qdisc_notify` in `net/sched/sch_api.c`).
        match self.get_with(RouteNetlinkMessage::GetQueueDiscipline(message), NLM_F_ECHO) {
            Ok(RouteNetlinkMessage::NewQueueDiscipline(message)) => {
                Ok(kind(&message).filter(|kind| !WITHOUT_QUEUE.contains(kind)).map(str::to_owned))
            }
            Ok(_) | Err(Error::NoAnswer) => Ok(None),
            Err(error) if error.is_missing() => Ok(None),
            Err(error) => Err(error),
        }
    }
}

fn hooks(index: IfIndex) -> TcMessage {
    let mut message = TcMessage::with_index(index.number().cast_signed());
    message.header.parent = TcHandle::CLSACT;
    message.header.handle = TcHandle { minor: 0, ..TcHandle::CLSACT };
    message.attributes = vec![TcAttribute::Kind(CLSACT.to_owned())];
    message
}

fn classifier(index: IfIndex, direction: Direction) -> TcMessage {
    let mut message = TcMessage::with_index(index.number().cast_signed());
    message.header.parent = direction.parent();
    message.header.handle = TcHandle::from(HANDLE);
    message.header.info = u32::from(PREFERENCE) << 16 | u32::from(ALL_PROTOCOLS.to_be());
    message.attributes = vec![TcAttribute::Kind(TcFilterBpf::KIND.to_owned())];
    message
}

fn kind(message: &TcMessage) -> Option<&str> {
    message.attributes.iter().find_map(|attribute| match attribute {
        TcAttribute::Kind(kind) => Some(kind.as_str()),
        _ => None,
    })
}

/// `None` if it is a classifier of another kind.
fn attached(message: &TcMessage) -> Option<Attached> {
    let options = message.attributes.iter().flat_map(|attribute| match attribute {
        TcAttribute::Options(options) => options.as_slice(),
        _ => &[],
    });
    let (mut program, mut name) = (None, String::new());
    for option in options {
        match option {
            TcOption::Bpf(TcFilterBpfOption::ProgId(id)) => program = Some(*id),
            TcOption::Bpf(TcFilterBpfOption::ProgName(found)) => name.clone_from(found),
            _ => {}
        }
    }
    Some(Attached { program: program?, name })
}
