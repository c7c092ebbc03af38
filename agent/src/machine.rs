//! Identity of this machine and of its boot.

use std::fs;
use std::io;
use std::path::Path;

use polder_api::NodeName;
use polder_ipam::Moment;
use polder_ipam::ids::{BootId, MachineId};
use polder_ipam::record::Boot;

const MACHINE_ID: &str = "/etc/machine-id";
/// Content of the file before systemd has created an id (machine-id(5)), and in images made for many machines.
const UNINITIALIZED: &str = "uninitialized";
const MAKE_ID: &str = "create it with systemd-machine-id-setup, or mount that of the host";
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
const RANDOM_UUID: &str = "/proc/sys/kernel/random/uuid";

/// The machine's identity cannot be determined.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// A file that identifies the machine, its boot or a new object is missing or invalid.
    #[error("{path} {problem}: {remedy}")]
    File {
        /// The file.
        path: &'static str,
        /// The problem with the file.
        problem: FileProblem,
        /// The remedy.
        remedy: &'static str,
    },
    /// The host name is not a valid node name.
    #[error("the host name is not a valid node name: set one with --node")]
    HostName(#[source] polder_api::InvalidName),
}

/// The problem with a file.
#[derive(Debug, thiserror::Error)]
pub enum FileProblem {
    /// systemd has not created the machine id yet, or the file is from an image for many machines.
    ///
    /// Remedy: run `systemd-machine-id-setup` on the host.
    #[error("contains {UNINITIALIZED:?}, which identifies no machine")]
    Uninitialized,
    /// The file has no content.
    ///
    /// Remedy: create the file as the end of the text says.
    #[error("is empty")]
    Empty,
    /// The file does not exist, or the agent may not read it.
    ///
    /// Remedy: create or mount the file as the end of the text says.
    #[error("cannot be read ({0})")]
    Unread(io::Error),
}

/// The machine that the agent runs on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Machine {
    /// Stays the same for the lifetime of the installation.
    pub machine_id: MachineId,
    /// Changes with every boot.
    pub boot_id: BootId,
}

impl Machine {
    /// Reads machine id and boot id.
    pub fn read() -> Result<Self, MachineError> {
        let machine_id = line(MACHINE_ID, MAKE_ID)?;
        if machine_id == UNINITIALIZED {
            let problem = FileProblem::Uninitialized;
            return Err(MachineError::File { path: MACHINE_ID, problem, remedy: MAKE_ID });
        }
        let boot_id = BootId::new(line(BOOT_ID, "check that /proc is mounted")?);
        Ok(Self { machine_id: MachineId::new(machine_id), boot_id })
    }

    /// Machine id and boot id, for a comparison with records.
    pub fn boot(&self) -> Boot<'_> {
        Boot { machine_id: &self.machine_id, boot_id: &self.boot_id }
    }
}

fn line(path: &'static str, remedy: &'static str) -> Result<String, MachineError> {
    let problem = match fs::read_to_string(Path::new(path)) {
        Ok(text) if !text.trim().is_empty() => return Ok(text.trim().to_owned()),
        Ok(_) => FileProblem::Empty,
        Err(error) => FileProblem::Unread(error),
    };
    Err(MachineError::File { path, problem, remedy })
}

/// Default node name: the host name in lower case, as in Kubernetes.
pub fn default_node_name() -> Result<NodeName, MachineError> {
    let name = nix::unistd::gethostname().unwrap_or_default();
    name.to_string_lossy().to_lowercase().parse().map_err(MachineError::HostName)
}

/// The current time of a clock that counts suspend and ignores changes of the system time.
pub fn now() -> Moment {
    let clock = nix::time::ClockId::CLOCK_BOOTTIME;
    let time = nix::time::clock_gettime(clock).expect("every kernel since 2.6.39 has this clock");
    let (seconds, nanos) = (time.tv_sec().cast_unsigned(), time.tv_nsec().cast_unsigned());
    Moment::from_millis(seconds * 1000 + nanos / 1_000_000)
}

/// A random unique name: a UUID.
pub fn random_name() -> Result<String, MachineError> {
    line(RANDOM_UUID, "check that /proc is mounted")
}
