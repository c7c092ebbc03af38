//! Control groups of runtimes on a node of the lab: the only thing that the lab changes on the host.

use std::fs;
use std::path::{Path, PathBuf};

const ROOT: &str = "/sys/fs/cgroup";

/// The parent of all groups of a node, for example `/polder-lab-x-n1`: named after the lab's folder, which is unique,
/// and the node's folder in it.
pub fn of_node(folder: &Path) -> String {
    let name = |path: &Path| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    format!("/{}-{}", folder.parent().map(name).unwrap_or_default(), name(folder))
}

/// Removes the group of a node and all groups in it, in each hierarchy of cgroup v1 and in that of v2. They must
/// contain no process.
pub fn remove(folder: &Path) {
    places(folder).for_each(|place| remove_tree(&place));
}

/// Whether a group of that node exists in any hierarchy.
pub fn is_there(folder: &Path) -> bool {
    places(folder).any(|place| place.exists())
}

fn places(folder: &Path) -> impl Iterator<Item = PathBuf> {
    let group = of_node(folder);
    let controllers = fs::read_dir(ROOT).into_iter().flatten().filter_map(|entry| Some(entry.ok()?.path()));
    controllers.chain([PathBuf::from(ROOT)]).map(move |root| root.join(group.trim_start_matches('/')))
}

fn remove_tree(group: &Path) {
    let Ok(entries) = fs::read_dir(group) else { return };
    entries
        .filter_map(Result::ok)
        .map(|entry| entry.path())
        .filter(|path| path.is_dir())
        .for_each(|path| remove_tree(&path));
    let _ = fs::remove_dir(group);
}
