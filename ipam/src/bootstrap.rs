//! The initial settings of a cluster: its previous ones, if the datastore has lost them, or those of a configuration.

use polder_api::Backend;

use crate::Pool;
use crate::cause::HostError;
use crate::ids::ClusterId;
use crate::key::Key;
use crate::ledger::NodeIdentity;
use crate::pools::{self, NotChanged};
use crate::record::{AttachMode, ClusterRecord, Masquerade, VxlanSettings};
use crate::view::{RefusedRecord, Settings, View, ViewSource};

/// The initial settings of a cluster, written if it has none.
#[derive(Debug, Clone)]
pub struct Bootstrap {
    /// The pools.
    pub pools: Vec<Pool>,
    /// The transport between nodes.
    pub backend: Backend,
    /// The attach mode of pods.
    pub attach: AttachMode,
    /// The VXLAN settings.
    pub vxlan: VxlanSettings,
    /// The source NAT of pod packets that leave the cluster.
    pub masquerade: Masquerade,
}

/// Settings to write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Proposal {
    /// The settings.
    pub record: ClusterRecord,
    /// Whether these are the cluster's previous settings.
    pub is_restored: bool,
    /// The pools to write; `None` if the cluster already has pools, which it keeps.
    pub pools: Option<Vec<Pool>>,
}

