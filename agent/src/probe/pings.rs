//! Sockets for probes, on the host and in the probe endpoint.

use std::fs::File;
use std::future::pending;
use std::io;
use std::net::IpAddr;

use polder_api::{Family, PerFamily};
use polder_netlink::namespace;

use super::echo::Echo;
use super::schedule::{DueProbe, Size, Token};

/// Sends and receives probes.
pub(super) trait Pings {
    /// The sockets of one family.
    type Echo: Sync;

    /// Opens the sockets in `namespace`, or in the host's, for probes from `source`.
    fn open(&self, source: IpAddr, namespace: Option<&File>) -> io::Result<Self::Echo>;

    /// The source address of their probes.
    fn source(&self, echo: &Self::Echo) -> IpAddr;

    /// Sends a probe in a packet of that length, in bytes, or of the minimum length.
    fn send(
        &self,
        echo: &Self::Echo,
        to: IpAddr,
        length: usize,
        token: Token,
    ) -> impl Future<Output = io::Result<()>> + Send;

    /// Receives a reply: its source address and the probe's token. Cancel-safe.
    fn receive(&self, echo: &Self::Echo) -> impl Future<Output = io::Result<(IpAddr, Token)>> + Send;
}

/// [`Pings`] on real sockets.
#[derive(Debug)]
pub(super) struct OnNode {
    /// The ICMP identifier of this agent's probes.
    pub(super) identifier: u16,
}

impl Pings for OnNode {
    type Echo = Echo;

    fn open(&self, source: IpAddr, namespace: Option<&File>) -> io::Result<Echo> {
        match namespace {
            Some(file) => namespace::within(file, || Echo::open(source, self.identifier))?,
            None => Echo::open(source, self.identifier),
        }
    }

    fn source(&self, echo: &Echo) -> IpAddr {
        echo.source()
    }

    async fn send(&self, echo: &Echo, to: IpAddr, length: usize, token: Token) -> io::Result<()> {
        echo.send(to, length, token).await
    }

    async fn receive(&self, echo: &Echo) -> io::Result<(IpAddr, Token)> {
        echo.receive().await
    }
}

/// The next reply of either family. Cancel-safe.
pub(super) async fn answer<P: Pings>(
    pings: &P,
    echoes: &PerFamily<Option<P::Echo>>,
) -> (Family, io::Result<(IpAddr, Token)>) {
    let receive = async |family| match &echoes[family] {
        Some(echo) => (family, pings.receive(echo).await),
        None => pending().await,
    };
    tokio::select! {
        answer = receive(Family::V4) => answer,
        answer = receive(Family::V6) => answer,
    }
}

/// Sends probes, each from the address of its target's family.
pub(super) async fn send<P: Pings>(pings: &P, echoes: &PerFamily<Option<P::Echo>>, shots: Vec<DueProbe>) {
    for DueProbe { number, to, full, .. } in shots {
        let Some(echo) = &echoes[Family::of(to)] else { continue };
        let full = full.map(|length| (Size::Full, length as usize));
        for (size, length) in [(Size::Small, 0)].into_iter().chain(full) {
            // A failed send counts as a lost probe.
            let _ = pings.send(echo, to, length, Token { number, size }).await;
        }
    }
}
