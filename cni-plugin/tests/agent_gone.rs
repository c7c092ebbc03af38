//! An agent that goes while the plugin wires: the real plugin in a network namespace of its own, with an agent that only
//! this test knows. Needs root.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixListener;
use std::path::Path;

use polder_api::message::{Attach, PodAddress, Question, Reply, Request, Wiring};
use polder_api::{Attachment, frame, tombstones};
use polder_cni_plugin::call::Program;
use polder_cni_plugin::command::{Answer, run};
use polder_netlink::{RouteSocket, namespace};
use serde_json::{Value, json};

/// When the agent ends that has answered an ADD.
#[derive(Clone, Copy, PartialEq)]
enum Ends {
    /// At once: the hold is lost with the answer.
    AtOnce,
    /// When it is asked to undo the ADD, without an answer.
    Later,
}

/// Runs an ADD of `network/c1/eth0`, in which the agent answers and then ends.
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
            let mut answer = frame::encode(&Reply::Wiring(wiring(&request.attachment))).unwrap();
            if ends == Ends::AtOnce {
                // Something that nobody asked for, with the answer: there is no moment in which the hold is not lost yet.
                answer.push(0);
            }
            plugin.write_all(&answer).unwrap();
            if ends == Ends::Later {
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

fn wiring(attachment: &Attachment) -> Wiring {
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
    }
}

/// What is in the new namespace of a pod after that, and of its node; the error.
fn after(prepare: &str, ends: Ends) -> Value {
    let folder = tempfile::tempdir().unwrap();
    let pod = namespace::in_a_new_one(|| {
        let status = std::process::Command::new("sh").args(["-ec", prepare]).status().unwrap();
        assert!(status.success(), "{prepare}");
        File::open("/proc/thread-self/ns/net").unwrap()
    })
    .expect("tests of the kernel need root");
    let links = |socket: &mut RouteSocket| socket.links().unwrap().into_keys().collect::<Vec<_>>();
    let (error, host) = namespace::in_a_new_one(|| {
        (add(folder.path(), &pod, ends), links(&mut RouteSocket::open().unwrap()))
    })
    .unwrap();
    let mut inside = namespace::within(&pod, RouteSocket::open).unwrap().unwrap();
    assert_eq!((host, links(&mut inside)), (vec!["lo".to_owned()], vec!["lo".to_owned()]), "{error}");
    let attachment: Attachment = "network/c1/eth0".parse().unwrap();
    let note = tombstones(&folder.path().join("agent.sock")).join(attachment.host_interface().as_str());
    assert_eq!(fs::read_to_string(note).expect("a note for the agent"), attachment.to_string());
    error
}

#[test]
fn a_wiring_that_fails_is_undone_without_the_agent() {
    let error = after("ip link set lo up; ip address add 10.244.0.1/32 dev lo # the gateway", Ends::Later);
    assert_eq!(error["code"], 5, "{error}");
}

#[test]
fn an_interface_whose_addresses_nobody_holds_any_more_is_no_success() {
    let error = after(":", Ends::AtOnce);
    assert_eq!(error["code"], 11, "{error}");
}
