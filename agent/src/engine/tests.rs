//! Tests the engine with a model of the kernel.

use std::fs;
use std::pin::Pin;
use std::sync::Mutex;

use ipnetwork::IpNetwork;
use polder_api::{Family, Mac};
use polder_ipam::ids::{Incarnation, MachineId, Nonce};
use polder_ipam::ledger::LedgerError;
use polder_ipam::needed::RequiredRange;
use polder_ipam::record::{BlockRecord, NodeRecord};
use polder_ipam::registration::{Registration, UnprovenReason};
use polder_ipam::view::{Versioned, View};
use polder_ipam::{Block, Cidr, Revision};
use polder_netlink::Error;
use polder_netlink::IfIndex;
use polder_netlink::address::Address;
use polder_netlink::nft::Table;
use polder_netlink::route::{NextHop, RouteLookup};
use tokio::sync::{mpsc, oneshot, watch};

use super::datapath::Wired;
use super::*;
use crate::config::{Config, Flags};
use crate::conflist::NotWritten;
use crate::fixture::Fixture;
use crate::kernel::apply::Failure;
use crate::kernel::desired::{Desired, Path};
use crate::kernel::features::Features;
use crate::kernel::plan::tests::Model;
use crate::kernel::snapshot::{HostNetwork, RouteTo};
use crate::kernel::state::{Actual, Device};
use crate::kernel::sysctl::Sysctls;
use crate::leases::Leases;
use crate::probe::NotProbed;
use crate::probe::direct::{Direct, DirectPaths};
use crate::readiness::Readiness;
use crate::repair::{DriftSignal, RepairLog};
use crate::requests::PlanRequest;
use crate::wake::{WakeSender, wake_channel};

/// A kernel that applies all changes, or cannot be read.
#[derive(Clone, Default)]
struct Fake(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    model: Model,
    is_unreadable: bool,
    snapshots: usize,
    route_deletions: usize,
    /// Runs at the next read.
    at_read: Option<Box<dyn FnOnce() + Send>>,
    sysctls: std::path::PathBuf,
}

impl Fake {
    fn with<T>(&self, action: impl FnOnce(&mut State) -> T) -> T {
        action(&mut self.0.lock().unwrap())
    }
}

fn route() -> RouteLookup {
    RouteLookup {
        index: IfIndex::new(2),
        next_hop: NextHop::Destination,
        source: "192.0.2.7".parse().ok(),
        local: false,
    }
}

impl Datapath for Fake {
    async fn snapshot(&self, table: Table) -> Result<Actual, Error> {
        self.with(|state| {
            state.snapshots += 1;
            state.at_read.take().into_iter().for_each(|action| action());
            if state.is_unreadable { Err(Error::Interrupted(1)) } else { Ok(state.model.actual(&table)) }
        })
    }

    async fn apply(
        &self,
        changes: Vec<KernelChange>,
        desired: Desired,
        _: BTreeMap<Device, IfIndex>,
    ) -> Result<Vec<Failure>, Error> {
        self.with(|state| {
            for change in &changes {
                if let KernelChange::SetSysctl { path, value } = change {
                    let file = state.sysctls.join(path.strip_prefix("net/").unwrap());
                    fs::create_dir_all(file.parent().unwrap()).unwrap();
                    fs::write(file, value).unwrap();
                }
                state.model.apply(change, &desired);
            }
        });
        Ok(Vec::new())
    }

    async fn host_network(&self, _: Vec<(RouteTo, IpAddr)>) -> Result<HostNetwork, Error> {
        let address = "192.0.2.7/24".parse().unwrap();
        Ok(HostNetwork {
            interfaces: [(IfIndex::new(2), ("eth0".to_owned(), 1500))].into(),
            addresses: vec![Address { index: IfIndex::new(2), address, global: true, temporary: false }],
            routes: vec![(RouteTo::World, route())],
            ..HostNetwork::default()
        })
    }

    async fn look_up(&self, addresses: Vec<IpAddr>) -> Result<Vec<(IpAddr, Option<RouteLookup>)>, Error> {
        Ok(addresses.into_iter().map(|address| (address, Some(route()))).collect())
    }

    async fn delete_routes_that_capture(&self, _: Vec<RequiredRange>) -> Result<Vec<IpNetwork>, Error> {
        self.with(|state| state.route_deletions += 1);
        Ok(Vec::new())
    }

