//! A virtqueue as others see it: what its reactor is told, and what its reactor says.
//!
//! What the reactor keeps about it and does in a visit is in [`core`].
#![expect(unsafe_code, reason = "hands the core from owner to owner; submits guest memory")]

pub mod core;

use std::cell::UnsafeCell;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

use bdev::Wait;
use qsbr::{Domain, Published, Reader, Retired};

use self::core::Core;
use crate::config::Disk;
use crate::dirty_log::DirtyLog;
use crate::inflight::Area;
use crate::memory::GuestMemory;
use crate::notify::CallFd;
use crate::reactor::{Bell, Events, Turn};
use crate::reclaim::Garbage;
use crate::request::Limits;
use crate::ring::{AnyRing, Layout, RingAddrs, RingError};

/// Identity of a queue, never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct QueueId(pub u64);

/// All that a reactor needs of one queue in one generation. Immutable but for the count of I/Os
/// that use its memory, which the queue's owner keeps.
#[derive(Debug)]
pub struct View {
    /// Grows with each view of a queue; starts at 1.
    pub generation: u64,
    /// The ring, in `memory`.
    pub ring: AnyRing,
    /// The guest's memory; a view and its I/Os keep it mapped.
    pub memory: Arc<GuestMemory>,
    /// Where the guest wants to be told of completions.
    pub call: Option<Arc<CallFd>>,
    /// The guest's kicks wake the reactor; otherwise the ring has to be polled.
    pub kicks: bool,
    /// Where the pages that are written are marked, while the guest migrates.
    pub log: Option<Arc<DirtyLog>>,
    /// Writes are durable when they are answered.
    pub write_through: bool,
    /// The disk; `None` once it was removed, after which every request fails.
    pub disk: Option<Arc<Disk>>,
    /// What the disk allows, as it was when the view was made: a disk that grows makes a new view.
    pub(crate) limits: Option<Limits>,
    /// I/Os submitted under this view and not completed.
    inflight: AtomicU32,
}

impl View {
    /// A view that no I/O uses yet.
    ///
    /// # Errors
    /// The ring does not do, in this memory.
    pub fn new(
        generation: u64,
        memory: &Arc<GuestMemory>,
        size: u16,
        addrs: RingAddrs,
        layout: Layout,
        call: Option<Arc<CallFd>>,
        disk: Option<Arc<Disk>>,
    ) -> Result<Self, RingError> {
        // SAFETY: the view keeps the memory for as long as it keeps the ring.
        let ring = unsafe { AnyRing::new(memory, size, addrs, layout) }?;
        let (memory, inflight) = (Arc::clone(memory), AtomicU32::new(0));
        let limits = disk.as_deref().map(Disk::limits);
        let (log, kicks, write_through) = (None, false, false);
        Ok(Self {
            generation,
            ring,
            memory,
            call,
            kicks,
            log,
            write_through,
            disk,
            limits,
            inflight,
        })
    }

    /// Readies it for a reactor.
    fn arm(&self) {
        if let Some(call) = &self.call {
            call.arm();
        }
    }

