//! Tells the store who has which address, and that the node is alive.

use std::pin::{Pin, pin};
use std::task::{Context, Poll};

use polder_ipam::change::Member;
use polder_ipam::invariants::history::check_sign_of_life;
use polder_ipam::key::Range;
use polder_ipam::publication;
use polder_ipam::store::{Outcome, Write};
use polder_ipam::tasks::publisher::synchronize;
use polder_ipam::transaction::transaction;

use super::Hand;
use crate::etcd::{Condition, LeaseId, Operation};

/// The node's record has changed while its addresses were being published.
pub const CANCELLED: &str = "publishing cancelled";

/// Before another attempt.
const RETRY_MS: u64 = 5_000;

/// A node whose agent has not been heard for this long is not alive.
const ALIVE_SECONDS: u64 = 10;

fn own_revision(hand: &Hand) -> i64 {
    hand.with(|world| {
        let machine = &world.machines[hand.machine];
        let agent = machine.agent.as_ref().expect("a task of an agent ends with it");
        let identity = agent.ipam.identity().ok().flatten();
        publication::own_revision(&agent.view, &machine.name, identity.as_ref(), machine.life())
    })
}

/// Keeps the lease of a node that is in its cluster.
pub async fn stay_alive(hand: Hand) {
    loop {
        let revision = own_revision(&hand);
        if revision != 0 {
            renew(&hand, revision);
        }
        hand.sleep(ALIVE_SECONDS * 1_000 / 3).await;
    }
}

fn renew(hand: &Hand, revision: i64) {
    hand.with(|world| {
        let machine = &world.machines[hand.machine];
        if machine.is_cut {
            return;
        }
        let lease = i64::try_from(hand.epoch).unwrap_or(1);
        // Who may read only keeps a lease, and puts nothing under a new one.
        if world.etcd.keep_alive(lease).is_some() || machine.reads_only {
            return;
        }
        let sign = transaction(&publication::sign_of_life(&machine.name, machine.life(), revision));
        let only_if: Vec<Condition> = sign.compares.iter().map(Condition::from).collect();
        let puts: Vec<Operation> = sign.writes.into_iter().map(|write| under(lease, write)).collect();
        let _ = world.etcd.grant(lease, ALIVE_SECONDS);
        if let Ok(Outcome::Applied { .. }) = world.etcd.transact(&only_if, &puts) {
            world.look();
            let machine = &world.machines[hand.machine];
            let record = world.truth.nodes.get(&machine.name).map(|known| &*known.record);
            let wrong = check_sign_of_life(&machine.name, machine.life(), record);
            world.found.extend(wrong);
        }
    });
}

fn under(lease: LeaseId, write: Write) -> Operation {
    match write {
        Write::Put { key, value } => Operation::Put { key, value, lease: Some(lease) },
        Write::Delete { key } => Operation::Delete(Range::single(key)),
    }
}

/// Makes the store say what the ledger says, again and again. Begins anew whenever the node's own record was
/// written, or the store has lost records: also in the middle of it.
pub async fn run(hand: Hand) {
    let mut published = None;
    let mut known = (0, 0);
    loop {
        hand.sleep(1_000).await;
        let now = (own_revision(&hand), hand.view().losses);
        if now != known {
            known = now;
            published = None;
        }
        let (revision, _) = known;
        if revision == 0 || published == Some(hand.ipam(|ipam, _| publication::wanted(ipam.attachments()))) {
            continue;
        }
        let by = Member { node: hand.me().name.clone(), revision };
        let work = pin!(synchronize(&hand, &by, published.take()));
        let ended = Unless { work, is_over: || (own_revision(&hand), hand.view().losses) != now }.await;
        match ended {
            Some(Ok(now)) => published = Some(now),
            Some(Err(_)) => hand.sleep(RETRY_MS).await,
            None => hand.with(|world| world.count(CANCELLED)),
        }
    }
}

/// Goes on with some work, but not once it is over.
struct Unless<'a, F, C> {
    work: Pin<&'a mut F>,
    is_over: C,
}

impl<F: Future, C: Fn() -> bool + Unpin> Future for Unless<'_, F, C> {
    type Output = Option<F::Output>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        if (self.is_over)() {
            return Poll::Ready(None);
        }
        self.work.as_mut().poll(context).map(Some)
    }
}
