//! Validated names from external input.

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// The name is not valid: kind of name, given text and rule.
///
/// Remedy: use a name that the rule in the text permits.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{kind} {given:?} is not valid: {rule}")]
pub struct InvalidName {
    /// Kind of name.
    pub kind: &'static str,
    /// The given text.
    pub given: String,
    /// The rule for valid names of this kind.
    pub rule: &'static str,
}

// `Arc<str>`: few different names exist, each with many copies.
macro_rules! name {
    ($(#[$doc:meta])* $name:ident, $kind:literal, $valid:expr, $rule:literal) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(Arc<str>);

        impl $name {
            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl TryFrom<String> for $name {
            type Error = InvalidName;
            fn try_from(given: String) -> Result<Self, InvalidName> {
                let valid: fn(&str) -> bool = $valid;
                if valid(&given) {
                    Ok(Self(given.into()))
                } else {
                    Err(InvalidName { kind: $kind, given, rule: $rule })
                }
            }
        }

        impl std::str::FromStr for $name {
            type Err = InvalidName;
            fn from_str(given: &str) -> Result<Self, InvalidName> {
                given.to_owned().try_into()
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> String {
                name.as_str().to_owned()
            }
        }

        impl AsRef<str> for $name {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Debug::fmt(&self.0, f)
            }
        }
    };
}

name!(
    /// The `name` of a CNI network configuration (CNI 1.1.0, section 1).
    NetworkName, "network name", |s| is_token(s, 253),
    "1 to 253 of a-z A-Z 0-9 _ . -, starting with a letter or digit"
);
name!(
    /// `CNI_CONTAINERID` (CNI 1.1.0, section 2).
    ContainerId, "container ID", |s| is_token(s, 253),
    "1 to 253 of a-z A-Z 0-9 _ . -, starting with a letter or digit"
);
name!(
    /// Name of a node, unique in the cluster. Every Kubernetes node name is valid.
    NodeName, "node name", |s| is_token(s, 253),
    "1 to 253 of a-z A-Z 0-9 _ . -, starting with a letter or digit"
);
name!(
    /// Name of an address pool, unique in the cluster.
    PoolName, "pool name", |s| is_token(s, 63),
    "1 to 63 of a-z A-Z 0-9 _ . -, starting with a letter or digit"
);
name!(
    /// Name of a network interface. Both the kernel's `dev_valid_name` and the CNI specification accept it.
    IfName, "interface name", is_interface,
    "1 to 15 bytes, no '/', ':' or white space, not \".\" or \"..\""
);

/// Whether the text has the form that CNI requires of network names and container IDs. It is safe in paths and etcd
/// keys.
fn is_token(text: &str, longest: usize) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-');
    text.len() <= longest
        && text.starts_with(|c: char| c.is_ascii_alphanumeric())
        && text.chars().all(allowed)
}

fn is_interface(text: &str) -> bool {
    let refused = |c: char| c == '/' || c == ':' || c.is_whitespace() || c.is_control();
    (1..=15).contains(&text.len()) && text != "." && text != ".." && !text.contains(refused)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_could_leave_their_directory_or_key_are_refused() {
        for bad in ["", "..", "a/b", "-a", "some-%%id", "a b", "ä"] {
            assert!(bad.parse::<ContainerId>().is_err(), "{bad:?} was taken");
        }
        assert!("a.B_c-9".parse::<ContainerId>().is_ok());
    }

    #[test]
    fn invalid_kernel_interface_names_are_refused() {
        for bad in ["", ".", "..", "a/b", "a:b", "a b", "sixteen-bytes-xx"] {
            assert!(bad.parse::<IfName>().is_err(), "{bad:?} was taken");
        }
        assert!("fifteen-bytes-x".parse::<IfName>().is_ok());
    }

    #[test]
    fn the_error_about_an_invalid_name_states_the_rule() {
        let error = serde_json::from_str::<IfName>("\"a/b\"").unwrap_err().to_string();
        assert!(error.contains("interface name \"a/b\" is not valid: 1 to 15 bytes"), "{error}");
    }
}
