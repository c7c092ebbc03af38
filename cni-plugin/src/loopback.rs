//! The plugin `loopback`, for nodes without it: sets `lo` up. containerd calls it for every pod, in addition to the
//! network's plugin.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;

use ipnetwork::IpNetwork;
use polder_netlink::link::{self, Link};

use crate::action::KernelAction;
use crate::call::Call;
use crate::check::{AttachmentDifference, differs};
use crate::error::Error;
use crate::pod::PodNamespace;
use crate::result::loopback_result;

/// The loopback interface, which every network namespace has.
const LO: &str = "lo";

/// Sets `lo` up.
pub fn add(call: &Call) -> Result<String, Error> {
    let mut pod = PodNamespace::open(&call.environment)?;
    switch(&mut pod, true)?;
    let found = pod.socket.addresses().map_err(Error::kernel(KernelAction::ReadLoopbackAddresses))?;
    let usual = [
        IpNetwork::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 8).expect("a prefix of IPv4"),
        IpNetwork::new(IpAddr::V6(Ipv6Addr::LOCALHOST), 128).expect("a prefix of IPv6"),
    ];
    let there = usual.into_iter().filter(|usual| found.iter().any(|found| found.address.ip() == usual.ip()));
    let netns = call.environment.netns.as_deref().unwrap_or(Path::new(""));
    Ok(loopback_result(&call.network.conf, netns, there))
}

/// Sets `lo` down. Succeeds if the namespace no longer exists.
pub fn del(call: &Call) -> Result<(), Error> {
    match PodNamespace::open(&call.environment) {
        Ok(mut pod) => switch(&mut pod, false),
        Err(Error::Namespace(_)) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Checks that `lo` is up.
pub fn check(call: &Call) -> Result<(), Error> {
    let link = PodNamespace::open(&call.environment)?.socket.link(LO);
    match link.map_err(Error::kernel(KernelAction::ReadLoopback))? {
        Some(Link { up: true, .. }) => Ok(()),
        _ => differs(AttachmentDifference::LoopbackDown),
    }
}

fn switch(pod: &mut PodNamespace, on: bool) -> Result<(), Error> {
    let change = link::change(LO);
    let change = if on { change.up() } else { change.down() };
    pod.socket.execute_all([change.into()]).map_err(Error::kernel(KernelAction::SetLoopback))
}
