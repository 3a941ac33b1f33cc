//! What a kind of virtio device is to the queue engine: the reactor side of the device seam.
//!
//! A [`DeviceQueue`] serves one virtqueue and is owned by the queue. The engine ([`crate::queue`]) is
//! generic over it: it takes chains from the ring, and returns them when the device has finished them.

use std::any::Any;
use std::fmt;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use arrayvec::ArrayVec;
use reactor::{Iteration, Wait};
use virtqueue::chain::Chain;

/// The reactor side of a device, for one virtqueue.
///
/// The engine takes a chain from the ring and calls [`DeviceQueue::start`]. A request that is not
/// finished then is pending: [`DeviceQueue::poll`] says later how many have made progress, and the
/// engine calls [`DeviceQueue::advance`] for each. These methods get the [`Request`] by value and owe a
/// [`Progress`], which is only made by consuming the request: so a device can neither finish a request
/// twice nor forget one.
///
/// The implementer owes, in every method but the last two: no lock, no allocation, no system call that
/// can wait. It may rely on one owner at a time. It is dropped off the reactors.
pub trait DeviceQueue: Send + Sized + 'static {
    /// What the device keeps of a request. Kept beside the chain, so it should be small.
    type Request: Default + Send + fmt::Debug;
    /// What it needs to know of the device in one generation.
    type View: Clone + Send + Sync + 'static;

    /// The answer to a request when there is no view: the device was removed.
    fn refuse(chain: &Chain) -> Answer;

    /// Begins a request, under the queue's current view. `again`: an earlier process may have begun
    /// it.
    fn start<R: Request<Self>>(&mut self, view: &Self::View, request: R, again: bool) -> Progress;

    /// Goes on with a request for which there was no room.
    fn retry<R: Request<Self>>(&mut self, request: R) -> Progress;

    /// Whether it benefits from [`DeviceQueue::look_ahead`].
    fn looks_ahead(&self) -> bool {
        false
    }

    /// Prefetches what the request in `chain`, which starts after the next one, will access.
    fn look_ahead(&self, _chain: &Chain) {}

    /// All requests of a visit were started.
    fn started(&mut self, _iteration: &mut Iteration) {}

    /// Submits what was queued. Called once per visit that has started requests.
    fn kick(&mut self) {}

    /// Looks for pending requests that have made progress. Returns their number.
    fn poll(&mut self, iteration: &mut Iteration) -> usize;

    /// The slot of the `n`th of these requests.
    fn progressed(&self, n: usize) -> u16;

    /// Goes on with the `n`th of these requests.
    fn advance<R: Request<Self>>(&mut self, n: usize, request: R) -> Progress;

    /// The same for a queue whose guest memory must not be accessed any more: the engine ends the
    /// request and does not return its chain.
    fn discard<R: Request<Self>>(&mut self, n: usize, request: &mut R);

    /// The data of pending requests is not wanted any more; see [`DeviceQueue::discard`].
    fn abandon(&mut self) {}

    /// What to do until the next visit while requests are pending.
    fn wait(&self) -> Wait {
        Wait::Poll
    }

    /// Whether the device is open.
    fn is_open(&self) -> bool;

    /// Closes the device, for which nothing is pending. Returns what has to be dropped off the
    /// reactor.
    fn release(&mut self) -> Option<Box<dyn Send>>;

    /// The fds that signal progress, for edge-triggered polling.
    fn wake_fds(&self) -> WakeFds<'_> {
        WakeFds::new()
    }

    /// Sets whether the owner may sleep. Called on the control side, by the owner.
    fn set_wakes(&mut self, _wakes: bool) {}
}

/// The fds that wake the owner of a queue.
pub type WakeFds<'a> = ArrayVec<BorrowedFd<'a>, 2>;

/// A request that was taken from the ring. A device consumes it by one of the last three methods.
#[must_use]
pub trait Request<D: DeviceQueue>: Sized {
    /// The number of its slot, below the depth that the device was opened with. No other request of
    /// the queue has it at the same time.
    fn slot(&self) -> u16;

    /// The device's part, and the chain.
    fn parts(&mut self) -> (&mut D::Request, &mut Chain);

    /// The reactor's poll iteration.
    fn iteration(&mut self) -> &mut Iteration;

    /// Collects the chain once more, which replaces what was collected before. Only in
    /// [`DeviceQueue::start`], and not for a request that an earlier process may have begun.
    fn collect_again(&mut self);

    /// Counts bytes that the request moves. After a number of them, the visit starts no further one.
    fn spend(&mut self, bytes: u64);

    /// Counts the request as malformed, refused or failed.
    fn count_error(&mut self);

    /// Returns the chain to the guest.
    fn finish(self, answer: Answer) -> Progress;

    /// The device goes on with the request, and [`DeviceQueue::poll`] will report it.
    fn keep(self) -> Progress;

    /// The device has no room. The engine calls [`DeviceQueue::retry`] at a later visit, and starts no
    /// other request before.
    fn wait_for_room(self) -> Progress;
}

/// What has become of a request.
#[must_use]
#[derive(Debug)]
pub struct Progress(pub(crate) Became);

/// See [`Request`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Became {
    Finished,
    Pending,
    WaitsForRoom,
}

/// How a chain is returned to the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The value of the chain's last writable byte, where many devices have their status.
    pub last_byte: Option<u8>,
    /// Bytes that the used ring says were written.
    pub written: u32,
    /// Bytes from the chain's first writable one on that may have been written; the dirty log marks
    /// them, and the last byte.
    pub dirty: u64,
}

/// A [`DeviceQueue::View`], without its type.
pub type DeviceView = Arc<dyn Any + Send + Sync>;
