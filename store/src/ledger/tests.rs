//! Tests of the ledger on disk.

use super::*;
use polder_ipam::ledger::AttachmentKind;

fn ledger() -> (tempfile::TempDir, Sqlite) {
    let folder = tempfile::tempdir().unwrap();
    let mut ledger = Sqlite::open(&folder.path().join("ledger.db")).unwrap();
    ledger.enter_boot(&BootId::new("boot-1")).unwrap();
    (folder, ledger)
}

/// The block of all IPv4 addresses 10.0.0.0 to 10.0.0.63.
fn owned() -> OwnedBlock {
    let block = Block::new("10.0.0.0/26".parse().unwrap());
    OwnedBlock { block, pool: "p".parse().unwrap(), nonce: Nonce::new("x"), leaving: false }
}

fn held(container: &str, addresses: &[&str]) -> AttachmentEntry {
    AttachmentEntry {
        attachment: format!("net/{container}/eth0").parse().unwrap(),
        kind: AttachmentKind::Pod,
        since: Moment::from_millis(1_000),
        addresses: addresses.iter().map(|address| address.parse().unwrap()).collect(),
        mac: "0a:58:0a:00:00:05".parse().unwrap(),
        mtu: 1450,
        netns: format!("/run/netns/{container}"),
        pod: Some(Pod { namespace: "default".into(), name: container.into(), uid: None }),
        leaving: false,
        gateways: Vec::new(),
        ports: Vec::new(),
    }
}

#[test]
fn the_ledger_survives_a_restart() {
    let (folder, mut ledger) = ledger();
    let identity = NodeIdentity {
        node: "n1".parse().unwrap(),
        incarnation: Incarnation::new("i"),
        cluster: ClusterId::new("c"),
        member_state: MemberState::Member,
    };
    let owned = owned();
    let ports = ["8080:80/tcp", "192.0.2.1:53:5353/udp"].map(|port| port.parse().unwrap()).into();
    let one = AttachmentEntry { ports, ..held("one", &["10.0.0.2", "fd00::2"]) };
    let two = held("two", &["10.0.0.3"]);
    ledger.identify(&identity).unwrap();
    ledger.add_block(&owned).unwrap();
    ledger.add_gateway("10.0.0.1".parse().unwrap()).unwrap();
    ledger.add_attachment(&one).unwrap();
    ledger.add_attachment(&two).unwrap();
    ledger.mark_leaving(&two.attachment).unwrap();
    drop(ledger);

    let ledger = Sqlite::open(&folder.path().join("ledger.db")).unwrap();
    assert_eq!(ledger.identity().unwrap(), Some(identity));
    assert_eq!(ledger.blocks().unwrap(), [owned]);
    assert_eq!(ledger.gateways().unwrap(), ["10.0.0.1".parse::<IpAddr>().unwrap()]);
    assert_eq!(ledger.attachments().unwrap(), [one, AttachmentEntry { leaving: true, ..two }]);
}

#[test]
fn the_database_refuses_used_addresses_and_existing_attachments() {
    let (_folder, mut ledger) = ledger();
    ledger.add_gateway("10.0.0.1".parse().unwrap()).unwrap();
    ledger.add_attachment(&held("one", &["10.0.0.2"])).unwrap();
    assert!(ledger.add_attachment(&held("two", &["10.0.0.3", "10.0.0.2"])).is_err());
    assert!(ledger.add_attachment(&held("two", &["10.0.0.1"])).is_err());
    assert!(ledger.add_attachment(&held("one", &["10.0.0.4"])).is_err());
    assert!(ledger.add_gateway("10.0.0.2".parse().unwrap()).is_err());
    assert_eq!(ledger.attachments().unwrap(), [held("one", &["10.0.0.2"])], "something was half done");
}

