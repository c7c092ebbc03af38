//! Errors of netlink requests.

use std::io;
use std::ops::Range;

use netlink_packet_core::{DecodeError, NLA_HEADER_SIZE};
use nix::errno::Errno;

/// A netlink request that the kernel refused, or that failed before or after.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A system call on the socket failed.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The kernel answered with an error: the name of the error number and the kernel's own text.
    /// Remedy: check the part of the message before this one, which names the object and the step.
    #[error("{}{}", errno.desc(), text.as_ref().map(|text| format!(": {text}")).unwrap_or_default())]
    Refused {
        /// The error number.
        errno: Errno,
        /// The text of the extended acknowledgement, if the kernel sent one.
        text: Option<String>,
    },
    /// The kernel's tables changed during every attempt to dump them (`NLM_F_DUMP_INTR`).
    /// Remedy: none, it is retried. If it repeats, find the program that changes interfaces or routes all the time: ip
    /// monitor.
    #[error("netlink dump interrupted by changes {0} times in a row")]
    Interrupted(u32),
    /// A message from the kernel cannot be decoded, so the whole answer is unusable.
    /// Remedy: report it with the release of the kernel: uname -r.
    #[error("cannot decode a message from the kernel: {0}")]
    Decode(DecodeError),
    /// A message from the kernel is larger than the receive buffer, so the whole answer is unusable.
    /// Remedy: report it with the release of the kernel: uname -r.
    #[error(
        "cannot decode a message from the kernel: message of {length} bytes is larger than the receive buffer"
    )]
    TooLong {
        /// The length of the message, in bytes.
        length: usize,
    },
    /// An element of one of Polder's nftables sets has no key, or a key that Polder does not write.
    /// Remedy: check with nft list ruleset whether another program added elements to a table of Polder.
    #[error("cannot decode a message from the kernel: unexpected key of a set element")]
    ElementKey,
    /// A message about one of Polder's interfaces cannot be decoded.
    /// Remedy: check it with ip -details link show. Polder's own alias must stay. For a pod's interface, delete the
    /// pod.
    #[error("cannot decode the kernel's message about interface {name}: {problem}")]
    Interface {
        /// The name of the interface.
        name: String,
        /// The decoding error.
        problem: DecodeError,
    },
    /// A change was requested on a socket that was opened with [`crate::Socket::open_to_read`].
    /// Remedy: none, it is an error in Polder: report it.
    #[error("change refused: this netlink socket is read-only")]
    ReadOnly,
    /// The kernel acknowledged the request without sending the requested object.
    /// Remedy: none, it is retried.
    #[error("no answer from the kernel")]
    NoAnswer,
}

