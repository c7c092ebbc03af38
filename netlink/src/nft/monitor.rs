//! nftables notifications: the process that changed a table.

use std::time::Duration;

use netlink_sys::protocols::NETLINK_NETFILTER;

use crate::Error;
use crate::monitor::{Inbox, Received};

/// `NFNLGRP_NFTABLES` (`include/uapi/linux/netfilter/nfnetlink.h`).
const GROUP: u32 = 7;

/// `NFNL_SUBSYS_NFTABLES`
const NFTABLES: u8 = 10;

/// `NFT_MSG_NEWGEN` (`include/uapi/linux/netfilter/nf_tables.h`): ends every transaction, and has the process that
/// committed it.
const NEW_GENERATION: u8 = 15;

/// `NFPROTO_INET` and `NFPROTO_ARP`
const FAMILIES: [u8; 2] = [1, 3];

/// The table name, the first attribute of every object in a table (`NFTA_TABLE_NAME`, `NFTA_CHAIN_TABLE` and so on).
const TABLE: u16 = 1;

/// `NFTA_GEN_PROC_PID`, big-endian, and `NFTA_GEN_PROC_NAME`.
const PROCESS: (u16, u16) = (2, 3);

/// The offset of `nlmsg_pid` in `struct nlmsghdr`, in bytes.
const PORT: usize = 12;

/// The sizes of `struct nlmsghdr`, `struct nfgenmsg` and `struct nlattr`, in bytes.
const HEADERS: (usize, usize, usize) = (16, 4, 4);

/// The process that changed the table. The default value means that notifications were lost, so the process is
/// unknown.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Originator {
    /// The port of its netlink socket, as in [`crate::Socket::port`].
    pub port: u32,
    /// The thread ID in the initial PID namespace.
    pub thread: Option<u32>,
    /// The name of the thread.
    pub name: Option<String>,
}

/// A socket that receives changes of the tables with one name.
#[derive(Debug)]
pub struct FilterMonitor {
    inbox: Inbox,
    table: Transactions,
}

/// State of decoding the notifications of a transaction.
#[derive(Debug)]
struct Transactions {
    /// The name of the watched table.
    table: &'static str,
    /// Whether the current transaction has changed it.
    touched: bool,
}

impl FilterMonitor {
    /// Subscribes to changes of that table in the network namespace of the calling thread.
    pub fn open(table: &'static str) -> Result<Self, Error> {
        let inbox = Inbox::open(NETLINK_NETFILTER, [GROUP])?;
        Ok(Self { inbox, table: Transactions { table, touched: false } })
    }

    /// Sets the receive timeout, after which [`FilterMonitor::wait`] returns an error.
    pub fn set_timeout(&self, max_wait: Duration) -> Result<(), Error> {
        self.inbox.set_timeout(max_wait)
    }

    /// Waits for the next notifications and returns the processes that changed the table. The list may be empty: most
    /// notifications concern other tables.
    pub fn wait(&mut self) -> Result<Vec<Originator>, Error> {
        Ok(match self.inbox.receive()? {
            Received::Messages(messages) => self.table.originators(messages),
            Received::Overrun => vec![Originator::default()],
        })
    }
}

impl Transactions {
    fn originators(&mut self, messages: &[u8]) -> Vec<Originator> {
        let mut originators = Vec::new();
        let number = |bytes: &[u8]| bytes.first_chunk::<4>().copied();
        for message in parts(messages, |header| usize::try_from(u32::from_ne_bytes(number(header)?)).ok()) {
            let (Some(&[kind, subsystem]), Some(family)) =
                (message.get(4..6).and_then(|bytes| bytes.first_chunk::<2>()), message.get(HEADERS.0))
            else {
                continue;
            };
            if subsystem != NFTABLES {
                continue;
            }
            let attributes = message.get(HEADERS.0 + HEADERS.1..).unwrap_or_default();
            if kind != NEW_GENERATION {
                let table = attribute(attributes, TABLE).and_then(text);
                self.touched |= FAMILIES.contains(family) && table.as_deref() == Some(self.table);
            } else if std::mem::take(&mut self.touched) {
                let thread = attribute(attributes, PROCESS.0).and_then(number);
                originators.push(Originator {
                    port: message.get(PORT..).and_then(number).map_or(0, u32::from_ne_bytes),
                    thread: thread.map(u32::from_be_bytes),
                    name: attribute(attributes, PROCESS.1).and_then(text),
                });
            }
        }
        originators
    }
}

/// The parts of a buffer. Each part begins with its length and is padded to four bytes.
fn parts<'a>(
    buffer: &'a [u8],
    length: impl Fn(&[u8]) -> Option<usize> + 'a,
) -> impl Iterator<Item = &'a [u8]> + 'a {
    let mut rest = buffer;
    std::iter::from_fn(move || {
        let size = length(rest).filter(|size| *size >= HEADERS.2)?;
        let part = rest.get(..size)?;
        rest = rest.get(size.next_multiple_of(4)..).unwrap_or_default();
        Some(part)
    })
}

/// The value of an attribute, if present.
fn attribute(attributes: &[u8], wanted: u16) -> Option<&[u8]> {
    let number = |bytes: &[u8]| bytes.first_chunk::<2>().map(|bytes| u16::from_ne_bytes(*bytes));
    let mut found = parts(attributes, move |header| number(header).map(usize::from));
    found.find(|part| number(&part[2..]) == Some(wanted)).map(|part| &part[HEADERS.2..])
}

fn text(bytes: &[u8]) -> Option<String> {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    std::str::from_utf8(&bytes[..end]).ok().map(str::to_owned)
}
