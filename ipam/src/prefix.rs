//! The prefix of a cluster's keys, so that several clusters can use one etcd.

use std::fmt;
use std::str::FromStr;
use std::sync::OnceLock;

use serde::{Deserialize, Serialize};

/// The prefix of all keys of a cluster, like `/polder/v1/`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Prefix(String);

/// A text that is not a valid prefix.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "invalid prefix {0:?}: write names of letters, digits, '.', '_' and '-' between slashes, with a slash at \
     both ends, like {DEFAULT_PREFIX}"
)]
pub struct InvalidPrefix(String);

/// This process already uses another prefix.
/// Remedy: none, it is an internal error.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("this process already uses the prefix {0}")]
pub struct OtherPrefix(&'static str);

const DEFAULT_PREFIX: &str = "/polder/v1/";

/// Set once, before the first key is created. An agent has one cluster, and messages must show the keys of etcd: if
/// keys had other names inside the agent, an operator might delete the record of another cluster.
static IN_USE: OnceLock<String> = OnceLock::new();

/// The prefix of all keys of this process.
pub fn in_use() -> &'static str {
    IN_USE.get().map_or(DEFAULT_PREFIX, String::as_str)
}

impl Prefix {
    /// Sets the prefix of all keys of this process.
    pub fn set(&self) -> Result<(), OtherPrefix> {
        let set = IN_USE.get_or_init(|| self.0.clone());
        if *set == self.0 { Ok(()) } else { Err(OtherPrefix(set)) }
    }
}

impl Default for Prefix {
    fn default() -> Self {
        Self(DEFAULT_PREFIX.to_owned())
    }
}

impl FromStr for Prefix {
    type Err = InvalidPrefix;
    fn from_str(text: &str) -> Result<Self, InvalidPrefix> {
        let is_name = |name: &str| {
            !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c))
        };
        let names = text.strip_prefix('/').and_then(|rest| rest.strip_suffix('/'));
        match names {
            Some(names) if names.split('/').all(is_name) => Ok(Self(text.to_owned())),
            _ => Err(InvalidPrefix(text.to_owned())),
        }
    }
}

impl TryFrom<String> for Prefix {
    type Error = InvalidPrefix;
    fn try_from(text: String) -> Result<Self, InvalidPrefix> {
        text.parse()
    }
}

impl From<Prefix> for String {
    fn from(prefix: Prefix) -> Self {
        prefix.0
    }
}

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_is_a_path_with_a_slash_at_both_ends() {
        for good in ["/polder/v1/", "/a/", "/clusters/blue-2/polder.v1/"] {
            assert_eq!(good.parse::<Prefix>().unwrap().to_string(), good);
        }
        for bad in ["", "/", "//", "polder/", "/polder", "/a//b/", "/a b/", "/ä/"] {
            assert!(bad.parse::<Prefix>().unwrap_err().to_string().contains("invalid prefix"), "{bad}");
        }
    }

    #[test]
    fn the_prefix_of_a_process_cannot_change() {
        // The default prefix, which all other tests use.
        Prefix::default().set().unwrap();
        Prefix::default().set().unwrap();
        assert_eq!("/other/".parse::<Prefix>().unwrap().set(), Err(OtherPrefix(DEFAULT_PREFIX)));
        assert_eq!(in_use(), DEFAULT_PREFIX);
    }
}
