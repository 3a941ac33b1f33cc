//! The gate: a ring does not start while I/O of closed connections conflicts with it, or while
//! another process uses the disk.
//!
//! I/O of a closed connection may still write to the guest's memory, where its data and its ring
//! are, and to the disk. A ring waits for a closed connection that has not drained if
//!
//! * the connection is of the same controller: most likely of the same guest, whose requests must
//!   be served in order;
//! * one of its rings overlaps the new ring in the same memory file: two queues would write there;
//! * it may write to the same disk: it could overwrite what the new ring's guest has written since.
//!
//! A ring elsewhere in the same guest's memory, for another disk, does not wait.
//!
//! The bdevs' leases ([`Lease`]) protect against other processes and against I/O that a process
//! left in flight when it ended. A connection uses the leases of its disk from the first request to
//! start a ring until its last ring has stopped and drained. While a lease is not held, rings do
//! not start and a reset does not complete, as with closed connections. A read-only disk needs no
//! lease.

use std::sync::Arc;

use guest_memory::{FileRange, GuestMemory};
use virtqueue::{Layout, RingAddrs};

use super::rings::Starts;
use super::{Attached, Connected, Inner, Target};
use crate::device::{Granted, Lease, StorageUse};
use crate::queue::QueueId;
use crate::session::Session;
use crate::transport::ConnId;

/// The place of a ring's parts in files. Front ends may map the same memory at different addresses.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place([FileRange; 3]);

impl Place {
    fn of(memory: &GuestMemory, size: u16, addrs: RingAddrs, layout: Layout) -> Option<Self> {
        let [desc, avail, used] = virtqueue::parts(size, addrs, layout.packed);
        let at = |(gpa, len)| memory.file_range(gpa, len);
        Some(Self([at(desc)?, at(avail)?, at(used)?]))
    }

    /// Returns the place of a ring with its current addresses.
    pub(super) fn now(session: &Session, ring: usize) -> Option<Self> {
        let state = session.rings().get(ring)?;
        Self::of(session.memory()?, state.num, state.addrs?, session.layout())
    }

    fn overlaps(&self, other: &Self) -> bool {
        self.0.iter().any(|mine| other.0.iter().any(|part| mine.overlaps(part)))
    }
}

/// Returns whether two devices have storage in common.
fn share_storage(one: &StorageUse, other: &StorageUse) -> bool {
    // Both lists are short.
    one.storages.iter().any(|mine| other.storages.iter().any(|theirs| mine.overlaps(theirs)))
}

/// A connection's use of the leases of its disk. Dropping it ends the use.
#[derive(Debug)]
pub(super) struct Hold(Vec<Arc<dyn Lease>>);

impl Hold {
    fn of(storage: &StorageUse, granted: &Granted) -> Self {
        let leases = storage.leases.clone();
        leases.iter().for_each(|lease| _ = lease.add_user(granted));
        Self(leases)
    }

    fn is_granted(&self) -> bool {
        self.0.iter().all(|lease| lease.is_held())
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.0.iter().for_each(|lease| lease.remove_user());
    }
}

impl Connected {
    /// Returns whether its rings wait for a lease, or would if they were started: another process,
    /// or I/O that it has left, may still access the disk and the guest's memory.
    fn waits_for_lease(&self) -> bool {
        self.hold.as_ref().is_some_and(|hold| !hold.is_granted())
    }

    /// Replaces the storage that its guest accesses. Uses the leases of the new storage before it
    /// ends the use of the old ones, some of which may be the same.
    pub(super) fn change_storage(&mut self, storage: StorageUse, granted: &Granted) {
        if self.hold.is_some() {
            self.hold = Some(Hold::of(&storage, granted));
        }
        self.storage = storage;
    }

    /// Ends the use of the leases if no ring needs them any more.
    pub(super) fn end_unused_hold(&mut self) {
        let waits = self.waits_for_lease() && self.session.is_affected_by_earlier_io();
        if self.session.started() == 0 && !waits {
            self.hold = None;
        }
    }

    /// Returns whether the connection is closed, reported or not, and may still have I/O in flight.
    fn may_have_late_io(&self) -> bool {
        self.session.undrained() && self.conn.as_ref().is_none_or(|conn| conn.hung_up())
    }

    /// Returns whether its I/O may use the memory of the guest of `other`.
    fn shares_memory(&self, other: &Self) -> bool {
        self.controller == other.controller
            || match (self.session.memory(), other.session.memory()) {
                (Some(mine), Some(theirs)) => mine.shares_file(theirs),
                _ => false,
            }
    }

    /// Returns whether a new ring of `other` at `place` must not run while this connection's I/O
    /// does.
    fn conflicts_with(&self, other: &Self, place: Option<&Place>) -> bool {
        let same_ring = |queue: &Attached| {
            queue.place.as_ref().zip(place).is_some_and(|(mine, theirs)| mine.overlaps(theirs))
        };
        let related = self.controller == other.controller
            || self.storage.writes && share_storage(&self.storage, &other.storage)
            || self.queues.iter().flatten().any(same_ring);
        related && self.may_have_late_io()
    }
}

