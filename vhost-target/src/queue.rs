//! A virtqueue as the control side uses it: what it tells the queue's reactor, and the events that
//! it gets back.
//!
//! The state that the reactor keeps and the work of a visit are in `core`, generic over the device.
#![expect(unsafe_code, reason = "hands the core from owner to owner")]

mod call_due;
mod core;
mod fetch;
mod notices;
mod requests;
mod slot;
mod start;

use std::cell::UnsafeCell;
use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

use guest_memory::{DirtyLog, GuestMemory};
use qsbr::{Domain, Published, Reader, Retired};
use reactor::{Events, Garbage, Iteration, PollHint, Pollable, Wait, Waker};
use virtqueue::inflight::Area;
use virtqueue::{AnyRing, Layout, RingAddrs, RingError};

use self::core::Core;
pub(crate) use self::core::DEPTH_MAX;
use crate::device_queue::{DeviceQueue, DeviceView};
use crate::notify::CallFd;

/// The identity of a queue, never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct QueueId(pub u64);

/// An event of a queue for the control side.
#[derive(Debug)]
pub enum Event {
    /// A queue that was told to stop has no requests in flight any more.
    Drained(QueueId),
    /// The guest has made its ring invalid.
    Broken(QueueId),
    /// A removed device has no requests in flight any more. The receiver drops the leftover.
    Released(QueueId, Leftover),
    /// The device wants new views for all queues of the connection.
    ViewsWanted(QueueId),
}

/// A value that must not be dropped on a reactor.
pub struct Leftover(pub Box<dyn Send>);

impl fmt::Debug for Leftover {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Leftover")
    }
}

/// All that a reactor needs to know of a queue in one generation, for any device.
#[derive(Clone, Debug)]
pub struct ViewSpec {
    /// Grows with each view of a queue; starts at 1.
    pub generation: u64,
    /// The guest's memory; a view and its I/O keep it mapped.
    pub memory: Arc<GuestMemory>,
    /// Number of descriptors of the ring.
    pub size: u16,
    /// Guest-physical addresses of the ring's parts.
    pub addrs: RingAddrs,
    /// What was negotiated about rings.
    pub layout: Layout,
    /// Where the guest is notified of completions. `None`: it is not notified.
    pub call: Option<Arc<CallFd>>,
    /// Whether the guest's kicks wake the reactor. If not, the ring has to be polled.
    pub kicks: bool,
    /// Where written pages are marked during a migration.
    pub log: Option<Arc<DirtyLog>>,
    /// The device's part; `None` if the device was removed.
    pub device: Option<DeviceView>,
}

impl ViewSpec {
    /// The first view of a ring, without kicks, a dirty log or a call fd.
    #[must_use]
    pub fn new(
        memory: &Arc<GuestMemory>,
        size: u16,
        addrs: RingAddrs,
        layout: Layout,
        device: Option<DeviceView>,
    ) -> Self {
        let memory = Arc::clone(memory);
        let (call, kicks, log) = (None, false, None);
        Self { generation: 1, memory, size, addrs, layout, call, kicks, log, device }
    }
}

/// A [`ViewSpec`] for a queue of a known device. Immutable, except for the number of requests that
/// use its memory, which the queue's owner counts.
pub(crate) struct View<V> {
    generation: u64,
    ring: AnyRing,
    memory: Arc<GuestMemory>,
    call: Option<Arc<CallFd>>,
    kicks: bool,
    log: Option<Arc<DirtyLog>>,
    device: Option<V>,
    /// Requests that were submitted under this view and have not completed.
    inflight: AtomicU32,
}

impl<V: Clone + Send + Sync + 'static> View<V> {
    /// Creates a view that no request uses yet.
    ///
    /// # Errors
    /// The ring's size or addresses are invalid in this memory.
    fn new(spec: ViewSpec) -> Result<Self, RingError> {
        let ViewSpec { generation, memory, size, addrs, layout, call, kicks, log, device } = spec;
        // SAFETY: the view keeps the memory for as long as it keeps the ring.
        let ring = unsafe { AnyRing::new(&memory, size, addrs, layout) }?;
        let device = device.map(|view| {
            let view: &V =
                view.downcast_ref().expect("a device's view has the type that its queues expect");
            view.clone()
        });
        if let Some(call) = &call {
            call.arm();
        }
        let inflight = AtomicU32::new(0);
        Ok(Self { generation, ring, memory, call, kicks, log, device, inflight })
    }
}

