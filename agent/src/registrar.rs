//! Carries out what the node's steward decides ([`polder_ipam::steward`]): keeps the node known to the cluster, its
//! blocks claimed, and makes the first settings of a cluster that has none.
//!
//! Everything here is a transaction that rests on the records that led to it. What fails is looked at again when
//! the records change, and now and then.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use polder_api::{Attachment, Family, NodeName};
use polder_ipam::Pool;
use polder_ipam::ids::ClusterId;
use polder_ipam::key::{Key, Range};
use polder_ipam::ledger::{Identity, LedgerError, OwnedBlock, Standing};
use polder_ipam::pool::BlockRequest;
use polder_ipam::pools;
use polder_ipam::record::{ClusterRecord, PoolRecord, encode};
use polder_ipam::removal::Quarantine;
use polder_ipam::steward::{self, Double, Facts, Presence, Purpose, Step};
use polder_ipam::store::{Compare, LARGEST_TXN, Outcome, StoreError, Txn, Write};
use polder_ipam::view::{Settings, Source, View};
use polder_store::NodeIpam;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout};
use tracing::{info, warn};

use crate::agent::Agent;
use crate::board::{Holdings, Registration, set_if_changed};
use crate::config::Bootstrap;
use crate::kernel::Kernel;
use crate::kernel::desired::{pod_mtu, vtep_mac};
use crate::machine::{MachineError, now, random_name};
use crate::requests::{ClaimRequest, ReserveRequest};
use crate::teardown;

pub use claims::could_claim;

mod claims;
mod reservations;

/// Between looks while something is waited for that no record announces.
const RETRY: Duration = Duration::from_secs(5);

/// How long the own view of the records may be behind what was just written.
const CATCH_UP: Duration = Duration::from_secs(5);

/// Steps in a row before others get a turn.
const STEPS: usize = 64;

/// How long nothing is claimed after the store has lost records: their owners are putting them back.
const CAUTION: Duration = Duration::from_secs(60);

/// Why a step was not carried out: it is tried again.
#[derive(Debug)]
struct Waiting(String);

impl<E: std::error::Error> From<E> for Waiting {
    fn from(error: E) -> Self {
        Self(error.to_string())
    }
}

/// Runs for ever.
pub async fn run(
    agent: Arc<Agent>,
    mut claims: mpsc::Receiver<ClaimRequest>,
    mut reservations: mpsc::Receiver<ReserveRequest>,
) {
    let mut view = agent.board.view.subscribe();
    let mut underlay = agent.board.underlay.subscribe();
    let quarantine = Quarantine::new(agent.config.cooldown);
    let mut registrar = Registrar {
        agent,
        quarantine,
        double: Double::Unasked,
        is_proven: false,
        losses: 0,
        caution_until: None,
    };
    loop {
        view.mark_unchanged();
        underlay.mark_unchanged();
        let registration = match registrar.round().await {
            Ok(registration) => registration,
            Err(Waiting(why)) if registrar.is_proven => Registration::Waiting(why),
            Err(Waiting(why)) => registrar.agent.board.registration.borrow().stalled(why),
        };
        registrar.publish(registration);
        // Cancel-safe, all of them: what is not taken is seen the next time.
        tokio::select! {
            _ = view.changed() => {}
            _ = underlay.changed() => {}
            () = registrar.agent.holdings_changed.notified() => {}
            request = claims.recv() => {
                let Some(request) = request else { return };
                registrar.serve(request).await;
                while let Ok(request) = claims.try_recv() {
                    registrar.serve(request).await;
                }
            }
            request = reservations.recv() => {
                let Some(request) = request else { return };
                registrar.reserve(request).await;
            }
            () = sleep(RETRY) => {}
        }
    }
}

