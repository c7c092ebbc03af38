//! Keeps the node known to the cluster: its record, the claims of its blocks, and the first settings of a cluster
//! that has none.
//!
//! Everything here is a transaction that rests on the records that led to it. What fails is looked at again when
//! the records change, and now and then.

use std::sync::Arc;
use std::time::Duration;

use polder_ipam::claim::{Claim, Grounds};
use polder_ipam::key::Key;
use polder_ipam::ledger::{Identity, LedgerError, OwnedBlock, Standing};
use polder_ipam::record::{
    BlockRecord, ClusterId, ClusterRecord, Incarnation, NodeRecord, PoolRecord, encode,
};
use polder_ipam::store::{Compare, Outcome, StoreError, Txn, Write};
use polder_ipam::{Block, Pool};
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};
use tracing::{info, warn};

use crate::agent::Agent;
use crate::board::{Holdings, Registration};
use crate::config::Bootstrap;
use crate::kernel::desired::{pod_mtu, vtep_mac};
use crate::machine::{MachineError, now, random_name};
use polder_ipam::peers::believe;
use polder_ipam::view::{Known, Settings, Source, View};

pub use claims::{ClaimError, ClaimRequest, LOW_WATER, Wanted, could_claim};

mod claims;

/// Between looks while something is waited for that no record announces.
const RETRY: Duration = Duration::from_secs(5);

/// How long the own view of the records may be behind what was just written.
const CATCH_UP: Duration = Duration::from_secs(5);

/// Why the node is not registered.
#[derive(Debug)]
enum Halt {
    Waiting(String),
    Conflict(String),
}

impl<E: std::error::Error> From<E> for Halt {
    fn from(error: E) -> Self {
        Self::Waiting(error.to_string())
    }
}

/// Runs for ever.
pub async fn run(agent: Arc<Agent>, mut requests: mpsc::Receiver<ClaimRequest>) {
    let mut view = agent.board.view.subscribe();
    let mut underlay = agent.board.underlay.subscribe();
    let registrar = Registrar { agent };
    loop {
        view.mark_unchanged();
        underlay.mark_unchanged();
        let registration = match registrar.register().await {
            Ok(()) => Registration::Registered,
            Err(Halt::Waiting(reason)) => Registration::Waiting(reason),
            Err(Halt::Conflict(reason)) => Registration::Conflict(reason),
        };
        registrar.publish(registration);
        // Cancel-safe, all of them: what is not taken is seen the next time.
        tokio::select! {
            _ = view.changed() => {}
            _ = underlay.changed() => {}
            request = requests.recv() => {
                let Some(request) = request else { return };
                registrar.serve(request).await;
                while let Ok(request) = requests.try_recv() {
                    registrar.serve(request).await;
                }
            }
            () = sleep(RETRY) => {}
        }
    }
}

struct Registrar {
    agent: Arc<Agent>,
}

impl Registrar {
    /// Brings everything about this node into the store, as far as it goes now.
    async fn register(&self) -> Result<(), Halt> {
        let view = self.agent.board.view();
        if view.source == Source::Nowhere {
            let reason = view.lost.clone().unwrap_or_else(|| "the records are being read".to_owned());
            return Err(Halt::Waiting(reason));
        }
        let cluster = match &view.cluster {
            Some(cluster) => Arc::clone(&cluster.record),
            None => return self.bootstrap(&view).await,
        };
        self.learn_pools(&view).await?;
        let identity = self.identify(&view, &cluster).await?;
        self.announce_holdings(Some(&identity)).await;
        if view.source == Source::Snapshot {
            let store = self.agent.store.name();
            return Err(Halt::Waiting(format!("{store} is away, going by what was written down")));
        }
        let view = self.write_node_record(view, &cluster, &identity).await?;
        let reconciled = self.reconcile_blocks(&view, &identity).await;
        self.announce_holdings(Some(&identity)).await;
        reconciled?;
        let claimed = self.first_blocks(&view).await;
        if self.agent.ipam.run(|ipam| ipam.take_gateways(now())).await? {
            self.announce_holdings(Some(&identity)).await;
            self.write_node_record(self.agent.board.view(), &cluster, &identity).await?;
        }
        Ok(claimed?)
    }

