//! Random names that tell things of one name apart.

use std::fmt;

use serde::{Deserialize, Serialize};

macro_rules! random_identity {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub String);

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

random_identity!(
    /// Which of all clusters.
    ClusterId
);
random_identity!(
    /// Which of the nodes that had the same name. Made when a node first registers, kept in its ledger.
    Incarnation
);
random_identity!(
    /// Which of the attempts to write the same record.
    Nonce
);
