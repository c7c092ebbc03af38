//! The mark of an ADD whose plugin makes an interface. An agent that starts sees by it which ADDs go on that an earlier agent has
//! answered.
//!
//! It is a listening unix socket with an abstract name: that belongs to the network namespace, as the interfaces do, and goes with
//! the process that holds it, however that ends.

use std::fs;
use std::io::{self, ErrorKind, Read};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};

use crate::{Attachment, IfName};

/// What the names start with; then comes that of the interface on the host.
const PREFIX: &str = "polder-add-";

/// The mark, for as long as this is kept.
#[derive(Debug)]
pub struct AddMark {
    /// Nobody accepts who connects: being connected is enough to see the end.
    _listener: UnixListener,
}

impl AddMark {
    /// Marks the ADD. An agent that has died by then does not tell the next one: look whether it still holds the attachment before
    /// anything is made. Fails with `AddrInUse` while another process makes an interface for the same attachment.
    pub fn set(attachment: &Attachment) -> io::Result<Self> {
        let address = SocketAddr::from_abstract_name(format!("{PREFIX}{}", attachment.host_interface()))?;
        Ok(Self { _listener: UnixListener::bind_addr(&address)? })
    }
}

/// An ADD that another process has marked.
#[derive(Debug)]
pub struct MarkedAdd(UnixStream);

impl MarkedAdd {
    /// All that go on in this network namespace, with the interfaces that they make on the host.
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

    /// Whether it still goes on.
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
