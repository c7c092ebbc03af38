//! Finding addresses for an attachment: in the node's blocks, or in one that is claimed for it.

use std::net::IpAddr;
use std::time::Duration;

use polder_api::message::{AddRequest, AddressSource, Refusal, RefusalKind};
use polder_api::{Family, PoolName};
use polder_ipam::Pool;
use polder_ipam::allocator::{Counts, Refused, Rest};
use polder_ipam::claim::{LOW_WATER, NoClaim};
use polder_ipam::ledger::{Held, Kind};
use polder_ipam::node::{AllocateError, Source, Wish};
use polder_ipam::pool::{BlockRequest, Purpose};
use polder_ipam::shortage;
use polder_ipam::view::View;
use polder_store::NodeIpam;
use tokio::sync::oneshot;
use tokio::time::timeout;

use crate::agent::Agent;
use crate::caller::Caller;
use crate::machine::now;
use crate::refusal::{ledger_failed, refuse};
use crate::requests::{ClaimRequest, ReserveRequest};
use polder_ipam::tasks::Workload;

/// How long an ADD waits for another block.
const CLAIM_PATIENCE: Duration = Duration::from_secs(15);

/// What came of a wish.
#[derive(Debug)]
pub enum Allocated {
    /// The attachment has these addresses now.
    New(Held),
    /// It had them before.
    Exists(Held),
}

/// Gives the attachment its addresses: all of them are in the ledger when this returns, or none is.
pub async fn allocate(
    agent: &Agent,
    view: &View,
    kind: Kind,
    request: AddRequest,
    mtu: u32,
    caller: &Caller<'_>,
) -> Result<Allocated, Refusal> {
    let source = source(agent, view, &request).await?;
    let (families, pool, reserved) = match &source {
        Source::Blocks { families, pool, reserved, .. } => (families.clone(), pool.clone(), reserved.clone()),
        Source::Elsewhere(_) => (Vec::new(), None, Vec::new()),
    };
    let wish = Wish {
        attachment: request.attachment,
        kind,
        source,
        mac: request.mac,
        mtu,
        netns: request.netns,
        pod: request.pod,
    };
    let allocated = allocate_wish(agent, view, &wish, &families, pool.as_ref(), caller).await;
    if !reserved.is_empty() {
        // It has them by now, or what was handed over for it is let go.
        let give_up = move |ipam: &mut NodeIpam| {
            reserved.iter().for_each(|address| ipam.give_up(*address, &wish.attachment));
        };
        agent.ipam.run(give_up).await;
        agent.holdings_changed.notify_one();
    }
    allocated
}

/// Fulfils a wish, with another block if it takes one.
async fn allocate_wish(
    agent: &Agent,
    view: &View,
    wish: &Wish,
    families: &[Family],
    pool: Option<&PoolName>,
    caller: &Caller<'_>,
) -> Result<Allocated, Refusal> {
    let (mut rest, mut claimed) = (Rest::Full, None);
    loop {
        let (again, how) = (wish.clone(), rest);
        let (allocated, free) = agent
            .ipam
            .run(move |ipam| {
                let at = now();
                let allocated = ipam.allocate(again, how, at);
                (allocated, Family::BOTH.map(|family| (family, ipam.total(family, None, at).free)))
            })
            .await;
        let (family, counts) = match allocated {
            Ok(held) => {
                for (family, free) in free {
                    if free < LOW_WATER && families.contains(&family) {
                        // If the queue is full, whoever asked before will have done it.
                        let wanted = BlockRequest::Any(family, None);
                        let _ = agent.claims.try_send(ClaimRequest { wanted, reply: None });
                    }
                }
                return Ok(Allocated::New(held));
            }
            Err(AllocateError::Exists(held)) => return Ok(Allocated::Exists(*held)),
            Err(AllocateError::Ledger(error)) => return Err(ledger_failed(&error)),
            Err(AllocateError::Refused { address, why: Refused::NotHere, .. })
                if claimed != Some(address) =>
            {
                claim_around(agent, view, address).await?;
                claimed = Some(address);
                continue;
            }
            Err(error @ (AllocateError::Refused { .. } | AllocateError::MacTaken { .. })) => {
                return Err(refused(&error));
            }
            Err(AllocateError::Shortage { family, counts }) => (family, counts),
        };
        if caller.is_gone() {
            // Blocks that are claimed now would be for nobody.
            return refuse(RefusalKind::Failed, "the caller is gone");
        }
        match (claim(agent, BlockRequest::Any(family, pool.cloned())).await, rest) {
            (Ok(()), _) => {}
            // No other address and no other block: one that has rested the shortest time must do.
            (Err(NoClaim::Exhausted(_)), Rest::Full) => rest = Rest::Shortest,
            (Err(error), _) => return Err(short(family, counts, &error)),
        }
    }
}

