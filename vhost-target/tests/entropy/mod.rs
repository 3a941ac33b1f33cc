//! A second device for the target: virtio entropy (virtio 1.2, section 5.4). It fills the writable
//! buffers of each chain when its source has supplied the bytes. It shows that a device needs only
//! [`vhost_target::device`] and [`vhost_target::device_queue`].
#![expect(unsafe_code, reason = "accesses guest memory")]
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use reactor::{Iteration, Wait};
use vhost_target::device::{Device, Negotiated, OpenError, Opened, OpenedQueue, StorageUse};
use vhost_target::device_queue::{Answer, DeviceQueue, DeviceView, Progress, Request, WakeFds};
use vhost_target::session::{VHOST_F_LOG_ALL, VHOST_USER_F_PROTOCOL_FEATURES};
use virtqueue::chain::Chain;

/// The byte that fills every buffer.
pub(crate) const FILL: u8 = 0xe7;
/// VERSION_1, INDIRECT_DESC, EVENT_IDX.
const FEATURES: u64 = 1 << 32 | 1 << 28 | 1 << 29;
/// The answer to a request that gets no bytes.
const NOTHING: Answer = Answer { last_byte: None, written: 0, dirty: 0 };

/// A source of entropy.
pub(crate) trait Source: fmt::Debug + Send + Sync {
    /// Opens the source for one virtqueue. May wait.
    fn open(self: Arc<Self>) -> Result<Box<dyn Stream>, OpenError>;

    /// See [`Device::storage`].
    fn storage(self: Arc<Self>) -> StorageUse {
        StorageUse::default()
    }
}

/// A source that was opened for one virtqueue.
pub(crate) trait Stream: Send {
    /// Requests bytes for the request in `slot`, whose buffer begins with the number `tag`.
    fn request(&mut self, slot: u16, tag: u64, bytes: u64) -> Supply;

    /// Appends the slots of the requests that have ended since, and whether there are bytes.
    fn poll(&mut self, ended: &mut Vec<(u16, bool)>);

    /// See [`DeviceQueue::wait`].
    fn wait(&self) -> Wait {
        Wait::Event
    }

    /// See [`DeviceQueue::wake_fds`].
    fn wake_fds(&self) -> WakeFds<'_>;
}

/// The answer of a source.
pub(crate) enum Supply {
    /// There is no room for the request.
    Full,
    /// [`Stream::poll`] will report it.
    Later,
    /// The request has ended. Whether there are bytes.
    Ended(bool),
}

/// The device.
#[derive(Debug)]
pub(crate) struct Entropy(Mutex<Option<Arc<dyn Source>>>);

impl Entropy {
    pub(crate) fn new(source: Arc<dyn Source>) -> Arc<Self> {
        Arc::new(Self(Mutex::new(Some(source))))
    }

