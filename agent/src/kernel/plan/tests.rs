//! Applies plans to a model of the kernel, which refuses the changes that the kernel would refuse.

use polder_api::Family;
use polder_ipam::Moment;
use polder_ipam::ids::{BootId, ClusterId, Incarnation, MachineId};
use polder_ipam::ledger::{AttachmentEntry, AttachmentKind};
use polder_ipam::needed::{RequiredFor, RequiredRange};
use polder_ipam::peers::Peer;
use polder_ipam::record::{AttachMode, Backend, ClusterRecord, Masquerade, NodeRecord, VxlanSettings};
use polder_ipam::{Block, Cidr};
use polder_netlink::nft::Table;
use polder_netlink::route::{ConflictingRoute, NextHop, RouteLookup};
use proptest::prelude::*;
use proptest::sample::Index;

use super::*;
use crate::kernel::desired::{Inputs, desired};
use crate::kernel::features::Features;
use crate::kernel::guard::Guard;
use crate::kernel::state::PodLink;
use crate::underlay::{Underlay, Uplink};

mod cases;

const ETH0: IfIndex = IfIndex::new(2);

/// A small cluster, as seen from one node.
#[derive(Debug, Clone)]
struct World {
    attach: AttachMode,
    backend: Backend,
    vni: u32,
    mtu: u32,
    dual: bool,
    /// By node number: whether the peer is on the same link, and how many blocks of each family it has.
    peers: BTreeMap<u8, (bool, u8)>,
    pods: BTreeSet<u8>,
}

fn worlds() -> impl Strategy<Value = World> {
    (
        prop_oneof![Just(AttachMode::Bridge), Just(AttachMode::Routed)],
        prop_oneof![Just(Backend::Auto), Just(Backend::Direct), Just(Backend::Vxlan)],
        1..3_u32,
        prop_oneof![Just(1500_u32), Just(9000)],
        any::<bool>(),
        prop::collection::btree_map(1..5_u8, (any::<bool>(), 0..3_u8), 0..4),
        prop::collection::btree_set(1..6_u8, 0..5),
    )
        .prop_map(|(attach, backend, vni, mtu, dual, peers, pods)| World {
            attach,
            backend,
            vni,
            mtu,
            dual,
            peers,
            pods,
        })
}

fn underlay(node: u8, dual: bool) -> Vec<IpAddr> {
    let v6 = dual.then(|| format!("fd0a::{node}").parse().unwrap());
    std::iter::once(IpAddr::from([10, 1, 0, node])).chain(v6).collect()
}

/// The prefix lengths of blocks and of single addresses.
const LENGTHS: [(Family, u8); 4] = [(Family::V4, 26), (Family::V4, 32), (Family::V6, 120), (Family::V6, 128)];

/// The blocks of a node, and its gateway addresses: for each family, the first address of its first block.
fn blocks(node: u8, count: u8, dual: bool) -> (Vec<Block>, Vec<IpAddr>) {
    let block = |text: String| Block::new(text.parse().unwrap());
    let v4 = (0..count).map(|number| block(format!("10.244.{node}.{}/26", number * 64)));
    let v6 = (0..count).filter(|_| dual).map(|number| block(format!("fd00::{node}:{number}00/120")));
    let gateways = v4.clone().take(1).chain(v6.clone().take(1)).map(|block| block.cidr().first());
    (v4.clone().chain(v6.clone()).collect(), gateways.collect())
}

fn pod(number: u8) -> AttachmentEntry {
    AttachmentEntry {
        attachment: format!("polder/pod{number}/eth0").parse().unwrap(),
        kind: AttachmentKind::Pod,
        since: Moment::BOOT,
        addresses: vec![[10, 244, 0, number].into()],
        mac: Mac([2, 0, 0, 0, 1, number]),
        mtu: 1450,
        netns: String::new(),
        pod: None,
        leaving: false,
        gateways: Vec::new(),
        ports: vec![format!("{}:80/tcp", 8000 + u16::from(number)).parse().unwrap()],
    }
}

