//! Read-only sockets. Each test runs in its own network namespace. Needs root.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

mod common;

use common::in_a_new_namespace;
use polder_api::{Family, Mac};
use polder_netlink::nft::{ElementKey, Elements, FilterSocket, Set, Table, TableKind};
use polder_netlink::{Error, RouteSocket, link};

const BRIDGE_MAC: Mac = Mac([2, 0, 0, 0, 0, 1]);

#[test]
fn a_read_only_route_socket_changes_nothing() {
    in_a_new_namespace(|socket| {
        socket.execute_all(link::create_bridge("br", BRIDGE_MAC, 1450)).unwrap();
        let index = socket.link("br").unwrap().unwrap().index;
        let mut reader = RouteSocket::open_to_read().unwrap();
        let before = reader.links().unwrap();
        for change in [link::delete(index), link::change_index(index).mtu(1300).into()] {
            assert!(matches!(reader.execute([change]), Err(Error::ReadOnly)));
        }
        assert_eq!(reader.execute([]).unwrap().len(), 0, "nothing is no change");
        assert_eq!(reader.links().unwrap(), before);
    });
}

#[test]
fn a_read_only_filter_socket_reads_tables_and_changes_nothing() {
    in_a_new_namespace(|_| {
        let table = Table { name: "lab", sets: Vec::new(), chains: Vec::new() };
        let mut filter = FilterSocket::open().unwrap();
        filter.commit(table.install(&Elements::new())).unwrap();
        let before = filter.table_state(&table).unwrap();
        let mut reader = FilterSocket::open_to_read().unwrap();
        let set = Set { table: TableKind::Ip, name: "more", key: ElementKey::Address(Family::V4) };
        let more = Table { sets: vec![set], ..table.clone() };
        assert!(matches!(reader.commit(more.install(&Elements::new())), Err(Error::ReadOnly)));
        assert_eq!(
            (reader.table_state(&table).unwrap(), filter.table_state(&table).unwrap()),
            (before.clone(), before)
        );
    });
}
