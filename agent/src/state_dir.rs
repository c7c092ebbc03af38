//! The folder of the agent's state: what is in it, and that one agent alone uses it.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::{Context, bail};
use nix::fcntl::{Flock, FlockArg};

/// The ledger's file.
pub const LEDGER: &str = "ledger.db";

/// The file of a store of this node's own.
pub const STORE: &str = "store.db";

/// The CNI configuration as an agent wrote it last, without what others have added to it.
pub const CONFLIST: &str = "conflist.json";

/// Makes the state folder, and makes sure that no other agent uses it.
pub fn lock(folder: &Path) -> anyhow::Result<Flock<fs::File>> {
    let writable = || format!("state_dir {}: can the agent write there?", folder.display());
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