struct Registrar {
    agent: Arc<Agent>,
    /// The removed nodes whose blocks rest.
    quarantine: Quarantine,
    /// Whether somebody else lives under this node's name.
    double: Double,
    /// Whether this round has proven that this machine is the node.
    is_proven: bool,
    /// Losses of the store that are known.
    losses: u64,
    /// Until when nothing is claimed.
    caution_until: Option<Instant>,
}

impl Registrar {
    /// Does what there is to do, step by step.
    async fn round(&mut self) -> Result<Registration, Waiting> {
        let mut unclaimable = BTreeMap::new();
        self.double = Double::Unasked;
        self.is_proven = false;
        for _ in 0..STEPS {
            let step = self.next_step(&unclaimable).await?;
            self.is_proven |= step.rests_on_identity();
            match step {
                Step::Settled => return Ok(Registration::Registered),
                // Before any record was read, the node may be another machine's.
                Step::Wait(reason) if self.agent.board.view().source == Source::Nowhere => {
                    return Ok(Registration::Unproven(reason));
                }
                Step::Wait(reason) => return Ok(Registration::Waiting(reason)),
                Step::Conflict(reason) => return Ok(Registration::Conflict(reason)),
                Step::Removed(reason) => {
                    self.remove_gateways().await?;
                    return Ok(Registration::Removed(reason));
                }
                Step::Claim(BlockRequest::Any(family, pool)) => {
                    if let Err(error) = self.claim(BlockRequest::Any(family, pool)).await {
                        unclaimable.insert(family, error.to_string());
                    }
                }
                step @ Step::Identify(_) => {
                    if let Err(Waiting(why)) = self.carry_out(step).await {
                        return Ok(Registration::Unproven(format!(
                            "who this node is cannot be written down: {why}"
                        )));
                    }
                }
                Step::AskForDouble => {
                    if let Err(error) = self.look_for_double().await {
                        return Ok(Registration::Unproven(format!(
                            "whether another machine is node {} cannot be asked: {error}",
                            self.agent.config.node
                        )));
                    }
                }
                step => self.carry_out(step).await?,
            }
        }
        Ok(Registration::Waiting("there is more to do".to_owned()))
    }

    async fn next_step(&mut self, unclaimable: &BTreeMap<Family, String>) -> Result<Step, Waiting> {
        let agent = &self.agent;
        let view = agent.board.view();
        if view.losses != self.losses {
            self.losses = view.losses;
            self.caution_until = Some(Instant::now() + CAUTION);
        }
        self.quarantine.observe(&view, now());
        let pools: Vec<Pool> = view.pools.values().map(|pool| (*pool.record).clone()).collect();
        let labels = agent.config.labels.clone();
        let own = agent
            .ipam
            .run(move |ipam| ipam.learn_pools(&pools, &labels).and_then(|()| ipam.own(now())))
            .await?;
        self.announce(own.identity.clone(), &own.blocks, &own.gateways);
        Ok(steward::next(&Facts {
            me: &agent.config.node,
            life: agent.machine.life(),
            proof: agent.config.identity,
            adopted: agent.board.adopted.borrow().as_ref(),
            labels: &agent.config.labels,
            view: &view,
            own: &own,
            presence: &self.presence(&view),
            double: self.double.clone(),
            caution: self.is_cautious(),
            quarantine: &self.quarantine,
            unclaimable,
            fresh: &random_name()?,
            now: now(),
        }))
    }

    fn is_cautious(&self) -> bool {
        self.caution_until.is_some_and(|until| Instant::now() < until)
    }

    /// How this node is reached.
    fn presence(&self, view: &View) -> Result<Presence, String> {
        let (node, config) = (&self.agent.config.node, &self.agent.config);
        let underlay = self.agent.board.underlay()?;
        let Some(cluster) = &view.cluster else { return Err("the cluster has no settings yet".to_owned()) };
        if view.own != underlay.addresses() {
            return Err("the node's own addresses have just changed".to_owned());
        }
        Ok(Presence {
            underlay: underlay.addresses(),
            vtep_mac: vtep_mac(&cluster.record, node),
            mtu: pod_mtu(&underlay, cluster.record.backend, config.mtu).ok_or("the underlay has no MTU")?,
            version: env!("CARGO_PKG_VERSION").to_owned(),
        })
    }

