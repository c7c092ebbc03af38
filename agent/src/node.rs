//! The node as the pod tasks use it: allocating and releasing the addresses of attachments.

use std::collections::BTreeSet;
use std::fs;
use std::net::IpAddr;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use polder_api::{Attachment, Family, tombstone, tombstones};
use polder_ipam::Moment;
use polder_ipam::Revision;
use polder_ipam::cause::HostError;
use polder_ipam::change::Change;
use polder_ipam::claim::{NoClaim, Unavailable};
use polder_ipam::key::Range;
use polder_ipam::ledger::{AttachmentEntry, AttachmentKind};
use polder_ipam::pool::{BlockRequest, Labels};
use polder_ipam::registration::Registration;
use polder_ipam::store::{Contents, Outcome, StoreError};
use polder_ipam::tasks::operator::{Knowledge, OperatorHost};
use polder_ipam::tasks::{
    CLAIM_TIMEOUT, Host, NotHandedOver, PodHost, RecordStore, Requests, ReservationRequest, RetryReason,
};
use polder_ipam::view::View;
use polder_netlink::nft::FilterSocket;
use polder_store::ledger::Sqlite;
use polder_store::{NodeIpam, Store};
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;
use tracing::warn;

use crate::config::Config;
use crate::connections::StaleConnections;
use crate::fastpath::Interfaces;
use crate::in_flight::{AttachmentLock, InFlight};
use crate::kernel::features::Features;
use crate::kernel::reaper::Reaper;
use crate::kernel::{self, Kernel};
use crate::local_pods::{LocalPod, LocalPods};
use crate::machine::now;
use crate::node_state::NodeState;
use crate::owner::Owner;
use crate::presence::Presence;
use crate::requests::{ClaimRequest, ReserveRequest};
use crate::service::{NotServed, PodPermission};
use crate::wake::WakeSender;

/// The node. Only the owners of its state change it: the threads of ledger and kernel, and the tasks that receive
/// requests.
#[derive(Debug)]
pub struct Node {
    /// The configuration.
    pub config: Arc<Config>,
    /// Kernel features.
    pub features: Features,
    /// The datastore.
    pub store: Store,
    /// The node's addresses.
    pub ipam: Owner<NodeIpam>,
    /// The kernel, for single pods.
    pub pods: Pods,
    /// State published by the watcher, the registrar and the engine.
    pub node_state: NodeState,
    /// Attachments that are being worked on.
    pub in_flight: Arc<InFlight>,
    /// Queues and wake-up channels to other tasks.
    pub channels: Channels,
}

/// The kernel, for operations on a single pod. Calls that take the kernel's lock of interfaces and routes (RTNL) may
/// wait for other programs: no other call waits for them.
#[derive(Debug)]
pub struct Pods {
    /// Links and routes.
    pub kernel: Owner<Kernel>,
    /// The packet filter.
    pub filter: Owner<FilterSocket>,
    /// The interfaces with the programs of the fast path.
    pub interfaces: Owner<Interfaces>,
    /// Released pods whose entries in the packet filter are not deleted yet.
    pub forgotten: Arc<Mutex<Vec<LocalPod>>>,
    /// The pods whose interfaces exist or are being created.
    pub local: Arc<LocalPods>,
    /// Tracked connections that are not deleted yet.
    pub stale: Arc<StaleConnections>,
    /// Deletes pods' interfaces.
    pub reaper: Reaper,
}

/// Queues and wake-up channels to other tasks.
#[derive(Debug)]
pub struct Channels {
    /// Requests for blocks.
    pub claims: mpsc::Sender<ClaimRequest>,
    /// Requests for reserved addresses.
    pub reservations: mpsc::Sender<ReserveRequest>,
    /// An attachment ended, or the probe endpoint was created: a block may be free to release, or the node's record may
    /// change.
    pub registrar: WakeSender,
    /// An attachment was added or removed.
    pub publisher: WakeSender,
    /// An attachment was added whose addresses are not in the packet filter yet.
    pub engine: WakeSender,
}

impl RecordStore for Node {
    async fn commit(&self, change: &Change) -> Result<Outcome, StoreError> {
        self.store.commit(change).await
    }

