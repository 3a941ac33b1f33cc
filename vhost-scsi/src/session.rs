//! What the queues of one front end share: its nexus, its events, and its task management.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bdev::WakeSet;
use crossbeam_utils::atomic::AtomicCell;
use scsi::Nexus;
use virtio_bindings::virtio_scsi::{VIRTIO_SCSI_F_CHANGE, VIRTIO_SCSI_F_HOTPLUG};

use crate::disk::Disk;
use crate::target::{TARGETS_MAX, nexus};

/// An event for the driver, about one target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// The target is not there any more.
    Removed,
    /// The target is there now.
    Added,
    /// The size of its disk has changed.
    Resized,
}

/// In the order in which the events of one target are sent. It is right for a target that was
/// removed and added again. A removal withdraws the other events.
const EVENTS: [Event; 3] = [Event::Removed, Event::Added, Event::Resized];

/// The events that wait for a buffer: a bit for each kind and target. So none is lost, and their
/// number is bounded.
#[derive(Debug, Default)]
pub(crate) struct Events(AtomicU32);

impl Events {
    fn bit(event: Event, target: u8) -> u32 {
        1 << (event as u32 * 8 + u32::from(target))
    }

    fn post(&self, event: Event, target: u8) {
        // Release: a queue that gets a command because of this event sees its target in
        // `Session::shown`.
        self.0.fetch_or(Self::bit(event, target), Ordering::Release);
    }

    fn withdraw(&self, event: Event, target: u8) {
        self.0.fetch_and(!Self::bit(event, target), Ordering::Relaxed);
    }

    fn clear(&self) {
        self.0.store(0, Ordering::Relaxed);
    }

    /// Returns whether an event waits.
    pub(crate) fn any(&self) -> bool {
        self.0.load(Ordering::Relaxed) != 0
    }

    /// Removes and returns the next event.
    pub(crate) fn take(&self) -> Option<(Event, u8)> {
        // Acquire: as in `post`.
        let pending = self.0.load(Ordering::Acquire);
        let next = pending.trailing_zeros();
        let event = EVENTS.get(next as usize / TARGETS_MAX)?;
        self.0.fetch_and(!(1 << next), Ordering::Relaxed);
        Some((*event, (next % 8) as u8))
    }
}

/// A target that was opened for a queue.
pub(crate) type Arrival = Box<Disk>;

/// A request queue, as the control side and the control queue see it.
pub(crate) struct QueueLink {
    /// Requests that it may have in flight.
    pub(crate) depth: u16,
    /// Targets that were opened for it. It takes them when it adopts a view.
    pub(crate) arrivals: [AtomicCell<Option<Arrival>>; TARGETS_MAX],
    /// The wake fds of its channels.
    pub(crate) wake: Arc<WakeSet>,
    /// The number of the last barrier that it has reached.
    pub(crate) reached: AtomicU64,
    /// The number of the last barrier at which it had a command that the barrier is about.
    pub(crate) found: AtomicU64,
    /// It does not exist any more.
    pub(crate) gone: AtomicBool,
}

impl std::fmt::Debug for QueueLink {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("QueueLink").field("depth", &self.depth).finish_non_exhaustive()
    }
}

impl QueueLink {
    pub(crate) fn new(depth: u16) -> std::io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            depth,
            arrivals: Default::default(),
            wake: Arc::new(WakeSet::new()?),
            reached: AtomicU64::new(0),
            found: AtomicU64::new(0),
            gone: AtomicBool::new(false),
        }))
    }
}

/// A task management function at work: each request queue reaches it when it has taken all commands
/// that the driver had made available before, and when those that it is about have been answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Barrier {
    /// Its number in the session; the first is 1.
    pub(crate) number: u64,
    /// The target whose commands it is about.
    pub(crate) target: u8,
    /// The tag of the command that it is about; all commands if there is none.
    pub(crate) tag: Option<u64>,
    /// Whether commands are ended, or only looked for.
    pub(crate) ends: Ends,
}

/// What a [`Barrier`] does with commands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ends {
    /// Looks for them.
    Nothing,
    /// Ends those that have not begun their I/O with ABORTED.
    Aborted,
    /// Ends those that have not begun their I/O with RESET, and resets the logical unit.
    Reset,
    /// The same, and resets the nexus.
    NexusReset,
}

impl Barrier {
    /// Returns whether it is about a command.
    pub(crate) fn is_about(&self, target: u8, tag: u64) -> bool {
        self.target == target && self.tag.is_none_or(|about| about == tag)
    }
}

/// The value of [`Session`]'s `shown` before the driver's first view.
const UNSEEN: u16 = 1 << 8;

