//! Network interfaces: what they are, and what can be done with them.

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
use polder_api::Mac;
use rtnetlink::{LinkBridge, LinkMessageBuilder, LinkUnspec};

pub use self::port::Port;
pub(crate) use self::unreadable::undecodable;
pub use self::veth::{VethPair, create_veth};
pub use self::vxlan::{Vxlan, create_vxlan, send_from};
use crate::{Error, IfIndex, Operation, RouteSocket};

/// The largest MTU of a bridge (`ETH_MAX_MTU`).
const LARGEST_MTU: u32 = 65_535;

/// An interface as the kernel has it.
#[expect(clippy::struct_excessive_bools, reason = "each is a flag of the kernel's own")]
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// Its number in this namespace.
    pub index: IfIndex,
    /// Its name.
    pub name: String,
    /// `IFF_UP`: whether somebody switched it on.
    pub up: bool,
    /// `IFF_RUNNING`: whether what is sent through it goes out, and is not dropped. The kernel's to decide.
    pub running: bool,
    /// Whether its neighbours have link-layer addresses, so that a packet goes to any of them whatever its IP addresses are. Not so on
    /// links like those of `WireGuard`, which sort packets by their IP addresses.
    pub has_neighbours: bool,
    /// Its link-layer address, where it has one of six bytes.
    pub mac: Option<Mac>,
    /// In bytes.
    pub mtu: u32,
    /// The bridge that it is a port of.
    pub controller: Option<IfIndex>,
    /// The number of what it hangs on: of a veth its other end, perhaps in another namespace.
    pub peer: Option<IfIndex>,
    /// `ifalias`.
    pub alias: Option<String>,
    /// What made it.
    pub kind: Kind,
    /// Whether it is a bridge that looks frames up by their VLAN (`vlan_filtering`). Not where the kernel cannot.
    pub filters_vlans: bool,
    /// How it is set as a bridge port, if it is one.
    pub port: Option<Port>,
    /// Whether it makes itself an IPv6 link-local address. `None` where the kernel has no IPv6.
    pub makes_link_local: Option<bool>,
    /// Whether IPv4 packets that come in through it are forwarded. In IPv6 no single interface has a say in that.
    pub forwards: bool,
}

/// What kind of interface it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// A software bridge.
    Bridge,
    /// One end of a pair.
    Veth,
    /// A VXLAN tunnel end point.
    Vxlan(Vxlan),
    /// Anything else: hardware, or what is not ours.
    Other,
}

/// Creates a bridge, up. Its MAC address and its MTU, being set, do not follow its ports; the MTU only because it is
/// changed once the bridge is there (`net/bridge/br_if.c`, `br_mtu_auto_adjust`). It has no multicast snooping, which
/// would cost 10 % of an ADD, and no IPv6 address of its own making.
pub fn create_bridge(name: &str, mac: Mac, mtu: u32) -> [Operation; 3] {
    // Rather one more than one less, which might be too little for IPv6.
    let first = if mtu < LARGEST_MTU { mtu + 1 } else { mtu - 1 };
    let bridge = LinkMessageBuilder::<LinkBridge>::new(name)
        .address(mac.0.to_vec())
        .mtu(first)
        .mcast_snooping(false)
        .stp_state(netlink_packet_route::link::BridgeStpState::Disabled)
        .build();
    [create(bridge), without_link_local(name), change(name).mtu(mtu).up().into()]
}

/// Lets the bridge with that index look all frames up in VLAN 0. A kernel that knows no VLANs on bridges does nothing else.
pub fn without_vlans(index: IfIndex) -> Operation {
    let info = vec![
        LinkInfo::Kind(InfoKind::Bridge),
        LinkInfo::Data(InfoData::Bridge(vec![InfoBridge::VlanFiltering(false)])),
    ];
    let change =
        LinkUnspec::new_with_index(index.number()).append_extra_attribute(LinkAttribute::LinkInfo(info));
    Operation::from(Change(change)).harmless_if(Errno::EOPNOTSUPP)
}

fn create(message: LinkMessage) -> Operation {
    Operation::new(RouteNetlinkMessage::NewLink(message), NLM_F_CREATE | NLM_F_EXCL)
}

/// Deletes the interface, and with a veth its other end. The caller waits out an RCU barrier, some 20 ms, after the
/// interface is gone and its `RTM_DELLINK` notification is sent.
pub fn delete(index: IfIndex) -> Operation {
    Operation::new(RouteNetlinkMessage::DelLink(LinkUnspec::new_with_index(index.number()).build()), 0)
}

/// Deletes every interface of the group in one go, for the price of one.
pub fn delete_group(group: u32) -> Operation {
    let message = LinkMessageBuilder::<LinkUnspec>::new().link_group(group).build();
    Operation::new(RouteNetlinkMessage::DelLink(message), 0)
}

