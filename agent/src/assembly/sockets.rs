//! The agent's sockets to the kernel.

use std::collections::BTreeSet;

use polder_netlink::Error;
use polder_netlink::nft::FilterSocket;

use crate::fastpath::Interfaces;
use crate::kernel::Kernel;
use crate::kernel::sysctl::Sysctls;

/// Sockets to the kernel.
#[derive(Debug)]
pub(crate) struct Sockets {
    /// For passes over the complete state.
    pub(crate) kernel: Kernel,
    /// For operations on single pods.
    pub(crate) pods: Kernel,
    /// To add and delete pods in the packet filter.
    pub(crate) filter: FilterSocket,
    /// To delete tracked connections of released addresses.
    pub(crate) connections: FilterSocket,
    /// To attach the programs of the fast path.
    pub(crate) interfaces: Interfaces,
    /// Netlink port ids of the sockets that change the kernel.
    pub(crate) ports: BTreeSet<u32>,
}

impl Sockets {
    /// Sockets in the network namespace of the calling thread, besides `kernel`, which is open already. `others` are the
    /// ports of sockets of the agent that are not among these.
    pub(crate) fn open(
        kernel: Kernel,
        interfaces: Interfaces,
        sysctls: &Sysctls,
        others: impl Iterator<Item = u32>,
    ) -> Result<Self, Error> {
        let (pods, filter) = (Kernel::open(sysctls)?, FilterSocket::open()?);
        let mut ports: BTreeSet<u32> = others.collect();
        ports.extend(kernel.ports()?.into_iter().chain(pods.ports()?));
        ports.extend([filter.port()?, interfaces.port()?]);
        Ok(Self { kernel, pods, filter, connections: FilterSocket::open()?, interfaces, ports })
    }

    /// Read-only sockets. No changes are made, so no notifications are received.
    pub(crate) fn read_only(kernel: Kernel, sysctls: &Sysctls) -> Result<Self, Error> {
        Ok(Self {
            kernel,
            pods: Kernel::open_to_read(sysctls)?,
            filter: FilterSocket::open_to_read()?,
            connections: FilterSocket::open_to_read()?,
            interfaces: Interfaces::open_to_read()?,
            ports: BTreeSet::new(),
        })
    }
}
