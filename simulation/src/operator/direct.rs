//! An operator directly at the store, without faults: requests are executed immediately, by the same production
//! tasks.

use std::cell::RefCell;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use polder_api::NodeName;
use polder_api::message::Removal;
use polder_api::pool::PoolChange;
use polder_ipam::Revision;
use polder_ipam::change::Change;
use polder_ipam::key::Range;
use polder_ipam::removal::OperatorConfirmation;
use polder_ipam::store::{Contents, Outcome, StoreError};
use polder_ipam::tasks::RecordStore;
use polder_ipam::tasks::operator::{self, Knowledge};
use polder_ipam::transaction::transaction;
use polder_ipam::view::View;

use crate::world::World;

struct DirectStore<'a>(RefCell<&'a mut World>);

impl RecordStore for DirectStore<'_> {
    async fn commit(&self, change: &Change) -> Result<Outcome, StoreError> {
        let outcome = self.0.borrow_mut().transact(&transaction(change));
        outcome.map_err(|refusal| StoreError::Refused { store: self.store_name(), refusal })
    }

    async fn range(&self, range: &Range) -> Result<Contents, StoreError> {
        Ok(self.0.borrow().etcd.range(range))
    }
}

impl Knowledge for DirectStore<'_> {
    fn store_name(&self) -> String {
        "etcd".to_owned()
    }

    fn current_view(&self) -> Arc<View> {
        Arc::new(self.0.borrow().truth.clone())
    }

    async fn view_changed_from(&self, _: &Arc<View>, _: Duration) {}

    async fn view_at(&self, _: Revision, _: Duration) -> Option<Arc<View>> {
        Some(self.current_view())
    }
}

/// Changes the pools; returns whether the change succeeded.
pub fn change_pools(world: &mut World, change: PoolChange) -> bool {
    let known = View::default();
    let store = DirectStore(RefCell::new(world));
    poll_once(operator::change_pools(&store, &known, change)).is_ok()
}

/// Removes a node; returns whether it is removed. `confirmed` states whether the operator confirms that the pods are
/// gone.
pub fn remove_node(world: &mut World, name: &NodeName, confirmed: OperatorConfirmation) -> bool {
    let (dead, earlier) = (confirmed != OperatorConfirmation::No, confirmed == OperatorConfirmation::Earlier);
    let removal = Removal { node: name.clone(), dead, disconnect_pods: None, earlier };
    let store = DirectStore(RefCell::new(world));
    poll_once(operator::remove_node(&store, &store, removal)).is_ok()
}

fn poll_once<T>(future: impl Future<Output = T>) -> T {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(result) => result,
        Poll::Pending => unreachable!("no task waits here"),
    }
}
