//! Access to the cluster's records, for reading and changing.

use std::ops::Deref;

use crate::change::Change;
use crate::key::{Key, Range};
use crate::store::{Contents, Outcome, StoreError, Update};
use crate::view::View;

/// The cluster's records.
pub trait RecordStore {
    /// Makes a change of the records. After an error the change may have been made, unless the error excludes that.
    fn commit(&self, change: &Change) -> impl Future<Output = Result<Outcome, StoreError>>;

    /// Reads all entries of the range, as of one revision.
    fn range(&self, range: &Range) -> impl Future<Output = Result<Contents, StoreError>>;
}

/// A type that dereferences to the records gives access to them, too.
impl<T> RecordStore for T
where
    T: Deref,
    T::Target: RecordStore,
{
    fn commit(&self, change: &Change) -> impl Future<Output = Result<Outcome, StoreError>> {
        (**self).commit(change)
    }

    fn range(&self, range: &Range) -> impl Future<Output = Result<Contents, StoreError>> {
        (**self).range(range)
    }
}

/// Reads all records that agents watch, as of one revision of the datastore.
pub async fn read_all(records: &impl RecordStore) -> Result<View, StoreError> {
    let mut view = View::default();
    view.apply(Update::Loaded(records.range(&Key::followed()).await?));
    Ok(view)
}
