//! Records that a node publishes about itself: its lease record, and the owners of its addresses. For people and
//! tools; safety does not depend on them. Only the registered node may publish them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use polder_api::NodeName;
use polder_api::rule;

use crate::Revision;
use crate::change::{Change, LeaseWrite, Member, Writer};
use crate::key::{Key, Name};
use crate::ledger::{AttachmentEntry, NodeIdentity};
use crate::record::{AddressRecord, Boot, NodeRecord, encode};
use crate::store::{Contents, Entry};
use crate::view::{View, ViewSource};

/// The published owners of the addresses of one node.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Publication {
    /// The owner of each address; `None` if the record is not encoded as in this release.
    records: BTreeMap<IpAddr, Option<AddressRecord>>,
    /// Names of records that do not belong there.
    unexpected: Vec<Name>,
}

rule! {
    /// Whether the record was written on that machine in that boot.
    fn is_of(record: &NodeRecord, boot: Boot<'_>) -> bool {
        Boot::from(record) == boot
    }
    AnyBootIsOwn => true
}

/// The revision of the node's own record in the datastore. `None` if it is missing or belongs to another incarnation,
/// boot or machine. A cloned machine has the ledger of its original, and must not appear alive as that node before it
/// has checked the record; an original that was replaced by another machine is not the node any more.
pub fn own_revision(
    view: &View,
    me: &NodeName,
    identity: Option<&NodeIdentity>,
    boot: Boot<'_>,
) -> Option<Revision> {
    let own = view
        .nodes
        .get(me)
        .filter(|own| identity.is_some_and(|identity| identity.incarnation == own.record.incarnation))
        .filter(|own| is_of(&own.record, boot));
    own.filter(|_| view.source == ViewSource::Store).map(|own| own.revision)
}

/// The conditions of what a node publishes. When one of them changes, the node publishes everything again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Basis {
    /// [`own_revision`]. The node publishes nothing while it is `None`.
    pub revision: Option<Revision>,
    /// The number of times that the datastore has lost records. Published records may be lost, or deleted ones
    /// restored.
    pub losses: u64,
}

impl Basis {
    /// The basis according to this view and the node's identity.
    pub fn of(view: &View, me: &NodeName, identity: Option<&NodeIdentity>, boot: Boot<'_>) -> Self {
        Self { revision: own_revision(view, me, identity, boot), losses: view.losses }
    }
}

/// The write of the lease record of a node in one boot of its machine. `revision` is the revision of its record.
pub fn lease_write(me: &NodeName, boot: Boot<'_>, revision: Revision) -> LeaseWrite {
    LeaseWrite { by: Member { node: me.clone(), revision }, record: boot.into() }
}

/// The nodes with a lease record.
pub fn living_nodes(leases: &Contents) -> BTreeSet<NodeName> {
    let name = |key: &str| match key.parse() {
        Ok(Key::Lease(name)) => Some(name),
        _ => None,
    };
    leases.entries.iter().filter_map(|entry| name(&entry.key)).collect()
}

/// The records to publish for these attachments.
pub fn wanted<'a>(attachments: impl Iterator<Item = &'a AttachmentEntry>) -> Publication {
    let mut records = BTreeMap::new();
    for held in attachments {
        let record = AddressRecord { attachment: held.attachment.clone(), pod: held.pod.clone() };
        records.extend(held.addresses.iter().map(|address| (*address, Some(record.clone()))));
    }
    Publication { records, unexpected: Vec::new() }
}

/// Decodes the published addresses of a node.
pub fn read(node: &NodeName, contents: &Contents) -> Publication {
    let mut published = Publication::default();
    for Entry { key, value, .. } in &contents.entries {
        match Name::from(key.as_str()) {
            Name::Key(Key::Address(of, address)) if of == *node => {
                let record = serde_json::from_slice(value).ok().filter(|record| encode(record) == *value);
                published.records.insert(address, record);
            }
            unexpected => published.unexpected.push(unexpected),
        }
    }
    published
}