    async fn own_ranges(&self) -> Vec<Cidr> {
        Vec::new()
    }

    async fn wired(&self) -> Wired {
        Wired::default()
    }

    async fn keep_sysctls(&self, _: Vec<(String, String)>) -> Result<(), LedgerError> {
        Ok(())
    }
}

/// A running engine, and its wake-up sources.
struct Harness {
    fixture: Fixture,
    kernel: Fake,
    passes: watch::Receiver<Option<Arc<Pass>>>,
    repairs: watch::Receiver<RepairLog>,
    drift_signal: Arc<DriftSignal>,
    senders: WakeSender,
    plans: mpsc::Sender<PlanRequest>,
    direct: watch::Sender<Arc<DirectPaths>>,
    running: Pin<Box<dyn Future<Output = ()>>>,
    _others: (WakeSender, watch::Sender<Result<(), NotProbed>>, watch::Sender<Arc<Leases>>),
    _folder: tempfile::TempDir,
}

fn config(folder: &std::path::Path) -> Config {
    let file = folder.join("agent.toml");
    let settings =
        format!("cni_conf_dir = \"{}\"\n[etcd]\nendpoints = [\"http://10.9.9.9:2379\"]\n", folder.display());
    fs::write(&file, settings).unwrap();
    Config::load(&Flags { config: Some(file), node: "n1".parse().ok(), ..Flags::default() }).unwrap()
}

impl Harness {
    fn new(fixture: Fixture) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let sysctls = folder.path().join("sys");
        fs::create_dir_all(sysctls.join("ipv4")).unwrap();
        let kernel = Fake::default();
        kernel.with(|state| state.sysctls.clone_from(&sysctls));
        let config = Arc::new(config(folder.path()));
        let (probed, is_open) = watch::channel(Err(NotProbed::NotYet));
        let (announced, is_there) = watch::channel(Err(NotWritten::NotYet));
        let readiness = Readiness::new(fixture.node_state(), is_open, is_there, watch::channel(None).1);
        let (repairs, repaired) = watch::channel(RepairLog::default());
        let (looked_at, leases) = watch::channel(Arc::<Leases>::default());
        let (direct, direct_paths) = watch::channel(Arc::default());
        let (drift_signal, (senders, sender_wake), (underlay_changed, underlay_wake)) =
            (Arc::<DriftSignal>::default(), wake_channel(), wake_channel());
        let (plans, plans_asked) = mpsc::channel(1);
        let task = Task {
            tools: Tools {
                config: Arc::clone(&config),
                features: Features::ALL,
                sysctls: Sysctls::at(sysctls).unwrap(),
                datapath: kernel.clone(),
                readiness: readiness.clone(),
                store_at: watch::channel(Some(Vec::new())).1,
                direct: direct_paths,
                leases,
                drift_signal: Arc::clone(&drift_signal),
                pods: Arc::default(),
                in_flight: Arc::default(),
                stale: Arc::default(),
            },
            entries: Entries {
                underlay: fixture.underlay.clone(),
                pass: fixture.pass.clone(),
                expected: watch::Sender::default(),
                repairs,
            },
            announcer: Announcer::new(config, readiness, announced),
            wakes: Wakes { underlay: underlay_wake, senders: sender_wake, plans: plans_asked },
        };
        Self {
            passes: fixture.pass.subscribe(),
            fixture,
            kernel,
            repairs: repaired,
            drift_signal,
            senders,
            plans,
            running: Box::pin(task.run()),
            direct,
            _others: (underlay_changed, probed, looked_at),
            _folder: folder,
        }
    }

    /// Lets the engine run until the last pass meets the condition.
    async fn until(&mut self, is_so: impl Fn(&Pass) -> bool) -> Arc<Pass> {
        let wanted = |pass: &Option<Arc<Pass>>| pass.as_deref().is_some_and(&is_so);
        tokio::select! {
            () = &mut self.running => panic!("the task ended"),
            pass = self.passes.wait_for(wanted) => Arc::clone(pass.unwrap().as_ref().unwrap()),
        }
    }

    /// Lets the engine run until a new pass has no changes to make.
    async fn settled(&mut self) -> Arc<Pass> {
        let before = self.count();
        let pass = self.until(|pass| pass.count > before && pass.made == Made::Yes && pass.writes == 0).await;
        self.pass(Duration::from_secs(1)).await;
        assert_eq!(self.count(), pass.count, "nothing has happened");
        pass
    }

    /// Lets the engine run for this time.
    async fn pass(&mut self, time: Duration) {
        tokio::select! {
            () = &mut self.running => panic!("the task ended"),
            () = sleep(time) => {}
        }
    }

    fn count(&self) -> u64 {
        self.passes.borrow().as_ref().map_or(0, |pass| pass.count)
    }
}

