//! The lower bound of ADD and DEL: creates the kernel objects of one pod, as Polder does, with one netlink send in the
//! node's and one in the pod's namespace. It allocates nothing, asks nobody, reads no configuration and checks nothing.
//!
//! It is called like a CNI plugin, but what an agent would decide is in `CNI_ARGS`: `address=10.99.0.2;index=1000`, and
//! `bridge=3` for a port on the bridge with that index, else the pod is routed. `index` is the index of the host
//! interface. DEL ends when the kernel reports that the interface is deleted; a child process waits in its place for
//! the rest of the deletion (an RCU barrier of about 20 ms). That report needs Linux 6.2 or newer; on older kernels DEL
//! ends after the barrier.

mod batch;
mod objects;

use std::fs::File;
use std::io::{Error, ErrorKind, Result};
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::libc;
use nix::sched::{CloneFlags, setns};
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, socket,
};
use nix::unistd::{ForkResult, fork};

use crate::batch::{Batch, replies};
use crate::objects::Pod;

fn main() -> Result<()> {
    let pod = pod(&variable("CNI_ARGS")?)?;
    match variable("CNI_COMMAND")?.as_str() {
        "ADD" => add(&pod),
        "DEL" => delete(&pod),
        other => Err(invalid(format!("CNI_COMMAND {other}: only ADD and DEL exist"))),
    }
}

fn invalid(text: String) -> Error {
    Error::new(ErrorKind::InvalidInput, text)
}

fn variable(name: &str) -> Result<String> {
    std::env::var(name).map_err(|error| invalid(format!("{name}: {error}")))
}

fn pod(arguments: &str) -> Result<Pod> {
    let value = |name: &str| {
        let mut pairs = arguments.split(';').filter_map(|pair| pair.split_once('='));
        pairs.find(|(key, _)| *key == name).map(|(_, value)| value)
    };
    let number = |name: &str| value(name).and_then(|text| text.parse::<u32>().ok());
    let address: Option<Ipv4Addr> = value("address").and_then(|text| text.parse().ok());
    match (address, number("index")) {
        (Some(address), Some(index)) => Ok(Pod { address, index, bridge: number("bridge") }),
        _ => Err(invalid(format!("CNI_ARGS {arguments}: address and index are needed"))),
    }
}

fn add(pod: &Pod) -> Result<()> {
    let host = open()?;
    let namespace = File::open(variable("CNI_NETNS")?)?;
    execute(&host, &pod.on_host(namespace.as_raw_fd()))?;
    setns(&namespace, CloneFlags::CLONE_NEWNET)?;
    execute(&open()?, &pod.inside())?;
    println!(r#"{{"cniVersion":"1.0.0","ips":[{{"address":"{}/32","interface":0}}]}}"#, pod.address);
    Ok(())
}

#[expect(
    unsafe_code,
    reason = "nothing safe leaves a process behind that has no program of its own to start"
)]
fn delete(pod: &Pod) -> Result<()> {
    let (host, deletion) = (open()?, pod.deletion());
    // SAFETY: this process has one thread.
    match unsafe { fork() }? {
        ForkResult::Child => send(&host, &deletion),
        ForkResult::Parent { .. } => wait_until_deleted(&host, pod.index, deletion.last_sequence()),
    }
}

fn open() -> Result<OwnedFd> {
    let kind = (AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkRoute);
    Ok(socket(kind.0, kind.1, kind.2, kind.3)?)
}

fn send(socket: &OwnedFd, batch: &Batch) -> Result<()> {
    sendto(socket.as_raw_fd(), batch.bytes(), &NetlinkAddr::new(0, 0), MsgFlags::empty())?;
    Ok(())
}

/// Sends the batch. Only its last message is acknowledged, so the first answer is that of the batch, or an error.
fn execute(socket: &OwnedFd, batch: &Batch) -> Result<()> {
    send(socket, batch)?;
    let mut buffer = [0; 4096];
    let length = recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
    for reply in replies(&buffer[..length]) {
        if let Some(errno) = reply.error() {
            let error = Error::from_raw_os_error(errno);
            return Err(Error::new(error.kind(), format!("message {}: {error}", reply.sequence)));
        }
    }
    Ok(())
}

/// Reads until the kernel reports the deletion of the interface, or the outcome of that request.
fn wait_until_deleted(socket: &OwnedFd, index: u32, request: u32) -> Result<()> {
    let mut buffer = [0; 8192];
    loop {
        let length = recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
        for reply in replies(&buffer[..length]) {
            if reply.kind == libc::RTM_DELLINK && reply.link() == Some(index) {
                return Ok(());
            }
            // The neighbour entry may be missing. Without that report, the acknowledgement ends the DEL.
            if reply.kind == objects::ERROR && reply.sequence == request {
                return match reply.error() {
                    None | Some(libc::ENODEV) => Ok(()),
                    Some(errno) => Err(Error::from_raw_os_error(errno)),
                };
            }
        }
    }
}
