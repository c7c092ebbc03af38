//! Identifiers that distinguish things with the same name: created by Polder, or by the system.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The text of an identifier. A cluster has thousands of UUIDs: without an allocation each, its records need a fifth less
/// memory.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(from = "String", into = "String")]
enum Text {
    /// A UUID in lower case: 36 characters (RFC 9562, section 4).
    Uuid([u8; 16]),
    /// 32 hexadecimal digits in lower case, as in `/etc/machine-id`.
    Digits([u8; 16]),
    /// Any other text.
    Other(Box<str>),
}

/// Positions of the hyphens in the text of a UUID.
const HYPHENS: [usize; 4] = [8, 13, 18, 23];

impl Default for Text {
    fn default() -> Self {
        Self::Other(Box::default())
    }
}

impl Text {
    /// The bytes of 32 hexadecimal digits in lower case.
    fn bytes(digits: &str) -> Option<[u8; 16]> {
        let is_digit = |digit: u8| matches!(digit, b'0'..=b'9' | b'a'..=b'f');
        let is_number = digits.len() == 32 && digits.bytes().all(is_digit);
        u128::from_str_radix(digits, 16).ok().filter(|_| is_number).map(u128::to_be_bytes)
    }
}

impl From<String> for Text {
    fn from(text: String) -> Self {
        let digits = text.replace('-', "");
        match Self::bytes(&digits) {
            Some(bytes) if digits == text => Self::Digits(bytes),
            Some(bytes) if String::from(Self::Uuid(bytes)) == text => Self::Uuid(bytes),
            _ => Self::Other(text.into()),
        }
    }
}

impl From<Text> for String {
    fn from(text: Text) -> Self {
        let digits = |bytes| format!("{:032x}", u128::from_be_bytes(bytes));
        match text {
            Text::Uuid(bytes) => {
                let mut text = digits(bytes);
                HYPHENS.into_iter().for_each(|at| text.insert(at, '-'));
                text
            }
            Text::Digits(bytes) => digits(bytes),
            Text::Other(text) => text.into(),
        }
    }
}

macro_rules! id {
    ($(#[$meta:meta])* $name:ident) => {
        $(#[$meta])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(Text);

        impl $name {
            /// Wraps an identifier. Any text is valid: identifiers are only compared.
            pub fn new(id: impl Into<String>) -> Self {
                Self(id.into().into())
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&String::from(self.0.clone()))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Debug::fmt(&String::from(self.0.clone()), f)
            }
        }
    };
}

id!(
    /// Identifies an operating system installation (`/etc/machine-id`). Empty if unknown.
    #[derive(Default)]
    MachineId
);
id!(
    /// Identifies a boot of the kernel (`/proc/sys/kernel/random/boot_id`).
    #[derive(Default)]
    BootId
);

id!(
    /// Identifies a cluster.
    ClusterId
);
id!(
    /// Distinguishes nodes that had the same name. Created when a node first registers, kept in its ledger.
    Incarnation
);
id!(
    /// The uid of a Node object of Kubernetes: distinguishes successive ones of the same name.
    NodeUid
);
id!(
    /// Distinguishes attempts to write the same record.
    Nonce
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identifier_keeps_its_text() {
        for text in [
            "",
            "i1",
            "6f1ed002-ab54-4d6c-8f0a-0c5f3a5d0001",
            "6F1ED002-ab54-4d6c-8f0a-0c5f3a5d0001",
            "6f1ed002ab54-4d6c-8f0a-0c5f-3a5d0001",
            "6f1ed002ab544d6c8f0a0c5f3a5d0001",
            "+f1ed002ab544d6c8f0a0c5f3a5d0001",
            "00000000000000000000000000000000",
            "00000000-0000-0000-0000-000000000000",
        ] {
            let id = Nonce::new(text);
            assert_eq!(id.to_string(), text);
            let json = serde_json::to_string(&id).unwrap();
            assert_eq!(
                (json.as_str(), serde_json::from_str::<Nonce>(&json).unwrap()),
                (&*format!("{text:?}"), id)
            );
        }
        assert!(size_of::<Nonce>() <= size_of::<String>());
        assert!(matches!(Nonce::new("6f1ed002-ab54-4d6c-8f0a-0c5f3a5d0001").0, Text::Uuid(_)));
        assert!(matches!(Nonce::new("6f1ed002ab544d6c8f0a0c5f3a5d0001").0, Text::Digits(_)));
    }
}
