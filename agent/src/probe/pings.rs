//! Sockets for probes, on the host and in the probe endpoint.

use std::fs::File;
use std::future::pending;
use std::io;
use std::net::IpAddr;

use polder_api::{Family, PerFamily};
use polder_netlink::namespace;

use super::echo::EchoSocket;
use super::schedule::{DueProbe, Size, Token};

/// Sends and receives probes.
pub(super) trait Pings {
    /// The sockets of one family.
    type Socket: Sync;

    /// Opens the sockets in `namespace`, or in the host's, for probes from `source`.
    fn open(&self, source: IpAddr, namespace: Option<&File>) -> io::Result<Self::Socket>;

    /// The source address of their probes.
    fn source(&self, socket: &Self::Socket) -> IpAddr;

    /// Sends a probe in a packet of that length, in bytes, or of the minimum length.
    fn send(
        &self,
        socket: &Self::Socket,
        to: IpAddr,
        length: usize,
        token: Token,
    ) -> impl Future<Output = io::Result<()>> + Send;

    /// Receives a reply: its source address and the probe's token. Cancel-safe.
    fn receive(&self, socket: &Self::Socket) -> impl Future<Output = io::Result<(IpAddr, Token)>> + Send;
}

/// [`Pings`] on real sockets.
#[derive(Debug)]
pub(super) struct OnNode {
    /// The ICMP identifier of this agent's probes.
    pub(super) identifier: u16,
}

impl Pings for OnNode {
    type Socket = EchoSocket;

    fn open(&self, source: IpAddr, namespace: Option<&File>) -> io::Result<EchoSocket> {
        match namespace {
            Some(file) => namespace::within(file, || EchoSocket::open(source, self.identifier))?,
            None => EchoSocket::open(source, self.identifier),
        }
    }

    fn source(&self, socket: &EchoSocket) -> IpAddr {
        socket.source()
    }

    async fn send(&self, socket: &EchoSocket, to: IpAddr, length: usize, token: Token) -> io::Result<()> {
        socket.send(to, length, token).await
    }

    async fn receive(&self, socket: &EchoSocket) -> io::Result<(IpAddr, Token)> {
        socket.receive().await
    }
}

/// The next reply of either family. Cancel-safe.
pub(super) async fn next_reply<P: Pings>(
    pings: &P,
    sockets: &PerFamily<Option<P::Socket>>,
) -> (Family, io::Result<(IpAddr, Token)>) {
    let receive = async |family| match &sockets[family] {
        Some(socket) => (family, pings.receive(socket).await),
        None => pending().await,
    };
    tokio::select! {
        reply = receive(Family::V4) => reply,
        reply = receive(Family::V6) => reply,
    }
}

/// Sends probes, each from the address of its target's family.
pub(super) async fn send<P: Pings>(pings: &P, sockets: &PerFamily<Option<P::Socket>>, probes: Vec<DueProbe>) {
    for DueProbe { number, to, full, .. } in probes {
        let Some(socket) = &sockets[Family::of(to)] else { continue };
        let full = full.map(|length| (Size::Full, length as usize));
        for (size, length) in [(Size::Small, 0)].into_iter().chain(full) {
            // A failed send counts as a lost probe.
            let _ = pings.send(socket, to, length, Token { number, size }).await;
        }
    }
}
