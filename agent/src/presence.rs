//! Whether the network namespace of an attachment still exists, as far as visible to the agent: in a container only
//! mounted namespaces are visible.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::Path;

use nix::errno::Errno;
use nix::sys::statfs::{NSFS_MAGIC, statfs};
use polder_ipam::ledger::{AttachmentEntry, Kind};

use crate::container;

/// Whether a namespace exists.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Presence {
    /// It exists.
    There,
    /// It no longer exists.
    Gone,
    /// It is not visible to the agent; the reason and the remedy. Nothing may be released in this case.
    Unknown(String),
}

impl Presence {
    /// Checks the namespace at this path. An empty path means that it was never recorded.
    pub fn of(netns: &Path) -> Self {
        if netns.as_os_str().is_empty() {
            return Self::Unknown("its path is not recorded".to_owned());
        }
        match statfs(netns) {
            Ok(found) if found.filesystem_type() == NSFS_MAGIC => Self::There,
            // Without mount propagation, a namespace appears as an empty file.
            Ok(_) => Self::Unknown(format!(
                "{} is not a network namespace here: {}",
                netns.display(),
                remedy(netns)
            )),
            Err(Errno::ENOENT | Errno::ENOTDIR) => Self::of_missing(netns),
            Err(errno) => {
                let error = io::Error::from(errno);
                Self::Unknown(format!("cannot check {} ({error}): {}", netns.display(), remedy(netns)))
            }
        }
    }

    fn of_missing(netns: &Path) -> Self {
        let folder = netns.parent().unwrap_or(netns);
        if netns.starts_with("/proc") {
            // In a container, host processes have another id, or none.
            if !container::is_known() {
                return Self::Gone;
            }
            let path = netns.display();
            return Self::Unknown(format!(
                "{path} is in the host's /proc: set hostPID: true for the agent's pod"
            ));
        }
        // The folder stays when its last namespace is deleted. If it is missing, the host's folder is not visible.
        if folder.is_dir() && !container::has_on_its_own_root(folder) {
            return Self::Gone;
        }
        Self::Unknown(format!("the host's {} is not mounted here: {}", folder.display(), remedy(netns)))
    }
}

fn remedy(netns: &Path) -> String {
    format!(
        "mount the host's {} there, with mountPropagation HostToContainer",
        netns.parent().unwrap_or(netns).display()
    )
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
    let mut unseen: BTreeMap<&Path, (usize, String)> = BTreeMap::new();
    for held in attachments.filter(|held| held.kind == Kind::Lease && !held.netns.is_empty()) {
        let netns = Path::new(&held.netns);
        if let Presence::Unknown(why) = Presence::of(netns) {
            unseen.entry(netns.parent().unwrap_or(netns)).or_insert((0, why)).0 += 1;
        }
    }
    let problem = |(count, why)| {
        format!(
            "cannot check whether {count} pods that other plugins attached still exist, so their addresses are released \
             only by DEL: {why}"
        )
    };
    unseen.into_values().map(problem).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_namespace_is_gone_only_where_it_would_be_seen() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("ns");
        assert_eq!(Presence::of(&file), Presence::Gone);
        fs::write(&file, "").unwrap();
        let Presence::Unknown(why) = Presence::of(&file) else { panic!("an empty file is no namespace") };
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