    async fn range(&self, range: &Range) -> Result<Contents, StoreError> {
        self.store.range(range).await
    }
}

impl Host for Node {
    type Ledger = Sqlite;

    fn now(&self) -> Moment {
        now()
    }

    fn view(&self) -> Arc<View> {
        self.node_state.view()
    }

    fn registration(&self) -> Registration {
        self.node_state.registration()
    }

    fn labels(&self) -> Labels {
        self.node_state.properties.labels()
    }

    async fn ledger<T: Send + 'static>(
        &self,
        job: impl FnOnce(&mut NodeIpam, Moment) -> T + Send + 'static,
    ) -> T {
        self.ipam.run(|ipam| job(ipam, now())).await
    }
}

impl Requests for Node {
    async fn claim(&self, wanted: BlockRequest) -> Result<(), NoClaim> {
        let (reply, answer) = oneshot::channel();
        let request = ClaimRequest { wanted, reply: Some(reply) };
        let asked = async {
            self.channels.claims.send(request).await.map_err(|_| Unavailable::Stopping)?;
            answer.await.map_err(|_| Unavailable::Stopping)?
        };
        timeout(CLAIM_TIMEOUT, asked).await.unwrap_or_else(|_| Err(Unavailable::TooSlow.into()))
    }

    fn claim_ahead(&self, wanted: BlockRequest) {
        // A full queue already contains requests for blocks.
        let _ = self.channels.claims.try_send(ClaimRequest { wanted, reply: None });
    }

    async fn reserve(
        &self,
        wanted: ReservationRequest,
        owner: String,
        attachment: &Attachment,
    ) -> Result<IpAddr, NotHandedOver> {
        let (reply, mut answer) = oneshot::channel();
        let request = ReserveRequest { wanted, owner, attachment: attachment.clone(), reply };
        let stopping = || RetryReason::Unavailable(Unavailable::Stopping);
        let asked = async {
            self.channels.reservations.send(request).await.map_err(|_| stopping())?;
            (&mut answer).await.map_err(|_| stopping())?
        };
        timeout(CLAIM_TIMEOUT, asked).await.unwrap_or_else(|_| {
            // From here on the registrar can detect that the requester gave up. An answer received before counts.
            answer.close();
            let too_slow = || RetryReason::Unavailable(Unavailable::TooSlow);
            answer.try_recv().unwrap_or_else(|_| Err(too_slow().into()))
        })
    }
}

impl PodHost for Node {
    type Lock = AttachmentLock;
    type Permission = PodPermission;

    fn try_lock(&self, attachment: &Attachment) -> Option<AttachmentLock> {
        self.in_flight.hold(attachment)
    }

    async fn lock(&self, attachment: &Attachment, max_wait: Duration) -> Option<AttachmentLock> {
        timeout(max_wait, self.in_flight.take(attachment)).await.ok()
    }

    fn is_locked(&self, attachment: &Attachment) -> bool {
        self.in_flight.has(attachment)
    }

    async fn gone(&self, held: Vec<AttachmentEntry>) -> Result<BTreeSet<Attachment>, HostError> {
        let links = self.pods.kernel.run(Kernel::pod_interfaces).await.map_err(HostError::new)?;
        let gone = |held: &AttachmentEntry| match held.kind {
            AttachmentKind::Pod => !links.contains(&held.attachment.host_interface()),
            // The interface name of another plugin is unknown. The interface ends with its namespace at the latest.
            AttachmentKind::Lease => Presence::of(Path::new(&held.netns)) == Presence::Gone,
        };
        Ok(held.into_iter().filter(gone).map(|held| held.attachment).collect())
    }

    async fn admit(&self, held: &AttachmentEntry) -> Result<Self::Permission, HostError> {
        if self.node_state.view().cluster.is_none() {
            // The wiring needs the settings. After this error, the addresses are released.
            return Err(HostError::new(NotServed::NoSettings));
        }
        let pod = LocalPod::of(held);
        self.pods.local.add(pod.clone());
        let admit = move |filter: &mut FilterSocket| kernel::admit_pod(filter, &pod);
        Ok(PodPermission { attachment: held.attachment.clone(), change: self.pods.filter.start(admit).await })
    }

