//! Host ports that do not work as their pods request, or that take packets from processes of the host.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;

use polder_api::{Family, PortMapping, TransportProtocol};
use polder_ipam::ledger::AttachmentEntry;

use crate::node_state::Pass;

/// A socket of the host that receives packets from any client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listener {
    /// The transport protocol.
    pub protocol: TransportProtocol,
    /// The local address; unspecified for all addresses.
    pub address: IpAddr,
    /// The local port.
    pub port: u16,
}

/// The files with the sockets of a network namespace (`net/ipv4/tcp_ipv4.c`, `net/ipv4/udp.c`), each with its protocol
/// and the state of a socket that receives packets from any client: `TCP_LISTEN`; for UDP, `TCP_CLOSE` (not connected).
const FILES: [(&str, TransportProtocol, &str); 4] = [
    ("tcp", TransportProtocol::Tcp, "0A"),
    ("tcp6", TransportProtocol::Tcp, "0A"),
    ("udp", TransportProtocol::Udp, "07"),
    ("udp6", TransportProtocol::Udp, "07"),
];

/// The sockets in these files of `folder` (`/proc/net`). A file that cannot be read has none: the kernel may lack IPv6.
pub fn listeners(folder: &Path) -> Vec<Listener> {
    let sockets = FILES.iter().flat_map(|(file, protocol, state)| {
        let text = fs::read_to_string(folder.join(file)).unwrap_or_default();
        let parse = |line: &str| listener(line, *protocol, state);
        text.lines().filter_map(parse).collect::<Vec<_>>()
    });
    sockets.collect()
}

/// The socket in a line such as `0: 0100007F:1F90 00000000:0000 0A ...`.
fn listener(line: &str, protocol: TransportProtocol, state: &str) -> Option<Listener> {
    let mut fields = line.split_whitespace().skip(1);
    let (address, port) = fields.next()?.split_once(':')?;
    (fields.nth(1)? == state).then_some(())?;
    // Each four bytes are printed as one number of this machine.
    let words: Vec<[u8; 4]> = (0..address.len())
        .step_by(8)
        .map(|at| Some(u32::from_str_radix(address.get(at..at + 8)?, 16).ok()?.to_ne_bytes()))
        .collect::<Option<_>>()?;
    let address = match <[u8; 16]>::try_from(words.concat()) {
        Ok(octets) => IpAddr::from(octets),
        Err(octets) => IpAddr::from(<[u8; 4]>::try_from(octets).ok()?),
    };
    Some(Listener { protocol, address, port: u16::from_str_radix(port, 16).ok()? })
}

impl Listener {
    /// Whether packets for the socket go to that host port instead.
    fn loses_to(&self, port: &PortMapping) -> bool {
        let any = PortMapping { host_address: None, ..*port };
        let address = match self.address {
            // A socket for all addresses of IPv6 usually receives IPv4, too.
            IpAddr::V6(Ipv6Addr::UNSPECIFIED) => None,
            address => Some(address.to_canonical()),
        };
        // IPv6 loopback addresses have no host ports.
        (self.protocol, self.port) == (port.protocol, port.host_port.get())
            && address != Some(Ipv6Addr::LOCALHOST.into())
            && port.overlaps(&PortMapping { host_address: address, ..any })
    }
}

/// The problems with the host ports of these pods.
pub fn problems(pods: &[AttachmentEntry], listeners: &[Listener], pass: &Pass) -> Vec<String> {
    let of_pod = |held: &AttachmentEntry| {
        let pod = held.pod.as_ref().map_or_else(|| held.attachment.to_string(), ToString::to_string);
        let problem = |port: &PortMapping| problem(&pod, held, port, listeners, pass);
        held.ports.iter().filter_map(problem).collect::<Vec<_>>()
    };
    pods.iter().flat_map(of_pod).collect()
}

fn problem(
    pod: &str,
    held: &AttachmentEntry,
    port: &PortMapping,
    listeners: &[Listener],
    pass: &Pass,
) -> Option<String> {
    let is_host = |address: &IpAddr| {
        pass.host_addresses.contains(address) || (address.is_loopback() && *address != Ipv6Addr::LOCALHOST)
    };
    if let Some(address) = port.single_address().filter(|address| !is_host(address)) {
        return Some(format!(
            "host port {port} of pod {pod} is not reachable: {address} is not an address of this node that has host \
             ports. Correct hostIP of the pod, or give this node the address"
        ));
    }
    let has_family = |family: Family| held.addresses.iter().any(|own| Family::of(*own) == family);
    if !Family::BOTH.into_iter().any(|family| port.is_of_family(family) && has_family(family)) {
        return Some(format!(
            "host port {port} of pod {pod} is not reachable: the pod has no address of that family. Correct hostIP of \
             the pod"
        ));
    }
    let Listener { protocol, address, port: number } =
        listeners.iter().find(|listener| listener.loses_to(port))?;
    let address = match address {
        IpAddr::V4(Ipv4Addr::UNSPECIFIED) | IpAddr::V6(Ipv6Addr::UNSPECIFIED) => "all addresses".to_owned(),
        address => address.to_string(),
    };
    let option = if *protocol == TransportProtocol::Udp { "u" } else { "t" };
    Some(format!(
        "a process of this node listens on {protocol} port {number} ({address}), but host port {port} of pod {pod} \
         gets the packets to it: give one of them another port. `ss -l{option}np 'sport = :{number}'` shows the process"
    ))
}

