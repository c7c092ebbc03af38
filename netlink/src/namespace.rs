//! Network namespaces: opens them, compares them and runs jobs in them.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nix::sched::{CloneFlags, setns, unshare};

/// The network namespace of the calling thread.
const OWN: &str = "/proc/thread-self/ns/net";

/// The identity of a namespace (device and inode): two paths refer to the same namespace exactly if these are equal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct NamespaceId {
    device: u64,
    inode: u64,
}

impl NamespaceId {
    /// The identity of an open namespace file.
    pub fn of(namespace: &File) -> io::Result<Self> {
        let metadata = namespace.metadata()?;
        Ok(Self { device: metadata.dev(), inode: metadata.ino() })
    }

    /// The identity of the calling thread's namespace.
    pub fn own() -> io::Result<Self> {
        Self::of(&File::open(OWN)?)
    }
}

/// Opens the namespace at `path`.
pub fn open(path: &Path) -> io::Result<File> {
    File::open(path)
}

/// Runs `job` in `namespace` on the calling thread, then returns to the previous namespace, also after a panic.
///
/// `job` must not await, and must leave nothing running on this thread.
pub fn within<T>(namespace: impl AsFd, job: impl FnOnce() -> T) -> io::Result<T> {
    let _home = Home(File::open(OWN)?);
    setns(namespace, CloneFlags::CLONE_NEWNET)?;
    Ok(job())
}

/// The namespace to return to.
struct Home(File);

impl Drop for Home {
    /// Panics if it cannot return: code on this thread would then change the wrong namespace.
    fn drop(&mut self) {
        setns(&self.0, CloneFlags::CLONE_NEWNET).expect("return to the own network namespace");
    }
}

/// Runs `job` on its own thread in a new, empty network namespace, which is deleted afterwards.
pub fn run_in_new<T: Send>(job: impl FnOnce() -> T + Send) -> io::Result<T> {
    std::thread::scope(|scope| {
        let inside = scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET)?;
            Ok(job())
        });
        inside.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}
