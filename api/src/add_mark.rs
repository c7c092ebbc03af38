//! The mark of an ADD whose plugin is creating an interface. It shows a starting agent which ADDs, answered by an earlier agent,
//! are still running.
//!
//! The mark is a listening unix socket with an abstract name. The name belongs to the network namespace, like the interfaces, and
//! disappears when the process that holds it ends, for whatever reason.

use std::fs;
use std::io::{self, ErrorKind, Read};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};

use crate::{Attachment, IfName};

/// Prefix of the socket names; the name of the host interface follows.
const PREFIX: &str = "polder-add-";

/// The mark. It exists until this value is dropped.
#[derive(Debug)]
pub struct AddMark {
    /// Connections are never accepted: a connected peer sees the end of the socket.
    _listener: UnixListener,
}

impl AddMark {
    /// Marks the ADD. An agent that died before this call cannot inform its successor: check that it still holds the attachment
    /// before creating anything. Fails with `AddrInUse` while another process creates an interface for the same attachment.
    pub fn set(attachment: &Attachment) -> io::Result<Self> {
        let address = SocketAddr::from_abstract_name(format!("{PREFIX}{}", attachment.host_interface()))?;
        Ok(Self { _listener: UnixListener::bind_addr(&address)? })
    }
}

/// An ADD that another process has marked.
#[derive(Debug)]
pub struct MarkedAdd(UnixStream);

impl MarkedAdd {
    /// All running ADDs in this network namespace, with the host interfaces that they create.
    pub fn all() -> io::Result<Vec<(IfName, Self)>> {
        let sockets = fs::read_to_string("/proc/thread-self/net/unix")?;
        let names = sockets.lines().filter_map(|line| line.rsplit_once(" @")?.1.strip_prefix(PREFIX));
        let mut all = Vec::new();
        for name in names {
            let Ok(interface) = IfName::try_from(name.to_owned()) else { continue };
            match Self::connect(name) {
                Ok(add) => all.push((interface, add)),
                // It has ended since.
                Err(error) if error.kind() == ErrorKind::ConnectionRefused => {}
                Err(error) => return Err(error),
            }
        }
        Ok(all)
    }

    fn connect(name: &str) -> io::Result<Self> {
        let stream = UnixStream::connect_addr(&SocketAddr::from_abstract_name(format!("{PREFIX}{name}"))?)?;
        stream.set_nonblocking(true)?;
        Ok(Self(stream))
    }

    /// Whether the ADD is still running.
    pub fn goes_on(&self) -> bool {
        (&self.0).read(&mut [0]).is_err_and(|error| error.kind() == ErrorKind::WouldBlock)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_add_is_seen_while_its_mark_is_kept_and_not_afterwards() {
        let attachment: Attachment = format!("net/add-mark-{}/eth0", std::process::id()).parse().unwrap();
        let of_it = || {
            let all = MarkedAdd::all().unwrap().into_iter();
            all.filter(|(interface, _)| *interface == attachment.host_interface()).map(|(_, add)| add).next()
        };
        assert!(of_it().is_none());
        let mark = AddMark::set(&attachment).unwrap();
        assert_eq!(AddMark::set(&attachment).unwrap_err().kind(), ErrorKind::AddrInUse);
        let seen = of_it().unwrap();
        assert!(seen.goes_on());
        drop(mark);
        assert!(!seen.goes_on() && of_it().is_none());
        drop(AddMark::set(&attachment).unwrap());
    }
}
