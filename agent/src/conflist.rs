//! The CNI configuration file: written atomically, once the node can serve pods.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use polder_api::NetworkName;
use polder_ipam::cause::SharedError;
use serde_json::{Value, json};
use tracing::warn;

use crate::file;

/// The CNI versions that Polder's plugins support and runtimes since 2021 request, oldest first.
pub static VERSIONS: [&str; 4] = ["0.3.1", "0.4.0", "1.0.0", "1.1.0"];

/// The version for runtimes that do not support a list of versions.
const USUAL_VERSION: &str = "1.0.0";

/// Capabilities that Polder's plugin always declares.
pub const OWN_CAPABILITIES: [&str; 3] = ["ips", "mac", "io.kubernetes.cri.pod-annotations"];

/// Capabilities that Polder's plugin declares unless another plugin of the list serves them, with the type of the
/// reference plugin that does.
const SHARED_CAPABILITIES: [(&str, &str); 2] = [("portMappings", "portmap"), ("bandwidth", "bandwidth")];

/// The network that the CNI configuration announces.
#[derive(Debug, Clone)]
pub struct Network {
    /// Name of the network; `None` for `polder`.
    pub name: Option<NetworkName>,
    /// The offered CNI versions, oldest first.
    pub versions: &'static [&'static str],
    /// Whether `versions` was set in the configuration, so that plugins of other software do not reduce it.
    pub has_fixed_versions: bool,
    /// The plugins that the runtime calls after Polder's, as JSON.
    pub chain: Vec<Value>,
}

/// Why the CNI configuration is not in place.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotWritten {
    /// The engine has not written the file yet.
    #[error(
        "the CNI configuration is not written yet: wait for the next pass, because nothing else prevents readiness"
    )]
    NotYet,
    /// The file cannot be written.
    #[error(
        "the CNI configuration {} cannot be written ({error}): make its directory writable for polder-agent (in a \
         container: mount that directory of the host writable), or set cni_conf_dir to the directory that the \
         container runtime reads",
        file.display()
    )]
    Refused {
        /// The file.
        file: PathBuf,
        /// Error of the file system.
        #[source]
        error: SharedError,
    },
}

/// The CNI configuration file and its intended content.
#[derive(Debug)]
pub struct Conflist<'a> {
    path: &'a Path,
    socket: &'a Path,
    network: &'a Network,
    written: PathBuf,
}

impl<'a> Conflist<'a> {
    /// The configuration file at `path`, for the agent with that `socket`. `written` is the copy of the agent's last
    /// content, without additions of other software.
    pub fn new(path: &'a Path, socket: &'a Path, network: &'a Network, written: PathBuf) -> Self {
        Self { path, socket, network, written }
    }

    /// Writes the file atomically: a runtime reads either the old file or the new one. A correct file is not written
    /// again. Returns whether the file was written.
    pub fn write(&self) -> io::Result<bool> {
        let is_missing = !self.is_written();
        if is_missing {
            let list = self.with_additions();
            fs::create_dir_all(self.path.parent().unwrap_or(Path::new("/")))?;
            file::replace(self.path, text(&list).as_bytes(), 0o644)?;
        }
        let own = text(&self.own());
        if !fs::read_to_string(&self.written).is_ok_and(|written| written == own)
            && let Err(error) = file::replace(&self.written, own.as_bytes(), 0o600)
        {
            warn!(
                file = %self.written.display(), %error,
                "cannot save a copy of the CNI configuration: a plugin that is later removed from cni.chain stays in \
                 the configuration, as if other software had added it"
            );
        }
        Ok(is_missing)
    }

    /// Whether the file exists with the intended content.
    pub fn is_written(&self) -> bool {
        fs::read_to_string(self.path).is_ok_and(|found| found == text(&self.with_additions()))
    }

    /// The types of the plugins that other software has added to the file.
    pub fn additions(&self) -> Vec<String> {
        let Some(found) = self.found() else { return Vec::new() };
        self.added(&found).iter().map(|plugin| type_of(plugin).to_owned()).collect()
    }

    /// The plugins in the file that are neither in the current nor in the previous configuration.
    fn added(&self, found: &Value) -> Vec<Value> {
        let (own, before) = (self.own(), read(&self.written).unwrap_or_default());
        let known: Vec<&Value> = plugins(&own).chain(plugins(&before)).collect();
        let is_added = |plugin: &&Value| {
            let is_same_type = |other: &&Value| type_of(other) == type_of(plugin);
            // A second plugin of a configured type was added by other software. A changed plugin counts as configured.
            let is_second = || plugins(found).filter(is_same_type).any(|other| known.contains(&other));
            !known.iter().copied().any(|known| is_same_type(&known)) || !known.contains(plugin) && is_second()
        };
        plugins(found).filter(is_added).cloned().collect()
    }

