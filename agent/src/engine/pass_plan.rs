//! Computes what a pass would do: reads all inputs and changes nothing in the kernel.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use polder_api::{Backend, Family, NodeName, PerFamily};
use polder_ipam::peers::{Peer, RecordFault, UniqueAddress, ValidatedRecords, validate};
use polder_ipam::record::ClusterRecord;
use polder_ipam::view::{View, ViewSource};
use polder_ipam::{Block, Cidr};
use polder_netlink::IfIndex;
use polder_netlink::route::RouteLookup;
use tokio::time::Instant;
use tracing::warn;

use super::datapath::{Datapath, Wired};
use super::{Engine, LOSS_GRACE};
use crate::kernel::desired::{Desired, Inputs, Path, PeerPath, desired, pod_mtu};
use crate::kernel::plan::{KernelChange, Prune, plan};
use crate::kernel::ruleset;
use crate::kernel::state::{Device, RouteTarget, State};
use crate::node_state::Pass;
use crate::probe::direct::Direct;
use crate::requests::NoPlan;
use crate::underlay::{LOOPBACK, Underlay};

/// The inputs of a pass.
pub(super) struct PassInputs {
    pub(super) view: Arc<View>,
    cluster: Arc<ClusterRecord>,
    underlay: Arc<Underlay>,
    /// Whether the node has no underlay address at present, and `underlay` is the previous one.
    is_cut_off: bool,
    pub(super) validated: ValidatedRecords,
}

/// The planned result of a pass.
pub(super) struct PassPlan {
    /// The desired kernel state.
    pub(super) desired: Desired,
    /// Whether the changes delete unwanted objects.
    pub(super) prune: Prune,
    /// The changes that lead to it.
    pub(super) changes: Vec<KernelChange>,
    /// The existing devices.
    pub(super) indexes: BTreeMap<Device, IfIndex>,
    /// The current kernel settings.
    pub(super) sysctls: BTreeMap<String, String>,
    /// The report of the pass.
    pub(super) pass: Pass,
}

impl PassPlan {
    /// The planned changes as text, in order.
    pub(super) fn changes(&self) -> Vec<String> {
        let words = |change: &KernelChange| match change {
            KernelChange::SetSysctl { path, .. } => {
                let now = self.sysctls.get(path).map(|now| format!(" (now {now})")).unwrap_or_default();
                format!("{change}{now}")
            }
            change => change.to_string(),
        };
        self.changes.iter().map(words).collect()
    }
}

impl<D: Datapath> Engine<D> {
    /// The changes of the next pass, in order.
    pub(super) async fn plan(&mut self) -> Result<Vec<String>, NoPlan> {
        Ok(self.draft_now().await?.changes())
    }

    /// The draft of a pass that starts now.
    pub(super) async fn draft_now(&mut self) -> Result<PassPlan, NoPlan> {
        let view = self.node_state().view();
        let validated = validate(&view, &self.tools.config.node, self.tools.leases.borrow().dead());
        self.look_for(&validated.peers, false).await;
        self.transitions.observe(&validated.peers, Instant::now());
        let grounds = self.grounds(view, validated)?;
        self.pass_plan(&grounds).await
    }

    /// The inputs of a pass, or why the kernel is left unchanged.
    pub(super) fn grounds(&self, view: Arc<View>, validated: ValidatedRecords) -> Result<PassInputs, NoPlan> {
        let node_state = self.node_state();
        let alone = || {
            let obstacles = node_state.obstacles();
            Err(if obstacles.is_empty() { NoPlan::Moving } else { NoPlan::Obstacles(obstacles) })
        };
        let allocations = node_state.allocations();
        // Until the registrar has verified this node's identity, the kernel is left unchanged.
        let forbidden = node_state.registration().not_serving_reason().is_some();
        let chosen = node_state.underlay();
        let is_cut_off = chosen.is_err();
        // Without an uplink, node-local state is still maintained.
        let underlay = chosen.ok().or_else(|| self.network.underlay.clone());
        let (Some(cluster), Some(underlay), Some(_), false) =
            (&view.cluster, underlay, &allocations.identity, forbidden)
        else {
            return alone();
        };
        // Which records are valid depends on the node's own addresses: the view is updated for them soon.
        if view.own_addresses != underlay.addresses() && !is_cut_off {
            return alone();
        }
        // Without a pool there is no gateway address.
        if view.families().is_empty() && allocations.gateways.is_empty() {
            return alone();
        }
        let cluster = Arc::clone(&cluster.record);
        Ok(PassInputs { view, cluster, underlay, is_cut_off, validated })
    }

