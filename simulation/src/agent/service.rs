//! What plugins ask for: attachments come and go.

use std::net::IpAddr;

use polder_api::mutant::{self, Mutant};
use polder_api::{Attachment, Family};
use polder_ipam::allocator::Rest;
use polder_ipam::claim::NoClaim;
use polder_ipam::invariants::history::check_release;
use polder_ipam::ledger::{Held, Kind};
use polder_ipam::node::{AllocateError, Source, Wish};
use polder_ipam::pool::{BlockRequest, Labels};
use polder_ipam::readiness;
use polder_ipam::reservation;
use polder_ipam::tasks::{Unreserved, Workload};

use super::{Hand, ask, sweeper};
use crate::requests::{ClaimRequest, Wanting};
use crate::task::Wait;

/// How long a DEL waits for an ADD of the same attachment to end.
const WIRING_PATIENCE_MS: u64 = 10_000;

/// Gives the attachment its addresses. Whoever asked holds it from then on, and it is not held where this fails.
pub async fn add(hand: &Hand, wanting: &Wanting) -> Option<Vec<IpAddr>> {
    let attachment = &wanting.attachment;
    if !hand.hold(attachment) {
        return None;
    }
    let added = admitted(hand, wanting).await;
    if added.is_none() {
        hand.let_go(attachment);
    }
    added
}

async fn admitted(hand: &Hand, wanting: &Wanting) -> Option<Vec<IpAddr>> {
    let obstacles = obstacles(hand);
    if !obstacles.is_empty() {
        hand.note(|| format!("not ready: {}", obstacles.join("; ")));
        return None;
    }
    sweeper::take_note(hand, &wanting.attachment).await;
    hand.turn().await;
    let families: Vec<Family> = hand.view().families().into_iter().collect();
    let reserved = if wanting.reserved {
        let handed = reserve(hand, wanting).await;
        hand.note(|| format!("hand-over: {handed:?}"));
        vec![handed.ok()?]
    } else {
        Vec::new()
    };
    hand.turn().await;
    let held = allocate(hand, wanting, families, reserved.clone()).await;
    hand.agent(|agent| reserved.iter().for_each(|address| agent.ipam.give_up(*address, &wanting.attachment)));
    hand.agent(|agent| agent.news = true);
    let held = held?;
    hand.turn().await;
    Some(held.addresses)
}

/// Asks for the pod's own address, in the pool for such.
async fn reserve(hand: &Hand, wanting: &Wanting) -> Result<IpAddr, Unreserved> {
    let view = hand.view();
    let pool = view.pools.values().find(|pool| reservation::serves(&pool.record, &Labels::new()));
    let Some(pool) = pool else { return Err(Unreserved::TryAgain("there is no pool".to_owned())) };
    let pool = Workload::Pool(pool.record.name.clone());
    ask::reserve(hand, pool, wanting.pod.to_string(), wanting.attachment.clone()).await
}

/// Why an ADD would not be served.
fn obstacles(hand: &Hand) -> Vec<String> {
    hand.with(|world| {
        let machine = &world.machines[hand.machine];
        let agent = machine.agent.as_ref().expect("a task of an agent ends with it");
        readiness::obstacles(&readiness::Facts {
            view: &agent.view,
            registration: &agent.registration,
            holdings: &agent.holdings,
            underlay: Ok(()),
            gateways: &machine.kernel.gateways,
            mtu: 1450,
            failures: &[],
        })
    })
}

async fn allocate(
    hand: &Hand,
    wanting: &Wanting,
    families: Vec<Family>,
    reserved: Vec<IpAddr>,
) -> Option<Held> {
    let wish = Wish {
        attachment: wanting.attachment.clone(),
        kind: Kind::Pod,
        source: Source::Blocks { families: families.clone(), pool: None, requested: Vec::new(), reserved },
        mac: None,
        mtu: 1450,
        netns: String::new(),
        pod: Some(wanting.pod.clone()),
    };
    let mut rest = Rest::Full;
    // Each claim that succeeds brings at least one address.
    for _ in 0..20 {
        let allocated = hand.ipam(|ipam, now| ipam.allocate(wish.clone(), rest, now));
        let family = match allocated {
            Ok(held) => {
                for family in &families {
                    let few = hand.ipam(|ipam, now| ipam.total(*family, None, now).free < 2);
                    if few {
                        let request = ClaimRequest { wanted: BlockRequest::Any(*family, None), reply: None };
                        hand.agent(|agent| agent.claims.push_back(request));
                    }
                }
                return Some(held);
            }
            Err(AllocateError::Exists(held)) => return taken_up(hand, *held),
            Err(AllocateError::Shortage { family, .. }) => family,
            Err(error) => {
                hand.note(|| error.to_string());
                return None;
            }
        };
        match (ask::claim(hand, BlockRequest::Any(family, None)).await, rest) {
            (Ok(()), _) => {}
            (Err(NoClaim::Exhausted(_)), Rest::Full) => rest = Rest::Shortest,
            (Err(error), _) => {
                hand.note(|| format!("{family}: {error}"));
                return None;
            }
        }
        hand.turn().await;
    }
    None
}

/// An ADD that came to nothing is taken up again with the addresses that it has.
fn taken_up(hand: &Hand, held: Held) -> Option<Held> {
    let is_there =
        hand.with(|world| world.machines[hand.machine].kernel.interfaces.contains_key(&held.attachment));
    (!held.leaving && !is_there).then_some(held)
}

/// Takes an attachment away. True if it is gone.
pub async fn del(hand: &Hand, attachment: &Attachment) -> bool {
    let until = hand.clock() + WIRING_PATIENCE_MS;
    while !hand.hold(attachment) {
        if hand.clock() >= until {
            return false;
        }
        hand.wait(Wait::Free(attachment.clone(), until)).await;
    }
    let gone = release(hand, attachment).await;
    hand.let_go(attachment);
    gone
}

/// Takes an attachment away, for whoever holds it: first its interface, then its addresses.
pub async fn release(hand: &Hand, attachment: &Attachment) -> bool {
    hand.turn().await;
    let (held, _) = hand.ipam(|ipam, _| ipam.begin_release(attachment));
    if mutant::is(Mutant::FreedFirst) {
        let _ = hand.ipam(|ipam, now| ipam.release(attachment, now));
    }
    hand.turn().await;
    hand.with(|world| world.machines[hand.machine].kernel.interfaces.remove(attachment));
    if held.is_none() {
        return true;
    }
    hand.turn().await;
    let before: Vec<Held> = hand.ipam(|ipam, _| ipam.attachments().cloned().collect());
    let _ = hand.ipam(|ipam, now| ipam.release(attachment, now));
    let after: Vec<Held> = hand.ipam(|ipam, _| ipam.attachments().cloned().collect());
    hand.with(|world| {
        let name = world.machines[hand.machine].name.clone();
        world.found.extend(check_release(&name, attachment, &before, &after));
    });
    hand.agent(|agent| agent.news = true);
    true
}

/// What becomes of an attachment whose plugin has gone away: if there is no interface, there never will be one.
pub async fn abandoned(hand: &Hand, attachment: &Attachment) {
    hand.turn().await;
    let is_there = hand.with(|world| world.machines[hand.machine].kernel.interfaces.contains_key(attachment));
    if !is_there && hand.ipam(|ipam, _| ipam.get(attachment).is_some()) {
        release(hand, attachment).await;
    }
    hand.let_go(attachment);
}
