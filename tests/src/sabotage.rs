//! Random changes of Polder's kernel state by other programs.

use crate::agent::Worker;
use crate::random::Random;

/// A change by another program: its description, and the shell command. In the command, `$F` is a family, 4 or 6,
/// `pick` returns one of its input lines, and `ports` are the pod interfaces. A missing object is skipped.
pub type Change = (&'static str, &'static str);

/// The changes that Polder must repair.
pub const REPAIRED_CHANGES: [Change; 35] = [
    (
        "deletes a route",
        "ip -$F route delete $(ip -$F route show proto 84 | sed 's/^unreachable //' | pick | cut -d' ' -f1)",
    ),
    ("deletes all routes", "ip -$F route flush proto 84"),
    (
        "turns a route away",
        "ip -$F route replace blackhole $(ip -$F route show proto 84 | sed 's/^unreachable //' | pick | cut -d' ' \
         -f1) proto 84",
    ),
    (
        "bends a route",
        "set -- $(ip -$F route show proto 84 | sed 's/^unreachable //' | pick | sed -E 's/ .*metric ([0-9]+).*/ \\1/')
         ip -$F route change $1 dev polder0 proto 84 metric $2",
    ),
    ("adds a route of ours to nowhere", "ip -$F route add $(net 7) dev polder0 proto 84"),
    (
        "deletes a neighbour",
        "ip -$F neigh delete $(ip -$F neigh show nud permanent | grep 'dev polder' | pick | cut -d' ' -f1-3)",
    ),
    (
        "changes a neighbour",
        "ip -$F neigh replace $(ip -$F neigh show nud permanent | grep 'dev polder' | pick | cut -d' ' -f1-3) \
         lladdr 02:00:00:00:00:99 nud permanent",
    ),
    ("adds a neighbour", "ip -$F neigh add $(host 7) lladdr 02:00:00:00:00:98 nud permanent dev polder.vx"),
    (
        "deletes a forwarding entry",
        "set -- $(bridge fdb show dev polder.vx | grep dst | pick); bridge fdb delete $1 dev polder.vx dst $3",
    ),
    (
        "changes a forwarding entry",
        "set -- $(bridge fdb show dev polder.vx | grep dst | pick); \
         bridge fdb replace $1 dev polder.vx dst 192.0.2.9 self permanent",
    ),
    (
        "adds a forwarding entry",
        "bridge fdb append 02:00:00:00:00:97 dev polder.vx dst 192.0.2.8 self permanent",
    ),
    (
        "deletes a pod's forwarding entry",
        "port=$(ports | pick); set -- $(bridge fdb show dev $port | grep 'static' | pick); \
         bridge fdb delete $1 dev $port master",
    ),
    (
        "deletes an address",
        "ip -$F address delete $(ip -$F -o address show dev polder0 scope global | pick | awk '{print $4}') dev \
         polder0",
    ),
    ("adds an address", "ip -$F address add $(host 6) dev polder0"),
    ("sets the bridge down", "ip link set polder0 down"),
    ("sets the tunnel down", "ip link set polder.vx down"),
    ("changes the bridge's MAC address", "ip link set polder0 address 02:00:00:00:00:96"),
    ("changes the tunnel's MTU", "ip link set polder.vx mtu 1300"),
    ("deletes the bridge", "ip link delete polder0"),
    ("deletes the tunnel", "ip link delete polder.vx"),
    (
        "renames the bridge",
        "ip link set polder0 down && ip link set polder0 name elsewhere && ip link set elsewhere up",
    ),
    ("takes a pod off the bridge", "ip link set $(ports | pick) nomaster"),
    ("sets a pod's interface down", "ip link set $(ports | pick) down"),
    ("unlocks a pod's port", "bridge link set dev $(ports | pick) isolated off flood on learning on"),
    ("deletes the filter", "nft delete table inet polder"),
    (
        "empties a set of the filter",
        "nft flush set inet polder $(nft list sets inet | grep -o 'set [a-z]*[46]' | pick | cut -d' ' -f2)",
    ),
    ("empties a chain of the filter", "nft flush chain inet polder from_pods"),
    ("lets somebody in", "nft add element inet polder peers4 '{ 192.0.2.7 }'"),
    ("stops IPv4 forwarding", "sysctl -qw net.ipv4.ip_forward=0"),
    ("stops IPv6 forwarding", "sysctl -qw net.ipv6.conf.all.forwarding=0"),
    ("stops forwarding from the uplink", "echo 0 > /proc/sys/net/ipv4/conf/eth0/forwarding"),
    ("stops forwarding from the bridge", "echo 0 > /proc/sys/net/ipv4/conf/polder0/forwarding"),
    ("stops forwarding from the tunnel", "echo 0 > /proc/sys/net/ipv4/conf/polder.vx/forwarding"),
    (
        "stops forwarding from new interfaces and deletes the bridge",
        "echo 0 > /proc/sys/net/ipv4/conf/default/forwarding; ip link delete polder0",
    ),
    ("takes IPv6 from the bridge", "echo 1 > /proc/sys/net/ipv6/conf/polder0/disable_ipv6"),
];

