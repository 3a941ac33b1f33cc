//! The epoch counter, and the readers, each of which announces the last epoch that it has seen.

use std::cell::Cell;
use std::marker::PhantomData;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::ordering::{
    epoch_advance, epoch_read, fence_advance, fence_online, slot_check, slot_offline, slot_online,
    slot_quiesce,
};
use crate::sync::{AtomicBool, AtomicU64, fence};

/// The value of a slot while its reader is offline. Epochs start at 1.
const OFFLINE: u64 = 0;

/// The number of an epoch. Each retirement ends an epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Epoch(u64);

/// A set of readers. Each [`crate::Published`] value belongs to a domain.
#[derive(Debug)]
pub struct Domain {
    epoch: AtomicU64,
    slots: Box<[Slot]>,
}

/// One reader's announcement, on its own pair of cache lines, because the reader writes it often.
#[derive(Debug)]
#[repr(align(128))]
struct Slot {
    /// The epoch that the reader has seen, or [`OFFLINE`].
    seen: AtomicU64,
    claimed: AtomicBool,
}

impl Domain {
    /// A domain for at most `readers_max` readers at a time.
    #[must_use]
    pub fn new(readers_max: usize) -> Arc<Self> {
        let slot = || Slot { seen: AtomicU64::new(OFFLINE), claimed: AtomicBool::new(false) };
        Arc::new(Self {
            epoch: AtomicU64::new(1),
            slots: (0..readers_max).map(|_| slot()).collect(),
        })
    }

    /// A new reader, offline. `None` if there are already `readers_max` readers.
    #[must_use]
    pub fn reader(self: &Arc<Self>) -> Option<Reader> {
        // AcqRel: the slot's new owner is ordered after the `offline` of its last owner.
        let free = |slot: &Slot| {
            slot.claimed.compare_exchange(false, true, Ordering::AcqRel, Ordering::Relaxed).is_ok()
        };
        let slot = self.slots.iter().position(free)?;
        Some(Reader { domain: Arc::clone(self), slot, seen: OFFLINE, not_sync: PhantomData })
    }

    /// Ends an epoch, and returns the one that begins. When [`Domain::passed`] returns true for it,
    /// no reader holds a value that was unpublished before this call.
    #[must_use]
    pub fn advance(&self) -> Epoch {
        let epoch = self.epoch.fetch_add(1, epoch_advance()) + 1;
        // A reader that goes online stores its slot, executes a fence, and loads the pointer. If
        // its fence comes first, `passed` sees the slot and waits for the reader. If the fence here
        // comes first, the reader loads the new pointer, and the writer need not wait for it.
        if fence_advance() {
            fence(Ordering::SeqCst);
        }
        Epoch(epoch)
    }

    /// Whether every reader has been quiescent, or offline, since `epoch` began. Never blocks.
    #[must_use]
    pub fn passed(&self, epoch: Epoch) -> bool {
        self.slots.iter().all(|slot| {
            let seen = slot.seen.load(slot_check());
            seen == OFFLINE || seen >= epoch.0
        })
    }
}

/// A thread that loads published pointers. Starts offline.
#[derive(Debug)]
pub struct Reader {
    domain: Arc<Domain>,
    slot: usize,
    /// The value of the slot.
    seen: u64,
    not_sync: PhantomData<Cell<()>>,
}

impl Reader {
    /// Announces a quiescent state, and begins the next iteration. Costs one load, and one store if
    /// an epoch has ended since the last call.
    ///
    /// Returns whether an epoch has ended. If not, the reader may keep using the values that it
    /// loaded in the last iteration: they are not freed before the announcement that this call did
    /// not make. If so, the reader must load every value again. A writer that only wants to signal
    /// the readers writes, and then calls [`Domain::advance`].
    ///
    /// Takes `&mut self`, so that no reference from [`crate::Published::load`] is live.
    #[inline]
    pub fn quiesce(&mut self) -> bool {
        debug_assert!(self.is_online(), "an offline reader has no iterations");
        let epoch = self.domain.epoch.load(epoch_read());
        if epoch == self.seen {
            return false;
        }
        self.seen = epoch;
        self.slot().store(epoch, slot_quiesce());
        true
    }

    /// Goes online, and begins an iteration.
    pub fn online(&mut self) {
        self.seen = self.domain.epoch.load(epoch_read());
        self.slot().store(self.seen, slot_online());
        // Pairs with the fence in `Domain::advance`.
        if fence_online() {
            fence(Ordering::SeqCst);
        }
    }

    /// Announces that the reader holds no published value until it calls [`Reader::online`]. A
    /// reader goes offline before it sleeps, so that writers do not wait for it.
    pub fn offline(&mut self) {
        self.seen = OFFLINE;
        self.slot().store(OFFLINE, slot_offline());
    }

    /// Whether the reader is online.
    #[must_use]
    pub fn is_online(&self) -> bool {
        self.seen != OFFLINE
    }

    pub(crate) fn domain(&self) -> &Arc<Domain> {
        &self.domain
    }

    fn slot(&self) -> &AtomicU64 {
        &self.domain.slots[self.slot].seen
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.offline();
        // Release: orders the slot's next owner after the store in `offline`.
        self.domain.slots[self.slot].claimed.store(false, Ordering::Release);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn slots_are_bounded_and_reused() {
        let domain = Domain::new(1);
        let first = domain.reader();
        assert!(first.is_some());
        assert!(domain.reader().is_none());
        drop(first);
        assert!(domain.reader().is_some());
    }

    #[test]
    fn a_grace_period_does_not_wait_for_an_offline_reader() {
        let domain = Domain::new(2);
        let mut busy = domain.reader().unwrap();
        let mut asleep = domain.reader().unwrap();
        assert!(!asleep.is_online(), "a new reader");
        busy.online();
        asleep.online();
        assert!(asleep.is_online());
        asleep.offline();
        assert!(busy.is_online() && !asleep.is_online());
        let epoch = domain.advance();
        assert!(!domain.passed(epoch));
        busy.quiesce();
        assert!(domain.passed(epoch));
        asleep.online();
        assert!(domain.passed(epoch), "it went online after the epoch began");
    }
}
