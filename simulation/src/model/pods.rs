//! Pod events: the calls of the runtime, and how their tasks continue.

use std::net::IpAddr;

use polder_api::message::{AddRequest, AddressSource};
use polder_api::{Attachment, Mac, Pod};
use polder_ipam::claim::Unavailable;
use polder_ipam::tasks::RetryReason;

use super::action::Whose;
use super::cluster::Broken;
use super::flaw::Flaw;
use super::machine::{Container, Machine, Who};
use super::play::Play;
use super::tally::Happening;
use super::task::{Answer, Ended, Job, Stopped, Wait};
use super::{OWNER, RESERVED};

impl Play<'_> {
    /// ADD of a new pod, with the reserved address if `is_reserved`. Returns false if the ADD is refused immediately.
    pub(super) fn add(&mut self, who: Who, is_reserved: bool) -> bool {
        let left = &mut self.cluster.left;
        *(if is_reserved { &mut left.reserved } else { &mut left.pods }) -= 1;
        let machine = self.machine(who);
        machine.containers += 1;
        let (container, request) = (machine.containers, request(machine, machine.containers, is_reserved));
        let begun = self.begin(who, Job::Add(request));
        let agent = &self.cluster.machines[who].agent;
        if begun.is_err() && (agent.adding.is_some() || !agent.is_idle()) {
            // It would wait for a busy registrar: that state is the same as a later ADD.
            return false;
        }
        self.settle_add(who, begun);
        let machine = &self.cluster.machines[who];
        machine.agent.adding.is_some() || machine.plugged.contains_key(&container)
    }

    /// Records the progress of an ADD. The pod has its interface as soon as it has addresses.
    fn settle_add(&mut self, who: Who, came: Result<Ended, Stopped>) {
        match came {
            Ok(Ended::Added(attachment, addresses)) => self.plug(who, &attachment, addresses),
            Ok(_) => {}
            Err(stopped) => {
                self.machine(who).agent.adding = Some(stopped);
                if self.cluster.machines[who].agent.is_idle() {
                    self.ask(who);
                }
            }
        }
    }

    /// Lets an idle registrar serve the waiting ADD.
    pub(super) fn ask(&mut self, who: Who) -> bool {
        let Some(Stopped { job, wait, .. }) = &self.cluster.machines[who].agent.adding else { return false };
        let Job::Add(AddRequest { attachment, .. }) = &**job else { return false };
        let job = match wait {
            Wait::Block(wanted) => Job::Serve { wanted: wanted.clone(), for_add: true },
            Wait::Address(wanted) => Job::HandOver(wanted.clone(), attachment.clone()),
            _ => return false,
        };
        self.start(who, job)
    }

    /// Continues an ADD immediately if the registrar has refused its request.
    pub(super) fn go_on_refused(&mut self, who: Who) {
        let adding = self.cluster.machines[who].agent.adding.as_ref();
        if adding.is_some_and(|adding| matches!(&adding.wait, Wait::Turn(answer) if answer.is_refusal())) {
            self.go_on(who, Whose::Add);
        }
    }

    /// Lets the ADD time out while it waits for the registrar.
    pub(super) fn give_up(&mut self, who: Who) -> bool {
        let agent = &mut self.machine(who).agent;
        let has_waited = agent.answer(Answer::Block(Err(Unavailable::TooSlow.into())))
            || agent.answer(Answer::Address(Err(RetryReason::Unavailable(Unavailable::TooSlow).into())));
        self.go_on_refused(who);
        has_waited
    }

    /// Creates the interface of a pod.
    fn plug(&mut self, who: Who, attachment: &Attachment, addresses: Vec<IpAddr>) {
        let is_reserved = addresses.contains(&RESERVED);
        if is_reserved {
            self.count(Happening::HandedOver);
        }
        // A reserved address needs no cool-down: it follows its workload.
        if !is_reserved && addresses.iter().any(|address| self.cluster.warm.contains(address)) {
            self.cluster.breaks(Broken::ReusedWarm);
        }
        let machine = self.machine(who);
        let container = machine.container(attachment).expect("it was begun");
        machine.plugged.insert(container, addresses);
    }

    /// The runtime calls DEL for a pod.
    pub(super) fn del(&mut self, who: Who, container: Container) -> bool {
        let machine = &self.cluster.machines[who];
        let whose = machine.attachment(container);
        let mut attachment = whose.clone();
        if self.space.flaw == Some(Flaw::MatchesByName) {
            let first = machine.ipam.attachments().next();
            attachment = first.map_or(attachment, |held| held.attachment.clone());
        }
        if machine.ipam.get(&attachment).is_none() && !machine.plugged.contains_key(&container) {
            return false;
        }
        let before = machine.others(whose);
        let begun = self.begin(who, Job::Del(attachment));
        if self.cluster.machines[who].others(whose) != before {
            self.cluster.breaks(Broken::FreedAnothers);
        }
        self.settle(who, Whose::Del(container), begun);
        true
    }

    /// A new agent finishes the DELs of the previous one.
    pub(super) fn sweep(&mut self, who: Who) {
        let leaving = self.cluster.machines[who].ipam.attachments().filter(|held| held.leaving);
        let leaving: Vec<_> = leaving.map(|held| held.attachment.clone()).collect();
        if !leaving.is_empty() {
            let begun = self.begin(who, Job::Sweep(leaving));
            self.settle(who, Whose::OrphanCollector, begun);
        }
    }

    /// Continues a task that waits only for its turn.
    pub(super) fn go_on(&mut self, who: Who, whose: Whose) -> bool {
        let agent = &mut self.machine(who).agent;
        let stopped = match whose {
            Whose::Registrar => agent.registrar.take(),
            Whose::Add => agent.adding.take(),
            Whose::Del(container) => agent.deleting.remove(&container),
            Whose::OrphanCollector => agent.sweeping.take(),
        };
        let Some(stopped) = stopped else { return false };
        let answer = match &stopped.wait {
            Wait::Turn(answer) => (**answer).clone(),
            Wait::CaughtUp(_) => Answer::CaughtUp(Ok(())),
            _ => Answer::GoOn,
        };
        let resumed = self.resume(who, stopped, answer);
        self.settle(who, whose, resumed);
        true
    }

    /// Records the progress of a task.
    pub(super) fn settle(&mut self, who: Who, whose: Whose, came: Result<Ended, Stopped>) {
        match (whose, came) {
            (Whose::Registrar, came) => self.settle_registrar(who, came),
            (Whose::Add, came) => self.settle_add(who, came),
            (Whose::Del(container), Err(stopped)) => {
                self.machine(who).agent.deleting.insert(container, stopped);
            }
            // The orphan collector looks for pods that ended without a DEL. No property requires their removal.
            (Whose::OrphanCollector, Err(Stopped { wait: Wait::Time, .. })) | (_, Ok(_)) => {}
            (Whose::OrphanCollector, Err(stopped)) => self.machine(who).agent.sweeping = Some(stopped),
        }
    }
}

/// All pods belong to one workload, so that the pod name does not identify a pod.
fn request(machine: &Machine, container: Container, is_reserved: bool) -> AddRequest {
    let (namespace, name) = OWNER.split_once('/').expect("a namespace and a name");
    let addresses = if is_reserved { vec![RESERVED] } else { Vec::new() };
    AddRequest {
        attachment: machine.attachment(container).clone(),
        netns: String::new(),
        pod: Some(Pod { namespace: namespace.to_owned(), name: name.to_owned(), uid: None }),
        source: AddressSource::Pools { pool: None, addresses },
        mac: Some(Mac([2, 0, 0, 0, 1, container])),
        mtu: None,
    }
}
