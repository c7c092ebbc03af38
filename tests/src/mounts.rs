//! Mounts for the first process of a machine of the lab.

use std::path::Path;

use anyhow::Context;
use nix::mount::{MsFlags, mount};

/// Mounts a new file system of that kind.
pub fn mount_new(kind: &str, target: impl AsRef<Path>, data: Option<&str>) -> anyhow::Result<()> {
    let target = target.as_ref();
    mount(Some(kind), target, Some(kind), MsFlags::empty(), data)
        .with_context(|| format!("mount {kind} on {}", target.display()))
}

/// Creates a bind mount.
pub fn bind(source: &Path, target: &Path, more: MsFlags) -> anyhow::Result<()> {
    mount(Some(source), target, None::<&str>, MsFlags::MS_BIND | more, None::<&str>)
        .with_context(|| format!("bind {} to {}", source.display(), target.display()))
}

/// Makes all mounts private: mounts of the node and of the host do not propagate to each other.
pub fn keep_apart() -> anyhow::Result<()> {
    let flags = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(None::<&str>, "/", None::<&str>, flags, None::<&str>).context("change /")
}
