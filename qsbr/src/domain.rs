//! The epoch, and the readers who announce that they have seen it.

use std::cell::Cell;
use std::marker::PhantomData;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::ordering::{
    epoch_advance, epoch_read, fence_advance, fence_online, slot_check, slot_offline, slot_online,
    slot_quiesce,
};
use crate::sync::{AtomicBool, AtomicU64, fence};

/// What a slot holds while its reader is offline. Epochs start at 1.
const OFFLINE: u64 = 0;

/// A point in the order of retirements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Epoch(u64);

/// A set of readers and what is published to them.
#[derive(Debug)]
pub struct Domain {
    epoch: AtomicU64,
    slots: Box<[Slot]>,
}

/// One reader's announcement, alone on its pair of cache lines: it is written every turn.
#[derive(Debug)]
#[repr(align(128))]
struct Slot {
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

    /// A new reader, offline; `None` if there are `readers_max` already.
    #[must_use]
    pub fn reader(self: &Arc<Self>) -> Option<Reader> {
        // AcqRel: a slot's next owner comes after the last one's `offline`.
        let free = |slot: &Slot| {
            slot.claimed.compare_exchange(false, true, Ordering::AcqRel, Ordering::Relaxed).is_ok()
        };
        let slot = self.slots.iter().position(free)?;
        Some(Reader { domain: Arc::clone(self), slot, seen: OFFLINE, not_sync: PhantomData })
    }

    /// Ends an epoch: what was unpublished before this call is out of every reader's reach once
    /// [`Domain::passed`] says so for the answer.
    #[must_use]
    pub fn advance(&self) -> Epoch {
        let epoch = self.epoch.fetch_add(1, epoch_advance()) + 1;
        // A reader that is coming online stores its slot, fences, and loads the pointer. If its
        // fence comes first, `passed` sees the slot and waits for it. If ours comes first, the
        // reader's load sees the new pointer and there is nothing to wait for.
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

/// A thread that follows published pointers. Starts offline.
#[derive(Debug)]
pub struct Reader {
    domain: Arc<Domain>,
    slot: usize,
    /// What the slot holds.
    seen: u64,
    not_sync: PhantomData<Cell<()>>,
}

impl Reader {
    /// Announces that no published value is held, and that the next turn begins. One load, and
    /// one store when an epoch has ended since the last time.
    ///
    /// Answers with whether one has. If not, nothing that was published at any time in the turn
    /// before has been freed nor will be in this one, and a reader may go on with what it loaded
    /// then: the announcement that would allow it has not been made. If so, everything has to be
    /// loaded anew. A writer who wants to be noticed without retiring anything calls
    /// [`Domain::advance`] after it has written.
    ///
    /// Takes `&mut self`, so that the compiler sees to the first half.
    #[inline]
    pub fn quiesce(&mut self) -> bool {
        debug_assert!(self.is_online(), "a sleeping reader has no turns");
        let epoch = self.domain.epoch.load(epoch_read());
        if epoch == self.seen {
            return false;
        }
        self.seen = epoch;
        self.slot().store(epoch, slot_quiesce());
        true
    }

    /// Begins the first turn, at the start or after a sleep.
    pub fn online(&mut self) {
        self.seen = self.domain.epoch.load(epoch_read());
        self.slot().store(self.seen, slot_online());
        // The other half of the pair in `Domain::advance`.
        if fence_online() {
            fence(Ordering::SeqCst);
        }
    }

    /// Announces that no published value is held nor will be until [`Reader::online`]: what a
    /// reader does before it sleeps, as nobody should wait for it meanwhile.
    pub fn offline(&mut self) {
        self.seen = OFFLINE;
        self.slot().store(OFFLINE, slot_offline());
    }

    /// Whether a turn is under way.
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
        // Release: the next owner of the slot comes after the store above.
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
    fn an_offline_reader_holds_up_nobody() {
        let domain = Domain::new(2);
        let mut busy = domain.reader().unwrap();
        let mut asleep = domain.reader().unwrap();
        assert!(!asleep.is_online(), "before its first turn");
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
        assert!(domain.passed(epoch), "it came online after the epoch began");
    }
}