impl<V> View<V> {
    fn pin(&self) {
        // Relaxed: only the queue's owner writes, and the view is not freed before it is retired.
        self.inflight.store(self.inflight.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
    }

    fn unpin(&self) {
        // Release: the owner's last access to this memory comes before the memory is freed.
        self.inflight.store(self.inflight.load(Ordering::Relaxed) - 1, Ordering::Release);
    }
}

/// A view that was replaced. It is freed when no reactor can adopt it and no request uses its
/// memory.
struct RetiredView<V> {
    view: Retired<View<V>>,
    /// Bytes that this view keeps mapped, for the operator.
    quarantine: Arc<AtomicU64>,
    counted: u64,
    /// Views of this queue that are retired and not freed, including this one.
    past: Arc<AtomicU32>,
}

impl<V: Send + Sync + 'static> Garbage for RetiredView<V> {
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

/// The part of an in-flight area that belongs to a queue.
#[derive(Clone, Copy, Debug)]
pub struct Tracked<'a> {
    /// The area.
    pub area: &'a Arc<Area>,
    /// The number of the queue's ring.
    pub ring: usize,
}

/// The parameters of a new queue, besides its device.
#[derive(Debug)]
pub struct NewQueue<'a> {
    /// Its identity.
    pub id: QueueId,
    /// The domain of the reactors that will serve it.
    pub domain: &'a Arc<Domain>,
    /// Its first view.
    pub view: ViewSpec,
    /// The position that the front end gave. A packed ring starts there. A split ring starts at the
    /// position of its used ring.
    pub base: u16,
    /// The controller's coalescing.
    pub coalescing: Arc<Coalescing>,
    /// Where requests in flight are recorded. The queue resubmits the requests that the record
    /// lists.
    pub tracked: Option<Tracked<'a>>,
}

/// The reason why a queue cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// the ring's size or addresses are invalid
    #[error(transparent)]
    Ring(#[from] RingError),
    /// the position is invalid for a packed ring of this size
    #[error("invalid position {0:#x} for the packed ring (SET_VRING_BASE)")]
    Base(u16),
    /// the in-flight area has too few rings, or its rings are too small
    #[error("the in-flight area is too small for the ring")]
    NoRoom,
}

/// The state of a queue. It never goes back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum QueueState {
    /// A reactor owns the core.
    Attached = 0,
    /// The guest has made the ring invalid: no request is taken any more. A reactor still owns the
    /// core.
    Broken = 1,
    /// The queue was told to stop and has drained. The reactor does not access the core any more.
    Stopped = 2,
}

/// The state that the control side and a queue's owner share.
#[derive(Debug)]
pub struct Control {
    /// The queue's identity.
    pub id: QueueId,
    stop: AtomicBool,
    reset: AtomicBool,
    abandoned: AtomicBool,
    domain: Arc<Domain>,
    state: AtomicU8,
    last_avail: AtomicU16,
    inflight: AtomicU32,
    requests: AtomicU64,
    errors: AtomicU64,
    coalescing: Arc<Coalescing>,
    quarantine: Arc<AtomicU64>,
    past: Arc<AtomicU32>,
}

impl Control {
    fn new(
        id: QueueId,
        domain: &Arc<Domain>,
        last_avail: u16,
        coalescing: Arc<Coalescing>,
    ) -> Self {
        Self {
            id,
            stop: AtomicBool::new(false),
            reset: AtomicBool::new(false),
            abandoned: AtomicBool::new(false),
            domain: Arc::clone(domain),
            state: AtomicU8::new(QueueState::Attached as u8),
            last_avail: AtomicU16::new(last_avail),
            inflight: AtomicU32::new(0),
            requests: AtomicU64::new(0),
            errors: AtomicU64::new(0),
            coalescing,
            quarantine: Arc::default(),
            past: Arc::default(),
        }
    }