#[test]
fn addresses_of_a_removed_attachment_cool_down_until_they_are_allocated_again() {
    let (_folder, mut ledger) = ledger();
    ledger.add_block(&owned()).unwrap();
    let six = OwnedBlock { block: Block::new("fd00::/122".parse().unwrap()), ..owned() };
    ledger.add_block(&six).unwrap();
    let one = held("one", &["10.0.0.2", "fd00::2"]);
    ledger.add_attachment(&one).unwrap();
    let freed = Moment::from_millis(5_000);
    ledger.remove_attachment(&one.attachment, freed).unwrap();
    ledger.remove_attachment(&one.attachment, Moment::from_millis(9_000)).unwrap();
    assert_eq!(ledger.attachments().unwrap(), []);
    assert_eq!(
        ledger.resting().unwrap(),
        [("10.0.0.2".parse().unwrap(), freed), ("fd00::2".parse().unwrap(), freed)]
    );
    ledger.add_attachment(&held("two", &["10.0.0.2"])).unwrap();
    assert_eq!(ledger.resting().unwrap(), [("fd00::2".parse().unwrap(), freed)]);
}

#[test]
fn a_reboot_removes_all_attachments_and_starts_their_cool_down() {
    let (_folder, mut ledger) = ledger();
    ledger.add_block(&owned()).unwrap();
    let one = held("one", &["10.0.0.2"]);
    ledger.add_gateway("10.0.0.1".parse().unwrap()).unwrap();
    ledger.add_attachment(&one).unwrap();
    ledger.add_attachment(&held("two", &["10.0.0.3"])).unwrap();
    ledger.remove_attachment(&held("two", &[]).attachment, Moment::from_millis(99_000_000)).unwrap();
    ledger.keep_sysctl("net/ipv4/ip_forward", "0").unwrap();
    assert_eq!(ledger.enter_boot(&BootId::new("boot-1")).unwrap(), [], "the same boot voids nothing");
    assert_eq!(ledger.sysctls().unwrap().len(), 1);
    assert_eq!(ledger.enter_boot(&BootId::new("boot-2")).unwrap(), [one]);
    assert_eq!(ledger.attachments().unwrap(), []);
    let resting = ledger.resting().unwrap();
    assert_eq!(resting.len(), 2);
    assert!(resting.iter().all(|(_, freed)| *freed == Moment::BOOT), "{resting:?}");
    assert_eq!(ledger.gateways().unwrap().len(), 1, "the node keeps its own address");
    assert_eq!(ledger.sysctls().unwrap(), [], "what was set before the boot is not what was before");
}

/// Upgrades the ledger as a later release with `step` does.
fn upgrade(path: &Path, step: LayoutStep) {
    let layouts = [LAYOUTS, &[step]].concat();
    drop(open_database(path, &layouts).unwrap());
}

#[test]
fn an_incompatible_ledger_of_a_later_release_is_not_opened() {
    let (folder, ledger) = ledger();
    drop(ledger);
    let path = folder.path().join("ledger.db");
    upgrade(&path, LayoutStep::Adds("CREATE TABLE more (x TEXT) STRICT"));
    let remade = [
        LAYOUTS,
        &[
            LayoutStep::Adds(""),
            LayoutStep::Remakes("ALTER TABLE blocks RENAME TO slices"),
            LayoutStep::Adds(""),
        ],
    ];
    drop(open_database(&path, &remade.concat()).unwrap());
    let error = Sqlite::open(&path).unwrap_err().to_string();
    let layout = format!("layout {}", LAYOUTS.len() + 3);
    assert!(error.contains(&layout) && error.contains("ledger.db"), "{error}");
}

#[test]
fn a_later_ledger_without_compatibility_information_is_not_opened() {
    let (folder, ledger) = ledger();
    ledger.database.execute_batch("DROP TABLE readable").unwrap();
    ledger.database.pragma_update(None, "user_version", u32::try_from(LAYOUTS.len()).unwrap() + 1).unwrap();
    drop(ledger);
    let error = Sqlite::open(&folder.path().join("ledger.db")).unwrap_err().to_string();
    assert!(error.contains(&format!("layout {}", LAYOUTS.len() + 1)), "{error}");
}

