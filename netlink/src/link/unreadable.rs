//! Interface messages that cannot be decoded: an `ifalias` may contain arbitrary bytes.

use netlink_packet_core::DecodeError;
use polder_api::POD_INTERFACE_PREFIX;

use crate::Error;
use crate::error::{attribute, text};

/// `RTM_NEWLINK`, `IFLA_IFNAME` and `IFLA_IFALIAS` (`include/uapi/linux/rtnetlink.h`, `if_link.h`).
const NEW_LINK: u16 = 16;
const NAME: u16 = 3;
const ALIAS: u16 = 20;

/// The name prefixes of Polder's interfaces: those of the node, and those of pods.
const OURS: [&str; 2] = ["polder", POD_INTERFACE_PREFIX];

/// The position of the message type, and the offset of the attributes: after `nlmsghdr` and `ifinfomsg`.
const TYPE: std::ops::Range<usize> = 4..6;
const ATTRIBUTES: usize = 32;

/// For an interface that is not Polder's, returns the message with non-ASCII bytes of the alias replaced, or `None`
/// to skip it. For an interface that may be Polder's, returns an error.
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
