//! The gate: a ring is not started while I/O of closed connections conflicts with it.
//!
//! Such I/O may still write to the guest's memory, where its data and its ring are, and to the
//! disk. A ring waits for a closed connection that has not drained if
//!
//! * it is of the same controller: most likely of the same guest, whose requests must be served in
//!   order;
//! * one of its rings overlaps the new ring in the same memory file: two queues would write there;
//! * it may write to the same disk: it could overwrite what the new ring's guest has written since.
//!
//! A ring elsewhere in the same guest's memory, for another disk, does not wait.

use std::sync::{Arc, Weak};

use bdev::{Bdev, Storage};

use super::{Attached, Connected, Inner, Target};
use crate::config::Disk;
use crate::memory::{FileRange, GuestMemory};
use crate::ring::{self, Layout, RingAddrs};
use crate::session::Session;
use crate::transport::ConnId;

/// The place of a ring's parts in files: front ends may map the same memory at other addresses.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place([FileRange; 3]);

impl Place {
    fn of(memory: &GuestMemory, size: u16, addrs: RingAddrs, layout: Layout) -> Option<Self> {
        let [desc, avail, used] = ring::parts(size, addrs, layout.packed);
        let at = |(gpa, len)| memory.file_range(gpa, len);
        Some(Self([at(desc)?, at(avail)?, at(used)?]))
    }

    /// The place of a ring with its current addresses.
    pub(super) fn now(session: &Session, ring: usize) -> Option<Self> {
        let state = session.rings().get(ring)?;
        Self::of(session.memory()?, state.num, state.addrs?, session.layout())
    }

    fn overlaps(&self, other: &Self) -> bool {
        self.0.iter().any(|mine| other.0.iter().any(|part| mine.overlaps(part)))
    }
}

/// The bdevs at the bottom of the stack that a connection's I/O goes to.
#[derive(Clone, Debug, Default)]
pub(super) struct Bytes {
    /// The bdevs without a base. A weak reference keeps the address from being reused.
    lowest: Vec<Weak<dyn Bdev>>,
    /// What stores their data: several bdevs may be on the same file.
    storages: Vec<Storage>,
    /// The guest may write to them.
    writes: bool,
}

impl Bytes {
    pub(super) fn of(disk: Option<&Arc<Disk>>) -> Self {
        let Some(disk) = disk else { return Self::default() };
        let (mut lowest, mut storages) = (vec![], vec![]);
        let mut left = vec![Arc::clone(&disk.bdev)];
        while let Some(bdev) = left.pop() {
            match bdev.bases() {
                [] => {
                    lowest.push(Arc::downgrade(&bdev));
                    storages.extend(bdev.storage());
                }
                bases => left.extend_from_slice(bases),
            }
        }
        Self { lowest, storages, writes: !disk.read_only && !disk.bdev.features().read_only }
    }

    fn shares(&self, other: &Self) -> bool {
        let address = |bdev: &Weak<dyn Bdev>| bdev.as_ptr().cast::<()>();
        // Both lists are short.
        let is_theirs = |mine| other.lowest.iter().any(|theirs| address(theirs) == mine);
        self.lowest.iter().map(address).any(is_theirs)
            || self.storages.iter().any(|mine| other.storages.contains(mine))
    }
}

impl Connected {
    /// Whether the connection is closed, reported as such or not, and may still have I/O in flight.
    fn lingers(&self) -> bool {
        self.session.undrained() && self.conn.as_ref().is_none_or(|conn| conn.hung_up())
    }

    /// Whether its I/O may use the memory of the guest of `other`.
    fn shares_memory(&self, other: &Self) -> bool {
        self.controller == other.controller
            || match (self.session.memory(), other.session.memory()) {
                (Some(mine), Some(theirs)) => mine.shares_file(theirs),
                _ => false,
            }
    }

    /// Whether a new ring of `other` at `place` must not run while its I/O does.
    fn stands_in_the_way(&self, other: &Self, place: Option<&Place>) -> bool {
        let same_ring = |queue: &Attached| {
            queue.place.as_ref().zip(place).is_some_and(|(mine, theirs)| mine.overlaps(theirs))
        };
        let related = self.controller == other.controller
            || self.bytes.writes && self.bytes.shares(&other.bytes)
            || self.queues.iter().flatten().any(same_ring);
        related && self.lingers()
    }
}

impl Target {
    /// Whether a ring has to wait.
    fn is_gated(inner: &Inner, conn: ConnId, ring: usize) -> bool {
        let Some(this) = inner.connections.get(&conn) else { return false };
        let place = Place::now(&this.session, ring);
        let mut others = inner.connections.iter().filter(|(other, _)| **other != conn);
        others.any(|(_, other)| other.stands_in_the_way(this, place.as_ref()))
    }

    /// Opens the gate for a ring that wants to start, if there is no conflict. Returns whether it
    /// has to be started now.
    pub(super) fn pass_gate(inner: &mut Inner, conn: ConnId, ring: usize) -> bool {
        if Self::is_gated(inner, conn, ring) {
            return false;
        }
        let connected = inner.connections.get_mut(&conn);
        connected.is_some_and(|c| c.session.open_gate(ring).is_some())
    }

    /// Whether I/O of a closed connection may use the memory of this connection's guest.
    pub(super) fn has_earlier_io(inner: &Inner, conn: ConnId) -> bool {
        let Some(this) = inner.connections.get(&conn) else { return false };
        let mut others = inner.connections.iter().filter(|(other, _)| **other != conn);
        others.any(|(_, other)| other.lingers() && other.shares_memory(this))
    }

    /// Removes a connection that is closed and drained, and opens the gate for rings that waited
    /// for it. Returns the rings that have to be started.
    pub(super) fn reap(&self, inner: &mut Inner, conn: ConnId) -> Vec<(ConnId, Vec<usize>)> {
        let done = |c: &Connected| c.conn.is_none() && !c.session.undrained();
        if !inner.connections.get(&conn).is_some_and(done) {
            return vec![];
        }
        let Some(gone) = inner.connections.remove(&conn) else { return vec![] };
        let left: Vec<ConnId> = inner.connections.keys().copied().collect();
        let mut opened = vec![];
        for conn in left {
            let mut starts = self.earlier_io_ended(inner, conn, &gone);
            let Some(connected) = inner.connections.get(&conn) else { continue };
            let gated: Vec<usize> = connected.session.gated().collect();
            starts.extend(gated.into_iter().filter(|ring| Self::pass_gate(inner, conn, *ring)));
            if !starts.is_empty() {
                opened.push((conn, starts));
            }
        }
        opened
    }

    fn earlier_io_ended(&self, inner: &mut Inner, conn: ConnId, gone: &Connected) -> Vec<usize> {
        let Some(connected) = inner.connections.get(&conn) else { return vec![] };
        if !connected.session.minds_earlier_io() || !gone.shares_memory(connected) {
            return vec![];
        }
        let more = Self::has_earlier_io(inner, conn);
        let Some(connected) = inner.connections.get_mut(&conn) else { return vec![] };
        let effects = connected.session.earlier_io_ended(gone.left_io, more);
        self.apply(inner, conn, effects, None)
    }
}
