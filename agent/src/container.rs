//! The container that the agent may run in: files on its own root file system are lost when it ends.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// File systems whose writable layer exists only for one container or one run of a machine.
const LAYERED: [&str; 2] = ["overlay", "aufs"];

/// Environment variable set by container managers and by Polder's image: systemd's container interface,
/// <https://systemd.io/CONTAINER_INTERFACE>.
const VARIABLE: &str = "container";

/// The state directory is not used.
#[derive(Debug, thiserror::Error)]
pub enum StateRefused {
    /// The directory has no mount of its own in the container, so it is deleted with the container.
    #[error(
        "state_dir {folder} is on the root file system of the container: its ledger would be lost with the container. \
         Mount {folder} of the host there, or set allow_ephemeral_state = true in the configuration if the ledger may \
         be lost",
        folder = folder.display()
    )]
    Lost {
        /// The directory.
        folder: PathBuf,
    },
}

/// Whether this program runs in a container, according to [`VARIABLE`].
pub fn is_known() -> bool {
    std::env::var_os(VARIABLE).is_some_and(|kind| !kind.is_empty())
}

/// Refuses a state folder that would be lost with the container, unless `allowed`.
pub fn refuse_lost_state(folder: &Path, allowed: bool) -> Result<(), StateRefused> {
    if allowed || !loses(folder) {
        return Ok(());
    }
    Err(StateRefused::Lost { folder: folder.to_owned() })
}

/// Whether files in that folder are lost with the container: the folder is on the root file system, without a mount of
/// its own, and that root is layered or a container's. The folder need not exist yet.
fn loses(folder: &Path) -> bool {
    root_holding(folder).is_some_and(|kind| is_known() || LAYERED.contains(&kind.as_str()))
}

/// Whether that folder is in the container itself, not mounted from the host. The folder need not exist yet.
pub fn has_on_its_own_root(folder: &Path) -> bool {
    is_known() && root_holding(folder).is_some()
}

/// Whether later mounts of the host in that folder appear here, too (mount propagation, `mount_namespaces(7)`).
pub fn follows_the_host(folder: &Path) -> bool {
    let Ok(table) = fs::read_to_string("/proc/self/mountinfo") else { return true };
    let line =
        table.lines().rfind(|line| line.split(' ').nth(4).is_some_and(|point| unescaped(point) == folder));
    line.is_none_or(is_followed)
}

fn is_followed(line: &str) -> bool {
    let fields = line.split(" - ").next().unwrap_or_default().split(' ').skip(6);
    fields.into_iter().any(|field| field.starts_with("master:") || field.starts_with("shared:"))
}

/// The type of the root file system, if the folder is on it.
fn root_holding(folder: &Path) -> Option<String> {
    // Two mounts of one file system have the same device: only the mount table distinguishes them.
    let table = fs::read_to_string("/proc/self/mountinfo").ok()?;
    let existing = folder.ancestors().find_map(|path| path.canonicalize().ok())?;
    let (point, kind) = mount_of(&table, &existing)?;
    (point == Path::new("/")).then_some(kind)
}

/// The mount point of a path and its type: the longest mount point that is a prefix of the path; of several mounts at
/// the same place the last one, which covers the others. The format is that of proc(5).
fn mount_of(table: &str, path: &Path) -> Option<(PathBuf, String)> {
    let mounts = table.lines().filter_map(|line| {
        let (before, after) = line.split_once(" - ")?;
        let point = unescaped(before.split(' ').nth(4)?);
        Some((point, after.split(' ').next()?.to_owned()))
    });
    mounts.filter(|(point, _)| path.starts_with(point)).max_by_key(|(point, _)| point.components().count())
}

/// Decodes a path of the mount table, in which blanks and some other characters are `\` and three octal digits.
fn unescaped(text: &str) -> PathBuf {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((first, more)) = rest.split_first() {
        let octal = more.get(..3).and_then(|digits| std::str::from_utf8(digits).ok());
        let escaped = octal.filter(|_| *first == b'\\').and_then(|digits| u8::from_str_radix(digits, 8).ok());
        bytes.push(escaped.unwrap_or(*first));
        rest = if escaped.is_some() { &more[3..] } else { more };
    }
    PathBuf::from(std::ffi::OsStr::from_bytes(&bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &str = "\
21 1 0:19 / / rw,relatime - rootfs rootfs rw
600 21 0:52 / / ro,relatime master:1 - overlay overlay rw,lowerdir=/l,upperdir=/u
601 600 0:55 / /proc rw,nosuid - proc proc rw
602 600 8:1 /var/lib/polder /var/lib/polder rw,relatime - ext4 /dev/sda1 rw
603 600 8:1 /with\\040blank /mnt/with\\040blank rw - ext4 /dev/sda1 rw
";

    fn found(path: &str) -> (String, String) {
        let (point, kind) = mount_of(TABLE, Path::new(path)).unwrap();
        (point.display().to_string(), kind)
    }

    #[test]
    fn a_mounted_folder_is_distinguished_from_one_on_the_container_root() {
        let on = |point: &str, kind: &str| (point.to_owned(), kind.to_owned());
        assert_eq!(found("/var/lib/polder"), on("/var/lib/polder", "ext4"));
        assert_eq!(found("/var/lib/polder/sub"), on("/var/lib/polder", "ext4"));
        assert_eq!(found("/var/lib/polder-2"), on("/", "overlay"), "not a folder in the other");
        assert_eq!(found("/var/lib"), on("/", "overlay"));
        assert_eq!(found("/mnt/with blank/x"), on("/mnt/with blank", "ext4"));
    }

    #[test]
    fn a_mount_with_propagation_from_the_host_is_recognised() {
        let line =
            |options: &str| format!("604 600 0:26 /netns /run/netns rw,nosuid{options} - tmpfs tmpfs rw");
        assert!(is_followed(&line(" master:12")) && is_followed(&line(" shared:3 master:12")));
        assert!(!is_followed(&line("")));
    }

    #[test]
    fn a_path_without_escapes_is_unchanged() {
        assert_eq!(unescaped("/a\\b\\9"), Path::new("/a\\b\\9"));
    }
}
