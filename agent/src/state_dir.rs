//! The agent's state directory: file names, and the lock that keeps other agents out.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::{Context, bail};
use nix::fcntl::{Flock, FlockArg};

/// The ledger's file.
pub const LEDGER: &str = "ledger.db";

/// File of the embedded store.
pub const STORE: &str = "store.db";

/// Copy of the CNI configuration as last written by the agent, without changes of other software.
pub const CONFLIST: &str = "conflist.json";

/// Creates the state directory and locks it against other agents.
pub fn lock(folder: &Path) -> anyhow::Result<Flock<fs::File>> {
    let writable = || format!("state_dir {}: cannot be written", folder.display());
    fs::create_dir_all(folder).with_context(writable)?;
    fs::set_permissions(folder, fs::Permissions::from_mode(0o700)).with_context(writable)?;
    let file = fs::File::create(folder.join("lock")).with_context(writable)?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(lock),
        Err((_, nix::errno::Errno::EWOULDBLOCK)) => {
            bail!("state_dir {}: another polder-agent uses it", folder.display())
        }
        Err((_, errno)) => Err(errno).with_context(writable),
    }
}