    /// Tells the reactor to take no further request, and to report when the last one has completed.
    pub fn stop(&self) {
        // Release: the visit that sees the stop also sees what the front end did before it.
        self.stop.store(true, Ordering::Release);
        // Reactors check for changes outside of the rings only when an epoch has ended.
        let _ = self.domain.advance();
    }

    /// As [`Control::stop`]. Also drops requests of an earlier process that were not resubmitted:
    /// the guest has reset its device, and may use their memory for something else.
    pub fn reset(&self) {
        // Relaxed: the visit that sees the stop also sees the reset.
        self.reset.store(true, Ordering::Relaxed);
        self.stop();
    }

    /// As [`Control::stop`]. From its next poll iteration on, the reactor does not access the ring,
    /// and discards completions. Another queue may then use the ring.
    pub fn abandon(&self) {
        // Relaxed: the visit that sees the end of the epoch, which `stop` publishes, also sees this
        // flag.
        self.abandoned.store(true, Ordering::Relaxed);
        self.stop();
    }

    /// The queue's state.
    #[must_use]
    pub fn state(&self) -> QueueState {
        // Acquire: a thread that sees `Stopped` may read what the reactor wrote before.
        match self.state.load(Ordering::Acquire) {
            0 => QueueState::Attached,
            1 => QueueState::Broken,
            _ => QueueState::Stopped,
        }
    }

    /// The available index for the reply to GET_VRING_BASE. Final once the queue is stopped.
    #[must_use]
    pub fn last_avail(&self) -> u16 {
        self.last_avail.load(Ordering::Relaxed)
    }

    /// Requests that have not completed.
    #[must_use]
    pub fn inflight(&self) -> u32 {
        self.inflight.load(Ordering::Relaxed)
    }

    /// The number of completed requests, and how many of them were malformed, refused or failed.
    #[must_use]
    pub fn requests(&self) -> (u64, u64) {
        (self.requests.load(Ordering::Relaxed), self.errors.load(Ordering::Relaxed))
    }

    /// Bytes of earlier memory tables that requests in flight keep mapped.
    #[must_use]
    pub fn quarantined_bytes(&self) -> u64 {
        self.quarantine.load(Ordering::Relaxed)
    }

    /// The number of views that were replaced and that a reactor or a request in flight may still
    /// use.
    #[must_use]
    pub fn past_views(&self) -> u32 {
        self.past.load(Ordering::Relaxed)
    }
}

/// A virtqueue that is, was, or will be attached to a reactor.
///
/// The core belongs to the reactor whose poll set has the queue, from the publication of that set
/// until the reactor stores [`QueueState::Stopped`], or until the reactor has been quiescent since
/// a set without the queue was published to it. Then the core belongs to the thread that published
/// that set. That thread may give the queue to another reactor, with core, device and I/O in flight
/// (`control::placement`).
pub struct Queue<D: DeviceQueue> {
    control: Control,
    view: Published<View<D::View>>,
    core: UnsafeCell<Core<D>>,
}

// SAFETY: everything but the core is atomic or immutable. The core has one owner at a time. It
// changes owners through the publication of a poll set, the grace period of a reactor, and the
// Release store of `Stopped`.
unsafe impl<D: DeviceQueue> Sync for Queue<D> {}

impl<D: DeviceQueue> fmt::Debug for Queue<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.control.fmt(f)
    }
}

/// A queue of any device, as the control side uses it.
pub trait TargetQueue: Pollable<Event> + fmt::Debug {
    /// The state that the queue shares with the control side.
    fn control(&self) -> &Control;

    /// Gives the reactor a new view, which it adopts at its next visit. Returns the previous view.
    ///
    /// # Errors
    /// The ring is invalid in the new memory. Nothing has changed then.
    fn publish(&self, view: ViewSpec) -> Result<Box<dyn Garbage>, RingError>;