/// A node without peers, with these pods.
fn node_without_peers(pods: &[u8]) -> World {
    World {
        attach: AttachMode::Bridge,
        backend: Backend::Auto,
        vni: 1,
        mtu: 1500,
        dual: false,
        peers: BTreeMap::new(),
        pods: pods.iter().copied().collect(),
    }
}

impl World {
    /// The desired kernel state if the interfaces of these pods exist.
    fn desired(&self, present: &BTreeSet<IfName>) -> Desired {
        let cluster = ClusterRecord {
            id: ClusterId::new("c"),
            backend: self.backend,
            attach: self.attach,
            vxlan: VxlanSettings { vni: self.vni, port: 8472 },
            masquerade: Masquerade::default(),
        };
        let uplinks = underlay(0, self.dual).into_iter().map(|address| {
            let interface = "eth0".to_owned();
            let uplink = Uplink { address, index: ETH0, interface, mtu: self.mtu, chosen_by: String::new() };
            (Family::of(address), uplink)
        });
        let peers: Vec<_> =
            self.peers.iter().map(|(number, (_, count))| self.peer(*number, *count)).collect();
        let router = |address: IpAddr| underlay(254, true)[usize::from(address.is_ipv6())];
        let underlay_routes = self.peers.iter().flat_map(|(number, (on_link, _))| {
            underlay(*number, self.dual).into_iter().map(move |address| {
                let next_hop = if *on_link { NextHop::Destination } else { NextHop::Router(router(address)) };
                (address, Some(RouteLookup { index: ETH0, next_hop, source: None, local: false }))
            })
        });
        let (blocks, gateways) = blocks(0, 2, self.dual);
        let pools: Vec<Cidr> = ["10.244.0.0/16", "fd00::/64"].map(|cidr| cidr.parse().unwrap()).into();
        let inputs = Inputs {
            cluster: &cluster,
            pools: &pools[..=usize::from(self.dual)],
            node: &"me".parse().unwrap(),
            blocks: &blocks,
            gateways: &gateways,
            underlay: &Underlay { uplinks: uplinks.collect(), others: Vec::new(), needed: Vec::new() },
            mtu: self.mtu - 50,
            peers: &peers,
            previous_underlay: &BTreeMap::new(),
            lengths: &LENGTHS.into(),
            underlay_routes: &underlay_routes.collect(),
            pods: &self.pods.iter().map(|number| pod(*number)).collect::<Vec<_>>(),
            families: &Family::BOTH.into(),
            host_addresses: &underlay(0, self.dual).into_iter().collect(),
            features: Features::ALL,
            ingress_interfaces: &BTreeSet::from(["eth0".to_owned()]),
            layer3_interfaces: &BTreeSet::new(),
            tunnel_instead_of_direct: &BTreeSet::new(),
        };
        desired(&inputs, present, &[])
    }

    fn peer(&self, number: u8, count: u8) -> Peer {
        let (blocks, gateways) = blocks(number, count, self.dual);
        let record = NodeRecord {
            incarnation: Incarnation::new(String::new()),
            machine_id: MachineId::default(),
            boot_id: BootId::default(),
            underlay: underlay(number, self.dual),
            gateways,
            probes: Vec::new(),
            vtep_mac: Mac([6, 0, 0, 0, 0, number]),
            mtu: 1450,
            version: String::new(),
            kubernetes_uid: None,
        };
        Peer { name: format!("n{number}").parse().unwrap(), record: record.into(), blocks }
    }
}

/// The part of a kernel that plans read or change.
#[derive(Debug, Clone, Default)]
pub(crate) struct Model {
    state: State,
    sysctls: BTreeMap<String, String>,
    filter: Option<(Table, Elements)>,
    pub(crate) indexes: BTreeMap<Device, IfIndex>,
    last_index: u32,
}

impl Model {
    /// Creates a pod interface, like the plugin. It is not a port of the bridge yet.
    fn plug(&mut self, number: u8) {
        let name = pod(number).attachment.host_interface();
        if !self.state.pods.contains_key(&name) {
            self.assign_index(&Device::Pod(name.clone()));
            self.state.pods.insert(name, PodLink { port: None, up: true, ipv4_forwarding: false });
        }
    }

