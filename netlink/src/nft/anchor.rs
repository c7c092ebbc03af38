//! A table that keeps the kernel's NAT running.
//!
//! The kernel applies NAT only while a chain of type `nat` is loaded (`nf_nat_register_fn` in
//! `net/netfilter/nf_nat_core.c`), and tracks connections only while a rule is loaded that needs it: the chain alone
//! is not enough (`nf_ct_netns_get`, called for example by `nft_masq_init`). When the last one is deleted, packets of
//! established connections leave untranslated, and replies to them are delivered to the host: the connections are
//! reset. `nft flush ruleset` deletes all tables except those owned by another socket (flag `owner`, Linux 5.12;
//! `nft_flush` in `net/netfilter/nf_tables_api.c`).

use super::{Chain, FilterSocket, Hook, InterfaceMatch, Match, Rule, TableKind, Verdict, encode};
use crate::Error;

/// A table of family `inet` with a chain of type `nat` and a rule that matches nothing. This socket owns it: no other
/// process can change or delete it, and the kernel deletes it when the socket is closed.
#[derive(Debug)]
pub struct NatAnchor(
    #[expect(dead_code, reason = "the table is there for as long as the socket is")] FilterSocket,
);

impl NatAnchor {
    /// Creates the table with that name in the network namespace of the calling thread.
    pub fn hold(name: &str) -> Result<Self, Error> {
        let mut socket = FilterSocket::open()?;
        let lo = InterfaceMatch::Named("lo");
        let rule = Rule {
            comment: "keeps connection tracking on, and matches nothing",
            matches: vec![Match::Output(lo), Match::NotOutput(lo)],
            verdict: Verdict::Masquerade,
        };
        let chain = Chain { name: "nat", hook: Hook::SourceNat, rules: Vec::new() };
        let made = vec![
            encode::add_owned_table(TableKind::Ip, name),
            encode::add_chain(name, &chain),
            encode::add_rule(name, &chain, &rule),
        ];
        socket.transact(encode::begin(), made, encode::end())?;
        Ok(Self(socket))
    }
}
