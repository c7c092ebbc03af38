//! The agent's state directory: file names, and the lock that keeps other agents out.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::{fs, io};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

/// The ledger's file.
pub const LEDGER: &str = "ledger.db";

/// File of the embedded store.
pub const STORE: &str = "store.db";

/// Copy of the CNI configuration as last written by the agent, without changes of other software.
pub const CONFLIST: &str = "conflist.json";

/// The labels and addresses of the Node object of Kubernetes, as last read.
pub const NODE_OBJECT: &str = "node-object.json";

/// The state directory was not locked for this process.
#[derive(Debug, thiserror::Error)]
pub enum StateNotLocked {
    /// The directory, its mode or the file `lock` in it cannot be created or changed.
    /// Remedy: make the directory writable for root (in a container: mount it writable), and check the free disk space.
    #[error("state_dir {}: cannot be written", folder.display())]
    Write {
        /// The directory.
        folder: PathBuf,
        /// The error.
        #[source]
        source: io::Error,
    },
    /// The kernel or the file system refused to lock the file `lock` in the directory.
    /// Remedy: set `state_dir` to a directory on a local file system, which supports `flock(2)`.
    #[error("state_dir {}: cannot be written", folder.display())]
    Lock {
        /// The directory.
        folder: PathBuf,
        /// The error.
        #[source]
        errno: Errno,
    },
    /// Another process has locked the directory.
    #[error(
        "state_dir {}: another polder-agent uses it: stop that agent, or set another state_dir if this agent is for \
         another network namespace",
        folder.display()
    )]
    InUse {
        /// The directory.
        folder: PathBuf,
    },
}

/// Creates the state directory and locks it against other agents.
pub fn lock(folder: &Path) -> Result<Flock<fs::File>, StateNotLocked> {
    let write = |source| StateNotLocked::Write { folder: folder.to_owned(), source };
    fs::create_dir_all(folder).map_err(write)?;
    fs::set_permissions(folder, fs::Permissions::from_mode(0o700)).map_err(write)?;
    let file = fs::File::create(folder.join("lock")).map_err(write)?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(lock),
        Err((_, Errno::EWOULDBLOCK)) => Err(StateNotLocked::InUse { folder: folder.to_owned() }),
        Err((_, errno)) => Err(StateNotLocked::Lock { folder: folder.to_owned(), errno }),
    }
}
