//! Carries out what the steward decides.

use std::collections::BTreeMap;

use polder_api::{Attachment, Family, NodeName};
use polder_ipam::Pool;
use polder_ipam::key::{Key, Range};
use polder_ipam::ledger::OwnedBlock;
use polder_ipam::pool::{BlockRequest, Labels};
use polder_ipam::record::{Life, encode};
use polder_ipam::steward::{self, Double, Facts, Presence, Purpose, Step};
use polder_ipam::store::{Compare, LARGEST_TXN, Outcome, Txn, Write};
use polder_ipam::view::{Settings, Source};

use super::{Hand, claims, reservations, service};
use crate::settings;
use crate::task::Wait;

/// Between looks while something is waited for that no record announces.
const RETRY_MS: u64 = 5_000;

/// Steps in a row before others get a turn.
const STEPS: usize = 64;

/// How long nothing is claimed after the store has lost records.
pub const CAUTION_MS: u64 = 60_000;

/// Why a step was not carried out: it is tried again.
struct Waiting;

impl<E: std::error::Error> From<E> for Waiting {
    fn from(_: E) -> Self {
        Self
    }
}

/// Runs as long as the agent.
pub async fn run(hand: Hand) {
    loop {
        hand.agent(|agent| agent.news = false);
        // A node that must not serve does not begin to because a step failed.
        if let Ok(forbids) = round(&hand).await {
            hand.agent(|agent| agent.forbids = forbids);
        }
        hand.wait(Wait::News(hand.clock() + RETRY_MS)).await;
        while let Some(request) = hand.agent(|agent| agent.claims.pop_front()) {
            claims::serve(&hand, request).await;
        }
        if let Some(request) = hand.agent(|agent| agent.reservations.pop_front()) {
            reservations::serve(&hand, request).await;
            hand.agent(|agent| agent.news = true);
        }
    }
}

/// Does what there is to do, step by step. Returns why the node must not serve, if it must not.
async fn round(hand: &Hand) -> Result<Option<String>, Waiting> {
    let (mut unclaimable, mut is_proven) = (BTreeMap::new(), false);
    hand.agent(|agent| agent.double = Double::Unasked);
    for _ in 0..STEPS {
        hand.turn().await;
        let step = next_step(hand, &unclaimable)?;
        is_proven |= step.rests_on_identity();
        hand.note(|| format!("steward: {}", brief(&step)));
        match step {
            // Before any record was read, the node may be another machine's.
            Step::Wait(reason) if hand.view().source == Source::Nowhere => return Ok(Some(reason)),
            Step::Settled | Step::Wait(_) => return Ok(None),
            Step::Conflict(reason) | Step::Removed(reason) => return Ok(Some(reason)),
            Step::Claim(BlockRequest::Any(family, pool)) => {
                if let Err(error) = claims::claim(hand, BlockRequest::Any(family, pool)).await {
                    unclaimable.insert(family, error.to_string());
                }
            }
            step @ Step::Identify(_) => {
                if carry_out(hand, step).await.is_err() {
                    return Ok(Some("who this node is cannot be written down".to_owned()));
                }
            }
            Step::AskForDouble => {
                // Until that is known, another machine may be the node.
                let asking = "whether another machine is this node is not known".to_owned();
                hand.agent(|agent| agent.forbids.get_or_insert_with(|| asking.clone()).clone());
                let Ok(double) = ask_for_double(hand).await else { return Ok(Some(asking)) };
                hand.agent(|agent| agent.double = double);
            }
            step => match carry_out(hand, step).await {
                Err(Waiting) if !is_proven => return Err(Waiting),
                Err(Waiting) => return Ok(None),
                Ok(()) => {}
            },
        }
    }
    Ok(None)
}

fn brief(step: &Step) -> String {
    match step {
        Step::Commit(purpose, _) => format!("{purpose:?}"),
        other => format!("{other:?}"),
    }
}

fn next_step(hand: &Hand, unclaimable: &BTreeMap<Family, String>) -> Result<Step, Waiting> {
    let fresh = hand.fresh();
    hand.with(|world| {
        let proof = world.proof();
        let machine = &mut world.machines[hand.machine];
        let (clock, now) = (machine.clock, machine.now());
        let agent = machine.agent.as_mut().ok_or(Waiting)?;
        if agent.view.losses != agent.losses {
            agent.losses = agent.view.losses;
            agent.caution_until = Some(clock + CAUTION_MS);
        }
        agent.quarantine.observe(&agent.view, now);
        let pools: Vec<Pool> = agent.view.pools.values().map(|pool| (*pool.record).clone()).collect();
        agent.ipam.learn_pools(&pools, &Labels::new())?;
        let own = agent.ipam.own(now)?;
        let presence = Presence {
            underlay: vec![
                std::net::Ipv4Addr::new(192, 0, 2, 1 + u8::try_from(hand.machine).unwrap_or(0)).into(),
            ],
            vtep_mac: polder_api::Mac([2, 0, 0, 0, 0, 1 + u8::try_from(hand.machine).unwrap_or(0)]),
            mtu: 1450,
            version: "0".to_owned(),
        };
        let step = steward::next(&Facts {
            me: &machine.name,
            life: Life { machine_id: &machine.machine_id, boot_id: &machine.boot_id },
            proof,
            adopted: agent.adopted.as_ref(),
            labels: &Labels::new(),
            view: &agent.view,
            own: &own,
            presence: &Ok(presence),
            double: agent.double.clone(),
            caution: agent.is_cautious(clock),
            quarantine: &agent.quarantine,
            unclaimable,
            fresh: &fresh,
            now,
        });
        agent.last_step = brief(&step);
        Ok(step)
    })
}