/// Where the addresses are to come from, if that makes sense in this cluster. Reserved ones are handed over.
async fn source(agent: &Agent, view: &View, request: &AddRequest) -> Result<Source, Refusal> {
    match &request.source {
        AddressSource::Pools { pool, addresses } => {
            let families = families(agent, view, pool.as_ref())?;
            for family in Family::BOTH {
                if addresses.iter().filter(|address| Family::of(**address) == family).count() > 1 {
                    let problem = format!("more than one {family} address is asked for: a pod has one");
                    return refuse(RefusalKind::Invalid, problem);
                }
            }
            let mut requested = Vec::new();
            let mut workloads = Vec::new();
            for address in addresses {
                let of_pool = |found: &&Pool| pool.as_ref().is_none_or(|pool| found.name == *pool);
                let Some(found) = pool_of(view, *address).filter(of_pool) else {
                    let pools = pool.as_ref().map_or("any pool".to_owned(), |pool| format!("pool {pool}"));
                    return refuse(RefusalKind::Invalid, format!("{address} is not in {pools}"));
                };
                check_labels(agent, found)?;
                match found.purpose {
                    Purpose::Blocks => requested.push(*address),
                    Purpose::Reservations => workloads.push(Workload::Address(*address)),
                }
            }
            let named = pool.as_ref().and_then(|name| view.pools.get(name)).map(|known| &known.record);
            if let (Some(pool), true) = (named, addresses.is_empty()) {
                check_labels(agent, pool)?;
                if pool.purpose == Purpose::Reservations {
                    workloads.push(Workload::Pool(pool.name.clone()));
                }
            }
            let mut reserved = Vec::new();
            for workload in workloads {
                reserved.push(reserve(agent, request, workload).await?);
            }
            Ok(Source::Blocks { families, pool: pool.clone(), requested, reserved })
        }
        AddressSource::Delegated(addresses) => {
            let gateways = agent.board.holdings().gateways.clone();
            for address in addresses {
                if let Some(pool) = pool_of(view, *address) {
                    return refuse(
                        RefusalKind::Invalid,
                        format!(
                            "{address} is of pool {}, which Polder hands out itself: give the other IPAM plugin a \
                             range of its own",
                            pool.name
                        ),
                    );
                }
                let family = Family::of(*address);
                if !gateways.iter().any(|gateway| Family::of(*gateway) == family) {
                    let problem = format!("{address} has no way out: the cluster has no {family} pool");
                    return refuse(RefusalKind::Invalid, problem);
                }
            }
            Ok(Source::Elsewhere(addresses.clone()))
        }
    }
}

/// Refuses a pool that is for nodes with other labels.
fn check_labels(agent: &Agent, pool: &Pool) -> Result<(), Refusal> {
    match shortage::foreign(pool, &agent.config.labels) {
        None => Ok(()),
        Some(problem) => refuse(RefusalKind::Invalid, format!("pool {} {problem}", pool.name)),
    }
}

/// Has a reserved address handed over to the pod.
async fn reserve(agent: &Agent, request: &AddRequest, wanted: Workload) -> Result<IpAddr, Refusal> {
    let Some(pod) = &request.pod else {
        let problem = "a reserved address belongs to a pod by name, and the runtime has not named it";
        return refuse(RefusalKind::Invalid, problem);
    };
    let stopping = || Refusal::try_again("the agent is stopping");
    let (reply, answer) = oneshot::channel();
    let (owner, attachment) = (pod.to_string(), request.attachment.clone());
    let asked = async {
        let request = ReserveRequest { wanted, owner, attachment, reply };
        agent.reservations.send(request).await.map_err(|_| stopping())?;
        answer.await.map_err(|_| stopping())?
    };
    let late = || Refusal::try_again("the store is too slow");
    timeout(CLAIM_PATIENCE, asked).await.unwrap_or_else(|_| Err(late()))
}

