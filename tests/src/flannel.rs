//! flannel on the nodes of a lab: the kernel objects, rules and files of flanneld (backend `vxlan`, with iptables), and
//! a runtime that uses the first CNI configuration by name, as containerd and CRI-O do.

use std::net::IpAddr;

use serde_json::{Value, json};

use crate::Lab;
use crate::agent::Worker;
use crate::pod::Pod;

/// The range of all pods of flannel.
pub const NETWORK: &str = "10.244.0.0/16";

/// The folder of the CNI configurations.
pub const CONFIGURATIONS: &str = "/etc/cni/net.d";

/// Sets flannel up on all nodes of the lab.
pub fn set_up(lab: &Lab) {
    (1..=lab.workers.len()).for_each(|number| set_up_node(lab, number));
}

/// Sets flannel up on the node of that number, from 1 on.
pub fn set_up_node(lab: &Lab, number: usize) {
    let worker = &lab.workers[number - 1];
    worker.node.shell(&device(number, lab.underlay(number - 1, false)));
    for other in (1..=lab.workers.len()).filter(|other| *other != number) {
        worker.node.shell(&path_to(other, lab.underlay(other - 1, false)));
    }
    worker.node.shell(&rules(number));
    worker.node.write("/run/flannel/subnet.env", &format!("FLANNEL_NETWORK={NETWORK}\n"));
    write_configuration(worker, number);
}

/// Writes flannel's CNI configuration on the node of that number, from 1 on, as each start of flannel does.
pub fn write_configuration(worker: &Worker, number: usize) {
    let bridge = json!({
        "type": "bridge", "bridge": "cni0", "mtu": 1450, "ipMasq": false,
        "isGateway": true, "isDefaultGateway": true, "hairpinMode": true,
        "ipam": {
            "type": "host-local",
            "ranges": [[{ "subnet": format!("10.244.{number}.0/24") }]],
            "routes": [{ "dst": NETWORK }],
        },
    });
    let portmap = json!({ "type": "portmap", "capabilities": { "portMappings": true } });
    let list = json!({ "name": "cbr0", "cniVersion": "0.3.1", "plugins": [bridge, portmap] });
    worker.node.write(&format!("{CONFIGURATIONS}/10-flannel.conflist"), &list.to_string());
}

fn mac(number: usize) -> String {
    format!("02:fe:00:00:00:{number:02x}")
}

fn device(number: usize, own: IpAddr) -> String {
    format!(
        "echo 1 > /proc/sys/net/ipv4/ip_forward\n\
         ip link add flannel.1 address {} mtu 1450 type vxlan id 1 local {own} dev eth0 dstport 8472 nolearning\n\
         ip address add 10.244.{number}.0/32 dev flannel.1\nip link set flannel.1 up\n",
        mac(number)
    )
}

fn path_to(other: usize, remote: IpAddr) -> String {
    let mac = mac(other);
    format!(
        "ip neighbour add 10.244.{other}.0 lladdr {mac} dev flannel.1 nud permanent\n\
         bridge fdb add {mac} dev flannel.1 dst {remote}\n\
         ip route add 10.244.{other}.0/24 via 10.244.{other}.0 dev flannel.1 onlink\n"
    )
}

/// The rules of `pkg/trafficmngr/iptables` of flannel, in their order.
fn rules(number: usize) -> String {
    let own = format!("10.244.{number}.0/24");
    let [masq, forward] = ["flanneld masq", "flanneld forward"].map(|text| {
        let comment = format!("-m comment --comment '{text}'");
        move |table: &str, rule: &str, target: &str| {
            format!("iptables -w -t {table} -A {rule} {comment} -j {target}\n")
        }
    });
    let masquerading = [
        ("-m mark --mark 0x4000/0x4000".to_owned(), "RETURN"),
        (format!("-s {own} -d {NETWORK}"), "RETURN"),
        (format!("-s {NETWORK} -d {own}"), "RETURN"),
        (format!("! -s {NETWORK} -d {own}"), "RETURN"),
        (format!("-s {NETWORK} ! -d 224.0.0.0/4"), "MASQUERADE --random-fully"),
        (format!("! -s {NETWORK} -d {NETWORK}"), "MASQUERADE --random-fully"),
    ];
    let chains = "iptables -w -t nat -N FLANNEL-POSTRTG\niptables -w -N FLANNEL-FWD\n".to_owned();
    let masquerading =
        masquerading.iter().map(|(rule, target)| masq("nat", &format!("FLANNEL-POSTRTG {rule}"), target));
    let forwarding =
        ["-s", "-d"].map(|end| forward("filter", &format!("FLANNEL-FWD {end} {NETWORK}"), "ACCEPT"));
    let jumps = [masq("nat", "POSTROUTING", "FLANNEL-POSTRTG"), forward("filter", "FORWARD", "FLANNEL-FWD")];
    std::iter::once(chains).chain(masquerading).chain(forwarding).chain(jumps).collect()
}

/// The CNI configuration that a runtime uses: the first by name.
fn configuration(worker: &Worker) -> Value {
    let first = worker.node.shell(&format!("ls {CONFIGURATIONS}/*.conflist | head -n 1"));
    let text = worker.node.shell(&format!("cat {first}"));
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{first}: {error}: {text}"))
}

/// The configurations of the plugins of a list, in order.
fn plugins(list: &Value, host_port: Option<u16>) -> Vec<Value> {
    let plugins = list["plugins"].as_array().into_iter().flatten();
    let configure = |plugin: &Value| {
        let mut conf = plugin.clone();
        conf["name"] = list["name"].clone();
        conf["cniVersion"] = list["cniVersion"].clone();
        let has_ports = plugin["capabilities"]["portMappings"] == true;
        if let Some(port) = host_port.filter(|_| has_ports) {
            let mapping = json!({ "hostPort": port, "containerPort": crate::probe::PORT, "protocol": "tcp" });
            conf["runtimeConfig"] = json!({ "portMappings": [mapping] });
        }
        conf
    };
    plugins.map(configure).collect()
}

/// Runs a pod with the configuration that a runtime uses, with this TCP port of its node for the echo servers.
pub fn run_pod(worker: &Worker, name: &str, host_port: Option<u16>) -> Pod {
    let plugins = plugins(&configuration(worker), host_port);
    let netns = worker.namespace(name);
    let mut result = Value::Null;
    for mut conf in plugins.iter().cloned() {
        if !result.is_null() {
            conf["prevResult"] = result;
        }
        result = worker
            .cni("ADD", name, &netns, &conf)
            .unwrap_or_else(|error| panic!("ADD of {name} on {}: {error:#}", worker.name()));
    }
    Pod::new(&worker.node, name, &netns, plugins[0].clone(), result)
}

/// Ends a pod. Like containerd, this uses the current configuration, whichever one the pod was added with.
pub fn end_pod(worker: &Worker, pod: &Pod) {
    let list = configuration(worker);
    for mut conf in plugins(&list, None).into_iter().rev() {
        // The result is stored under the name of the network.
        if list["name"] == pod.conf()["name"] {
            conf["prevResult"] = pod.result().clone();
        }
        let outcome = worker.cni("DEL", pod.name(), pod.netns(), &conf);
        assert!(outcome.is_ok(), "DEL of {} on {}: {outcome:?}", pod.name(), worker.name());
    }
    worker.node.run("ip", &["netns", "delete", pod.name()]);
}
