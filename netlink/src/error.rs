//! What can go wrong between us and the kernel.

use std::io;
use std::ops::Range;

use netlink_packet_core::{DecodeError, NLA_HEADER_SIZE};
use nix::errno::Errno;

/// A request that the kernel refused, or that did not come through.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The socket itself failed.
    #[error("{action} netlink socket")]
    Socket {
        /// What was being done with it.
        action: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The kernel answered with an error.
    #[error("{}{}", errno.desc(), text.as_ref().map(|text| format!(": {text}")).unwrap_or_default())]
    Refused {
        /// The error number.
        errno: Errno,
        /// The kernel's own words (extended acknowledgement), where it had some.
        text: Option<String>,
    },
    /// The tables changed under every attempt to read them whole (`NLM_F_DUMP_INTR`).
    #[error("dump interrupted by changes {0} times in a row")]
    Interrupted(u32),
    /// The kernel sent what we cannot read. Nothing may be concluded from the rest either.
    #[error("message from the kernel that cannot be decoded: {0}")]
    Decode(DecodeError),
    /// What the kernel says of one of our interfaces cannot be read.
    #[error("what the kernel says of interface {name} cannot be decoded: {problem}")]
    Interface {
        /// The interface.
        name: String,
        /// What cannot be read.
        problem: DecodeError,
    },
    /// A change was asked of a socket that was opened to read.
    #[error("nothing is changed: this socket is for reading")]
    ReadOnly,
    /// The kernel said that all is well and did not send what was asked for.
    #[error("the kernel's answer is missing")]
    NoAnswer,
}

impl Error {
    /// The object is there already.
    pub fn is_exists(&self) -> bool {
        self.errno() == Some(Errno::EEXIST)
    }

    /// The object is not there (any more): what every kind of object says when it is deleted twice.
    pub fn is_missing(&self) -> bool {
        matches!(self.errno(), Some(Errno::ENODEV | Errno::ENOENT | Errno::ESRCH | Errno::EADDRNOTAVAIL))
    }

    /// The kernel's error number, if it was the kernel that refused.
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

/// It is a part of the message, and so no source besides.
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

/// The text in the first attribute of that kind, without the NUL that ends it.
pub(crate) fn text(attributes: &[u8], kind: u16) -> Option<String> {
    let value = attributes.get(attribute(attributes, kind)?)?;
    let text = value.strip_suffix(&[0]).unwrap_or(value);
    Some(String::from_utf8_lossy(text).into_owned())
}

/// Where the value of the first attribute of that kind is.
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
