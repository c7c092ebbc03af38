//! The faults that the simulation can inject.

/// A fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    /// The agent crashes and loses its memory.
    Crash,
    /// The machine reboots; the kernel loses all its state.
    Reboot,
    /// Power failure: the kernel state and the last ledger writes are lost.
    PowerCut,
    /// The agent stops, and its ledger is deleted.
    LedgerDeleted,
    /// The machine reboots with an empty disk.
    DiskWiped,
    /// Toggles a full disk: writes fail, or succeed again.
    DiskFull,
    /// A request is lost before it reaches the store.
    RequestLost,
    /// A request reaches the store after its sender has stopped waiting.
    RequestLate,
    /// A request takes effect, but its reply is lost.
    ReplyLost,
    /// Toggles a network partition between a node and the store.
    Partition,
    /// The store elects another leader: requests in flight fail.
    LeaderChange,
    /// Toggles exhausted store quota.
    NoSpace,
    /// Toggles a read-only store role for a node.
    ReadsOnly,
    /// A watch ends, and resumes.
    WatchEnds,
    /// Watch events are delayed, or the delay ends.
    WatchDelayed,
    /// A watch repeats events.
    WatchRepeats,
    /// The store compacts its history.
    Compaction,
    /// The store loses all its data.
    StoreEmptied,
    /// The store is restored from a backup.
    StoreRestored,
    /// A plugin process is killed.
    PluginKilled,
    /// An operator requests the removal of a live node.
    NodeRemoved,
    /// A machine fails permanently. Its node is removed, and a new machine joins under its name.
    NodeReplaced,
    /// Another machine joins under the name of a live one. In some cases the original becomes unreachable.
    NameConflict,
    /// Another machine joins with a copy of the ledger of a live one. In some cases the original is partitioned from
    /// the store. The new machine has its own machine id and boot id.
    LedgerCopied,
    /// A machine reboots with the ledger that it had lost, after it has joined as another incarnation.
    LedgerBack,
    /// The clock of a machine changes its speed.
    ClockSpeed,
    /// An operator adds a pool, or reactivates a drained one.
    PoolAdded,
    /// An operator drains a pool.
    PoolDrained,
    /// An operator removes a pool.
    PoolRemoved,
    /// An operator changes the backend.
    SettingsChanged,
    /// An operator releases an address.
    AddressReleased,
}

impl Fault {
    /// All faults.
    pub const ALL: [Self; 31] = [
        Self::Crash,
        Self::Reboot,
        Self::PowerCut,
        Self::LedgerDeleted,
        Self::DiskWiped,
        Self::DiskFull,
        Self::RequestLost,
        Self::RequestLate,
        Self::ReplyLost,
        Self::Partition,
        Self::LeaderChange,
        Self::NoSpace,
        Self::ReadsOnly,
        Self::WatchEnds,
        Self::WatchDelayed,
        Self::WatchRepeats,
        Self::Compaction,
        Self::StoreEmptied,
        Self::StoreRestored,
        Self::PluginKilled,
        Self::NodeRemoved,
        Self::NodeReplaced,
        Self::NameConflict,
        Self::LedgerCopied,
        Self::LedgerBack,
        Self::ClockSpeed,
        Self::PoolAdded,
        Self::PoolDrained,
        Self::PoolRemoved,
        Self::SettingsChanged,
        Self::AddressReleased,
    ];

    /// Whether the fault can occur on a node with an embedded store (local file).
    pub fn affects_embedded_store(self) -> bool {
        match self {
            Self::Crash
            | Self::Reboot
            | Self::PowerCut
            | Self::LedgerDeleted
            | Self::DiskWiped
            | Self::DiskFull
            | Self::PluginKilled
            | Self::WatchEnds
            | Self::ClockSpeed
            | Self::NodeRemoved => true,
            other => other.is_operator_request(),
        }
    }

    /// Whether the fault is a pool change. A run has either none or all of these faults.
    pub fn is_pool_change(self) -> bool {
        matches!(self, Self::PoolAdded | Self::PoolDrained | Self::PoolRemoved)
    }

    /// Whether an operator requests this, and an agent executes it.
    pub fn is_operator_request(self) -> bool {
        self.is_pool_change()
            || matches!(self, Self::SettingsChanged | Self::AddressReleased | Self::NodeRemoved)
    }

    /// Name of the fault in counters and reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Crash => "agent crashed",
            Self::Reboot => "machine rebooted",
            Self::PowerCut => "ledger's tail lost",
            Self::LedgerDeleted => "ledger deleted",
            Self::DiskWiped => "disk wiped",
            Self::DiskFull => "disk full",
            Self::RequestLost => "request lost",
            Self::RequestLate => "request late",
            Self::ReplyLost => "reply lost",
            Self::Partition => "partition",
            Self::LeaderChange => "leader change",
            Self::NoSpace => "etcd without space",
            Self::ReadsOnly => "read-only role",
            Self::WatchEnds => "watch ended",
            Self::WatchDelayed => "watch delayed",
            Self::WatchRepeats => "watch repeated",
            Self::Compaction => "compaction",
            Self::StoreEmptied => "store emptied",
            Self::StoreRestored => "store restored",
            Self::PluginKilled => "plugin killed",
            Self::NodeRemoved => "node remove",
            Self::NodeReplaced => "node replaced",
            Self::NameConflict => "name conflict",
            Self::LedgerCopied => "ledger copied",
            Self::LedgerBack => "lost ledger restored",
            Self::ClockSpeed => "clock speed changed",
            Self::PoolAdded => "pool add",
            Self::PoolDrained => "pool drain",
            Self::PoolRemoved => "pool remove",
            Self::SettingsChanged => "cluster set",
            Self::AddressReleased => "ipam release",
        }
    }
}