    /// Writes the settings of a cluster that has none: those that it had, if the store has lost them, or the first
    /// ones of the configuration.
    async fn bootstrap(&self, view: &View) -> Result<(), Halt> {
        if view.source != Source::Store {
            return Err(Halt::Waiting("the cluster's settings are not known".to_owned()));
        }
        if let Some(reason) = view.refused.get(&Key::Cluster.to_string()) {
            return Err(Halt::Waiting(format!("record {} is refused: {reason}", Key::Cluster)));
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
            (None, Some(bootstrap)) => (first_settings(bootstrap, identity)?, bootstrap.pools.clone()),
            (None, None) => {
                return Err(Halt::Waiting(
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
        if view.pools.is_empty() {
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
            Outcome::Refused => info!("another node makes the cluster's settings"),
        }
        Err(Halt::Waiting("the cluster's settings are being made".to_owned()))
    }

    async fn learn_pools(&self, view: &View) -> Result<(), LedgerError> {
        let pools: Vec<Pool> = view.pools.values().map(|pool| (*pool.record).clone()).collect();
        self.agent.ipam.run(move |ipam| ipam.learn_pools(&pools)).await
    }

    /// Who this node is: what its ledger says, or what it now becomes.
    async fn identify(&self, view: &View, cluster: &ClusterRecord) -> Result<Identity, Halt> {
        let me = &self.agent.config.node;
        let registered = view.nodes.get(me);
        if let Some(other) = registered.filter(|node| node.record.machine_id != self.agent.machine.machine_id)
        {
            return Err(Halt::Conflict(format!(
                "node {me} is registered by another machine (machine id {}): give this one another name with \
                 --node, or remove the old node's record",
                other.record.machine_id
            )));
        }
        if let Some(identity) = self.agent.ipam.run(|ipam| ipam.identity()).await? {
            return check_identity(identity, view, cluster, me, &self.agent.config.state_dir);
        }
        let incarnation = match registered {
            Some(node) => node.record.incarnation.clone(),
            None => Incarnation(random_name()?),
        };
        let identity = Identity {
            node: me.clone(),
            incarnation,
            cluster: cluster.id.clone(),
            standing: Standing::Member,
        };
        let write = identity.clone();
        self.agent.ipam.run(move |ipam| ipam.identify(&write)).await?;
        Ok(identity)
    }

    /// Writes the node's record if it is not as it should be. Returns a view in which it is.
    async fn write_node_record(
        &self,
        view: Arc<View>,
        cluster: &ClusterRecord,
        identity: &Identity,
    ) -> Result<Arc<View>, Halt> {
        let underlay = self.agent.board.underlay().map_err(Halt::Waiting)?;
        if view.own != underlay.addresses() {
            return Err(Halt::Waiting("the node's own addresses have just changed".to_owned()));
        }
        let mtu = pod_mtu(&underlay, cluster.backend, self.agent.config.mtu);
        let record = NodeRecord {
            incarnation: identity.incarnation.clone(),
            machine_id: self.agent.machine.machine_id.clone(),
            boot_id: self.agent.machine.boot_id.clone(),
            underlay: underlay.addresses(),
            gateways: self.agent.ipam.run(|ipam| ipam.gateways().to_vec()).await,
            vtep_mac: vtep_mac(cluster, &identity.node),
            mtu: mtu.ok_or_else(|| Halt::Waiting("the underlay has no MTU".to_owned()))?,
            version: env!("CARGO_PKG_VERSION").to_owned(),
        };
        let known = view.nodes.get(&identity.node);
        if known.is_some_and(|known| *known.record == record) {
            return Ok(view);
        }
        let key = Key::Node(identity.node.clone()).to_string();
        let revision = known.map_or(0, |known| known.revision);
        let txn = Txn {
            compares: vec![Compare::Unchanged { key: key.clone(), revision }],
            writes: vec![Write::Put { key, value: encode(&record) }],
        };
        match self.agent.store.commit(&txn).await? {
            Outcome::Applied { revision } => {
                info!(underlay = ?record.underlay, gateways = ?record.gateways, "registered");
                Ok(self.caught_up(revision).await?)
            }
            Outcome::Refused => Err(Halt::Waiting("the node's record has just changed".to_owned())),
        }
    }

    /// Takes over what the store says is ours, and puts back what the ledger says is.
    async fn reconcile_blocks(&self, view: &View, identity: &Identity) -> Result<(), Halt> {
        let owned = self.agent.ipam.run(|ipam| ipam.blocks().to_vec()).await;
        let ours =
            |claim: &BlockRecord| claim.node == identity.node && claim.incarnation == identity.incarnation;
        for block in believe(view, &identity.node).own_blocks {
            if !owned.iter().any(|owned| owned.block == block) {
                // A claim whose outcome was never known, or one that the ledger has lost.
                info!(%block, "taking over a block that the store says is ours");
                self.add_block(view, block, &view.blocks[&block].record).await?;
            }
        }
        let foreign = |owned: &OwnedBlock| {
            let mut overlapping = view
                .blocks
                .iter()
                .filter(|(block, known)| block.cidr().overlaps(owned.block.cidr()) && !ours(&known.record));
            overlapping.next().map(|(block, known)| (owned.block, *block, known.record.node.clone()))
        };
        if let Some((own, block, node)) = owned.iter().find_map(foreign) {
            return Err(Halt::Conflict(format!(
                "block {own} of this node's ledger is claimed by node {node} as {block}: no address is handed out \
                 before one of them gives it up"
            )));
        }
        for lost in owned.iter().filter(|owned| !view.blocks.contains_key(&owned.block)) {
            warn!(block = %lost.block, "the claim of a block that this node uses is gone from the store");
            self.claim_again(view, identity, lost).await?;
        }
        Ok(())
    }

    async fn claim_again(&self, view: &View, identity: &Identity, lost: &OwnedBlock) -> Result<(), Halt> {
        let (Some(node), Some(pool)) = (view.nodes.get(&identity.node), view.pools.get(&lost.pool)) else {
            let reason = format!("pool {} of this node's block {} is gone", lost.pool, lost.block);
            return Err(Halt::Waiting(reason));
        };
        let grounds = grounds(identity, node, pool);
        let claim = Claim::new(&grounds, lost.block, lost.nonce.clone());
        match self.agent.store.commit(&claim.txn).await? {
            Outcome::Applied { revision } => {
                self.caught_up(revision).await?;
                Ok(())
            }
            Outcome::Refused => Err(Halt::Waiting("the records have just changed".to_owned())),
        }
    }

    /// Claims the first block of each family that has none. The first failure is the result, but does not stop the
    /// other family.
    async fn first_blocks(&self, view: &View) -> Result<(), ClaimError> {
        let mut outcome = Ok(());
        for family in view.families() {
            let blocks = self.agent.ipam.run(|ipam| ipam.blocks().to_vec()).await;
            if !blocks.iter().any(|owned| owned.block.family() == family) {
                outcome = outcome.and(self.claim(Wanted::Any(family, None)).await);
            }
        }
        outcome
    }

    async fn add_block(&self, view: &View, block: Block, claim: &BlockRecord) -> Result<(), LedgerError> {
        let Some(pool) = view.pools.get(&claim.pool) else { return Ok(()) };
        let (pool, owned) = (
            (*pool.record).clone(),
            OwnedBlock { block, pool: claim.pool.clone(), nonce: claim.nonce.clone(), leaving: false },
        );
        self.agent.ipam.run(move |ipam| ipam.add_block(owned, &pool)).await
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

    async fn announce_holdings(&self, identity: Option<&Identity>) {
        let (blocks, gateways) =
            self.agent.ipam.run(|ipam| (ipam.blocks().to_vec(), ipam.gateways().to_vec())).await;
        let holdings = Holdings { identity: identity.cloned(), blocks, gateways };
        self.agent.board.holdings.send_if_modified(|known| {
            let changed = **known != holdings;
            if changed {
                *known = Arc::new(holdings);
            }
            changed
        });
    }

    fn publish(&self, registration: Registration) {
        self.agent.board.registration.send_if_modified(|known| {
            let changed = *known != registration;
            if changed {
                match &registration {
                    Registration::Registered => info!("this node is registered"),
                    Registration::Waiting(reason) => info!("waiting: {reason}"),
                    Registration::Conflict(reason) => warn!("not serving: {reason}"),
                }
                *known = registration;
            }
            changed
        });
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

fn grounds<'a>(identity: &'a Identity, node: &Known<NodeRecord>, pool: &'a Known<Pool>) -> Grounds<'a> {
    Grounds {
        node: &identity.node,
        incarnation: &identity.incarnation,
        node_revision: node.revision,
        pool: &pool.record,
        pool_revision: pool.revision,
    }
}

/// Whether the identity in the ledger is still the node's.
fn check_identity(
    identity: Identity,
    view: &View,
    cluster: &ClusterRecord,
    me: &polder_api::NodeName,
    state_dir: &std::path::Path,
) -> Result<Identity, Halt> {
    let folder = state_dir.display();
    if identity.node != *me {
        return Err(Halt::Conflict(format!(
            "state_dir {folder} belongs to node {}, and this is {me}: start the agent under its old name, or drain \
             the node and give it another folder",
            identity.node
        )));
    }
    if identity.cluster != cluster.id {
        return Err(Halt::Conflict(format!(
            "state_dir {folder} belongs to cluster {}, and the store holds cluster {}: point the agent at the right \
             store, or drain the node and give it another folder",
            identity.cluster, cluster.id
        )));
    }
    match view.nodes.get(me) {
        Some(node) if node.record.incarnation != identity.incarnation => Err(Halt::Conflict(format!(
            "node {me} is registered as incarnation {}, and state_dir {folder} holds incarnation {}: it is older, or \
             another machine's",
            node.record.incarnation, identity.incarnation
        ))),
        _ => Ok(identity),
    }
}
