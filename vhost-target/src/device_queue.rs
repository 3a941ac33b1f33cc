//! The reactor side of a kind of virtio device, as the queue engine uses it.
//!
//! A [`DeviceQueue`] serves one virtqueue and is owned by the queue. The engine ([`crate::queue`])
//! is generic over it: it takes chains from the ring, and returns them when the device has finished
//! them.

use std::any::Any;
use std::fmt;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use arrayvec::ArrayVec;
use reactor::{Iteration, Wait};
use virtqueue::chain::Chain;

/// The reactor side of a device, for one virtqueue.
///
/// The engine takes a chain from the ring and calls [`DeviceQueue::start`]. A request that this
/// does not finish is pending. [`DeviceQueue::poll`] later returns how many pending requests have
/// made progress, and the engine calls [`DeviceQueue::advance`] for each. These methods get the
/// [`Request`] by value and return a [`Progress`], which only consuming the request produces. A
/// device can therefore neither finish a request twice nor forget one.
///
/// In every method but the last two, the implementer waits for no lock, allocates nothing, and
/// makes no system call that can wait. It may rely on having one owner at a time. It is not dropped
/// on a reactor.
pub trait DeviceQueue: Send + Sized + 'static {
    /// The device's state of a request. It is kept beside the chain, so it should be small.
    type Request: Default + Send + fmt::Debug;
    /// What the device's queues need to know of it in one generation.
    type View: Clone + Send + Sync + 'static;

    /// Returns the answer to a request without a view: the device was removed.
    fn refuse(chain: &mut Chain) -> Answer;

    /// Starts a request under the queue's current view. `resubmitted`: an earlier process may
    /// have started it.
    fn start<R: Request<Self>>(
        &mut self,
        view: &Self::View,
        request: R,
        resubmitted: bool,
    ) -> Progress;

    /// Continues a request for which the device had no room.
    fn retry<R: Request<Self>>(&mut self, request: R) -> Progress;

    /// Called when the queue has adopted a new view, before anything else happens under it. `None`:
    /// the device was removed.
    fn adopted(&mut self, _view: Option<&Self::View>) {}

    /// Called in each visit of a queue that stops. From now on the device must not delay requests,
    /// for example because of a rate limit.
    fn stopping(&mut self) {}

    /// Returns whether the device benefits from [`DeviceQueue::look_ahead`].
    fn looks_ahead(&self) -> bool {
        false
    }

    /// Prefetches what the request in `chain` will access. That request starts after the next one.
    fn look_ahead(&self, _chain: &Chain) {}

    /// Whether [`DeviceQueue::wants_requests`] may return false. If not, it is never called.
    const SELECTIVE: bool = false;

    /// Returns whether the device takes a request now. If not, chains stay in the ring, and neither
    /// the guest's kicks nor its new chains cause a visit. A change of this value takes effect in
    /// the visit that adopts a new view, or that starts a request.
    fn wants_requests(&self) -> bool {
        true
    }

    /// Returns whether [`DeviceQueue::visited`] is to be called at the end of this visit.
    fn is_watching(&self) -> bool {
        false
    }

    /// Called at the end of a visit, when the guest can see all finished requests of the visit.
    /// Called again while it returns something and the device is watching. `caught_up`: all chains
    /// that the guest had made available when the view was adopted were taken, or no further chain
    /// will be taken, and no request waits for room.
    fn visited(&mut self, _caught_up: bool) -> Option<Notice> {
        None
    }

    /// Called when all requests of a visit were started.
    fn started(&mut self, _iteration: &mut Iteration) {}

    /// Submits the queued requests. Called once per visit that has started requests.
    fn kick(&mut self) {}

    /// Checks pending requests for progress. Returns the number of those that have made progress.
    fn poll(&mut self, iteration: &mut Iteration) -> usize;

    /// Returns the slot of the `n`th of these requests.
    fn progressed(&self, n: usize) -> u16;

    /// Continues the `n`th of these requests.
    fn advance<R: Request<Self>>(&mut self, n: usize, request: R) -> Progress;

    /// Ends the device's part of the `n`th of these requests, in a queue whose guest memory must
    /// not be accessed any more. The engine ends the request and does not return its chain.
    fn discard<R: Request<Self>>(&mut self, n: usize, request: &mut R);

    /// Called when the data of pending requests is not needed any more; see
    /// [`DeviceQueue::discard`].
    fn abandon(&mut self) {}

    /// Returns what the owner does until the next visit while `pending` requests are pending, not
    /// counting those that wait for room.
    fn wait(&self, _pending: usize) -> Wait {
        Wait::Poll
    }

    /// Returns whether the device is open.
    fn is_open(&self) -> bool;

    /// Closes the device, which has no pending requests. Returns the value that must not be dropped
    /// on the reactor.
    fn release(&mut self) -> Option<Box<dyn Send>>;

    /// Returns the fds that signal progress, for edge-triggered polling.
    fn wake_fds(&self) -> WakeFds<'_> {
        WakeFds::new()
    }

    /// Sets whether the owner may sleep. Called by the owner, on the control side.
    fn set_wakes(&mut self, _wakes: bool) {}
}

/// What the device of a queue asks of the control side. See [`DeviceQueue::visited`].
pub enum Notice {
    /// Give all queues of the connection a new view ([`crate::device::Negotiated::view`]).
    Views,
    /// Drop this value, which must not be dropped on the reactor.
    Leftover(Box<dyn Send>),
}

/// The fds that wake the owner of a queue.
pub type WakeFds<'a> = ArrayVec<BorrowedFd<'a>, 2>;

/// A request that was taken from the ring. A device consumes it with one of the last three methods.
#[must_use]
pub trait Request<D: DeviceQueue>: Sized {
    /// Returns the number of its slot, which is below the depth that the device was opened with. No
    /// other request of the queue has this number at the same time.
    fn slot(&self) -> u16;

    /// Returns the device's state of the request, and the chain.
    fn parts(&mut self) -> (&mut D::Request, &mut Chain);

    /// Returns the reactor's poll iteration.
    fn iteration(&mut self) -> &mut Iteration;

    /// Collects the chain once more, which replaces the previous collection. Only allowed in
    /// [`DeviceQueue::start`], and not for a request that an earlier process may have started.
    fn recollect_chain(&mut self);

    /// Counts bytes that the request moves. Above a limit, the visit starts no further request.
    fn spend(&mut self, bytes: u64);

    /// Counts the request as malformed, refused or failed.
    fn count_error(&mut self);

    /// Returns the chain to the guest.
    fn finish(self, answer: Answer) -> Progress;

    /// Keeps the request pending: [`DeviceQueue::poll`] will report it.
    fn keep(self) -> Progress;

    /// Parks the request because the device has no room. The engine calls [`DeviceQueue::retry`] in
    /// a later visit, and starts no other request before that.
    fn wait_for_room(self) -> Progress;
}

/// What a method of a device has done with a request.
#[must_use]
#[derive(Debug)]
pub struct Progress(pub(crate) Outcome);

/// See [`Request`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    Finished,
    Pending,
    WaitsForRoom,
}

/// How a chain is returned to the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The value of the chain's last writable byte, which is the status of many devices.
    pub last_byte: Option<u8>,
    /// The number of written bytes that the used ring reports.
    pub written: u32,
    /// The number of bytes, from the chain's first writable byte, that may have been written. The
    /// dirty log marks them, and the last byte.
    pub dirty: u64,
}

/// A [`DeviceQueue::View`], without its type.
pub type DeviceView = Arc<dyn Any + Send + Sync>;
