//! Allocates addresses to an attachment: from the node's blocks, or from a block that is claimed for it.

use std::net::IpAddr;

use polder_api::message::{AddRequest, AddressSource, Refusal};
use polder_api::{Attachment, Family, Pod, PoolName, PortMapping, TransportProtocol};

use self::reason::NotAllocated;
use super::attach::CallerGone;
use super::{Caller, LastAdd, LedgerUnusable, OwnNode, PodHost, ReservationRequest, teardown};
use crate::allocator::{AddressRefusal, CoolDown, Counts};
use crate::capacity::{LabelMismatch, OwnShare};
use crate::claim::NoClaim;
use crate::ledger::{AttachmentEntry, AttachmentKind};
use crate::node::{AllocateError, AllocationRequest, AllocationSource, NodeIpam};
use crate::pool::{BlockRequest, Pool, Purpose};
use crate::record::BlockRecord;
use crate::view::{Versioned, View};

mod reason;

/// The context of one allocation.
#[derive(Debug)]
pub(super) struct Allocation<'a, H, C> {
    pub(super) host: &'a H,
    pub(super) me: &'a OwnNode,
    pub(super) caller: &'a C,
    /// The view of the cluster on which the request was admitted.
    pub(super) view: &'a View,
}

/// The result of an allocation request.
#[derive(Debug)]
pub(super) enum Allocated {
    /// The attachment now has these addresses.
    New(AttachmentEntry),
    /// The attachment already had these addresses.
    Exists(AttachmentEntry),
}