fn families(agent: &Agent, view: &View, pool: Option<&PoolName>) -> Result<Vec<Family>, Refusal> {
    let families: Vec<Family> = match pool {
        None => view.families().into_iter().collect(),
        Some(name) => match view.pools.get(name) {
            Some(pool) => vec![pool.record.family()],
            None => return refuse(RefusalKind::Invalid, format!("there is no pool {name}")),
        },
    };
    if families.contains(&Family::V6) && !agent.features.ipv6 {
        return refuse(RefusalKind::Failed, "the cluster has an IPv6 pool, and this kernel has no IPv6");
    }
    Ok(families)
}

fn pool_of(view: &View, address: IpAddr) -> Option<&Pool> {
    view.pools.values().map(|pool| &*pool.record).find(|pool| pool.cidr().has(address))
}

/// Claims the block that the address is in, if it is nobody's.
async fn claim_around(agent: &Agent, view: &View, address: IpAddr) -> Result<(), Refusal> {
    let Some(pool) = pool_of(view, address) else {
        return refuse(RefusalKind::Invalid, format!("{address} is not in any pool"));
    };
    let block = pool.block_of(address);
    if let Some(claim) = view.blocks.get(&block).filter(|claim| claim.record.node != agent.config.node) {
        let problem = format!(
            "{address} is in block {block} of node {}: only there can a pod have it",
            claim.record.node
        );
        return refuse(RefusalKind::AddressTaken, problem);
    }
    claim(agent, BlockRequest::This(block)).await.map_err(|error| {
        let kind = match error {
            NoClaim::Exhausted(_) => RefusalKind::AddressTaken,
            NoClaim::Unavailable(_) => RefusalKind::TryAgain,
        };
        Refusal::new(kind, format!("{address} is in block {block}, which this node does not own: {error}"))
    })
}

fn refused(error: &AllocateError) -> Refusal {
    match error {
        AllocateError::Refused { address, why: Refused::Resting(left), .. } => {
            let seconds = left.as_secs() + 1;
            Refusal::new(
                RefusalKind::TryAgain,
                format!("{address} was freed just now: it rests for another {seconds} s"),
            )
        }
        AllocateError::Refused { address, why: Refused::Used, holder } => {
            let holder = holder.as_ref().map_or("this node itself".to_owned(), ToString::to_string);
            Refusal::new(RefusalKind::AddressTaken, format!("{address} is used by {holder}"))
        }
        AllocateError::Refused { address, .. } => {
            let problem =
                format!("{address} is never handed out: it is a gateway's, or at the end of its pool");
            Refusal::new(RefusalKind::AddressTaken, problem)
        }
        other => Refusal::new(RefusalKind::AddressTaken, other.to_string()),
    }
}

fn short(family: Family, counts: Counts, error: &NoClaim) -> Refusal {
    let own = shortage::own_share(family, counts);
    match error {
        NoClaim::Exhausted(why) => {
            Refusal::new(RefusalKind::PoolExhausted, format!("{own}; {why}. {}", shortage::REMEDY))
        }
        NoClaim::Unavailable(_) => Refusal::try_again(format!("{own}, and {error}")),
    }
}

/// Asks for another block, and waits for it.
async fn claim(agent: &Agent, wanted: BlockRequest) -> Result<(), NoClaim> {
    let unavailable = |why: &str| NoClaim::Unavailable(why.to_owned());
    let (reply, answer) = oneshot::channel();
    let request = ClaimRequest { wanted, reply: Some(reply) };
    let asked = async {
        agent.claims.send(request).await.map_err(|_| unavailable("the agent is stopping"))?;
        answer.await.map_err(|_| unavailable("the agent is stopping"))?
    };
    timeout(CLAIM_PATIENCE, asked).await.unwrap_or_else(|_| Err(unavailable("the store is too slow")))
}
