//! Marks of ADDs whose plugin is creating an interface. At its start, an agent reads from them the ADDs in progress
//! that an earlier agent has answered.
//!
//! A mark is a locked file in a directory next to the agent's socket, where only root can create files. The kernel
//! releases the lock when the process ends, even if it is killed (flock(2)).

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use crate::attachment::is_host_interface;
use crate::{Attachment, IfName};

/// The mark of one ADD, for as long as this value exists.
#[derive(Debug)]
pub struct AddMark {
    path: PathBuf,
    _locked: File,
}

impl AddMark {
    /// Sets the mark; `socket` is the agent's socket. If the agent that answered the ADD ends before the mark is set,
    /// the next agent does not know of the ADD: check that the agent still holds the attachment before you create
    /// anything. Fails with `WouldBlock` while another process creates the interface of the same attachment.
    pub fn set(socket: &Path, attachment: &Attachment) -> io::Result<Self> {
        let path = add_marks(socket).join(attachment.host_interface().as_str());
        let open = || OpenOptions::new().write(true).create(true).truncate(false).open(&path);
        let file = match open() {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                fs::create_dir_all(add_marks(socket))?;
                open()?
            }
            opened => opened?,
        };
        file.try_lock()?;
        Ok(Self { path, _locked: file })
    }
}

impl Drop for AddMark {
    fn drop(&mut self) {
        // A file that cannot be removed is no longer locked, and is ignored.
        let _ = fs::remove_file(&self.path);
    }
}

/// Directory of the marks.
pub fn add_marks(socket: &Path) -> PathBuf {
    socket.with_file_name("adds")
}

/// An ADD that another process has marked.
#[derive(Debug)]
pub struct MarkedAdd(File);

impl MarkedAdd {
    /// All ADDs in progress, each with its host interface. Deletes the marks of killed processes. An agent must call
    /// this before it answers any ADD.
    pub fn all(socket: &Path) -> io::Result<Vec<(IfName, Self)>> {
        let files = match fs::read_dir(add_marks(socket)) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            files => files?,
        };
        let mut all = Vec::new();
        for file in files {
            let file = file?;
            let name = file.file_name().into_string().ok().and_then(|name| IfName::try_from(name).ok());
            let Some(interface) = name.filter(|name| is_host_interface(name.as_str())) else { continue };
            let add = match File::open(file.path()) {
                // The ADD has ended meanwhile.
                Err(error) if error.kind() == ErrorKind::NotFound => continue,
                opened => Self(opened?),
            };
            if add.is_in_progress() {
                all.push((interface, add));
            } else {
                let _ = fs::remove_file(file.path());
            }
        }
        Ok(all)
    }

    /// Whether the ADD is still in progress.
    pub fn is_in_progress(&self) -> bool {
        let is_free = self.0.try_lock_shared().is_ok();
        if is_free {
            // Another ADD of the same attachment must be able to lock the file.
            let _ = self.0.unlock();
        }
        !is_free
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_add_is_in_progress_only_while_its_mark_is_locked() {
        let folder = std::env::temp_dir().join(format!("polder-add-mark-{}", std::process::id()));
        let socket = folder.join("agent.sock");
        let attachment: Attachment = "net/c1/eth0".parse().unwrap();
        let all = || MarkedAdd::all(&socket).unwrap();
        assert!(all().is_empty());
        let mark = AddMark::set(&socket, &attachment).unwrap();
        assert_eq!(AddMark::set(&socket, &attachment).unwrap_err().kind(), ErrorKind::WouldBlock);
        let seen = all();
        assert!(seen[0].0 == attachment.host_interface() && seen[0].1.is_in_progress());
        drop(mark);
        assert!(!seen[0].1.is_in_progress() && all().is_empty());
        // The mark of a killed process, and a file that is not a mark.
        fs::write(add_marks(&socket).join(attachment.host_interface().as_str()), "").unwrap();
        fs::write(add_marks(&socket).join("other"), "").unwrap();
        assert!(all().is_empty());
        assert_eq!(fs::read_dir(add_marks(&socket)).unwrap().count(), 1);
        drop(AddMark::set(&socket, &attachment).unwrap());
        fs::remove_dir_all(folder).unwrap();
    }
}
