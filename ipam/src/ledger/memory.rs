//! The ledger as plain data, for the model and the simulation of many nodes. It stores and refuses the same as the
//! file.

use std::collections::BTreeMap;
use std::net::IpAddr;

use polder_api::Attachment;

use super::{AttachmentEntry, Ledger, LedgerError, NodeIdentity, OwnedBlock};
use crate::ids::BootId;
use crate::moment::Moment;
use crate::pool::Block;

/// The ledger of a simulated node.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct Memory {
    identity: Option<NodeIdentity>,
    boot: Option<BootId>,
    blocks: Vec<OwnedBlock>,
    attachments: Vec<AttachmentEntry>,
    addresses: BTreeMap<IpAddr, AddressUse>,
    sysctls: Vec<(String, String)>,
}

/// State of an address that was ever used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum AddressUse {
    Attachment,
    Gateway,
    Freed(Moment),
}

/// Why a change of the ledger is refused.
#[derive(Debug, thiserror::Error)]
enum NotStored {
    /// The address has an attachment or is a gateway address.
    /// Remedy: none, it is an internal error of a simulation.
    #[error("{0} is in use")]
    Used(IpAddr),
    /// An address of the block that is to be removed is in use.
    /// Remedy: none, it is an internal error of a simulation.
    #[error("{address} of block {block} is in use")]
    BlockUsed {
        /// The address.
        address: IpAddr,
        /// The block.
        block: Block,
    },
    /// The attachment is in the ledger.
    /// Remedy: none, it is an internal error of a simulation.
    #[error("{0} already exists")]
    Exists(Attachment),
    /// The ledger that is to be cleared has an attachment.
    /// Remedy: none, it is an internal error of a simulation.
    #[error("{0} is attached")]
    Attached(Attachment),
}

impl From<NotStored> for LedgerError {
    fn from(error: NotStored) -> Self {
        Self::new(error)
    }
}

impl Memory {
    /// Fails if the address is in use.
    fn usable(&self, address: IpAddr) -> Result<(), LedgerError> {
        match self.addresses.get(&address) {
            None | Some(AddressUse::Freed(_)) => Ok(()),
            Some(_) => Err(NotStored::Used(address).into()),
        }
    }

    fn end(&mut self, attachment: &Attachment, freed: Moment) {
        let Some(index) = self.attachments.iter().position(|held| held.attachment == *attachment) else {
            return;
        };
        for address in self.attachments.remove(index).addresses {
            if self.blocks.iter().any(|owned| owned.block.cidr().has(address)) {
                self.addresses.insert(address, AddressUse::Freed(freed));
            } else {
                self.addresses.remove(&address);
            }
        }
    }
}

impl Ledger for Memory {
    fn identity(&self) -> Result<Option<NodeIdentity>, LedgerError> {
        Ok(self.identity.clone())
    }

    fn identify(&mut self, identity: &NodeIdentity) -> Result<(), LedgerError> {
        self.identity = Some(identity.clone());
        Ok(())
    }

    fn enter_boot(&mut self, id: &BootId) -> Result<Vec<AttachmentEntry>, LedgerError> {
        if self.boot.as_ref() == Some(id) {
            return Ok(Vec::new());
        }
        self.boot = Some(id.clone());
        self.sysctls.clear();
        let void = self.attachments.clone();
        void.iter().for_each(|held| self.end(&held.attachment, Moment::BOOT));
        for what in self.addresses.values_mut() {
            if let AddressUse::Freed(freed) = what {
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

    fn cool_down(&mut self, addresses: &[IpAddr], freed: Moment) -> Result<(), LedgerError> {
        for address in addresses {
            let now = self.addresses.entry(*address).or_insert(AddressUse::Freed(freed));
            if let AddressUse::Freed(since) = now {
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
        let used = |(_, what): &(&IpAddr, &AddressUse)| !matches!(what, AddressUse::Freed(_));
        if let Some((address, _)) = self.addresses.iter().filter(|(address, _)| inside(address)).find(used) {
            return Err(NotStored::BlockUsed { address: *address, block }.into());
        }
        self.addresses.retain(|address, _| !inside(address));
        self.blocks.retain(|owned| owned.block != block);
        Ok(())
    }

    fn gateways(&self) -> Result<Vec<IpAddr>, LedgerError> {
        let own = self.addresses.iter().filter(|(_, what)| **what == AddressUse::Gateway);
        Ok(own.map(|(address, _)| *address).collect())
    }

    fn add_gateway(&mut self, address: IpAddr) -> Result<(), LedgerError> {
        self.usable(address)?;
        self.addresses.insert(address, AddressUse::Gateway);
        Ok(())
    }

    fn remove_gateway(&mut self, address: IpAddr, freed: Moment) -> Result<(), LedgerError> {
        if self.addresses.get(&address) == Some(&AddressUse::Gateway) {
            self.addresses.insert(address, AddressUse::Freed(freed));
        }
        Ok(())
    }

    fn replace_gateway(&mut self, old: IpAddr, new: IpAddr, freed: Moment) -> Result<(), LedgerError> {
        self.usable(new)?;
        let gateways = self.gateways()?;
        for held in self.attachments.iter_mut().filter(|held| held.gateways.is_empty()) {
            held.gateways.clone_from(&gateways);
        }
        if self.addresses.get(&old) == Some(&AddressUse::Gateway) {
            self.addresses.insert(old, AddressUse::Freed(freed));
        }
        self.addresses.insert(new, AddressUse::Gateway);
        Ok(())
    }

    fn resting(&self) -> Result<Vec<(IpAddr, Moment)>, LedgerError> {
        let freed = |(address, what): (&IpAddr, &AddressUse)| match what {
            AddressUse::Freed(moment) => Some((*address, *moment)),
            AddressUse::Attachment | AddressUse::Gateway => None,
        };
        Ok(self.addresses.iter().filter_map(freed).collect())
    }

    fn attachments(&self) -> Result<Vec<AttachmentEntry>, LedgerError> {
        Ok(self.attachments.clone())
    }

    fn add_attachment(&mut self, held: &AttachmentEntry) -> Result<(), LedgerError> {
        if self.attachments.iter().any(|known| known.attachment == held.attachment) {
            return Err(NotStored::Exists(held.attachment.clone()).into());
        }
        held.addresses.iter().try_for_each(|address| self.usable(*address))?;
        self.addresses.extend(held.addresses.iter().map(|address| (*address, AddressUse::Attachment)));
        self.attachments.push(AttachmentEntry { leaving: false, ..held.clone() });
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
            return Err(NotStored::Attached(held.attachment.clone()).into());
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
