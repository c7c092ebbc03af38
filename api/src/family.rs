//! The two IP address families.

use std::fmt;
use std::net::IpAddr;
use std::ops::{Index, IndexMut};

use serde::{Deserialize, Serialize};

/// An IP address family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Family {
    /// IPv4.
    #[serde(rename = "ipv4")]
    V4,
    /// IPv6.
    #[serde(rename = "ipv6")]
    V6,
}

impl Family {
    /// Both families, in the order in which addresses are listed.
    pub const BOTH: [Self; 2] = [Self::V4, Self::V6];

    /// The family of `address`.
    pub fn of(address: IpAddr) -> Self {
        if address.is_ipv4() { Self::V4 } else { Self::V6 }
    }

    /// Length of an address in bits, which is also the prefix length of a single address.
    pub fn bits(self) -> u8 {
        match self {
            Self::V4 => 32,
            Self::V6 => 128,
        }
    }
}

/// One value per family; with an `Option`, at most one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash)]
pub struct PerFamily<T> {
    v4: T,
    v6: T,
}

impl<T> PerFamily<T> {
    /// A pair of values.
    pub const fn new(v4: T, v6: T) -> Self {
        Self { v4, v6 }
    }

    /// Calls `one` for each family.
    pub fn each(mut one: impl FnMut(Family) -> T) -> Self {
        Self { v4: one(Family::V4), v6: one(Family::V6) }
    }

    /// Both values, in the order in which addresses are listed.
    pub const fn both(&self) -> [(Family, &T); 2] {
        [(Family::V4, &self.v4), (Family::V6, &self.v6)]
    }
}

impl<T> Index<Family> for PerFamily<T> {
    type Output = T;

    fn index(&self, family: Family) -> &T {
        match family {
            Family::V4 => &self.v4,
            Family::V6 => &self.v6,
        }
    }
}

impl<T> IndexMut<Family> for PerFamily<T> {
    fn index_mut(&mut self, family: Family) -> &mut T {
        match family {
            Family::V4 => &mut self.v4,
            Family::V6 => &mut self.v6,
        }
    }
}

impl<T> PerFamily<Option<T>> {
    /// No value for either family.
    pub const NONE: Self = Self { v4: None, v6: None };

    /// The values that are set, in the order in which addresses are listed.
    pub fn iter(&self) -> impl Iterator<Item = (Family, &T)> {
        self.both().into_iter().filter_map(|(family, one)| Some((family, one.as_ref()?)))
    }

    /// The values that are set, without their families.
    pub fn values(&self) -> impl Iterator<Item = &T> {
        self.iter().map(|(_, one)| one)
    }

    /// The values that are set, by value.
    pub fn into_values(self) -> impl Iterator<Item = T> {
        [self.v4, self.v6].into_iter().flatten()
    }

    /// The families that have a value.
    pub fn families(&self) -> impl Iterator<Item = Family> {
        self.iter().map(|(family, _)| family)
    }

    /// Whether no family has a value.
    pub const fn is_empty(&self) -> bool {
        self.v4.is_none() && self.v6.is_none()
    }
}

impl<T> FromIterator<(Family, T)> for PerFamily<Option<T>> {
    /// If a family occurs twice, the last value wins.
    fn from_iter<I: IntoIterator<Item = (Family, T)>>(all: I) -> Self {
        let mut found = Self::NONE;
        all.into_iter().for_each(|(family, one)| found[family] = Some(one));
        found
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_per_family_value_can_lack_a_family() {
        let mut lengths = PerFamily::each(Family::bits);
        lengths[Family::V4] += 1;
        assert_eq!(lengths, PerFamily::new(33, 128));
        assert_eq!(lengths.both(), [(Family::V4, &33), (Family::V6, &128)]);
        let mut found: PerFamily<Option<&str>> = [(Family::V6, "fd00::1")].into_iter().collect();
        assert_eq!(found.families().collect::<Vec<_>>(), [Family::V6]);
        assert_eq!(found[Family::V4], None);
        found[Family::V4] = Some("10.0.0.1");
        assert_eq!(found.values().collect::<Vec<_>>(), [&"10.0.0.1", &"fd00::1"], "IPv4 comes first");
        assert!(!found.is_empty() && PerFamily::<Option<u8>>::NONE.is_empty());
    }
}