    fn assign_index(&mut self, device: &Device) {
        self.last_index += 1;
        let index = IfIndex::new(self.last_index);
        assert!(self.indexes.insert(device.clone(), index).is_none(), "{device} exists already");
    }

    fn present(&self) -> BTreeSet<IfName> {
        self.state.pods.keys().cloned().collect()
    }

    pub(crate) fn actual(&self, table: &Table) -> Actual {
        let filter = match &self.filter {
            Some((installed, elements)) if installed == table => TableState::Intact(elements.clone()),
            _ => TableState::Different("another".to_owned()),
        };
        Actual {
            state: self.state.clone(),
            sysctls: self.sysctls.clone(),
            filter,
            indexes: self.indexes.clone(),
            accept_ra_paths: Vec::new(),
        }
    }

    /// Deletes a device, and everything that depends on it.
    fn unplug(&mut self, device: &Device) {
        assert!(self.indexes.remove(device).is_some(), "{device} does not exist");
        let state = &mut self.state;
        state.links.remove(device);
        if let Device::Pod(name) = device {
            state.pods.remove(name);
        }
        state.addresses.retain(|(on, _)| on != device);
        state.neighbours.retain(|(on, _), _| on != device);
        state.routes.retain(|_, route| device_of(route).as_ref() != Some(device));
        state.fdb.retain(|(on, _), _| on != device);
        if *device == Device::Bridge {
            state.pods.values_mut().for_each(|pod| pod.port = None);
            state.fdb.retain(|(on, _), _| !matches!(on, Device::Pod(_)));
        }
    }

    fn exists(&self, device: &Device) -> bool {
        matches!(device, Device::Uplink(_)) || self.indexes.contains_key(device)
    }

    pub(crate) fn apply(&mut self, change: &KernelChange, desired: &Desired) {
        let assert_exists =
            |device: &Device| assert!(self.exists(device), "{change}: {device} does not exist");
        match change.clone() {
            KernelChange::SetSysctl { path, value } => drop(self.sysctls.insert(path, value)),
            KernelChange::CreateLink(device, link) => {
                self.assign_index(&device);
                self.state.links.insert(device, link);
            }
            KernelChange::DeleteLink(device, index) => {
                assert_eq!(self.indexes.get(&device), Some(&index), "{change}");
                self.unplug(&device);
            }
            KernelChange::RenameLink(device, index) => {
                assert_eq!(self.indexes.get(&device), Some(&index), "{change}");
                self.state.links.get_mut(&device).unwrap().identity = DeviceIdentity::Correct;
            }
            KernelChange::AdjustLink(device, link) => {
                assert_exists(&device);
                let found = self.state.links.insert(device, link.clone()).unwrap();
                assert!(found.kind.can_become(&link.kind), "the kind of a device cannot be changed");
            }
            KernelChange::InstallFilter(_) => {
                self.filter = Some((desired.table.clone(), desired.elements.clone()));
            }
            KernelChange::RefillSet { set, elements } => {
                self.filter.as_mut().expect("a table").1.insert(set, elements.clone());
            }
            KernelChange::UpdateSet { set, add, remove } => {
                let elements = self.filter.as_mut().expect("a table").1.entry(set).or_default();
                assert!(remove.iter().all(|element| elements.remove(element)), "{change}: element missing");
                let exists = |new: &Element| elements.iter().any(|old| old.key() == new.key());
                assert!(!add.iter().any(exists), "{change}: the kernel refuses a second element of that key");
                elements.extend(add);
            }
            KernelChange::AddAddress(device, address) => {
                assert_exists(&device);
                assert!(self.state.addresses.insert((device, address)), "{change}: the address exists");
            }
            KernelChange::SetPod(name, port) => {
                assert_exists(&Device::Pod(name.clone()));
                assert!(port.is_none() || self.exists(&Device::Bridge), "{change}: no bridge");
                self.state.pods.insert(name, PodLink { port, up: true, ipv4_forwarding: port.is_none() });
            }
            KernelChange::SetNeighbour(device, address, mac) => {
                assert_exists(&device);
                self.state.neighbours.insert((device, address), mac);
            }
            KernelChange::SetFdbEntry(device, mac, to) => {
                assert_exists(&device);
                if let Device::Pod(name) = &device {
                    assert!(self.state.pods[name].port.is_some(), "{change}: the pod is not a bridge port");
                }
                self.state.fdb.insert((device, mac), to);
            }
            KernelChange::SetRoute(destination, route) => {
                device_of(&route).iter().for_each(assert_exists);
                if let RouteTarget::Tunnel(family, IpAddr::V6(next_hop)) = route.target {
                    let elsewhere = self.state.routes.iter().any(|(range, route)| {
                        range.contains(next_hop.into()) && device_of(route) != Some(Device::Tunnel(family))
                    });
                    assert!(!elsewhere, "{change}: the kernel refuses a next hop that is routed elsewhere");
                }
                self.state.routes.insert(destination, route);
            }
            KernelChange::DeleteRoute(destination) => {
                assert!(self.state.routes.remove(&destination).is_some());
            }
            KernelChange::DeleteConflicting(conflicting) => {
                assert!(self.state.conflicting_routes.remove(&conflicting));
            }
            KernelChange::DeleteFdbEntry(device, mac, _) => {
                assert!(self.state.fdb.remove(&(device, mac)).is_some(), "{change}");
            }
            KernelChange::DeleteNeighbour(device, address, _) => {
                assert!(self.state.neighbours.remove(&(device, address)).is_some(), "{change}");
            }
            KernelChange::DeleteAddress(device, address) => {
                assert!(self.state.addresses.remove(&(device, address)), "{change}");
            }
            KernelChange::DeletePod(name, index) => {
                let device = Device::Pod(name);
                assert_eq!(self.indexes.get(&device), Some(&index), "{change}");
                self.unplug(&device);
            }
        }
    }

