//! The settings of a bridge port.

use netlink_packet_route::link::{BridgePortState, InfoBridgePort, InfoPortKind};

pub(super) const KIND: InfoPortKind = InfoPortKind::Bridge;

/// How the bridge treats one of its ports (`net/bridge/br_netlink.c`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[expect(clippy::struct_excessive_bools, reason = "each is one flag of the kernel's")]
pub struct Port {
    /// Whether frames pass. The kernel's to decide, not ours: it is ignored where a port is set.
    pub forwarding: bool,
    /// Whether senders are learned from the frames that they send.
    pub learning: bool,
    /// Whether frames that are not for this port reach it, because nobody knows where to send them: unknown
    /// unicast, multicast and broadcast.
    pub flooding: bool,
    /// Whether it may exchange frames with the host only, not with other isolated ports.
    pub isolated: bool,
    /// Whether only senders with an FDB entry on this port are let in (Linux 5.18).
    pub locked: bool,
}

impl Port {
    /// A pod's port: it hears nobody else's frames, and can send under its own address alone.
    pub const fn of_pod(locked: bool) -> Self {
        Self { forwarding: true, learning: false, flooding: false, isolated: true, locked }
    }

    /// Whether the settings that are ours to make are the same.
    pub fn is_set_like(&self, other: &Self) -> bool {
        Self { forwarding: other.forwarding, ..*self } == *other
    }

    pub(super) fn attributes(&self) -> Vec<InfoBridgePort> {
        let mut attributes = vec![
            InfoBridgePort::Learning(self.learning),
            InfoBridgePort::UnicastFlood(self.flooding),
            InfoBridgePort::MulticastFlood(self.flooding),
            InfoBridgePort::BroadcastFlood(self.flooding),
            InfoBridgePort::Isolated(self.isolated),
        ];
        // A kernel without it would take the attribute and do nothing: it is not sent unless it is known to work.
        if self.locked {
            attributes.push(InfoBridgePort::Locked(true));
        }
        attributes
    }

    pub(super) fn from_attributes(attributes: &[InfoBridgePort]) -> Self {
        let mut port =
            Self { forwarding: false, learning: false, flooding: false, isolated: false, locked: false };
        for attribute in attributes {
            match attribute {
                InfoBridgePort::State(state) => port.forwarding = *state == BridgePortState::Forwarding,
                InfoBridgePort::Learning(on) => port.learning = *on,
                InfoBridgePort::UnicastFlood(on)
                | InfoBridgePort::MulticastFlood(on)
                | InfoBridgePort::BroadcastFlood(on) => port.flooding |= *on,
                InfoBridgePort::Isolated(on) => port.isolated = *on,
                InfoBridgePort::Locked(on) => port.locked = *on,
                _ => {}
            }
        }
        port
    }
}
