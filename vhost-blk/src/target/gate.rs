//! What a ring waits for before it starts: I/O of connections that are gone, which shares something
//! with it.
//!
//! Such I/O still writes: into the guest's memory, where its data and its ring are, and to the disk.
//! So a ring waits at the gate for a connection that is gone and has not drained if
//!
//! * that is of the same controller: most likely of the same guest, whose requests come in order;
//! * one of its rings lies in the same place of the same memory file: two owners would write there;
//! * it may write to the same disk: what it does would undo what the new ring's guest has written.
//!
//! A ring of the same guest that is elsewhere in memory, on another disk, does not wait.

use std::sync::{Arc, Weak};

use bdev::{Bdev, Storage};

use super::{Attached, Connected, Inner, Target};
use crate::config::Disk;
use crate::memory::{FileRange, GuestMemory};
use crate::ring::{self, Layout, RingAddrs};
use crate::session::Session;
use crate::transport::ConnId;

/// Where a ring's parts are, in files: front ends may have the same memory at other addresses.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place([FileRange; 3]);

impl Place {
    fn of(memory: &GuestMemory, size: u16, addrs: RingAddrs, layout: Layout) -> Option<Self> {
        let [desc, avail, used] = ring::parts(size, addrs, layout.packed);
        let at = |(gpa, len)| memory.file_range(gpa, len);
        Some(Self([at(desc)?, at(avail)?, at(used)?]))
    }

    /// Of a ring as the session has it now.
    pub(super) fn now(session: &Session, ring: usize) -> Option<Self> {
        let state = session.rings().get(ring)?;
        Self::of(session.memory()?, state.num, state.addrs?, session.layout())
    }

    fn overlaps(&self, other: &Self) -> bool {
        self.0.iter().any(|mine| other.0.iter().any(|part| mine.overlaps(part)))
    }
}

/// Where a connection's bytes are in the end, whatever lies between.
#[derive(Clone, Debug, Default)]
pub(super) struct Bytes {
    /// The devices that are on no other. A weak reference keeps the address from being another's.
    lowest: Vec<Weak<dyn Bdev>>,
    /// What these are on, as several may be on the same file.
    storages: Vec<Storage>,
    /// The guest may write there.
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
        // Of a few each.
        let is_theirs = |mine| other.lowest.iter().any(|theirs| address(theirs) == mine);
        self.lowest.iter().map(address).any(is_theirs)
            || self.storages.iter().any(|mine| other.storages.contains(mine))
    }
}

impl Connected {
    /// Whether it is gone, reported or not, and may still have I/O in flight.
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

    /// Lets a ring in that wants to start, if nothing is in its way. Says whether it is to be started.
    pub(super) fn pass_gate(inner: &mut Inner, conn: ConnId, ring: usize) -> bool {
        if Self::is_gated(inner, conn, ring) {
            return false;
        }
        let connected = inner.connections.get_mut(&conn);
        connected.is_some_and(|c| c.session.open_gate(ring).is_some())
    }

    /// Whether I/O of a connection that is gone may use the memory of this one's guest.
    pub(super) fn has_earlier_io(inner: &Inner, conn: ConnId) -> bool {
        let Some(this) = inner.connections.get(&conn) else { return false };
        let mut others = inner.connections.iter().filter(|(other, _)| **other != conn);
        others.any(|(_, other)| other.lingers() && other.shares_memory(this))
    }

    /// Forgets a connection that is closed and drained, and lets those in that waited for it. Answers
    /// with the rings that are to be started.
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
