//! What the agent's tasks tell each other: the latest value of each entry. An entry has one writer, the task that its sender was
//! moved into; any number of tasks have receivers, bundled here by who writes them.

use std::collections::{BTreeMap, BTreeSet};
use std::error::Error;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use polder_api::PerFamily;
use polder_api::message::{Refusal, RefusalKind};
use polder_ipam::Revision;
use polder_ipam::peers::Problem;
use polder_ipam::publication::Basis;
use polder_ipam::registration::{Holdings, Registration};
use polder_ipam::tasks::Me;
use polder_ipam::view::{Source, View};
use polder_ipam::{publication, readiness};
use tokio::sync::watch;

use crate::kernel::desired::Reached;
use crate::probe::schedule::Key;
use crate::underlay::{NotChosen, Underlay};

/// The node's addresses on the underlay, or why there are none.
pub type Chosen = Result<Arc<Underlay>, NotChosen>;

/// The cluster's records, as the follower knows them.
#[derive(Debug, Clone)]
pub struct Records(watch::Receiver<Arc<View>>);

impl Records {
    /// What the follower writes is read from there.
    pub fn new(view: watch::Receiver<Arc<View>>) -> Self {
        Self(view)
    }

    /// The cluster as it is known now.
    pub fn view(&self) -> Arc<View> {
        Arc::clone(&self.0.borrow())
    }

    /// What comes from now on.
    pub fn changes(&self) -> watch::Receiver<Arc<View>> {
        from_now_on(&self.0)
    }

    /// The records of the cluster, for an operator who asks for them; refused as long as none were read.
    pub fn read(&self) -> Result<Arc<View>, Refusal> {
        let view = self.view();
        if view.source != Source::Nowhere {
            return Ok(view);
        }
        let why = view.lost.clone().unwrap_or_else(|| "they are being read".to_owned());
        Err(Refusal::new(
            RefusalKind::TryAgain,
            format!("the records of the cluster are not known yet: {why}"),
        ))
    }
}

/// Which node this is, and what the cluster has given it, as the registrar knows it.
#[derive(Debug, Clone)]
pub struct Membership {
    me: Arc<Me>,
    registration: watch::Receiver<Registration>,
    holdings: watch::Receiver<Arc<Holdings>>,
}

impl Membership {
    /// What the registrar of that node writes is read from there.
    pub fn new(
        me: Me,
        registration: watch::Receiver<Registration>,
        holdings: watch::Receiver<Arc<Holdings>>,
    ) -> Self {
        Self { me: Arc::new(me), registration, holdings }
    }

    /// Who the node is.
    pub fn me(&self) -> &Me {
        &self.me
    }

    /// Whether the store knows the node.
    pub fn registration(&self) -> Registration {
        self.registration.borrow().clone()
    }

    /// Its registrations from now on.
    pub fn registrations(&self) -> watch::Receiver<Registration> {
        from_now_on(&self.registration)
    }

    /// What the node owns.
    pub fn holdings(&self) -> Arc<Holdings> {
        Arc::clone(&self.holdings.borrow())
    }

    /// What it owns from now on.
    pub fn changes(&self) -> watch::Receiver<Arc<Holdings>> {
        from_now_on(&self.holdings)
    }

    /// The revision of the node's own record in the store; 0 if it is not there, or not this node's.
    pub fn own_revision(&self, view: &View) -> Option<Revision> {
        publication::own_revision(view, &self.me.name, self.holdings().identity.as_ref(), self.me.life())
    }
}

/// The node's kernel, as the engine knows it.
#[derive(Debug, Clone)]
pub struct Passes {
    underlay: watch::Receiver<Chosen>,
    pass: watch::Receiver<Option<Arc<Pass>>>,
}

impl Passes {
    /// What the engine writes is read from there.
    pub fn new(underlay: watch::Receiver<Chosen>, pass: watch::Receiver<Option<Arc<Pass>>>) -> Self {
        Self { underlay, pass }
    }

    /// The node's addresses on the underlay, or why there are none.
    pub fn underlay(&self) -> Chosen {
        self.underlay.borrow().clone()
    }