/// The changes from `published` to `wanted`, with at most `most` records each.
pub fn publish(by: &Member, published: &Publication, wanted: &Publication, most: usize) -> Vec<Change> {
    enum PublicationPart {
        Withdraw(Name),
        Publish(IpAddr, AddressRecord),
    }
    let gone = published.records.keys().filter(|address| !wanted.records.contains_key(*address));
    let gone = gone.map(|address| Name::Key(Key::Address(by.node.clone(), *address)));
    let mut parts: Vec<PublicationPart> =
        published.unexpected.iter().cloned().chain(gone).map(PublicationPart::Withdraw).collect();
    let new =
        wanted.records.iter().filter(|(address, record)| published.records.get(address) != Some(record));
    parts.extend(
        new.filter_map(|(address, record)| Some(PublicationPart::Publish(*address, record.clone()?))),
    );
    let mut changes = Vec::new();
    while !parts.is_empty() {
        let (mut publish, mut withdraw) = (Vec::new(), Vec::new());
        for part in parts.drain(..parts.len().min(most)) {
            match part {
                PublicationPart::Withdraw(name) => withdraw.push(name),
                PublicationPart::Publish(address, record) => publish.push((address, record)),
            }
        }
        changes.push(Change::PublishAddresses { by: by.clone(), publish, withdraw });
    }
    changes
}