impl<H: PodHost, C: Caller> Allocation<'_, H, C> {
    /// Allocates addresses to the attachment. On return, the ledger contains all of them or none.
    pub(super) async fn allocate(
        &self,
        kind: AttachmentKind,
        request: AddRequest,
        mtu: u32,
    ) -> Result<Allocated, Refusal> {
        self.check_ports(&request.ports)?;
        let source = self.source(&request).await?;
        let reserved = match &source {
            AllocationSource::Blocks { reserved, .. } => reserved.clone(),
            AllocationSource::OtherPlugin(_) => Vec::new(),
        };
        let wanted = AllocationRequest {
            attachment: request.attachment,
            kind,
            source,
            mac: request.mac,
            mtu,
            netns: request.netns,
            pod: request.pod,
            ports: request.ports,
        };
        let allocated = self.fulfil(&wanted).await;
        if !reserved.is_empty() {
            // Used addresses are in the ledger by now; the membership rules release the unused ones.
            self.cancel_expected(reserved, &wanted.attachment).await;
        }
        allocated
    }

    /// Stops expecting reserved addresses for the attachment: the membership rules release those that it does not use.
    async fn cancel_expected(&self, reserved: Vec<IpAddr>, attachment: &Attachment) {
        let holder = attachment.clone();
        let cancel = move |ipam: &mut NodeIpam<H::Ledger>, _| {
            reserved.iter().for_each(|address| ipam.cancel_expected(*address, &holder));
        };
        self.host.ledger(cancel).await;
        self.host.addresses_freed();
    }

    /// Fulfils a request. Claims another block if necessary.
    async fn fulfil(&self, wanted: &AllocationRequest) -> Result<Allocated, Refusal> {
        let (families, pool) = match &wanted.source {
            AllocationSource::Blocks { families, pool, .. } => (families.as_slice(), pool.as_ref()),
            AllocationSource::OtherPlugin(_) => (&[][..], None),
        };
        let (mut cool_down, mut claimed) = (CoolDown::Full, None);
        loop {
            let (again, how) = (wanted.clone(), cool_down);
            let allocate = move |ipam: &mut NodeIpam<H::Ledger>, now| {
                let allocated = ipam.allocate(again, how, now);
                let is_low = |family: &Family| ipam.total(*family, None, now).free < ipam.low_water();
                (allocated, Family::BOTH.into_iter().filter(is_low).collect::<Vec<_>>())
            };
            let (allocated, low) = self.host.ledger(allocate).await;
            let (family, counts) = match allocated {
                Ok(held) => {
                    for family in low.into_iter().filter(|family| families.contains(family)) {
                        self.host.claim_ahead(BlockRequest::Any(family, None));
                    }
                    return Ok(Allocated::New(held));
                }
                Err(AllocateError::Exists(held)) => return Ok(Allocated::Exists(*held)),
                // The caller holds the lock of the attachment, so the earlier ADD has ended.
                Err(AllocateError::DeletedDuringAdd) => {
                    let ended = teardown::release(self.host, &wanted.attachment, LastAdd::Ended).await;
                    if let Err(error) = ended {
                        return Err(NotAllocated::EarlierAdd(error).into());
                    }
                    continue;
                }
                Err(AllocateError::Ledger(error)) => return Err(LedgerUnusable(error).into()),
                Err(AllocateError::Refused { address, why: AddressRefusal::NotHere, .. })
                    if claimed != Some(address) =>
                {
                    self.claim_around(address).await?;
                    claimed = Some(address);
                    continue;
                }
                Err(error @ AllocateError::NoGateway { .. }) => {
                    return Err(NotAllocated::Node(error).into());
                }
                Err(
                    error @ (AllocateError::Refused { .. }
                    | AllocateError::MacTaken { .. }
                    | AllocateError::PortTaken { .. }),
                ) => {
                    return Err(refused(error, &wanted.attachment, wanted.pod.as_ref()).into());
                }
                Err(AllocateError::Shortage { family, counts }) => (family, counts),
            };
            if self.caller.is_gone() {
                // No attachment would use a block that is claimed now.
                return Err(CallerGone.into());
            }
            match (self.host.claim(BlockRequest::Any(family, pool.cloned())).await, cool_down) {
                (Ok(()), _) => {}
                // No other address and no other block: accept the shortest cool-down that is allowed.
                (Err(NoClaim::Exhausted(_)), CoolDown::Full) => cool_down = CoolDown::Shortest,
                (Err(error), _) => return Err(short(family, counts, error).into()),
            }
        }
    }

    /// The source of the addresses, checked against the cluster. Reserved addresses are handed over.
    async fn source(&self, request: &AddRequest) -> Result<AllocationSource, Refusal> {
        match &request.source {
            AddressSource::Pools { pool, addresses } => {
                self.source_in_pools(request, pool.as_ref(), addresses).await
            }
            AddressSource::Delegated(addresses) => {
                let gateways = self.host.ledger(|ipam, _| ipam.gateways().to_vec()).await;
                for address in addresses {
                    if let Some(pool) = pool_of(self.view, *address) {
                        let pool = pool.name.clone();
                        return Err(NotAllocated::Managed { address: *address, pool }.into());
                    }
                    let family = Family::of(*address);
                    if !gateways.iter().any(|gateway| Family::of(*gateway) == family) {
                        return Err(NotAllocated::NoGateway { address: *address, family }.into());
                    }
                }
                Ok(AllocationSource::OtherPlugin(addresses.clone()))
            }
        }
    }

    /// The source of addresses from the cluster's pools: only from `pool` and only `addresses`, if they are given.
    async fn source_in_pools(
        &self,
        request: &AddRequest,
        pool: Option<&PoolName>,
        addresses: &[IpAddr],
    ) -> Result<AllocationSource, Refusal> {
        let families = self.families(pool)?;
        for family in Family::BOTH {
            if addresses.iter().filter(|address| Family::of(**address) == family).count() > 1 {
                return Err(NotAllocated::TwoAddresses(family).into());
            }
        }
        let mut requested = Vec::new();
        let mut workloads = Vec::new();
        for address in addresses {
            let of_pool = |found: &&Pool| pool.is_none_or(|pool| found.name == *pool);
            let Some(found) = pool_of(self.view, *address).filter(of_pool) else {
                let address = *address;
                return Err(match pool.cloned() {
                    Some(pool) => NotAllocated::NotInPool { address, pool }.into(),
                    None => NotAllocated::InNoPool(address).into(),
                });
            };
            let family = found.family();
            if !families.contains(&family) {
                return Err(NotAllocated::ClosedFamily { address: *address, family }.into());
            }
            self.check_labels(found)?;
            match found.purpose {
                Purpose::Blocks => requested.push(*address),
                Purpose::Reservations => workloads.push(ReservationRequest::Address(*address)),
            }
        }
        let named = pool.and_then(|name| self.view.pools.get(name)).map(|known| &known.record);
        if let (Some(pool), true) = (named, addresses.is_empty()) {
            self.check_labels(pool)?;
            if pool.purpose == Purpose::Reservations {
                workloads.push(ReservationRequest::Pool(pool.name.clone()));
            }
        }
        let mut reserved = Vec::new();
        for workload in workloads {
            match self.reserve(request, workload).await {
                Ok(address) => reserved.push(address),
                Err(why) => {
                    self.cancel_expected(reserved, &request.attachment).await;
                    return Err(why.into());
                }
            }
        }
        Ok(AllocationSource::Blocks { families, pool: pool.cloned(), requested, reserved })
    }

    /// Refuses a host port that the node needs itself.
    fn check_ports(&self, ports: &[PortMapping]) -> Result<(), NotAllocated> {
        let tunnel_port = self.view.cluster.as_ref().map(|cluster| cluster.record.tunnel_port());
        let takes_tunnel_port = |port: &&PortMapping| {
            port.protocol == TransportProtocol::Udp && Some(port.host_port.get()) == tunnel_port
        };
        ports.iter().find(takes_tunnel_port).map_or(Ok(()), |port| Err(NotAllocated::TunnelPort(*port)))
    }

    /// Refuses a pool that is for nodes with other labels.
    fn check_labels(&self, pool: &Pool) -> Result<(), NotAllocated> {
        match LabelMismatch::to(&self.host.labels(), pool) {
            None => Ok(()),
            Some(foreign) => Err(NotAllocated::ForeignPool { pool: pool.name.clone(), foreign }),
        }
    }

    /// Requests the hand-over of a reserved address to the pod.
    async fn reserve(
        &self,
        request: &AddRequest,
        wanted: ReservationRequest,
    ) -> Result<IpAddr, NotAllocated> {
        let Some(pod) = &request.pod else { return Err(NotAllocated::Nameless) };
        Ok(self.host.reserve(wanted, pod.to_string(), &request.attachment).await?)
    }

    fn families(&self, pool: Option<&PoolName>) -> Result<Vec<Family>, NotAllocated> {
        let families: Vec<Family> = match pool {
            None => self.view.families().into_iter().collect(),
            Some(name) => match self.view.pools.get(name) {
                Some(pool) => vec![pool.record.family()],
                None => return Err(NotAllocated::UnknownPool(name.clone())),
            },
        };
        if families.is_empty() {
            // The datastore has lost them since the request was admitted.
            return Err(NotAllocated::NoPool);
        }
        if let Some(family) = families.iter().find(|family| !self.host.families().contains(family)) {
            return Err(NotAllocated::NoFamily(*family));
        }
        Ok(families)
    }

    /// Claims the block of the address, unless another node owns it.
    async fn claim_around(&self, address: IpAddr) -> Result<(), NotAllocated> {
        let Some(pool) = pool_of(self.view, address) else {
            return Err(NotAllocated::InNoPool(address));
        };
        let block = pool.block_of(address);
        let others = |claim: &&Versioned<BlockRecord>| claim.record.node != self.me.name;
        if let Some(claim) = self.view.blocks.get(&block).filter(others) {
            return Err(NotAllocated::OtherNode { address, block, node: claim.record.node.clone() });
        }
        let claimed = self.host.claim(BlockRequest::This(block)).await;
        claimed.map_err(|error| NotAllocated::NotClaimed { address, block, error: error.into() })
    }
}

