//! nftables: one table of ours, made and changed in transactions.
//!
//! A [`Table`] says what is fixed: sets, chains and rules. In the kernel it is two of the same name, one for IP and one for
//! ARP, which are made and changed together. What comes and goes are the [`Element`]s of the sets. The
//! kernel is spoken to directly, so that a pod's entry costs a system call and not a process, and nothing that
//! comes from the cluster's store is ever given to another program. Of tables of others, [`foreign`] reads what they make of
//! forwarded packets.

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
pub use self::element::{Element, Key, union};
pub use self::family::TableFamily;
pub use self::monitor::{Author, FilterMonitor};
use crate::{Error, Operation, Protocol, Socket};

impl Protocol for NetfilterMessage {
    const NUMBER: isize = NETLINK_NETFILTER;

    fn decode(message: &[u8]) -> Result<NetlinkMessage<Self>, DecodeError> {
        decode::undigested(message).unwrap_or_else(|| NetlinkMessage::deserialize(message))
    }
}

/// A socket for nftables.
pub type FilterSocket = Socket<NetfilterMessage>;

/// The tables of families `inet` and `arp` with one name: everything of them but the elements of their sets.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Table {
    /// Its name.
    pub name: &'static str,
    /// Its sets.
    pub sets: Vec<Set>,
    /// Its chains.
    pub chains: Vec<Chain>,
}

/// What the kernel keeps apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Side {
    /// IPv4 and IPv6 (family `inet`).
    Ip,
    /// ARP (family `arp`).
    Arp,
}

impl Side {
    const BOTH: [Self; 2] = [Self::Ip, Self::Arp];
}

/// A set of elements, to which rules refer by name. One that is on both sides has the same elements on both.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Set {
    /// Where it is.
    pub side: Side,
    /// Its name.
    pub name: &'static str,
    /// What its elements are.
    pub key: Key,
}

/// A base chain. Its policy is to accept: what Polder does not name, it does not judge.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Chain {
    /// Its name.
    pub name: &'static str,
    /// Where it hangs.
    pub hook: Hook,
    /// Its rules, in order.
    pub rules: Vec<Rule>,
}

/// Where a chain hangs, and with which priority.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Hook {
    /// Everything that comes in, before connection tracking sees it (prerouting, -300).
    Raw,
    /// What is for the host itself (input, 0).
    Input,
    /// ARP that is for the host itself (input, 0).
    ArpInput,
    /// The source address of what goes out (nat, postrouting, 100).
    SourceNat,
}

impl Hook {
    /// What comes by there.
    pub fn side(self) -> Side {
        match self {
            Self::Raw | Self::Input | Self::SourceNat => Side::Ip,
            Self::ArpInput => Side::Arp,
        }
    }
}

/// A rule: if all matches hold, the verdict.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Rule {
    /// What it is for, in words; `nft list` shows it.
    pub comment: &'static str,
    /// What must hold.
    pub matches: Vec<Match>,
    /// What then happens. Packets are counted.
    pub verdict: Verdict,
}

/// A property of a packet.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Match {
    /// It came in through this interface, or one whose name starts so.
    Input(Interface),
    /// It goes out through this interface, or one whose name starts so.
    Output(Interface),
    /// It does not go out through this interface, nor one whose name starts so.
    NotOutput(Interface),
    /// It is of this family. Stands before every match that looks at addresses.
    Family(Family),
    /// It is UDP to this port.
    UdpTo(u16),
    /// It is VXLAN of this network identifier. Stands after [`Match::UdpTo`].
    VxlanOf(u32),
    /// Its source address is, or is not, in the set.
    Source(Within),
    /// Its destination address is, or is not, in the set.
    Destination(Within),
    /// Its sender's link-layer address together with its source address is, or is not, in the set.
    Sender(Within),
    /// Its destination is one address, neither multicast nor broadcast.
    Unicast,
    /// It is ICMP for IPv6 of this type.
    Icmpv6(u8),
    /// The packet in the tunnel is of this family. Stands after [`Match::UdpTo`].
    Carries(Family),
    /// Its source address together with the first bits of that of the packet in the tunnel is, or is not, in the set. Stands
    /// after [`Match::Family`] and [`Match::Carries`].
    Bearer {
        /// The family of the packet in the tunnel.
        carried: Family,
        /// How many bits of its source address count.
        length: u8,
        /// Of the family of the tunnel.
        within: Within,
    },
    /// It is an answer over ARP.
    ArpReply,
    /// The link-layer address together with the address that it tells over ARP is, or is not, in the set.
    ArpSender(Within),
}