/// The changes that delete the published addresses of a removed node, with at most `most` records each. They are not
/// applied if a node with this name exists again: that node maintains its addresses itself.
pub fn forget(node: &NodeName, published: &Contents, most: usize) -> Vec<Change> {
    let names: Vec<_> =
        published.entries.iter().map(|entry| (Name::from(entry.key.as_str()), None)).collect();
    let part = |part: &[_]| {
        let by = Writer::AnyNode(node.clone());
        Change::WithdrawAddresses { by, records: part.to_vec() }
    };
    names.chunks(most).map(part).collect()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use polder_api::Mac;

    use super::*;
    use crate::change::MOST_RECORDS;
    use crate::ids::{BootId, ClusterId, Incarnation, MachineId};
    use crate::ledger::MemberState;
    use crate::record::{LeaseRecord, NodeRecord};
    use crate::view::Versioned;

    /// The machine and boot of the registered node.
    fn alive() -> LeaseRecord {
        LeaseRecord { machine_id: MachineId::new("m1"), boot_id: BootId::new("b1") }
    }

    fn me() -> NodeName {
        "n1".parse().unwrap()
    }

    fn identity(incarnation: &str) -> NodeIdentity {
        NodeIdentity {
            node: me(),
            cluster: ClusterId::new("c"),
            incarnation: Incarnation::new(incarnation),
            member_state: MemberState::Member,
        }
    }

    fn view() -> View {
        let record = NodeRecord {
            incarnation: Incarnation::new("i1"),
            machine_id: alive().machine_id,
            boot_id: alive().boot_id,
            underlay: Vec::new(),
            gateways: Vec::new(),
            probes: Vec::new(),
            vtep_mac: Mac([2; 6]),
            mtu: 1450,
            version: String::new(),
            kubernetes_uid: None,
        };
        let mut view = View::default();
        view.source = ViewSource::Store;
        view.nodes.insert(me(), Versioned { record: Arc::new(record), revision: Revision::new(7) });
        view
    }

    #[test]
    fn the_own_record_must_match_incarnation_boot_and_machine() {
        let (ours, alive) = (identity("i1"), alive());
        let boot = Boot::from(&alive);
        assert_eq!(own_revision(&view(), &me(), Some(&ours), boot), Some(Revision::new(7)));
        let later = LeaseRecord { boot_id: BootId::new("b2"), ..alive.clone() };
        let elsewhere = LeaseRecord { machine_id: MachineId::new("m2"), ..alive.clone() };
        for other in [later, elsewhere] {
            assert_eq!(own_revision(&view(), &me(), Some(&ours), Boot::from(&other)), None);
        }
        assert_eq!(own_revision(&view(), &me(), Some(&identity("i2")), boot), None);
        assert_eq!(own_revision(&view(), &me(), None, boot), None);
        let mut remembered = view();
        remembered.source = ViewSource::Snapshot;
        assert_eq!(own_revision(&remembered, &me(), Some(&ours), boot), None);
    }

    fn record(container: &str) -> AddressRecord {
        AddressRecord { attachment: format!("net/{container}/eth0").parse().unwrap(), pod: None }
    }

    fn publication(addresses: std::ops::Range<usize>) -> Publication {
        let address = |number: usize| IpAddr::from([10, 0, 0, u8::try_from(number).unwrap()]);
        Publication {
            records: addresses.map(|number| (address(number), Some(record("a")))).collect(),
            unexpected: Vec::new(),
        }
    }

    #[test]
    fn a_large_publication_is_split_and_each_part_names_the_own_record() {
        let ours = Member { node: me(), revision: Revision::new(7) };
        let (published, wanted) = (publication(0..2), publication(1..2 + MOST_RECORDS));
        let changes = publish(&ours, &published, &wanted, MOST_RECORDS);
        let sizes = changes.iter().map(|change| match change {
            Change::PublishAddresses { by, publish, withdraw } if *by == ours => {
                (publish.len(), withdraw.len())
            }
            other => panic!("{other}"),
        });
        assert_eq!(sizes.collect::<Vec<_>>(), [(MOST_RECORDS - 1, 1), (1, 0)]);
        assert_eq!(publish(&ours, &wanted, &wanted, MOST_RECORDS), []);
    }

    #[test]
    fn stray_records_are_withdrawn_and_differing_ones_rewritten() {
        let entry = |name: &str, value: Vec<u8>| Entry {
            key: format!("/polder/v1/addresses/n1/{name}"),
            value,
            revision: Revision::new(1),
        };
        let mut spaced = encode(&record("a"));
        spaced.insert(1, b' ');
        let entries =
            vec![entry("10.0.0.0", encode(&record("a"))), entry("10.0.0.1", spaced), entry("x", Vec::new())];
        let published = read(&me(), &Contents { revision: Revision::new(1), entries });
        let changes = publish(
            &Member { node: me(), revision: Revision::new(7) },
            &published,
            &publication(0..2),
            MOST_RECORDS,
        );
        let [Change::PublishAddresses { publish, withdraw, .. }] = changes.as_slice() else {
            panic!("{changes:?}")
        };
        assert_eq!(publish, &[(IpAddr::from([10, 0, 0, 1]), record("a"))]);
        assert_eq!(withdraw, &[Name::from("/polder/v1/addresses/n1/x")]);
    }

    #[test]
    fn any_node_withdraws_the_addresses_of_a_removed_node_in_parts() {
        let entry =
            |number: usize| Entry { key: format!("{number}"), value: Vec::new(), revision: Revision::new(1) };
        let entries = (0..3).map(entry).collect();
        let sizes =
            forget(&me(), &Contents { revision: Revision::new(1), entries }, 2).into_iter().map(|change| {
                match change {
                    Change::WithdrawAddresses { by, records } if by == Writer::AnyNode(me()) => records.len(),
                    other => panic!("{other}"),
                }
            });
        assert_eq!(sizes.collect::<Vec<_>>(), [2, 1]);
    }

    #[test]
    fn only_lease_keys_name_living_nodes() {
        let entry = |key: &str| Entry { key: key.to_owned(), value: Vec::new(), revision: Revision::new(1) };
        let entries = vec![entry(&Key::Lease(me()).to_string()), entry("/polder/v1/alive/"), entry("/else")];
        assert_eq!(living_nodes(&Contents { revision: Revision::new(1), entries }), [me()].into());
    }
}
