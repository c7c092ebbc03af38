//! What an ADD asks of the registrar.

use std::net::IpAddr;
use std::rc::Rc;

use polder_api::Attachment;
use polder_ipam::claim::NoClaim;
use polder_ipam::pool::BlockRequest;
use polder_ipam::tasks::{Unreserved, Workload};

use super::Hand;
use crate::requests::{ClaimRequest, Reply, ReserveRequest};
use crate::task::Wait;

/// How long an ADD waits for another block, or for its reserved address.
const PATIENCE_MS: u64 = 15_000;

/// Asks for another block, and waits for it.
pub async fn claim(hand: &Hand, wanted: BlockRequest) -> Result<(), NoClaim> {
    let reply = Reply::default();
    hand.agent(|agent| {
        agent.claims.push_back(ClaimRequest { wanted, reply: Some(reply.clone()) });
        agent.news = true;
    });
    wait(hand, &reply).await.unwrap_or_else(|| Err(NoClaim::Unavailable("the store is too slow".to_owned())))
}

/// Asks for a reserved address, and waits for it.
pub async fn reserve(
    hand: &Hand,
    wanted: Workload,
    owner: String,
    attachment: Attachment,
) -> Result<IpAddr, Unreserved> {
    let reply = Reply::default();
    hand.agent(|agent| {
        agent.reservations.push_back(ReserveRequest { wanted, owner, attachment, reply: reply.clone() });
        agent.news = true;
    });
    let too_slow = || Err(Unreserved::TryAgain("the store is too slow".to_owned()));
    wait(hand, &reply).await.unwrap_or_else(too_slow)
}

/// Waits for the answer, but not for ever.
async fn wait<T>(hand: &Hand, reply: &Reply<T>) -> Option<T> {
    let until = hand.clock() + PATIENCE_MS;
    while !reply.given.get() {
        if hand.clock() >= until {
            return None;
        }
        hand.wait(Wait::Flag(Rc::clone(&reply.given), hand.epoch)).await;
    }
    reply.answer.borrow_mut().take()
}
