//! The path of a request: to the store, through the store, and back.

use polder_ipam::invariants::history::check_lease_record;
use polder_ipam::key::{Key, Range};
use polder_ipam::record::Boot;
use polder_ipam::store::refusal::{RefusalCause, StoreRefusal};
use polder_ipam::store::{Outcome, StoreError, Txn, Write};

use crate::etcd::{Condition, Error, LeaseId, Operation};
use crate::store_request::{Progress, Request, StoreOperation, StoreReply, brief, no_answer, short};
use crate::world::{Machine, StoreKind, TAIL, World};

impl World {
    /// Sends a request to the store. Returns the request number.
    pub fn send_request(&mut self, machine: usize, operation: StoreOperation) -> u64 {
        let id = self.number();
        let state = if self.machines[machine].is_partitioned {
            Progress::Answered(Err(no_answer()))
        } else {
            Progress::Sent
        };
        self.requests.push(Request { id, machine, operation, state });
        if self.store_kind == StoreKind::Embedded {
            // Embedded store: the write has taken effect, even if the task ends before it reads the reply.
            let index = self.requests.len() - 1;
            self.serve(index);
            let answered = match self.requests[index].state.clone() {
                Progress::Served(answer) => Progress::Answered(Ok(answer)),
                other => other,
            };
            self.requests[index].state = answered;
        }
        id
    }

    /// Whether the request is finished: a reply has arrived, or the request has failed.
    pub fn is_answered(&self, id: u64) -> bool {
        self.requests.iter().any(|request| request.id == id && matches!(request.state, Progress::Answered(_)))
    }

    /// Removes the request and returns its reply.
    pub fn take_answer(&mut self, id: u64) -> Result<StoreReply, StoreError> {
        let found = self.requests.iter().position(|request| request.id == id);
        match found.map(|index| self.requests.swap_remove(index).state) {
            Some(Progress::Answered(answer)) => answer,
            _ => Err(no_answer()),
        }
    }

    /// Moves a request or a reply one step forward.
    pub fn advance_request(&mut self, index: usize) {
        match self.requests[index].state.clone() {
            Progress::Sent | Progress::Late => self.serve(index),
            Progress::Served(answer) => self.requests[index].state = Progress::Answered(Ok(answer)),
            Progress::Answered(_) => {}
        }
    }

    /// Lets the store process a request.
    pub fn serve(&mut self, index: usize) {
        let operation = self.requests[index].operation.clone();
        let (machine, late) =
            (self.requests[index].machine, matches!(self.requests[index].state, Progress::Late));
        let answer = match &operation {
            StoreOperation::Range(range) => StoreReply::Contents(self.etcd.range(range)),
            StoreOperation::Commit(txn) => self.commit(machine, None, txn),
            StoreOperation::Grant(seconds) => self.grant(*seconds),
            StoreOperation::Put(lease, txn) => self.commit(machine, Some(*lease), txn),
            StoreOperation::Renew(lease) => StoreReply::Lease(self.renew(*lease)),
            StoreOperation::Revoke(lease) => {
                // A lease that has already expired is not an error.
                let _ = self.etcd.revoke(*lease);
                StoreReply::Lease(None)
            }
        };
        self.note(|| {
            format!(
                "store: {machine} asked {}{} -> {}",
                if late { "late " } else { "" },
                brief(&operation),
                short(&answer)
            )
        });
        if late {
            self.requests.swap_remove(index);
        } else {
            self.requests[index].state = Progress::Served(answer);
        }
        self.observe();
    }

