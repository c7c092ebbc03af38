//! Notifications about interface settings (`RTM_NEWNETCONF`), which the library does not decode.

use netlink_packet_core::NlasIterator;

use crate::IfIndex;

/// `RTM_NEWNETCONF` and `RTM_DELNETCONF` (`include/uapi/linux/rtnetlink.h`).
pub(super) const NEW: u16 = 80;
pub(super) const DELETED: u16 = 81;

/// Size of the headers before the attributes: the netlink header and `struct netconfmsg`, padded.
const HEADERS: usize = 16 + 4;

/// Constants of `include/uapi/linux/netconf.h`.
const IFINDEX: u16 = 1;
const FORWARDING: u16 = 2;
const RP_FILTER: u16 = 3;

/// The interface on which the message turns forwarding off. A message with all settings announces a new interface,
/// which is not a change.
pub(super) fn forwarding_stopped(message: &[u8]) -> Option<IfIndex> {
    let (mut index, mut ipv4_forwarding, mut is_new) = (None, None, false);
    for attribute in NlasIterator::new(message.get(HEADERS..)?) {
        let attribute = attribute.ok()?;
        let value = || Some(u32::from_ne_bytes(attribute.value().try_into().ok()?));
        match attribute.kind() {
            IFINDEX => index = value(),
            FORWARDING => ipv4_forwarding = value(),
            RP_FILTER => is_new = true,
            _ => {}
        }
    }
    // The settings of "all" and "default" have negative numbers.
    let index =
        index.filter(|index| !is_new && ipv4_forwarding == Some(0) && i32::try_from(*index).is_ok())?;
    Some(IfIndex::new(index))
}