    async fn carry_out(&mut self, step: Step) -> Result<(), Waiting> {
        let ipam = &self.agent.ipam;
        match step {
            Step::Bootstrap => self.bootstrap(&self.agent.board.view()).await?,
            Step::Identify(identity) => {
                if identity.standing == Standing::Removed {
                    warn!(node = %identity.node, "this node was removed from the cluster");
                }
                ipam.run(move |ipam| ipam.identify(&identity)).await?;
            }
            Step::CutOff => {
                if !matches!(&*self.agent.board.registration.borrow(), Registration::Removed(_)) {
                    let reason =
                        "the pods on this machine are being cut off, for its node was removed".to_owned();
                    self.publish(Registration::Removed(reason));
                }
                self.cut_off().await?;
            }
            Step::Commit(purpose, txn) => {
                if purpose == Purpose::ConfirmRemoval {
                    // Again, because a pass that had begun before the removal was known can have put them back.
                    self.remove_gateways().await?;
                }
                if purpose == Purpose::TakeOver {
                    warn!(
                        "taking the place of another machine: unused addresses rest first, for its pods may have had them"
                    );
                    ipam.run(|ipam| ipam.rest_unused(now())).await?;
                }
                self.commit_step(purpose, &txn).await?;
            }
            Step::Own(owned) => {
                info!(block = %owned.block, "taking over a block that the store says is ours");
                self.adopt_block(owned).await?;
            }
            Step::Leave(blocks) => {
                let leave = move |ipam: &mut NodeIpam| {
                    blocks.into_iter().try_for_each(|block| {
                        if ipam.leave(block, now())? {
                            info!(%block, "giving back a block that is not needed");
                        }
                        Ok::<_, LedgerError>(())
                    })
                };
                ipam.run(leave).await?;
            }
            Step::Disown(blocks) => {
                let disown =
                    move |ipam: &mut NodeIpam| blocks.into_iter().try_for_each(|block| ipam.disown(block));
                ipam.run(disown).await?;
            }
            Step::TakeGateways => drop(ipam.run(|ipam| ipam.take_gateways(now())).await?),
            Step::MoveGateway(old) => {
                info!(%old, "the node takes another address for its own");
                ipam.run(move |ipam| ipam.move_gateway(old, now())).await?;
            }
            Step::Settled
            | Step::Wait(_)
            | Step::Conflict(_)
            | Step::Removed(_)
            | Step::AskForDouble
            | Step::Claim(_) => {}
        }
        Ok(())
    }

    async fn commit_step(&self, purpose: Purpose, txn: &Txn) -> Result<(), Waiting> {
        match self.agent.store.commit(txn).await? {
            Outcome::Applied { revision } => {
                match purpose {
                    Purpose::Inherit(node) => {
                        info!(%node, "gave back what a removed node had");
                        self.forget_addresses(&node).await?;
                    }
                    Purpose::PoolAgain(name) => {
                        warn!(%name, "a pool that this node has addresses of was gone from the store");
                    }
                    Purpose::ClaimAgain(block) => {
                        warn!(%block, "the claim of a block that this node uses was gone from the store");
                    }
                    Purpose::ReserveAgain(address) => {
                        warn!(%address, "the reservation of an address that is in use here was gone from the store");
                    }
                    Purpose::ConfirmRemoval => info!("confirmed that the pods of this node are gone"),
                    _ => info!(?purpose, "written"),
                }
                self.caught_up(revision).await?;
                Ok(())
            }
            Outcome::Refused => Err(Waiting("the records have just changed".to_owned())),
        }
    }

