//! Readiness: whether a node would serve an ADD, and if not, why. ADD, STATUS and the operator get the same answer.

use std::collections::BTreeSet;
use std::error::Error;
use std::net::IpAddr;

use polder_api::Family;

use crate::cause::SharedError;
use crate::record::MTU_RANGE;
use crate::registration::{Allocations, PendingReason, Registration};
use crate::view::{RefusedRecord, View};

/// The facts that decide readiness.
#[derive(Debug, Clone, Copy)]
pub struct ReadinessInputs<'a> {
    /// The node's view of the cluster.
    pub view: &'a View,
    /// The registration state of the node.
    pub registration: &'a Registration,
    /// The identity, blocks and addresses of the node.
    pub allocations: &'a Allocations,
    /// Whether the node has underlay addresses; otherwise the error.
    pub underlay: Result<(), &'a (dyn Error + 'static)>,
    /// The node's own addresses that are configured in the kernel.
    pub gateways: &'a [IpAddr],
    /// The MTU of pods, in bytes; 0 if it is not known yet.
    pub mtu: u32,
    /// Failed kernel changes that the node needs to serve its pods.
    pub failures: &'a [SharedError],
}

/// Why a node does not serve an ADD.
#[derive(Debug, thiserror::Error)]
enum NotReadyReason {
    /// The node has not read the settings of the cluster, or has no identity yet.
    #[error("the cluster has no settings yet: start an agent whose configuration has [bootstrap]")]
    NoSettings,
    /// The cluster has no pool for blocks, or this node cannot use any; the refused records are listed.
    #[error("no pool is usable on this node: add one with polderctl pool add{}", listed(.0))]
    NoPool(Vec<RefusedRecord>),
    /// The node has no gateway address of a family of the cluster, because its registration is not complete.
    /// Remedy: correct the cause in the text if it persists.
    #[error("the node has no {family} block yet: {why}")]
    NoBlock {
        /// The family.
        family: Family,
        /// Why the registration is not complete.
        #[source]
        why: PendingReason,
    },
    /// The node has no gateway address of a family of the cluster, and claims a block for it.
    #[error("the node has no {0} block yet: wait a few seconds, the agent claims one")]
    Claiming(Family),
    /// The kernel does not have the gateway address yet.
    #[error(
        "{0} gateway address {1} is not configured yet: the next pass configures it. If this persists, see polderctl \
         status"
    )]
    NoGateway(Family, IpAddr),
    /// The MTU of the underlay, less the tunnel headers, is below the minimum of the address families.
    #[error(
        "pods would have an MTU of {mtu} bytes, but need at least {smallest}: raise the MTU of the underlay interfaces \
         by {} bytes, and mtu in agent.toml if it is set",
        smallest - mtu
    )]
    Mtu {
        /// The MTU of pods, in bytes.
        mtu: u32,
        /// The minimum, in bytes.
        smallest: u32,
    },
}

fn listed(refused: &[RefusedRecord]) -> String {
    let all: Vec<_> = refused.iter().map(|record| format!("; {record}")).collect();
    all.concat()
}

/// The reasons to refuse an ADD. Empty if the node is ready.
pub fn obstacles(facts: &ReadinessInputs<'_>) -> Vec<String> {
    let ReadinessInputs { view, registration, allocations, underlay, gateways, mtu, failures } = *facts;
    if let Some(reason) = registration.not_serving_reason() {
        return vec![reason.to_string()];
    }
    let pending = match registration {
        Registration::Waiting(reason) => Some(reason),
        _ => None,
    };
    if view.cluster.is_none() || allocations.identity.is_none() {
        let waiting = || pending.map_or_else(|| NotReadyReason::NoSettings.to_string(), ToString::to_string);
        return vec![view.lost.as_ref().map_or_else(waiting, ToString::to_string)];
    }
    if let Err(reason) = underlay {
        return vec![reason.to_string()];
    }
    let mut obstacles = Vec::new();
    let families = view.families();
    if families.is_empty() {
        let refused = view.refused_records().filter(|record| record.key.contains("/pools/"));
        obstacles.push(NotReadyReason::NoPool(refused.collect()));
    }
    for family in &families {
        let of_family = |all: &[IpAddr]| all.iter().copied().find(|address| Family::of(*address) == *family);
        match (of_family(&allocations.gateways), of_family(gateways)) {
            (None, _) => obstacles.push(match pending.cloned() {
                Some(why) => NotReadyReason::NoBlock { family: *family, why },
                None => NotReadyReason::Claiming(*family),
            }),
            (Some(own), None) => obstacles.push(NotReadyReason::NoGateway(*family, own)),
            (Some(_), Some(_)) => {}
        }
    }
    let smallest = smallest_mtu(&families);
    if (1..smallest).contains(&mtu) {
        obstacles.push(NotReadyReason::Mtu { mtu, smallest });
    }
    let obstacles = obstacles.iter().map(ToString::to_string);
    obstacles.chain(failures.iter().map(ToString::to_string)).collect()
}