    /// Writes the file if it is missing, does not contain Polder's plugin, or gives a capability of Polder's plugin to
    /// another plugin, too. Otherwise it is left unchanged, with additions of other software. Returns whether the file
    /// was written.
    pub fn keep(&self) -> io::Result<bool> {
        match self.found() {
            Some(found) if !is_served_twice(&found) => Ok(false),
            _ => self.write(),
        }
    }

    /// Deletes the file, if it is Polder's. Returns whether it existed.
    pub fn withdraw(&self) -> io::Result<bool> {
        if self.is_ours(self.path) { remove(self.path) } else { Ok(false) }
    }

    /// Other files in the same folder with Polder's plugin and socket, for example under an earlier name. A runtime
    /// uses the first file by name. Links to this agent's file have the same content, and are not other files.
    pub fn others(&self) -> Vec<PathBuf> {
        let folder = self.path.parent().and_then(|folder| fs::read_dir(folder).ok());
        let files = folder.into_iter().flatten().flatten().map(|entry| entry.path());
        let is_list = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "conflist");
        files.filter(|path| !self.is_same(path) && is_list(path) && self.is_ours(path)).collect()
    }

    /// Whether the path is this agent's file, or a link to it.
    fn is_same(&self, path: &Path) -> bool {
        path == self.path || is_same_file(path, self.path)
    }

    /// The file in the same folder that a runtime uses instead, if any: the first by name. Hidden files count, too
    /// (containerd 1.6 and 2.1). A file of Multus is ignored: it precedes Polder's on purpose. A link to Polder's file
    /// can be the first file: then no other file is used instead.
    pub fn preceding(&self) -> Option<PathBuf> {
        let files = fs::read_dir(self.path.parent()?).ok()?.flatten().map(|entry| entry.path());
        let is_read = |path: &PathBuf| {
            let extension = path.extension().and_then(|extension| extension.to_str());
            let is_meta = || fs::read_to_string(path).is_ok_and(|text| text.contains("multus"));
            matches!(extension, Some("conf" | "conflist" | "json")) && path.is_file() && !is_meta()
        };
        let precede = |path: &PathBuf| path.file_name() < self.path.file_name();
        files.filter(is_read).filter(precede).min().filter(|first| !self.is_same(first))
    }

    /// The error of a failed write of the configuration.
    pub fn not_written(&self, error: io::Error) -> NotWritten {
        NotWritten::Refused { file: self.path.to_owned(), error: SharedError::new(error) }
    }

    /// Whether the file is a list with Polder's plugin and this agent's socket.
    fn is_ours(&self, path: &Path) -> bool {
        read(path).is_some_and(|list| self.is_our_list(&list))
    }

    /// Content of the file, if it is Polder's.
    fn found(&self) -> Option<Value> {
        read(self.path).filter(|list| self.is_our_list(list))
    }

    fn is_our_list(&self, list: &Value) -> bool {
        let is_text = |key: &str| list[key].as_str().is_some_and(|text| !text.is_empty());
        let mut plugins = list["plugins"].as_array().into_iter().flatten();
        is_text("name")
            && is_text("cniVersion")
            && plugins.any(|plugin| plugin["type"] == OWN_TYPE && plugin["socket"] == json!(self.socket))
    }

    /// The content according to the configuration.
    fn own(&self) -> Value {
        self.list(self.network.versions)
    }

    /// The content with additions of other software: plugins after those that they followed, capabilities of Polder's
    /// plugin, keys of the list.
    fn with_additions(&self) -> Value {
        let Some(found) = self.found() else { return self.own() };
        let before = read(&self.written).unwrap_or_default();
        let additions = self.added(&found);
        let is_newer = |version: &&&str| **version > USUAL_VERSION;
        let newer = self.network.versions.iter().filter(is_newer).count();
        // Plugins of other software are often older, and a runtime uses the newest offered version.
        let left_out = if additions.is_empty() || self.network.has_fixed_versions { 0 } else { newer };
        let mut list = self.list(&self.network.versions[..self.network.versions.len() - left_out]);
        let mut chain: Vec<Value> = plugins(&list).cloned().collect();
        if let [ours, ..] = chain.as_mut_slice() {
            add_missing(
                &mut ours["capabilities"],
                &own_plugin(&found)["capabilities"],
                &own_plugin(&before)["capabilities"],
            );
        }
        let mut place = 0;
        for plugin in plugins(&found) {
            if additions.contains(plugin) {
                chain.insert(place, plugin.clone());
                place += 1;
            } else if let Some(known) = chain.iter().position(|known| type_of(known) == type_of(plugin)) {
                place = known + 1;
            }
        }
        let (ours, others): (Vec<_>, Vec<_>) =
            chain.iter_mut().partition(|plugin| type_of(plugin) == OWN_TYPE);
        for capabilities in ours.into_iter().filter_map(|plugin| plugin["capabilities"].as_object_mut()) {
            capabilities.retain(|name, _| !others.iter().any(|plugin| serves(plugin, name)));
        }
        add_missing(&mut list, &found, &before);
        list["plugins"] = chain.into();
        list
    }

    fn list(&self, versions: &[&str]) -> Value {
        let Network { name, chain, .. } = self.network;
        let newest = versions.last().copied().unwrap_or(USUAL_VERSION);
        let shared = SHARED_CAPABILITIES.iter().map(|(name, _)| name);
        let shared = shared.filter(|name| !chain.iter().any(|plugin| serves(plugin, name)));
        let capabilities: serde_json::Map<_, _> = OWN_CAPABILITIES
            .iter()
            .chain(shared)
            .map(|name| ((*name).to_owned(), Value::Bool(true)))
            .collect();
        let own = json!({ "type": OWN_TYPE, "socket": self.socket, "capabilities": capabilities });
        let plugins: Vec<Value> = std::iter::once(own).chain(chain.iter().cloned()).collect();
        json!({
            "cniVersion": newest.min(USUAL_VERSION),
            "cniVersions": versions,
            "name": name.as_ref().map_or("polder", NetworkName::as_str),
            "plugins": plugins,
        })
    }
}