    async fn delete_interface(
        &self,
        attachment: &Attachment,
        held: Option<&AttachmentEntry>,
    ) -> Result<(), HostError> {
        let deleted = match held {
            Some(held) => {
                let pod = LocalPod::of(held);
                self.pods.local.remove(pod.clone());
                self.pods.reaper.delete_pod(pod).await
            }
            None => self.pods.reaper.delete(attachment.host_interface()).await,
        };
        deleted.map_err(HostError::new)
    }

    async fn forget(&self, held: &AttachmentEntry) {
        let (forgotten, stale) = (Arc::clone(&self.pods.forgotten), Arc::clone(&self.pods.stale));
        let engine = self.channels.engine.clone();
        forgotten.lock().unwrap_or_else(PoisonError::into_inner).push(LocalPod::of(held));
        // Not awaited: addresses and ports are freed after this, so each ADD that gets them is queued behind it.
        let forget = move |filter: &mut FilterSocket| {
            let pods = std::mem::take(&mut *forgotten.lock().unwrap_or_else(PoisonError::into_inner));
            if pods.is_empty() {
                return;
            }
            if let Err(error) = kernel::forget_pods(filter, &pods) {
                let interfaces: Vec<&str> = pods.iter().map(|pod| pod.name.as_str()).collect();
                warn!(?interfaces, %error, "the packet filter still has entries of released pods: a pass follows");
                engine.wake();
            }
            // A flow may have begun after the interface was deleted.
            stale.add_released_ports(pods.iter().flat_map(|pod| &pod.ports));
        };
        self.pods.filter.queue(forget).await;
        self.pods.stale.add_released(&held.addresses, Some(&held.attachment));
    }

    fn tombstones(&self) -> Vec<Attachment> {
        // Usually the folder does not exist.
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
        self.node_state.obstacles()
    }

    fn families(&self) -> &[Family] {
        if self.features.ipv6 { &Family::BOTH } else { &[Family::V4] }
    }

    fn mtu(&self) -> Option<u32> {
        self.node_state.pass().map(|pass| pass.mtu)
    }

    async fn sleep(&self, time: Duration) {
        tokio::time::sleep(time).await;
    }

    fn attachments_changed(&self) {
        self.channels.publisher.wake();
    }

    fn addresses_freed(&self) {
        self.channels.registrar.wake();
    }
}

impl OperatorHost for Node {
    async fn has_interface(&self, attachment: &Attachment) -> Result<bool, HostError> {
        let links = self.pods.kernel.run(Kernel::pod_interfaces).await.map_err(HostError::new)?;
        Ok(links.contains(&attachment.host_interface()))
    }
}

impl Knowledge for Node {
    fn store_name(&self) -> String {
        self.store.name()
    }

    fn current_view(&self) -> Arc<View> {
        self.node_state.view()
    }

    async fn view_changed_from(&self, known: &Arc<View>, max_wait: Duration) {
        let mut views = self.node_state.records.changes();
        let _ = timeout(max_wait, views.wait_for(|now| !Arc::ptr_eq(now, known))).await;
    }

    async fn view_at(&self, revision: Revision, max_wait: Duration) -> Option<Arc<View>> {
        let mut views = self.node_state.records.changes();
        let view = timeout(max_wait, views.wait_for(|view| view.revision >= revision)).await.ok()?.ok()?;
        Some(Arc::clone(&view))
    }
}

/// The attachment of a tombstone. An invalid tombstone is deleted.
fn read_tombstone(file: &Path) -> Option<Attachment> {
    match fs::read_to_string(file).map(|text| text.parse()) {
        Ok(Ok(attachment)) => Some(attachment),
        Ok(Err(error)) => {
            let error: polder_api::InvalidName = error;
            warn!(file = %file.display(), %error, "deleting an invalid tombstone");
            remove_file(file);
            None
        }
        Err(error) => {
            warn!(file = %file.display(), %error, "cannot read a tombstone");
            None
        }
    }
}

fn remove_file(tombstone: &Path) {
    if let Err(error) = fs::remove_file(tombstone) {
        warn!(file = %tombstone.display(), %error, "cannot delete a tombstone");
    }
}