/// The addresses in use around a node are not known yet.
#[derive(Debug, Clone, PartialEq, Eq, Hash, thiserror::Error)]
pub enum AddressesUnknown {
    /// The node's own addresses cannot be determined.
    #[error(transparent)]
    Underlay(#[from] HostError),
    /// The view does not have the current addresses yet.
    /// Remedy: none, it is temporary.
    #[error("reading this node's own addresses")]
    Reading,
}

/// Why no settings are proposed.
#[derive(Debug, Clone, PartialEq, Eq, Hash, thiserror::Error)]
pub enum NotProposed {
    /// The view is not from the datastore, so it is unknown whether settings exist.
    /// Remedy: none, they are read as soon as the datastore is reachable.
    #[error("the cluster settings are unknown")]
    Unknown,
    /// Settings exist but cannot be decoded.
    #[error(transparent)]
    Refused(#[from] RefusedRecord),
    /// There are neither previous settings nor `[bootstrap]`.
    /// Remedy: start an agent whose configuration has [bootstrap].
    #[error("the cluster has no settings yet, and the configuration has no [bootstrap] to create them from")]
    NoBootstrap,
    /// The initial pools cannot be checked for overlaps yet.
    #[error(transparent)]
    AddressesUnknown(#[from] AddressesUnknown),
    /// An initial pool is invalid, or overlaps addresses in use.
    /// Remedy: correct bootstrap.pools in the agent's configuration, and restart the agent.
    #[error("bootstrap.pools in the configuration: {0}")]
    Pools(#[source] NotChanged),
}

/// The settings to write, or the reason to wait. `addresses_in_use` is an error while the addresses in use around this
/// node, which the initial pools must not overlap, are unknown. `fresh` is a cluster identifier that is not in use.
pub fn propose(
    view: &View,
    identity: Option<&NodeIdentity>,
    bootstrap: Option<&Bootstrap>,
    addresses_in_use: Result<(), AddressesUnknown>,
    fresh: String,
) -> Result<Proposal, NotProposed> {
    if view.source != ViewSource::Store {
        return Err(NotProposed::Unknown);
    }
    if let Some((key, reason)) = view.refused.get_key_value(&Key::Cluster.to_string()) {
        return Err(RefusedRecord { key: key.clone(), reason: reason.clone() }.into());
    }
    let is_ours = |lost: &&Settings| identity.is_some_and(|identity| identity.cluster == lost.cluster.id);
    let lost = view.remembered.as_ref().filter(is_ours);
    let (record, pools) = match (lost, bootstrap) {
        (Some(lost), _) => {
            ((*lost.cluster).clone(), lost.pools.iter().map(|pool| (**pool).clone()).collect())
        }
        (None, Some(bootstrap)) => {
            addresses_in_use?;
            check_pools(view, &bootstrap.pools)?;
            (first_settings(bootstrap, identity, fresh), bootstrap.pools.clone())
        }
        (None, None) => return Err(NotProposed::NoBootstrap),
    };
    let pools = view.every_pool().next().is_none().then_some(pools);
    Ok(Proposal { record, is_restored: lost.is_some(), pools })
}

fn first_settings(bootstrap: &Bootstrap, identity: Option<&NodeIdentity>, fresh: String) -> ClusterRecord {
    ClusterRecord {
        // A node that belongs to a cluster stays in it.
        id: identity.map_or(ClusterId::new(fresh), |identity| identity.cluster.clone()),
        backend: bootstrap.backend,
        attach: bootstrap.attach,
        vxlan: bootstrap.vxlan,
        masquerade: bootstrap.masquerade.clone(),
    }
}

/// Checks the initial pools against the addresses in use around this node, as far as they are known. Skipped if the
/// cluster already has pools, which it keeps.
fn check_pools(view: &View, first: &[Pool]) -> Result<(), NotProposed> {
    if view.every_pool().next().is_some() {
        return Ok(());
    }
    let refused = first.iter().find_map(|pool| pools::check_range(view, pool).err());
    refused.map_or(Ok(()), |reason| Err(NotProposed::Pools(reason)))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::Revision;
    use crate::ids::Incarnation;
    use crate::ledger::MemberState;
    use crate::pool::PoolState;
    use crate::record::NotDecoded;
    use crate::view::Versioned;

    fn pool(cidr: &str) -> Pool {
        Pool::new("main".parse().unwrap(), cidr.parse().unwrap(), 26, PoolState::Active).unwrap()
    }

    fn bootstrap() -> Bootstrap {
        Bootstrap {
            pools: vec![pool("10.244.0.0/16")],
            backend: Backend::Auto,
            attach: AttachMode::Bridge,
            vxlan: VxlanSettings::default(),
            masquerade: Masquerade::default(),
        }
    }

    fn identity(cluster: &str) -> NodeIdentity {
        NodeIdentity {
            node: "n1".parse().unwrap(),
            cluster: ClusterId::new(cluster),
            incarnation: Incarnation::new("i1"),
            member_state: MemberState::Member,
        }
    }

    /// A view of an empty datastore, with changes.
    fn view(change: impl FnOnce(&mut View)) -> View {
        let mut view = View::default();
        view.source = ViewSource::Store;
        change(&mut view);
        view
    }

    fn empty() -> View {
        view(|_| ())
    }

    fn proposed(
        view: &View,
        identity: Option<&NodeIdentity>,
        first: Option<&Bootstrap>,
    ) -> Result<Proposal, NotProposed> {
        propose(view, identity, first, Ok(()), "fresh".to_owned())
    }

    #[test]
    fn the_first_settings_and_pools_come_from_the_configuration() {
        let made = proposed(&empty(), None, Some(&bootstrap())).unwrap();
        assert_eq!((made.record.id.to_string(), made.is_restored), ("fresh".to_owned(), false));
        assert_eq!(made.pools, Some(bootstrap().pools));
        let again = proposed(&empty(), Some(&identity("ours")), Some(&bootstrap())).unwrap();
        assert_eq!(again.record.id.to_string(), "ours", "a node that has been in a cluster is still in it");
    }

    #[test]
    fn existing_pools_stay_and_are_not_compared_with_the_configuration() {
        let mut view = empty();
        let known = Versioned { record: Arc::new(pool("10.0.0.0/16")), revision: Revision::new(2) };
        view.pools.insert("main".parse().unwrap(), known);
        view.own_addresses = vec!["10.244.0.1".parse().unwrap()];
        let made = proposed(&view, None, Some(&bootstrap())).unwrap();
        assert_eq!(made.pools, None);
    }

    #[test]
    fn lost_settings_are_restored_only_for_their_own_cluster() {
        let first = first_settings(&bootstrap(), None, "lost".to_owned());
        let lost = Settings { cluster: Arc::new(first), pools: vec![Arc::new(pool("10.0.0.0/16"))] };
        let view = view(|view| view.remembered = Some(lost));
        let made = proposed(&view, Some(&identity("lost")), None).unwrap();
        assert!(made.is_restored);
        assert_eq!(made.pools, Some(vec![pool("10.0.0.0/16")]));
        assert!(proposed(&view, Some(&identity("other")), None).is_err());
        assert!(proposed(&view, None, None).is_err());
    }

    #[test]
    fn the_error_names_what_the_bootstrap_waits_for() {
        let says = |view: &View, first: Option<&Bootstrap>, expected: &str| {
            let message = proposed(view, None, first).unwrap_err().to_string();
            assert!(message.contains(expected), "{message}");
        };
        says(&View::default(), Some(&bootstrap()), "settings are unknown");
        says(&empty(), None, "[bootstrap]");
        let refused = [(Key::Cluster.to_string(), NotDecoded::NotWatched.into())].into();
        says(&view(|view| view.refused = refused), Some(&bootstrap()), "agents do not read this key");
        let own = vec!["10.244.0.1".parse().unwrap()];
        says(&view(|view| view.own_addresses = own), Some(&bootstrap()), "bootstrap.pools");
        let reading = Err(AddressesUnknown::Reading);
        let waits = propose(&empty(), None, Some(&bootstrap()), reading, String::new());
        assert_eq!(waits, Err(NotProposed::AddressesUnknown(AddressesUnknown::Reading)));
    }
}