/// What the queues of one front end share.
#[derive(Debug)]
pub(crate) struct Session {
    /// Identifies the front end among all that its controller has ever had.
    pub(crate) key: u64,
    /// Its number in nexuses: unique among the controller's present front ends, and reused later.
    pub(crate) index: u8,
    /// The number of the controller.
    controller: u64,
    features: AtomicU64,
    pub(crate) events: Events,
    queues: Mutex<Vec<Arc<QueueLink>>>,
    barrier: PostedBarrier,
    /// The number of the last barrier whose function was answered. New queues ignore it and those
    /// before.
    answered: AtomicU64,
    /// The number of the last barrier that the control side has seen.
    seen: AtomicU64,
    /// Targets that could not be opened for a queue, a bit for each: they are not shown.
    hidden: AtomicU8,
    /// The targets that the last view had, a bit for each, or [`UNSEEN`].
    shown: AtomicU16,
}

impl Session {
    pub(crate) fn new(key: u64, index: u8, controller: u64) -> Arc<Self> {
        Arc::new(Self {
            key,
            index,
            controller,
            features: AtomicU64::new(0),
            events: Events::default(),
            queues: Mutex::default(),
            barrier: PostedBarrier::default(),
            answered: AtomicU64::new(0),
            seen: AtomicU64::new(0),
            hidden: AtomicU8::new(0),
            shown: AtomicU16::new(UNSEEN),
        })
    }

    /// Returns the nexus of the front end and a target.
    pub(crate) fn nexus(&self, target: u8) -> Nexus {
        nexus(self.controller, self.index, target)
    }

    /// Locks the list of request queues. Not for reactors.
    pub(crate) fn queues(&self) -> MutexGuard<'_, Vec<Arc<QueueLink>>> {
        let mut queues = self.queues.lock().unwrap_or_else(PoisonError::into_inner);
        queues.retain(|queue| !queue.gone.load(Ordering::Relaxed));
        queues
    }

    fn has(&self, feature: u32) -> bool {
        self.features.load(Ordering::Relaxed) & (1 << feature) != 0
    }

    /// A driver has negotiated features. It looks for targets itself: events of the time before do
    /// not concern it.
    pub(crate) fn set_features(&self, features: u64) {
        self.features.store(features, Ordering::Relaxed);
        self.events.clear();
        self.hidden.store(0, Ordering::Relaxed);
        self.shown.store(UNSEEN, Ordering::Relaxed);
    }

    /// Hides a target from the driver, until the driver is another one.
    pub(crate) fn hide(&self, target: u8) {
        self.hidden.fetch_or(1 << target, Ordering::Relaxed);
    }

    /// Returns whether a target is hidden.
    pub(crate) fn hides(&self, target: u8) -> bool {
        self.hidden.load(Ordering::Relaxed) & (1 << target) != 0
    }

    /// Posts an event, if the driver has negotiated it.
    pub(crate) fn post(&self, event: Event, target: u8) {
        let feature = match event {
            Event::Removed | Event::Added => VIRTIO_SCSI_F_HOTPLUG,
            Event::Resized => VIRTIO_SCSI_F_CHANGE,
        };
        if self.has(feature) {
            self.events.post(event, target);
        }
    }

    /// Takes note of the targets that the next view shows, and posts an event for each that has
    /// come or gone since the last one. One thread at a time may call this.
    pub(crate) fn show(&self, now: u8) {
        let now = u16::from(now);
        let before = self.shown.swap(now, Ordering::Relaxed);
        if before == UNSEEN {
            return;
        }
        for target in (0..8).filter(|target| (before ^ now) & (1 << target) != 0) {
            if now & (1 << target) != 0 {
                self.post(Event::Added, target);
            } else {
                self.events.withdraw(Event::Added, target);
                self.events.withdraw(Event::Resized, target);
                self.post(Event::Removed, target);
            }
        }
    }

    /// Returns the targets that the last view has, a bit for each. The driver may have been told of
    /// them before each queue has adopted that view.
    pub(crate) fn shown(&self) -> u8 {
        let [targets, _] = self.shown.load(Ordering::Relaxed).to_le_bytes();
        targets
    }

    /// Posts a barrier. One at a time: the last one was reached by all queues, or is abandoned.
    /// Returns it, with its number.
    pub(crate) fn post_barrier(&self, target: u8, tag: Option<u64>, ends: Ends) -> Barrier {
        self.barrier.post(target, tag, ends)
    }

    /// Returns the last barrier.
    pub(crate) fn barrier(&self) -> Option<Barrier> {
        self.barrier.load()
    }

    /// Returns the last barrier if it has not been returned before. For the control side, which does
    /// its part when it publishes the first views with it.
    pub(crate) fn new_barrier(&self) -> Option<Barrier> {
        let barrier = self.barrier.load()?;
        let before = self.seen.swap(barrier.number, Ordering::Relaxed);
        (before != barrier.number).then_some(barrier)
    }

    /// The function of a barrier is being answered.
    pub(crate) fn end_barrier(&self, barrier: &Barrier) {
        self.answered.store(barrier.number, Ordering::Relaxed);
    }

    /// Adds a request queue, which has no commands yet. Not for reactors.
    pub(crate) fn add_queue(&self, queue: &Arc<QueueLink>) {
        queue.reached.store(self.answered.load(Ordering::Relaxed), Ordering::Relaxed);
        self.queues().push(Arc::clone(queue));
    }

    /// Returns whether all request queues have reached a barrier, and if so, whether one of them
    /// had a command that it is about. `None`: not all have reached it, or the list is locked now.
    pub(crate) fn reached(&self, barrier: &Barrier) -> Option<bool> {
        let queues = self.queues.try_lock().ok()?;
        let mut found = false;
        for queue in queues.iter() {
            // Acquire: what the queue has written for the guest comes before the answer.
            let has_reached = queue.reached.load(Ordering::Acquire) >= barrier.number;
            // Also one that is still being opened: its ring may have commands.
            if !has_reached && !queue.gone.load(Ordering::Acquire) {
                return None;
            }
            found |= queue.found.load(Ordering::Relaxed) == barrier.number;
        }
        Some(found)
    }
}

