//! What can go wrong.

/// Something that can go wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    /// The agent dies, and what it had in memory.
    Crash,
    /// The machine is booted. All that was in its kernel is gone.
    Reboot,
    /// The power is cut: with the kernel, the last writes to the ledger are gone.
    PowerCut,
    /// The agent ends, and somebody deletes its ledger.
    LedgerDeleted,
    /// The machine is booted with an empty disk.
    DiskWiped,
    /// Nothing more can be written to the disk, or again.
    DiskFull,
    /// A request never arrives.
    RequestLost,
    /// A request arrives after who asked has given it up.
    RequestLate,
    /// A request takes effect, and its reply is lost.
    ReplyLost,
    /// Nothing gets from a node to the store or back, or again.
    Partition,
    /// The store chooses another leader: what is under way is given up.
    LeaderChange,
    /// The store has no space left, or again.
    NoSpace,
    /// A node may only read what is in the store, or may write again.
    ReadsOnly,
    /// A watch ends, and begins again.
    WatchEnds,
    /// What a watch says arrives late, or at last.
    WatchDelayed,
    /// A watch says something again.
    WatchRepeats,
    /// The store forgets its history.
    Compaction,
    /// The store is emptied.
    StoreEmptied,
    /// The store is set back to what it was.
    StoreRestored,
    /// A plugin is killed.
    PluginKilled,
    /// An operator asks for the removal of a node that lives.
    NodeRemoved,
    /// A machine is gone for good, its node is removed, and another of its name comes.
    NodeReplaced,
    /// Another machine comes under the name of one that lives, of which sometimes nothing more is heard.
    Rival,
    /// Another machine comes with a copy of the ledger of one that lives, and that is sometimes cut off. Both of its ids
    /// are its own.
    LedgerCopied,
    /// A machine is booted with the ledger that it had lost, when it has been another incarnation since.
    LedgerBack,
    /// The clock of a machine begins to run at another speed.
    ClockSpeed,
    /// An operator asks for another pool, or for one that is drained to be used again.
    PoolAdded,
    /// An operator asks for a pool to be drained.
    PoolDrained,
    /// An operator asks for a pool to be removed.
    PoolRemoved,
    /// An operator asks for another backend.
    SettingsChanged,
    /// An operator asks for an address to be given up.
    AddressReleased,
}

impl Fault {
    /// All of them.
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
        Self::Rival,
        Self::LedgerCopied,
        Self::LedgerBack,
        Self::ClockSpeed,
        Self::PoolAdded,
        Self::PoolDrained,
        Self::PoolRemoved,
        Self::SettingsChanged,
        Self::AddressReleased,
    ];

    /// Whether it can happen to a node whose records are in a file of its own.
    pub fn happens_to_a_file(self) -> bool {
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
            other => other.is_asked_for(),
        }
    }

    /// Whether it is about pools. Who changes them adds, drains and removes some.
    pub fn is_about_pools(self) -> bool {
        matches!(self, Self::PoolAdded | Self::PoolDrained | Self::PoolRemoved)
    }

    /// Whether an operator asks for it, and an agent carries it out.
    pub fn is_asked_for(self) -> bool {
        self.is_about_pools()
            || matches!(self, Self::SettingsChanged | Self::AddressReleased | Self::NodeRemoved)
    }

    /// Its name.
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
            Self::Rival => "rival came",
            Self::LedgerCopied => "ledger copied",
            Self::LedgerBack => "lost ledger came back",
            Self::ClockSpeed => "clock speed changed",
            Self::PoolAdded => "pool add",
            Self::PoolDrained => "pool drain",
            Self::PoolRemoved => "pool remove",
            Self::SettingsChanged => "cluster set",
            Self::AddressReleased => "ipam release",
        }
    }
}
