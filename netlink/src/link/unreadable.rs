//! Messages about interfaces that cannot be decoded: an `ifalias` may be any bytes.

use netlink_packet_core::DecodeError;
use polder_api::POD_INTERFACE_PREFIX;

use crate::Error;
use crate::error::{attribute, text};

/// `RTM_NEWLINK`, `IFLA_IFNAME` and `IFLA_IFALIAS` (`include/uapi/linux/rtnetlink.h`, `if_link.h`).
const NEW_LINK: u16 = 16;
const NAME: u16 = 3;
const ALIAS: u16 = 20;

/// What the names of our interfaces start with: those of the node itself, and those of pods.
const OURS: [&str; 2] = ["polder", POD_INTERFACE_PREFIX];

/// Where its type is in a message, and where its attributes begin: behind `nlmsghdr` and `ifinfomsg`.
const TYPE: std::ops::Range<usize> = 4..6;
const ATTRIBUTES: usize = 32;

/// An interface of somebody else is read without what is no text in its alias, if that helps, and passed over if not. One
/// that may be ours is an error.
pub(crate) fn undecodable(message: &[u8], problem: DecodeError) -> Result<Option<Vec<u8>>, Error> {
    let is_link = message.get(TYPE) == Some(&NEW_LINK.to_ne_bytes());
    let attributes = message.get(ATTRIBUTES..).filter(|_| is_link).unwrap_or_default();
    let Some(name) = text(attributes, NAME) else { return Err(problem.into()) };
    if OURS.iter().any(|prefix| name.starts_with(prefix)) {
        return Err(Error::Interface { name, problem });
    }
    let alias = attribute(attributes, ALIAS);
    Ok(alias.map(|alias| {
        let mut readable = message.to_vec();
        let bytes = readable[ATTRIBUTES..][alias].iter_mut();
        bytes.filter(|byte| !byte.is_ascii()).for_each(|byte| *byte = b'?');
        readable
    }))
}