    fn pin(&self) {
        // Relaxed: only the queue's owner writes, and before the view is retired nobody frees it.
        self.inflight.store(self.inflight.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
    }

    fn unpin(&self) {
        // Release: the owner's last access to this memory comes before whoever frees it.
        self.inflight.store(self.inflight.load(Ordering::Relaxed) - 1, Ordering::Release);
    }
}

/// A view that was replaced: freed when no reactor can adopt it and no I/O uses its memory.
#[derive(Debug)]
pub struct RetiredView {
    view: Retired<View>,
    /// The bytes that it keeps from being unmapped, for the operator to see.
    quarantine: Arc<AtomicU64>,
    counted: u64,
    /// Views of this queue that are retired and not freed, this one included.
    past: Arc<AtomicU32>,
}

impl Garbage for RetiredView {
    fn try_free(mut self: Box<Self>) -> Option<Box<dyn Garbage>> {
        if !self.view.ready() {
            return Some(self);
        }
        // Acquire: pairs with `unpin`. After the grace period the count only falls.
        if self.view.get().inflight.load(Ordering::Acquire) > 0 {
            if self.counted == 0 {
                self.counted = self.view.get().memory.size_bytes();
                self.quarantine.fetch_add(self.counted, Ordering::Relaxed);
            }
            return Some(self);
        }
        self.quarantine.fetch_sub(self.counted, Ordering::Relaxed);
        self.past.fetch_sub(1, Ordering::Relaxed);
        None
    }
}

/// Interrupt coalescing of a controller, as `vhost_controller_set_coalescing` sets it.
#[derive(Debug, Default)]
pub struct Coalescing {
    /// Base delay in ticks of the time-stamp counter; 0 is off.
    pub delay_base_ticks: AtomicU64,
    /// Requests per 10 ms above which calls are delayed.
    pub threshold: AtomicU32,
}

/// The part of an in-flight area that is a queue's.
#[derive(Clone, Copy, Debug)]
pub struct Tracked<'a> {
    /// The area.
    pub area: &'a Arc<Area>,
    /// The number of the queue's ring.
    pub ring: usize,
}

/// Why a queue cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// its disk cannot be opened
    #[error("cannot open its disk: {0}")]
    Disk(#[from] bdev::Error),
    /// a packed ring has no such position
    #[error("the ring has no position {0:#x}")]
    Base(u16),
    /// the in-flight area is for fewer or for smaller rings
    #[error("the in-flight area has no room for the ring")]
    NoRoom,
}

/// Where a queue is in its life. Only ever goes forward.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum QueueState {
    /// A reactor owns the core.
    Attached = 0,
    /// The guest broke it: nothing is fetched any more. A reactor still owns the core.
    Broken = 1,
    /// Told to stop, and drained: the reactor does not touch the core again.
    Stopped = 2,
}

/// A virtqueue that is, was, or is about to be attached to a reactor.
///
/// The core belongs to the reactor whose poll set has the queue, from the moment the set is
/// published until it stores [`QueueState::Stopped`], or until that reactor has been quiescent since
/// a set without the queue was published to it. Then it belongs to whoever has published that set,
/// who may give it to another reactor: core, channel and I/O in flight (`target::placement`).
#[derive(Debug)]
pub struct Queue {
    /// Its identity.
    pub id: QueueId,
    view: Published<View>,
    stop: AtomicBool,
    reset: AtomicBool,
    abandoned: AtomicBool,
    domain: Arc<Domain>,
    core: UnsafeCell<Core>,
    state: AtomicU8,
    last_avail: AtomicU16,
    inflight: AtomicU32,
    requests: AtomicU64,
    errors: AtomicU64,
    coalescing: Arc<Coalescing>,
    quarantine: Arc<AtomicU64>,
    past: Arc<AtomicU32>,
}

// SAFETY: everything but the core is atomic or immutable; the core has one owner at a time, which
// is handed on through the poll set's publication, its reactor's grace period, and the Release store
// of `Stopped`.
unsafe impl Sync for Queue {}

impl Queue {
    /// A queue to attach. A split ring starts where its used ring stands, a packed one at `base`, the
    /// position that the front end gave.
    ///
    /// # Errors
    /// The block device cannot be opened, or the ring has no such position.
    pub fn new(
        id: QueueId,
        domain: &Arc<Domain>,
        view: View,
        base: u16,
        coalescing: Arc<Coalescing>,
    ) -> Result<Arc<Self>, StartError> {
        Self::tracked(id, domain, view, base, coalescing, None)
    }

    /// As [`Queue::new`], with a record of what is in flight, by which the ring goes on where another
    /// has left it.
    ///
    /// # Errors
    /// As there, or the record has no room for the ring.
    pub fn tracked(
        id: QueueId,
        domain: &Arc<Domain>,
        view: View,
        base: u16,
        coalescing: Arc<Coalescing>,
        tracked: Option<Tracked<'_>>,
    ) -> Result<Arc<Self>, StartError> {
        let core = Core::new(&view, base, tracked)?;
        view.arm();
        Ok(Arc::new(Self {
            id,
            view: Published::new(domain, Box::new(view)),
            stop: AtomicBool::new(false),
            reset: AtomicBool::new(false),
            abandoned: AtomicBool::new(false),
            domain: Arc::clone(domain),
            last_avail: AtomicU16::new(core.last_avail()),
            core: UnsafeCell::new(core),
            state: AtomicU8::new(QueueState::Attached as u8),
            inflight: AtomicU32::new(0),
            requests: AtomicU64::new(0),
            errors: AtomicU64::new(0),
            coalescing,
            quarantine: Arc::default(),
            past: Arc::default(),
        }))
    }