#[tokio::test(start_paused = true)]
async fn passes_repeat_until_nothing_is_left_to_change_and_then_each_signal_causes_one() {
    let mut harness = Harness::new(Fixture::new());
    assert!(harness.until(|pass| pass.count > 0).await.written > 0);
    let settled = harness.settled().await;
    assert!(harness.kernel.with(|state| !state.model.indexes.is_empty()));
    harness.senders.wake();
    harness.until(|pass| pass.count > settled.count).await;
    harness.pass(Duration::from_secs(1)).await;
    assert_eq!(harness.count(), settled.count + 1);
    // The same while the engine works.
    let senders = harness.senders.clone();
    harness.kernel.with(|state| state.at_read = Some(Box::new(move || senders.wake())));
    harness.senders.wake();
    harness.until(|pass| pass.count > settled.count + 1).await;
    harness.pass(Duration::from_secs(1)).await;
    assert_eq!(harness.count(), settled.count + 3);
    let started = Instant::now();
    harness.until(|pass| pass.count > settled.count + 3).await;
    assert!(started.elapsed() > Duration::from_secs(20), "nothing but the clock");
}

#[tokio::test(start_paused = true)]
async fn a_record_that_arrives_during_a_pass_is_applied_by_the_next_pass() {
    let fixture = Fixture::new();
    let view = fixture.view.clone();
    let mut harness = Harness::new(fixture);
    harness.kernel.with(|state| state.at_read = Some(Box::new(move || drop(with_peer(&view)))));
    let pass = harness.until(|pass| pass.count > 0).await;
    assert!(pass.writes > 0 && pass.paths.is_empty(), "it began before the record arrived");
    let next = harness.until(|next| next.count > pass.count).await;
    // The second pass applied it, and the third one had nothing left to change.
    assert_eq!((pass.count, next.count, next.writes, next.paths.len()), (1, 3, 0, 1));
}

#[tokio::test(start_paused = true)]
async fn a_record_that_is_withdrawn_during_its_pass_is_no_change_by_another_program() {
    let fixture = Fixture::new();
    let view = fixture.view.clone();
    let mut harness = Harness::new(fixture);
    let settled = harness.settled().await;
    let before = Arc::clone(&view.borrow());
    drop(with_peer(&view));
    harness.kernel.with(|state| state.at_read = Some(Box::new(move || drop(view.send_replace(before)))));
    harness.settled().await;
    let now = harness.passes.borrow().clone().unwrap();
    assert!(now.written > settled.written && now.paths.is_empty(), "routes were created and deleted");
    assert_eq!(harness.repairs.borrow().count, 0);
}

#[tokio::test(start_paused = true)]
async fn a_failed_pass_is_retried_ever_more_slowly_and_its_failures_disappear_with_a_success() {
    let mut harness = Harness::new(Fixture::new());
    harness.kernel.with(|state| state.is_unreadable = true);
    let failed = harness.until(|pass| pass.count == 1).await;
    assert_eq!(failed.made, Made::No);
    assert!(
        failed.local_failures[0].to_string().contains("cannot read kernel state"),
        "{:?}",
        failed.local_failures
    );
    let started = Instant::now();
    harness.until(|pass| pass.count == 2).await;
    let first = started.elapsed();
    harness.until(|pass| pass.count == 3).await;
    assert!(first >= RETRY && first < RETRY * 2 && started.elapsed() >= first + RETRY * 2);
    harness.kernel.with(|state| state.is_unreadable = false);
    let made = harness.settled().await;
    assert!(made.local_failures.is_empty() && made.other_failures.is_empty());
}

