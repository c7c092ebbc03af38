//! Atomic replacement of a file: a reader sees either the complete old file or the complete new one.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// Writes the file under a temporary name in the same folder, with its mode, and renames it. Some runtimes notice a
/// rename, but not a write or a change of the mode.
pub fn replace(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    let temporary = temporary(path);
    let written = write(&temporary, content, mode).and_then(|()| fs::rename(&temporary, path));
    if written.is_err() {
        // Deleted, because the disk may be full.
        let _ = fs::remove_file(&temporary);
    }
    written
}

/// Replaces the file of that name by a symbolic link.
pub fn replace_link(path: &Path, to: &Path) -> io::Result<()> {
    let temporary = temporary(path);
    delete(&temporary)?;
    std::os::unix::fs::symlink(to, &temporary)?;
    fs::rename(&temporary, path)
}

fn write(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(mode).open(path)?;
    file.write_all(content)?;
    // Independent of the umask and of the mode of an old temporary file.
    file.set_permissions(fs::Permissions::from_mode(mode))?;
    file.sync_all()
}

/// Path of the incomplete file: a hidden name, which runtimes do not read.
pub fn temporary(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.new"))
}

/// Deletes a file. Returns whether it existed.
pub fn delete(path: &Path) -> io::Result<bool> {
    match fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_replaced_with_its_mode_and_no_temporary_file_remains() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("program");
        fs::write(&path, "old").unwrap();
        fs::write(temporary(&path), "left by one that was killed, and longer").unwrap();
        replace(&path, b"new", 0o755).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "new");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o755);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_failed_replacement_leaves_the_target_and_no_temporary_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("program");
        fs::create_dir(&path).unwrap();
        assert!(replace(&path, b"new", 0o755).is_err());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
