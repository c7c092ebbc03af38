//! What happens to pods: the runtime's calls, and how they go on.

use std::net::IpAddr;

use polder_api::message::{AddRequest, AddressSource};
use polder_api::{Attachment, Mac, Pod};
use polder_ipam::claim::Unavailable;
use polder_ipam::tasks::NotNow;

use super::action::Whose;
use super::cluster::Broken;
use super::flaw::Flaw;
use super::machine::{Container, Machine, Who};
use super::play::Play;
use super::tally::Happening;
use super::task::{Answer, Ended, Job, Stopped, Wait};
use super::{OWNER, RESERVED};

impl Play<'_> {
    /// A new pod; one of the workload that keeps its address, if it is reserved. False if the ADD is refused at once.
    pub(super) fn add(&mut self, who: Who, is_reserved: bool) -> bool {
        let left = &mut self.cluster.left;
        *(if is_reserved { &mut left.reserved } else { &mut left.pods }) -= 1;
        let machine = self.machine(who);
        machine.containers += 1;
        let (container, request) = (machine.containers, request(machine, machine.containers, is_reserved));
        let begun = self.begin(who, Job::Add(request));
        let agent = &self.cluster.machines[who].agent;
        if begun.is_err() && (agent.adding.is_some() || !agent.is_idle()) {
            // It would wait for a registrar that has something else to do: that is the same ADD later.
            return false;
        }
        self.settle_add(who, begun);
        let machine = &self.cluster.machines[who];
        machine.agent.adding.is_some() || machine.plugged.contains_key(&container)
    }

    /// Takes in how far an ADD has come. Its pod has its interface as soon as it has addresses.
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

    /// Lets a registrar that has nothing else to do serve the ADD that waits for it.
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

    /// Lets an ADD go on at once that the registrar has refused something.
    pub(super) fn go_on_refused(&mut self, who: Who) {
        let adding = self.cluster.machines[who].agent.adding.as_ref();
        if adding.is_some_and(|adding| matches!(&adding.wait, Wait::Turn(answer) if answer.is_refusal())) {
            self.go_on(who, Whose::Add);
        }
    }

    /// Lets an ADD wait no longer for its registrar.
    pub(super) fn give_up(&mut self, who: Who) -> bool {
        let agent = &mut self.machine(who).agent;
        let has_waited = agent.answer(Answer::Block(Err(Unavailable::TooSlow.into())))
            || agent.answer(Answer::Address(Err(NotNow::Unavailable(Unavailable::TooSlow).into())));
        self.go_on_refused(who);
        has_waited
    }

    /// Gives a pod its interface.
    fn plug(&mut self, who: Who, attachment: &Attachment, addresses: Vec<IpAddr>) {
        let is_reserved = addresses.contains(&RESERVED);
        if is_reserved {
            self.count(Happening::HandedOver);
        }
        // What belongs to a workload by name goes with it.
        if !is_reserved && addresses.iter().any(|address| self.cluster.warm.contains(address)) {
            self.cluster.breaks(Broken::ReusedWarm);
        }
        let machine = self.machine(who);
        let container = machine.container(attachment).expect("it was begun");
        machine.plugged.insert(container, addresses);
    }

    /// The runtime says that a pod has ended.
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

    /// A new agent finishes what the one before had begun to take away.
    pub(super) fn sweep(&mut self, who: Who) {
        let leaving = self.cluster.machines[who].ipam.attachments().filter(|held| held.leaving);
        let leaving: Vec<_> = leaving.map(|held| held.attachment.clone()).collect();
        if !leaving.is_empty() {
            let begun = self.begin(who, Job::Sweep(leaving));
            self.settle(who, Whose::Sweeper, begun);
        }
    }

    /// Goes on with a task that waits for nothing but its turn.
    pub(super) fn go_on(&mut self, who: Who, whose: Whose) -> bool {
        let agent = &mut self.machine(who).agent;
        let stopped = match whose {
            Whose::Registrar => agent.registrar.take(),
            Whose::Add => agent.adding.take(),
            Whose::Del(container) => agent.deleting.remove(&container),
            Whose::Sweeper => agent.sweeping.take(),
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

    /// Takes in how far a task has come.
    pub(super) fn settle(&mut self, who: Who, whose: Whose, came: Result<Ended, Stopped>) {
        match (whose, came) {
            (Whose::Registrar, came) => self.settle_registrar(who, came),
            (Whose::Add, came) => self.settle_add(who, came),
            (Whose::Del(container), Err(stopped)) => {
                self.machine(who).agent.deleting.insert(container, stopped);
            }
            // From then on it looks for pods that have ended without a word: nobody says of those that they must be gone.
            (Whose::Sweeper, Err(Stopped { wait: Wait::Time, .. })) | (_, Ok(_)) => {}
            (Whose::Sweeper, Err(stopped)) => self.machine(who).agent.sweeping = Some(stopped),
        }
    }
}

/// All pods are of one workload, so that a name says nothing.
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
