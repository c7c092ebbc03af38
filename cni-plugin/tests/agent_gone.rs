//! The agent ends during a request. Runs the real plugin in its own network namespace, with an agent that this test
//! simulates. Needs root.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use polder_api::message::{
    Attach, Permission, PodAddress, Question, Refusal, RefusalKind, Reply, Request, Wiring,
};
use polder_api::{Attachment, frame, tombstones};
use polder_cni_plugin::call::Program;
use polder_cni_plugin::command::{Answer, run};
use polder_netlink::{RouteSocket, namespace};
use serde_json::{Value, json};

/// The time at which the agent ends, after it answered the ADD.
#[derive(Clone, Copy, PartialEq)]
enum Ends {
    /// Immediately: the addresses are no longer held when the plugin has the answer.
    AtOnce,
    /// At the DEL request that undoes the ADD, which it does not answer.
    Later,
    /// The same, after the packet filter has refused the pod while the plugin created the interface.
    Refusing,
}

/// Runs an ADD of `network/c1/eth0`; the agent answers and then ends. Returns the error.
fn add(folder: &Path, pod: &File, ends: Ends) -> Value {
    let socket = folder.join("agent.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let netns = format!("/proc/self/fd/{}", pod.as_raw_fd());
    let conf =
        json!({ "cniVersion": "1.1.0", "name": "network", "type": "polder", "socket": socket }).to_string();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let (mut plugin, _) = listener.accept().unwrap();
            let question: Question = frame::read(&mut plugin).unwrap();
            let Request::Add(request) = question.request else { panic!("no ADD") };
            fs::remove_file(&socket).unwrap();
            frame::write(&mut plugin, &Reply::Wiring(wiring(&request.attachment, ends))).unwrap();
            if ends == Ends::Refusing {
                let message = "the packet filter refuses the pod".to_owned();
                let refusal = Refusal { kind: RefusalKind::Failed, message };
                frame::write(&mut plugin, &Reply::Refused(refusal)).unwrap();
            }
            if ends != Ends::AtOnce {
                let question: Question = frame::read(&mut plugin).unwrap();
                assert!(matches!(question.request, Request::Del(_)));
            }
        });
        let variable = |name: &str| match name {
            "CNI_COMMAND" => Some("ADD".to_owned()),
            "CNI_CONTAINERID" => Some("c1".to_owned()),
            "CNI_IFNAME" => Some("eth0".to_owned()),
            "CNI_NETNS" => Some(netns.clone()),
            _ => None,
        };
        match run(Program::Polder, variable, &mut conf.as_bytes()) {
            Answer::Error(text) => serde_json::from_str(&text).unwrap(),
            other => panic!("no error, but {other:?}"),
        }
    })
}

fn wiring(attachment: &Attachment, ends: Ends) -> Wiring {
    let address = |address: &str, gateway: &str| PodAddress {
        address: address.parse().unwrap(),
        gateway: gateway.parse().unwrap(),
    };
    Wiring {
        host_interface: attachment.host_interface(),
        alias: String::new(),
        attach: Attach::Routed,
        mac: "0a:58:0a:f4:00:05".parse().unwrap(),
        mtu: 1450,
        addresses: vec![address("10.244.0.5", "10.244.0.1"), address("fd00:244::5", "fd00:244::1")],
        gateway_mac: "06:00:00:00:00:01".parse().unwrap(),
        strays: Vec::new(),
        permission: if ends == Ends::Later { Permission::Given } else { Permission::Follows },
    }
}

/// Runs the ADD in new namespaces for node and pod. Checks that no interface remains and that the tombstone exists;
/// returns the error.
fn after(prepare: &str, ends: Ends) -> Value {
    let folder = tempfile::tempdir().unwrap();
    let pod = namespace::run_in_new(|| {
        let status = std::process::Command::new("sh").args(["-ec", prepare]).status().unwrap();
        assert!(status.success(), "{prepare}");
        File::open("/proc/thread-self/ns/net").unwrap()
    })
    .expect("tests of the kernel need root");
    let links = |socket: &mut RouteSocket| socket.links().unwrap().into_keys().collect::<Vec<_>>();
    let (error, host) =
        namespace::run_in_new(|| (add(folder.path(), &pod, ends), links(&mut RouteSocket::open().unwrap())))
            .unwrap();
    let mut inside = namespace::within(&pod, RouteSocket::open).unwrap().unwrap();
    assert_eq!((host, links(&mut inside)), (vec!["lo".to_owned()], vec!["lo".to_owned()]), "{error}");
    let attachment: Attachment = "network/c1/eth0".parse().unwrap();
    let note = tombstones(&folder.path().join("agent.sock")).join(attachment.host_interface().as_str());
    assert_eq!(fs::read_to_string(note).expect("a note for the agent"), attachment.to_string());
    error
}

#[test]
fn failed_wiring_is_undone_without_the_agent() {
    let error = after("ip link set lo up; ip address add 10.244.0.1/32 dev lo # the gateway", Ends::Later);
    assert_eq!(error["code"], 5, "{error}");
}

#[test]
fn an_add_fails_if_the_agent_ends_before_the_result() {
    let error = after(":", Ends::AtOnce);
    assert_eq!(error["code"], 11, "{error}");
}

#[test]
fn an_add_fails_if_the_packet_filter_refuses_the_pod_while_its_interface_is_created() {
    let error = after(":", Ends::Refusing);
    assert_eq!(error["msg"], "polder: the packet filter refuses the pod");
}

/// A repeated request could allocate other addresses, and nothing would release the first ones.
#[test]
fn a_lease_without_an_answer_is_not_requested_again() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("agent.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let conf = json!({
        "cniVersion": "1.1.0",
        "name": "network",
        "type": "macvlan",
        "ipam": { "type": "polder-ipam", "socket": socket },
    });
    let (requests, error) = std::thread::scope(|scope| {
        let agent = scope.spawn(|| {
            let asks_for_a_lease = |plugin: Result<UnixStream, _>| {
                let question = frame::read(&mut plugin.unwrap());
                question.is_ok_and(|question: Question| matches!(question.request, Request::Lease(_)))
            };
            // The last connection, without a request, is from this test.
            listener.incoming().map(asks_for_a_lease).take_while(|asked| *asked).count()
        });
        let variable = |name: &str| match name {
            "CNI_COMMAND" => Some("ADD".to_owned()),
            "CNI_CONTAINERID" => Some("c1".to_owned()),
            "CNI_IFNAME" => Some("eth0".to_owned()),
            "CNI_NETNS" => Some("/proc/self/ns/net".to_owned()),
            _ => None,
        };
        let answer = run(Program::PolderIpam, variable, &mut conf.to_string().as_bytes());
        drop(UnixStream::connect(&socket).unwrap());
        (agent.join().unwrap(), answer)
    });
    let Answer::Error(error) = error else { panic!("no error, but {error:?}") };
    let error: Value = serde_json::from_str(&error).unwrap();
    assert_eq!((requests, &error["code"]), (1, &json!(11)), "{error}");
}