    /// Has what the disk completes ring the bell `to` and no longer `from`, for reactors that may
    /// sleep. The one of `to` has to visit the queue once: what has rung before is not said again.
    ///
    /// # Safety
    /// The caller owns the core.
    ///
    /// # Errors
    /// The system has no room for another watch; then nothing has changed.
    pub(crate) unsafe fn aim(&self, from: Option<&Bell>, to: Option<&Bell>) -> io::Result<()> {
        // SAFETY: the caller says so.
        let core = unsafe { &mut *self.core.get() };
        let Some(channel) = core.channel() else { return Ok(()) };
        let fds = channel.wake_fds();
        if let Some(to) = to {
            for (n, fd) in fds.iter().enumerate() {
                to.watch(*fd).inspect_err(|_| fds[..n].iter().for_each(|fd| to.forget(*fd)))?;
            }
        }
        from.into_iter().for_each(|bell| fds.iter().for_each(|fd| bell.forget(*fd)));
        drop(fds);
        channel.set_wakes(to.is_some());
        Ok(())
    }

    /// Gives the reactor a new view, which it adopts at its next visit.
    #[must_use]
    pub fn publish(&self, view: View) -> RetiredView {
        let (quarantine, past) = (Arc::clone(&self.quarantine), Arc::clone(&self.past));
        past.fetch_add(1, Ordering::Relaxed);
        view.arm();
        RetiredView { view: self.view.replace(Box::new(view)), quarantine, counted: 0, past }
    }

    /// Asks the reactor to take no further request and to say when the last one has completed.
    pub fn stop(&self) {
        // Release: whatever the front end did before is seen by the visit that sees this.
        self.stop.store(true, Ordering::Release);
        // Reactors look at what is not in a ring only when an epoch has ended.
        let _ = self.domain.advance();
    }

    /// The same, and what an earlier owner has left to be done again is dropped where it was not
    /// begun: the guest has reset its device, and may use the memory for something else.
    pub fn reset(&self) {
        // Relaxed: it is seen by the visit that sees the stop.
        self.reset.store(true, Ordering::Relaxed);
        self.stop();
    }

    /// Like `stop`, and the reactor does not access the ring any more from its next turn on:
    /// completions of what is in flight are discarded. Another queue may use the ring then.
    pub fn abandon(&self) {
        // Relaxed: it is seen by the visit that sees the end of the epoch, which `stop` publishes.
        self.abandoned.store(true, Ordering::Relaxed);
        self.stop();
    }

    /// Where it is in its life.
    #[must_use]
    pub fn state(&self) -> QueueState {
        // Acquire: whoever sees `Stopped` may read what the reactor left behind.
        match self.state.load(Ordering::Acquire) {
            0 => QueueState::Attached,
            1 => QueueState::Broken,
            _ => QueueState::Stopped,
        }
    }

    /// The available index to answer GET_VRING_BASE with; final once stopped.
    #[must_use]
    pub fn last_avail(&self) -> u16 {
        self.last_avail.load(Ordering::Relaxed)
    }

    /// I/Os that have not completed.
    #[must_use]
    pub fn inflight(&self) -> u32 {
        self.inflight.load(Ordering::Relaxed)
    }

    /// Requests completed, and how many were malformed, refused, or failed by the disk.
    #[must_use]
    pub fn requests(&self) -> (u64, u64) {
        (self.requests.load(Ordering::Relaxed), self.errors.load(Ordering::Relaxed))
    }

    /// Bytes of earlier memory tables that I/O in flight keeps from being unmapped.
    #[must_use]
    pub fn quarantined_bytes(&self) -> u64 {
        self.quarantine.load(Ordering::Relaxed)
    }

