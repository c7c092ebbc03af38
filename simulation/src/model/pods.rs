//! What happens to pods: the runtime's calls, and how the agent answers them. It mirrors the agent's service.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use polder_api::{Family, Mac, Pod};
use polder_ipam::allocator::Rest;
use polder_ipam::claim::next_block;
use polder_ipam::ledger::{Kind, Standing};
use polder_ipam::node::{AllocateError, Source, Wish};
use polder_ipam::pool::{BlockRequest, Labels};
use polder_ipam::record::{Holder, PodsGone};
use polder_ipam::reservation::{Denied, hand_over};
use polder_ipam::view;

use super::cluster::Broken;
use super::flaw::Flaw;
use super::machine::{Container, Errand, Goal, Machine, Service, Stage, Who};
use super::play::Play;
use super::tally::Happening;
use super::{OWNER, RESERVED};

impl Play<'_> {
    /// A new pod.
    pub(super) fn add(&mut self, who: Who) -> bool {
        if !is_ready(&self.cluster.machines[who]) {
            return false;
        }
        let tick = self.cluster.tick;
        let machine = self.machine(who);
        let (now, container) = (machine.now(tick), machine.containers + 1);
        let wish = wish(machine, container, Vec::new());
        let mut allocated = machine.ipam().allocate(wish.clone(), Rest::Full, now);
        if let Err(AllocateError::Shortage { .. }) = allocated {
            let view = Arc::clone(&machine.agent.watcher.view);
            let wanted = BlockRequest::Any(Family::V4, None);
            if next_block(&view, &machine.name, &Labels::new(), &wanted, &BTreeSet::new()).is_ok() {
                return machine.agent.is_idle() && self.wish(who);
            }
            allocated = machine.ipam().allocate(wish, Rest::Shortest, now);
        }
        let Ok(held) = allocated else { return false };
        machine.containers = container;
        self.cluster.left.pods -= 1;
        self.plug(who, container, held.addresses, false);
        true
    }

    /// A new pod of the workload that keeps its address.
    pub(super) fn add_reserved(&mut self, who: Who) -> bool {
        let machine = Arc::clone(&self.cluster.machines[who]);
        if !is_ready(&machine) {
            return false;
        }
        let view = self.space.bend_holders(&machine.agent.watcher.view);
        if view.source != view::Source::Store || machine.agent.cautious {
            return false;
        }
        let identity = machine.identity().filter(|identity| identity.standing == Standing::Member);
        let (Some(identity), Some(node)) = (identity, view.nodes.get(&machine.name)) else {
            return false;
        };
        let container = machine.containers + 1;
        let holder = Holder {
            node: machine.name.clone(),
            incarnation: identity.incarnation,
            boot_id: machine.boot_id(),
            attachment: machine.attachment(container).clone(),
        };
        let is_gone = |last: &Holder| machine.ipam.get(&last.attachment).is_none();
        match hand_over(&view, RESERVED, OWNER, &holder, node.revision, &is_gone) {
            Err(Denied::Held { .. }) => {
                self.count(Happening::Denied);
                false
            }
            Err(_) => false,
            Ok(prepared) => {
                let address = prepared.address;
                self.note_hand_over(who);
                self.cluster.left.reserved -= 1;
                let stage = Stage::UnderWay(self.sent(who, &prepared.into()));
                let machine = self.machine(who);
                machine.containers = container;
                let attachment = machine.attachment(container);
                machine.ipam().expect(address, attachment);
                machine.agent.adding = Some(Errand { goal: Goal::HandOver { container, address }, stage });
                true
            }
        }
    }

    fn note_hand_over(&self, who: Who) {
        let view = &self.cluster.machines[who].agent.watcher.view;
        let Some(last) = view.reservations.get(&RESERVED).and_then(|known| known.record.holder.as_ref())
        else {
            return;
        };
        let fence = view.fences.get(&last.incarnation);
        if fence.is_some_and(|fence| fence.record.pods != PodsGone::Unknown) {
            self.count(Happening::HandedOverRemoved);
        } else if view.nodes.get(&last.node).is_some_and(|node| node.record.boot_id != last.boot_id) {
            self.count(Happening::HandedOverRebooted);
        }
    }

    /// Gives the address to the pod that it was handed over for.
    pub(super) fn allocate_reserved(&mut self, who: Who, container: Container, address: IpAddr) -> bool {
        let tick = self.cluster.tick;
        let machine = self.machine(who);
        let now = machine.now(tick);
        let wish = wish(machine, container, vec![address]);
        match machine.ipam().allocate(wish, Rest::Full, now) {
            Ok(held) => {
                self.count(Happening::HandedOver);
                self.plug(who, container, held.addresses, true);
            }
            Err(_) => {
                let attachment = machine.attachment(container);
                machine.ipam().give_up(address, attachment);
            }
        }
        true
    }

    /// The runtime says that a pod has ended.
    pub(super) fn del(&mut self, who: Who, container: Container) -> bool {
        let mut attachment = self.cluster.machines[who].attachment(container).clone();
        if self.space.flaw == Some(Flaw::MatchesByName) {
            let first = self.cluster.machines[who].ipam.attachments().next();
            attachment = first.map_or(attachment, |held| held.attachment.clone());
        }
        let machine = self.machine(who);
        let others = |machine: &Machine| {
            let keep = machine.attachment(container);
            let others = machine.ipam.attachments().filter(|held| held.attachment != *keep);
            others.cloned().collect::<Vec<_>>()
        };
        let before = others(machine);
        let (held, _) = machine.ipam().begin_release(&attachment);
        if others(machine) != before {
            self.cluster.breaks(Broken::FreedAnothers);
            return true;
        }
        if held.is_some() {
            return true;
        }
        // Its interface goes, if there is one that the ledger does not know.
        self.cluster.machines[who].plugged.contains_key(&container) && self.unplug(who, container)
    }

    /// The next step of taking a pod away: first its interface, then its addresses.
    pub(super) fn release(&mut self, who: Who, container: Container) -> bool {
        let is_plugged = self.cluster.machines[who].plugged.contains_key(&container);
        if is_plugged && self.space.flaw != Some(Flaw::FreesFirst) {
            return self.unplug(who, container);
        }
        let tick = self.cluster.tick;
        let machine = self.machine(who);
        let (now, attachment) = (machine.now(tick), machine.attachment(container));
        let count = machine.ipam.attachments().count();
        machine.ipam().release(attachment, now).expect("a ledger in memory");
        if machine.ipam.attachments().count() + 1 != count {
            self.cluster.breaks(Broken::FreedAnothers);
        }
        true
    }
}

/// Whether an ADD is served at all.
fn is_ready(machine: &Machine) -> bool {
    let has_settings = machine.agent.watcher.view.cluster.is_some() && machine.identity().is_some();
    machine.agent.service == Service::Open && has_settings && !machine.ipam.gateways().is_empty()
}

/// All pods are of one workload, so that a name says nothing.
fn wish(machine: &Machine, container: Container, reserved: Vec<IpAddr>) -> Wish {
    let (namespace, name) = OWNER.split_once('/').expect("a namespace and a name");
    Wish {
        attachment: machine.attachment(container).clone(),
        kind: Kind::Pod,
        source: Source::Blocks { families: vec![Family::V4], pool: None, requested: Vec::new(), reserved },
        mac: Some(Mac([2, 0, 0, 0, 1, container])),
        mtu: 1450,
        netns: String::new(),
        pod: Some(Pod { namespace: namespace.to_owned(), name: name.to_owned(), uid: None }),
    }
}
