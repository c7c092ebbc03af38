//! Facts about a node's addresses, for checks and status reports.

use std::net::IpAddr;

use super::NodeIpam;
use crate::allocator::AddressRefusal;
use crate::invariants::LedgerFacts;
use crate::ledger::{AttachmentEntry, Ledger, LedgerError};
use crate::moment::Moment;

/// State of an address in one of the node's blocks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AddressCondition {
    /// An attachment uses it.
    Held(Box<AttachmentEntry>),
    /// It is a gateway address of the node.
    Gateway,
    /// It is an address of the node's probe endpoint.
    Probe,
    /// It was released at that time and is not used.
    Freed(Moment),
    /// No use of it is known.
    Unused,
    /// It is never allocated: the first or last address of its pool, or reserved for the gateway of its block.
    Excluded,
}

impl<L: Ledger> NodeIpam<L> {
    /// The contents of the ledger, with the allocator's counts for each block.
    pub fn facts(&self, now: Moment) -> Result<LedgerFacts, LedgerError> {
        let counts = |block| self.allocator.blocks(now).find(|(known, ..)| *known == block);
        let blocks = self.ledger.blocks()?.into_iter();
        // The probe endpoint is not a pod: its addresses are listed with the gateways.
        let (probes, attachments): (Vec<AttachmentEntry>, Vec<AttachmentEntry>) =
            self.ledger.attachments()?.into_iter().partition(|held| held.attachment.is_probe());
        let probes = probes.into_iter().flat_map(|held| held.addresses);
        Ok(LedgerFacts {
            identity: self.ledger.identity()?,
            blocks: blocks
                .map(|owned| {
                    let counts = counts(owned.block).map(|(_, _, counts)| counts);
                    (owned, counts)
                })
                .collect(),
            gateways: self.ledger.gateways()?.into_iter().chain(probes).collect(),
            attachments,
        })
    }

    /// The attachments that differ between memory and the ledger file, or exist in only one of them: another program
    /// changed the file.
    pub fn differing_attachments(&self) -> Result<Vec<AttachmentEntry>, LedgerError> {
        let written = self.ledger.attachments()?;
        let unwritten = self.attachments.values().filter(|held| !written.contains(held)).cloned();
        let unknown = written.iter().filter(|held| !self.attachments.contains_key(&held.attachment)).cloned();
        Ok(unwritten.chain(unknown).collect())
    }

    /// The state of an address; `None` if it is in none of the node's blocks and not used here.
    pub fn condition(&self, address: IpAddr, now: Moment) -> Result<Option<AddressCondition>, LedgerError> {
        if let Some(held) = self.attachments.values().find(|held| held.addresses.contains(&address)) {
            if held.attachment.is_probe() {
                return Ok(Some(AddressCondition::Probe));
            }
            return Ok(Some(AddressCondition::Held(Box::new(held.clone()))));
        }
        if self.gateways.contains(&address) {
            return Ok(Some(AddressCondition::Gateway));
        }
        if !self.blocks.iter().any(|owned| owned.block.cidr().has(address)) {
            return Ok(None);
        }
        if let Some((_, freed)) = self.ledger.resting()?.into_iter().find(|(resting, _)| *resting == address)
        {
            return Ok(Some(AddressCondition::Freed(freed)));
        }
        Ok(Some(match self.allocator.ask(address, now) {
            Err(AddressRefusal::NotHere) => AddressCondition::Excluded,
            _ => AddressCondition::Unused,
        }))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::{AllocateError, AllocationRequest, AllocationSource};
    use super::*;
    use crate::allocator::{CoolDown, DEFAULT_COOL_DOWN};
    use crate::ids::{BootId, Nonce};
    use crate::ledger::memory::Memory;
    use crate::ledger::{AttachmentKind, OwnedBlock};
    use crate::pool::{Pool, PoolState};

    const NOW: Moment = Moment::from_millis(1_000_000);

    fn node() -> NodeIpam<Memory> {
        let (mut node, _) =
            NodeIpam::with(Memory::default(), &BootId::new("boot"), DEFAULT_COOL_DOWN).unwrap();
        let pool =
            Pool::new("p".parse().unwrap(), "10.0.0.0/24".parse().unwrap(), 29, PoolState::Active).unwrap();
        let (block, name) = (pool.block(0), pool.name.clone());
        let owned = OwnedBlock { block, pool: name, nonce: Nonce::new("x"), leaving: false };
        node.add_block(owned, &pool, Moment::BOOT).unwrap();
        assert!(node.take_gateways(NOW).unwrap());
        node
    }

    fn allocate(node: &mut NodeIpam<Memory>, container: &str) -> Result<AttachmentEntry, AllocateError> {
        let source = AllocationSource::Blocks {
            families: vec![polder_api::Family::V4],
            pool: None,
            requested: Vec::new(),
            reserved: Vec::new(),
        };
        let request = AllocationRequest {
            attachment: format!("net/{container}/eth0").parse().unwrap(),
            kind: AttachmentKind::Pod,
            source,
            mac: None,
            mtu: 1450,
            netns: String::new(),
            pod: None,
            ports: Vec::new(),
        };
        node.allocate(request, CoolDown::Full, NOW)
    }

    #[test]
    fn every_address_of_a_block_has_its_condition() {
        let mut node = node();
        let held = allocate(&mut node, "a").unwrap();
        let freed = allocate(&mut node, "b").unwrap();
        let later = NOW + Duration::from_secs(5);
        node.release(&freed.attachment, later).unwrap();
        let condition = |last: u8| node.condition(IpAddr::from([10, 0, 0, last]), later).unwrap();
        assert_eq!(condition(0), Some(AddressCondition::Excluded));
        assert_eq!(condition(1), Some(AddressCondition::Gateway));
        assert_eq!(condition(2), Some(AddressCondition::Held(Box::new(held))));
        assert_eq!(condition(3), Some(AddressCondition::Freed(later)));
        assert_eq!(condition(4), Some(AddressCondition::Unused));
        assert_eq!(condition(8), None);
    }

    #[test]
    fn a_restored_attachment_keeps_its_address_during_other_allocations() {
        let mut node = node();
        let mut held = allocate(&mut node, "a").unwrap();
        node.release(&held.attachment, NOW).unwrap();
        held.attachment = "net/b/eth0".parse().unwrap();
        node.restore(held.clone()).unwrap();
        assert_eq!(node.facts(NOW).unwrap().blocks[0].1.unwrap().used, 2);
        let others = (0..8).map_while(|number| allocate(&mut node, &format!("c{number}")).ok());
        assert!(others.into_iter().all(|other| other.addresses != held.addresses));
    }

    #[test]
    fn a_ledger_changed_by_another_process_is_detected() {
        let mut node = node();
        let held = allocate(&mut node, "a").unwrap();
        assert_eq!(node.differing_attachments().unwrap(), []);
        assert_eq!(node.facts(NOW).unwrap().attachments, std::slice::from_ref(&held));
        node.ledger.remove_attachment(&held.attachment, NOW).unwrap();
        assert_eq!(node.differing_attachments().unwrap(), [held]);
    }
}
