//! The CNI configuration, put in place when the node can really serve, and never half written.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde_json::json;

/// Runtimes take the first file by name; `10-` leaves room before it for who knows better.
const FILE: &str = "10-polder.conflist";

/// Writes the configuration into `folder`, atomically: a runtime sees the old file or the new one. Runtimes notice
/// a rename, and some of them nothing else. A file that is right already is left alone.
pub fn write(folder: &Path, socket: &Path) -> io::Result<PathBuf> {
    let path = folder.join(FILE);
    let text = text(socket);
    if fs::read_to_string(&path).is_ok_and(|found| found == text) {
        return Ok(path);
    }
    fs::create_dir_all(folder)?;
    let temporary = temporary(folder);
    let mut file =
        fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o644).open(&temporary)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    fs::rename(&temporary, &path)?;
    Ok(path)
}

/// Deletes the configuration from `folder`, and what was left of writing it. Returns whether it was there.
pub fn remove(folder: &Path) -> io::Result<bool> {
    let delete = |path| match fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    };
    delete(temporary(folder))?;
    delete(folder.join(FILE))
}

/// Where it is written before it is whole.
fn temporary(folder: &Path) -> PathBuf {
    folder.join(format!(".{FILE}.new"))
}

fn text(socket: &Path) -> String {
    let list = json!({
        // The version that runtimes since 2021 speak; newer ones choose from the list.
        "cniVersion": "1.0.0",
        "cniVersions": ["0.3.1", "0.4.0", "1.0.0", "1.1.0"],
        "name": "polder",
        "plugins": [{
            "type": "polder",
            "socket": socket,
            "capabilities": { "ips": true, "mac": true, "io.kubernetes.cri.pod-annotations": true },
        }],
    });
    format!("{list:#}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_appears_whole_and_nothing_else_is_left() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("net.d");
        let path = write(&target, Path::new("/elsewhere.sock")).unwrap();
        let list: serde_json::Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
        assert_eq!(list["plugins"][0]["socket"], "/elsewhere.sock");
        assert_eq!(fs::read_dir(&target).unwrap().count(), 1);
    }

    #[test]
    fn a_file_that_is_right_is_left_alone() {
        use std::os::unix::fs::MetadataExt;
        let folder = tempfile::tempdir().unwrap();
        let inode = |path: &Path| fs::metadata(path).unwrap().ino();
        let path = write(folder.path(), Path::new("/run/polder/agent.sock")).unwrap();
        let before = inode(&path);
        write(folder.path(), Path::new("/run/polder/agent.sock")).unwrap();
        assert_eq!(inode(&path), before);
    }
}
