//! Hands reserved addresses over to this node.

use std::net::IpAddr;

use polder_ipam::key::Key;
use polder_ipam::record::{Holder, encode};
use polder_ipam::reservation::{self, HandOver};
use polder_ipam::store::{Outcome, Range};
use polder_ipam::view::Source;

use super::Hand;
use super::service::Wanting;

/// There is no address to be had for the pod now, for this reason.
#[derive(Debug)]
pub struct Refused(pub String);

/// Gets the pod's own address for this node, which is expected from then on until it is used or given up.
pub async fn hand_over(hand: &Hand, wanting: &Wanting) -> Result<Vec<IpAddr>, Refused> {
    let attempt = prepare(hand, wanting)?;
    let address = attempt.address;
    hand.agent(|agent| agent.ipam.expect(address));
    hand.turn().await;
    let is_done = match hand.commit(&attempt.txn).await {
        Ok(Outcome::Applied { revision }) => hand.caught_up(revision).await.is_ok(),
        Ok(Outcome::Refused) => false,
        // Not known: looked up, not tried again.
        Err(_) => {
            let key = Key::Reservation(address).to_string();
            let found = hand.range(Range::single(key)).await.ok().and_then(|mut found| found.entries.pop());
            found.is_some_and(|entry| entry.value == encode(&attempt.record))
        }
    };
    if is_done {
        return Ok(vec![address]);
    }
    hand.agent(|agent| {
        agent.ipam.give_up(address);
        agent.news = true;
    });
    refuse("somebody was faster")
}

fn refuse<T>(why: &str) -> Result<T, Refused> {
    Err(Refused(why.to_owned()))
}

fn prepare(hand: &Hand, wanting: &Wanting) -> Result<HandOver, Refused> {
    hand.with(|world| {
        let machine = &world.machines[hand.machine];
        let agent = machine.agent.as_ref().ok_or_else(|| Refused("not a member".to_owned()))?;
        let view = &agent.view;
        let identity =
            agent.ipam.identity().ok().flatten().ok_or_else(|| Refused("not a member".to_owned()))?;
        let node = view.nodes.get(&machine.name).ok_or_else(|| Refused("not a member".to_owned()))?;
        if view.source != Source::Store || view.lost.is_some() || agent.is_cautious(machine.clock) {
            return refuse("the store is away");
        }
        let reserved = |pool: &&polder_ipam::view::Known<polder_ipam::Pool>| {
            reservation::serves(&pool.record, &polder_ipam::pool::Labels::new())
        };
        let pool = view.pools.values().find(reserved).ok_or_else(|| Refused("not a member".to_owned()))?;
        let owner = wanting.pod.to_string();
        let address = reservation::choose(view, pool, &owner).map_err(|error| Refused(error.to_string()))?;
        let holder = Holder {
            node: machine.name.clone(),
            incarnation: identity.incarnation,
            boot_id: machine.boot_id.clone(),
            attachment: wanting.attachment.clone(),
        };
        let is_gone = |last: &Holder| {
            agent.ipam.get(&last.attachment).is_none() && !agent.in_flight.contains(&last.attachment)
                || last.attachment == wanting.attachment
        };
        reservation::hand_over(view, address, &owner, &holder, node.revision, &is_gone)
            .map_err(|error| Refused(error.to_string()))
    })
}
