//! Enums with one string for each variant, the same in JSON and in text. Scripts rely on the strings, not on the names
//! of the variants.

/// Declares an enum with one string for each variant.
macro_rules! words {
    (
        $(#[$about:meta])*
        $name:ident { $($(#[$what:meta])* $variant:ident = $word:literal),+ $(,)? }
    ) => {
        $(#[$about])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
        pub enum $name {
            $($(#[$what])* #[serde(rename = $word)] $variant,)+
        }

        impl $name {
            /// All variants.
            pub const ALL: &[Self] = &[$(Self::$variant),+];

            /// The string of the variant.
            pub fn as_str(self) -> &'static str {
                match self {
                    $(Self::$variant => $word,)+
                }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.pad(self.as_str())
            }
        }
    };
}

/// A string that matches no variant of an enum.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown value {0:?}: polderctl and polder-agent must be of the same release")]
pub struct UnknownWord(pub(crate) String);

#[cfg(test)]
mod tests {
    use std::fmt::{Debug, Display};

    use serde::Serialize;
    use serde::de::DeserializeOwned;

    use crate::ipam::{AddressStanding, Invariant, NodeShareStanding, PodsGone};
    use crate::pool::{BlockStanding, PoolPurpose, PoolState};
    use crate::status::{AttachMode, NodeStanding, PathKind, ProbeState, StoreStatus};
    use crate::{Backend, Family};

    /// Checks that the values are written as these strings in JSON, and are read from them.
    fn assert_json<T: Serialize + DeserializeOwned + PartialEq + Debug>(values: &[T], strings: &[&str]) {
        let written: Vec<String> = values
            .iter()
            .map(|value| serde_json::to_value(value).unwrap().as_str().unwrap().to_owned())
            .collect();
        assert_eq!(written, strings);
        for (value, string) in values.iter().zip(strings) {
            assert_eq!(serde_json::from_value::<T>((*string).into()).unwrap(), *value);
        }
    }

    /// Like [`assert_json`], and checks that `Display` writes the same strings.
    fn assert_words<T: Serialize + DeserializeOwned + PartialEq + Debug + Display>(
        values: &[T],
        strings: &[&str],
    ) {
        assert_json(values, strings);
        assert_eq!(values.iter().map(ToString::to_string).collect::<Vec<_>>(), strings);
    }

    #[test]
    fn the_strings_of_the_json_output_stay_the_same() {
        assert_json(&Family::BOTH, &["ipv4", "ipv6"]);
        assert_words(&[Backend::Auto, Backend::Direct, Backend::Vxlan], &["auto", "direct", "vxlan"]);
        assert_words(AttachMode::ALL, &["bridge", "routed"]);
        assert_words(PathKind::ALL, &["local", "direct", "vxlan", "unreachable"]);
        assert_words(ProbeState::ALL, &["", "answers", "narrow", "silent", "dropped"]);
        assert_words(PoolPurpose::ALL, &["blocks", "reservations"]);
        assert_words(PoolState::ALL, &["active", "draining", "retired"]);
        assert_words(PodsGone::ALL, &["unknown", "confirmed", "vouched"]);
        let removed = PodsGone::ALL.iter().map(|pods| NodeShareStanding::Removed(*pods));
        assert_words(
            &[NodeShareStanding::Member].into_iter().chain(removed).collect::<Vec<_>>(),
            &[
                "member",
                "removed, pods gone: unknown",
                "removed, pods gone: confirmed",
                "removed, pods gone: vouched",
            ],
        );
        assert_words(
            AddressStanding::ALL,
            &[
                "used",
                "gateway",
                "probe",
                "resting",
                "free",
                "reserved",
                "excluded",
                "unclaimed",
                "foreign",
                "unknown",
            ],
        );
        assert_words(
            Invariant::ALL,
            &[
                "unique",
                "owner",
                "conservation",
                "no leak",
                "no early free",
                "cool-down",
                "stale DEL",
                "durable",
                "fenced",
                "block tree",
                "wired",
                "other",
            ],
        );
        assert_words(
            &[NodeStanding::Member, NodeStanding::Removed("removed: its blocks rest".to_owned())],
            &["member", "removed: its blocks rest"],
        );
        assert_words(
            &[BlockStanding::Owned, BlockStanding::Rests, BlockStanding::Refused("it overlaps".to_owned())],
            &["owned", "rests (node removed)", "refused: it overlaps"],
        );
    }

    #[test]
    fn the_datastore_state_is_a_string_beside_its_other_fields() {
        let store = || "etcd".to_owned();
        let state = |status: StoreStatus| serde_json::to_value(status).unwrap()["state"].clone();
        assert_eq!(state(StoreStatus::Connected { store: store(), revision: 1 }), "connected");
        assert_eq!(
            state(StoreStatus::Disconnected { store: store(), reason: String::new() }),
            "disconnected"
        );
    }

    #[test]
    fn an_unknown_invariant_is_accepted_but_an_unknown_state_is_refused() {
        assert_eq!(serde_json::from_value::<Invariant>("of tomorrow".into()).unwrap(), Invariant::Other);
        assert!(serde_json::from_value::<BlockStanding>("lent".into()).is_err());
        for unknown in ["removed", "removed, pods gone: perhaps", "away"] {
            assert!(serde_json::from_value::<NodeShareStanding>(unknown.into()).is_err(), "{unknown}");
        }
    }
}
