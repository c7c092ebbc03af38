//! Removes everything that the agent created on this machine, and restores the previous kernel settings.

use std::fs;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use polder_api::{add_marks, tombstone, tombstones};
use polder_ipam::ledger::{AttachmentEntry, AttachmentKind, Ledger, MemberState};
use polder_store::ledger::Sqlite;

use crate::config::NodePaths;
use crate::conflist;
use crate::container;
use crate::fastpath::{AttachError, Interfaces, Users};
use crate::kernel::Kernel;
use crate::kernel::sysctl::Sysctls;
use crate::lock::NodeLock;
use crate::machine::Machine;
use crate::presence::Presence;
use crate::state_dir::{self, CONFLIST, LEDGER, NODE_OBJECT, STORE};
use crate::watcher::{SNAPSHOT, SNAPSHOT_BEFORE};

/// Handling of pods that are still attached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Attached {
    /// Refuse the uninstall while pods are attached.
    Stay,
    /// Disconnect them.
    CutOff,
}

/// The uninstall was refused, or is not complete.
#[derive(Debug, thiserror::Error)]
enum NotUninstalled {
    /// An agent holds the lock of the state directory or of the node, or the lock cannot be taken.
    /// Remedy: run systemctl disable --now polder-agent; in Kubernetes, remove Polder as described in docs/install.md.
    #[error("stop the agent first, and make sure that nothing restarts it")]
    Runs(#[source] anyhow::Error),
    /// A running agent uses the socket, but another state directory than the uninstall.
    #[error(
        "stop the agent first, and make sure that nothing restarts it: an agent answers on {} whose state directory is \
         not {}",
        socket.display(),
        state.display()
    )]
    Answers {
        /// Socket of the agent.
        socket: PathBuf,
        /// State directory of the uninstall.
        state: PathBuf,
    },
    /// The ledger cannot be opened, so the attached pods and the previous kernel settings are unknown.
    #[error("cannot read the ledger: use --with-pods to continue without it")]
    Ledger(#[source] anyhow::Error),
    /// Pods of this node are still connected to the network.
    #[error("{pods} pods are attached: delete them first, or disconnect them with --with-pods")]
    PodsAttached {
        /// Number of pod interfaces.
        pods: usize,
    },
    /// Another plugin created interfaces of running pods with addresses of this node.
    #[error(
        "{leases} interfaces of another plugin use addresses of this node: delete their pods first, or release the \
         addresses with --with-pods"
    )]
    LeasesAttached {
        /// Number of interfaces.
        leases: usize,
    },
    /// Some steps failed. The state directory is kept, because it has the data for another attempt.
    #[error(
        "{}. Everything else is done, and {} is kept: run the uninstall again",
        failed_steps(failures),
        state.display()
    )]
    Incomplete {
        /// The failed steps.
        failures: Vec<FailedStep>,
        /// The state directory.
        state: PathBuf,
    },
    /// A file or directory of the agent cannot be deleted.
    /// Remedy: check that its file system is mounted writable, and run the uninstall again.
    #[error("cannot delete {}", path.display())]
    File {
        /// The file or directory.
        path: PathBuf,
        /// The error.
        #[source]
        source: io::Error,
    },
}

