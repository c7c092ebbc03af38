//! Who works on which attachment: one at a time.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::rc::Rc;

use polder_api::Attachment;

/// Who works on which attachment of an agent.
pub type InFlight = Rc<RefCell<BTreeSet<Attachment>>>;

/// Keeps everybody else from working on an attachment, until it is dropped.
pub struct Lock {
    in_flight: InFlight,
    attachment: Attachment,
}

impl Lock {
    /// Locks the attachment; `None` if somebody else works on it.
    pub fn new(in_flight: InFlight, attachment: &Attachment) -> Option<Self> {
        let is_new = in_flight.borrow_mut().insert(attachment.clone());
        is_new.then(|| Self { in_flight, attachment: attachment.clone() })
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        self.in_flight.borrow_mut().remove(&self.attachment);
    }
}
