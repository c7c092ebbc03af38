//! The agent's sockets to the kernel.

use std::collections::BTreeSet;

use polder_netlink::Error;
use polder_netlink::nft::FilterSocket;

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
    /// Netlink port ids of the sockets that change the kernel.
    pub(crate) ports: BTreeSet<u32>,
}

impl Sockets {
    /// Read-only sockets. No changes are made, so no notifications are received.
    pub(crate) fn read_only(kernel: Kernel, sysctls: &Sysctls) -> Result<Self, Error> {
        Ok(Self {
            kernel,
            pods: Kernel::open_to_read(sysctls)?,
            filter: FilterSocket::open_to_read()?,
            connections: FilterSocket::open_to_read()?,
            ports: BTreeSet::new(),
        })
    }
}