/// An interface, by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Interface {
    /// The one of this name.
    Named(&'static str),
    /// All whose name starts so.
    Prefixed(&'static str),
}

/// Membership of a set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Within {
    /// It is in the set.
    Set(Family, &'static str),
    /// It is not in the set.
    NotSet(Family, &'static str),
}

/// What happens to a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Verdict {
    /// It is dropped.
    Drop,
    /// No later rule of the chain judges it.
    Accept,
    /// It leaves with the address of the interface that it leaves through, and a random port.
    Masquerade,
}

/// The elements of a table's sets, by the name of the set.
pub type Elements = BTreeMap<&'static str, BTreeSet<Element>>;

/// What the kernel has in the place of a table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Found {
    /// The very table, with these elements.
    Intact(Elements),
    /// Nothing, or something else: why it is not the table.
    Different(String),
}

/// How often a set that is on both sides is read again because they differ.
const ATTEMPTS: usize = 3;

/// Changes that happen together or not at all.
#[derive(Debug)]
pub struct Transaction(Vec<Operation<NetfilterMessage>>);

impl Table {
    /// A number that is another for another table. The kernel keeps it in the table's comment.
    fn fingerprint(&self) -> String {
        let mut hasher = DefaultHasher::new();
        self.hash(&mut hasher);
        format!("polder {:016x}", hasher.finish())
    }

    /// Makes the table with these elements, in place of whatever is there under its name.
    pub fn install(&self, elements: &Elements) -> Transaction {
        let mut all = self.delete().0;
        let fingerprint = self.fingerprint();
        all.extend(Side::BOTH.map(|side| encode::add_table(side, self.name, Some(&fingerprint))));
        all.extend(self.sets.iter().zip(1..).map(|(set, id)| encode::add_set(self.name, set, id)));
        for set in &self.sets {
            let members = elements.get(set.name).into_iter().flatten();
            all.extend(encode::add_elements(self.name, set, members));
        }
        for chain in &self.chains {
            all.push(encode::add_chain(self.name, chain));
            all.extend(chain.rules.iter().map(|rule| encode::add_rule(self.name, chain, rule)));
        }
        Transaction(all)
    }

    /// Changes the elements of one set. The transaction fails if one that is to go is not there.
    pub fn change<'a>(
        &self,
        set: &'static str,
        add: impl IntoIterator<Item = &'a Element, IntoIter: Clone>,
        remove: impl IntoIterator<Item = &'a Element, IntoIter: Clone>,
    ) -> Transaction {
        let (add, remove) = (add.into_iter(), remove.into_iter());
        let change = |set| {
            let mut all = encode::delete_elements(self.name, set, remove.clone());
            all.extend(encode::add_elements(self.name, set, add.clone()));
            all
        };
        Transaction(self.named(set).flat_map(change).collect())
    }

    /// The set, on each side where it is.
    fn named(&self, name: &'static str) -> impl Iterator<Item = &Set> {
        self.sets.iter().filter(move |set| set.name == name)
    }

    /// Puts `elements` in the place of all that the set has.
    pub fn refill(&self, set: &'static str, elements: &BTreeSet<Element>) -> Transaction {
        let refill = |set| {
            let mut all = vec![encode::flush_set(self.name, set)];
            all.extend(encode::add_elements(self.name, set, elements));
            all
        };
        Transaction(self.named(set).flat_map(refill).collect())
    }

    /// Takes the table away, with all that is in it. It need not be there.
    pub fn delete(&self) -> Transaction {
        let delete = |side| [encode::add_table(side, self.name, None), encode::delete_table(side, self.name)];
        Transaction(Side::BOTH.into_iter().flat_map(delete).collect())
    }
}

