//! Hands reserved addresses over to this node.

use std::net::IpAddr;
use std::rc::Rc;

use polder_ipam::key::{Key, Range};
use polder_ipam::ledger::Standing;
use polder_ipam::pool::{Labels, Pool};
use polder_ipam::record::{Holder, encode};
use polder_ipam::reservation::{self, HandOver};
use polder_ipam::store::Outcome;
use polder_ipam::view::{Known, Source};

use super::Hand;
use crate::requests::{Refused, Reply, ReserveRequest, Wanting};
use crate::task::Wait;

/// Attempts at a record that changes at the same time.
const ATTEMPTS: usize = 10;

/// How long an ADD waits for its address.
const PATIENCE_MS: u64 = 15_000;

/// Asks for the pod's own address, and waits for it.
pub async fn ask(hand: &Hand, wanting: &Wanting) -> Result<Vec<IpAddr>, Refused> {
    let reply = Reply::default();
    let request = ReserveRequest { wanting: wanting.clone(), reply: reply.clone() };
    hand.agent(|agent| {
        agent.reservations.push_back(request);
        agent.news = true;
    });
    let until = hand.clock() + PATIENCE_MS;
    while !reply.given.get() {
        if hand.clock() >= until {
            return refuse("the store is too slow");
        }
        hand.wait(Wait::Flag(Rc::clone(&reply.given), hand.epoch)).await;
    }
    let answer = reply.answer.borrow_mut().take();
    answer.map_or_else(|| refuse("nobody has answered"), |answer| answer.map(|address| vec![address]))
}

fn refuse<T>(why: &str) -> Result<T, Refused> {
    Err(Refused(why.to_owned()))
}

/// Serves a wish.
pub async fn serve(hand: &Hand, request: ReserveRequest) {
    let answer = hand_over(hand, &request.wanting).await;
    *request.reply.answer.borrow_mut() = Some(answer);
    request.reply.given.set(true);
}

/// Gets the pod's own address for this node, which is expected from then on until it is used or given up.
async fn hand_over(hand: &Hand, wanting: &Wanting) -> Result<IpAddr, Refused> {
    for _ in 0..ATTEMPTS {
        hand.turn().await;
        let attempt = prepare(hand, wanting)?;
        let address = attempt.address;
        hand.agent(|agent| agent.ipam.expect(address, &wanting.attachment));
        hand.turn().await;
        match carry_over(hand, &attempt).await {
            Ok(true) => return Ok(address),
            result => {
                hand.agent(|agent| agent.ipam.give_up(address, &wanting.attachment));
                result?;
            }
        }
    }
    refuse("the reservation changes all the time")
}

/// Carries out a hand-over; true if it has taken place. An outcome that is not known is looked up.
async fn carry_over(hand: &Hand, attempt: &HandOver) -> Result<bool, Refused> {
    match hand.commit(&attempt.txn).await {
        Ok(outcome) => Ok(matches!(outcome, Outcome::Applied { .. })),
        Err(error) if !error.needs_look() => refuse(&error.to_string()),
        Err(error) => {
            let key = Key::Reservation(attempt.address).to_string();
            let failed = || Refused(error.to_string());
            let found = hand.range(Range::single(key)).await.map_err(|_| failed())?;
            let is_made = found.entries.first().is_some_and(|entry| entry.value == encode(&attempt.record));
            if is_made { Ok(true) } else { Err(failed()) }
        }
    }
}

fn prepare(hand: &Hand, wanting: &Wanting) -> Result<HandOver, Refused> {
    hand.with(|world| {
        let machine = &world.machines[hand.machine];
        let agent = machine.agent.as_ref().ok_or_else(|| Refused("the agent is gone".to_owned()))?;
        let view = &agent.view;
        if view.source != Source::Store || view.lost.is_some() || agent.is_cautious(machine.clock) {
            return refuse("the store is away");
        }
        let identity = agent.ipam.identity().ok().flatten();
        let identity = identity.filter(|identity| identity.standing == Standing::Member);
        let (Some(identity), Some(node)) = (identity, view.nodes.get(&machine.name)) else {
            return refuse("the node is not registered");
        };
        let reserved = |pool: &&Known<Pool>| reservation::serves(&pool.record, &Labels::new());
        let Some(pool) = view.pools.values().find(reserved) else { return refuse("there is no pool") };
        let owner = wanting.pod.to_string();
        let denied = |error: reservation::Denied| Refused(error.to_string());
        let address = reservation::choose(view, pool, &owner).map_err(denied)?;
        let holder = Holder {
            node: identity.node,
            incarnation: identity.incarnation,
            boot_id: machine.boot_id.clone(),
            attachment: wanting.attachment.clone(),
        };
        let is_gone = |last: &Holder| {
            last.attachment == wanting.attachment || agent.ipam.get(&last.attachment).is_none()
        };
        reservation::hand_over(view, address, &owner, &holder, node.revision, &is_gone).map_err(denied)
    })
}
