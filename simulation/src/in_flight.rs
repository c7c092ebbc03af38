//! Locks on attachments: at most one task works on an attachment.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::rc::Rc;

use polder_api::Attachment;

/// The attachments of one agent on which tasks work.
pub type InFlight = Rc<RefCell<BTreeSet<Attachment>>>;

/// Lock on an attachment; released on drop.
pub struct Lock {
    in_flight: InFlight,
    attachment: Attachment,
}

impl Lock {
    /// Locks the attachment; `None` if it is already locked.
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
