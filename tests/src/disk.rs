//! A small disk for a node: it survives reboots of the node, and can be filled without effects on other nodes.

use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};

/// A file system of limited size, mounted for the calling thread, its children and the nodes that it boots. It is
/// deleted with them, even if they are killed.
#[derive(Debug)]
pub struct Disk(PathBuf);

impl Disk {
    /// Creates a folder and mounts an empty disk on it.
    pub fn mount(folder: &Path, mebibytes: u32) -> Self {
        std::fs::create_dir_all(folder).expect("a folder for the disk");
        // A mount on the host would remain if this program were killed.
        unshare(CloneFlags::CLONE_NEWNS).expect("root may have mounts of its own");
        let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
        mount(None::<&str>, "/", None::<&str>, private, None::<&str>).expect("root may change its mounts");
        let size = format!("size={mebibytes}m");
        mount(Some("disk"), folder, Some("tmpfs"), MsFlags::empty(), Some(size.as_str()))
            .unwrap_or_else(|error| panic!("mount a disk on {}: {error}", folder.display()));
        Self(folder.to_owned())
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // Fails without effect on a thread other than the one that mounted it.
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}
