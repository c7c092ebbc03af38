//! What the tasks of [`polder_ipam::tasks`] work with on a node: its ledger, the store, and its kernel.

use std::collections::BTreeSet;
use std::fs;
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use polder_api::{Attachment, Family, tombstone, tombstones};
use polder_ipam::Moment;
use polder_ipam::change::Change;
use polder_ipam::claim::NoClaim;
use polder_ipam::key::Range;
use polder_ipam::ledger::{Held, Kind};
use polder_ipam::pool::BlockRequest;
use polder_ipam::record::Alive;
use polder_ipam::registration::{Holdings, Registration};
use polder_ipam::steward::Presence;
use polder_ipam::store::{Contents, Outcome, StoreError};
use polder_ipam::tasks::{CLAIM_PATIENCE, Host, PodHost, Requests, Unreserved, Workload, teardown};
use polder_ipam::view::View;
use polder_netlink::nft::FilterSocket;
use polder_store::NodeIpam;
use polder_store::ledger::Sqlite;
use tokio::sync::oneshot;
use tokio::time::timeout;
use tracing::{debug, warn};

use crate::agent::Agent;
use crate::board::set_if_changed;
use crate::in_flight::Wired;
use crate::kernel::desired::{pod_mtu, vtep_mac};
use crate::kernel::{Kernel, ruleset};
use crate::machine::{now, random_name};
use crate::presence;
use crate::requests::{ClaimRequest, ReserveRequest};

/// How long the own view of the records may be behind what was just written.
const CATCH_UP: Duration = Duration::from_secs(5);

impl Host for Agent {
    type Ledger = Sqlite;

    fn now(&self) -> Moment {
        now()
    }

    fn fresh_name(&self) -> Result<String, String> {
        random_name().map_err(|error| error.to_string())
    }

    fn view(&self) -> Arc<View> {
        self.board.view()
    }

    async fn changed(&self, view: &Arc<View>, patience: Duration) {
        let mut views = self.board.view.subscribe();
        let _ = timeout(patience, views.wait_for(|now| !Arc::ptr_eq(now, view))).await;
    }

    async fn caught_up(&self, revision: i64) -> Result<(), StoreError> {
        let mut views = self.board.view.subscribe();
        match timeout(CATCH_UP, views.wait_for(|view| view.revision >= revision)).await {
            Ok(Ok(_)) => Ok(()),
            _ => Err(StoreError::NoAnswer {
                store: self.store.name(),
                reason: format!("what was written is not seen within {} s", CATCH_UP.as_secs()),
            }),
        }
    }

    async fn commit(&self, change: &Change) -> Result<Outcome, StoreError> {
        self.store.commit(change).await
    }

    async fn range(&self, range: &Range) -> Result<Contents, StoreError> {
        self.store.range(range).await
    }

    async fn ledger<T: Send + 'static>(
        &self,
        job: impl FnOnce(&mut NodeIpam, Moment) -> T + Send + 'static,
    ) -> T {
        self.ipam.run(|ipam| job(ipam, now())).await
    }

    fn presence(&self, view: &View) -> Result<Presence, String> {
        let config = &self.config;
        let underlay = self.board.underlay()?;
        let Some(cluster) = &view.cluster else { return Err("the cluster has no settings yet".to_owned()) };
        if view.own != underlay.addresses() {
            return Err("the node's own addresses have just changed".to_owned());
        }
        Ok(Presence {
            underlay: underlay.addresses(),
            vtep_mac: vtep_mac(&cluster.record, &config.node),
            mtu: pod_mtu(&underlay, cluster.record.backend, config.mtu).ok_or("the underlay has no MTU")?,
            version: env!("CARGO_PKG_VERSION").to_owned(),
        })
    }

    fn surroundings(&self, view: &View) -> Result<(), String> {
        let underlay = self.board.underlay()?;
        if view.own != underlay.addresses() || view.needed != underlay.needed {
            return Err("this node's own addresses are being read".to_owned());
        }
        Ok(())
    }

    fn adopted(&self) -> Option<Alive> {
        self.board.adopted.borrow().clone()
    }

    fn registration(&self) -> Registration {
        self.board.registration.borrow().clone()
    }

    fn register(&self, registration: Registration) {
        self.board.registration.send_replace(registration);
    }

    fn announce(&self, holdings: Holdings) {
        set_if_changed(&self.board.holdings, Arc::new(holdings));
    }

    async fn detach(&self, attachment: &Attachment) -> Result<(), String> {
        teardown::cut_off(self, attachment).await
    }

    async fn remove_gateways(&self) -> Result<(), String> {
        self.kernel.run(Kernel::remove_gateways).await.map_err(|error| error.to_string())
    }
}

impl Requests for Agent {
    async fn claim(&self, wanted: BlockRequest) -> Result<(), NoClaim> {
        let unavailable = |why: &str| NoClaim::Unavailable(why.to_owned());
        let (reply, answer) = oneshot::channel();
        let request = ClaimRequest { wanted, reply: Some(reply) };
        let asked = async {
            self.claims.send(request).await.map_err(|_| unavailable("the agent is stopping"))?;
            answer.await.map_err(|_| unavailable("the agent is stopping"))?
        };
        timeout(CLAIM_PATIENCE, asked).await.unwrap_or_else(|_| Err(unavailable("the store is too slow")))
    }

    fn claim_ahead(&self, wanted: BlockRequest) {
        // If the queue is full, whoever asked before will have done it.
        let _ = self.claims.try_send(ClaimRequest { wanted, reply: None });
    }

