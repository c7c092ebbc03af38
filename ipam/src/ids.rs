//! Identifiers that distinguish things with the same name: created by Polder, or by the system.

use std::fmt;

use serde::{Deserialize, Serialize};

macro_rules! id {
    ($(#[$meta:meta])* $name:ident) => {
        $(#[$meta])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(String);

        impl $name {
            /// Wraps an identifier. Any text is valid: identifiers are only compared.
            pub fn new(id: impl Into<String>) -> Self {
                Self(id.into())
            }

            /// The identifier as text.
            pub fn as_str(&self) -> &str {
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
    /// Distinguishes attempts to write the same record.
    Nonce
);