    /// Those addresses from now on.
    pub fn underlays(&self) -> watch::Receiver<Chosen> {
        from_now_on(&self.underlay)
    }

    /// The last pass over the kernel.
    pub fn last(&self) -> Option<Arc<Pass>> {
        self.pass.borrow().clone()
    }

    /// The passes from now on.
    pub fn changes(&self) -> watch::Receiver<Option<Arc<Pass>>> {
        from_now_on(&self.pass)
    }
}

fn from_now_on<T>(entry: &watch::Receiver<T>) -> watch::Receiver<T> {
    let mut entry = entry.clone();
    entry.mark_unchanged();
    entry
}

/// Whether a pass came to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Made {
    /// It did.
    #[default]
    Yes,
    /// It did not: what it says was found by an earlier one.
    No,
}

/// A pass over the kernel.
#[derive(Debug, Clone, Default)]
pub struct Pass {
    /// Whether it came to its end.
    pub made: Made,
    /// Its number; the first is 1.
    pub count: u64,
    /// Changes that it made.
    pub writes: usize,
    /// Changes that all passes made so far.
    pub written: u64,
    /// How long it took.
    pub took: Duration,
    /// What it could not do of what the node needs to serve its pods.
    pub local_failures: Vec<String>,
    /// What else it could not do.
    pub other_failures: Vec<String>,
    /// The node's own addresses that are in place.
    pub gateways: Vec<IpAddr>,
    /// The MTU of pods, in bytes.
    pub mtu: u32,
    /// Records that were not applied.
    pub problems: Vec<Problem>,
    /// How each peer's blocks of each family are reached.
    pub paths: BTreeMap<Key, Reached>,
    /// Neighbours on the underlay through which peers are reached, by family.
    pub next_hops: PerFamily<usize>,
    /// The interfaces of others through which pods' packets come in.
    pub carriers: BTreeSet<String>,
}

/// Makes the value the entry's, and wakes those who wait for it, if it is another one; whether it is.
pub fn set_if_changed<T: PartialEq>(entry: &watch::Sender<T>, value: T) -> bool {
    entry.send_if_modified(|known| {
        let changed = *known != value;
        if changed {
            *known = value;
        }
        changed
    })
}

/// What the node is judged by when it is asked to serve a pod.
#[derive(Debug, Clone)]
pub struct Board {
    /// The cluster's records.
    pub records: Records,
    /// Which node this is, and what it has.
    pub membership: Membership,
    /// Its kernel.
    pub passes: Passes,
}

impl Board {
    /// The cluster as it is known now.
    pub fn view(&self) -> Arc<View> {
        self.records.view()
    }

    /// Whether the store knows the node.
    pub fn registration(&self) -> Registration {
        self.membership.registration()
    }

    /// What the node owns.
    pub fn holdings(&self) -> Arc<Holdings> {
        self.membership.holdings()
    }

    /// The node's addresses on the underlay, or why there are none.
    pub fn underlay(&self) -> Chosen {
        self.passes.underlay()
    }

    /// The last pass over the kernel.
    pub fn pass(&self) -> Option<Arc<Pass>> {
        self.passes.last()
    }

    /// What the node may say of itself in the store rests on this now.
    pub fn basis(&self) -> Basis {
        let (view, holdings, me) = (self.view(), self.holdings(), self.membership.me());
        Basis::of(&view, &me.name, holdings.identity.as_ref(), me.life())
    }

    /// Why an ADD would not be served. Empty if it would. ADD and STATUS both ask this.
    pub fn obstacles(&self) -> Vec<String> {
        let (view, holdings, pass) = (self.view(), self.holdings(), self.pass().unwrap_or_default());
        let (registration, underlay) = (self.registration(), self.underlay());
        readiness::obstacles(&readiness::Facts {
            view: &view,
            registration: &registration,
            holdings: &holdings,
            underlay: underlay.as_ref().map(|_| ()).map_err(|error| error as &(dyn Error + 'static)),
            gateways: &pass.gateways,
            mtu: pass.mtu,
            failures: &pass.local_failures,
        })
    }
}
