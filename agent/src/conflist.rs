//! The CNI configuration, put in place when the node can really serve, and never half written.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use polder_api::NetworkName;
use polder_ipam::cause::Cause;
use serde_json::{Value, json};

use crate::file;

/// The versions of CNI that our plugins speak and runtimes since 2021 ask for, oldest first.
pub static VERSIONS: [&str; 4] = ["0.3.1", "0.4.0", "1.0.0", "1.1.0"];

/// The version for runtimes that do not choose from a list.
const USUAL_VERSION: &str = "1.0.0";

/// What our plugin takes from the runtime.
pub const OWN_CAPABILITIES: [&str; 3] = ["ips", "mac", "io.kubernetes.cri.pod-annotations"];

/// What the configuration says of the network that is announced.
#[derive(Debug, Clone)]
pub struct Network {
    /// Its name, unless it is the usual one.
    pub name: Option<NetworkName>,
    /// The versions of CNI that are offered, oldest first.
    pub versions: &'static [&'static str],
    /// The plugins that the runtime calls after ours, as they are to be in the file.
    pub chain: Vec<Value>,
}

/// Why a runtime finds no network.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotWritten {
    /// The engine has not come to it.
    #[error("the CNI configuration is not written yet")]
    NotYet,
    /// The file cannot be written.
    #[error(
        "the CNI configuration {} cannot be written: {error}. Without it the runtime finds no network. Let polder-agent write \
         there (in a container: mount that folder of the host, writable), or name the folder that the runtime reads with \
         cni_conf_dir in the configuration",
        file.display()
    )]
    Refused {
        /// The file.
        file: PathBuf,
        /// What the file system says.
        #[source]
        error: Cause,
    },
}

/// The file, and what is to be in it.
#[derive(Debug)]
pub struct Conflist<'a> {
    path: &'a Path,
    socket: &'a Path,
    network: &'a Network,
}

impl<'a> Conflist<'a> {
    /// The configuration at `path`, of the agent that is asked at `socket`.
    pub fn new(path: &'a Path, socket: &'a Path, network: &'a Network) -> Self {
        Self { path, socket, network }
    }

    /// Writes it, atomically: a runtime sees the old file or the new one. A file that is right already is left alone. Returns
    /// whether it was written.
    pub fn write(&self) -> io::Result<bool> {
        if self.is_written() {
            return Ok(false);
        }
        fs::create_dir_all(self.path.parent().unwrap_or(Path::new("/")))?;
        file::replace(self.path, self.text().as_bytes(), 0o644)?;
        Ok(true)
    }

    /// Whether the file is there, just as it would be written.
    pub fn is_written(&self) -> bool {
        fs::read_to_string(self.path).is_ok_and(|found| found == self.text())
    }

    /// Writes it if it is not there, or says nothing of us any more. What others have added to it is left alone. Returns
    /// whether it was written.
    pub fn keep(&self) -> io::Result<bool> {
        if self.is_ours(self.path) {
            return Ok(false);
        }
        self.write()
    }

    /// Other files beside it that name our plugin and our socket, like the one that was written under another name. A runtime
    /// takes the first by name.
    pub fn others(&self) -> Vec<PathBuf> {
        let folder = self.path.parent().and_then(|folder| fs::read_dir(folder).ok());
        let files = folder.into_iter().flatten().flatten().map(|entry| entry.path());
        let is_list = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "conflist");
        files.filter(|path| path != self.path && is_list(path) && self.is_ours(path)).collect()
    }

    /// Why a runtime finds no network, where writing it has ended so.
    pub fn not_written(&self, error: io::Error) -> NotWritten {
        NotWritten::Refused { file: self.path.to_owned(), error: Cause::new(error) }
    }

    /// Whether the file is a list with our plugin, which asks the agent at our socket.
    fn is_ours(&self, path: &Path) -> bool {
        let Ok(text) = fs::read(path) else { return false };
        let Ok(list) = serde_json::from_slice::<Value>(&text) else { return false };
        let is_text = |key: &str| list[key].as_str().is_some_and(|text| !text.is_empty());
        let mut plugins = list["plugins"].as_array().into_iter().flatten();
        is_text("name")
            && is_text("cniVersion")
            && plugins.any(|plugin| plugin["type"] == "polder" && plugin["socket"] == json!(self.socket))
    }

    fn text(&self) -> String {
        let Network { name, versions, chain } = self.network;
        let newest = versions.last().copied().unwrap_or(USUAL_VERSION);
        let capabilities: serde_json::Map<_, _> =
            OWN_CAPABILITIES.iter().map(|name| ((*name).to_owned(), Value::Bool(true))).collect();
        let own = json!({ "type": "polder", "socket": self.socket, "capabilities": capabilities });
        let plugins: Vec<Value> = std::iter::once(own).chain(chain.iter().cloned()).collect();
        let list = json!({
            "cniVersion": newest.min(USUAL_VERSION),
            "cniVersions": versions,
            "name": name.as_ref().map_or("polder", NetworkName::as_str),
            "plugins": plugins,
        });
        format!("{list:#}\n")
    }
}

