//! Messages about interfaces that cannot be decoded: an `ifalias` may be any bytes.

use netlink_packet_core::DecodeError;
use polder_api::POD_INTERFACE_PREFIX;

use crate::Error;
use crate::error::text;

/// `RTM_NEWLINK` and `IFLA_IFNAME` (`include/uapi/linux/rtnetlink.h`, `if_link.h`).
const NEW_LINK: u16 = 16;
const NAME: u16 = 3;

/// What the names of our interfaces start with: those of the node itself, and those of pods.
const OURS: [&str; 2] = ["polder", POD_INTERFACE_PREFIX];

/// Where its type is in a message, and where its attributes begin: behind `nlmsghdr` and `ifinfomsg`.
const TYPE: std::ops::Range<usize> = 4..6;
const ATTRIBUTES: usize = 32;

/// An interface of somebody else is passed over, as if it were not there. One that may be ours is an error.
pub(crate) fn undecodable(message: &[u8], problem: DecodeError) -> Result<(), Error> {
    let is_link = message.get(TYPE) == Some(&NEW_LINK.to_ne_bytes());
    let name = message.get(ATTRIBUTES..).filter(|_| is_link).and_then(|attributes| text(attributes, NAME));
    match name {
        Some(name) if OURS.iter().any(|prefix| name.starts_with(prefix)) => {
            Err(Error::Interface { name, problem })
        }
        Some(_) => Ok(()),
        None => Err(problem.into()),
    }
}
