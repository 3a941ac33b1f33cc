//! What the suites need to know of a device: how it makes requests, how it answers them, and how
//! the test holds them back.

use std::collections::VecDeque;
use std::fmt;
use std::sync::MutexGuard;

use guest_memory::GuestMemory;
use vhost_target::device_queue::{DeviceQueue, DeviceView};
use virtqueue::Buffer;

/// A device whose requests stay in flight until the test completes them.
pub(crate) trait TestDevice: Send + Sized + 'static {
    /// Its queue.
    type Queue: DeviceQueue;
    /// Its record of a request.
    type Record: fmt::Debug;

    /// Whether a request that finds no room waits in the device, so that the queue fetches others
    /// meanwhile. If not, it waits in the engine, and the queue fetches nothing.
    const FETCHES_WITHOUT_ROOM: bool = false;

    /// Creates a device.
    fn create() -> Self;

    /// Opens it for a queue with at most `depth` requests.
    fn open(&self, depth: u16) -> Self::Queue;

    /// Returns the view of its queues.
    fn view(&self) -> DeviceView;

    /// Returns the behaviour that the test sets, and the record of requests.
    fn state(&self) -> MutexGuard<'_, State<Self::Record>>;

    /// Writes to guest memory what a request needs. Returns its buffers, of which `sent.data` are a
    /// part.
    fn request(&self, memory: &GuestMemory, sent: &Sent) -> Vec<Buffer>;

    /// Returns the tag of a request in the record, and the bytes of its data.
    fn seen(record: &Self::Record) -> (u64, u64);

    /// Asserts that the answer to a request is as expected: the memory, and the used length.
    fn check_answer(&self, memory: &GuestMemory, sent: &Sent, len: u32, expected: Outcome);

    /// Returns the addresses and lengths of what it writes for a request that succeeds.
    fn written(sent: &Sent) -> Vec<(u64, u32)>;
}

/// The direction of a request's data, for a device that has both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The device writes the data.
    Read,
    /// The device reads the data.
    Write,
}

/// A request of the driver.
#[derive(Clone, Debug)]
pub(crate) struct Sent {
    /// The number of the request, which begins with 0 in each scene.
    pub(crate) n: usize,
    pub(crate) kind: Kind,
    /// A number by which the test recognizes the request in the device's record.
    pub(crate) tag: u64,
    /// Addresses and lengths of the data. The first has at least 8 bytes. No other request in flight
    /// uses them, or the byte behind each.
    pub(crate) data: Vec<(u64, u32)>,
}

impl Sent {
    /// Returns the length of the data.
    pub(crate) fn bytes(&self) -> u32 {
        self.data.iter().map(|(_, len)| len).sum()
    }
}

/// How a request has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    Done,
    /// The device has tried and failed.
    Failed,
    /// The device was removed.
    Refused,
}

/// An action that is run once.
#[derive(Default)]
pub(crate) struct Hook(pub(crate) Option<Box<dyn FnOnce() + Send>>);

impl Hook {
    pub(crate) fn run(&mut self) {
        if let Some(action) = self.0.take() {
            action();
        }
    }
}

impl fmt::Debug for Hook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Hook").field(&self.0.is_some()).finish()
    }
}

/// The slot of a request whose I/O has ended, and whether it has succeeded.
pub(crate) type Ended = (u16, bool);

/// What happens to an I/O that was submitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Submitted {
    Full,
    Pending,
    /// It has ended, with success or not.
    Ended(bool),
}

/// The behaviour of a device's backend, and its record of I/Os.
///
/// Faults that it may show: I/O that does not complete, I/O that fails, and no room.
#[derive(Debug)]
pub(crate) struct State<R> {
    /// Whether I/O completes when it is submitted.
    pub(crate) at_once: bool,
    /// How many further I/Os are accepted, if there is a limit.
    pub(crate) room: Option<usize>,
    /// The index in `seen` of the I/O that fails.
    pub(crate) failing: Option<usize>,
    /// The accepted I/Os.
    pub(crate) seen: Vec<R>,
    /// Called at the next poll, in the middle of a visit.
    pub(crate) at_poll: Hook,
    /// Called when the reactor next asks how to wait, before it sleeps.
    pub(crate) at_wait: Hook,
    waiting: VecDeque<Ended>,
    done: Vec<Ended>,
}

impl<R> Default for State<R> {
    fn default() -> Self {
        Self {
            at_once: false,
            room: None,
            failing: None,
            seen: vec![],
            at_poll: Hook::default(),
            at_wait: Hook::default(),
            waiting: VecDeque::new(),
            done: vec![],
        }
    }
}

impl<R> State<R> {
    /// Returns the number of I/Os in flight.
    pub(crate) fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Completes the `nth` I/O in flight.
    pub(crate) fn complete(&mut self, nth: usize) {
        self.done.extend(self.waiting.remove(nth));
    }

    /// Completes all I/Os in flight.
    pub(crate) fn complete_all(&mut self) {
        self.done.extend(self.waiting.drain(..));
    }

    /// Drops all I/Os in flight, as if the process was killed.
    pub(crate) fn forget(&mut self) {
        *self = Self { at_once: self.at_once, ..Self::default() };
    }

    /// Submits the I/O of the request in `slot`.
    pub(crate) fn submit(&mut self, slot: u16, record: R) -> Submitted {
        match &mut self.room {
            Some(0) => return Submitted::Full,
            Some(room) => *room -= 1,
            None => {}
        }
        let ok = self.failing != Some(self.seen.len());
        self.seen.push(record);
        if self.at_once {
            return Submitted::Ended(ok);
        }
        self.waiting.push_back((slot, ok));
        Submitted::Pending
    }

    /// Returns at most `most` I/Os that have completed since the last call.
    pub(crate) fn poll(&mut self, most: usize) -> impl Iterator<Item = Ended> {
        self.at_poll.run();
        let count = self.done.len().min(most);
        self.done.drain(..count)
    }
}
