//! Pod events: the calls of the runtime, and how their tasks continue.

use std::net::IpAddr;

use polder_api::message::{AddRequest, AddressSource};
use polder_api::{Attachment, Mac, Pod};
use polder_ipam::claim::Unavailable;
use polder_ipam::tasks::RetryReason;

use super::action::TaskKind;
use super::cluster::Violation;
use super::flaw::Flaw;
use super::machine::{Container, Machine, MachineIndex};
use super::tally::Occurrence;
use super::task::{Answer, Job, Stopped, TaskResult, Wait};
use super::transition::Transition;
use super::{OWNER, RESERVED};

impl Transition<'_> {
    /// ADD of a new pod, with the reserved address if `is_reserved`. Returns false if the ADD is refused immediately.
    pub(super) fn add(&mut self, index: MachineIndex, is_reserved: bool) -> bool {
        let remaining = &mut self.cluster.remaining;
        *(if is_reserved { &mut remaining.reserved } else { &mut remaining.pods }) -= 1;
        let machine = self.machine(index);
        machine.containers += 1;
        let (container, request) = (machine.containers, request(machine, machine.containers, is_reserved));
        let begun = self.begin_task(index, Job::Add(request));
        let agent = &self.cluster.machines[index].agent;
        if begun.is_err() && (agent.adding.is_some() || !agent.is_idle()) {
            // It would wait for a busy registrar: that state is the same as a later ADD.
            return false;
        }
        self.record_add_progress(index, begun);
        let machine = &self.cluster.machines[index];
        machine.agent.adding.is_some() || machine.plugged.contains_key(&container)
    }

    /// Records the progress of an ADD. The pod has its interface as soon as it has addresses.
    fn record_add_progress(&mut self, index: MachineIndex, result: Result<TaskResult, Stopped>) {
        match result {
            Ok(TaskResult::Added(attachment, addresses)) => self.plug(index, &attachment, addresses),
            Ok(_) => {}
            Err(stopped) => {
                self.machine(index).agent.adding = Some(stopped);
                if self.cluster.machines[index].agent.is_idle() {
                    self.serve_add(index);
                }
            }
        }
    }

    /// Lets an idle registrar serve the waiting ADD.
    pub(super) fn serve_add(&mut self, index: MachineIndex) -> bool {
        let Some(Stopped { job, wait, .. }) = &self.cluster.machines[index].agent.adding else {
            return false;
        };
        let Job::Add(AddRequest { attachment, .. }) = &**job else { return false };
        let job = match wait {
            Wait::Block(wanted) => Job::Serve { wanted: wanted.clone(), for_add: true },
            Wait::Address(wanted) => Job::HandOver(wanted.clone(), attachment.clone()),
            _ => return false,
        };
        self.start_registrar_task(index, job)
    }

    /// Continues an ADD immediately if the registrar has refused its request.
    pub(super) fn continue_refused_add(&mut self, index: MachineIndex) {
        let adding = self.cluster.machines[index].agent.adding.as_ref();
        if adding.is_some_and(|adding| matches!(&adding.wait, Wait::Turn(answer) if answer.is_refusal())) {
            self.continue_task(index, TaskKind::Add);
        }
    }

    /// Lets the ADD time out while it waits for the registrar.
    pub(super) fn time_out_add(&mut self, index: MachineIndex) -> bool {
        let agent = &mut self.machine(index).agent;
        let has_waited = agent.answer(Answer::Block(Err(Unavailable::TooSlow.into())))
            || agent.answer(Answer::Address(Err(RetryReason::Unavailable(Unavailable::TooSlow).into())));
        self.continue_refused_add(index);
        has_waited
    }

    /// Creates the interface of a pod.
    fn plug(&mut self, index: MachineIndex, attachment: &Attachment, addresses: Vec<IpAddr>) {
        let is_reserved = addresses.contains(&RESERVED);
        if is_reserved {
            self.count(Occurrence::HandedOver);
        }
        // A reserved address needs no cool-down: it follows its workload.
        if !is_reserved && addresses.iter().any(|address| self.cluster.in_cool_down.contains(address)) {
            self.cluster.record_violation(Violation::ReusedInCoolDown);
        }
        let machine = self.machine(index);
        let container = machine.container(attachment).expect("it was begun");
        machine.plugged.insert(container, addresses);
    }

    /// The runtime calls DEL for a pod.
    pub(super) fn del(&mut self, index: MachineIndex, container: Container) -> bool {
        let machine = &self.cluster.machines[index];
        let own = machine.attachment(container);
        let mut attachment = own.clone();
        if self.space.flaw == Some(Flaw::MatchesByName) {
            let first = machine.ipam.attachments().next();
            attachment = first.map_or(attachment, |held| held.attachment.clone());
        }
        if machine.ipam.get(&attachment).is_none() && !machine.plugged.contains_key(&container) {
            return false;
        }
        let before = machine.others(own);
        let begun = self.begin_task(index, Job::Del(attachment));
        if self.cluster.machines[index].others(own) != before {
            self.cluster.record_violation(Violation::ReleasedOthers);
        }
        self.record_progress(index, TaskKind::Del(container), begun);
        true
    }

    /// A new agent finishes the DELs of the previous one.
    pub(super) fn sweep(&mut self, index: MachineIndex) {
        let leaving = self.cluster.machines[index].ipam.attachments().filter(|held| held.leaving);
        let leaving: Vec<_> = leaving.map(|held| held.attachment.clone()).collect();
        if !leaving.is_empty() {
            let begun = self.begin_task(index, Job::Sweep(leaving));
            self.record_progress(index, TaskKind::OrphanCollector, begun);
        }
    }

    /// Continues a task that waits only for its turn.
    pub(super) fn continue_task(&mut self, index: MachineIndex, task: TaskKind) -> bool {
        let agent = &mut self.machine(index).agent;
        let stopped = match task {
            TaskKind::Registrar => agent.registrar.take(),
            TaskKind::Add => agent.adding.take(),
            TaskKind::Del(container) => agent.deleting.remove(&container),
            TaskKind::OrphanCollector => agent.sweeping.take(),
        };
        let Some(stopped) = stopped else { return false };
        let answer = match &stopped.wait {
            Wait::Turn(answer) => (**answer).clone(),
            Wait::CaughtUp(_) => Answer::CaughtUp(Ok(())),
            _ => Answer::Continue,
        };
        let resumed = self.resume(index, stopped, answer);
        self.record_progress(index, task, resumed);
        true
    }

    /// Records the progress of a task.
    pub(super) fn record_progress(
        &mut self,
        index: MachineIndex,
        task: TaskKind,
        result: Result<TaskResult, Stopped>,
    ) {
        match (task, result) {
            (TaskKind::Registrar, result) => self.record_registrar_progress(index, result),
            (TaskKind::Add, result) => self.record_add_progress(index, result),
            (TaskKind::Del(container), Err(stopped)) => {
                self.machine(index).agent.deleting.insert(container, stopped);
            }
            // The orphan collector looks for pods that ended without a DEL. No property requires their removal.
            (TaskKind::OrphanCollector, Err(Stopped { wait: Wait::Time, .. })) | (_, Ok(_)) => {}
            (TaskKind::OrphanCollector, Err(stopped)) => self.machine(index).agent.sweeping = Some(stopped),
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
        ports: Vec::new(),
    }
}