    fn commit(&mut self, machine: usize, lease: Option<LeaseId>, txn: &Txn) -> StoreReply {
        let refused = |cause, words: &str| StoreReply::Refused(StoreRefusal::new(cause, words.to_owned()));
        let Machine { reads_only, disk, .. } = &self.machines[machine];
        if *reads_only {
            return refused(RefusalCause::Permission, "etcdserver: permission denied");
        }
        if self.store_kind == StoreKind::Embedded {
            if disk.is_full() {
                return refused(RefusalCause::Disk, "database or disk is full");
            }
            self.earlier.push(self.etcd.clone());
            if self.earlier.len() > TAIL {
                self.earlier.remove(0);
            }
        }
        let outcome = self.transact_under(lease, txn);
        if lease.is_some() && matches!(outcome, Ok(Outcome::Applied { .. })) {
            txn.writes.iter().for_each(|write| self.check_liveness_record(write));
        }
        outcome.map_or_else(StoreReply::Refused, StoreReply::Outcome)
    }

    /// Executes a transaction in the store immediately.
    pub fn transact(&mut self, txn: &Txn) -> Result<Outcome, StoreRefusal> {
        self.transact_under(None, txn)
    }

    fn transact_under(&mut self, lease: Option<LeaseId>, txn: &Txn) -> Result<Outcome, StoreRefusal> {
        // An embedded store has no leases: no other node could see that this node has failed.
        let lease = lease.filter(|_| self.store_kind == StoreKind::Etcd);
        let only_if: Vec<Condition> = txn.compares.iter().map(Condition::from).collect();
        let operations: Vec<Operation> = txn.writes.iter().map(|write| operation(write, lease)).collect();
        let outcome = self.etcd.transact(&only_if, &operations).map_err(refusal);
        self.observe();
        outcome
    }

    fn grant(&mut self, seconds: u64) -> StoreReply {
        let id = LeaseId::try_from(self.number()).expect("fewer than that");
        match self.store_kind {
            StoreKind::Embedded => StoreReply::Lease(Some(id)),
            StoreKind::Etcd => match self.etcd.grant(id, seconds) {
                Ok(()) => StoreReply::Lease(Some(id)),
                Err(error) => StoreReply::Refused(refusal(error)),
            },
        }
    }

    /// The lease, if it is still valid.
    fn renew(&mut self, lease: LeaseId) -> Option<LeaseId> {
        let lasts = self.store_kind == StoreKind::Embedded || self.etcd.keep_alive(lease).is_some();
        lasts.then_some(lease)
    }

    /// Checks that only the node that is named in the node record puts the liveness record.
    fn check_liveness_record(&mut self, write: &Write) {
        let Write::Put { key, value } = write else { return };
        let Ok(Key::Lease(name)) = key.parse() else { return };
        let alive = polder_ipam::record::lease(value).expect("a sign as nodes put it");
        let record = self.truth.nodes.get(&name).map(|known| &*known.record);
        let wrong = check_lease_record(&name, Boot::from(&alive), record);
        self.found.extend(wrong);
    }

    /// Stops waiting for the reply to a request.
    pub fn abandon(&mut self, id: u64) {
        self.abandon_all(|request| request.id == id);
    }

    /// Abandons requests: one that has not reached the store can still arrive; a reply in flight is dropped.
    pub(crate) fn abandon_all(&mut self, is_abandoned: impl Fn(&Request) -> bool) {
        for request in self.requests.iter_mut().filter(|request| is_abandoned(request)) {
            if matches!(request.state, Progress::Sent) {
                request.state = Progress::Late;
            }
        }
        self.requests.retain(|request| !is_abandoned(request) || matches!(request.state, Progress::Late));
    }
}

fn operation(write: &Write, lease: Option<LeaseId>) -> Operation {
    match write {
        Write::Put { key, value } => Operation::Put { key: key.clone(), value: value.clone(), lease },
        Write::Delete { key } => Operation::Delete(Range::single(key.clone())),
    }
}

/// The refusal of etcd if it has no space, or if the lease has expired.
fn refusal(error: Error) -> StoreRefusal {
    let cause = match error {
        Error::NoSpace => RefusalCause::NoSpace,
        Error::LeaseNotFound(_) => RefusalCause::Request,
        other => panic!("a request that etcd does not look at: {other}"),
    };
    StoreRefusal::new(cause, error.to_string())
}
