use std::sync::{Mutex, mpsc};

use polder_ipam::ids::ClusterId;

use polder_ipam::view::{Versioned, View};
use tokio::time::timeout;

use polder_netlink::nft::TableFamily;
use polder_netlink::nft::foreign::{BaseChain, ForeignRule, ForeignVerdict, Policy, RuleCondition};

use super::*;
use crate::underlay::NotChosen;
use polder_ipam::Revision;

fn context(attach: AttachMode) -> CheckContext {
    let silent_tunnels = BTreeSet::new();
    CheckContext {
        attach,
        neighbours: PerFamily::default(),
        silent_tunnels,
        failing_families: BTreeSet::new(),
        dropping_families: BTreeSet::new(),
        silent_peers: BTreeSet::new(),
        tunnel_port: 8472,
        uplinks: BTreeSet::new(),
        pod_traffic: PodTraffic::default(),
        without_bridge_calls: BTreeSet::new(),
    }
}

#[test]
fn a_host_without_disturbing_settings_has_no_problems() {
    let context = CheckContext { neighbours: PerFamily::new(100, 0), ..context(AttachMode::Bridge) };
    assert_eq!(problems(&ForeignState::default(), &[], &context), Vec::<String>::new());
}

#[test]
fn a_nearly_full_bridge_is_a_problem_only_in_attach_mode_bridge() {
    let foreign = ForeignState { bridge_ports: 1000, ..ForeignState::default() };
    assert_eq!(problems(&foreign, &[], &context(AttachMode::Bridge)).len(), 1);
    assert_eq!(problems(&foreign, &[], &context(AttachMode::Routed)), Vec::<String>::new());
}

#[test]
fn a_reverse_path_filter_is_a_problem_while_a_direct_path_drops_pod_packets() {
    let drop = ForeignRule {
        conditions: vec![RuleCondition::Family(Family::V6), RuleCondition::OtherReversePath],
        verdict: ForeignVerdict::Drop,
    };
    let (table, name) = ("firewalld".to_owned(), "filter_PREROUTING".to_owned());
    let chains = BTreeMap::from([(name.clone(), vec![drop])]);
    let base = BaseChain { family: TableFamily::Inet, table, name, policy: Policy::Accept };
    let routing_filters = vec![(BaseHook::Incoming, Filter { base, chains })];
    let foreign = ForeignState { routing_filters, ..ForeignState::default() };
    let judged = |family, result| DirectPaths::from([(("n2".parse().unwrap(), family), result)]);
    for (direct, count) in [
        (judged(Family::V6, Direct::Drops), 1),
        (judged(Family::V6, Direct::Carries), 0),
        (judged(Family::V4, Direct::Drops), 0),
    ] {
        let dropping_families = dropping_families(&direct);
        let context = CheckContext { dropping_families, ..context(AttachMode::Bridge) };
        assert_eq!(problems(&foreign, &[], &context).len(), count, "{direct:?}");
    }
}

/// A host with the state that the test sets.
#[derive(Debug, Clone, Default)]
struct Fake(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    pod_problems: Vec<String>,
    foreign: ForeignState,
    is_unreadable: bool,
    reads: usize,
}

impl Fake {
    fn with<T>(&self, action: impl FnOnce(&mut State) -> T) -> T {
        action(&mut self.0.lock().unwrap())
    }
}

impl HostAccess for Fake {
    async fn pod_problems(&mut self, _: &ClusterRecord) -> Vec<String> {
        self.with(|state| state.pod_problems.clone())
    }

    async fn attachments(&self) -> Vec<AttachmentEntry> {
        Vec::new()
    }

    async fn without_bridge_calls(&self) -> BTreeSet<Family> {
        BTreeSet::new()
    }

    async fn listeners(&self) -> Vec<Listener> {
        Vec::new()
    }