impl FilterSocket {
    /// Carries out a transaction. Done or not at all.
    pub fn commit(&mut self, transaction: Transaction) -> Result<(), Error> {
        if transaction.0.is_empty() {
            return Ok(());
        }
        self.transact(encode::begin(), transaction.0, encode::end())
    }

    /// Whether there is anything in the place of `table`.
    pub fn has(&mut self, table: &Table) -> Result<bool, Error> {
        for side in Side::BOTH {
            match self.get(encode::get_table(side, table.name)) {
                Ok(_) => return Ok(true),
                Err(error) if error.is_missing() => {}
                Err(error) => return Err(error),
            }
        }
        Ok(false)
    }

    /// Reads what the kernel has in the place of `table`.
    pub fn find(&mut self, table: &Table) -> Result<Found, Error> {
        match self.read(table) {
            Ok(found) => Ok(found),
            Err(error) if error.is_missing() => Ok(Found::Different("a part of it is missing".to_owned())),
            Err(error) => Err(error),
        }
    }

    fn read(&mut self, table: &Table) -> Result<Found, Error> {
        for side in Side::BOTH {
            let comment = decode::table_comment(&self.get(encode::get_table(side, table.name))?);
            if comment.as_deref() != Some(table.fingerprint().as_str()) {
                return Ok(Found::Different(format!("made as {:?}", comment.unwrap_or_default())));
            }
        }
        for chain in &table.chains {
            let found = self.get(encode::get_chain(table.name, chain))?;
            if !decode::accepts_by_policy(&found) {
                return Ok(Found::Different(format!("chain {} has another policy", chain.name)));
            }
        }
        let mut rules = Vec::new();
        for side in Side::BOTH {
            let message = encode::get_rules(side, table.name);
            rules.extend(self.dump(message, |message| decode::rule(&message, table.name))?);
        }
        for chain in &table.chains {
            let found =
                rules.iter().filter(|rule| rule.chain == chain.name).map(|rule| rule.comment.as_str());
            if !found.eq(chain.rules.iter().map(|rule| rule.comment)) {
                return Ok(Found::Different(format!("chain {} has other rules", chain.name)));
            }
        }
        let mut elements = Elements::new();
        for set in &table.sets {
            let found = self.elements(table, set)?;
            let Some(before) = elements.insert(set.name, found.clone()) else { continue };
            let mut differ: BTreeSet<Element> = before.symmetric_difference(&found).cloned().collect();
            // What has changed between the looks at the two sides is the same when one looks again.
            for _ in 0..ATTEMPTS {
                if differ.is_empty() {
                    break;
                }
                let other = table.named(set.name).next().unwrap_or(set);
                let (one, two) = (self.elements(table, other)?, self.elements(table, set)?);
                differ.retain(|element| one.contains(element) != two.contains(element));
                elements.insert(set.name, two);
            }
            if !differ.is_empty() {
                return Ok(Found::Different(format!("set {} is not the same on both sides", set.name)));
            }
        }
        Ok(Found::Intact(elements))
    }

    fn elements(&mut self, table: &Table, set: &Set) -> Result<BTreeSet<Element>, Error> {
        let found =
            self.dump(encode::get_elements(table.name, set), |message| Some(decode::elements(&message)))?;
        let found: Vec<_> = found.into_iter().collect::<Result<_, _>>()?;
        Ok(found.into_iter().flatten().collect())
    }
}