fn pool_of(view: &View, address: IpAddr) -> Option<&Pool> {
    view.pools.values().map(|pool| &*pool.record).find(|pool| pool.cidr().has(address))
}

/// The refusal of a requested address or port, for the caller.
fn refused(error: AllocateError, attachment: &Attachment, pod: Option<&Pod>) -> NotAllocated {
    let is_same = |held: &AttachmentEntry| {
        let is_its_name =
            |(held, pod): (&Pod, &Pod)| (&held.namespace, &held.name) == (&pod.namespace, &pod.name);
        held.attachment.container != attachment.container
            && held.pod.as_ref().zip(pod).is_some_and(is_its_name)
    };
    match error {
        AllocateError::Refused { address, why: AddressRefusal::Resting(left), .. } => {
            NotAllocated::Resting { address, seconds: left.as_secs() + 1 }
        }
        // For example, a pod of a StatefulSet was deleted by force: its successor is added before the DEL of the old
        // pod.
        AllocateError::Refused { address, why: AddressRefusal::Used, holder: Some(held) }
            if is_same(&held) =>
        {
            NotAllocated::Predecessor { address, last: held.attachment }
        }
        AllocateError::Refused { address, why: AddressRefusal::Used, holder } => match holder {
            Some(held) => NotAllocated::Used { address, holder: held.attachment },
            None => NotAllocated::UsedByNode(address),
        },
        AllocateError::Refused { address, .. } => NotAllocated::NeverAssigned(address),
        AllocateError::PortTaken { port, holder } if holder.leaving || is_same(&holder) => {
            NotAllocated::PortNotFreeYet { port, last: holder.attachment }
        }
        AllocateError::PortTaken { port, holder } => {
            NotAllocated::PortTaken { port, holder: holder.attachment }
        }
        other => NotAllocated::Node(other),
    }
}

/// The refusal if no address is free and no block was claimed.
fn short(family: Family, counts: Counts, error: NoClaim) -> NotAllocated {
    let own = OwnShare { family, counts };
    match error {
        NoClaim::Exhausted(why) => NotAllocated::Exhausted { own, why },
        error @ NoClaim::Unavailable(_) => NotAllocated::NoClaim { own, error: error.into() },
    }
}
