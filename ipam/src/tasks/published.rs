//! The addresses that nodes have published: for people and tools only.

use std::net::IpAddr;

use super::records::RecordStore;
use crate::Cidr;
use crate::Revision;
use crate::invariants::PublishedAddress;
use crate::key::{Key, Range};
use crate::store::{Contents, StoreError};

/// Why an address record is not read.
#[derive(Debug, thiserror::Error)]
enum AddressesNotRead {
    /// The value is not valid JSON of the expected type.
    /// Remedy: check that all agents are of releases that work together; otherwise delete the record.
    #[error(transparent)]
    Json(#[from] serde_json::Error),
    /// The key has no node name and address, so it was not written by an agent.
    /// Remedy: delete the key with etcdctl del.
    #[error("its key is not that of a node address")]
    Key,
}

/// The address records of the datastore, as of one revision.
#[derive(Debug, Clone, Default)]
pub struct PublishedAddresses {
    /// The readable records, each with the revision of its last change.
    pub records: Vec<(PublishedAddress, Revision)>,
    /// The unreadable records: key, problem and revision.
    pub unreadable: Vec<(String, String, Revision)>,
}

impl PublishedAddresses {
    /// Reads the address records of all nodes.
    pub async fn read(records: &impl RecordStore) -> Result<Self, StoreError> {
        Self::read_range(records, &Key::all_addresses()).await
    }

    /// Reads the address records in `range`.
    pub async fn read_range(records: &impl RecordStore, range: &Range) -> Result<Self, StoreError> {
        Ok(Self::parse(records.range(range).await?))
    }

    fn parse(contents: Contents) -> Self {
        let mut addresses = Self::default();
        for entry in contents.entries {
            let read = match entry.key.parse() {
                Ok(Key::Address(node, address)) => serde_json::from_slice(&entry.value)
                    .map(|record| PublishedAddress { node, address, record })
                    .map_err(AddressesNotRead::from),
                _ => Err(AddressesNotRead::Key),
            };
            match read {
                Ok(published) => addresses.records.push((published, entry.revision)),
                Err(reason) => addresses.unreadable.push((entry.key, reason.to_string(), entry.revision)),
            }
        }
        addresses
    }

    /// The number of readable addresses inside `cidr`.
    pub fn count_in(&self, cidr: Cidr) -> u64 {
        self.records.iter().filter(|(published, _)| cidr.has(published.address)).count() as u64
    }

    /// All readable addresses.
    pub fn all(&self) -> impl Iterator<Item = IpAddr> {
        self.records.iter().map(|(published, _)| published.address)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Entry;

    #[test]
    fn unreadable_records_are_listed_separately_with_their_keys() {
        let entry = |key: &str, value: &str| Entry {
            key: key.to_owned(),
            value: value.into(),
            revision: Revision::new(5),
        };
        let record = r#"{"attachment":{"network":"polder","container":"c","interface":"eth0"}}"#;
        let entries = vec![
            entry("/polder/v1/addresses/n1/10.0.0.1", record),
            entry("/polder/v1/addresses/n1/10.0.0.2", "{}"),
            entry("/polder/v1/addresses/n1/x", record),
        ];
        let addresses = PublishedAddresses::parse(Contents { revision: Revision::new(9), entries });
        assert_eq!(addresses.count_in("10.0.0.0/24".parse().unwrap()), 1);
        let keys: Vec<&str> = addresses.unreadable.iter().map(|(key, ..)| key.as_str()).collect();
        assert_eq!(keys, ["/polder/v1/addresses/n1/10.0.0.2", "/polder/v1/addresses/n1/x"]);
    }
}