    /// Reads the current state and computes the changes of a pass.
    pub(super) async fn pass_plan(&mut self, grounds: &PassInputs) -> Result<PassPlan, NoPlan> {
        let PassInputs { view, cluster, underlay, is_cut_off, validated } = grounds;
        // A pool that the datastore lost stays in use.
        let pools = view.pools.values().map(|pool| &pool.record).chain(view.lost_pools.values());
        let lengths = ruleset::lengths(pools.map(|pool| &**pool));
        let table = ruleset::table(cluster, &lengths);
        // First the kernel, then the ledger: an attachment is added to the ledger before the kernel, and removed from
        // the kernel before the ledger; only its filter elements may be removed later. So state that is in the kernel
        // but not in the ledger has no owner.
        let mut actual = match self.tools.datapath.snapshot(table).await {
            Ok(actual) => actual,
            Err(error) => return Err(NoPlan::Unread(error)),
        };
        let Wired { blocks, gateways, pods } = self.tools.datapath.wired().await;
        let mtu = pod_mtu(underlay, cluster, self.tools.config.mtu);
        let pools: Vec<Cidr> = view.pools.values().map(|pool| pool.record.cidr()).collect();
        // A family that the cluster no longer uses is maintained while pods have addresses of it.
        let mut families = view.families();
        families.extend(gateways.iter().map(|gateway| Family::of(*gateway)));
        let is_open = *is_cut_off || self.is_in_dispute(validated);
        let prune = if is_open { Prune::No } else { self.prune(view, &validated.own_blocks, &blocks) };
        let underlay_routes = self.network.underlay_routes.clone();
        let registered =
            view.nodes.get(&self.tools.config.node).map(|known| known.record.underlay.as_slice());
        let sources = self.transitions.sources(
            underlay,
            registered.unwrap_or_default(),
            &self.network.own,
            Instant::now(),
        );
        let ingress_interfaces = self.ingress_interfaces(underlay);
        let inputs = Inputs {
            cluster,
            pools: &pools,
            lengths: &lengths,
            node: &self.tools.config.node,
            blocks: &blocks,
            gateways: &gateways,
            underlay: &sources,
            mtu,
            peers: &validated.peers,
            previous_underlay: &self.transitions.previous_underlay(),
            underlay_routes: &underlay_routes,
            pods: &pods,
            families: &families,
            host_addresses: &self.network.host_addresses,
            features: self.tools.features,
            ingress_interfaces: &ingress_interfaces,
            layer3_interfaces: &self.network.outward.layer3_interfaces,
            tunnel_instead_of_direct: &self.tunnel_instead_of_direct(
                cluster,
                &validated.peers,
                &actual.state,
            ),
        };
        let host_addresses = self.network.host_addresses.iter().chain(&gateways).copied().collect();
        let has_host_ports = inputs.has_host_ports();
        let present: BTreeSet<_> = actual.state.pods.keys().cloned().collect();
        let desired = desired(&inputs, &present, &actual.accept_ra_paths);
        actual.sysctls = self.tools.sysctls.read(desired.sysctls.iter().map(|(path, _)| path));
        let changes = plan(&desired, &actual, prune);
        let paths = inputs.peer_paths();
        let before = self.node_state().pass().map(|before| Arc::clone(&before.paths));
        let paths = before.filter(|before| **before == paths).unwrap_or_else(|| Arc::new(paths));
        let next_hops = next_hops(&paths, &underlay_routes);
        let pass = Pass {
            writes: changes.len(),
            gateways,
            mtu,
            paths,
            next_hops,
            ingress_interfaces,
            host_addresses,
            has_host_ports,
            ..Pass::default()
        };
        Ok(PassPlan { desired, prune, changes, indexes: actual.indexes, sysctls: actual.sysctls, pass })
    }

