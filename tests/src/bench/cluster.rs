//! Peers that exist only as records in etcd, behind tunnels.

use std::net::{IpAddr, Ipv4Addr};

use anyhow::ensure;
use polder_api::{Mac, NodeName};
use polder_ipam::Block;
use polder_ipam::ids::{BootId, Incarnation, MachineId, Nonce};
use polder_ipam::key::Key;
use polder_ipam::record::{BlockRecord, NodeRecord, encode};
use polder_ipam::store::{Outcome, Txn, Write};
use polder_store::Store;
use polder_store::etcd::Etcd;
use polder_store::etcd::config::EtcdConfig;

/// A pool for 32,768 blocks of the default size.
pub const POOL: &str = "10.128.0.0/11";

/// The largest number of peers: each needs an address of the underlay.
pub const MOST: u32 = 30_000;

/// The first address of the pool, and of the peers' underlay.
const FIRST: (Ipv4Addr, Ipv4Addr) = (Ipv4Addr::new(10, 128, 0, 0), Ipv4Addr::new(172, 16, 0, 0));

/// Number of addresses in a block.
const BLOCK: u32 = 64;

/// Number of peers per transaction.
const AT_ONCE: usize = 60;

/// A peer that exists only as records.
#[derive(Debug, Clone, Copy)]
pub struct Peer(u32);

impl Peer {
    /// This number of peers, without the block of the real node.
    pub fn some(count: u32, own_block: &str) -> Vec<Self> {
        let others = (0..).map(Peer).filter(|peer| peer.block().to_string() != own_block);
        others.take(count as usize).collect()
    }

    fn name(self) -> NodeName {
        format!("peer-{}", self.0).parse().expect("a name")
    }

    fn address(self, number: u32) -> Ipv4Addr {
        Ipv4Addr::from(u32::from(FIRST.0) + self.0 * BLOCK + number)
    }

    /// Its block.
    pub fn block(self) -> Block {
        Block::new(format!("{}/26", self.address(0)).parse().expect("a range"))
    }

    /// The next hop to its blocks.
    pub fn gateway(self) -> IpAddr {
        self.address(1).into()
    }

    fn incarnation(self) -> Incarnation {
        Incarnation::new(format!("incarnation-{}", self.0))
    }

    fn node(self) -> Write {
        let [a, b, c, d] = self.0.to_be_bytes();
        let record = NodeRecord {
            incarnation: self.incarnation(),
            machine_id: MachineId::new(format!("{:032x}", self.0)),
            boot_id: BootId::new(format!("00000000-0000-0000-0000-{:012x}", self.0)),
            underlay: vec![Ipv4Addr::from(u32::from(FIRST.1) + self.0 + 1).into()],
            gateways: vec![self.gateway()],
            probes: vec![self.address(2).into()],
            vtep_mac: Mac([2, 0x84, a, b, c, d]),
            mtu: 1450,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            kubernetes_uid: None,
        };
        Write::Put { key: Key::Node(self.name()).to_string(), value: encode(&record) }
    }

    /// The claim of a block by this peer.
    pub fn claims(self, block: Block) -> Write {
        let record = BlockRecord {
            node: self.name(),
            incarnation: self.incarnation(),
            pool: "ipv4".parse().expect("a name"),
            nonce: Nonce::new(format!("nonce-{}", self.0)),
        };
        Write::Put { key: Key::Block(block).to_string(), value: encode(&record) }
    }
}

/// Runs a job with a connection to etcd.
pub fn with_store<T>(
    endpoints: &[String],
    job: impl AsyncFnOnce(Store) -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let config = EtcdConfig { endpoints: endpoints.to_vec(), ..EtcdConfig::default() };
        job(Store::Etcd(Etcd::new(&config).await?)).await
    })
}

/// Writes records without a condition.
pub async fn commit(store: &Store, writes: Vec<Write>) -> anyhow::Result<()> {
    let outcome = store.transact(&Txn { compares: Vec::new(), writes }).await?;
    ensure!(matches!(outcome, Outcome::Applied { .. }), "etcd refuses what has no condition");
    Ok(())
}

/// Writes the records of all peers.
pub fn write_all(endpoints: &[String], peers: &[Peer]) -> anyhow::Result<()> {
    with_store(endpoints, async |store| {
        for some in peers.chunks(AT_ONCE) {
            let records = some.iter().flat_map(|peer| [peer.node(), peer.claims(peer.block())]);
            commit(&store, records.collect()).await?;
        }
        Ok(())
    })
}