/// A change to the interface of that name.
pub fn change(name: &str) -> Change {
    Change(LinkUnspec::new_with_name(name))
}

/// A change to the interface with that index.
pub fn change_index(index: IfIndex) -> Change {
    Change(LinkUnspec::new_with_index(index.number()))
}

/// Keeps the interface of that name from making itself an IPv6 link-local address. To be said before it is up, in a
/// change of its own: the kernel switches an interface on before it looks at the rest of the message. Where there is no
/// IPv6, because the kernel has none or the MTU is too small for it, there is nothing to switch off.
pub fn without_link_local(name: &str) -> Operation {
    let mode = AfSpecInet6::AddrGenMode(In6AddrGenMode::None);
    let attribute = LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(vec![mode])]);
    let change = Change(LinkUnspec::new_with_name(name).append_extra_attribute(attribute));
    Operation::from(change).harmless_if(Errno::EAFNOSUPPORT)
}

/// What is to be different about an interface. Sent as `RTM_NEWLINK`, because `RTM_SETLINK` ignores port settings.
#[derive(Debug)]
pub struct Change(LinkMessageBuilder<LinkUnspec>);

impl Change {
    /// Switches it on.
    #[must_use]
    pub fn up(self) -> Self {
        Self(self.0.up())
    }

    /// Gives it another MTU, in bytes.
    #[must_use]
    pub fn mtu(self, mtu: u32) -> Self {
        Self(self.0.mtu(mtu))
    }

    /// Gives it another link-layer address.
    #[must_use]
    pub fn mac(self, mac: Mac) -> Self {
        Self(self.0.address(mac.0.to_vec()))
    }

    /// Makes it a port of the bridge with that index, or of none.
    #[must_use]
    pub fn controller(self, bridge: Option<IfIndex>) -> Self {
        Self(self.0.controller(bridge.map_or(0, IfIndex::number)))
    }

    /// Puts it into a group, for [`delete_group`].
    #[must_use]
    pub fn group(self, group: u32) -> Self {
        Self(self.0.link_group(group))
    }

    /// Lets IPv4 packets that come in through it be forwarded, also where new interfaces do not (`conf/default`).
    #[must_use]
    pub fn forwarding(self) -> Self {
        let mut settings = InetDevConf::default();
        settings.forwarding = 1;
        let family = AfSpecUnspec::Inet(vec![AfSpecInet::DevConfRequest(settings)]);
        Self(self.0.append_extra_attribute(LinkAttribute::AfSpecUnspec(vec![family])))
    }

    /// Switches it off.
    #[must_use]
    pub fn down(self) -> Self {
        Self(self.0.down())
    }

    /// Gives it another name. Kernels before 6.2 rename only what is switched off.
    #[must_use]
    pub fn name(self, name: &str) -> Self {
        Self(self.0.name(name))
    }

    /// Gives it an `ifalias`; the kernel takes 255 bytes.
    #[must_use]
    pub fn alias(self, alias: &str) -> Self {
        Self(self.0.alias(alias))
    }

    /// Sets it as a bridge port.
    #[must_use]
    pub fn port(self, port: &Port) -> Self {
        Self(self.0.set_port_kind(port::KIND).set_port_data(InfoPortData::BridgePort(port.attributes())))
    }
}

impl From<Change> for Operation {
    fn from(change: Change) -> Self {
        Self::new(RouteNetlinkMessage::NewLink(change.0.build()), 0)
    }
}

impl RouteSocket {
    /// The interface of that name, if there is one.
    pub fn link(&mut self, name: &str) -> Result<Option<Link>, Error> {
        self.get_link(LinkUnspec::new_with_name(name).build())
    }

    /// The interface with that index, if there is one.
    pub fn link_by_index(&mut self, index: IfIndex) -> Result<Option<Link>, Error> {
        self.get_link(LinkUnspec::new_with_index(index.number()).build())
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
            kind: Kind::Other,
            filters_vlans: false,
            port: None,
            makes_link_local: None,
            forwards: false,
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
                    link.forwards = families.iter().any(forwards);
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
                LinkInfo::Kind(InfoKind::Bridge) => self.kind = Kind::Bridge,
                LinkInfo::Kind(InfoKind::Veth) => self.kind = Kind::Veth,
                LinkInfo::Data(InfoData::Bridge(attributes)) => {
                    self.filters_vlans = attributes.contains(&InfoBridge::VlanFiltering(true));
                }
                LinkInfo::Data(InfoData::Vxlan(attributes)) => {
                    self.kind = Kind::Vxlan(Vxlan::from_attributes(&attributes));
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

fn forwards(family: &AfSpecUnspec) -> bool {
    let AfSpecUnspec::Inet(attributes) = family else { return false };
    attributes.iter().any(|attribute| matches!(attribute, AfSpecInet::DevConf(conf) if conf.forwarding != 0))
}