    /// The peers on the same link for whose pods a tunnel is used. A path without a test result keeps its current type,
    /// which a starting agent reads from the kernel.
    fn tunnel_instead_of_direct(
        &self,
        cluster: &ClusterRecord,
        peers: &[Peer],
        actual: &State,
    ) -> BTreeSet<(NodeName, Family)> {
        if cluster.backend != Backend::Auto || !self.tools.config.probe_peers {
            return BTreeSet::new();
        }
        let direct = self.tools.direct.borrow();
        let goes_through_tunnel = |peer: &Peer, family| {
            let mut blocks = peer.blocks.iter().filter(|block| block.family() == family);
            blocks.any(|block| {
                let route = actual.routes.get(&block.cidr().into());
                route.is_some_and(|route| matches!(route.target, RouteTarget::Tunnel(..)))
            })
        };
        let families = peers.iter().flat_map(|peer| Family::BOTH.map(|family| (peer, family)));
        let tunnel_instead_of_direct = families.filter_map(|(peer, family)| {
            let key = (peer.name.clone(), family);
            let uses_tunnel = match direct.get(&key) {
                Some(Direct::Drops) => true,
                Some(Direct::Carries) => false,
                None => goes_through_tunnel(peer, family),
            };
            uses_tunnel.then_some(key)
        });
        tunnel_instead_of_direct.collect()
    }

    /// Foreign interfaces on which pods' packets arrive: from peers on any path, and from outside the cluster.
    fn ingress_interfaces(&self, underlay: &Underlay) -> BTreeSet<String> {
        let uplinks = underlay.uplinks.values().map(|uplink| uplink.index);
        let peers = self
            .network
            .underlay_routes
            .values()
            .flatten()
            .filter(|route| !route.local)
            .map(|route| route.index);
        let all = uplinks.chain(peers).chain(self.network.outward.world.iter().copied());
        let names = all.filter_map(|index| self.network.outward.interfaces.get(&index));
        names.filter(|name| *name != LOOPBACK).cloned().collect()
    }

    /// Whether two nodes have the same underlay address, and it is not known yet which of them is alive.
    fn is_in_dispute(&self, validated: &ValidatedRecords) -> bool {
        let leases = self.tools.leases.borrow();
        validated.problems.iter().any(|problem| match &problem.fault {
            RecordFault::OfAnother { identity: UniqueAddress::Underlay(_), owner } => {
                *owner != self.tools.config.node && !leases.is_decided_for(owner)
            }
            _ => false,
        })
    }

    /// Whether the records are complete, so that kernel state without a record can be deleted.
    fn prune(&mut self, view: &View, own_blocks: &[Block], blocks: &[Block]) -> Prune {
        if view.losses != self.losses.known {
            self.losses.known = view.losses;
            warn!("the datastore lost records: keeping routes and tunnels to the affected nodes for now");
            self.losses.prune_from = Some(Instant::now() + LOSS_GRACE);
        }
        let allocations = self.node_state().allocations();
        let own = view.nodes.get(&self.tools.config.node);
        let registered = own.is_some_and(|own| {
            allocations
                .identity
                .as_ref()
                .is_some_and(|identity| identity.incarnation == own.record.incarnation)
        });
        let adopted = own_blocks.iter().all(|block| blocks.contains(block));
        let complete = view.source == ViewSource::Store && registered && adopted && !self.network.doubt;
        if complete && self.losses.prune_from.is_none() { Prune::Yes } else { Prune::No }
    }
}

/// Number of underlay neighbours on the paths to all peers, by family.
fn next_hops(
    paths: &BTreeMap<(NodeName, Family), PeerPath>,
    underlay_routes: &BTreeMap<IpAddr, Option<RouteLookup>>,
) -> PerFamily<usize> {
    let next_hop = |peer_path: &PeerPath| match &peer_path.path {
        Path::Direct { via, .. } => Some(*via),
        Path::Tunnel { remote, .. } => {
            let router =
                underlay_routes.get(remote).copied().flatten().and_then(|lookup| lookup.next_hop.router());
            Some(router.unwrap_or(*remote))
        }
        Path::Unreachable(_) => None,
    };
    let distinct: BTreeSet<IpAddr> = paths.values().filter_map(next_hop).collect();
    let mut count = PerFamily::default();
    distinct.into_iter().for_each(|address| count[Family::of(address)] += 1);
    count
}
