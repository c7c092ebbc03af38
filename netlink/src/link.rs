//! Network interfaces: reads, creates, changes and deletes them.

mod port;
mod unreadable;
mod veth;
mod vxlan;

use std::collections::BTreeMap;

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{
    AfSpecInet, AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InetDevConf, InfoBridge, InfoData, InfoKind,
    InfoPortData, LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage,
};
use nix::errno::Errno;
use polder_api::{Mac, PerFamily};
use rtnetlink::{LinkBridge, LinkMessageBuilder, LinkUnspec};

pub use self::port::Port;
pub(crate) use self::unreadable::undecodable;
pub use self::veth::{VethPair, create_veth};
pub use self::vxlan::{Vxlan, create_vxlan, send_from};
use crate::{Error, IfIndex, Operation, RouteSocket};

/// The largest MTU of a bridge (`ETH_MAX_MTU`).
const LARGEST_MTU: u32 = 65_535;

/// The state of an interface in the kernel.
#[expect(clippy::struct_excessive_bools, reason = "each is a flag of the kernel's own")]
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// The index in this network namespace.
    pub index: IfIndex,
    /// The name.
    pub name: String,
    /// `IFF_UP`: administratively up.
    pub up: bool,
    /// `IFF_RUNNING`: whether it has a carrier. The kernel sets it.
    pub running: bool,
    /// Whether its neighbours have link-layer addresses, so that any packet can be sent to any of them. False for
    /// links such as `WireGuard`, which select the peer by IP address.
    pub has_neighbours: bool,
    /// The link-layer address, if it has six bytes.
    pub mac: Option<Mac>,
    /// MTU, in bytes.
    pub mtu: u32,
    /// The bridge, if it is a bridge port (`master`).
    pub controller: Option<IfIndex>,
    /// `IFLA_LINK`: for a veth the index of its other end, possibly in another namespace.
    pub peer: Option<IfIndex>,
    /// `ifalias`.
    pub alias: Option<String>,
    /// The kind of device.
    pub kind: LinkKind,
    /// Whether it is a bridge with `vlan_filtering` on. False if the kernel does not support that.
    pub filters_vlans: bool,
    /// Whether it is a bridge whose own setting applies iptables rules to bridged frames, by family (`nf_call_iptables`,
    /// `nf_call_ip6tables`; with the module `br_netfilter`).
    pub calls_iptables: PerFamily<bool>,
    /// The settings of the bridge port, if it is one.
    pub port: Option<Port>,
    /// Whether it generates an IPv6 link-local address. `None` if the kernel has no IPv6.
    pub makes_link_local: Option<bool>,
    /// Whether IPv4 packets received on it are forwarded. IPv6 forwarding is set for the whole namespace.
    pub ipv4_forwarding: bool,
}

/// The kind of an interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LinkKind {
    /// A software bridge.
    Bridge,
    /// One end of a veth pair.
    Veth,
    /// A VXLAN tunnel endpoint, with its settings.
    Vxlan(Vxlan),
    /// Any other kind, for example hardware.
    Other,
}

/// Creates a bridge and sets it up. MAC address and MTU are set explicitly, so they do not follow the ports; for the
/// MTU this works only if it is changed after creation (`net/bridge/br_if.c`, `br_mtu_auto_adjust`). Multicast
/// snooping is off, because it would cost 10 % of an ADD; so is the IPv6 link-local address.
pub fn create_bridge(name: &str, mac: Mac, mtu: u32) -> [Operation; 3] {
    // One more, not one less: one less may be below the minimum MTU of IPv6.
    let first = if mtu < LARGEST_MTU { mtu + 1 } else { mtu - 1 };
    let bridge = LinkMessageBuilder::<LinkBridge>::new(name)
        .address(mac.0.to_vec())
        .mtu(first)
        .mcast_snooping(false)
        .stp_state(netlink_packet_route::link::BridgeStpState::Disabled)
        .build();
    [create(bridge), without_link_local(name), change(name).mtu(mtu).up().into()]
}

/// Turns VLAN filtering off, so that the bridge looks up all frames in VLAN 0. Succeeds on kernels without VLAN
/// support on bridges, which always do that.
pub fn without_vlans(index: IfIndex) -> Operation {
    let info = vec![
        LinkInfo::Kind(InfoKind::Bridge),
        LinkInfo::Data(InfoData::Bridge(vec![InfoBridge::VlanFiltering(false)])),
    ];
    let change =
        LinkUnspec::new_with_index(index.number()).append_extra_attribute(LinkAttribute::LinkInfo(info));
    Operation::from(LinkChange(change)).harmless_if(Errno::EOPNOTSUPP)
}

fn create(message: LinkMessage) -> Operation {
    Operation::new(RouteNetlinkMessage::NewLink(message), NLM_F_CREATE | NLM_F_EXCL)
}