/// Deletes the configuration, and what was left of writing it. Returns whether it was there.
pub fn remove(path: &Path) -> io::Result<bool> {
    file::delete(&file::temporary(path))?;
    file::delete(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOCKET: &str = "/run/polder/agent.sock";

    fn network(chain: Vec<Value>) -> Network {
        Network { name: None, versions: &VERSIONS, chain }
    }

    /// The configuration in a folder, with no other plugins.
    struct At(PathBuf, Network);

    impl At {
        fn conflist(&self) -> Conflist<'_> {
            Conflist::new(&self.0, Path::new(SOCKET), &self.1)
        }
    }

    fn at(folder: &Path) -> At {
        At(folder.join("10-polder.conflist"), network(Vec::new()))
    }

    #[test]
    fn the_file_appears_whole_and_nothing_else_is_left() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("net.d");
        assert!(at(&target).conflist().write().unwrap());
        let text = fs::read_to_string(target.join("10-polder.conflist")).unwrap();
        let list: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(list["plugins"][0]["socket"], SOCKET);
        assert_eq!(
            (&list["cniVersion"], list["cniVersions"].as_array().unwrap().len()),
            (&json!("1.0.0"), 4)
        );
        assert_eq!(fs::read_dir(&target).unwrap().count(), 1);
    }

    #[test]
    fn other_plugins_come_after_ours_and_older_ones_are_not_offered_a_newer_version() {
        let portmap = json!({ "type": "portmap", "capabilities": { "portMappings": true } });
        let network = Network {
            name: Some("pods".parse().unwrap()),
            versions: &VERSIONS[..2],
            chain: vec![portmap.clone()],
        };
        let text = Conflist::new(Path::new("/x"), Path::new(SOCKET), &network).text();
        let list: Value = serde_json::from_str(&text).unwrap();
        assert_eq!((&list["name"], &list["cniVersion"]), (&json!("pods"), &json!("0.4.0")));
        assert_eq!(list["cniVersions"], json!(["0.3.1", "0.4.0"]));
        assert_eq!((&list["plugins"][0]["type"], &list["plugins"][1]), (&json!("polder"), &portmap));
    }

    #[test]
    fn a_file_of_ours_under_another_name_is_found() {
        let folder = tempfile::tempdir().unwrap();
        at(folder.path()).conflist().write().unwrap();
        fs::write(folder.path().join("05-other.conflist"), "{}").unwrap();
        let (path, network) = (folder.path().join("20-pods.conflist"), network(Vec::new()));
        let conflist = Conflist::new(&path, Path::new(SOCKET), &network);
        conflist.write().unwrap();
        assert_eq!(conflist.others(), [folder.path().join("10-polder.conflist")]);
        assert!(remove(&path).unwrap() && !remove(&path).unwrap());
    }

    #[test]
    fn a_file_that_is_gone_or_damaged_is_written_again_and_one_with_additions_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let whole = at(folder.path()).conflist().text();
        let file = folder.path().join("10-polder.conflist");
        assert!(at(folder.path()).conflist().keep().unwrap(), "there was none");
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
            assert!(at(folder.path()).conflist().keep().unwrap(), "{damaged}");
            assert_eq!(fs::read_to_string(&file).unwrap(), whole, "{damaged}");
        }
        let more = whole.replace("\"plugins\": [", "\"plugins\": [{ \"type\": \"portmap\" },");
        assert_ne!(more, whole);
        fs::write(&file, &more).unwrap();
        assert!(!at(folder.path()).conflist().keep().unwrap());
        assert_eq!(fs::read_to_string(&file).unwrap(), more);
    }

    #[test]
    fn a_folder_that_cannot_be_written_is_named_with_the_reason_and_the_remedy() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        fs::write(&file, "").unwrap();
        let error = at(&file).conflist().keep().unwrap_err();
        let said = at(&file).conflist().not_written(error).to_string();
        for sign in ["file/10-polder.conflist", "(os error", "cni_conf_dir"] {
            assert!(said.contains(sign), "{said}");
        }
    }

    #[test]
    fn a_file_that_is_right_is_left_alone() {
        use std::os::unix::fs::MetadataExt;
        let folder = tempfile::tempdir().unwrap();
        let inode = || fs::metadata(folder.path().join("10-polder.conflist")).unwrap().ino();
        assert!(at(folder.path()).conflist().write().unwrap());
        let before = inode();
        assert!(!at(folder.path()).conflist().write().unwrap());
        assert_eq!(inode(), before);
    }
}
