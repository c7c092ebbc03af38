//! The settings of a bridge port.

use netlink_packet_route::link::{BridgePortState, InfoBridgePort, InfoPortKind};

pub(super) const KIND: InfoPortKind = InfoPortKind::Bridge;

/// The settings of a bridge port (`net/bridge/br_netlink.c`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[expect(clippy::struct_excessive_bools, reason = "each is one flag of the kernel's")]
pub struct Port {
    /// Whether the port is in state forwarding. The kernel sets it; it is ignored when a port is configured.
    pub forwarding: bool,
    /// Whether the bridge learns source MAC addresses from frames.
    pub learning: bool,
    /// Whether unknown unicast, multicast and broadcast frames are flooded to the port.
    pub flooding: bool,
    /// Whether the port exchanges no frames with other isolated ports, only with the host.
    pub isolated: bool,
    /// Whether the port accepts frames only from senders with an FDB entry on it (Linux 5.18).
    pub locked: bool,
}

impl Port {
    /// The settings of a pod's port: the pod receives no frames of others and, if `locked`, sends only with its own MAC
    /// address.
    pub const fn of_pod(locked: bool) -> Self {
        Self { forwarding: true, learning: false, flooding: false, isolated: true, locked }
    }

    /// Whether the settings other than `forwarding` are equal.
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
        // Older kernels accept the attribute and ignore it: send it only if the kernel is known to support it.
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