/// A change that Polder must not repair: its description and shell command, a part of the text in `status`, and the
/// shell command that reverts it, for both families.
#[derive(Debug, Clone, Copy)]
pub struct ReportedChange {
    /// Description and shell command.
    pub change: Change,
    /// A part of the text that `status` must contain.
    pub named: &'static str,
    /// The shell command that reverts the change.
    pub revert: &'static str,
}

/// The changes that `status` must report.
pub const REPORTED_CHANGES: [ReportedChange; 5] = [
    ReportedChange {
        change: ("routes a pod's address elsewhere", "ip -$F route add blackhole $(host 9)"),
        named: "route del blackhole",
        revert: "ip -$F route del blackhole $(host 9)",
    },
    ReportedChange {
        change: ("leads pods elsewhere by a rule", "ip -$F rule add pref 60 to $(host 9) blackhole"),
        named: "rule del pref 60",
        revert: "ip -$F rule del pref 60",
    },
    ReportedChange {
        change: (
            "drops what goes to pods",
            "nft 'add table inet harm; add chain inet harm c { type filter hook forward priority 20; }; \
             add rule inet harm c ip daddr 10.244.0.0/16 drop'",
        ),
        named: "table inet harm",
        revert: "nft delete table inet harm",
    },
    ReportedChange {
        change: (
            "drops what comes from pods before it is routed",
            "nft 'add table inet harm6; add chain inet harm6 c { type filter hook prerouting priority -200; }; \
             add rule inet harm6 c ip6 saddr fd00:244::/56 drop'",
        ),
        named: "table inet harm6",
        revert: "nft delete table inet harm6",
    },
    ReportedChange {
        change: ("deletes a pod's default route", "ip -n a -$F route del default"),
        named: "no default route",
        revert: "ip -n a -$F route replace default dev eth0 onlink \
               via $(ip -n a -$F neigh show nud permanent | head -n1 | cut -d' ' -f1)",
    },
];

/// Reverts a change, if it was made.
pub fn revert(reported: &ReportedChange, worker: &Worker) {
    let random = &mut Random::new(1);
    for family in ["F=4", "F=6"] {
        apply_change(&("", format!("{family}; {}", reported.revert).as_str()), worker, random);
    }
}

/// Makes a random change on the node. Returns its description.
pub fn apply_random_change(worker: &Worker, random: &mut Random) -> &'static str {
    let change = random.one_of(&REPAIRED_CHANGES);
    apply_change(change, worker, random);
    change.0
}

/// Makes that change. Returns the output of the command: a command may find nothing to change, or fail.
pub fn apply_change(change: &(&str, &str), worker: &Worker, random: &mut Random) -> String {
    let (number, family) = (random.below(1000), if random.chance(50) { 4 } else { 6 });
    worker.node.shell(&format!(
        "F={family}\n\
         pick() {{ lines=$(cat); count=$(echo \"$lines\" | wc -l); echo \"$lines\" | sed -n \"$(({number} % count + \
         1))p\"; }}\n\
         host() {{ if [ $F = 4 ]; then echo 10.244.255.$1; else echo fd00:244::ffff:$1; fi; }}\n\
         net() {{ if [ $F = 4 ]; then echo 10.244.25$1.0/26; else echo fd00:244:0:f$1::/122; fi; }}\n\
         ports() {{ ls /sys/class/net | grep '^pld[0-9a-f]*$'; }}\n\
         ({}) 2>&1 || true",
        change.1
    ))
}

/// Creates foreign objects that are similar to Polder's.
pub fn make_foreign(worker: &Worker) {
    worker.node.shell(
        "ip link add other0 type bridge; ip address add 192.0.2.1/24 dev other0; ip link set other0 up\n\
         ip link add name other.vx type vxlan id 7 dstport 4790 local 192.0.2.1 nolearning; ip link set other.vx up\n\
         ip link add pld-not-ours type bridge; ip link set pld-not-ours up\n\
         ip route add 198.51.100.0/24 via 192.0.2.2; ip route add 203.0.113.0/24 via 192.0.2.2 proto 85\n\
         ip neigh add 192.0.2.2 lladdr 02:00:00:00:01:01 nud permanent dev other0\n\
         bridge fdb append 02:00:00:00:01:02 dev other.vx dst 192.0.2.3 self permanent\n\
         ip rule add from 192.0.2.1 lookup 100; ip route add default via 192.0.2.2 table 100\n\
         nft 'add table inet other; add set inet other s { type ipv4_addr; elements = { 192.0.2.4 }; }; \
              add chain inet other c { type filter hook forward priority 10; }; add rule inet other c counter'\n\
         sysctl -qw net.ipv4.conf.other0.rp_filter=1",
    );
}

/// The foreign objects that exist.
pub fn foreign(worker: &Worker) -> String {
    worker.node.shell(
        "ip -o link show other0 | cut -d: -f2-; ip -o link show other.vx | cut -d: -f2-\n\
         ip -o link show pld-not-ours | cut -d: -f2-; ip -o -4 address show dev other0 | cut -d: -f2-\n\
         ip route show 198.51.100.0/24; ip route show 203.0.113.0/24; ip route show table 100; ip rule show\n\
         ip neigh show dev other0 nud permanent; bridge fdb show dev other.vx\n\
         nft --stateless list table inet other; sysctl net.ipv4.conf.other0.rp_filter",
    )
}
