//! DEL: the agent deletes the attachment. If the agent is unreachable, the plugin deletes the interface and writes a
//! tombstone for the agent.

use std::fs;
use std::io;
use std::path::Path;
use std::time::Duration;

use polder_api::Attachment;
use polder_api::message::{Reply, Request};
use polder_netlink::{RouteSocket, link};

use crate::action::{FileAction, KernelAction};
use crate::agent::unexpected;
use crate::call::Call;
use crate::delegate;
use crate::environment::Verb;
use crate::error::Error;

/// Timeout for the agent's answer; after it, the plugin deletes the interface itself.
const AGENT_TIMEOUT: Duration = Duration::from_secs(20);

/// Deletes the attachment, then releases the addresses of a delegated IPAM plugin: they are in use as long as the
/// interface exists.
pub fn del(call: &Call) -> Result<(), Error> {
    interface(call)?;
    match &call.network.conf.delegate {
        Some(plugin) => delegate::call(&call.network, plugin, Verb::Del).map(drop),
        None => Ok(()),
    }
}

/// Deletes the interface. Succeeds if it does not exist, and does not depend on the namespace path: the host end of the
/// pair is found by its name, which is unique to the attachment.
pub fn interface(call: &Call) -> Result<(), Error> {
    let attachment = call.attachment();
    match ask(call, &attachment) {
        Ok(Reply::Deleted) => Ok(()),
        Ok(other) => Err(unexpected(other)),
        Err(_) => alone(&call.network.conf.socket, &attachment),
    }
}

/// Asks the agent to delete the attachment.
pub(crate) fn ask(call: &Call, attachment: &Attachment) -> Result<Reply, Error> {
    Ok(call.network.agent(AGENT_TIMEOUT)?.ask(Request::Del(attachment.clone()))?)
}

/// Writes a tombstone, from which the agent releases the addresses, and then deletes the interface. Without a tombstone
/// the agent finds an address without an interface only after a grace period.
pub(crate) fn alone(socket: &Path, attachment: &Attachment) -> Result<(), Error> {
    let note = polder_api::tombstone(socket, attachment);
    write_tombstone(socket, attachment).map_err(Error::file(FileAction::WriteTombstone { path: note }))?;
    let name = attachment.host_interface();
    let failed = || Error::kernel(KernelAction::Delete { host: name.clone() });
    let mut host = RouteSocket::open().map_err(failed())?;
    let Some(found) = host.link(name.as_str()).map_err(failed())? else { return Ok(()) };
    match host.execute_all([link::delete(found.index)]) {
        Err(error) if !error.is_missing() => Err(failed()(error)),
        _ => Ok(()),
    }
}

/// Writes the tombstone by rename, because the agent reads every file in the folder.
fn write_tombstone(socket: &Path, attachment: &Attachment) -> io::Result<()> {
    fs::create_dir_all(polder_api::tombstones(socket))?;
    let unfinished = format!("{}.{}", attachment.host_interface(), std::process::id());
    let unfinished = socket.with_file_name(unfinished);
    fs::write(&unfinished, attachment.to_string())?;
    fs::rename(&unfinished, polder_api::tombstone(socket, attachment))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reader_never_sees_an_incomplete_tombstone() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("agent.sock");
        let notes = polder_api::tombstones(&socket);
        fs::create_dir(&notes).unwrap();
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| {
                let mut found = 0;
                while found < 100 {
                    for path in fs::read_dir(&notes).unwrap().map(|entry| entry.unwrap().path()) {
                        let attachment: Attachment = fs::read_to_string(&path).unwrap().parse().unwrap();
                        assert_eq!(path, polder_api::tombstone(&socket, &attachment));
                        fs::remove_file(path).unwrap();
                        found += 1;
                    }
                }
            });
            for number in 0.. {
                if reader.is_finished() {
                    break;
                }
                let attachment = format!("network/c{number}/eth0").parse().unwrap();
                write_tombstone(&socket, &attachment).unwrap();
            }
        });
    }
}