    /// Destinations routed into a tunnel that lacks the neighbour or FDB entry of the peer (packets are lost).
    fn holes(&self) -> BTreeSet<IpNetwork> {
        let is_hole = |route: &OwnRoute| match route.target {
            RouteTarget::Tunnel(family, gateway) => {
                let device = Device::Tunnel(family);
                let mac = self.state.neighbours.get(&(device.clone(), gateway));
                !mac.is_some_and(|mac| self.state.fdb.contains_key(&(device, *mac)))
            }
            _ => false,
        };
        let routes = self.state.routes.iter();
        routes.filter(|(_, route)| is_hole(route)).map(|(destination, _)| *destination).collect()
    }

    /// Applies the plan for that world, and returns its changes.
    fn apply_plan_for(&mut self, world: &World, prune: Prune) -> Vec<KernelChange> {
        let desired = world.desired(&self.present());
        let changes = plan(&desired, &self.actual(&desired.table), prune);
        changes.iter().for_each(|change| self.apply(change, &desired));
        changes
    }

    /// The kernel of a node in that world.
    fn of(world: &World) -> Self {
        let mut model = Self::default();
        world.pods.iter().for_each(|number| model.plug(*number));
        model.apply_plan_for(world, Prune::Yes);
        model
    }

    /// Deletes or changes one object, as another program might.
    fn damage(&mut self, what: u8, which: &Index) {
        fn pick<T>(all: impl IntoIterator<Item = T>, which: &Index) -> Option<T> {
            let mut all: Vec<T> = all.into_iter().collect();
            (!all.is_empty()).then(|| all.swap_remove(which.index(all.len())))
        }
        let state = &mut self.state;
        match what {
            0 => {
                if let Some(device) = pick(self.indexes.keys().cloned(), which) {
                    self.unplug(&device);
                }
            }
            1 => drop(pick(state.routes.keys().copied(), which).map(|key| state.routes.remove(&key))),
            2 => drop(pick(state.neighbours.keys().cloned(), which).map(|key| state.neighbours.remove(&key))),
            3 => drop(pick(state.fdb.keys().cloned(), which).map(|key| state.fdb.remove(&key))),
            4 => drop(pick(state.addresses.iter().cloned(), which).map(|key| state.addresses.remove(&key))),
            5 => self.filter = None,
            6 => {
                self.sysctls.clear();
                self.sysctls.insert("net/bridge/bridge-nf-call-iptables".to_owned(), "1".to_owned());
            }
            7 => drop(pick(state.links.values_mut(), which).map(|link| link.mtu = 1280)),
            8 => drop(pick(state.links.values_mut(), which).map(|link| link.kind = DeviceKind::Foreign)),
            _ => drop(pick(state.pods.values_mut(), which).map(|link| link.port = None)),
        }
    }
}