    /// Views that were replaced and that a reactor or I/O in flight may still use.
    pub(crate) fn past_views(&self) -> u32 {
        self.past.load(Ordering::Relaxed)
    }

    /// One visit of the reactor that owns the core; says whether there was anything to do.
    ///
    /// # Safety
    /// The caller is that reactor, and `reader` is its reader, online.
    #[inline]
    pub unsafe fn visit(&self, reader: &Reader, turn: &mut Turn, events: &Events) -> bool {
        // SAFETY: the caller says so.
        unsafe { self.visit_watched(reader, turn, events) }.0
    }

    /// As [`Queue::visit`]; says also what to look for before the next visit.
    ///
    /// # Safety
    /// As there.
    #[inline]
    pub(crate) unsafe fn visit_watched(
        &self,
        reader: &Reader,
        turn: &mut Turn,
        events: &Events,
    ) -> (bool, Watch) {
        // SAFETY: the caller says so.
        let view = unsafe { self.view.load(reader) };
        // SAFETY: the core has this one owner, and this is its one borrow in the visit.
        let core = unsafe { &mut *self.core.get() };
        core.visit(self, view, turn, events)
    }

    /// Prepares the queue for its reactor's sleep: asks the guest for kicks and says what else to
    /// wait for. [`Wait::Poll`] if there is something to do right now.
    ///
    /// # Safety
    /// As for [`Queue::visit`].
    pub(crate) unsafe fn arm(&self, reader: &Reader, turn: &Turn) -> Wait {
        // SAFETY: the caller says so.
        let view = unsafe { self.view.load(reader) };
        // SAFETY: as in `visit_watched`.
        let core = unsafe { &mut *self.core.get() };
        core.arm(self, view, turn)
    }

    /// Whether the control side has changed something since the visit that `watch` is of.
    ///
    /// # Safety
    /// `reader` is of the queue's domain, online.
    #[inline]
    pub(crate) unsafe fn changed_since(&self, watch: &Watch, reader: &Reader) -> bool {
        // SAFETY: the caller says so.
        let generation = unsafe { self.view.load(reader) }.generation;
        generation != watch.generation || self.stop.load(Ordering::Acquire) != watch.stop
    }
}

/// What a reactor looks at to see whether a queue wants a visit, without touching the queue.
///
/// It is made of the view of one visit. [`Reader::quiesce`] says when it has to be compared with the
/// queue again ([`Queue::changed_since`]) before it is used: until then the view that the address
/// points into is not freed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Watch {
    /// The driver's available index, or [`NOTHING`].
    avail: *const AtomicU16,
    generation: u64,
    /// The index that had been taken, as it is in memory.
    seen: u16,
    /// Something other than the ring wants a visit every turn.
    pub(crate) due: bool,
    /// The guest's kicks wake the reactor, or there is nothing to kick for.
    pub(crate) kicks: bool,
    stop: bool,
}

// SAFETY: an address that only its queue's reactor follows.
unsafe impl Send for Watch {}

/// An index that never moves.
static NOTHING: AtomicU16 = AtomicU16::new(0);

impl Watch {
    /// For a queue that was not visited yet.
    pub(crate) fn new() -> Self {
        Self {
            avail: &raw const NOTHING,
            generation: 0,
            seen: 0,
            due: true,
            kicks: true,
            stop: false,
        }
    }

    /// Whether the queue wants a visit.
    ///
    /// # Safety
    /// See [`Watch`].
    #[inline]
    pub(crate) unsafe fn wants_visit(&self) -> bool {
        // SAFETY: the caller says so. Relaxed: the visit loads it again.
        let index = unsafe { &*self.avail }.load(Ordering::Relaxed);
        index != self.seen || self.due
    }
}

impl Garbage for Arc<Queue> {
    fn try_free(self: Box<Self>) -> Option<Box<dyn Garbage>> {
        // The poll sets that have it are being freed too; the last one is freed here.
        if Arc::strong_count(&self) > 1 { Some(self) } else { None }
    }
}
