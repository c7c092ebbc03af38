//! DEL: the agent takes the attachment away. Without the agent the plugin does, and leaves it a note.

use std::fs;
use std::io;
use std::path::Path;
use std::time::Duration;

use polder_api::Attachment;
use polder_api::client::{Client, ClientError};
use polder_api::message::{Reply, Request};
use polder_netlink::{RouteSocket, link};

use crate::add::unexpected;
use crate::command::Call;
use crate::error::Error;

/// How long the agent has to answer before the plugin does it alone.
const AGENT_PATIENCE: Duration = Duration::from_secs(20);

/// Takes the attachment away. Succeeds where there is nothing, and wherever its namespace path leads now: the
/// host's end of the pair is found by its name, which no other attachment has.
pub fn del(call: &Call) -> Result<(), Error> {
    let attachment = call.attachment();
    match ask(&call.conf.socket, &attachment) {
        Ok(Reply::Deleted) => Ok(()),
        Ok(other) => Err(unexpected(other)),
        Err(_) => alone(&call.conf.socket, &attachment),
    }
}

fn ask(socket: &Path, attachment: &Attachment) -> Result<Reply, ClientError> {
    Client::connect(socket, AGENT_PATIENCE)?.ask(&Request::Del(attachment.clone()))
}

/// Deletes the interface, and leaves a note by which the agent will free the addresses. First the note: an address
/// whose interface is gone without one is found, but only after a while.
fn alone(socket: &Path, attachment: &Attachment) -> Result<(), Error> {
    let note = polder_api::tombstone(socket, attachment);
    bury(&note, attachment).map_err(Error::file(format!("leave {} for the agent", note.display())))?;
    let name = attachment.host_interface();
    let failed = || Error::kernel(format!("delete {name}"));
    let mut host = RouteSocket::open().map_err(failed())?;
    let Some(found) = host.link(name.as_str()).map_err(failed())? else { return Ok(()) };
    match host.execute_all([link::delete(found.index)]) {
        Err(error) if !error.is_missing() => Err(failed()(error)),
        _ => Ok(()),
    }
}

fn bury(note: &Path, attachment: &Attachment) -> io::Result<()> {
    if let Some(folder) = note.parent() {
        fs::create_dir_all(folder)?;
    }
    let temporary = note.with_extension("new");
    fs::write(&temporary, attachment.to_string())?;
    fs::rename(&temporary, note)
}
