//! Errors of netlink requests.

use std::io;
use std::ops::Range;

use netlink_packet_core::{DecodeError, NLA_HEADER_SIZE};
use nix::errno::Errno;

/// A netlink request that the kernel refused, or that failed before or after.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A system call on the socket failed.
    #[error("cannot {action} netlink socket")]
    Socket {
        /// The action, as a verb phrase between "cannot" and "netlink socket".
        action: &'static str,
        /// The kernel's error.
        #[source]
        source: io::Error,
    },
    /// The kernel answered with an error.
    #[error("{}{}", errno.desc(), text.as_ref().map(|text| format!(": {text}")).unwrap_or_default())]
    Refused {
        /// The error number.
        errno: Errno,
        /// The text of the extended acknowledgement, if the kernel sent one.
        text: Option<String>,
    },
    /// The kernel's tables changed during every attempt to dump them (`NLM_F_DUMP_INTR`).
    #[error("netlink dump interrupted by changes {0} times in a row")]
    Interrupted(u32),
    /// A message from the kernel cannot be decoded, so the whole answer is unusable.
    #[error("cannot decode a message from the kernel: {0}")]
    Decode(DecodeError),
    /// A message about one of Polder's interfaces cannot be decoded.
    #[error("cannot decode the kernel's message about interface {name}: {problem}")]
    Interface {
        /// The name of the interface.
        name: String,
        /// The decoding error.
        problem: DecodeError,
    },
    /// A change was requested on a socket that was opened with [`crate::Socket::open_to_read`].
    #[error("change refused: this netlink socket is read-only")]
    ReadOnly,
    /// The kernel acknowledged the request without sending the requested object.
    #[error("no answer from the kernel")]
    NoAnswer,
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

    pub(crate) fn socket(action: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Socket { action, source }
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
    fn the_kernels_own_words_are_part_of_the_error() {
        let offset = [8, 0, 2, 0, 1, 2, 3, 4];
        let text = *b"\x0a\x00\x01\x00no way\0\0";
        let error = Error::refused(-17, &[&offset[..], &text[..10], &[0, 0]].concat());
        assert!(error.is_exists());
        assert_eq!(error.to_string(), "File exists: no way");
    }

    #[test]
    fn torn_attributes_are_no_text_and_no_panic() {
        for torn in [&[1u8][..], &[0, 0, 1, 0], &[200, 0, 1, 0, 65], &[5, 0, 2, 0, 1]] {
            assert_eq!(message_text(torn), None);
        }
    }
}
