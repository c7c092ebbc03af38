//! nftables: Polder's table, created and changed in transactions.
//!
//! A [`Table`] is the fixed part: sets, chains and rules. In the kernel it is two tables of one name, one of family
//! inet and one of family arp, which are created and changed together. The variable part are the [`Element`]s of the
//! sets. The crate uses netlink directly, so an entry of a pod costs a system call instead of a process, and no data
//! from the datastore is passed to another program. [`foreign`] reads the chains and rules of other tables that
//! affect forwarded packets.

mod anchor;
mod decode;
mod element;
mod encode;
mod family;
pub mod foreign;
mod monitor;

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hash, Hasher};

use netlink_packet_core::{DecodeError, NetlinkMessage};
use netlink_packet_netfilter::NetfilterMessage;
use netlink_sys::protocols::NETLINK_NETFILTER;
use polder_api::Family;

pub use self::anchor::NatAnchor;
pub use self::element::{Element, ElementKey, PortParts, union};
pub use self::family::TableFamily;
pub use self::monitor::{FilterMonitor, Originator};
use crate::{Error, Operation, Protocol, Socket};

impl Protocol for NetfilterMessage {
    const NUMBER: isize = NETLINK_NETFILTER;

    fn decode(message: &[u8]) -> Result<NetlinkMessage<Self>, DecodeError> {
        decode::with_raw_attributes(message).unwrap_or_else(|| NetlinkMessage::deserialize(message))
    }
}

/// A netlink socket for nftables.
pub type FilterSocket = Socket<NetfilterMessage>;

/// The tables of families `inet` and `arp` with one name, without the elements of their sets.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Table {
    /// The name of both tables.
    pub name: &'static str,
    /// The sets.
    pub sets: Vec<Set>,
    /// The base chains.
    pub chains: Vec<Chain>,
}

/// One of the two tables of a [`Table`]. [`TableFamily`] is the family of a table of another program.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TableKind {
    /// IPv4 and IPv6 (family `inet`).
    Ip,
    /// ARP (family `arp`).
    Arp,
}

impl TableKind {
    const BOTH: [Self; 2] = [Self::Ip, Self::Arp];
}

/// A set or map, which rules refer to by name. A set that exists in both tables has the same elements in both.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Set {
    /// The table that has the set.
    pub table: TableKind,
    /// The name of the set.
    pub name: &'static str,
    /// The type of its elements.
    pub key: ElementKey,
}

/// A base chain with policy accept: packets that match no rule pass.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Chain {
    /// The name of the chain.
    pub name: &'static str,
    /// The hook and priority.
    pub hook: Hook,
    /// The rules, in order of evaluation.
    pub rules: Vec<Rule>,
}

/// The hook and priority of a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Hook {
    /// All incoming packets, before connection tracking (prerouting, -300).
    Raw,
    /// Packets for the host itself (input, 0).
    Input,
    /// ARP packets for the host itself (input, 0).
    ArpInput,
    /// Source NAT of outgoing packets (nat, postrouting, 100).
    SourceNat,
    /// Destination NAT of incoming packets (nat, prerouting, -99).
    DestinationNat,
    /// Destination NAT of the host's own packets (nat, output, -99).
    LocalDestinationNat,
}

impl Hook {
    /// The table that has the hook.
    pub fn table(self) -> TableKind {
        match self {
            Self::Raw | Self::Input | Self::SourceNat | Self::DestinationNat | Self::LocalDestinationNat => {
                TableKind::Ip
            }
            Self::ArpInput => TableKind::Arp,
        }
    }
}

/// A rule: applies the verdict to packets for which all matches are true, and counts these packets.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Rule {
    /// The purpose of the rule, shown by `nft list`.
    pub comment: &'static str,
    /// The conditions; all must be true.
    pub matches: Vec<Match>,
    /// The verdict for matching packets.
    pub verdict: Verdict,
}

/// A condition on a packet.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Match {
    /// The input interface.
    Input(InterfaceMatch),
    /// The output interface.
    Output(InterfaceMatch),
    /// Any output interface except this.
    NotOutput(InterfaceMatch),
    /// The address family. Required before every match on addresses.
    Family(Family),
    /// UDP with this destination port.
    UdpTo(u16),
    /// VXLAN with this VNI. Requires [`Match::UdpTo`] before it.
    VxlanOf(u32),
    /// The source address, in or not in a set.
    Source(SetMatch),
    /// The destination address, in or not in a set.
    Destination(SetMatch),
    /// The pair of source link-layer address and source address, in or not in a set.
    Sender(SetMatch),
    /// The pair of source and destination address, in or not in a set.
    AddressPair(SetMatch),
    /// The source address is in 127.0.0.0/8. Requires [`Match::Family`] before it.
    FromLoopback,
    /// The destination address is in 127.0.0.0/8. Requires [`Match::Family`] before it.
    ToLoopback,
    /// The destination is unicast, neither multicast nor broadcast.
    Unicast,
    /// The destination is an address of the host.
    Local,
    /// ICMP for IPv6 of this type (RFC 4443).
    Icmpv6(u8),
    /// The address family of the inner packet of a tunnel. Requires [`Match::UdpTo`] before it.
    InnerFamily(Family),
    /// The pair of outer source address and first bits of the inner source address, in or not in a set. Requires
    /// [`Match::Family`] and [`Match::InnerFamily`] before it.
    TunnelSource {
        /// The address family of the inner packet.
        inner: Family,
        /// The number of bits of the inner source address that are compared.
        length: u8,
        /// The set. Its family is the outer one.
        set: SetMatch,
    },
    /// An ARP reply.
    ArpReply,
    /// The pair of sender link-layer address and sender address of an ARP packet, in or not in a set.
    ArpSender(SetMatch),
}

