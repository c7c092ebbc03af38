//! Gives back what nobody gives back.

use std::collections::BTreeSet;

use polder_api::Attachment;
use polder_ipam::missing::Missing;

use super::{GRACE, Hand, service};

/// Frees what plugins took down while the agent was away.
pub async fn take_notes(hand: &Hand) {
    let notes = hand.with(|world| world.machines[hand.machine].notes.clone());
    for attachment in notes {
        if hand.hold(&attachment) {
            take_note(hand, &attachment).await;
            hand.let_go(&attachment);
        }
    }
}

/// Frees what the note about the attachment says, if there is one. For whoever holds the attachment.
pub async fn take_note(hand: &Hand, attachment: &Attachment) {
    if hand.with(|world| world.machines[hand.machine].notes.contains(attachment)) {
        service::release(hand, attachment).await;
        hand.with(|world| world.machines[hand.machine].notes.remove(attachment));
    }
}

/// Runs as long as the agent.
pub async fn run(hand: Hand, leaving: Vec<Attachment>) {
    for attachment in leaving {
        if hand.hold(&attachment) {
            service::release(&hand, &attachment).await;
            hand.let_go(&attachment);
        }
    }
    let mut missing = Missing::default();
    loop {
        let grace = u64::try_from(GRACE.as_millis()).unwrap_or(u64::MAX);
        hand.sleep(grace / 3).await;
        take_notes(&hand).await;
        let gone = look(&hand).await;
        let overdue = hand.with(|world| {
            let machine = &world.machines[hand.machine];
            let agent = machine.agent.as_ref().expect("a task of an agent ends with it");
            missing.observe(&gone, |attachment| agent.in_flight.contains(attachment), GRACE, machine.now())
        });
        for attachment in overdue {
            sweep(&hand, &attachment).await;
        }
    }
}

async fn sweep(hand: &Hand, attachment: &Attachment) {
    if !hand.hold(attachment) {
        return;
    }
    if look(hand).await.contains(attachment) {
        service::release(hand, attachment).await;
    }
    hand.let_go(attachment);
}

/// The attachments that have no interface any more: first the ledger, then the kernel.
async fn look(hand: &Hand) -> BTreeSet<Attachment> {
    let held: Vec<Attachment> =
        hand.ipam(|ipam, _| ipam.attachments().map(|held| held.attachment.clone()).collect());
    hand.turn().await;
    hand.with(|world| {
        let kernel = &world.machines[hand.machine].kernel;
        held.into_iter().filter(|attachment| !kernel.interfaces.contains_key(attachment)).collect()
    })
}
