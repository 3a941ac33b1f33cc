//! A second device for the target: virtio entropy (virtio 1.2, section 5.4). It fills the writable
//! buffers of each chain. It shows that a device needs only [`vhost_target::device`] and
//! [`vhost_target::device_queue`].
//!
//! Faults that it may show: an opening that does not end or that fails, requests that do not
//! complete, and a device without room.
#![expect(unsafe_code, reason = "writes guest memory")]
use std::os::fd::AsFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use reactor::{EventFd, Iteration, Wait};
use vhost_target::device::{Device, Negotiated, OpenError, Opened, OpenedQueue};
use vhost_target::device_queue::{Answer, DeviceQueue, DeviceView, Progress, Request, WakeFds};
use vhost_target::session::{VHOST_F_LOG_ALL, VHOST_USER_F_PROTOCOL_FEATURES};
use virtqueue::chain::Chain;

/// The byte that fills every buffer.
pub(crate) const FILL: u8 = 0xe7;

/// VERSION_1, INDIRECT_DESC, EVENT_IDX.
const FEATURES: u64 = 1 << 32 | 1 << 28 | 1 << 29;

/// The behaviour that the test sets.
#[derive(Debug, Default)]
pub(crate) struct State {
    /// Openings do not end.
    pub(crate) hangs: bool,
    /// Openings fail.
    pub(crate) fails: bool,
    /// Openings in progress.
    pub(crate) opening: usize,
    /// Requests stay in flight until the test completes them.
    pub(crate) keeps: bool,
    /// The number of requests for which there is room.
    pub(crate) room: Option<usize>,
    kept: Vec<u16>,
    done: Vec<u16>,
}

/// The device.
#[derive(Debug)]
pub(crate) struct Entropy {
    state: Mutex<State>,
    changed: Condvar,
    wake: EventFd,
}

impl Entropy {
    pub(crate) fn new() -> Arc<Self> {
        let wake = EventFd::new().expect("an fd");
        Arc::new(Self { state: Mutex::default(), changed: Condvar::new(), wake })
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets openings complete.
    pub(crate) fn open(&self) {
        self.state().hangs = false;
        self.changed.notify_all();
    }

    /// Completes all requests in flight.
    pub(crate) fn complete(&self) {
        let mut state = self.state();
        let kept = std::mem::take(&mut state.kept);
        state.done.extend(kept);
        self.wake.signal();
    }
}

impl Device for Entropy {
    fn features(&self) -> u64 {
        FEATURES | 1 << VHOST_F_LOG_ALL | 1 << VHOST_USER_F_PROTOCOL_FEATURES
    }

    fn connect(self: Arc<Self>) -> Box<dyn Negotiated> {
        Box::new(Connected)
    }

    fn open_queue(
        self: Arc<Self>,
        _index: usize,
        _depth: u16,
    ) -> Result<Box<dyn OpenedQueue>, OpenError> {
        let mut state = self.state();
        state.opening += 1;
        let waited = self.changed.wait_while(state, |state| state.hangs);
        let mut state = waited.unwrap_or_else(PoisonError::into_inner);
        state.opening -= 1;
        if state.fails {
            return Err(OpenError("no entropy".into()));
        }
        drop(state);
        Ok(Box::new(Opened(EntropyQueue { device: Some(self), done: vec![] })))
    }
}

/// A connection: it negotiates nothing, and has no configuration space.
#[derive(Debug)]
struct Connected;

impl Negotiated for Connected {
    fn set_features(&mut self, _: u64) {}
    fn read_config(&self) -> Vec<u8> {
        vec![]
    }
    fn write_config(&mut self, _: u32, _: &[u8]) -> bool {
        false
    }
    fn view(&self) -> Option<DeviceView> {
        Some(Arc::new(()))
    }
}

struct EntropyQueue {
    device: Option<Arc<Entropy>>,
    done: Vec<u16>,
}

/// Fills the buffers of a request.
fn fill<R: Request<EntropyQueue>>(mut request: R) -> Progress {
    let (_, chain) = request.parts();
    let parts = chain.parts();
    let whole = !parts.totals.malformed;
    let written = if whole { parts.totals.writable_bytes() } else { 0 };
    let writable = parts.totals.readable..if whole { parts.totals.count } else { 0 };
    for segment in parts.segments.get(writable).unwrap_or_default() {
        // SAFETY: a segment of a request that is not finished is mapped guest memory.
        unsafe { segment.base().write_bytes(FILL, segment.len()) };
    }
    request.finish(Answer { last_byte: None, written: written as u32, dirty: written })
}

impl DeviceQueue for EntropyQueue {
    type Request = ();
    type View = ();

    fn refuse(_: &Chain) -> Answer {
        Answer { last_byte: None, written: 0, dirty: 0 }
    }

    fn start<R: Request<Self>>(&mut self, _: &(), request: R, _: bool) -> Progress {
        self.retry(request)
    }

    fn retry<R: Request<Self>>(&mut self, request: R) -> Progress {
        let Some(device) = &self.device else { return fill(request) };
        let mut state = device.state();
        match &mut state.room {
            Some(0) => return request.wait_for_room(),
            Some(room) => *room -= 1,
            None => {}
        }
        if state.keeps {
            state.kept.push(request.slot());
            return request.keep();
        }
        drop(state);
        fill(request)
    }

    fn poll(&mut self, _: &mut Iteration) -> usize {
        let Some(device) = &self.device else { return 0 };
        self.done = std::mem::take(&mut device.state().done);
        self.done.len()
    }

    fn progressed(&self, n: usize) -> u16 {
        self.done[n]
    }

    fn advance<R: Request<Self>>(&mut self, _: usize, request: R) -> Progress {
        fill(request)
    }

    fn discard<R: Request<Self>>(&mut self, _: usize, _: &mut R) {}

    fn wait(&self, _: usize) -> Wait {
        Wait::Event
    }

    fn is_open(&self) -> bool {
        self.device.is_some()
    }

    fn release(&mut self) -> Option<Box<dyn Send>> {
        Some(Box::new(self.device.take()?))
    }

    fn wake_fds(&self) -> WakeFds<'_> {
        self.device.iter().map(|device| device.wake.as_fd()).collect()
    }
}
