//! `polderctl ipam show`: the use of addresses, from the datastore's records and this node's ledger.

use std::net::IpAddr;
use std::sync::Arc;

use polder_api::ipam::{AddressStanding, AddressStatus, NodeShare, NodeShareStanding, Shown, Subject};
use polder_api::message::{Refusal, RefusalKind, Refuse};
use polder_api::{NodeName, PoolName};
use polder_ipam::cidr::ParseCidrError;
use polder_ipam::invariants::LedgerFacts;
use polder_ipam::node::AddressCondition;
use polder_ipam::pool::{Purpose, format_labels};
use polder_ipam::record::PodsGone;
use polder_ipam::removal::blocks_of;
use polder_ipam::tasks::LedgerUnusable;
use polder_ipam::tasks::published::PublishedAddresses;
use polder_ipam::view::{Versioned, View};
use polder_ipam::{Cidr, Moment, Pool};

use crate::machine::now;
use crate::pools;
use crate::refused;
use crate::reporter::Reporter;

/// Reports what records and ledger contain about the subject.
pub async fn show(reporter: &Reporter, subject: Subject) -> Result<Shown, Refusal> {
    let (facts, counts) = reporter.ipam.run(|ipam| (ipam.facts(now()), ipam.counts(now()))).await;
    let mut facts = facts.map_err(LedgerUnusable)?;
    // The probe endpoint does not count as a used address, as in `status`.
    for (owned, counted) in &mut facts.blocks {
        let of_block = counts.iter().find(|(known, _)| known.block == owned.block);
        *counted = of_block.map(|(_, counts)| *counts);
    }
    let view = match subject {
        // Also available from this node's ledger while the records are not loaded.
        Subject::Address(_) | Subject::Pod(_) => reporter.node_state().view(),
        _ => reporter.node_state().records.read()?,
    };
    let published = PublishedAddresses::read(&reporter.store).await;
    let mut shown = Shown::default();
    if let Some(reason) = &view.lost {
        shown.remarks.push(format!("datastore unreachable ({reason}): showing the last known state"));
    } else if let Err(error) = &published {
        shown.remarks.push(format!("cannot read what other nodes have published: {error}"));
    }
    let look = Lookup { reporter, view, published: published.ok(), facts, now: now() };
    match subject {
        Subject::Cluster => look.cluster(&mut shown),
        Subject::Pool(name) => match look.view.every_pool().find(|known| known.record.name == name) {
            Some(known) => look.pool(known, &mut shown),
            None => return Err(NotShown::NoPool(name).into()),
        },
        Subject::Block(block) => look.block(block.to_string().parse().map_err(NotShown::Block)?, &mut shown),
        Subject::Node(name) => look.node(&name, &mut shown)?,
        Subject::Address(address) => shown.addresses.push(look.address(address).await?),
        Subject::Pod(pod) => look.pod(&pod, &mut shown)?,
    }
    Ok(shown)
}

/// Why a subject is not shown.
#[derive(Debug, thiserror::Error)]
enum NotShown {
    /// The records of the cluster contain no pool of that name.
    #[error("there is no pool {0}: see polderctl pool list")]
    NoPool(PoolName),
    /// The records of the cluster contain no node of that name, and none was removed.
    #[error("there is no node {0}: see polderctl node list")]
    NoNode(NodeName),
    /// No address is in use by a pod of that name, or reserved for it.
    #[error("no address is known of pod {0}: use NAMESPACE/NAME")]
    NoPod(String),
    /// The text is not the CIDR of a block.
    #[error(transparent)]
    Block(ParseCidrError),
}

impl Refuse for NotShown {
    fn kind(&self) -> RefusalKind {
        match self {
            Self::NoPool(_) | Self::NoNode(_) | Self::NoPod(_) => RefusalKind::Missing,
            Self::Block(_) => RefusalKind::Invalid,
        }
    }
}

/// Explanation for an address of this node's probe endpoint.
const PROBE: &str = "it is the address of this node's probe endpoint, which probes the paths to other nodes";

struct Lookup<'a> {
    reporter: &'a Reporter,
    view: Arc<View>,
    published: Option<PublishedAddresses>,
    facts: LedgerFacts,
    now: Moment,
}