#[cfg(test)]
mod tests {
    use polder_ipam::Moment;
    use polder_ipam::ledger::AttachmentKind;

    use super::*;

    fn pod(port: &str) -> AttachmentEntry {
        AttachmentEntry {
            attachment: "net/c1/eth0".parse().unwrap(),
            kind: AttachmentKind::Pod,
            since: Moment::BOOT,
            addresses: vec!["10.0.0.5".parse().unwrap()],
            mac: polder_api::Mac([2; 6]),
            mtu: 1450,
            netns: String::new(),
            pod: None,
            leaving: false,
            gateways: Vec::new(),
            ports: vec![port.parse().unwrap()],
        }
    }

    fn listener_at(address: &str, port: u16) -> Listener {
        Listener { protocol: TransportProtocol::Tcp, address: address.parse().unwrap(), port }
    }

    /// The problems of one pod with that host port, on a node with 192.0.2.1.
    fn problems_of(port: &str, listeners: &[Listener]) -> Vec<String> {
        let pass = Pass { host_addresses: ["192.0.2.1".parse().unwrap()].into(), ..Pass::default() };
        problems(&[pod(port)], listeners, &pass)
    }

    #[test]
    fn the_listening_sockets_of_a_host_are_found() {
        let folder = tempfile::tempdir().unwrap();
        let head = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid\n";
        let [loopback, all] =
            [[127, 0, 0, 1], [0; 4]].map(|octets| format!("{:08X}", u32::from_ne_bytes(octets)));
        let tcp = format!(
            "{head}   0: {loopback}:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0\n   \
             1: {loopback}:1F91 0100007F:C350 01 00000000:00000000 00:00000000 00000000     0\n"
        );
        fs::write(folder.path().join("tcp"), tcp).unwrap();
        let udp6 = format!("{head} 7: {all}{all}{all}{all}:0035 {all}{all}{all}{all}:0000 07 0:0 0\n");
        fs::write(folder.path().join("udp6"), udp6).unwrap();
        let udp = Listener { protocol: TransportProtocol::Udp, address: "::".parse().unwrap(), port: 53 };
        assert_eq!(listeners(folder.path()), [listener_at("127.0.0.1", 8080), udp]);
    }

    #[test]
    fn a_host_port_at_an_address_of_no_interface_is_a_problem() {
        let found = problems_of("198.51.100.5:80:80/tcp", &[]);
        assert!(
            found.len() == 1 && found[0].contains("198.51.100.5") && found[0].contains("hostIP"),
            "{found:?}"
        );
        assert_eq!(problems_of("[::]:80:80/tcp", &[]).len(), 1, "an IPv4 pod");
        for right in ["80:80/tcp", "192.0.2.1:80:80/tcp", "127.0.0.1:80:80/tcp", "0.0.0.0:80:80/tcp"] {
            assert_eq!(problems_of(right, &[]), Vec::<String>::new(), "{right}");
        }
    }

    #[test]
    fn a_process_that_loses_its_packets_to_a_host_port_is_a_problem() {
        for address in ["0.0.0.0", "::", "192.0.2.1", "127.0.0.1", "::ffff:192.0.2.1"] {
            let found = problems_of("22:2222/tcp", &[listener_at(address, 22)]);
            assert!(found.len() == 1 && found[0].contains("ss -ltnp 'sport = :22'"), "{address}: {found:?}");
        }
        assert_eq!(problems_of("192.0.2.1:22:22/tcp", &[listener_at("0.0.0.0", 22)]).len(), 1);
        for (port, listener) in [
            ("22:22/udp", listener_at("0.0.0.0", 22)),
            ("23:22/tcp", listener_at("0.0.0.0", 22)),
            ("22:22/tcp", listener_at("::1", 22)),
            ("192.0.2.1:22:22/tcp", listener_at("127.0.0.1", 22)),
        ] {
            assert_eq!(problems_of(port, &[listener]), Vec::<String>::new(), "{port}");
        }
    }
}
