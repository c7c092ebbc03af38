//! The fake node as the environment of operator requests.

use super::*;
use crate::Revision;
use crate::tasks::operator::{Knowledge, OperatorHost};

impl Knowledge for Fake {
    fn store_name(&self) -> String {
        "a fake".to_owned()
    }

    fn current_view(&self) -> Arc<View> {
        self.view()
    }

    async fn view_changed_from(&self, _: &Arc<View>, _: Duration) {
        self.with(State::load);
    }

    async fn view_at(&self, _: Revision, _: Duration) -> Option<Arc<View>> {
        self.with(State::load);
        Some(self.view())
    }
}

impl OperatorHost for Fake {
    async fn has_interface(&self, attachment: &Attachment) -> Result<bool, HostError> {
        Ok(self.with(|state| state.interfaces.contains(attachment)))
    }
}
