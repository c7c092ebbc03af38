//! The ledger as plain data: for model and simulation, which play many nodes through many lives. It keeps what the one
//! on disk keeps, and refuses what that refuses.

use std::collections::BTreeMap;
use std::net::IpAddr;

use polder_api::Attachment;

use super::sqlite::constraint;
use super::{Held, Identity, Ledger, LedgerError, OwnedBlock};
use crate::moment::Moment;
use crate::pool::Block;

/// The ledger of a node that is only played.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct Memory {
    identity: Option<Identity>,
    boot: Option<String>,
    blocks: Vec<OwnedBlock>,
    attachments: Vec<Held>,
    addresses: BTreeMap<IpAddr, Use>,
    sysctls: Vec<(String, String)>,
}

/// What has become of an address that was ever used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Use {
    Attachment,
    Gateway,
    Freed(Moment),
}

impl Memory {
    /// Whether the address may be used now.
    fn usable(&self, address: IpAddr) -> Result<(), LedgerError> {
        match self.addresses.get(&address) {
            None | Some(Use::Freed(_)) => Ok(()),
            Some(_) => Err(constraint(format!("{address} is in use")).into()),
        }
    }

    fn end(&mut self, attachment: &Attachment, freed: Moment) {
        let Some(index) = self.attachments.iter().position(|held| held.attachment == *attachment) else {
            return;
        };
        for address in self.attachments.remove(index).addresses {
            if self.blocks.iter().any(|owned| owned.block.cidr().has(address)) {
                self.addresses.insert(address, Use::Freed(freed));
            } else {
                self.addresses.remove(&address);
            }
        }
    }
}

impl Ledger for Memory {
    fn identity(&self) -> Result<Option<Identity>, LedgerError> {
        Ok(self.identity.clone())
    }

    fn identify(&mut self, identity: &Identity) -> Result<(), LedgerError> {
        self.identity = Some(identity.clone());
        Ok(())
    }

    fn enter_boot(&mut self, id: &str) -> Result<Vec<Held>, LedgerError> {
        if self.boot.as_deref() == Some(id) {
            return Ok(Vec::new());
        }
        self.boot = Some(id.to_owned());
        self.sysctls.clear();
        let void = self.attachments.clone();
        void.iter().for_each(|held| self.end(&held.attachment, Moment::BOOT));
        for what in self.addresses.values_mut() {
            if let Use::Freed(freed) = what {
                *freed = Moment::BOOT;
            }
        }
        Ok(void)
    }

    fn blocks(&self) -> Result<Vec<OwnedBlock>, LedgerError> {
        Ok(self.blocks.clone())
    }

    fn add_block(&mut self, owned: &OwnedBlock) -> Result<(), LedgerError> {
        self.blocks.retain(|known| known.block != owned.block);
        self.blocks.push(owned.clone());
        Ok(())
    }

    fn rest(&mut self, addresses: &[IpAddr], freed: Moment) -> Result<(), LedgerError> {
        for address in addresses {
            let now = self.addresses.entry(*address).or_insert(Use::Freed(freed));
            if let Use::Freed(since) = now {
                *since = freed;
            }
        }
        Ok(())
    }

    fn mark_block_leaving(&mut self, block: Block) -> Result<(), LedgerError> {
        let owned = self.blocks.iter_mut().filter(|owned| owned.block == block);
        owned.for_each(|owned| owned.leaving = true);
        Ok(())
    }

    fn remove_block(&mut self, block: Block) -> Result<(), LedgerError> {
        let inside = |address: &IpAddr| block.cidr().has(*address);
        let used = |(_, what): &(&IpAddr, &Use)| !matches!(what, Use::Freed(_));
        if let Some((address, _)) = self.addresses.iter().filter(|(address, _)| inside(address)).find(used) {
            return Err(constraint(format!("{address} of block {block} is in use")).into());
        }
        self.addresses.retain(|address, _| !inside(address));
        self.blocks.retain(|owned| owned.block != block);
        Ok(())
    }

    fn gateways(&self) -> Result<Vec<IpAddr>, LedgerError> {
        let own = self.addresses.iter().filter(|(_, what)| **what == Use::Gateway);
        Ok(own.map(|(address, _)| *address).collect())
    }

    fn add_gateway(&mut self, address: IpAddr) -> Result<(), LedgerError> {
        self.usable(address)?;
        self.addresses.insert(address, Use::Gateway);
        Ok(())
    }

    fn replace_gateway(&mut self, old: IpAddr, new: IpAddr, freed: Moment) -> Result<(), LedgerError> {
        self.usable(new)?;
        let gateways = self.gateways()?;
        for held in self.attachments.iter_mut().filter(|held| held.gateways.is_empty()) {
            held.gateways.clone_from(&gateways);
        }
        if self.addresses.get(&old) == Some(&Use::Gateway) {
            self.addresses.insert(old, Use::Freed(freed));
        }
        self.addresses.insert(new, Use::Gateway);
        Ok(())
    }

    fn resting(&self) -> Result<Vec<(IpAddr, Moment)>, LedgerError> {
        let freed = |(address, what): (&IpAddr, &Use)| match what {
            Use::Freed(moment) => Some((*address, *moment)),
            Use::Attachment | Use::Gateway => None,
        };
        Ok(self.addresses.iter().filter_map(freed).collect())
    }

    fn attachments(&self) -> Result<Vec<Held>, LedgerError> {
        Ok(self.attachments.clone())
    }

