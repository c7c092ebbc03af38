//! The CNI configuration, put in place when the node can really serve, and never half written.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

/// Runtimes take the first file by name; `10-` leaves room before it for who knows better.
const FILE: &str = "10-polder.conflist";

/// Writes the configuration into `folder`, atomically: a runtime sees the old file or the new one. Runtimes notice
/// a rename, and some of them nothing else. A file that is right already is left alone. Returns whether it was written.
pub fn write(folder: &Path, socket: &Path) -> io::Result<bool> {
    let path = folder.join(FILE);
    let text = text(socket);
    if fs::read_to_string(&path).is_ok_and(|found| found == text) {
        return Ok(false);
    }
    fs::create_dir_all(folder)?;
    let temporary = temporary(folder);
    let mut file =
        fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o644).open(&temporary)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    fs::rename(&temporary, &path)?;
    Ok(true)
}

/// Writes the configuration into `folder` if it is not there, or says nothing of us any more. What others have added to it is
/// left alone. Returns whether it was written.
pub fn keep(folder: &Path, socket: &Path) -> io::Result<bool> {
    if is_ours(folder, socket) {
        return Ok(false);
    }
    write(folder, socket)
}

/// Why a runtime finds no network, and what to do.
pub fn cannot_write(folder: &Path, error: &io::Error) -> String {
    format!(
        "the CNI configuration {} cannot be written: {error}. Without it the runtime finds no network. Let polder-agent write \
         there (in a container: mount that folder of the host, writable), or name the folder that the runtime reads with \
         cni_conf_dir in the configuration",
        folder.join(FILE).display()
    )
}

/// Whether the file in `folder` is a list with our plugin, which asks the agent at that socket.
fn is_ours(folder: &Path, socket: &Path) -> bool {
    let Ok(text) = fs::read(folder.join(FILE)) else { return false };
    let Ok(list) = serde_json::from_slice::<Value>(&text) else { return false };
    let is_text = |key: &str| list[key].as_str().is_some_and(|text| !text.is_empty());
    let mut plugins = list["plugins"].as_array().into_iter().flatten();
    is_text("name")
        && is_text("cniVersion")
        && plugins.any(|plugin| plugin["type"] == "polder" && plugin["socket"] == json!(socket))
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
        assert!(write(&target, Path::new("/elsewhere.sock")).unwrap());
        let list: Value = serde_json::from_str(&fs::read_to_string(target.join(FILE)).unwrap()).unwrap();
        assert_eq!(list["plugins"][0]["socket"], "/elsewhere.sock");
        assert_eq!(fs::read_dir(&target).unwrap().count(), 1);
    }

    #[test]
    fn a_file_that_is_gone_or_damaged_is_written_again_and_one_with_additions_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let socket = Path::new("/run/polder/agent.sock");
        let whole = text(socket);
        let file = folder.path().join(FILE);
        assert!(keep(folder.path(), socket).unwrap(), "there was none");
        for damaged in [
            String::new(),
            "garbage".to_owned(),
            whole[..whole.len() / 2].to_owned(),
            "{}".to_owned(),
            whole.replace("\"type\": \"polder\"", "\"type\": \"bridge\""),
            whole.replace("agent.sock", "other.sock"),
            whole.replace("plugins", "plugs"),
        ] {
            fs::write(&file, &damaged).unwrap();
            assert!(keep(folder.path(), socket).unwrap(), "{damaged}");
            assert_eq!(fs::read_to_string(&file).unwrap(), whole, "{damaged}");
        }
        let more = whole.replace("\"plugins\": [", "\"plugins\": [{ \"type\": \"portmap\" },");
        assert_ne!(more, whole);
        fs::write(&file, &more).unwrap();
        assert!(!keep(folder.path(), socket).unwrap());
        assert_eq!(fs::read_to_string(&file).unwrap(), more);
    }

    #[test]
    fn a_folder_that_cannot_be_written_is_named_with_the_reason_and_the_remedy() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        fs::write(&file, "").unwrap();
        let error = keep(&file, Path::new("/s")).unwrap_err();
        let said = cannot_write(&file, &error);
        for sign in ["file/10-polder.conflist", "(os error", "cni_conf_dir"] {
            assert!(said.contains(sign), "{said}");
        }
    }

    #[test]
    fn a_file_that_is_right_is_left_alone() {
        use std::os::unix::fs::MetadataExt;
        let folder = tempfile::tempdir().unwrap();
        let inode = |path: &Path| fs::metadata(path).unwrap().ino();
        let (path, socket) = (folder.path().join(FILE), Path::new("/run/polder/agent.sock"));
        assert!(write(folder.path(), socket).unwrap());
        let before = inode(&path);
        assert!(!write(folder.path(), socket).unwrap());
        assert_eq!(inode(&path), before);
    }
}