/// A failed system call on a netlink socket.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// The process has no free file descriptors, or the kernel lacks the netlink protocol.
    /// Remedy: raise the limit of open files (ulimit -n), or load the kernel module nfnetlink.
    #[error("cannot open netlink socket")]
    Open(#[source] io::Error),
    /// The kernel gave the socket no port number.
    /// Remedy: none, it is retried.
    #[error("cannot bind netlink socket")]
    Bind(#[source] io::Error),
    /// An option of the socket needs the capability `CAP_NET_ADMIN`, or a later kernel.
    /// Remedy: run the agent as root, with `CAP_NET_ADMIN`, on a supported kernel (docs/install.md).
    #[error("cannot configure netlink socket")]
    Configure(#[source] io::Error),
    /// The process may not subscribe to notifications of the kernel, or the kernel lacks them.
    /// Remedy: run the agent as root, with `CAP_NET_ADMIN`, on a supported kernel (docs/install.md).
    #[error("cannot join a multicast group with netlink socket")]
    Join(#[source] io::Error),
    /// The kernel did not return the port number of the socket.
    /// Remedy: none, it is retried.
    #[error("cannot read the port of netlink socket")]
    ReadPort(#[source] io::Error),
    /// The kernel did not take the request, for example because it has no memory for it.
    /// Remedy: none, it is retried; if it persists, free memory on the node.
    #[error("cannot send to netlink socket")]
    Send(#[source] io::Error),
    /// The kernel's answers did not fit in the receive queue, or no message came within the timeout.
    /// Remedy: none, it is retried; if it persists, free memory on the node.
    #[error("cannot receive from netlink socket")]
    Receive(#[source] io::Error),
    /// The process has reached its limit of threads.
    /// Remedy: raise the limit of tasks of the service (`TasksMax`) or of its control group (pids.max).
    #[error("cannot start a thread for netlink socket")]
    StartThread(#[source] io::Error),
}

impl Error {
    /// Whether the object already exists (`EEXIST`).
    pub fn is_exists(&self) -> bool {
        self.errno() == Some(Errno::EEXIST)
    }

    /// Whether the object does not exist: the error numbers with which the kernel answers a second deletion, for all
    /// kinds of objects.
    pub fn is_missing(&self) -> bool {
        matches!(self.errno(), Some(Errno::ENODEV | Errno::ENOENT | Errno::ESRCH | Errno::EADDRNOTAVAIL))
    }

    /// The kernel's error number, if the kernel refused the request.
    pub fn errno(&self) -> Option<Errno> {
        match self {
            Self::Refused { errno, .. } => Some(*errno),
            _ => None,
        }
    }

    /// `code` is negative, as netlink carries it; `attributes` are those of the extended acknowledgement.
    pub(crate) fn refused(code: i32, attributes: &[u8]) -> Self {
        Self::Refused { errno: Errno::from_raw(code.saturating_neg()), text: message_text(attributes) }
    }
}

/// The decoding error is part of the message, so it is not a `source` as well.
impl From<DecodeError> for Error {
    fn from(problem: DecodeError) -> Self {
        Self::Decode(problem)
    }
}

/// `NLMSGERR_ATTR_MSG` (`include/uapi/linux/netlink.h`), a text that ends with a NUL.
fn message_text(attributes: &[u8]) -> Option<String> {
    const NLMSGERR_ATTR_MSG: u16 = 1;
    text(attributes, NLMSGERR_ATTR_MSG)
}

/// The text of the first attribute of that kind, without its final NUL.
pub(crate) fn text(attributes: &[u8], kind: u16) -> Option<String> {
    let value = attributes.get(attribute(attributes, kind)?)?;
    let text = value.strip_suffix(&[0]).unwrap_or(value);
    Some(String::from_utf8_lossy(text).into_owned())
}

/// The byte range of the value of the first attribute of that kind.
pub(crate) fn attribute(attributes: &[u8], kind: u16) -> Option<Range<usize>> {
    const TYPE_MASK: u16 = 0x3fff;
    let mut at = 0;
    while let [l0, l1, k0, k1, rest @ ..] = attributes.get(at..)? {
        let length = usize::from(u16::from_ne_bytes([*l0, *l1])).checked_sub(NLA_HEADER_SIZE)?;
        rest.get(..length)?;
        at += NLA_HEADER_SIZE;
        if u16::from_ne_bytes([*k0, *k1]) & TYPE_MASK == kind {
            return Some(at..at + length);
        }
        at += length.next_multiple_of(4);
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_error_contains_the_message_of_the_kernel() {
        let offset = [8, 0, 2, 0, 1, 2, 3, 4];
        let text = *b"\x0a\x00\x01\x00no way\0\0";
        let error = Error::refused(-17, &[&offset[..], &text[..10], &[0, 0]].concat());
        assert!(error.is_exists());
        assert_eq!(error.to_string(), "File exists: no way");
    }

    #[test]
    fn truncated_attributes_give_no_message_and_no_panic() {
        for torn in [&[1u8][..], &[0, 0, 1, 0], &[200, 0, 1, 0, 65], &[5, 0, 2, 0, 1]] {
            assert_eq!(message_text(torn), None);
        }
    }
}