async fn carry_out(hand: &Hand, step: Step) -> Result<(), Waiting> {
    match step {
        Step::Bootstrap => bootstrap(hand).await?,
        Step::Identify(identity) => hand.ipam(|ipam, _| ipam.identify(&identity))?,
        Step::CutOff => cut_off(hand).await?,
        Step::Commit(purpose, txn) => {
            if purpose == Purpose::TakeOver {
                hand.ipam(polder_ipam::node::NodeIpam::rest_unused)?;
            }
            match hand.commit(&txn).await? {
                Outcome::Applied { revision } => {
                    if let Purpose::Inherit(node) = purpose {
                        forget_addresses(hand, node).await?;
                    }
                    hand.caught_up(revision).await?;
                }
                Outcome::Refused => return Err(Waiting),
            }
        }
        Step::Own(owned) => own(hand, owned)?,
        Step::Leave(blocks) => {
            for block in blocks {
                hand.ipam(|ipam, now| ipam.leave(block, now))?;
            }
        }
        Step::Disown(blocks) => {
            for block in blocks {
                hand.ipam(|ipam, _| ipam.disown(block))?;
            }
        }
        Step::TakeGateways => drop(hand.ipam(polder_ipam::node::NodeIpam::take_gateways)?),
        Step::MoveGateway(old) => drop(hand.ipam(|ipam, now| ipam.move_gateway(old, now))?),
        Step::Settled
        | Step::Wait(_)
        | Step::Conflict(_)
        | Step::Removed(_)
        | Step::AskForDouble
        | Step::Claim(_) => {}
    }
    Ok(())
}

fn own(hand: &Hand, owned: OwnedBlock) -> Result<(), Waiting> {
    let view = hand.view();
    let Some(pool) = view.pools.get(&owned.pool) else { return Ok(()) };
    Ok(hand.ipam(|ipam, now| ipam.adopt_block(owned, &pool.record, now))?)
}

async fn ask_for_double(hand: &Hand) -> Result<Double, Waiting> {
    let name = hand.with(|world| world.machines[hand.machine].name.clone());
    let found = hand.range(Range::single(Key::Alive(name).to_string())).await?;
    Ok(hand.with(|world| Double::read(found.entries.first(), world.machines[hand.machine].life())))
}

/// Takes away all pods of this node, and forgets what it owned.
async fn cut_off(hand: &Hand) -> Result<(), Waiting> {
    // A node that was removed breaks its promises.
    hand.with(|world| world.machines[hand.machine].promised.clear());
    hand.agent(|agent| agent.forbids = Some("the node was removed".to_owned()));
    let attachments: Vec<Attachment> =
        hand.ipam(|ipam, _| ipam.attachments().map(|held| held.attachment.clone()).collect());
    for attachment in attachments {
        if !service::del(hand, &attachment).await {
            return Err(Waiting);
        }
    }
    hand.with(|world| world.machines[hand.machine].kernel.gateways.clear());
    hand.turn().await;
    let identity = hand.ipam(|ipam, _| ipam.identity())?;
    hand.ipam(|ipam, _| ipam.forget_all())?;
    let me = hand.with(|world| world.machines[hand.machine].name.clone());
    forget_addresses(hand, identity.map_or(me, |identity| identity.node)).await
}

/// Deletes what the store says of the addresses of a removed node, unless there is another of its name by now.
async fn forget_addresses(hand: &Hand, node: NodeName) -> Result<(), Waiting> {
    let contents = hand.range(Key::addresses_of(&node)).await?;
    for entries in contents.entries.chunks(LARGEST_TXN) {
        let deletes = entries.iter().map(|entry| Write::Delete { key: entry.key.clone() });
        let compares = vec![Compare::absent(&Key::Node(node.clone()))];
        hand.commit(&Txn { compares, writes: deletes.collect() }).await?;
    }
    Ok(())
}

/// Writes the settings of a cluster that has none.
async fn bootstrap(hand: &Hand) -> Result<(), Waiting> {
    let view = hand.view();
    if view.source != Source::Store {
        return Err(Waiting);
    }
    let identity = hand.ipam(|ipam, _| ipam.identity())?;
    let is_ours =
        |lost: &&Settings| identity.as_ref().is_some_and(|identity| identity.cluster == lost.cluster.id);
    let (record, pools): (_, Vec<Pool>) = match view.remembered.as_ref().filter(is_ours) {
        Some(lost) => ((*lost.cluster).clone(), lost.pools.iter().map(|pool| (**pool).clone()).collect()),
        None => {
            let mut settings = settings::first_settings();
            if let Some(identity) = identity {
                settings.id = identity.cluster;
            }
            (settings, hand.with(|world| world.first_pools.clone()))
        }
    };
    let put = |key: Key, value| Write::Put { key: key.to_string(), value };
    let mut txn = Txn {
        compares: vec![Compare::absent(&Key::Cluster)],
        writes: vec![put(Key::Cluster, encode(&record))],
    };
    if view.pools.is_empty() {
        txn.compares.push(Compare::Empty(Key::all_pools()));
        let record = |pool: &Pool| encode(&polder_ipam::record::PoolRecord::from(pool));
        txn.writes.extend(pools.iter().map(|pool| put(Key::Pool(pool.name.clone()), record(pool))));
    }
    match hand.commit(&txn).await? {
        Outcome::Applied { revision } => hand.caught_up(revision).await?,
        Outcome::Refused => return Err(Waiting),
    }
    Ok(())
}