/// Type of Polder's plugin.
const OWN_TYPE: &str = "polder";

fn text(list: &Value) -> String {
    format!("{list:#}\n")
}

fn read(path: &Path) -> Option<Value> {
    serde_json::from_slice(&fs::read(path).ok()?).ok()
}

/// The plugins of a list.
fn plugins(list: &Value) -> impl Iterator<Item = &Value> {
    list["plugins"].as_array().into_iter().flatten()
}

fn type_of(plugin: &Value) -> &str {
    plugin["type"].as_str().unwrap_or_default()
}

/// Whether the plugin of other software serves that shared capability.
fn serves(plugin: &Value, capability: &str) -> bool {
    let is_shared = |(name, of_type): &(&str, &str)| {
        *name == capability && (plugin["capabilities"][name] == true || type_of(plugin) == *of_type)
    };
    SHARED_CAPABILITIES.iter().any(is_shared)
}

/// Whether Polder's plugin declares a capability that another plugin of the list serves.
fn is_served_twice(list: &Value) -> bool {
    let declares = |name: &str| own_plugin(list)["capabilities"][name] == true;
    let others = || plugins(list).filter(|plugin| type_of(plugin) != OWN_TYPE);
    SHARED_CAPABILITIES.iter().any(|(name, _)| declares(name) && others().any(|plugin| serves(plugin, name)))
}

/// Polder's plugin in a list, or null.
fn own_plugin(list: &Value) -> &Value {
    plugins(list).find(|plugin| type_of(plugin) == OWN_TYPE).unwrap_or(&Value::Null)
}

/// Adds the keys that other software added to `found`: keys that are neither in `own` nor in `before`.
fn add_missing(own: &mut Value, found: &Value, before: &Value) {
    for (key, value) in found.as_object().into_iter().flatten() {
        if own.get(key).is_none() && before.get(key).is_none() {
            own[key] = value.clone();
        }
    }
}

/// Deletes the configuration, its temporary file, and the links to it in its folder: a runtime rejects the whole folder
/// if the first file by name is a link to nothing (containerd). Returns whether the configuration existed.
pub fn remove(path: &Path) -> io::Result<bool> {
    file::delete(&file::temporary(path))?;
    links_to(path).iter().try_for_each(|link| file::delete(link).map(drop))?;
    file::delete(path)
}

/// The symbolic links in the folder of a file that lead to it.
fn links_to(path: &Path) -> Vec<PathBuf> {
    let folder = path.parent().and_then(|folder| fs::read_dir(folder).ok());
    let links = folder.into_iter().flatten().flatten().map(|entry| entry.path());
    links.filter(|link| link.is_symlink() && is_same_file(link, path)).collect()
}

/// Whether both paths lead to the same file.
fn is_same_file(one: &Path, other: &Path) -> bool {
    fs::canonicalize(one).is_ok_and(|one| fs::canonicalize(other).is_ok_and(|other| one == other))
}

#[cfg(test)]
mod tests;