/// The smallest MTU of pods with addresses of these families, in bytes (IPv6: RFC 8200, section 5).
pub fn smallest_mtu(families: &BTreeSet<Family>) -> u32 {
    if families.contains(&Family::V6) { 1280 } else { *MTU_RANGE.start() }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::Pool;
    use crate::Revision;
    use crate::cause::HostError;
    use crate::ids::{ClusterId, Incarnation};
    use crate::ledger::{MemberState, NodeIdentity};
    use crate::pool::PoolState;
    use crate::record::{ClusterRecord, NotDecoded};
    use crate::registration::{PendingReason, RemovalProgress};
    use crate::store::StoreError;
    use crate::view::Versioned;

    fn view(pools: &[&str]) -> View {
        let mut view = View::default();
        let cluster = ClusterRecord::new(ClusterId::new("c"));
        view.cluster = Some(Versioned { record: Arc::new(cluster), revision: Revision::new(1) });
        for (number, cidr) in pools.iter().enumerate() {
            let name: polder_api::PoolName = format!("p{number}").parse().unwrap();
            let cidr: crate::Cidr = cidr.parse().unwrap();
            let length = cidr.length() + 4;
            let pool = Pool::new(name.clone(), cidr, length, PoolState::Active).unwrap();
            view.pools.insert(name, Versioned { record: Arc::new(pool), revision: Revision::new(1) });
        }
        view
    }

    fn allocations(gateways: &[&str]) -> Allocations {
        let identity = NodeIdentity {
            node: "n1".parse().unwrap(),
            cluster: ClusterId::new("c"),
            incarnation: Incarnation::new("i"),
            member_state: MemberState::Member,
        };
        Allocations { identity: Some(identity), blocks: Vec::new(), gateways: addresses(gateways) }
    }

    fn addresses(texts: &[&str]) -> Vec<IpAddr> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    /// The obstacles of a ready dual-stack node after `change`.
    fn found(
        change: impl for<'a> FnOnce(ReadinessInputs<'a>, &'a BrokenInputs) -> ReadinessInputs<'a>,
    ) -> Vec<String> {
        let (view, allocations) =
            (view(&["10.0.0.0/24", "fd00::/120"]), allocations(&["10.0.0.1", "fd00::1"]));
        let gateways = allocations.gateways.clone();
        let facts = ReadinessInputs {
            view: &view,
            registration: &Registration::Registered,
            allocations: &allocations,
            underlay: Ok(()),
            gateways: &gateways,
            mtu: 1450,
            failures: &[],
        };
        obstacles(&change(facts, &BrokenInputs::new()))
    }

    /// Wrong values for the tests.
    struct BrokenInputs {
        no_cluster: View,
        no_pool: View,
        nobody: Allocations,
        one_gateway: Allocations,
        waiting: Registration,
        removed: Registration,
        no_underlay: HostError,
        failures: Vec<SharedError>,
    }

    impl BrokenInputs {
        fn new() -> Self {
            let mut no_cluster = View::default();
            let no_answer = StoreError::NoAnswer { store: "etcd".to_owned(), reason: "no reply".to_owned() };
            no_cluster.lost = Some(no_answer.into());
            let mut no_pool = view(&[]);
            no_pool.refused.insert("/polder/v1/pools/p".to_owned(), NotDecoded::NotWatched.into());
            Self {
                no_cluster,
                no_pool,
                nobody: Allocations::default(),
                one_gateway: allocations(&["10.0.0.1"]),
                waiting: Registration::Waiting(PendingReason::More),
                removed: Registration::Removed(RemovalProgress::CuttingOff),
                no_underlay: HostError::new("no uplink"),
                failures: vec![SharedError::new("no bridge")],
            }
        }
    }

    #[test]
    fn a_complete_node_is_ready_even_before_its_record_is_written() {
        assert_eq!(found(|facts, _| facts), Vec::<String>::new());
        assert_eq!(
            found(|facts, it| ReadinessInputs { registration: &it.waiting, ..facts }),
            Vec::<String>::new()
        );
        // Before the first pass the MTU is unknown.
        assert_eq!(found(|facts, _| ReadinessInputs { mtu: 0, ..facts }), Vec::<String>::new());
    }

    #[test]
    fn each_missing_precondition_is_named() {
        let says = |found: Vec<String>, expected: &str| {
            assert!(found.len() == 1 && found[0].contains(expected), "{found:?} does not say {expected}");
        };
        says(
            found(|facts, it| ReadinessInputs { registration: &it.removed, ..facts }),
            "disconnecting its pods",
        );
        says(found(|facts, it| ReadinessInputs { view: &it.no_cluster, ..facts }), "etcd does not answer");
        says(found(|facts, it| ReadinessInputs { allocations: &it.nobody, ..facts }), "has no settings yet");
        says(
            found(|facts, it| ReadinessInputs {
                allocations: &it.nobody,
                registration: &it.waiting,
                ..facts
            }),
            "registration continues",
        );
        says(found(|facts, it| ReadinessInputs { underlay: Err(&it.no_underlay), ..facts }), "no uplink");
        says(
            found(|facts, it| ReadinessInputs { view: &it.no_pool, ..facts }),
            "polderctl pool add; record /polder/v1/pools/p of the datastore is ignored: agents do not read this key",
        );
        says(
            found(|facts, it| ReadinessInputs { allocations: &it.one_gateway, ..facts }),
            "no IPv6 block yet: wait a few seconds",
        );
        says(
            found(|facts, _| ReadinessInputs { gateways: &facts.gateways[..1], ..facts }),
            "IPv6 gateway address fd00::1 is not configured yet",
        );
        says(found(|facts, _| ReadinessInputs { mtu: 1230, ..facts }), "underlay interfaces by 50 bytes");
        says(found(|facts, it| ReadinessInputs { failures: &it.failures, ..facts }), "no bridge");
    }
}