impl Lookup<'_> {
    fn cluster(&self, shown: &mut Shown) {
        let pools = self.view.every_pool();
        shown.pools =
            pools.map(|known| pools::status(&self.view, &known.record, self.published.as_ref())).collect();
        shown.nodes = self.view.nodes.keys().map(|name| self.share(name)).collect();
        let removed = self.view.fences.iter().filter_map(|(incarnation, fence)| {
            let blocks = blocks_of(&self.view, incarnation).count();
            let is_waited_for = blocks > 0 || fence.record.pods == PodsGone::Unknown;
            is_waited_for.then(|| NodeShare {
                name: fence.record.node.clone(),
                incarnation: incarnation.to_string(),
                standing: NodeShareStanding::Removed(fence.record.pods),
                gateways: Vec::new(),
                blocks: blocks as u64,
                addresses_used: None,
            })
        });
        shown.nodes.extend(removed);
    }

    fn share(&self, name: &NodeName) -> NodeShare {
        let record = &self.view.nodes[name].record;
        let published = self.published.as_ref().map(|published| {
            published.records.iter().filter(|(published, _)| published.node == *name).count() as u64
        });
        let own = |claim: &&Versioned<_>| {
            let claim: &polder_ipam::record::BlockRecord = &claim.record;
            claim.incarnation == record.incarnation
        };
        NodeShare {
            name: name.clone(),
            incarnation: record.incarnation.to_string(),
            standing: NodeShareStanding::Member,
            gateways: record.gateways.clone(),
            blocks: self.view.blocks.values().filter(own).count() as u64,
            addresses_used: published,
        }
    }

    fn pool(&self, known: &Versioned<Pool>, shown: &mut Shown) {
        let pool = &*known.record;
        shown.pools = vec![pools::status(&self.view, pool, self.published.as_ref())];
        shown.blocks = self.claims(|block| pool.cidr().covers(block));
        let reserved = self.view.reservations.keys().filter(|address| pool.cidr().has(**address));
        shown.addresses = reserved.map(|address| self.known_elsewhere(*address)).collect();
        if !pool.nodes.is_empty() {
            shown
                .remarks
                .push(format!("only nodes with these labels use the pool: {}", format_labels(&pool.nodes)));
        }
    }

    fn claims(&self, wanted: impl Fn(Cidr) -> bool) -> Vec<polder_api::pool::ClaimStatus> {
        let claims = pools::claims(
            &self.reporter.config.node,
            &self.view,
            self.published.as_ref(),
            &self.reporter.dead(),
        )
        .into_iter();
        claims.filter(|claim| claim.block.to_string().parse().is_ok_and(&wanted)).collect()
    }

    fn block(&self, block: Cidr, shown: &mut Shown) {
        shown.blocks = self.claims(|claimed| claimed.overlaps(block));
        if shown.blocks.is_empty() {
            let pool = self.view.every_pool().find(|pool| pool.record.cidr().covers(block));
            shown.remarks.push(match pool {
                Some(pool) => format!("no node has claimed {block} of pool {}", pool.record.name),
                None => format!("{block} is in no pool"),
            });
        }
        self.own_counts(|owned| owned.overlaps(block), shown);
        shown.addresses = self.published_where(|address, _| block.has(address));
    }

    /// Adds the counts of this node's blocks from its ledger.
    fn own_counts(&self, wanted: impl Fn(Cidr) -> bool, shown: &mut Shown) {
        for (owned, counts) in self.facts.blocks.iter().filter(|(owned, _)| wanted(owned.block.cidr())) {
            let block = owned.block;
            shown.remarks.push(match counts {
                Some(counts) => format!(
                    "ledger of this node: block {block}: {} used, {} in cool-down, {} free, {} never allocated",
                    counts.used, counts.resting, counts.free, counts.excluded
                ),
                None => format!("ledger of this node: block {block}: no addresses are allocated from it"),
            });
        }
    }

    fn node(&self, name: &NodeName, shown: &mut Shown) -> Result<(), Refusal> {
        let removed: Vec<_> =
            self.view.fences.iter().filter(|(_, fence)| fence.record.node == *name).collect();
        for (incarnation, fence) in &removed {
            let pods = fence.record.pods;
            shown.remarks.push(format!(
                "incarnation {incarnation} of node {name} was removed; whether its pods are gone: {pods}"
            ));
        }
        if self.view.nodes.contains_key(name) {
            shown.nodes = vec![self.share(name)];
        } else if removed.is_empty() {
            return Err(NotShown::NoNode(name.clone()).into());
        }
        shown.blocks = pools::claims(
            &self.reporter.config.node,
            &self.view,
            self.published.as_ref(),
            &self.reporter.dead(),
        );
        shown.blocks.retain(|claim| claim.node == *name);
        if *name == self.reporter.config.node {
            self.own_counts(|_| true, shown);
        }
        shown.addresses = self.published_where(|_, published| published.node == *name);
        Ok(())
    }

    fn pod(&self, pod: &str, shown: &mut Shown) -> Result<(), Refusal> {
        let named = |of: &Option<polder_api::Pod>| of.as_ref().is_some_and(|of| of.to_string() == pod);
        shown.addresses = self.published_where(|_, published| named(&published.record.pod));
        for held in self.facts.attachments.iter().filter(|held| named(&held.pod)) {
            for address in &held.addresses {
                if !shown.addresses.iter().any(|known| known.address == *address) {
                    let condition = AddressCondition::Held(Box::new(held.clone()));
                    shown.addresses.push(self.own(*address, condition));
                }
            }
        }
        for (address, known) in &self.view.reservations {
            if known.record.owner == pod && !shown.addresses.iter().any(|known| known.address == *address) {
                shown.addresses.push(self.known_elsewhere(*address));
            }
        }
        if shown.addresses.is_empty() {
            return Err(NotShown::NoPod(pod.to_owned()).into());
        }
        Ok(())
    }

    /// The published addresses; those of this node from its ledger.
    fn published_where(
        &self,
        wanted: impl Fn(IpAddr, &polder_ipam::invariants::PublishedAddress) -> bool,
    ) -> Vec<AddressStatus> {
        let records = self.published.iter().flat_map(|published| &published.records);
        let wanted = records.filter(|(published, _)| wanted(published.address, published));
        let status = wanted.map(|(published, _)| {
            let held = (published.node == self.reporter.config.node)
                .then(|| {
                    self.facts.attachments.iter().find(|held| held.addresses.contains(&published.address))
                })
                .flatten();
            match held {
                Some(held) => self.own(published.address, AddressCondition::Held(Box::new(held.clone()))),
                None => self.known_elsewhere(published.address),
            }
        });
        status.collect()
    }

    async fn address(&self, address: IpAddr) -> Result<AddressStatus, Refusal> {
        let at = self.now;
        let condition = self.reporter.ipam.run(move |ipam| ipam.condition(address, at)).await;
        Ok(match condition.map_err(LedgerUnusable)? {
            Some(condition) => self.own(address, condition),
            None => {
                self.reporter.node_state().records.read()?;
                self.known_elsewhere(address)
            }
        })
    }

    /// Status of an address from this node's ledger.
    fn own(&self, address: IpAddr, condition: AddressCondition) -> AddressStatus {
        let ago = |moment: Moment| format!("{} s ago", self.now.since(moment).as_secs());
        let mut status = self.blank(address);
        status.node = Some(self.reporter.config.node.clone());
        status.incarnation = self.facts.identity.as_ref().map(|own| own.incarnation.to_string());
        let (standing, why) = match condition {
            AddressCondition::Held(held) => {
                status.attachment = Some(held.attachment.clone());
                status.pod = held.pod.as_ref().map(ToString::to_string).or(status.pod);
                status.since = Some(ago(held.since));
                let why = if held.leaving { "is being released" } else { "uses it" };
                let ports: Vec<String> = held.ports.iter().map(ToString::to_string).collect();
                let ports = match ports.as_slice() {
                    [] => String::new(),
                    ports => format!(", with host ports {}", ports.join(", ")),
                };
                (AddressStanding::Used, format!("the attachment in this node's ledger {why}{ports}"))
            }
            AddressCondition::Gateway => {
                (AddressStanding::Gateway, "it is the node's own address, the gateway of its pods".to_owned())
            }
            AddressCondition::Probe => (AddressStanding::Probe, PROBE.to_owned()),
            AddressCondition::Freed(moment) => {
                status.since = Some(ago(moment));
                let rest = self.reporter.config.cooldown.saturating_sub(self.now.since(moment));
                let left = rest.as_secs();
                match left {
                    0 => (AddressStanding::Free, "it was released, and its cool-down is over".to_owned()),
                    _ => {
                        let why = format!("it was released, and is in cool-down for another {left} s");
                        (AddressStanding::Resting, why)
                    }
                }
            }
            AddressCondition::Unused => (AddressStanding::Free, "it has not been used since the block was claimed".to_owned()),
            AddressCondition::Excluded => (
                AddressStanding::Excluded,
                "it is never allocated: the first or last of its pool, kept for the gateway of its block, or in a \
                 block that is being released"
                    .to_owned(),
            ),
        };
        (status.standing, status.why) = (standing, why);
        status
    }

    /// Status of an address from the records.
    fn known_elsewhere(&self, address: IpAddr) -> AddressStatus {
        let mut status = self.blank(address);
        let pool = self.view.every_pool().find(|pool| pool.record.cidr().has(address));
        let records = self.published.iter().flat_map(|published| &published.records);
        let published = records.into_iter().find(|(published, _)| published.address == address);
        if let Some((published, revision)) = published {
            status.node = Some(published.node.clone());
            status.attachment = Some(published.record.attachment.clone());
            status.pod = published.record.pod.as_ref().map(ToString::to_string);
            status.since = Some(format!("store revision {revision}"));
        }
        let reservation = self.view.reservations.get(&address);
        (status.standing, status.why) = match (pool, reservation, published) {
            (_, Some(known), _) => {
                let record = &known.record;
                status.pod = Some(record.owner.clone());
                status.since = Some(format!("store revision {}", known.revision));
                let generation = record.generation;
                match &record.holder {
                    Some(holder) => {
                        status.node = Some(holder.node.clone());
                        status.incarnation = Some(holder.incarnation.to_string());
                        status.attachment = Some(holder.attachment.clone());
                        (
                            AddressStanding::Reserved,
                            format!("it is reserved, and in use (generation {generation})"),
                        )
                    }
                    None => (
                        AddressStanding::Reserved,
                        format!("it is reserved, and not in use (last generation {generation})"),
                    ),
                }
            }
            (None, None, _) => (AddressStanding::Foreign, "it is in no pool".to_owned()),
            (Some(pool), None, _) if pool.record.excludes(address) => {
                (AddressStanding::Excluded, "it is never allocated: the first or last of its pool".to_owned())
            }
            (Some(pool), None, _) if pool.record.purpose == Purpose::Reservations => {
                (AddressStanding::Free, "it is in a pool for reservations, and not reserved".to_owned())
            }
            (Some(_), None, Some((published, _))) => {
                (AddressStanding::Used, format!("node {} has published it as used", published.node))
            }
            (Some(_), None, None) => self.unpublished(address, &mut status),
        };
        status
    }

    /// Status of an address of a pool that no node has published.
    fn unpublished(&self, address: IpAddr, status: &mut AddressStatus) -> (AddressStanding, String) {
        let claim = self.view.blocks.iter().find(|(block, _)| block.cidr().has(address));
        let Some((block, claim)) = claim else {
            return match self.published {
                Some(_) => (AddressStanding::Unclaimed, "no node has claimed its block".to_owned()),
                None => (
                    AddressStanding::Unknown,
                    "the datastore is unreachable, and a node may have claimed its block: retry when it is back"
                        .to_owned(),
                ),
            };
        };
        let claim = &claim.record;
        status.node = Some(claim.node.clone());
        status.incarnation = Some(claim.incarnation.to_string());
        let node = self.view.nodes.get(&claim.node);
        if self.view.fences.contains_key(&claim.incarnation) {
            (
                AddressStanding::Resting,
                format!("its block {block} is in cool-down, because node {} was removed", claim.node),
            )
        } else if node.is_some_and(|node| node.record.gateways.contains(&address)) {
            (
                AddressStanding::Gateway,
                format!("it is an address of node {} itself, the gateway of its pods", claim.node),
            )
        } else if node.is_some_and(|node| node.record.probes.contains(&address)) {
            (
                AddressStanding::Probe,
                format!("it is the address of the probe endpoint of node {}", claim.node),
            )
        } else if let Some(why) = self.unpublished_because(&claim.node) {
            (AddressStanding::Unknown, why)
        } else {
            let node = &claim.node;
            (
                AddressStanding::Free,
                format!(
                    "node {node} has not published it as used; only that node knows whether it is in cool-down"
                ),
            )
        }
    }

    /// Why a published address may be missing here although a pod has it; `None` if publication works.
    fn unpublished_because(&self, node: &NodeName) -> Option<String> {
        if self.published.is_none() {
            return Some(format!(
                "the datastore is unreachable, so what node {node} has published cannot be read: retry when it is back"
            ));
        }
        refused::is_of_all(&self.reporter.store).then(|| {
            format!("the datastore refuses writes, so node {node} may not have published it: run polderctl on node \
                     {node}")
        })
    }

    /// Status with pool and block only.
    fn blank(&self, address: IpAddr) -> AddressStatus {
        let pool = self.view.every_pool().find(|pool| pool.record.cidr().has(address));
        let block = self.view.blocks.keys().find(|block| block.cidr().has(address));
        AddressStatus {
            address,
            standing: AddressStanding::Foreign,
            pool: pool.map(|pool| pool.record.name.clone()),
            block: block.map(|block| block.cidr().into()),
            node: None,
            incarnation: None,
            attachment: None,
            pod: self.view.reservations.get(&address).map(|known| known.record.owner.clone()),
            since: None,
            why: String::new(),
        }
    }
}
