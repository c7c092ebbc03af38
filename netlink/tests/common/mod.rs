//! Functions shared by the tests against the real kernel.

#![allow(dead_code, unreachable_pub, reason = "each of the programs uses what it needs")]

use std::net::IpAddr;

use ipnetwork::IpNetwork;
use polder_api::Mac;
use polder_netlink::{RouteSocket, namespace};

pub const POD_MAC: Mac = Mac([2, 0, 0, 0, 0, 2]);

pub fn in_a_new_namespace(test: impl FnOnce(&mut RouteSocket) + Send) {
    namespace::run_in_new(|| test(&mut RouteSocket::open().unwrap())).expect("tests of the kernel need root");
}

pub fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

pub fn network(text: &str) -> IpNetwork {
    text.parse().unwrap()
}

pub fn run(program: &str, arguments: &[&str]) -> String {
    let output = std::process::Command::new(program).args(arguments).output().expect(program);
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// The first two numbers of the kernel release: (5, 18) for Linux 5.18.
pub fn kernel_release() -> (u32, u32) {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut numbers =
        release.split(|other: char| !other.is_ascii_digit()).map_while(|part| part.parse().ok());
    numbers.next().zip(numbers.next()).expect("two numbers")
}
