//! Claims blocks: one transaction each, tried until one is won or there is none.

use std::collections::BTreeSet;
use std::rc::Rc;

use polder_ipam::Block;
use polder_ipam::claim::{Claim, Claimant, NoClaim};
use polder_ipam::key::{Key, Range};
use polder_ipam::ledger::OwnedBlock;
use polder_ipam::pool::{BlockRequest, Labels};
use polder_ipam::record::BlockRecord;
use polder_ipam::store::Outcome;

use super::Hand;
use crate::requests::{ClaimRequest, Reply};
use crate::task::Wait;

/// Attempts at a block before whoever needs it is told.
const ATTEMPTS: usize = 50;

/// How long an ADD waits for another block.
const PATIENCE_MS: u64 = 15_000;

/// Asks for another block, and waits for it.
pub async fn ask(hand: &Hand, wanted: BlockRequest) -> Result<(), NoClaim> {
    let reply = Reply::default();
    hand.agent(|agent| {
        agent.claims.push_back(ClaimRequest { wanted, reply: Some(reply.clone()) });
        agent.news = true;
    });
    let until = hand.clock() + PATIENCE_MS;
    while !reply.given.get() {
        if hand.clock() >= until {
            return Err(NoClaim::Unavailable("the store is too slow".to_owned()));
        }
        hand.wait(Wait::Flag(Rc::clone(&reply.given), hand.epoch)).await;
    }
    let answer = reply.answer.borrow_mut().take();
    answer.unwrap_or(Ok(()))
}

/// Serves a wish for another block, unless there are free addresses again.
pub async fn serve(hand: &Hand, request: ClaimRequest) {
    let ClaimRequest { wanted, reply } = request;
    let enough = if reply.is_some() { 1 } else { 2 };
    let served = hand.ipam(|ipam, now| match &wanted {
        BlockRequest::Any(family, pool) => ipam.total(*family, pool.as_ref(), now).free >= enough,
        BlockRequest::This(block) => ipam.blocks().iter().any(|owned| owned.block == *block),
    });
    let result = if served { Ok(()) } else { claim(hand, wanted).await };
    if let Some(reply) = reply {
        *reply.answer.borrow_mut() = Some(result);
        reply.given.set(true);
    }
}

/// Claims a block.
pub async fn claim(hand: &Hand, wanted: BlockRequest) -> Result<(), NoClaim> {
    let mut lost: BTreeSet<Block> = BTreeSet::new();
    for _ in 0..ATTEMPTS {
        hand.turn().await;
        let nonce = hand.nonce();
        let claim = hand.with(|world| {
            let machine = &world.machines[hand.machine];
            let agent = machine.agent.as_ref().expect("a task of an agent ends with it");
            let identity = agent.ipam.identity()?;
            let claimant = Claimant {
                me: &machine.name,
                labels: &Labels::new(),
                identity: identity.as_ref(),
                life: machine.life(),
                view: &agent.view,
                caution: agent.is_cautious(machine.clock),
            };
            claimant.attempt(&wanted, &lost, nonce)
        })?;
        if commit(hand, &claim).await? {
            let view = hand.view();
            let BlockRecord { pool, nonce, .. } = claim.record;
            if let Some(pool) = view.pools.get(&pool) {
                let owned =
                    OwnedBlock { block: claim.block, pool: pool.record.name.clone(), nonce, leaving: false };
                hand.ipam(|ipam, now| ipam.add_block(owned, &pool.record, now))?;
            }
            return Ok(());
        }
        lost.insert(claim.block);
    }
    Err(NoClaim::Unavailable("attempts were lost to other nodes".to_owned()))
}

/// Carries out a claim; true if it is ours. An outcome that is not known is looked up, not tried again. A refusal ends the
/// attempt.
async fn commit(hand: &Hand, claim: &Claim) -> Result<bool, NoClaim> {
    match hand.commit(&claim.txn).await {
        Ok(Outcome::Applied { revision }) => {
            hand.caught_up(revision).await?;
            Ok(true)
        }
        Ok(Outcome::Refused) => Ok(false),
        Err(error) => {
            if error.needs_look() {
                let range = Range::single(Key::Block(claim.block).to_string());
                let Ok(found) = hand.range(range).await else { return Err(error.into()) };
                if claim.is_made(found.entries.first()) {
                    return Ok(true);
                }
            }
            if error.is_unknown() { Ok(false) } else { Err(error.into()) }
        }
    }
}
