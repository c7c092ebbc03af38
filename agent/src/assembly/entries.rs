//! The entries of all tasks: the senders, each of which goes to the task that writes it.

use std::collections::BTreeMap;
use std::sync::Arc;

use polder_ipam::needed::RequiredRange;
use polder_ipam::record::LeaseRecord;
use polder_ipam::registration::{Allocations, Registration};
use polder_ipam::tasks::OwnNode;
use polder_ipam::view::View;
use tokio::sync::watch;

use crate::conflist::NotWritten;
use crate::endpoint::Endpoint;
use crate::engine;
use crate::fastpath::NotUsed;
use crate::kubernetes::properties::Properties;
use crate::leases::Leases;
use crate::node_state::{Membership, NodeState, Passes, Records};
use crate::probe::NotProbed;
use crate::probe::direct::DirectPaths;
use crate::probe::schedule::{Key, Verdict};
use crate::underlay::NotChosen;

/// The entries of [`super::RecordTasks`].
pub(super) struct RecordEntries {
    pub(super) view: watch::Sender<Arc<View>>,
    pub(super) store_at: watch::Sender<Option<Vec<RequiredRange>>>,
    pub(super) leases: watch::Sender<Arc<Leases>>,
}

/// The entries of [`super::AddressTasks`], and the operator's confirmation that the registrar uses.
pub(super) struct AddressEntries {
    pub(super) registration: watch::Sender<Registration>,
    pub(super) allocations: watch::Sender<Arc<Allocations>>,
    pub(super) adopted: watch::Sender<Option<LeaseRecord>>,
}

/// The entries of [`super::DatapathTasks`].
pub(super) struct DatapathEntries {
    pub(super) engine: engine::Entries,
    pub(super) announced: watch::Sender<Result<(), NotWritten>>,
    pub(super) probe: ProbeEntries,
    pub(super) host: watch::Sender<Vec<String>>,
    pub(super) fast_path: watch::Sender<Option<NotUsed>>,
}

/// The entries of the prober and of the probe endpoint.
pub(super) struct ProbeEntries {
    pub(super) endpoint: watch::Sender<Endpoint>,
    pub(super) probed: watch::Sender<Result<(), NotProbed>>,
    pub(super) verdicts: watch::Sender<Arc<BTreeMap<Key, Verdict>>>,
    pub(super) direct: watch::Sender<Arc<DirectPaths>>,
}

/// Creates all entries with their initial values.
pub(super) fn entries() -> (RecordEntries, AddressEntries, DatapathEntries) {
    let records = RecordEntries {
        view: watch::Sender::default(),
        store_at: watch::Sender::default(),
        leases: watch::Sender::default(),
    };
    let addresses = AddressEntries {
        registration: watch::Sender::default(),
        allocations: watch::Sender::default(),
        adopted: watch::Sender::default(),
    };
    let probe = ProbeEntries {
        endpoint: watch::Sender::new(Endpoint::Awaited),
        probed: watch::Sender::new(Err(NotProbed::NotYet)),
        verdicts: watch::Sender::default(),
        direct: watch::Sender::default(),
    };
    let engine = engine::Entries {
        underlay: watch::Sender::new(Err(NotChosen::NotYet)),
        pass: watch::Sender::default(),
        expected: watch::Sender::default(),
        repairs: watch::Sender::default(),
    };
    let datapath = DatapathEntries {
        engine,
        announced: watch::Sender::new(Err(NotWritten::NotYet)),
        probe,
        host: watch::Sender::default(),
        fast_path: watch::Sender::new(Some(NotUsed::NotYet)),
    };
    (records, addresses, datapath)
}

/// The entries that decide whether an ADD is served, for their readers.
pub(super) fn node_state(
    me: OwnNode,
    properties: Properties,
    records: &RecordEntries,
    addresses: &AddressEntries,
    datapath: &DatapathEntries,
) -> NodeState {
    let registration = addresses.registration.subscribe();
    NodeState {
        records: Records::new(records.view.subscribe()),
        membership: Membership::new(me, registration, addresses.allocations.subscribe()),
        passes: Passes::new(datapath.engine.underlay.subscribe(), datapath.engine.pass.subscribe()),
        properties,
    }
}
