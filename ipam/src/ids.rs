//! Random names that tell things of one name apart: those that we make, and those that the system gives.

use std::fmt;

use serde::{Deserialize, Serialize};

macro_rules! id {
    ($(#[$meta:meta])* $name:ident) => {
        $(#[$meta])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(String);

        impl $name {
            /// That id. Ids are compared, and say nothing else: any text is one.
            pub fn new(id: impl Into<String>) -> Self {
                Self(id.into())
            }

            /// As it is written down.
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
    /// Which installation of an operating system (`/etc/machine-id`). Empty where nobody has said it.
    #[derive(Default)]
    MachineId
);
id!(
    /// Which boot of a kernel (`/proc/sys/kernel/random/boot_id`).
    #[derive(Default)]
    BootId
);

id!(
    /// Which of all clusters.
    ClusterId
);
id!(
    /// Which of the nodes that had the same name. Made when a node first registers, kept in its ledger.
    Incarnation
);
id!(
    /// Which of the attempts to write the same record.
    Nonce
);
