//! What a registrar does: what its steward says, one step at a time, and claims. It mirrors the agent's registrar.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use polder_api::Family;
use polder_ipam::Pool;
use polder_ipam::attempt::Attempt;
use polder_ipam::change::Change;
use polder_ipam::claim::Claimant;
use polder_ipam::ids::Nonce;
use polder_ipam::ledger::{Identity, OwnedBlock};
use polder_ipam::pool::{BlockRequest, Labels};
use polder_ipam::record::Life;
use polder_ipam::steward::{self, Double, Facts, Presence, Step};
use polder_ipam::view::Source;

use super::action::Errands;
use super::machine::{Errand, Goal, Machine, Sent, Service, Stage, Who};
use super::play::Play;
use super::tally::Happening;

/// Another block of IPv4 addresses.
const WANTED: BlockRequest = BlockRequest::Any(Family::V4, None);

impl Play<'_> {
    /// The next step of a registrar that waits for nothing.
    pub(super) fn decide(&mut self, who: Who) -> bool {
        match &self.cluster.machines[who].agent.registrar {
            None => self.step(who),
            Some(Errand { goal: Goal::Claim { .. }, stage: Stage::Ready }) => self.attempt(who),
            Some(_) => false,
        }
    }

    fn step(&mut self, who: Who) -> bool {
        let step = self.next_step(who);
        self.carry_out(who, step)
    }

    fn next_step(&mut self, who: Who) -> Step {
        let (space, tick) = (self.space, self.cluster.tick);
        let machine = self.machine(who);
        let now = machine.now(tick);
        let view = space.bend(&machine.agent.watcher.view);
        if view.losses != machine.agent.losses {
            machine.agent.losses = view.losses;
            machine.agent.cautious = true;
        }
        space.observe(&mut machine.agent.quarantine, &view, now);
        if !machine.agent.learned && view.source != Source::Nowhere {
            let pools: Vec<Pool> = view.pools.values().map(|pool| (*pool.record).clone()).collect();
            machine.ipam().learn_pools(&pools, &Labels::new()).expect("a ledger in memory");
            machine.agent.learned = true;
        }
        let own = space.bend_own(machine.ipam.own(now).expect("a ledger in memory"));
        let (machine_id, boot_id) = (machine.machine_id(), machine.boot_id());
        let unclaimable = machine.agent.unclaimable.then(|| (Family::V4, "there is none".to_owned()));
        if let Some(step) = space.bend_step(&own, &view, &machine.name, &boot_id) {
            return step;
        }
        steward::next(&Facts {
            me: &machine.name,
            life: Life { machine_id: &machine_id, boot_id: &boot_id },
            proof: space.proof(),
            adopted: machine.agent.adopted.as_ref(),
            labels: &Labels::new(),
            view: &view,
            own: &own,
            presence: &Ok(presence(who)),
            double: machine.agent.double.clone(),
            caution: machine.agent.cautious,
            quarantine: &space.judged(&machine.agent.quarantine, &view),
            unclaimable: &unclaimable.into_iter().collect::<BTreeMap<_, _>>(),
            fresh: &fresh(machine),
            now,
        })
    }

    fn carry_out(&mut self, who: Who, step: Step) -> bool {
        let now = self.cluster.machines[who].now(self.cluster.tick);
        match step {
            Step::Settled | Step::Wait(_) | Step::Bootstrap => self.publish(who, Service::Open),
            Step::Conflict(_) => {
                self.count(Happening::Conflict);
                self.publish(who, Service::Forbidden);
            }
            Step::Removed(_) => self.publish(who, Service::Forbidden),
            Step::Identify(identity) => self.identify(who, &identity),
            // Of an earlier boot nothing is alive; and of another machine nothing is heard, though it may live.
            Step::AskForDouble => {
                let agent = &mut self.machine(who).agent;
                agent.double = Double::None;
                agent.service = Service::Forbidden;
            }
            Step::CutOff => return self.cut_off(who),
            Step::Commit(change) => {
                if matches!(*change, Change::TakeOverNode { .. }) {
                    self.machine(who).ipam().rest_unused(now).expect("a ledger in memory");
                }
                self.write(who, change);
            }
            Step::Own(owned) => {
                self.count(Happening::TakenOver);
                self.adopt_block(who, owned);
            }
            Step::Leave(blocks) => {
                for block in blocks {
                    let _ = self.machine(who).ipam().leave(block, now).expect("a ledger in memory");
                }
            }
            Step::Disown(blocks) => {
                self.count(Happening::GivenBack);
                for block in blocks {
                    self.machine(who).ipam().disown(block).expect("a ledger in memory");
                }
            }
            Step::Claim(wanted) => {
                debug_assert_eq!(wanted, WANTED, "there is one pool to claim from");
                return self.wish(who);
            }
            Step::TakeGateways => drop(self.machine(who).ipam().take_gateways(now)),
            Step::MoveGateway(old) => drop(self.machine(who).ipam().move_gateway(old, now)),
        }
        true
    }

    fn publish(&mut self, who: Who, service: Service) {
        let agent = &mut self.machine(who).agent;
        agent.service = service;
        agent.end_round();
    }

    fn identify(&mut self, who: Who, identity: &Identity) {
        let machine = self.machine(who);
        if identity.incarnation.0 == fresh(machine) {
            machine.lives += 1;
        }
        machine.ipam().identify(identity).expect("a ledger in memory");
    }

    /// Takes all pods away, one after another, and then everything else.
    fn cut_off(&mut self, who: Who) -> bool {
        self.machine(who).agent.service = Service::Forbidden;
        let machine = &self.cluster.machines[who];
        if !machine.leaving().is_empty() {
            return false;
        }
        let first = machine.ipam.attachments().next().map(|held| held.attachment.clone());
        let machine = self.machine(who);
        match first {
            Some(attachment) => drop(machine.ipam().begin_release(&attachment)),
            None => machine.ipam().forget_all().expect("no attachment is left"),
        }
        true
    }

    fn write(&mut self, who: Who, change: Box<Change>) {
        let stage = Stage::UnderWay(self.sent(who, &change));
        self.machine(who).agent.registrar = Some(Errand { goal: Goal::Write(change.into()), stage });
    }

    /// The change of a machine, on its way.
    pub(super) fn sent(&self, who: Who, change: &Change) -> Sent {
        let identity = self.cluster.machines[who].identity();
        Sent {
            attempt: Attempt::new(change),
            by: identity.map(|identity| identity.incarnation),
            confirms: matches!(change, Change::ConfirmRemoval(_)),
            txn: Arc::new(self.space.transaction(change)),
        }
    }

    fn adopt_block(&mut self, who: Who, owned: OwnedBlock) {
        let now = self.cluster.machines[who].now(self.cluster.tick);
        let machine = self.machine(who);
        let view = Arc::clone(&machine.agent.watcher.view);
        let Some(pool) = view.pools.get(&owned.pool) else { return };
        machine.ipam().adopt_block(owned, &pool.record, now).expect("a ledger in memory");
    }

    pub(super) fn add_block(&mut self, who: Who, owned: OwnedBlock) {
        let now = self.cluster.machines[who].now(self.cluster.tick);
        let machine = self.machine(who);
        let view = Arc::clone(&machine.agent.watcher.view);
        let Some(pool) = view.pools.get(&owned.pool) else { return };
        machine.ipam().add_block(owned, &pool.record, now).expect("a ledger in memory");
    }

    /// Begins to claim a block.
    pub(super) fn wish(&mut self, who: Who) -> bool {
        let goal = Goal::Claim { lost: BTreeSet::new(), attempt: None };
        self.machine(who).agent.registrar = Some(Errand { goal, stage: Stage::Ready });
        true
    }

    /// Tries to claim a block.
    fn attempt(&mut self, who: Who) -> bool {
        let machine = Arc::clone(&self.cluster.machines[who]);
        let view = self.space.bend(&machine.agent.watcher.view);
        let Some(Errand { goal: Goal::Claim { lost, .. }, .. }) = &machine.agent.registrar else {
            return false;
        };
        let identity = machine.identity();
        let claimant = Claimant {
            me: &machine.name,
            labels: &Labels::new(),
            identity: identity.as_ref(),
            life: Life { machine_id: &machine.machine_id(), boot_id: &machine.boot_id() },
            view: &view,
            caution: machine.agent.cautious,
        };
        let Ok(claim) = claimant.attempt(&WANTED, lost, Nonce(self.cluster.nonce(who))) else {
            return self.fail(who, Errands::Registrar);
        };
        let owned = OwnedBlock {
            block: claim.block,
            pool: claim.record.pool.clone(),
            nonce: claim.record.nonce.clone(),
            leaving: false,
        };
        let goal = Goal::Claim { lost: lost.clone(), attempt: Some(owned) };
        let stage = Stage::UnderWay(self.sent(who, &claim.into()));
        self.machine(who).agent.registrar = Some(Errand { goal, stage });
        true
    }
}

/// The next name that a machine makes up for itself.
fn fresh(machine: &Machine) -> String {
    format!("{}-i{}", machine.id, machine.lives + 1)
}

fn presence(who: Who) -> Presence {
    let last = u8::try_from(who).expect("there are few machines") + 1;
    Presence {
        underlay: vec![IpAddr::from([192, 0, 2, last])],
        vtep_mac: polder_api::Mac([2, 0, 0, 0, 0, last]),
        mtu: 1450,
        version: "0".to_owned(),
    }
}