    /// Looks whether somebody holds the lease of this node's name who is another machine, or was booted as another.
    /// Until that is known, this node must not serve.
    async fn look_for_double(&mut self) -> Result<(), StoreError> {
        let node = &self.agent.config.node;
        if self.agent.board.registration.borrow().forbids().is_none() {
            self.publish(Registration::Unproven(format!("asking whether another machine is node {node}")));
        }
        let key = Key::Alive(node.clone()).to_string();
        let found = self.agent.store.range(&Range::single(key)).await?;
        self.double = Double::read(found.entries.first(), self.agent.machine.life());
        Ok(())
    }

    /// Takes away all pods of this node, and forgets what it owned.
    async fn cut_off(&self) -> Result<(), Waiting> {
        let attachments: Vec<Attachment> = self
            .agent
            .ipam
            .run(|ipam| ipam.attachments().chain(ipam.probe()).map(|held| held.attachment.clone()).collect())
            .await;
        for attachment in attachments {
            warn!(%attachment, "cutting it off: this node was removed");
            teardown::del(&self.agent, &attachment).await.map_err(|refusal| Waiting(refusal.message))?;
        }
        self.remove_gateways().await?;
        let identity = self.agent.ipam.run(|ipam| ipam.identity()).await?;
        self.agent.ipam.run(NodeIpam::forget_all).await?;
        let node = identity.map_or_else(|| self.agent.config.node.clone(), |identity| identity.node);
        self.forget_addresses(&node).await
    }

    /// Deletes the node's own addresses from the kernel: an agent that starts without this ledger would take them for its own.
    /// No pass does that, for none looks at the kernel of a node that was removed.
    async fn remove_gateways(&self) -> Result<(), Waiting> {
        Ok(self.agent.kernel.run(Kernel::remove_gateways).await?)
    }

    /// Deletes what the store says of the addresses of a removed node, unless there is another of its name by now: that
    /// one looks after them itself.
    async fn forget_addresses(&self, node: &NodeName) -> Result<(), Waiting> {
        let contents = self.agent.store.range(&Key::addresses_of(node)).await?;
        for entries in contents.entries.chunks(LARGEST_TXN) {
            let deletes = entries.iter().map(|entry| Write::Delete { key: entry.key.clone() });
            let compares = vec![Compare::absent(&Key::Node(node.clone()))];
            self.agent.store.commit(&Txn { compares, writes: deletes.collect() }).await?;
        }
        Ok(())
    }

    /// Writes the settings of a cluster that has none: those that it had, if the store has lost them, or the first
    /// ones of the configuration.
    async fn bootstrap(&self, view: &View) -> Result<(), Waiting> {
        if view.source != Source::Store {
            return Err(Waiting("the cluster's settings are not known".to_owned()));
        }
        if let Some(reason) = view.refused.get(&Key::Cluster.to_string()) {
            return Err(Waiting(format!("record {} is refused: {reason}", Key::Cluster)));
        }
        let identity = self.agent.ipam.run(|ipam| ipam.identity()).await?;
        let is_ours =
            |lost: &&Settings| identity.as_ref().is_some_and(|identity| identity.cluster == lost.cluster.id);
        let (record, pools) = match (view.remembered.as_ref().filter(is_ours), &self.agent.config.bootstrap) {
            (Some(lost), _) => {
                warn!(id = %lost.cluster.id, "the store has lost the cluster's settings: putting them back");
                let pools = lost.pools.iter().map(|pool| (**pool).clone()).collect();
                ((*lost.cluster).clone(), pools)
            }
            (None, Some(bootstrap)) => {
                self.check_first_pools(view, &bootstrap.pools)?;
                (first_settings(bootstrap, identity)?, bootstrap.pools.clone())
            }
            (None, None) => {
                return Err(Waiting(
                    "the cluster has no settings yet, and the configuration has no [bootstrap] to make them from"
                        .to_owned(),
                ));
            }
        };
        let mut txn = Txn {
            compares: vec![Compare::absent(&Key::Cluster)],
            writes: vec![put(&Key::Cluster, encode(&record))],
        };
        // Pools that somebody has made already are the cluster's pools.
        if view.every_pool().next().is_none() {
            txn.compares.push(Compare::Empty(Key::all_pools()));
            let pools: Vec<Pool> = pools;
            txn.writes.extend(
                pools.iter().map(|pool| put(&Key::Pool(pool.name.clone()), encode(&PoolRecord::from(pool)))),
            );
        }
        match self.agent.store.commit(&txn).await? {
            Outcome::Applied { revision } => {
                info!(id = %record.id, "made the cluster's settings");
                self.caught_up(revision).await?;
            }
            Outcome::Refused => return Err(Waiting("another node makes the cluster's settings".to_owned())),
        }
        Ok(())
    }