/// Numbers that select a kind and an object.
fn random_picks() -> impl Strategy<Value = Vec<(u8, Index)>> {
    prop::collection::vec((0..10_u8, any::<Index>()), 0..6)
}

proptest! {
    /// One plan leads from any state to any other, and leaves nothing to do.
    #[test]
    fn a_plan_turns_any_state_into_the_desired_state(before in worlds(), after in worlds(), damage in random_picks()) {
        let mut model = Model::of(&before);
        damage.iter().for_each(|(what, which)| model.damage(*what, which));
        after.pods.iter().for_each(|number| model.plug(*number));
        model.apply_plan_for(&after, Prune::Yes);

        let desired = after.desired(&model.present());
        prop_assert_eq!(&model.state, &desired.state);
        prop_assert_eq!(&model.filter, &Some((desired.table.clone(), desired.elements.clone())));
        let settings: BTreeMap<_, _> = desired.sysctls.iter().cloned().collect();
        let is_set = |path: &str, value| match model.sysctls.get(path) {
            Some(found) => found == value,
            None => sysctl::may_be_missing(path),
        };
        prop_assert!(settings.iter().all(|(path, value)| is_set(path, value)));
        prop_assert_eq!(plan(&desired, &model.actual(&desired.table), Prune::Yes), []);
    }

    /// No step of a plan loses packets: a route uses a tunnel only while the tunnel has the entries of the peer.
    #[test]
    fn no_change_of_a_plan_loses_packets_in_a_tunnel(before in worlds(), after in worlds()) {
        let mut model = Model::of(&before);
        after.pods.iter().for_each(|number| model.plug(*number));
        let desired = after.desired(&model.present());
        for change in plan(&desired, &model.actual(&desired.table), Prune::Yes) {
            model.apply(&change, &desired);
            prop_assert_eq!(model.holes(), BTreeSet::new(), "after: {}", change);
        }
    }

    /// The filter accepts a pod's packets only if its sets contain the pod. Filter changes come before routes.
    #[test]
    fn filter_changes_precede_changes_that_open_paths(before in worlds(), after in worlds()) {
        use KernelChange::{CreateLink, InstallFilter, RefillSet, SetPod, SetRoute, UpdateSet};
        let mut model = Model::of(&before);
        after.pods.iter().for_each(|number| model.plug(*number));
        let desired = after.desired(&model.present());
        let changes = plan(&desired, &model.actual(&desired.table), Prune::Yes);
        let protects = |change: &KernelChange| {
            matches!(change, InstallFilter(_) | UpdateSet { .. } | RefillSet { .. })
        };
        let opens = |change: &KernelChange| matches!(change, CreateLink(..) | SetPod(..) | SetRoute(..));
        if let (Some(last), Some(first)) = (changes.iter().rposition(protects), changes.iter().position(opens)) {
            prop_assert!(last < first, "{:#?}", changes);
        }
    }

    /// While records may be missing, no object is deleted without a replacement.
    #[test]
    fn without_all_records_no_kernel_state_is_deleted(known in worlds(), missing in random_picks()) {
        let mut model = Model::of(&known);
        let mut partial = known.clone();
        for (what, which) in &missing {
            let pod = partial.pods.iter().nth(which.index(partial.pods.len().max(1))).copied();
            match what % 2 {
                0 => drop(partial.peers.pop_first()),
                _ => drop(pod.map(|pod| partial.pods.remove(&pod))),
            }
        }
        let before = model.clone();
        model.apply_plan_for(&partial, Prune::No);
        prop_assert_eq!(model.state, before.state);
        let (before, after) = (before.filter.unwrap().1, model.filter.unwrap().1);
        // Host ports are in the ledger only.
        for (set, elements) in before.iter().filter(|(set, _)| !host_ports::is_set(set)) {
            prop_assert_eq!(elements, &after[set], "{}", set);
        }
    }
}
