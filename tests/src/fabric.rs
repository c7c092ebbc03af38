//! The network between the nodes: segments, each a single link, and a router between them.

use std::net::IpAddr;
use std::path::Path;

use polder_api::Family;

use crate::node::{Node, output};

/// Number of the segment of hosts that are not nodes.
pub const WORLD: u8 = 9;

/// Switches and a router, in one namespace.
#[derive(Debug)]
pub struct Fabric {
    node: Node,
    families: Families,
}

/// The families of the underlay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Families {
    /// IPv4.
    pub v4: bool,
    /// IPv6.
    pub v6: bool,
}

impl Families {
    /// Only IPv4.
    pub const V4: Self = Self { v4: true, v6: false };
    /// Only IPv6.
    pub const V6: Self = Self { v4: false, v6: true };
    /// IPv4 and IPv6.
    pub const DUAL: Self = Self { v4: true, v6: true };

    /// The families of the addresses or prefixes.
    pub fn of<T: AsRef<str>>(texts: impl IntoIterator<Item = T>) -> Self {
        texts.into_iter().fold(Self { v4: false, v6: false }, |all, text| {
            let v6 = text.as_ref().contains(':');
            Self { v4: all.v4 || !v6, v6: all.v6 || v6 }
        })
    }

    /// Iterates over the families.
    pub fn each(self) -> impl Iterator<Item = Family> {
        let wanted = move |family: &Family| if *family == Family::V4 { self.v4 } else { self.v6 };
        Family::BOTH.into_iter().filter(wanted)
    }
}

/// The address of host `host` on segment `segment`.
pub fn address(segment: u8, host: u8, v6: bool) -> IpAddr {
    if v6 {
        IpAddr::from([0xfd10, segment.into(), 0, 0, 0, 0, 0, host.into()])
    } else {
        IpAddr::from([10, 10, segment, host])
    }
}

/// Host number of the router on every segment.
pub const ROUTER: u8 = 254;

impl Fabric {
    /// Creates the segments. With a router they are connected, without one they are separate.
    pub fn new(folder: &Path, segments: &[u8], families: Families, router: bool) -> Self {
        let node = Node::boot("fabric", folder);
        let mut lines = String::new();
        for segment in segments {
            lines += &format!(
                // A fixed MAC address: otherwise the bridge uses that of a port, and the router's MAC address changes
                // when a node is connected.
                "ip link add seg{segment} address 52:54:00:ff:00:{segment:02x} type bridge mcast_snooping 0\n\
                 echo 0 > /proc/sys/net/ipv6/conf/seg{segment}/accept_dad\n\
                 ip link set seg{segment} up\n"
            );
            if router && families.v4 {
                lines +=
                    &format!("ip address add {}/24 dev seg{segment}\n", address(*segment, ROUTER, false));
            }
            if router && families.v6 {
                lines += &format!(
                    "ip address add {}/64 dev seg{segment} nodad\n",
                    address(*segment, ROUTER, true)
                );
            }
        }
        if router {
            lines += "echo 1 > /proc/sys/net/ipv4/ip_forward\n\
                      echo 1 > /proc/sys/net/ipv6/conf/all/forwarding\n";
        }
        node.shell(&lines);
        Self { node, families }
    }

    /// The namespace of switches and router.
    pub fn node(&self) -> &Node {
        &self.node
    }

    /// Keeps the fabric running after the end of this program.
    pub fn keep(&mut self) {
        self.node.keep();
    }

    /// Connects a node to a segment as host `host`, with an interface `eth0` of that MTU.
    pub fn join(&self, node: &Node, segment: u8, host: u8, mtu: u32) {
        let port = format!("{}-{segment}", node.name());
        // The interface of an earlier boot is deleted with its namespace, which takes time on a busy machine.
        let _ = self.node.command("ip").args(["link", "delete", "dev", &port]).output();
        // Both ends are created in their namespaces, so the host has no interface.
        let (here, there) = (self.node.pid().to_string(), node.pid().to_string());
        // The same MAC address after each boot: a neighbour ignores another one for a second.
        let mac = format!("52:54:00:00:{segment:02x}:{host:02x}");
        let outer = [port.as_str(), "netns", &here, "type", "veth"];
        let inner = ["peer", "name", "eth0", "address", &mac, "netns", &there];
        let ends = [outer.as_slice(), &inner].concat();
        output(std::process::Command::new("ip").args(["link", "add"]).args(ends));
        self.node.shell(&format!("ip link set {port} mtu {mtu} master seg{segment} up"));
        let mut lines =
            format!("echo 0 > /proc/sys/net/ipv6/conf/eth0/accept_dad\nip link set eth0 mtu {mtu} up\n");
        if self.families.v4 {
            lines += &format!("ip address add {}/24 dev eth0\n", address(segment, host, false));
        }
        if self.families.v6 {
            lines += &format!("ip address add {}/64 dev eth0 nodad\n", address(segment, host, true));
        }
        node.shell(&lines);
    }

    /// Gives a node a default route through the router of its segment.
    pub fn default_route(&self, node: &Node, segment: u8) {
        if self.families.v4 {
            node.run("ip", &["route", "add", "default", "via", &address(segment, ROUTER, false).to_string()]);
        }
        if self.families.v6 {
            node.run(
                "ip",
                &["-6", "route", "add", "default", "via", &address(segment, ROUTER, true).to_string()],
            );
        }
    }

    /// Disconnects a node from its segment.
    pub fn cut(&self, node: &Node, segment: u8) {
        self.node.run("ip", &["link", "set", &format!("{}-{segment}", node.name()), "down"]);
    }

    /// Drops packets of the node with a source in these networks outside tunnels, as many clouds do.
    pub fn drop_sources(&self, node: &Node, segment: u8, networks: &[&str]) {
        let (name, port) = (node.name(), format!("{}-{segment}", node.name()));
        let mut rules = format!(
            "add table bridge {name}; \
             add chain bridge {name} sent {{ type filter hook prerouting priority 0; }}; "
        );
        for network in networks {
            let family = if network.contains(':') { "ip6" } else { "ip" };
            rules += &format!("add rule bridge {name} sent iifname {port} {family} saddr {network} drop; ");
        }
        self.node.run("nft", &[&rules]);
    }

    /// Forwards all packets of the node again.
    pub fn carry_sources(&self, node: &Node) {
        self.node.run("nft", &["delete", "table", "bridge", node.name()]);
    }

    /// Connects the node to its segment again.
    pub fn restore(&self, node: &Node, segment: u8) {
        self.node.run("ip", &["link", "set", &format!("{}-{segment}", node.name()), "up"]);
    }
}
