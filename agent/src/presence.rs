//! Whether the network namespace that an attachment was made in still exists, as far as the agent can see it from where it
//! runs: in a container it sees those that are mounted into it.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::Path;

use nix::errno::Errno;
use nix::sys::statfs::{NSFS_MAGIC, statfs};
use polder_ipam::ledger::{Held, Kind};

use crate::container;

/// What is known of a namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Presence {
    /// It is there.
    There,
    /// It is not there any more.
    Gone,
    /// It cannot be seen from here; why, and what to do. Nothing may be released because of that.
    Unknown(String),
}

impl Presence {
    /// That of the namespace at this path. Of one whose path was never known nothing is known, either.
    pub fn of(netns: &Path) -> Self {
        if netns.as_os_str().is_empty() {
            return Self::Unknown("it is not known where it is".to_owned());
        }
        match statfs(netns) {
            Ok(found) if found.filesystem_type() == NSFS_MAGIC => Self::There,
            // Where the mount of a namespace is not seen, its name comes and goes all the same, as an empty file.
            Ok(_) => {
                Self::Unknown(format!("{} is no network namespace here: {}", netns.display(), remedy(netns)))
            }
            Err(Errno::ENOENT | Errno::ENOTDIR) => Self::of_missing(netns),
            Err(errno) => {
                let error = io::Error::from(errno);
                Self::Unknown(format!("{} cannot be looked at ({error}): {}", netns.display(), remedy(netns)))
            }
        }
    }

    fn of_missing(netns: &Path) -> Self {
        let folder = netns.parent().unwrap_or(netns);
        if netns.starts_with("/proc") {
            // Processes of the host have no number in a container, or another one.
            if !container::is_known() {
                return Self::Gone;
            }
            let path = netns.display();
            return Self::Unknown(format!(
                "{path} is a path of the host's /proc: let the agent have hostPID"
            ));
        }
        // The folder stays when the last namespace in it goes. Without it, it is not the host's that is seen.
        if folder.is_dir() && !container::has_on_its_own_root(folder) {
            return Self::Gone;
        }
        Self::Unknown(format!("{} of the host is not here: {}", folder.display(), remedy(netns)))
    }
}

fn remedy(netns: &Path) -> String {
    format!(
        "mount {} of the host there, with mountPropagation HostToContainer",
        netns.parent().unwrap_or(netns).display()
    )
}

/// Where container runtimes have the namespaces of their pods.
const USUAL_FOLDER: &str = "/run/netns";

/// Whether a container runtime may have pods: a namespace is there, or it is not seen where they would be.
pub fn may_be_there() -> bool {
    let folder = fs::read_dir(USUAL_FOLDER).map(|mut names| names.next().is_some());
    not_seen().is_some() || folder.unwrap_or_else(|error| error.kind() != io::ErrorKind::NotFound)
}

/// What is not seen of pods' namespaces, and why, in a container that was not given the host's.
pub fn not_seen() -> Option<String> {
    let folder = Path::new(USUAL_FOLDER);
    if !container::is_known() {
        return None;
    }
    let missing = if container::has_on_its_own_root(folder) {
        "is not here"
    } else if container::follows_the_host(folder) {
        return None;
    } else {
        "is mounted without the namespaces that are made later"
    };
    Some(format!(
        "pods that other plugins attach are not seen, so their addresses are released by DEL alone: {USUAL_FOLDER} of the host \
         {missing}: {}",
        remedy(&folder.join("pod"))
    ))
}

/// What is to be said of the namespaces that cannot be seen and that addresses depend on: once for each folder.
pub fn problems<'a>(attachments: impl Iterator<Item = &'a Held>) -> Vec<String> {
    let mut unseen: BTreeMap<&Path, (usize, String)> = BTreeMap::new();
    for held in attachments.filter(|held| held.kind == Kind::Lease && !held.netns.is_empty()) {
        let netns = Path::new(&held.netns);
        if let Presence::Unknown(why) = Presence::of(netns) {
            unseen.entry(netns.parent().unwrap_or(netns)).or_insert((0, why)).0 += 1;
        }
    }
    let problem = |(count, why)| {
        format!(
            "whether {count} pods that other plugins attached still live cannot be told, so none of their addresses is released \
             without a DEL: {why}"
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
