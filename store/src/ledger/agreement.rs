//! Compares the ledger on disk with the ledger in memory, so that tests with the latter are valid for the former.

use std::net::IpAddr;
use std::path::Path;

use polder_api::Attachment;
use polder_ipam::ids::{BootId, ClusterId, Incarnation, Nonce};
use polder_ipam::ledger::memory::Memory;
use polder_ipam::ledger::{
    AttachmentEntry, AttachmentKind, Ledger, LedgerError, MemberState, NodeIdentity, OwnedBlock,
};
use polder_ipam::{Block, Moment};
use proptest::prelude::*;

use super::Sqlite;

#[derive(Debug, Clone)]
enum Step {
    Identify(u8, bool),
    Boot(u8),
    AddBlock(u8),
    LeaveBlock(u8),
    RemoveBlock(u8),
    Gateway(u8),
    RemoveGateway(u8, u16),
    ReplaceGateway(u8, u8, u16),
    Attach(u8, u8, u8),
    Leave(u8),
    Detach(u8, u16),
    Clear,
    Rest(u8, u16),
}

fn step() -> impl Strategy<Value = Step> {
    let (small, address) = (0..3_u8, 0..14_u8);
    prop_oneof![
        1 => (small.clone(), any::<bool>()).prop_map(|(name, removed)| Step::Identify(name, removed)),
        1 => small.clone().prop_map(Step::Boot),
        3 => small.clone().prop_map(Step::AddBlock),
        1 => small.clone().prop_map(Step::LeaveBlock),
        2 => small.clone().prop_map(Step::RemoveBlock),
        1 => (address.clone(), any::<u16>()).prop_map(|(last, at)| Step::RemoveGateway(last, at)),
        2 => address.clone().prop_map(Step::Gateway),
        2 => (address.clone(), address.clone(), any::<u16>())
            .prop_map(|(old, new, at)| Step::ReplaceGateway(old, new, at)),
        8 => (small.clone(), address.clone(), address.clone())
            .prop_map(|(container, one, two)| Step::Attach(container, one, two)),
        2 => small.clone().prop_map(Step::Leave),
        1 => Just(Step::Clear),
        1 => (address.clone(), any::<u16>()).prop_map(|(last, at)| Step::Rest(last, at)),
        6 => (small, any::<u16>()).prop_map(|(container, at)| Step::Detach(container, at)),
    ]
}

/// Three blocks of four addresses; the last two test addresses are in no block.
fn block(number: u8) -> Block {
    Block::new(format!("10.0.0.{}/30", number * 4).parse().unwrap())
}

fn address(last: u8) -> IpAddr {
    IpAddr::from([10, 0, 0, last])
}

fn attachment(container: u8) -> Attachment {
    format!("net/c{container}/eth0").parse().unwrap()
}

fn take(ledger: &mut impl Ledger, step: &Step) -> Result<Vec<AttachmentEntry>, LedgerError> {
    let at = |millis: u16| Moment::from_millis(millis.into());
    match *step {
        Step::Identify(name, removed) => ledger.identify(&NodeIdentity {
            node: format!("n{name}").parse().unwrap(),
            incarnation: Incarnation::new(format!("i{name}")),
            cluster: ClusterId::new("c"),
            member_state: if removed { MemberState::Removed } else { MemberState::Member },
        }),
        Step::Boot(id) => return ledger.enter_boot(&BootId::new(format!("boot-{id}"))),
        Step::AddBlock(number) => ledger.add_block(&OwnedBlock {
            block: block(number),
            pool: "p".parse().unwrap(),
            nonce: Nonce::new(format!("x{number}")),
            leaving: false,
        }),
        Step::LeaveBlock(number) => ledger.mark_block_leaving(block(number)),
        Step::RemoveBlock(number) => ledger.remove_block(block(number)),
        Step::Gateway(last) => ledger.add_gateway(address(last)),
        Step::RemoveGateway(last, freed) => ledger.remove_gateway(address(last), at(freed)),
        // No caller replaces a gateway with the same address.
        Step::ReplaceGateway(old, new, _) if old == new => Ok(()),
        Step::ReplaceGateway(old, new, freed) => {
            ledger.replace_gateway(address(old), address(new), at(freed))
        }
        Step::Attach(container, one, two) => {
            let mut addresses = vec![address(one), address(two)];
            addresses.sort();
            addresses.dedup();
            ledger.add_attachment(&AttachmentEntry {
                attachment: attachment(container),
                kind: AttachmentKind::Pod,
                since: at(7),
                addresses,
                mac: "0a:58:0a:00:00:05".parse().unwrap(),
                mtu: 1450,
                netns: String::new(),
                pod: None,
                leaving: false,
                gateways: Vec::new(),
                ports: Vec::new(),
            })
        }
        Step::Leave(container) => ledger.mark_leaving(&attachment(container)),
        Step::Clear => ledger.clear(),
        Step::Rest(last, freed) => ledger.cool_down(&[address(last), address(last + 1)], at(freed)),
        Step::Detach(container, freed) => ledger.remove_attachment(&attachment(container), at(freed)),
    }
    .map(|()| Vec::new())
}

fn sorted<T: Ord>(mut items: Vec<T>) -> Vec<T> {
    items.sort();
    items
}

fn by_name(mut held: Vec<AttachmentEntry>) -> Vec<AttachmentEntry> {
    held.sort_by(|one, other| one.attachment.cmp(&other.attachment));
    held
}

proptest! {
    /// Both ledgers have the same contents and results after the same steps.
    #[test]
    fn both_ledgers_behave_the_same(steps in prop::collection::vec(step(), 0..40)) {
        let mut memory = Memory::default();
        let mut disk = Sqlite::open(Path::new(":memory:")).unwrap();
        for step in &steps {
            let (played, real) = (take(&mut memory, step), take(&mut disk, step));
            match (&played, &real) {
                (Ok(played), Ok(real)) => prop_assert_eq!(by_name(played.clone()), by_name(real.clone())),
                (Err(_), Err(_)) => {}
                _ => prop_assert!(false, "{step:?}: {played:?} is not {real:?}"),
            }
            prop_assert_eq!(memory.identity().unwrap(), disk.identity().unwrap());
            let blocks = |blocks: Vec<OwnedBlock>| {
                sorted(blocks.into_iter().map(|owned| (owned.block, owned.leaving)).collect())
            };
            prop_assert_eq!(blocks(memory.blocks().unwrap()), blocks(disk.blocks().unwrap()), "{:?}", step);
            prop_assert_eq!(memory.gateways().unwrap(), disk.gateways().unwrap(), "{:?}", step);
            prop_assert_eq!(sorted(memory.resting().unwrap()), sorted(disk.resting().unwrap()), "{:?}", step);
            let (played, real) = (memory.attachments().unwrap(), disk.attachments().unwrap());
            prop_assert_eq!(by_name(played), by_name(real), "{:?}", step);
        }
    }
}
