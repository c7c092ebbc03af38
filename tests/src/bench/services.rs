//! Rules like those of kube-proxy in iptables mode, with a thousand services that nobody uses.

use std::fmt::Write;

use crate::caller::feed;
use crate::node::Node;

/// Number of services, each with one endpoint.
const SERVICES: u32 = 1_000;

/// The input of `iptables-restore`.
fn rules() -> String {
    let mut nat = String::from(
        "*nat\n:KUBE-SERVICES - [0:0]\n:KUBE-POSTROUTING - [0:0]\n:KUBE-MARK-MASQ - [0:0]\n:KUBE-NODEPORTS - [0:0]\n",
    );
    let mut chains = String::new();
    let mut services = String::new();
    for number in 0..SERVICES {
        let (high, low) = (number / 250, number % 250 + 1);
        let _ = writeln!(chains, ":KUBE-SVC-{number} - [0:0]\n:KUBE-SEP-{number} - [0:0]");
        let _ = writeln!(
            services,
            "-A KUBE-SERVICES -d 10.96.{high}.{low}/32 -p tcp -m comment --comment \"bench/s{number} cluster IP\" \
             -m tcp --dport 80 -j KUBE-SVC-{number}\n\
             -A KUBE-SVC-{number} ! -s 10.0.0.0/8 -d 10.96.{high}.{low}/32 -p tcp -m tcp --dport 80 -j KUBE-MARK-MASQ\n\
             -A KUBE-SVC-{number} -j KUBE-SEP-{number}\n\
             -A KUBE-SEP-{number} -s 192.0.2.{low}/32 -j KUBE-MARK-MASQ\n\
             -A KUBE-SEP-{number} -p tcp -m tcp -j DNAT --to-destination 192.0.2.{low}:8080",
        );
    }
    nat += &chains;
    nat += "-A PREROUTING -j KUBE-SERVICES\n-A OUTPUT -j KUBE-SERVICES\n-A POSTROUTING -j KUBE-POSTROUTING\n\
            -A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000\n\
            -A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN\n\
            -A KUBE-POSTROUTING -j MARK --set-xmark 0x4000/0x0\n\
            -A KUBE-POSTROUTING -j MASQUERADE --random-fully\n";
    nat += &services;
    nat += "-A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS\nCOMMIT\n";
    nat + "*filter\n:KUBE-FORWARD - [0:0]\n:KUBE-FIREWALL - [0:0]\n:KUBE-PROXY-FIREWALL - [0:0]\n\
           -A INPUT -m conntrack --ctstate NEW -j KUBE-PROXY-FIREWALL\n-A INPUT -j KUBE-FIREWALL\n\
           -A OUTPUT -j KUBE-FIREWALL\n-A FORWARD -j KUBE-FORWARD\n\
           -A FORWARD -m conntrack --ctstate NEW -j KUBE-PROXY-FIREWALL\n\
           -A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP\n\
           -A KUBE-FORWARD -m mark --mark 0x4000/0x4000 -j ACCEPT\n\
           -A KUBE-FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT\nCOMMIT\n"
}

/// Loads the rules in a node, and lets bridges pass packets to them, as kube-proxy requires.
pub fn load(node: &Node) {
    let loaded = feed(node.command("iptables-restore").arg("--noflush"), &rules());
    let error = String::from_utf8_lossy(&loaded.stderr);
    assert!(loaded.status.success(), "iptables-restore on {}: {error}", node.name());
    calls(node, true);
}

/// Whether bridges of the node pass packets to iptables. Nodes with an agent are left as the agent sets them up.
pub fn calls(node: &Node, wanted: bool) {
    let value = u8::from(wanted);
    node.shell(&format!("f=/proc/sys/net/bridge/bridge-nf-call-iptables; ! [ -e $f ] || echo {value} > $f"));
}
