//! Installs the CNI plugins on the host, from the image, in an init container.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use crate::container;
use crate::file;

/// The plugin programs that a runtime executes.
pub const PLUGINS: [&str; 2] = ["polder-ipam", "polder"];

/// The `loopback` plugin that containerd calls: a link to `polder`, if the directory has no other `loopback`.
const LOOPBACK: (&str, &str) = ("loopback", "polder");

/// Default directory in which runtimes search for plugins.
pub const USUAL_FOLDER: &str = "/opt/cni/bin";

const MODE: u32 = 0o755;

/// The plugins were not installed.
#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    /// The directory of the running program is unknown.
    #[error("cannot determine the directory of polder-agent: set the directory of the plugins with --from")]
    NoSource(#[source] io::Error),
    /// A plugin to be copied cannot be read.
    #[error("cannot read the plugin {}: set the directory of the plugins with --from", path.display())]
    Read {
        /// The plugin.
        path: PathBuf,
        /// The error.
        #[source]
        source: io::Error,
    },
    /// The folder is on the container's own file system, not the host's.
    #[error(
        "{} is in the container, not on the host: mount that directory of the host there, writable (in Kubernetes: \
         hostPath with type DirectoryOrCreate)",
        .0.display()
    )]
    InContainer(PathBuf),
    /// A plugin cannot be written.
    #[error(
        "cannot write {}: make it writable (in a container: mount that directory of the host, writable), or set --to \
         to the directory where the runtime looks for plugins",
        path.display()
    )]
    Write {
        /// The path to be written.
        path: PathBuf,
        /// The error.
        #[source]
        source: io::Error,
    },
}

/// Copies the plugins from a folder (default: that of this program) to another. Each is written under a temporary name
/// with its mode, and then renamed: a runtime executes either the old or the new plugin. Correct files are not written
/// again, and a `loopback` of other software is not changed. Returns the paths of the written files.
pub fn install(from: Option<&Path>, to: &Path) -> Result<Vec<PathBuf>, InstallError> {
    let from = match from {
        Some(folder) => folder.to_owned(),
        None => std::env::current_exe().map_err(InstallError::NoSource)?.with_file_name(""),
    };
    if container::has_on_its_own_root(to) {
        return Err(InstallError::InContainer(to.to_owned()));
    }
    // Reads all of them before the first one is written.
    let read = |name: &&'static str| {
        let path = from.join(name);
        fs::read(&path)
            .map(|program| (to.join(name), program))
            .map_err(|source| InstallError::Read { path, source })
    };
    let programs = PLUGINS.iter().map(read).collect::<Result<Vec<_>, _>>()?;
    let failed = |path: &Path, source| InstallError::Write { path: path.to_owned(), source };
    fs::create_dir_all(to).map_err(|source| failed(to, source))?;
    let mut written = Vec::new();
    for (path, program) in programs.into_iter().filter(|(path, program)| !is_right(path, program)) {
        file::replace(&path, &program, MODE).map_err(|source| failed(&path, source))?;
        written.push(path);
    }
    let loopback = to.join(LOOPBACK.0);
    if !has_other(&loopback) {
        file::replace_link(&loopback, Path::new(LOOPBACK.1)).map_err(|source| failed(&loopback, source))?;
        written.push(loopback);
    }
    Ok(written)
}

/// Deletes the plugins from a folder. Returns the paths of those that existed.
pub fn remove(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let mut deleted = Vec::new();
    let loopback = folder.join(LOOPBACK.0);
    let own = fs::read_link(&loopback).is_ok_and(|to| to == Path::new(LOOPBACK.1)).then_some(loopback);
    for path in own.into_iter().chain(PLUGINS.map(|name| folder.join(name))) {
        file::delete(&file::temporary(&path))?;
        if file::delete(&path)? {
            deleted.push(path);
        }
    }
    Ok(deleted)
}

/// Whether other software has installed a plugin at the path. An absolute link may be broken here, but point to a
/// plugin on the host: only this folder is mounted.
fn has_other(path: &Path) -> bool {
    path.exists() || fs::read_link(path).is_ok_and(|to| to.is_absolute())
}

fn is_right(path: &Path, program: &[u8]) -> bool {
    let mode =
        fs::symlink_metadata(path).ok().filter(fs::Metadata::is_file).map(|found| found.permissions().mode());
    mode.is_some_and(|mode| mode & 0o7777 == MODE) && fs::read(path).is_ok_and(|found| found == program)
}