/// A step of the uninstall that failed, while the others continued.
#[derive(Debug, thiserror::Error)]
enum FailedStep {
    /// The CNI configuration cannot be deleted.
    /// Remedy: check that its directory is mounted writable, and run the uninstall again.
    #[error("cannot delete the CNI configuration {}: {error}", file.display())]
    Conflist {
        /// The file.
        file: PathBuf,
        /// The error.
        error: io::Error,
    },
    /// The kernel refused to delete a device, a route or a table.
    #[error(transparent)]
    Kernel(#[from] polder_netlink::Error),
    /// The BPF programs of the fast path cannot be removed from the interfaces of the host.
    #[error(transparent)]
    Programs(#[from] AttachError),
    /// A kernel setting cannot be restored to its value before the agent changed it.
    /// Remedy: check that `proc_sys_net` is mounted writable, and run the uninstall again.
    #[error("cannot restore {path} to {previous}: {error}")]
    Setting {
        /// Path of the setting in `proc_sys_net`.
        path: String,
        /// The previous value.
        previous: String,
        /// The error.
        error: io::Error,
    },
}

/// The failed steps as one text.
fn failed_steps(failures: &[FailedStep]) -> String {
    failures.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

/// Suffixes of the files of a SQLite database.
const BESIDE: [&str; 3] = ["", "-wal", "-shm"];

/// Runs the uninstall. A missing object is not an error, and a failure does not stop the rest. Returns one line for
/// each completed step.
pub fn uninstall(places: &NodePaths, attached: Attached) -> anyhow::Result<Vec<String>> {
    let state = &places.state_dir;
    container::refuse_lost_state(state, places.allow_ephemeral_state)?;
    let sysctls = Sysctls::at(places.proc_sys_net.clone())?;
    let is_there = state.exists();
    let lock = is_there
        .then(|| state_dir::lock(state).map_err(|error| NotUninstalled::Runs(error.into())))
        .transpose()?;
    if UnixStream::connect(&places.socket).is_ok() {
        return Err(NotUninstalled::Answers { socket: places.socket.clone(), state: state.clone() }.into());
    }
    let node = NodeLock::take().map_err(|error| NotUninstalled::Runs(error.into()))?;
    let (mut done, mut failures) = (Vec::new(), Vec::new());
    let ledger = match (open(&state.join(LEDGER)).transpose(), attached) {
        (Some(Err(error)), Attached::CutOff) => {
            done.push(format!(
                "kernel settings are not restored, because their previous values cannot be read: {error:#}"
            ));
            None
        }
        (ledger, _) => ledger.transpose().map_err(NotUninstalled::Ledger)?,
    };
    let mut kernel = Kernel::open(&sysctls)?;
    if attached == Attached::Stay {
        refuse_if_attached(&mut kernel, ledger.as_ref(), &places.socket)?;
    }
    // The CNI configuration first, so that runtimes start no further requests.
    let file = places.cni_file.display();
    match conflist::remove(&places.cni_file) {
        Ok(true) => done.push(format!("the CNI configuration {file} is deleted")),
        Ok(false) => {}
        Err(error) => failures.push(FailedStep::Conflist { file: places.cni_file.clone(), error }),
    }
    // Before the devices: the programs also run on interfaces of the host.
    match Interfaces::open(None)
        .map_err(AttachError::Read)
        .and_then(|mut all| all.check_all(&Users::default()))
    {
        Ok(0) => {}
        Ok(programs) => done.push(format!("{programs} BPF programs of the fast path are removed")),
        Err(error) => failures.push(error.into()),
    }
    let (removed, left) = kernel.remove_all();
    failures.extend(left.into_iter().map(FailedStep::Kernel));
    if removed > 0 {
        done.push(format!("{removed} devices, routes and tables are deleted"));
    }
    for (path, previous) in ledger.as_ref().map(Ledger::sysctls).transpose()?.unwrap_or_default() {
        match put_back(&sysctls, &path, &previous) {
            Ok(true) => done.push(format!("{path} is restored to {previous}")),
            Ok(false) => {}
            Err(error) => failures.push(FailedStep::Setting { path, previous, error }),
        }
    }
    let is_member = is_member(ledger.as_ref(), &state.join(STORE));
    drop(ledger);
    if !failures.is_empty() {
        return Err(NotUninstalled::Incomplete { failures, state: state.clone() }.into());
    }
    delete_files(places)?;
    drop((lock, node));
    // Deleted only if empty: other files in these folders do not belong to Polder.
    let leave = [places.socket.parent(), Some(state)];
    leave.into_iter().flatten().for_each(|folder| drop(fs::remove_dir(folder)));
    if is_there {
        done.push(format!("the state in {} is deleted", state.display()));
    }
    if is_there && is_member {
        done.push(format!(
            "node {} is still in the cluster: run polderctl node remove {} --dead on another node, 10 s from now at \
             the earliest",
            places.node, places.node
        ));
    }
    Ok(done)
}

/// Whether other nodes may still count this node as a member: not if it was removed, nor with an embedded store, which
/// has no other nodes.
fn is_member(ledger: Option<&Sqlite>, own_store: &Path) -> bool {
    let identity = ledger.and_then(|ledger| ledger.identity().ok().flatten());
    let was_removed = identity.is_some_and(|identity| identity.member_state == MemberState::Removed);
    !was_removed && !own_store.exists()
}

/// The ledger, if it exists. Values from an earlier boot are discarded.
fn open(ledger: &Path) -> anyhow::Result<Option<Sqlite>> {
    if !ledger.exists() {
        return Ok(None);
    }
    let mut ledger = Sqlite::open(ledger)?;
    ledger.enter_boot(&Machine::read()?.boot_id)?;
    Ok(Some(ledger))
}

fn refuse_if_attached(kernel: &mut Kernel, ledger: Option<&Sqlite>, socket: &Path) -> anyhow::Result<()> {
    let pods = kernel.pod_interfaces()?.len();
    if pods > 0 {
        return Err(NotUninstalled::PodsAttached { pods }.into());
    }
    let attachments = ledger.map(Ledger::attachments).transpose()?.unwrap_or_default();
    let lives = |held: &&AttachmentEntry| {
        held.kind == AttachmentKind::Lease
            && Presence::of(Path::new(&held.netns)) != Presence::Gone
            && !tombstone(socket, &held.attachment).exists()
    };
    let leases = attachments.iter().filter(lives).count();
    if leases > 0 {
        return Err(NotUninstalled::LeasesAttached { leases }.into());
    }
    Ok(())
}

/// Restores a kernel setting. Returns whether it was changed: not if it already has that value, or if its device no
/// longer exists.
fn put_back(sysctls: &Sysctls, path: &str, previous: &str) -> io::Result<bool> {
    match sysctls.get(path) {
        Ok(now) if now != previous => sysctls.set(path, previous).map(|()| true),
        _ => Ok(false),
    }
}

fn delete_files(places: &NodePaths) -> Result<(), NotUninstalled> {
    let state = &places.state_dir;
    delete(&places.socket)?;
    delete_folder(&tombstones(&places.socket))?;
    delete_folder(&add_marks(&places.socket))?;
    for name in [LEDGER, STORE] {
        BESIDE.iter().try_for_each(|beside| delete(&state.join(format!("{name}{beside}"))))?;
    }
    [SNAPSHOT, SNAPSHOT_BEFORE, CONFLIST, NODE_OBJECT, "lock"]
        .iter()
        .try_for_each(|name| delete(&state.join(name)))
}

fn delete(file: &Path) -> Result<(), NotUninstalled> {
    gone(fs::remove_file(file)).map_err(|source| NotUninstalled::File { path: file.to_owned(), source })
}

fn delete_folder(folder: &Path) -> Result<(), NotUninstalled> {
    gone(fs::remove_dir_all(folder))
        .map_err(|source| NotUninstalled::File { path: folder.to_owned(), source })
}

fn gone(outcome: io::Result<()>) -> io::Result<()> {
    match outcome {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
