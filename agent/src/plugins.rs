//! Installs the CNI plugins on the host, from the image, in an init container.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use crate::container;
use crate::file;

/// The programs that a runtime calls.
pub const PLUGINS: [&str; 2] = ["polder-ipam", "polder"];

/// The `loopback` plugin that containerd calls: a link to `polder`, if the directory has no other.
const LOOPBACK: (&str, &str) = ("loopback", "polder");

/// Where runtimes look for plugins, unless they are told another place.
pub const USUAL_FOLDER: &str = "/opt/cni/bin";

const MODE: u32 = 0o755;

/// The plugins were not installed.
#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    /// It is not known where they are.
    #[error("cannot determine the directory of polder-agent: set the directory of the plugins with --from")]
    NoSource(#[source] io::Error),
    /// A plugin is not where it should be copied from.
    #[error("cannot read the plugin {}: set the directory of the plugins with --from", path.display())]
    Read {
        /// The plugin.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The folder is the container's own.
    #[error(
        "{} is in the container, not on the host: mount that directory of the host there, writable (in Kubernetes: \
         hostPath with type DirectoryOrCreate)",
        .0.display()
    )]
    InContainer(PathBuf),
    /// A plugin cannot be written.
    #[error(
        "cannot write {}: make it writable (in a container: mount that directory of the host, writable), or set --to to \
         the directory where the runtime looks for plugins",
        path.display()
    )]
    Write {
        /// What was to be written.
        path: PathBuf,
        /// Why it was not.
        #[source]
        source: io::Error,
    },
}

/// Copies the plugins from one folder, or from where this program is, to another, each under another name first and then
/// renamed, with its mode: a runtime that calls it finds the old one or the new one. One that is right already is left
/// alone, and so is a `loopback` of others. Returns the paths of what was written.
pub fn install(from: Option<&Path>, to: &Path) -> Result<Vec<PathBuf>, InstallError> {
    let from = match from {
        Some(folder) => folder.to_owned(),
        None => std::env::current_exe().map_err(InstallError::NoSource)?.with_file_name(""),
    };
    if container::has_on_its_own_root(to) {
        return Err(InstallError::InContainer(to.to_owned()));
    }
    // All of them are read before the first one is written.
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

/// Deletes the plugins from a folder. Returns the paths of those that were there.
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

/// Whether there is a plugin of others. A link to a place outside of the folder may lead nowhere here and to a plugin on the host,
/// where this folder alone is mounted.
fn has_other(path: &Path) -> bool {
    path.exists() || fs::read_link(path).is_ok_and(|to| to.is_absolute())
}

fn is_right(path: &Path, program: &[u8]) -> bool {
    let mode =
        fs::symlink_metadata(path).ok().filter(fs::Metadata::is_file).map(|found| found.permissions().mode());
    mode.is_some_and(|mode| mode & 0o7777 == MODE) && fs::read(path).is_ok_and(|found| found == program)
}
