//! Network namespaces: entered only to open something in them.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nix::sched::{CloneFlags, setns, unshare};

/// The namespace of the calling thread.
const OWN: &str = "/proc/thread-self/ns/net";

/// Which namespace it is: two paths lead to the same one exactly if these are equal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct NamespaceId {
    device: u64,
    inode: u64,
}

impl NamespaceId {
    /// That of an open namespace file.
    pub fn of(namespace: &File) -> io::Result<Self> {
        let metadata = namespace.metadata()?;
        Ok(Self { device: metadata.dev(), inode: metadata.ino() })
    }

    /// That of the calling thread.
    pub fn own() -> io::Result<Self> {
        Self::of(&File::open(OWN)?)
    }
}

/// Opens the namespace at `path`.
pub fn open(path: &Path) -> io::Result<File> {
    File::open(path)
}

/// Runs `job` in `namespace` on the calling thread, and comes back, even from a panic.
///
/// Nothing may be awaited in `job`, and nothing in it may outlive it on this thread.
pub fn within<T>(namespace: impl AsFd, job: impl FnOnce() -> T) -> io::Result<T> {
    let _home = Home(File::open(OWN)?);
    setns(namespace, CloneFlags::CLONE_NEWNET)?;
    Ok(job())
}

/// The namespace to go back to.
struct Home(File);

impl Drop for Home {
    /// If the way back is barred, nothing may run here any more: it would program the wrong machine.
    fn drop(&mut self) {
        setns(&self.0, CloneFlags::CLONE_NEWNET).expect("the way back into the own network namespace");
    }
}

/// Runs `job` on a thread of its own in a new, empty network namespace, which ends with it.
pub fn in_a_new_one<T: Send>(job: impl FnOnce() -> T + Send) -> io::Result<T> {
    std::thread::scope(|scope| {
        let inside = scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET)?;
            Ok(job())
        });
        inside.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}
