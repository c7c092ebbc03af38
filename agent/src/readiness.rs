//! Whether a runtime can use the node. Requires more than serving an ADD: a path to a peer was open, and the CNI
//! configuration is in place.

use tokio::sync::watch;

use crate::conflist::NotWritten;
use crate::node_state::NodeState;
use crate::probe::NotProbed;

/// The inputs of readiness.
#[derive(Debug, Clone)]
pub struct Readiness {
    /// Whether an ADD would be served.
    pub node_state: NodeState,
    /// Whether a path to the peers was open, or why not.
    probed: watch::Receiver<Result<(), NotProbed>>,
    /// Whether the CNI configuration is in place.
    announced: watch::Receiver<Result<(), NotWritten>>,
    /// Why no plugin can reach the agent; `None` if it can.
    unreachable: watch::Receiver<Option<String>>,
}

impl Readiness {
    /// Reads the values that the prober, the engine and the server publish.
    pub fn new(
        node_state: NodeState,
        probed: watch::Receiver<Result<(), NotProbed>>,
        announced: watch::Receiver<Result<(), NotWritten>>,
        unreachable: watch::Receiver<Option<String>>,
    ) -> Self {
        Self { node_state, probed, announced, unreachable }
    }

    /// Why the node is not ready for pods. Empty if it is ready, which includes that the CNI configuration is in place.
    pub fn reasons(&self) -> Vec<String> {
        let mut reasons = self.unannounced();
        if let (true, Err(reason)) = (reasons.is_empty(), &*self.announced.borrow()) {
            reasons.push(reason.to_string());
        }
        reasons.extend(self.unreachable.borrow().clone());
        reasons
    }

    /// Why the CNI configuration is not written. Empty if it is written.
    pub fn unannounced(&self) -> Vec<String> {
        let mut reasons = self.node_state.obstacles();
        if let (true, Err(reason)) = (reasons.is_empty(), &*self.probed.borrow()) {
            reasons.push(reason.to_string());
        }
        reasons
    }

    /// Receiver of future changes of whether a path to the peers was open.
    pub fn probes(&self) -> watch::Receiver<Result<(), NotProbed>> {
        let mut probed = self.probed.clone();
        probed.mark_unchanged();
        probed
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;
    use std::sync::Arc;

    use polder_ipam::registration::{Allocations, Registration, RemovalProgress};

    use super::*;
    use crate::fixture::Fixture;
    use crate::node_state::Pass;
    use crate::underlay::Underlay;

    #[test]
    fn readiness_reasons_appear_in_order_and_an_add_does_not_wait_for_peers() {
        let fixture = Fixture::new();
        let (probed, is_open) = watch::channel(Err(NotProbed::Probing));
        let (announced, is_there) = watch::channel(Err(NotWritten::NotYet));
        let (_server, reachable) = watch::channel(None);
        let readiness = Readiness::new(fixture.node_state(), is_open, is_there, reachable);
        assert!(!readiness.reasons().is_empty());
        let (probing, unwritten) = (NotProbed::Probing.to_string(), NotWritten::NotYet.to_string());
        assert!(!readiness.reasons().contains(&probing), "{:?}", readiness.reasons());
        let gateways: Vec<IpAddr> = vec!["10.244.0.1".parse().unwrap()];
        fixture.allocations.send_modify(|allocations| {
            *allocations = Arc::new(Allocations { gateways: gateways.clone(), ..(**allocations).clone() });
        });
        drop(fixture.underlay.send_replace(Ok(Arc::new(Underlay::default()))));
        fixture.pass.send_replace(Some(Arc::new(Pass { gateways, mtu: 1450, ..Pass::default() })));
        assert_eq!(readiness.node_state.obstacles(), Vec::<String>::new());
        assert_eq!(readiness.reasons(), [probing]);
        drop(probed.send_replace(Ok(())));
        assert_eq!((readiness.reasons(), readiness.unannounced()), (vec![unwritten], Vec::new()));
        drop(announced.send_replace(Ok(())));
        assert_eq!(readiness.reasons(), Vec::<String>::new());
        fixture.registration.send_replace(Registration::Removed(RemovalProgress::CuttingOff));
        assert_eq!(readiness.reasons().len(), 1);
    }
}
