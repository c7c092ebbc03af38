//! The cluster's records, to whoever reads and changes them.

use std::ops::Deref;

use crate::change::Change;
use crate::key::{Key, Range};
use crate::store::{Contents, Outcome, StoreError, Update};
use crate::view::View;

/// Where the cluster's records are.
pub trait Records {
    /// Makes a change of the records. After an error it may have been made, unless the error says that it has not.
    fn commit(&self, change: &Change) -> impl Future<Output = Result<Outcome, StoreError>>;

    /// Reads all entries of the range, as of one revision.
    fn range(&self, range: &Range) -> impl Future<Output = Result<Contents, StoreError>>;
}

/// What a task has besides the node knows the records as the node does.
impl<T> Records for T
where
    T: Deref,
    T::Target: Records,
{
    fn commit(&self, change: &Change) -> impl Future<Output = Result<Outcome, StoreError>> {
        (**self).commit(change)
    }

    fn range(&self, range: &Range) -> impl Future<Output = Result<Contents, StoreError>> {
        (**self).range(range)
    }
}

/// All records that agents follow, as the store has them now.
pub async fn read_all(records: &impl Records) -> Result<View, StoreError> {
    let mut view = View::default();
    view.apply(Update::Loaded(records.range(&Key::followed()).await?));
    Ok(view)
}