/// Interfaces, by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum InterfaceMatch {
    /// The interface with this name.
    Named(&'static str),
    /// All interfaces whose name has this prefix.
    Prefixed(&'static str),
}

/// Membership of a set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SetMatch {
    /// In the set of that family and name.
    Set(Family, &'static str),
    /// Not in the set of that family and name.
    NotSet(Family, &'static str),
}

/// The verdict on a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Verdict {
    /// Drops it.
    Drop,
    /// Accepts it in this chain: later rules of the chain are skipped.
    Accept,
    /// Translates the source to the address of the output interface and a random port.
    Masquerade,
    /// Translates the destination to the address and port in a map. A packet without an element passes the rule.
    /// Requires [`Match::Family`] before it.
    TranslateDestination(PortMap),
}

/// A map from a packet's destination to an address and port of the same family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PortMap {
    /// By transport protocol and port: a map with [`ElementKey::Port`] of that family and name.
    ByPort(Family, &'static str),
    /// By address, transport protocol and port: a map with [`ElementKey::AddressPort`] of that family and name.
    ByAddressAndPort(Family, &'static str),
}

/// The elements of a table's sets, by set name.
pub type Elements = BTreeMap<&'static str, BTreeSet<Element>>;

/// The state of a table in the kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TableState {
    /// The table exists as defined, with these elements.
    Intact(Elements),
    /// The table is missing or different; the reason.
    Different(String),
}

/// Number of times a set that exists in both tables is read again if its elements differ.
const MAX_REREADS: usize = 3;

/// Maximum number of dumps of a set, if they are not equal.
const MAX_DUMPS: usize = 4;

/// An atomic list of changes.
#[derive(Debug, Default)]
pub struct Transaction(Vec<Operation<NetfilterMessage>>);

impl Transaction {
    /// Both lists as one.
    #[must_use]
    pub fn and(mut self, other: Self) -> Self {
        self.0.extend(other.0);
        self
    }
}

impl Table {
    /// A hash of the definition, stored in the table's comment to recognise it.
    fn fingerprint(&self) -> String {
        let mut hasher = DefaultHasher::new();
        self.hash(&mut hasher);
        format!("polder {:016x}", hasher.finish())
    }

    /// Creates the table with these elements, and replaces any table of that name.
    pub fn install(&self, elements: &Elements) -> Transaction {
        let mut operations = self.delete().0;
        let fingerprint = self.fingerprint();
        operations.extend(TableKind::BOTH.map(|kind| encode::add_table(kind, self.name, Some(&fingerprint))));
        operations.extend(self.sets.iter().zip(1..).map(|(set, id)| encode::add_set(self.name, set, id)));
        for set in &self.sets {
            let members = elements.get(set.name).into_iter().flatten();
            operations.extend(encode::add_elements(self.name, set, members));
        }
        for chain in &self.chains {
            operations.push(encode::add_chain(self.name, chain));
            operations.extend(chain.rules.iter().map(|rule| encode::add_rule(self.name, chain, rule)));
        }
        Transaction(operations)
    }

    /// Adds and removes elements of one set. The transaction fails if an element to remove does not exist.
    pub fn change<'a>(
        &self,
        set: &'static str,
        add: impl IntoIterator<Item = &'a Element, IntoIter: Clone>,
        remove: impl IntoIterator<Item = &'a Element, IntoIter: Clone>,
    ) -> Transaction {
        let (add, remove) = (add.into_iter(), remove.into_iter());
        let change = |set| {
            let mut operations = encode::delete_elements(self.name, set, remove.clone());
            operations.extend(encode::add_elements(self.name, set, add.clone()));
            operations
        };
        Transaction(self.sets_named(set).flat_map(change).collect())
    }

    /// The set, once for each table that has it.
    fn sets_named(&self, name: &'static str) -> impl Iterator<Item = &Set> {
        self.sets.iter().filter(move |set| set.name == name)
    }

    /// Replaces all elements of the set by `elements`.
    pub fn refill(&self, set: &'static str, elements: &BTreeSet<Element>) -> Transaction {
        let refill = |set| {
            let mut operations = vec![encode::flush_set(self.name, set)];
            operations.extend(encode::add_elements(self.name, set, elements));
            operations
        };
        Transaction(self.sets_named(set).flat_map(refill).collect())
    }

    /// Deletes the table with its content. Succeeds if it does not exist.
    pub fn delete(&self) -> Transaction {
        let delete = |kind| [encode::add_table(kind, self.name, None), encode::delete_table(kind, self.name)];
        Transaction(TableKind::BOTH.into_iter().flat_map(delete).collect())
    }
}

