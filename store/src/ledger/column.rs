//! The forms of values in the columns of the ledger.

use std::str::FromStr;

use polder_ipam::Moment;
use rusqlite::types::{FromSql, FromSqlError, FromSqlResult, ValueRef};

pub(super) fn millis(moment: Moment) -> i64 {
    i64::try_from(moment.millis()).unwrap_or(i64::MAX)
}

pub(super) fn moment(millis: i64) -> Moment {
    Moment::from_millis(u64::try_from(millis).unwrap_or_default())
}

/// A text column, parsed as `T`.
pub(super) struct Text<T>(pub(super) T);

impl<T> Text<T> {
    pub(super) fn value(self) -> T {
        self.0
    }
}

/// A text column with values, separated by spaces.
pub(super) struct SpaceSeparated<T>(Vec<T>);

impl<T> SpaceSeparated<T> {
    pub(super) fn values(self) -> Vec<T> {
        self.0
    }
}

pub(super) fn space_separated<T: ToString>(values: &[T]) -> String {
    values.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
}

impl<T: FromStr<Err: std::error::Error + Send + Sync + 'static>> FromSql for SpaceSeparated<T> {
    fn column_result(value: ValueRef<'_>) -> FromSqlResult<Self> {
        let parse = |text: &str| text.parse().map_err(|error| FromSqlError::Other(Box::new(error)));
        value.as_str()?.split_whitespace().map(parse).collect::<Result<_, _>>().map(Self)
    }
}

impl<T: FromStr<Err: std::error::Error + Send + Sync + 'static>> FromSql for Text<T> {
    fn column_result(value: ValueRef<'_>) -> FromSqlResult<Self> {
        value.as_str()?.parse().map(Text).map_err(|error| FromSqlError::Other(Box::new(error)))
    }
}
