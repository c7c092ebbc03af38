//! Whether the network namespace of an attachment still exists, as far as visible to the agent: in a container only
//! mounted namespaces are visible.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::statfs::{NSFS_MAGIC, statfs};
use polder_ipam::cause::SharedError;
use polder_ipam::ledger::{AttachmentEntry, AttachmentKind};

use crate::container;

/// Whether a namespace exists.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Presence {
    /// It exists.
    There,
    /// It no longer exists.
    Gone,
    /// It is not visible to the agent; the reason and the remedy. Nothing may be released in this case.
    Unknown(NotVisible),
}

/// Why it is unknown whether a namespace exists.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotVisible {
    /// The ADD of the attachment did not contain a path that is visible to the agent.
    ///
    /// Remedy: delete the pod, so that its runtime calls DEL.
    #[error("its path is not recorded")]
    Unrecorded,
    /// The path is an empty file: the namespace is mounted on the host, and the mount is not propagated.
    #[error("{} is not a network namespace here: {}", netns.display(), remedy(netns))]
    NoNamespace {
        /// The path.
        netns: PathBuf,
    },
    /// The file system of the path returned an error.
    #[error("cannot check {} ({error}): {}", netns.display(), remedy(netns))]
    Failed {
        /// The path.
        netns: PathBuf,
        /// The error.
        error: SharedError,
    },
    /// The path is the namespace of a process. In a container, host processes have another id, or none.
    #[error("{} is in the host's /proc: set hostPID: true for the agent's pod", netns.display())]
    HostProcess {
        /// The path.
        netns: PathBuf,
    },
    /// The folder of the path does not exist in the agent's container, or is not that of the host.
    #[error("the host's {} is not mounted here: {}", folder(netns).display(), remedy(netns))]
    NotMounted {
        /// The path.
        netns: PathBuf,
    },
}

impl Presence {
    /// Checks the namespace at this path. An empty path means that it was never recorded.
    pub fn of(netns: &Path) -> Self {
        if netns.as_os_str().is_empty() {
            return Self::Unknown(NotVisible::Unrecorded);
        }
        let path = || netns.to_owned();
        match statfs(netns) {
            Ok(found) if found.filesystem_type() == NSFS_MAGIC => Self::There,
            Ok(_) => Self::Unknown(NotVisible::NoNamespace { netns: path() }),
            Err(Errno::ENOENT | Errno::ENOTDIR) => Self::of_missing(netns),
            Err(errno) => {
                let error = SharedError::new(io::Error::from(errno));
                Self::Unknown(NotVisible::Failed { netns: path(), error })
            }
        }
    }

    fn of_missing(netns: &Path) -> Self {
        let netns_folder = folder(netns);
        if netns.starts_with("/proc") {
            if !container::is_known() {
                return Self::Gone;
            }
            return Self::Unknown(NotVisible::HostProcess { netns: netns.to_owned() });
        }
        // The folder stays when its last namespace is deleted. If it is missing, the host's folder is not visible.
        if netns_folder.is_dir() && !container::has_on_its_own_root(netns_folder) {
            return Self::Gone;
        }
        Self::Unknown(NotVisible::NotMounted { netns: netns.to_owned() })
    }
}

/// The folder in which the namespace is mounted.
fn folder(netns: &Path) -> &Path {
    netns.parent().unwrap_or(netns)
}

fn remedy(netns: &Path) -> String {
    format!("mount the host's {} there, with mountPropagation HostToContainer", folder(netns).display())
}

/// The folder in which container runtimes mount pods' namespaces.
const USUAL_FOLDER: &str = "/run/netns";

/// Whether a container runtime may have pods: a namespace exists, or the folder is not visible.
pub fn may_be_there() -> bool {
    let folder = fs::read_dir(USUAL_FOLDER).map(|mut names| names.next().is_some());
    not_seen().is_some() || folder.unwrap_or_else(|error| error.kind() != io::ErrorKind::NotFound)
}

/// The limitation, if the agent runs in a container without the host's namespaces.
pub fn not_seen() -> Option<String> {
    let folder = Path::new(USUAL_FOLDER);
    if !container::is_known() {
        return None;
    }
    let missing = if container::has_on_its_own_root(folder) {
        "is not mounted here"
    } else if container::follows_the_host(folder) {
        return None;
    } else {
        "is mounted without mount propagation"
    };
    Some(format!(
        "pods that other plugins attach are not visible, so their addresses are released only by DEL: the host's \
         {USUAL_FOLDER} {missing}: {}",
        remedy(&folder.join("pod"))
    ))
}

/// Problems of invisible namespaces with allocated addresses, one for each folder.
pub fn problems<'a>(attachments: impl Iterator<Item = &'a AttachmentEntry>) -> Vec<String> {
    let mut unseen: BTreeMap<&Path, (usize, NotVisible)> = BTreeMap::new();
    for held in attachments.filter(|held| held.kind == AttachmentKind::Lease && !held.netns.is_empty()) {
        let netns = Path::new(&held.netns);
        if let Presence::Unknown(why) = Presence::of(netns) {
            unseen.entry(folder(netns)).or_insert((0, why)).0 += 1;
        }
    }
    let problem = |(count, why)| {
        format!(
            "cannot check whether {count} pods that other plugins attached still exist, so their addresses are \
             released only by DEL: {why}"
        )
    };
    unseen.into_values().map(problem).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_namespace_counts_as_gone_only_in_an_existing_folder() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("ns");
        assert_eq!(Presence::of(&file), Presence::Gone);
        fs::write(&file, "").unwrap();
        let Presence::Unknown(why) = Presence::of(&file) else { panic!("an empty file is no namespace") };
        let why = why.to_string();
        assert!(
            why.contains("HostToContainer") && why.contains(&folder.path().display().to_string()),
            "{why}"
        );
        let not_mounted = folder.path().join("netns/ns");
        assert!(matches!(Presence::of(&not_mounted), Presence::Unknown(_)));
        assert!(matches!(Presence::of(Path::new("")), Presence::Unknown(_)));
        assert_eq!(Presence::of(Path::new("/proc/self/ns/net")), Presence::There);
        assert_eq!(Presence::of(Path::new("/proc/0/ns/net")), Presence::Gone);
    }
}