#[test]
fn a_compatible_ledger_of_a_later_release_works_in_both_releases() {
    let (folder, mut ledger) = ledger();
    ledger.add_block(&owned()).unwrap();
    let (one, two) = (held("one", &["10.0.0.2"]), held("two", &["10.0.0.3"]));
    ledger.add_attachment(&one).unwrap();
    drop(ledger);
    let path = folder.path().join("ledger.db");
    let addition = LayoutStep::Adds(
        "ALTER TABLE attachments ADD COLUMN colour TEXT NOT NULL DEFAULT 'none';
         ALTER TABLE blocks ADD COLUMN weight INTEGER NOT NULL DEFAULT 1;",
    );
    upgrade(&path, addition);
    let mut earlier = Sqlite::open(&path).unwrap();
    assert_eq!(earlier.attachments().unwrap(), std::slice::from_ref(&one));
    earlier.add_attachment(&two).unwrap();
    earlier.remove_attachment(&one.attachment, Moment::from_millis(5)).unwrap();
    drop(earlier);
    upgrade(&path, addition);
    let later = Sqlite::open(&path).unwrap();
    assert_eq!(later.attachments().unwrap(), [two]);
    let colours = later.rows("SELECT colour FROM attachments", |row| row.get::<_, String>(0)).unwrap();
    assert_eq!(colours, ["none"]);
}

#[test]
fn the_error_about_an_unwritable_folder_names_the_file() {
    let error = Sqlite::open(Path::new("/proc/nowhere/ledger.db")).unwrap_err().to_string();
    assert!(error.contains("/proc/nowhere/ledger.db"), "{error}");
}

#[test]
fn the_first_layout_is_migrated() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ledger.db");
    drop(open_database(&path, &LAYOUTS[..1]).unwrap());
    let old = Connection::open(&path).unwrap();
    old.execute_batch(
        "INSERT INTO attachments (attachment, netns, mac, mtu) VALUES ('net/c/eth0', '', '0a:58:0a:00:00:05', 1450);
         INSERT INTO addresses (address, attachment) VALUES ('10.0.0.2', 1);",
    )
    .unwrap();
    drop(old);
    let ledger = Sqlite::open(&path).unwrap();
    let [held] = &ledger.attachments().unwrap()[..] else { panic!("one attachment was there") };
    assert_eq!((held.kind, held.addresses.len()), (AttachmentKind::Pod, 1));
}

#[test]
fn an_address_of_another_ipam_plugin_has_no_cool_down() {
    let (_folder, mut ledger) = ledger();
    ledger.add_block(&owned()).unwrap();
    let one = held("one", &["10.0.0.2", "192.168.0.2"]);
    ledger.add_attachment(&one).unwrap();
    ledger.remove_attachment(&one.attachment, Moment::BOOT).unwrap();
    assert_eq!(ledger.resting().unwrap(), [("10.0.0.2".parse().unwrap(), Moment::BOOT)]);
}

#[test]
fn a_block_is_removed_with_its_cool_downs_only_when_unused() {
    let (_folder, mut ledger) = ledger();
    ledger.add_block(&owned()).unwrap();
    let one = held("one", &["10.0.0.2"]);
    ledger.add_attachment(&one).unwrap();
    ledger.mark_block_leaving(owned().block).unwrap();
    let error = ledger.remove_block(owned().block).unwrap_err();
    assert!(format!("{error:?}").contains("10.0.0.2 of block 10.0.0.0/26 is in use"), "{error:?}");
    assert_eq!(ledger.blocks().unwrap(), [OwnedBlock { leaving: true, ..owned() }]);
    ledger.remove_attachment(&one.attachment, Moment::from_millis(5)).unwrap();
    ledger.remove_block(owned().block).unwrap();
    assert_eq!((ledger.blocks().unwrap().len(), ledger.resting().unwrap().len()), (0, 0));
}

#[test]
fn an_attachment_keeps_its_original_gateways() {
    let (_folder, mut ledger) = ledger();
    let [first, second, third] = ["10.0.0.1", "10.0.1.1", "10.0.2.1"].map(|address| address.parse().unwrap());
    ledger.add_gateway(first).unwrap();
    ledger.add_attachment(&held("one", &["10.0.0.2"])).unwrap();
    ledger.replace_gateway(first, second, Moment::from_millis(5)).unwrap();
    ledger.add_attachment(&held("two", &["10.0.0.3"])).unwrap();
    ledger.replace_gateway(second, third, Moment::from_millis(6)).unwrap();
    let made_with: Vec<_> = ledger.attachments().unwrap().into_iter().map(|held| held.gateways).collect();
    assert_eq!(made_with, [vec![first], vec![second]]);
    assert_eq!(ledger.gateways().unwrap(), [third]);
    assert_eq!(
        ledger.resting().unwrap(),
        [(first, Moment::from_millis(5)), (second, Moment::from_millis(6))]
    );
}
