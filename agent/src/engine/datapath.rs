//! Access of passes to the kernel and the ledger.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use ipnetwork::IpNetwork;
use polder_ipam::ledger::{AttachmentEntry, LedgerError};
use polder_ipam::needed::RequiredRange;
use polder_ipam::{Block, Cidr};
use polder_netlink::nft::{FilterSocket, Table};
use polder_netlink::route::RouteLookup;
use polder_netlink::{Error, IfIndex};
use polder_store::NodeIpam;

use crate::kernel::apply::Failure;
use crate::kernel::desired::Desired;
use crate::kernel::plan::KernelChange;
use crate::kernel::ruleset::is_of_pods;
use crate::kernel::snapshot::{HostNetwork, RouteTo};
use crate::kernel::state::{Actual, Device};
use crate::kernel::{self, Kernel};
use crate::local_pods::LocalPods;
use crate::owner::Owner;

/// The ledger's contents.
#[derive(Debug, Clone, Default)]
pub struct Wired {
    /// The node's blocks.
    pub blocks: Vec<Block>,
    /// The node's own addresses in the pod network.
    pub gateways: Vec<IpAddr>,
    /// The node's attachments, and its probe endpoint.
    pub pods: Vec<AttachmentEntry>,
}

/// The kernel or its socket returned an error that ended the changes of a pass.
///
/// Remedy: correct the cause that the kernel reports at the end of the text. The agent retries at the next pass.
#[derive(Debug, thiserror::Error)]
#[error("cannot change kernel state: {0}")]
pub(super) struct ApplyFailed(#[source] pub(super) Error);

/// The kernel (see [`Kernel`]) and the node's ledger, for passes to read and change.
pub trait Datapath {
    /// Reads the kernel's current state.
    fn snapshot(&self, table: Table) -> impl Future<Output = Result<Actual, Error>> + Send;

    /// Applies changes; returns those that failed.
    fn apply(
        &self,
        changes: Vec<KernelChange>,
        desired: Desired,
        indexes: BTreeMap<Device, IfIndex>,
    ) -> impl Future<Output = Result<Vec<Failure>, Error>> + Send;

    /// Reads the host's interfaces, and the routes to these addresses.
    fn host_network(
        &self,
        asked: Vec<(RouteTo, IpAddr)>,
    ) -> impl Future<Output = Result<HostNetwork, Error>> + Send;

    /// Looks up the routes to peers.
    fn look_up(
        &self,
        addresses: Vec<IpAddr>,
    ) -> impl Future<Output = Result<Vec<(IpAddr, Option<RouteLookup>)>, Error>> + Send;

    /// Deletes Polder's routes that make the datastore unreachable; returns them.
    fn delete_routes_that_capture(
        &self,
        store: Vec<RequiredRange>,
    ) -> impl Future<Output = Result<Vec<IpNetwork>, Error>> + Send;

    /// Reads the ranges of this node's own blocks, and the addresses of its attachments.
    fn own_ranges(&self) -> impl Future<Output = Vec<Cidr>> + Send;

    /// Reads the ledger.
    fn wired(&self) -> impl Future<Output = Wired> + Send;

    /// Saves previous values of kernel settings, by path.
    fn keep_sysctls(
        &self,
        previous: Vec<(String, String)>,
    ) -> impl Future<Output = Result<(), LedgerError>> + Send;
}

/// [`Datapath`] on the node that the agent runs on.
#[derive(Debug)]
pub struct OnNode {
    /// The kernel, for passes.
    pub kernel: Owner<Kernel>,
    /// The node's ledger.
    pub ipam: Owner<NodeIpam>,
    /// The packet filter, where pods are admitted and forgotten.
    pub filter: Owner<FilterSocket>,
    /// The pods of this node.
    pub pods: Arc<LocalPods>,
}

impl Datapath for OnNode {
    async fn snapshot(&self, table: Table) -> Result<Actual, Error> {
        self.kernel.run(move |kernel| kernel.snapshot(&table)).await
    }

    async fn apply(
        &self,
        mut changes: Vec<KernelChange>,
        desired: Desired,
        indexes: BTreeMap<Device, IfIndex>,
    ) -> Result<Vec<Failure>, Error> {
        let is_of_pods = |change: &mut KernelChange| matches!(change, KernelChange::UpdateSet { set, .. } if is_of_pods(set));
        let of_pods: Vec<_> = changes.extract_if(.., is_of_pods).collect();
        let mut failures = Vec::new();
        if !of_pods.is_empty() {
            let pods = Arc::clone(&self.pods);
            failures = self.filter.run(move |filter| kernel::update_pods(filter, of_pods, &pods)).await;
        }
        failures.extend(self.kernel.run(move |kernel| kernel.apply(changes, &desired, indexes)).await?);
        Ok(failures)
    }

    async fn host_network(&self, asked: Vec<(RouteTo, IpAddr)>) -> Result<HostNetwork, Error> {
        self.kernel.run(move |kernel| kernel.host_network(&asked)).await
    }

    async fn look_up(&self, addresses: Vec<IpAddr>) -> Result<Vec<(IpAddr, Option<RouteLookup>)>, Error> {
        self.kernel.run(move |kernel| kernel.look_up(&addresses)).await
    }

    async fn delete_routes_that_capture(&self, store: Vec<RequiredRange>) -> Result<Vec<IpNetwork>, Error> {
        self.kernel.run(move |kernel| kernel.delete_routes_that_capture(&store)).await
    }

    async fn own_ranges(&self) -> Vec<Cidr> {
        let ranges = |ipam: &mut NodeIpam| {
            let blocks = ipam.blocks().iter().map(|owned| owned.block.cidr());
            let held = ipam.attachments().flat_map(|held| &held.addresses);
            blocks.chain(held.map(|address| Cidr::containing(*address, u8::MAX))).collect()
        };
        self.ipam.run(ranges).await
    }

    async fn wired(&self) -> Wired {
        let wired = |ipam: &mut NodeIpam| Wired {
            blocks: ipam.blocks().iter().map(|owned| owned.block).collect(),
            gateways: ipam.gateways().to_vec(),
            pods: ipam.attachments().chain(ipam.probe()).cloned().collect(),
        };
        self.ipam.run(wired).await
    }

    async fn keep_sysctls(&self, previous: Vec<(String, String)>) -> Result<(), LedgerError> {
        let keep = move |ipam: &mut NodeIpam| {
            previous.iter().try_for_each(|(path, value)| ipam.keep_sysctl(path, value))
        };
        self.ipam.run(keep).await
    }
}