    async fn reserve(
        &self,
        wanted: Workload,
        owner: String,
        attachment: &Attachment,
    ) -> Result<IpAddr, Unreserved> {
        let unavailable = |why: &str| Unreserved::TryAgain(why.to_owned());
        let (reply, answer) = oneshot::channel();
        let request = ReserveRequest { wanted, owner, attachment: attachment.clone(), reply };
        let asked = async {
            self.reservations.send(request).await.map_err(|_| unavailable("the agent is stopping"))?;
            answer.await.map_err(|_| unavailable("the agent is stopping"))?
        };
        timeout(CLAIM_PATIENCE, asked).await.unwrap_or_else(|_| Err(unavailable("the store is too slow")))
    }
}

impl PodHost for Agent {
    type Lock = Wired;

    fn try_lock(&self, attachment: &Attachment) -> Option<Wired> {
        self.in_flight.hold(attachment)
    }

    async fn lock(&self, attachment: &Attachment, patience: Duration) -> Option<Wired> {
        timeout(patience, self.in_flight.take(attachment)).await.ok()
    }

    fn is_locked(&self, attachment: &Attachment) -> bool {
        self.in_flight.has(attachment)
    }

    async fn gone(&self, held: Vec<Held>) -> Result<BTreeSet<Attachment>, String> {
        let links = self.pods.run(Kernel::pod_interfaces).await.map_err(|error| error.to_string())?;
        let gone = |held: &Held| match held.kind {
            Kind::Pod => !links.contains(&held.attachment.host_interface()),
            // Another plugin's interface has no name that we know. It is not longer there than its namespace.
            Kind::Lease => presence::Presence::of(Path::new(&held.netns)) == presence::Presence::Gone,
        };
        Ok(held.into_iter().filter(gone).map(|held| held.attachment).collect())
    }

    async fn admit(&self, held: &Held) -> Result<(), String> {
        let Some(cluster) = &self.board.view().cluster else {
            return Err("the cluster's settings are not known yet".to_owned());
        };
        let table = ruleset::table(&cluster.record, &ruleset::Lengths::new());
        let (mac, addresses) = (held.mac, held.addresses.clone());
        let admitted = self.pods.run(move |kernel| kernel.admit_pod(&table, mac, &addresses)).await;
        admitted.map_err(|error| error.to_string())
    }

    async fn delete_interface(&self, attachment: &Attachment) -> Result<(), String> {
        self.reaper.delete(attachment.host_interface()).await
    }

    async fn forget(&self, held: &Held) {
        if let Some(cluster) = &self.board.view().cluster {
            let table = ruleset::table(&cluster.record, &ruleset::Lengths::new());
            let (mac, addresses) = (held.mac, held.addresses.clone());
            let forgotten = self.pods.run(move |kernel| kernel.forget_pod(&table, mac, &addresses)).await;
            // Until the next pass forgets it, too: no other pod has that MAC address with that address.
            if let Err(error) = forgotten {
                warn!(attachment = %held.attachment, %error, "not all of it is forgotten yet");
            }
        }
        self.forget_connections(held.addresses.clone());
    }

    fn tombstones(&self) -> Vec<Attachment> {
        // Most of the time there is none.
        let Ok(entries) = fs::read_dir(tombstones(&self.config.socket)) else { return Vec::new() };
        let files = entries.filter_map(|entry| Some(entry.ok()?.path()));
        files.filter_map(|file| read_tombstone(&file)).collect()
    }

    fn has_tombstone(&self, attachment: &Attachment) -> bool {
        tombstone(&self.config.socket, attachment).exists()
    }

    fn remove_tombstone(&self, attachment: &Attachment) {
        remove_file(&tombstone(&self.config.socket, attachment));
    }

    fn obstacles(&self) -> Vec<String> {
        self.board.obstacles()
    }

    fn families(&self) -> &[Family] {
        if self.features.ipv6 { &Family::BOTH } else { &[Family::V4] }
    }

    fn mtu(&self) -> Option<u32> {
        self.board.pass().map(|pass| pass.mtu)
    }

    async fn sleep(&self, time: Duration) {
        tokio::time::sleep(time).await;
    }

    fn attachments_changed(&self) {
        self.attachments_changed.notify_one();
    }

    fn addresses_freed(&self) {
        self.holdings_changed.notify_one();
    }
}

impl Agent {
    /// Lets the kernel forget what the addresses were connected to: the next pod that has one is not to get the last one's
    /// packets. Nobody waits for it, for it looks at every connection of the node, and the addresses rest for longer.
    fn forget_connections(&self, addresses: Vec<IpAddr>) {
        let connections = self.connections.clone();
        tokio::spawn(async move {
            let forget = move |socket: &mut FilterSocket| {
                addresses.iter().try_for_each(|address| socket.forget_connections(*address).map(drop))
            };
            if let Err(error) = connections.run(forget).await {
                debug!(%error, "connections of freed addresses are not forgotten");
            }
        });
    }
}

/// Whose tombstone the file is. One that names nobody is thrown away.
fn read_tombstone(file: &Path) -> Option<Attachment> {
    match fs::read_to_string(file).map(|text| text.parse()) {
        Ok(Ok(attachment)) => Some(attachment),
        Ok(Err(error)) => {
            let error: polder_api::InvalidName = error;
            warn!(file = %file.display(), %error, "a tombstone that cannot be read is thrown away");
            remove_file(file);
            None
        }
        Err(error) => {
            warn!(file = %file.display(), %error, "a tombstone cannot be read");
            None
        }
    }
}

fn remove_file(tombstone: &Path) {
    if let Err(error) = fs::remove_file(tombstone) {
        warn!(file = %tombstone.display(), %error, "a tombstone cannot be removed");
    }
}