    /// Removes the source. Queues get new views when the target is told.
    pub(crate) fn remove(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    pub(crate) fn source(&self) -> Option<Arc<dyn Source>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Device for Entropy {
    fn features(&self) -> u64 {
        FEATURES | 1 << VHOST_F_LOG_ALL | 1 << VHOST_USER_F_PROTOCOL_FEATURES
    }

    fn connect(self: Arc<Self>) -> Box<dyn Negotiated> {
        Box::new(Connected(self))
    }

    fn storage(&self) -> StorageUse {
        self.source().map(Source::storage).unwrap_or_default()
    }

    fn open_queue(
        self: Arc<Self>,
        _: u64,
        _: usize,
        _: u16,
    ) -> Result<Box<dyn OpenedQueue>, OpenError> {
        let stream = self.source().map(Source::open).transpose()?;
        Ok(Box::new(Opened(EntropyQueue { stream, ended: vec![] })))
    }
}

/// A connection: it negotiates nothing, and has no configuration space.
#[derive(Debug)]
struct Connected(Arc<Entropy>);

impl Negotiated for Connected {
    fn set_features(&mut self, _: u64) {}
    fn read_config(&self) -> Vec<u8> {
        vec![]
    }
    fn write_config(&mut self, _: u32, _: &[u8]) -> bool {
        false
    }
    fn view(&self) -> Option<DeviceView> {
        self.0.source().map(|_| Arc::new(()) as DeviceView)
    }
}

/// A virtqueue, with the requests that have ended since the last visit.
pub(crate) struct EntropyQueue {
    pub(crate) stream: Option<Box<dyn Stream>>,
    pub(crate) ended: Vec<(u16, bool)>,
}

/// Returns the number at the beginning of a request's first writable buffer, and the bytes of all.
/// `None` if there is no buffer to fill.
fn parse(chain: &mut Chain) -> Option<(u64, u64)> {
    let parts = chain.parts();
    let bytes = parts.totals.writable_bytes();
    let first = parts.segments.get(parts.totals.readable).filter(|_| bytes > 0)?;
    let mut tag = [0; 8];
    let len = first.len().min(8);
    // SAFETY: a segment of a request that is not finished is mapped guest memory.
    unsafe { std::ptr::copy_nonoverlapping(first.base(), tag.as_mut_ptr(), len) };
    Some((u64::from_le_bytes(tag), bytes))
}

/// Ends a request: fills its buffers if there are bytes.
fn end<R: Request<EntropyQueue>>(mut request: R, supplied: bool) -> Progress {
    if !supplied {
        request.count_error();
        return request.finish(NOTHING);
    }
    let parts = request.parts().1.parts();
    let bytes = parts.totals.writable_bytes();
    for segment in &parts.segments[parts.totals.readable..parts.totals.count] {
        // SAFETY: as in `parse`.
        unsafe { segment.base().write_bytes(FILL, segment.len()) };
    }
    let written = bytes.try_into().unwrap_or(u32::MAX);
    request.finish(Answer { last_byte: None, written, dirty: bytes })
}

impl DeviceQueue for EntropyQueue {
    type Request = ();
    type View = ();

    fn refuse(_: &mut Chain) -> Answer {
        NOTHING
    }
    fn start<R: Request<Self>>(&mut self, _: &(), request: R, _: bool) -> Progress {
        self.retry(request)
    }
    fn retry<R: Request<Self>>(&mut self, mut request: R) -> Progress {
        let (slot, chain) = (request.slot(), request.parts().1);
        let parsed = if chain.parts().totals.malformed { None } else { parse(chain) };
        let (Some((tag, bytes)), Some(stream)) = (parsed, &mut self.stream) else {
            return end(request, false);
        };
        match stream.request(slot, tag, bytes) {
            Supply::Full => request.wait_for_room(),
            Supply::Later => request.keep(),
            Supply::Ended(supplied) => {
                request.spend(bytes);
                end(request, supplied)
            }
        }
    }
    fn poll(&mut self, _: &mut Iteration) -> usize {
        self.ended.clear();
        self.stream.iter_mut().for_each(|stream| stream.poll(&mut self.ended));
        self.ended.len()
    }
    fn progressed(&self, n: usize) -> u16 {
        self.ended[n].0
    }
    fn advance<R: Request<Self>>(&mut self, n: usize, request: R) -> Progress {
        end(request, self.ended[n].1)
    }
    fn discard<R: Request<Self>>(&mut self, _: usize, _: &mut R) {}
    fn wait(&self, _: usize) -> Wait {
        self.stream.as_ref().map_or(Wait::Event, |stream| stream.wait())
    }
    fn is_open(&self) -> bool {
        self.stream.is_some()
    }
    fn release(&mut self) -> Option<Box<dyn Send>> {
        Some(Box::new(self.stream.take()?))
    }
    fn wake_fds(&self) -> WakeFds<'_> {
        self.stream.iter().flat_map(|stream| stream.wake_fds()).collect()
    }
}