#[tokio::test(start_paused = true)]
async fn the_kernel_is_left_alone_until_the_node_is_known_to_be_itself() {
    let fixture = Fixture::new();
    fixture.registration.send_replace(Registration::Unproven(UnprovenReason::Started));
    let mut harness = Harness::new(fixture);
    harness.pass(Duration::from_secs(60)).await;
    assert_eq!(harness.kernel.with(|state| (state.snapshots, state.route_deletions > 0)), (0, true));
    let (reply, planned) = oneshot::channel();
    harness.plans.try_send(reply).unwrap();
    harness.pass(Duration::from_secs(1)).await;
    let reason = planned.await.unwrap().unwrap_err().to_string();
    assert!(reason.contains("left unchanged") && reason.contains("has just started"), "{reason}");
    harness.fixture.registration.send_replace(Registration::Registered);
    harness.settled().await;
}

#[tokio::test(start_paused = true)]
async fn a_foreign_change_is_shown_in_the_plan_and_repaired_after_the_drift_signal() {
    let mut harness = Harness::new(Fixture::new());
    harness.settled().await;
    let plan = async |harness: &mut Harness| {
        let (reply, planned) = oneshot::channel();
        harness.plans.try_send(reply).unwrap();
        tokio::select! {
            () = &mut harness.running => panic!("the task ended"),
            planned = planned => planned.unwrap().unwrap(),
        }
    };
    assert!(plan(&mut harness).await.is_empty());
    let lost = harness.kernel.with(|state| std::mem::take(&mut state.model));
    let planned = plan(&mut harness).await;
    assert!(
        !planned.is_empty() && harness.kernel.with(|state| state.model.indexes.is_empty()),
        "{planned:?}"
    );
    harness.drift_signal.wake(Some("process 7 (rm)".to_owned()));
    harness.settled().await;
    assert!(!lost.indexes.is_empty() && harness.kernel.with(|state| !state.model.indexes.is_empty()));
    let repairs = harness.repairs.borrow().clone();
    assert_eq!((repairs.count, repairs.last[0].by.as_slice()), (1, &["process 7 (rm)".to_owned()][..]));
}

/// A peer on the same link, with a block.
fn with_peer(view: &watch::Sender<Arc<View>>) -> (NodeName, Family) {
    let name: NodeName = "n2".parse().unwrap();
    view.send_modify(|view| {
        let mut with = View::clone(view);
        let own = &with.nodes[&"n1".parse::<NodeName>().unwrap()].record;
        let record = NodeRecord {
            incarnation: Incarnation::new("i2"),
            machine_id: MachineId::new("m2"),
            underlay: vec!["192.0.2.8".parse().unwrap()],
            gateways: vec!["10.244.9.1".parse().unwrap()],
            vtep_mac: Mac([4; 6]),
            ..NodeRecord::clone(own)
        };
        let claim = BlockRecord {
            node: name.clone(),
            incarnation: Incarnation::new("i2"),
            pool: "p".parse().unwrap(),
            nonce: Nonce::new("x"),
        };
        with.nodes.insert(name.clone(), Versioned { record: Arc::new(record), revision: Revision::new(8) });
        with.blocks.insert(
            Block::new("10.244.9.0/26".parse().unwrap()),
            Versioned { record: Arc::new(claim), revision: Revision::new(9) },
        );
        *view = Arc::new(with);
    });
    (name, Family::V4)
}

#[tokio::test(start_paused = true)]
async fn a_direct_path_that_drops_packets_is_replaced_by_the_tunnel_also_after_a_restart() {
    let fixture = Fixture::new();
    let key = with_peer(&fixture.view);
    let mut harness = Harness::new(fixture);
    let takes_tunnel = |pass: &Pass| matches!(pass.paths[&key].path, Path::Tunnel { .. });
    assert!(!takes_tunnel(&*harness.settled().await), "nothing is known against the direct path");
    let tell = |harness: &Harness, direct| {
        drop(harness.direct.send_replace(Arc::new([(key.clone(), direct)].into())));
    };
    tell(&harness, Direct::Drops);
    assert!(takes_tunnel(&*harness.settled().await));
    // A starting agent has no test results.
    let kernel = harness.kernel.with(|state| std::mem::take(&mut state.model));
    let mut next = Harness::new(harness.fixture);
    next.kernel.with(|state| state.model = kernel);
    assert!(takes_tunnel(&*next.settled().await));
    tell(&next, Direct::Carries);
    assert!(!takes_tunnel(&*next.settled().await));
}