/// Deletes the interface; for a veth also its other end. The caller waits for an RCU barrier (about 20 ms) after the
/// interface is deleted and its `RTM_DELLINK` notification is sent.
pub fn delete(index: IfIndex) -> Operation {
    Operation::new(RouteNetlinkMessage::DelLink(LinkUnspec::new_with_index(index.number()).build()), 0)
}

/// Deletes all interfaces of the group in one request, which takes as long as deleting one.
pub fn delete_group(group: u32) -> Operation {
    let message = LinkMessageBuilder::<LinkUnspec>::new().link_group(group).build();
    Operation::new(RouteNetlinkMessage::DelLink(message), 0)
}

/// A change to the interface of that name.
pub fn change(name: &str) -> LinkChange {
    LinkChange(LinkUnspec::new_with_name(name))
}

/// A change to the interface with that index.
pub fn change_index(index: IfIndex) -> LinkChange {
    LinkChange(LinkUnspec::new_with_index(index.number()))
}

/// Prevents an automatic IPv6 link-local address. Send it before the interface is up, in a separate request: the
/// kernel sets an interface up before it reads the rest of the message. Succeeds if there is no IPv6 (not in the
/// kernel, or the MTU is too small).
pub fn without_link_local(name: &str) -> Operation {
    let mode = AfSpecInet6::AddrGenMode(In6AddrGenMode::None);
    let attribute = LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(vec![mode])]);
    let change = LinkChange(LinkUnspec::new_with_name(name).append_extra_attribute(attribute));
    Operation::from(change).harmless_if(Errno::EAFNOSUPPORT)
}

/// Changes to one interface. Sent as `RTM_NEWLINK`, because `RTM_SETLINK` ignores port settings.
#[derive(Debug)]
pub struct LinkChange(LinkMessageBuilder<LinkUnspec>);

impl LinkChange {
    /// Sets it up.
    #[must_use]
    pub fn up(self) -> Self {
        Self(self.0.up())
    }

    /// Sets the MTU, in bytes.
    #[must_use]
    pub fn mtu(self, mtu: u32) -> Self {
        Self(self.0.mtu(mtu))
    }

    /// Sets the link-layer address.
    #[must_use]
    pub fn mac(self, mac: Mac) -> Self {
        Self(self.0.address(mac.0.to_vec()))
    }

    /// Makes it a port of that bridge; `None` removes it from its bridge.
    #[must_use]
    pub fn controller(self, bridge: Option<IfIndex>) -> Self {
        Self(self.0.controller(bridge.map_or(0, IfIndex::number)))
    }

    /// Puts it into a group, for [`delete_group`].
    #[must_use]
    pub fn group(self, group: u32) -> Self {
        Self(self.0.link_group(group))
    }

    /// Turns IPv4 forwarding on, in case new interfaces have it off (`conf/default`).
    #[must_use]
    pub fn forwarding(self) -> Self {
        let mut settings = InetDevConf::default();
        settings.forwarding = 1;
        let family = AfSpecUnspec::Inet(vec![AfSpecInet::DevConfRequest(settings)]);
        Self(self.0.append_extra_attribute(LinkAttribute::AfSpecUnspec(vec![family])))
    }

    /// Sets it down.
    #[must_use]
    pub fn down(self) -> Self {
        Self(self.0.down())
    }

    /// Renames it. Kernels before 6.2 rename an interface only if it is down.
    #[must_use]
    pub fn name(self, name: &str) -> Self {
        Self(self.0.name(name))
    }

    /// Sets the `ifalias`, at most 254 bytes: `IFALIASZ` is 256, the attribute is sent with its NUL, and Linux 6.18
    /// rejects 255 bytes.
    #[must_use]
    pub fn alias(self, alias: &str) -> Self {
        Self(self.0.alias(alias))
    }

    /// Sets the bridge port settings.
    #[must_use]
    pub fn port(self, port: &Port) -> Self {
        Self(self.0.set_port_kind(port::KIND).set_port_data(InfoPortData::BridgePort(port.attributes())))
    }
}

impl From<LinkChange> for Operation {
    fn from(change: LinkChange) -> Self {
        Self::new(RouteNetlinkMessage::NewLink(change.0.build()), 0)
    }
}

impl RouteSocket {
    /// The interface with that name; `None` if it does not exist.
    pub fn link(&mut self, name: &str) -> Result<Option<Link>, Error> {
        self.get_link(LinkUnspec::new_with_name(name).build())
    }

    /// The interface with that index; `None` if it does not exist.
    pub fn link_by_index(&mut self, index: IfIndex) -> Result<Option<Link>, Error> {
        self.get_link(LinkUnspec::new_with_index(index.number()).build())
    }