    async fn foreign_state(
        &self,
        _: Vec<(Cidr, u8)>,
        _: Option<String>,
        _: bool,
    ) -> Result<ForeignState, Error> {
        self.with(|state| {
            state.reads += 1;
            if state.is_unreadable {
                return Err(Error::Interrupted(1));
            }
            Ok(state.foreign.clone())
        })
    }

    async fn missing_settings(&self) -> Vec<MissingSetting> {
        Vec::new()
    }
}

fn cluster() -> View {
    let mut view = View::default();
    let record = ClusterRecord::new(ClusterId::new("c"));
    view.cluster = Some(Versioned { record: Arc::new(record), revision: Revision::new(1) });
    view
}

#[tokio::test(start_paused = true)]
async fn problems_are_published_until_resolved_and_kept_while_the_host_cannot_be_read() {
    let host = Fake::default();
    let (view_sender, view) = watch::channel(Arc::<View>::default());
    let (problem_sender, problems) = watch::channel(Vec::new());
    let task = Task {
        resync: CHECK_INTERVAL,
        host: host.clone(),
        records: Records::new(view),
        passes: Passes::new(watch::channel(Err(NotChosen::NotYet)).1, watch::channel(None).1),
        verdicts: watch::channel(Arc::default()).1,
        direct: watch::channel(Arc::default()).1,
        problems: problem_sender,
    };
    let mut running = Box::pin(task.run());
    let mut advance =
        async |time: Duration| assert!(timeout(time, &mut running).await.is_err(), "the task ended");
    advance(CHECK_INTERVAL * 2).await;
    assert_eq!(
        host.with(|state| state.reads),
        0,
        "the host is checked before the cluster settings are known"
    );
    view_sender.send_replace(Arc::new(cluster()));
    host.with(|state| {
        state.pod_problems.push("a pod has no route".to_owned());
        state.foreign.rp_filter_interface = Some("all".to_owned());
    });
    advance(CHECK_INTERVAL / 2).await;
    let found = problems.borrow().clone();
    assert_eq!(found.len(), 2, "{found:?}");
    assert!(found[0].contains("rp_filter") && found[1] == "a pod has no route", "{found:?}");
    host.with(|state| (state.is_unreadable, state.pod_problems) = (true, Vec::new()));
    advance(CHECK_INTERVAL).await;
    assert_eq!(*problems.borrow(), found);
    host.with(|state| state.is_unreadable = false);
    advance(CHECK_INTERVAL).await;
    assert_eq!(*problems.borrow(), found[..1]);
    host.with(|state| state.foreign.rp_filter_interface = None);
    advance(CHECK_INTERVAL).await;
    assert!(problems.borrow().is_empty());
    assert_eq!(host.with(|state| state.reads), 4);
}

#[test]
fn a_check_and_a_change_of_the_verdicts_do_not_deadlock() {
    let (verdicts, receiver) = watch::channel(Arc::default());
    let task = Task {
        resync: CHECK_INTERVAL,
        host: Fake::default(),
        records: Records::new(watch::channel(Arc::new(cluster())).1),
        passes: Passes::new(watch::channel(Err(NotChosen::NotYet)).1, watch::channel(None).1),
        verdicts: receiver,
        direct: watch::channel(Arc::default()).1,
        problems: watch::channel(Vec::new()).0,
    };
    let (done, ended) = mpsc::channel();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let record = ClusterRecord::new(ClusterId::new("c"));
        (0..20_000).for_each(|_| runtime.block_on(task.check(&record, Vec::new())));
        done.send(()).unwrap();
    });
    let deadline = std::time::Instant::now() + Duration::from_secs(60);
    // The prober publishes from another thread.
    let changes = std::thread::spawn(move || {
        while ended.try_recv().is_err() && std::time::Instant::now() < deadline {
            verdicts.send_modify(|_| ());
        }
        std::time::Instant::now() < deadline
    });
    while !changes.is_finished() && std::time::Instant::now() < deadline {
        std::thread::yield_now();
    }
    assert!(changes.is_finished() && changes.join().unwrap(), "the check and the prober deadlock");
}