    /// Whether the first pools can be made, as far as this node knows what is in use around it. Those that somebody has
    /// made already are the cluster's instead.
    fn check_first_pools(&self, view: &View, first: &[Pool]) -> Result<(), Waiting> {
        let underlay = self.agent.board.underlay().map_err(Waiting)?;
        if view.own != underlay.addresses() || view.needed != underlay.needed {
            return Err(Waiting("this node's own addresses are being read".to_owned()));
        }
        if view.every_pool().next().is_some() {
            return Ok(());
        }
        let refused = first.iter().find_map(|pool| pools::check_range(view, pool).err());
        refused
            .map_or(Ok(()), |reason| Err(Waiting(format!("bootstrap.pools in the configuration: {reason}"))))
    }

    async fn adopt_block(&self, owned: OwnedBlock) -> Result<(), LedgerError> {
        let view = self.agent.board.view();
        let Some(pool) = view.pools.get(&owned.pool) else { return Ok(()) };
        let pool = (*pool.record).clone();
        self.agent.ipam.run(move |ipam| ipam.adopt_block(owned, &pool, now())).await
    }

    /// Waits until the view shows what was written at that revision.
    async fn caught_up(&self, revision: i64) -> Result<Arc<View>, StoreError> {
        let mut views = self.agent.board.view.subscribe();
        let seen = timeout(CATCH_UP, views.wait_for(|view| view.revision >= revision)).await;
        match seen {
            Ok(Ok(view)) => Ok(Arc::clone(&view)),
            _ => Err(StoreError::NoAnswer {
                store: self.agent.store.name(),
                reason: format!("what was written is not seen within {} s", CATCH_UP.as_secs()),
            }),
        }
    }

    /// Tells the others what the node owns.
    fn announce(&self, identity: Option<Identity>, blocks: &[OwnedBlock], gateways: &[std::net::IpAddr]) {
        let blocks = blocks.to_vec();
        let holdings = Holdings { identity, blocks, gateways: gateways.to_vec() };
        set_if_changed(&self.agent.board.holdings, Arc::new(holdings));
    }

    fn publish(&self, registration: Registration) {
        if !set_if_changed(&self.agent.board.registration, registration.clone()) {
            return;
        }
        match registration {
            Registration::Registered => info!("this node is registered"),
            Registration::Waiting(reason) | Registration::Unproven(reason) => info!("waiting: {reason}"),
            Registration::Conflict(reason) | Registration::Removed(reason) => {
                warn!("not serving: {reason}");
            }
        }
    }
}

fn first_settings(bootstrap: &Bootstrap, identity: Option<Identity>) -> Result<ClusterRecord, MachineError> {
    Ok(ClusterRecord {
        // A node that has been in a cluster is still in it.
        id: identity.map_or_else(|| random_name().map(ClusterId), |identity| Ok(identity.cluster))?,
        backend: bootstrap.backend,
        attach: bootstrap.attach,
        vxlan: bootstrap.vxlan,
        masquerade: bootstrap.masquerade.clone(),
    })
}

fn put(key: &Key, value: Vec<u8>) -> Write {
    Write::Put { key: key.to_string(), value }
}