    fn add_attachment(&mut self, held: &Held) -> Result<(), LedgerError> {
        if self.attachments.iter().any(|known| known.attachment == held.attachment) {
            return Err(constraint(format!("{} is there already", held.attachment)).into());
        }
        held.addresses.iter().try_for_each(|address| self.usable(*address))?;
        self.addresses.extend(held.addresses.iter().map(|address| (*address, Use::Attachment)));
        self.attachments.push(Held { leaving: false, ..held.clone() });
        Ok(())
    }

    fn mark_leaving(&mut self, attachment: &Attachment) -> Result<(), LedgerError> {
        let held = self.attachments.iter_mut().filter(|held| held.attachment == *attachment);
        held.for_each(|held| held.leaving = true);
        Ok(())
    }

    fn remove_attachment(&mut self, attachment: &Attachment, freed: Moment) -> Result<(), LedgerError> {
        self.end(attachment, freed);
        Ok(())
    }

    fn clear(&mut self) -> Result<(), LedgerError> {
        if let Some(held) = self.attachments.first() {
            return Err(constraint(format!("{} is attached", held.attachment)).into());
        }
        self.blocks.clear();
        self.addresses.clear();
        Ok(())
    }

    fn keep_sysctl(&mut self, path: &str, previous: &str) -> Result<(), LedgerError> {
        if !self.sysctls.iter().any(|(known, _)| known == path) {
            self.sysctls.push((path.to_owned(), previous.to_owned()));
        }
        Ok(())
    }

    fn sysctls(&self) -> Result<Vec<(String, String)>, LedgerError> {
        Ok(self.sysctls.iter().rev().cloned().collect())
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use proptest::prelude::*;

    use super::*;
    use crate::ids::{ClusterId, Incarnation, Nonce};
    use crate::ledger::sqlite::Sqlite;
    use crate::ledger::{Kind, Standing};

    #[derive(Debug, Clone)]
    enum Step {
        Identify(u8, bool),
        Boot(u8),
        AddBlock(u8),
        LeaveBlock(u8),
        RemoveBlock(u8),
        Gateway(u8),
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
            2 => address.clone().prop_map(Step::Gateway),
            2 => (address.clone(), address.clone(), any::<u16>())
                .prop_map(|(old, new, at)| Step::ReplaceGateway(old, new, at)),
            8 => (small.clone(), address.clone(), address.clone()).prop_map(|(who, one, two)| Step::Attach(who, one, two)),
            2 => small.clone().prop_map(Step::Leave),
            1 => Just(Step::Clear),
            1 => (address.clone(), any::<u16>()).prop_map(|(last, at)| Step::Rest(last, at)),
            6 => (small, any::<u16>()).prop_map(|(who, at)| Step::Detach(who, at)),
        ]
    }

    /// Three blocks of four addresses, and two addresses that are in none.
    fn block(number: u8) -> Block {
        Block::new(format!("10.0.0.{}/30", number * 4).parse().unwrap())
    }

    fn address(last: u8) -> IpAddr {
        IpAddr::from([10, 0, 0, last])
    }

    fn attachment(who: u8) -> Attachment {
        format!("net/c{who}/eth0").parse().unwrap()
    }

    fn take(ledger: &mut impl Ledger, step: &Step) -> Result<Vec<Held>, LedgerError> {
        let at = |millis: u16| Moment::from_millis(millis.into());
        match *step {
            Step::Identify(name, removed) => ledger.identify(&Identity {
                node: format!("n{name}").parse().unwrap(),
                incarnation: Incarnation(format!("i{name}")),
                cluster: ClusterId("c".into()),
                standing: if removed { Standing::Removed } else { Standing::Member },
            }),
            Step::Boot(id) => return ledger.enter_boot(&format!("boot-{id}")),
            Step::AddBlock(number) => ledger.add_block(&OwnedBlock {
                block: block(number),
                pool: "p".parse().unwrap(),
                nonce: Nonce(format!("x{number}")),
                leaving: false,
            }),
            Step::LeaveBlock(number) => ledger.mark_block_leaving(block(number)),
            Step::RemoveBlock(number) => ledger.remove_block(block(number)),
            Step::Gateway(last) => ledger.add_gateway(address(last)),
            // One by itself is never asked for.
            Step::ReplaceGateway(old, new, _) if old == new => Ok(()),
            Step::ReplaceGateway(old, new, freed) => {
                ledger.replace_gateway(address(old), address(new), at(freed))
            }
            Step::Attach(who, one, two) => {
                let mut addresses = vec![address(one), address(two)];
                addresses.sort();
                addresses.dedup();
                ledger.add_attachment(&Held {
                    attachment: attachment(who),
                    kind: Kind::Pod,
                    since: at(7),
                    addresses,
                    mac: "0a:58:0a:00:00:05".parse().unwrap(),
                    mtu: 1450,
                    netns: String::new(),
                    pod: None,
                    leaving: false,
                    gateways: Vec::new(),
                })
            }
            Step::Leave(who) => ledger.mark_leaving(&attachment(who)),
            Step::Clear => ledger.clear(),
            Step::Rest(last, freed) => ledger.rest(&[address(last), address(last + 1)], at(freed)),
            Step::Detach(who, freed) => ledger.remove_attachment(&attachment(who), at(freed)),
        }
        .map(|()| Vec::new())
    }

    fn sorted<T: Ord>(mut items: Vec<T>) -> Vec<T> {
        items.sort();
        items
    }

    fn by_name(mut held: Vec<Held>) -> Vec<Held> {
        held.sort_by(|one, other| one.attachment.cmp(&other.attachment));
        held
    }

    proptest! {
        /// Whatever is played with one holds on a node with the other.
        #[test]
        fn both_ledgers_keep_and_refuse_the_same(steps in prop::collection::vec(step(), 0..40)) {
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
}
