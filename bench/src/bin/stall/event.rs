//! The events that are measured, with their names and descriptions.

use crate::untrusted_clients::Trick;

/// An event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// Nothing in the server: the client's core is kept busy.
    Control,
    Connected,
    Loaded,
    Killed,
    Deleted,
    /// The memory table gains and loses this many GiB.
    Table(u64),
    SlowUnmap,
    HungIo,
    HungKilled,
    HungStopped,
    /// The storage of a VM hangs behind a socket, and another one while it is opened.
    EngineHang,
    /// Other clients try to block resources that VMs share.
    UntrustedClients(Trick),
}

impl Event {
    pub(crate) const ALL: [Self; 18] = [
        Self::Control,
        Self::Connected,
        Self::Loaded,
        Self::Killed,
        Self::Deleted,
        Self::Table(1),
        Self::Table(8),
        Self::HungIo,
        Self::HungKilled,
        Self::HungStopped,
        Self::EngineHang,
        Self::UntrustedClients(Trick::Lingering),
        Self::UntrustedClients(Trick::SlowCloses),
        Self::UntrustedClients(Trick::Batch),
        Self::UntrustedClients(Trick::Half),
        Self::UntrustedClients(Trick::Unread),
        Self::UntrustedClients(Trick::UnresponsiveSocket),
        Self::SlowUnmap,
    ];

    /// Its name on the command line and in tables.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Control => "control",
            Self::Connected => "connected",
            Self::Loaded => "loaded",
            Self::Killed => "killed",
            Self::Deleted => "deleted",
            Self::Table(1) => "table-1g",
            Self::Table(_) => "table-8g",
            Self::SlowUnmap => "slow-unmap",
            Self::HungIo => "hung-io",
            Self::HungKilled => "hung-killed",
            Self::HungStopped => "hung-stopped",
            Self::EngineHang => "engine-hang",
            Self::UntrustedClients(trick) => trick.name(),
        }
    }

    /// A description for tables.
    pub(crate) fn words(self) -> &'static str {
        match self {
            Self::Control => "no event: only the clients' core is kept busy, 8 times for 2 ms",
            Self::Connected => "8 VMs connect and start",
            Self::Loaded => "a VM reads and writes at depth 32",
            Self::Killed => "8 VMs with I/O in flight are killed",
            Self::Deleted => "8 controllers with a VM are deleted by force",
            Self::Table(1) => "a VM gains and loses 1 GiB of 4 KiB pages",
            Self::Table(_) => "a VM gains and loses 8 GiB of 4 KiB pages",
            Self::SlowUnmap => "a VM disconnects, its unmap takes 4 s, its controller is deleted",
            Self::HungIo => "16 requests of a VM hang",
            Self::HungKilled => "a VM with 16 hung requests is killed",
            Self::HungStopped => "a VM with 16 hung requests is stopped",
            Self::EngineHang => {
                "16 requests hang at an NBD server, and the handshake of another one hangs"
            }
            Self::UntrustedClients(trick) => trick.words(),
        }
    }

    /// Whether the server must be started with the library that makes an unmapping slow.
    pub(crate) fn wants_slow_unmap(self) -> bool {
        self == Self::SlowUnmap
    }

    /// Whether it disturbs threads other than reactors, on which new VMs and operators wait.
    pub(crate) fn wants_new_vms(self) -> bool {
        matches!(self, Self::UntrustedClients(_) | Self::EngineHang)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_events_are_distinct() {
        let mut names: Vec<&str> = Event::ALL.iter().map(|event| event.name()).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), Event::ALL.len());
    }
}