impl Target {
    /// Returns whether a ring has to wait.
    fn is_gated(inner: &Inner, conn: ConnId, ring: usize) -> bool {
        let Some(this) = inner.connections.get(&conn) else { return false };
        let place = Place::now(&this.session, ring);
        let mut others = inner.connections.iter().filter(|(other, _)| **other != conn);
        others.any(|(_, other)| other.conflicts_with(this, place.as_ref()))
    }

    /// Opens the gate for a ring that is to start, if there is no conflict, and adds the ring to
    /// those whose device has to be opened. Returns whether it did.
    pub(super) fn pass_gate(&self, inner: &mut Inner, conn: ConnId, ring: usize) -> bool {
        let Some(connected) = inner.connections.get_mut(&conn) else { return false };
        let new_hold = || Hold::of(&connected.storage, &self.granted);
        connected.hold.get_or_insert_with(new_hold);
        connected.waited_for_lease |= connected.waits_for_lease();
        if connected.waits_for_lease() || Self::is_gated(inner, conn, ring) {
            return false;
        }
        let id = QueueId(inner.id());
        let Some(connected) = inner.connections.get_mut(&conn) else { return false };
        let opens = connected.session.open_gate(ring);
        if opens {
            connected.add_opening(ring, id);
        }
        opens
    }

    /// Returns whether I/O of a closed connection, or of another process, may use the memory of
    /// this connection's guest.
    pub(super) fn has_earlier_io(inner: &Inner, conn: ConnId) -> bool {
        let Some(this) = inner.connections.get(&conn) else { return false };
        if this.waits_for_lease() {
            return true;
        }
        let mut others = inner.connections.iter().filter(|(other, _)| **other != conn);
        others.any(|(_, other)| other.may_have_late_io() && other.shares_memory(this))
    }

    /// Removes a connection if it is closed and drained, and opens the gate for rings that waited
    /// for it. Returns the rings that have to be started.
    pub(super) fn reap(&self, inner: &mut Inner, conn: ConnId) -> Starts {
        let done = |c: &Connected| c.conn.is_none() && !c.session.undrained();
        if !inner.connections.get(&conn).is_some_and(done) {
            return Starts::default();
        }
        let Some(gone) = inner.connections.remove(&conn) else { return Starts::default() };
        let left: Vec<ConnId> = inner.connections.keys().copied().collect();
        let mut starts = Starts::default();
        for conn in left {
            let affected = |c: &Connected| gone.shares_memory(c);
            starts.extend(self.earlier_io_ended(inner, conn, affected, gone.left_io));
            starts.extend(self.open_gates(inner, conn));
        }
        starts
    }

    /// Opens the gates of connections whose leases are held now.
    pub(super) fn leases_granted(&self) {
        let mut inner = self.lock();
        let granted = |c: &Connected| c.hold.as_ref().is_some_and(Hold::is_granted);
        let conns = inner.connections.iter().filter(|(_, c)| granted(c));
        let conns: Vec<ConnId> = conns.map(|(conn, _)| *conn).collect();
        let mut starts = Starts::default();
        for conn in conns {
            if inner
                .connections
                .get_mut(&conn)
                .is_some_and(|c| std::mem::take(&mut c.waited_for_lease))
            {
                // No dirty log has recorded what the other process's reads wrote to guest memory.
                starts.extend(self.earlier_io_ended(&mut inner, conn, |_| true, true));
            }
            starts.extend(self.open_gates(&mut inner, conn));
        }
        // Devices that leave out the parts of their storage whose lease is not held.
        self.republish(&mut inner, |_, c| c.conn.is_some() && !c.storage.leases.is_empty());
        drop(inner);
        self.open(starts);
        (self.changed)();
    }

    /// Opens the gate for the rings of a connection that do not have to wait any more.
    fn open_gates(&self, inner: &mut Inner, conn: ConnId) -> Starts {
        let Some(connected) = inner.connections.get(&conn) else { return Starts::default() };
        let gated: Vec<usize> = connected.session.gated().collect();
        let any =
            gated.into_iter().fold(false, |any, ring| self.pass_gate(inner, conn, ring) | any);
        Starts::of(conn, any)
    }

    /// Tells a connection for which `may_use` is true that earlier I/O on its guest's memory has
    /// ended. `late`: that I/O may have written memory that no dirty log has recorded.
    fn earlier_io_ended(
        &self,
        inner: &mut Inner,
        conn: ConnId,
        may_use: impl Fn(&Connected) -> bool,
        late: bool,
    ) -> Starts {
        let Some(connected) = inner.connections.get(&conn) else { return Starts::default() };
        if !connected.session.is_affected_by_earlier_io() || !may_use(connected) {
            return Starts::default();
        }
        let more = Self::has_earlier_io(inner, conn);
        let Some(connected) = inner.connections.get_mut(&conn) else { return Starts::default() };
        let effects = connected.session.earlier_io_ended(late, more);
        self.apply(inner, conn, effects, None)
    }
}