impl FilterSocket {
    /// Commits a transaction: all of it or nothing.
    pub fn commit(&mut self, transaction: Transaction) -> Result<(), Error> {
        if transaction.0.is_empty() {
            return Ok(());
        }
        self.transact(encode::begin(), transaction.0, encode::end())
    }

    /// Whether a table with the name of `table` exists, of either family.
    pub fn has(&mut self, table: &Table) -> Result<bool, Error> {
        for kind in TableKind::BOTH {
            match self.get(encode::get_table(kind, table.name)) {
                Ok(_) => return Ok(true),
                Err(error) if error.is_missing() => {}
                Err(error) => return Err(error),
            }
        }
        Ok(false)
    }

    /// Reads the table from the kernel and compares it with `table`.
    pub fn table_state(&mut self, table: &Table) -> Result<TableState, Error> {
        match self.read(table) {
            Ok(found) => Ok(found),
            Err(error) if error.is_missing() => {
                Ok(TableState::Different("a part of the table is missing".to_owned()))
            }
            Err(error) => Err(error),
        }
    }

    fn read(&mut self, table: &Table) -> Result<TableState, Error> {
        for kind in TableKind::BOTH {
            let comment = decode::table_comment(&self.get(encode::get_table(kind, table.name))?);
            if comment.as_deref() != Some(table.fingerprint().as_str()) {
                return Ok(TableState::Different(format!(
                    "another version created the table (comment {:?})",
                    comment.unwrap_or_default()
                )));
            }
        }
        for chain in &table.chains {
            let found = self.get(encode::get_chain(table.name, chain))?;
            if !decode::accepts_by_policy(&found) {
                return Ok(TableState::Different(format!(
                    "chain {} does not have policy accept",
                    chain.name
                )));
            }
        }
        let mut rules = Vec::new();
        for kind in TableKind::BOTH {
            let message = encode::get_rules(kind, table.name);
            rules.extend(self.dump(message, |message| decode::rule(&message, table.name))?);
        }
        for chain in &table.chains {
            let found =
                rules.iter().filter(|rule| rule.chain == chain.name).map(|rule| rule.comment.as_str());
            if !found.eq(chain.rules.iter().map(|rule| rule.comment)) {
                return Ok(TableState::Different(format!("chain {} has different rules", chain.name)));
            }
        }
        let mut elements = Elements::new();
        for set in &table.sets {
            let found = self.elements(table, set)?;
            let Some(other) = elements.insert(set.name, found.clone()) else { continue };
            let mut differing: BTreeSet<Element> = other.symmetric_difference(&found).cloned().collect();
            // A change between the reads of the two tables disappears when both are read again.
            for _ in 0..MAX_REREADS {
                if differing.is_empty() {
                    break;
                }
                let first_set = table.sets_named(set.name).next().unwrap_or(set);
                let (first, second) = (self.elements(table, first_set)?, self.elements(table, set)?);
                differing.retain(|element| first.contains(element) != second.contains(element));
                elements.insert(set.name, second);
            }
            if !differing.is_empty() {
                return Ok(TableState::Different(format!(
                    "set {} differs between the inet and the arp table",
                    set.name
                )));
            }
        }
        Ok(TableState::Intact(elements))
    }

    /// The elements of a set of the table.
    pub fn elements(&mut self, table: &Table, set: &Set) -> Result<BTreeSet<Element>, Error> {
        let found = self.dump_set(encode::get_elements(table.name, set), decode::elements)?;
        Ok(found.into_iter().collect())
    }

    /// Dumps a set.
    ///
    /// The kernel dumps a set by position, and can resize a hash set at any time, which changes the positions: a dump
    /// of several messages can miss elements (`nft_rhash_walk` in `net/netfilter/nft_set_hash.c`). So the dump is
    /// repeated until two consecutive dumps are equal. If no two are equal, because the set changes all the time, this
    /// returns the last dump.
    pub(crate) fn dump_set<T: PartialEq>(
        &mut self,
        request: NetfilterMessage,
        decode: impl Fn(&NetfilterMessage) -> Result<Vec<T>, Error>,
    ) -> Result<Vec<T>, Error> {
        let mut found = Vec::new();
        for _ in 0..MAX_DUMPS {
            let messages = self.dump(request.clone(), |message| Some(decode(&message)))?;
            let messages: Vec<Vec<T>> = messages.into_iter().collect::<Result<_, _>>()?;
            // The last message of a dump has no elements.
            let is_single_message = messages.iter().filter(|elements| !elements.is_empty()).count() < 2;
            let previous = std::mem::replace(&mut found, messages.into_iter().flatten().collect());
            if is_single_message || found == previous {
                break;
            }
        }
        Ok(found)
    }
}