/// The last barrier of a session. The control queue writes it, and the control side reads it.
#[derive(Debug, Default)]
struct PostedBarrier {
    number: AtomicU64,
    /// The target, `ends`, and whether there is a tag.
    about: AtomicU64,
    tag: AtomicU64,
}

impl PostedBarrier {
    fn post(&self, target: u8, tag: Option<u64>, ends: Ends) -> Barrier {
        let number = self.number.load(Ordering::Relaxed) + 1;
        let about = u64::from(target) | (ends as u64) << 8 | u64::from(tag.is_some()) << 16;
        self.about.store(about, Ordering::Relaxed);
        self.tag.store(tag.unwrap_or(0), Ordering::Relaxed);
        // Release: a thread that reads the number reads what belongs to it.
        self.number.store(number, Ordering::Release);
        Barrier { number, target, tag, ends }
    }

    /// If the barrier changes meanwhile, the result may have the fields of the next barrier. The
    /// number is then that of a barrier that all queues have reached, which they ignore.
    fn load(&self) -> Option<Barrier> {
        let number = self.number.load(Ordering::Acquire);
        let about = self.about.load(Ordering::Relaxed);
        let tag = (about >> 16 & 1 == 1).then(|| self.tag.load(Ordering::Relaxed));
        let ends = match about >> 8 & 0xff {
            0 => Ends::Nothing,
            1 => Ends::Aborted,
            2 => Ends::Reset,
            _ => Ends::NexusReset,
        };
        (number > 0).then_some(Barrier { number, target: (about & 0xff) as u8, tag, ends })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_of_a_target_are_sent_in_an_order_that_does_no_harm() {
        let session = Session::new(0, 0, 1);
        session.post(Event::Added, 3);
        assert_eq!(session.events.take(), None, "HOTPLUG was not negotiated");
        session.set_features(1 << VIRTIO_SCSI_F_HOTPLUG | 1 << VIRTIO_SCSI_F_CHANGE);
        session.show(0b10);
        assert!(!session.events.any(), "the driver finds these by itself");
        session.show(0b1000);
        session.show(0b1010);
        session.post(Event::Resized, 7);
        let events: Vec<_> = std::iter::from_fn(|| session.events.take()).collect();
        let expected =
            [(Event::Removed, 1), (Event::Added, 1), (Event::Added, 3), (Event::Resized, 7)];
        assert_eq!(events, expected);
        session.show(0b1011);
        session.post(Event::Resized, 0);
        session.show(0b1010);
        let events: Vec<_> = std::iter::from_fn(|| session.events.take()).collect();
        assert_eq!(events, [(Event::Removed, 0)], "nothing is told of a target that is gone");
        session.post(Event::Resized, 0);
        session.set_features(1 << VIRTIO_SCSI_F_HOTPLUG);
        assert!(!session.events.any(), "a new driver");
        session.post(Event::Resized, 0);
        assert!(!session.events.any(), "CHANGE was not negotiated");
    }

    #[test]
    fn a_barrier_is_reached_when_all_served_queues_have_reached_it() {
        let session = Session::new(0, 0, 1);
        assert_eq!(session.barrier(), None);
        let queues = [(); 3].map(|()| QueueLink::new(4).unwrap());
        queues.iter().for_each(|queue| session.add_queue(queue));
        let barrier = session.post_barrier(5, Some(77), Ends::Reset);
        assert_eq!(session.barrier(), Some(barrier));
        queues[2].gone.store(true, Ordering::Relaxed);
        assert_eq!(session.new_barrier(), Some(barrier));
        assert_eq!(session.new_barrier(), None);
        queues[0].reached.store(barrier.number, Ordering::Relaxed);
        assert_eq!(session.reached(&barrier), None);
        queues[1].found.store(barrier.number, Ordering::Relaxed);
        queues[1].reached.store(barrier.number, Ordering::Relaxed);
        assert_eq!(session.reached(&barrier), Some(true));
        let next = session.post_barrier(5, None, Ends::Nothing);
        assert_eq!((next.number, session.barrier()), (2, Some(next)));
        queues[0].reached.store(next.number, Ordering::Relaxed);
        assert_eq!(session.reached(&next), None);
        queues[1].gone.store(true, Ordering::Relaxed);
        assert_eq!(session.reached(&next), Some(false));
    }
}
