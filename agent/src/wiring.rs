//! Parameters for wiring an attachment.

use std::net::IpAddr;

use polder_api::Family;
use polder_api::message::{Attach, Permission, PodAddress, Wiring};
use polder_ipam::alias;
use polder_ipam::ledger::AttachmentEntry;
use polder_ipam::record::{AttachMode, ClusterRecord};

use crate::kernel::desired::bridge_mac;
use crate::kernel::features::Features;
use crate::node_state::Membership;

/// Returns the parameters for wiring an attachment.
pub(crate) fn wiring(
    membership: &Membership,
    features: Features,
    cluster: &ClusterRecord,
    held: &AttachmentEntry,
) -> Wiring {
    let allocations = membership.allocations();
    let gateways = &allocations.gateways;
    let own = |address: &IpAddr| allocations.blocks.iter().any(|owned| owned.block.cidr().has(*address));
    let bridge = bridge_mac(&membership.me().name);
    let addresses = held.addresses.iter().filter_map(|address| {
        let same_family = |gateway: &&IpAddr| Family::of(**gateway) == Family::of(*address);
        let gateway = *held.gateways.iter().chain(gateways).find(same_family)?;
        Some(PodAddress { address: *address, gateway })
    });
    Wiring {
        host_interface: held.attachment.host_interface(),
        alias: alias::write(&held.attachment, held.pod.as_ref()),
        attach: match cluster.attach {
            AttachMode::Bridge => Attach::Bridge { locked: features.locked_ports },
            AttachMode::Routed => Attach::Routed,
        },
        mac: held.mac,
        mtu: held.mtu,
        addresses: addresses.collect(),
        gateway_mac: bridge,
        strays: held.addresses.iter().copied().filter(|address| !own(address)).collect(),
        permission: Permission::Given,
    }
}
