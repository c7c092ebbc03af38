//! A node's disk with the ledger, which survives agent restarts and reboots, and the faults of the disk.

use std::cell::RefCell;
use std::net::IpAddr;
use std::rc::Rc;

use polder_api::Attachment;
use polder_ipam::Moment;
use polder_ipam::ids::BootId;
use polder_ipam::ledger::memory::Memory;
use polder_ipam::ledger::{AttachmentEntry, Ledger, LedgerError, NodeIdentity, OwnedBlock};
use polder_ipam::pool::Block;

/// Number of earlier ledger states kept, for power failures.
const TAIL: usize = 4;

/// A handle to a disk. Handles to the same disk share one ledger.
#[derive(Debug, Clone, Default)]
pub struct Disk(Rc<RefCell<State>>);

#[derive(Debug, Clone, Default)]
struct State {
    ledger: Memory,
    /// The ledger before each of its last writes, the latest at the end.
    earlier: Vec<Memory>,
    full: bool,
    writes: u64,
}

impl Disk {
    /// A copy of the current ledger.
    pub fn ledger(&self) -> Memory {
        self.0.borrow().ledger.clone()
    }

    /// Whether the ledger contains the attachment.
    pub fn names(&self, attachment: &Attachment) -> bool {
        // A ledger in memory always answers.
        let attachments = self.0.borrow().ledger.attachments().unwrap_or_default();
        attachments.iter().any(|held| held.attachment == *attachment)
    }

    /// Write counter: while it is the same, the ledger is unchanged.
    pub fn writes(&self) -> u64 {
        self.0.borrow().writes
    }

    /// Makes writes fail, or succeed again.
    pub fn fill(&self, full: bool) {
        self.0.borrow_mut().full = full;
    }

    /// Whether writes fail.
    pub fn is_full(&self) -> bool {
        self.0.borrow().full
    }

    /// Another disk with the same ledger.
    #[must_use]
    pub fn copy(&self) -> Self {
        let ledger = self.ledger();
        Self(Rc::new(RefCell::new(State { ledger, ..State::default() })))
    }

    /// Replaces the ledger with that of another disk.
    pub fn restore(&self, other: &Self) {
        let ledger = other.ledger();
        let mut state = self.0.borrow_mut();
        *state = State { ledger, writes: state.writes + 1, full: state.full, ..State::default() };
    }

    /// Deletes the ledger.
    pub fn delete(&self) {
        let mut state = self.0.borrow_mut();
        *state = State { writes: state.writes + 1, full: state.full, ..State::default() };
    }

    /// Loses up to `writes` of the last writes, as a power failure does if writes are not synchronized to disk.
    pub fn lose_tail(&self, writes: usize) {
        let mut state = self.0.borrow_mut();
        for _ in 0..writes {
            let Some(earlier) = state.earlier.pop() else { break };
            state.ledger = earlier;
        }
        state.writes += 1;
    }

    fn write<T>(&self, change: impl FnOnce(&mut Memory) -> Result<T, LedgerError>) -> Result<T, LedgerError> {
        let mut state = self.0.borrow_mut();
        if state.full {
            return Err(LedgerError::new("the disk is full"));
        }
        let before = state.ledger.clone();
        let changed = change(&mut state.ledger)?;
        state.earlier.push(before);
        if state.earlier.len() > TAIL {
            state.earlier.remove(0);
        }
        state.writes += 1;
        Ok(changed)
    }
}

impl Ledger for Disk {
    fn identity(&self) -> Result<Option<NodeIdentity>, LedgerError> {
        self.0.borrow().ledger.identity()
    }

    fn identify(&mut self, identity: &NodeIdentity) -> Result<(), LedgerError> {
        self.write(|ledger| ledger.identify(identity))
    }

    fn enter_boot(&mut self, id: &BootId) -> Result<Vec<AttachmentEntry>, LedgerError> {
        self.write(|ledger| ledger.enter_boot(id))
    }

    fn blocks(&self) -> Result<Vec<OwnedBlock>, LedgerError> {
        self.0.borrow().ledger.blocks()
    }

    fn add_block(&mut self, owned: &OwnedBlock) -> Result<(), LedgerError> {
        self.write(|ledger| ledger.add_block(owned))
    }

    fn mark_block_leaving(&mut self, block: Block) -> Result<(), LedgerError> {
        self.write(|ledger| ledger.mark_block_leaving(block))
    }

    fn remove_block(&mut self, block: Block) -> Result<(), LedgerError> {
        self.write(|ledger| ledger.remove_block(block))
    }

    fn gateways(&self) -> Result<Vec<IpAddr>, LedgerError> {
        self.0.borrow().ledger.gateways()
    }

    fn add_gateway(&mut self, address: IpAddr) -> Result<(), LedgerError> {
        self.write(|ledger| ledger.add_gateway(address))
    }

    fn remove_gateway(&mut self, address: IpAddr, freed: Moment) -> Result<(), LedgerError> {
        self.write(|ledger| ledger.remove_gateway(address, freed))
    }

    fn replace_gateway(&mut self, old: IpAddr, new: IpAddr, freed: Moment) -> Result<(), LedgerError> {
        self.write(|ledger| ledger.replace_gateway(old, new, freed))
    }

    fn resting(&self) -> Result<Vec<(IpAddr, Moment)>, LedgerError> {
        self.0.borrow().ledger.resting()
    }

    fn cool_down(&mut self, addresses: &[IpAddr], since: Moment) -> Result<(), LedgerError> {
        self.write(|ledger| ledger.cool_down(addresses, since))
    }

    fn attachments(&self) -> Result<Vec<AttachmentEntry>, LedgerError> {
        self.0.borrow().ledger.attachments()
    }

    fn add_attachment(&mut self, held: &AttachmentEntry) -> Result<(), LedgerError> {
        self.write(|ledger| ledger.add_attachment(held))
    }

    fn mark_leaving(&mut self, attachment: &Attachment) -> Result<(), LedgerError> {
        self.write(|ledger| ledger.mark_leaving(attachment))
    }

    fn remove_attachment(&mut self, attachment: &Attachment, freed: Moment) -> Result<(), LedgerError> {
        self.write(|ledger| ledger.remove_attachment(attachment, freed))
    }

    fn clear(&mut self) -> Result<(), LedgerError> {
        self.write(Ledger::clear)
    }

    fn keep_sysctl(&mut self, path: &str, previous: &str) -> Result<(), LedgerError> {
        self.write(|ledger| ledger.keep_sysctl(path, previous))
    }

    fn sysctls(&self) -> Result<Vec<(String, String)>, LedgerError> {
        self.0.borrow().ledger.sysctls()
    }
}