    /// Makes completions wake the waker `to` and no longer `from`, for reactors that may sleep. The
    /// reactor of `to` has to visit the queue once, because earlier signals are not repeated.
    ///
    /// # Safety
    /// The caller owns the core.
    ///
    /// # Errors
    /// The system has no room for another wake source. Nothing has changed then.
    unsafe fn set_waker(&self, from: Option<&Waker>, to: Option<&Waker>) -> io::Result<()>;
}

impl<D: DeviceQueue> Queue<D> {
    /// Creates a queue, which the caller attaches to a reactor.
    ///
    /// # Errors
    /// The ring, its position or the in-flight area is invalid.
    pub fn new(device: D, new: NewQueue<'_>) -> Result<Arc<Self>, StartError> {
        let NewQueue { id, domain, view, base, coalescing, tracked } = new;
        let view = View::new(view)?;
        let core = Core::new(device, &view, base, tracked)?;
        let control = Control::new(id, domain, core.last_avail(), coalescing);
        let view = Published::new(domain, Box::new(view));
        Ok(Arc::new(Self { control, view, core: UnsafeCell::new(core) }))
    }

    /// The state that the queue shares with the control side.
    #[must_use]
    pub fn control(&self) -> &Control {
        &self.control
    }
}

impl<D: DeviceQueue> TargetQueue for Queue<D> {
    fn control(&self) -> &Control {
        &self.control
    }

    fn publish(&self, view: ViewSpec) -> Result<Box<dyn Garbage>, RingError> {
        let view = View::new(view)?;
        let (quarantine, past) =
            (Arc::clone(&self.control.quarantine), Arc::clone(&self.control.past));
        past.fetch_add(1, Ordering::Relaxed);
        let view = self.view.replace(Box::new(view));
        Ok(Box::new(RetiredView { view, quarantine, counted: 0, past }))
    }

    unsafe fn set_waker(&self, from: Option<&Waker>, to: Option<&Waker>) -> io::Result<()> {
        // SAFETY: the caller owns the core.
        let core = unsafe { &mut *self.core.get() };
        let device = core.device();
        if !device.is_open() {
            return Ok(());
        }
        let fds = device.wake_fds();
        if let Some(to) = to {
            for (n, fd) in fds.iter().enumerate() {
                to.watch(*fd).inspect_err(|_| fds[..n].iter().for_each(|fd| to.forget(*fd)))?;
            }
        }
        from.into_iter().for_each(|waker| fds.iter().for_each(|fd| waker.forget(*fd)));
        drop(fds);
        device.set_wakes(to.is_some());
        Ok(())
    }
}

impl<D: DeviceQueue> Pollable<Event> for Queue<D> {
    #[inline]
    unsafe fn visit(
        &self,
        reader: &Reader,
        iteration: &mut Iteration,
        events: &Events<Event>,
        hint: &mut PollHint,
    ) -> bool {
        // SAFETY: the caller guarantees that the reader is online and of the view's domain.
        let view = unsafe { self.view.load(reader) };
        // SAFETY: the caller owns the core, and this is its only borrow in the visit.
        let core = unsafe { &mut *self.core.get() };
        core.visit(&self.control, view, iteration, events, hint)
    }

    unsafe fn arm(&self, reader: &Reader, iteration: &Iteration) -> Wait {
        // SAFETY: as for `visit`.
        let view = unsafe { self.view.load(reader) };
        // SAFETY: as for `visit`.
        let core = unsafe { &mut *self.core.get() };
        core.arm(&self.control, view, iteration)
    }

    #[inline]
    unsafe fn changed_since(&self, hint: &PollHint, reader: &Reader) -> bool {
        // SAFETY: as for `visit`.
        let generation = unsafe { self.view.load(reader) }.generation;
        generation != hint.generation || self.control.stop.load(Ordering::Acquire) != hint.stop
    }
}

/// A queue that is not attached any more. It is freed when no poll set contains it.
pub(crate) struct Detached(pub(crate) Arc<dyn TargetQueue>);

impl Garbage for Detached {
    fn try_free(self: Box<Self>) -> Option<Box<dyn Garbage>> {
        if Arc::strong_count(&self.0) > 1 { Some(self) } else { None }
    }
}
