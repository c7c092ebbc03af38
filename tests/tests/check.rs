//! CHECK reports everything that is missing, and nothing if all is correct.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use polder_tests::agent::Worker;
use polder_tests::cni::{WITH_CHECK, code, message, since};
use polder_tests::{Lab, Pod, Topology, wait};
use serde_json::Value;

/// A pod that is damaged and repaired several times. CHECK must report each damage.
struct Checked<'a> {
    worker: &'a Worker,
    pod: &'a Pod,
}

impl Checked<'_> {
    fn check(&self) -> Result<Value, Value> {
        self.worker.cni("CHECK", self.pod.name(), self.pod.netns(), &self.pod.later_conf())
    }

    fn assert_ok(&self, when: &str) {
        assert_eq!(self.check(), Ok(Value::Null), "{when}");
    }

    fn assert_found(&self, damage: &str, expected: &str) {
        let found = message(self.check());
        assert!(found.contains(expected), "{damage}: {found} does not say {expected:?}");
    }

    /// Damages the node's side until CHECK reports it: the agent may repair the damage before the CHECK.
    fn assert_found_on_the_node(&self, damage: &str, expected: &str) {
        wait::until(&format!("CHECK to find {damage}"), || {
            self.worker.node.shell(damage);
            match self.check() {
                Err(found) if found["msg"].to_string().contains(expected) => Ok(()),
                other => Err(format!("{other:?}")),
            }
        });
    }

    fn mac(&self, interface: usize) -> &str {
        self.pod.result()["interfaces"][interface]["mac"].as_str().unwrap()
    }
}

#[test]
fn check_reports_every_damage_and_nothing_on_an_intact_attachment() {
    let lab = Lab::start(Topology::one_segment(1));
    let worker = &lab.workers[0];
    for version in since(WITH_CHECK) {
        let pod = worker.pod_with(version, &Worker::netconf(version));
        let checked = Checked { worker, pod: &pod };
        checked.assert_ok("right after the ADD");
        // Changes by later plugins of the chain are not checked.
        pod.run("ip", &["route", "add", "192.0.2.0/24", "dev", "eth0"]);
        pod.run("ip", &["link", "set", "eth0", "mtu", "1400"]);
        checked.assert_ok("with what others have added");
        damage_the_pod(&checked);
        damage_the_node(&checked);
        pod.run("ip", &["link", "del", "eth0"]);
        checked.assert_found("the interface is gone", "no interface eth0");
        worker.delete(&pod);
        worker.namespace(version);
        assert_eq!(code(checked.check()), 3, "an attachment that is gone");
    }
}

fn damage_the_pod(checked: &Checked<'_>) {
    let (own, gateway) = (checked.pod.v4(), checked.pod.gateway(checked.pod.v4()));
    let (bridge, mac) = (checked.mac(0), checked.mac(2));
    // Some changes remove other entries, too: the route is deleted with the address, the neighbour entry when the link
    // goes down.
    let repair = format!(
        "ip link set eth0 address {mac} up; ip address replace {own}/32 dev eth0; \
         ip neigh replace {gateway} lladdr {bridge} dev eth0 nud permanent; \
         ip route replace default via {gateway} dev eth0 onlink"
    );
    for (damage, expected) in [
        ("ip link set eth0 address 02:00:00:00:00:09".to_owned(), "MAC address 02:00:00:00:00:09"),
        ("ip link set eth0 down".to_owned(), "eth0 in the pod is down"),
        (format!("ip address del {own}/32 dev eth0"), "does not have the address"),
        ("ip route del default".to_owned(), "no default route"),
        (
            format!("ip neigh replace {gateway} lladdr 02:00:00:00:00:08 dev eth0 nud permanent"),
            "MAC address 02:00:00:00:00:08 instead of",
        ),
    ] {
        checked.pod.run("sh", &["-ec", &damage]);
        checked.assert_found(&damage, expected);
        checked.pod.run("sh", &["-ec", &repair]);
        checked.assert_ok(&format!("after the repair of {damage}"));
    }
}

fn damage_the_node(checked: &Checked<'_>) {
    let (own, mac, host) = (checked.pod.v4(), checked.mac(2), checked.pod.host_interface());
    for (damage, repair, expected) in [
        (
            format!("bridge fdb del {mac} dev {host} master"),
            format!("bridge fdb replace {mac} dev {host} master static"),
            format!("no FDB entry for {mac} on"),
        ),
        (
            format!(
                "ip neigh del {own} dev polder0; ip neigh replace {own} lladdr {mac} dev {host} nud permanent"
            ),
            format!("ip neigh replace {own} lladdr {mac} dev polder0 nud permanent"),
            format!("no neighbour entry for {own} with"),
        ),
    ] {
        checked.assert_found_on_the_node(&damage, &expected);
        checked.worker.node.shell(&repair);
        checked.assert_ok(&format!("after the repair of {damage}"));
    }
    let off = format!("{host} on the host is down");
    checked.assert_found_on_the_node(&format!("ip link set {host} down"), &off);
    checked.worker.node.run("ip", &["link", "set", &host, "up"]);
}

#[test]
fn check_reports_a_missing_route_to_a_pod_without_a_bridge() {
    let lab = Lab::start(Topology::one_segment(1).bootstrap("attach = \"routed\""));
    let worker = &lab.workers[0];
    for version in since(WITH_CHECK) {
        let pod = worker.pod_with(version, &Worker::netconf(version));
        let checked = Checked { worker, pod: &pod };
        checked.assert_ok("right after the ADD");
        let damage = format!("ip route del {} dev {}", pod.v4(), pod.host_interface());
        checked.assert_found_on_the_node(&damage, "has no route to");
    }
}