    /// Executes the operations in order; the first one creates an interface. Returns the interface as it was created,
    /// if the kernel echoes it (since Linux 6.2, `rtnl_configure_link` in `net/core/rtnetlink.c`).
    pub fn create_link(
        &mut self,
        creation: Operation,
        settings: impl IntoIterator<Item = Operation>,
    ) -> Result<Option<Link>, Error> {
        let executed = self.execute_echoed(std::iter::once(creation.echoed()).chain(settings))?;
        let mut created = None;
        for (outcome, echoed) in executed {
            outcome?;
            for message in echoed {
                if let RouteNetlinkMessage::NewLink(message) = message {
                    created.get_or_insert(Link::from(message));
                }
            }
        }
        Ok(created)
    }

    fn get_link(&mut self, message: LinkMessage) -> Result<Option<Link>, Error> {
        match self.get(RouteNetlinkMessage::GetLink(message)) {
            Ok(RouteNetlinkMessage::NewLink(message)) => Ok(Some(Link::from(message))),
            Ok(_) => Err(Error::NoAnswer),
            Err(error) if error.is_missing() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// All interfaces, by name.
    pub fn links(&mut self) -> Result<BTreeMap<String, Link>, Error> {
        let message = RouteNetlinkMessage::GetLink(LinkMessage::default());
        let links = self.dump(message, |message| match message {
            RouteNetlinkMessage::NewLink(message) => Some(Link::from(message)),
            _ => None,
        })?;
        Ok(links.into_iter().map(|link| (link.name.clone(), link)).collect())
    }
}

impl From<LinkMessage> for Link {
    fn from(message: LinkMessage) -> Self {
        let mut link = Self {
            index: IfIndex::new(message.header.index),
            name: String::new(),
            up: message.header.flags.contains(LinkFlags::Up),
            running: message.header.flags.contains(LinkFlags::Running),
            has_neighbours: !message.header.flags.intersects(LinkFlags::Noarp | LinkFlags::Pointopoint)
                && message.header.link_layer_type != LinkLayerType::None,
            mac: None,
            mtu: 0,
            controller: None,
            peer: None,
            alias: None,
            kind: LinkKind::Other,
            filters_vlans: false,
            calls_iptables: PerFamily::default(),
            port: None,
            makes_link_local: None,
            ipv4_forwarding: false,
        };
        for attribute in message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => link.name = name,
                LinkAttribute::Address(bytes) => link.mac = bytes.try_into().ok().map(Mac),
                LinkAttribute::Mtu(mtu) => link.mtu = mtu,
                LinkAttribute::Controller(index) => link.controller = Some(IfIndex::new(index)),
                LinkAttribute::Link(index) => link.peer = Some(IfIndex::new(index)),
                LinkAttribute::IfAlias(alias) => link.alias = Some(alias),
                LinkAttribute::LinkInfo(infos) => link.take_info(infos),
                LinkAttribute::AfSpecUnspec(families) => {
                    link.makes_link_local = families.iter().find_map(makes_link_local);
                    link.ipv4_forwarding = families.iter().any(ipv4_forwarding);
                }
                _ => {}
            }
        }
        link
    }
}

impl Link {
    fn take_info(&mut self, infos: Vec<LinkInfo>) {
        for info in infos {
            match info {
                LinkInfo::Kind(InfoKind::Bridge) => self.kind = LinkKind::Bridge,
                LinkInfo::Kind(InfoKind::Veth) => self.kind = LinkKind::Veth,
                LinkInfo::Data(InfoData::Bridge(attributes)) => {
                    self.filters_vlans = attributes.contains(&InfoBridge::VlanFiltering(true));
                    let has = |setting| attributes.contains(&setting);
                    self.calls_iptables = PerFamily::new(
                        has(InfoBridge::NfCallIpTables(true)),
                        has(InfoBridge::NfCallIp6Tables(true)),
                    );
                }
                LinkInfo::Data(InfoData::Vxlan(attributes)) => {
                    self.kind = LinkKind::Vxlan(Vxlan::from_attributes(&attributes));
                }
                LinkInfo::PortData(InfoPortData::BridgePort(attributes)) => {
                    self.port = Some(Port::from_attributes(&attributes));
                }
                _ => {}
            }
        }
    }
}

fn makes_link_local(family: &AfSpecUnspec) -> Option<bool> {
    let AfSpecUnspec::Inet6(attributes) = family else { return None };
    attributes.iter().find_map(|attribute| match attribute {
        AfSpecInet6::AddrGenMode(mode) => Some(*mode != In6AddrGenMode::None),
        _ => None,
    })
}

fn ipv4_forwarding(family: &AfSpecUnspec) -> bool {
    let AfSpecUnspec::Inet(attributes) = family else { return false };
    attributes.iter().any(|attribute| matches!(attribute, AfSpecInet::DevConf(conf) if conf.forwarding != 0))
}
