//! A source of entropy that supplies bytes at once, or when the test says so.
//!
//! Faults that it may show: an opening that does not end or that fails, and those of [`State`].

use std::os::fd::AsFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use guest_memory::GuestMemory;
use reactor::{EventFd, Wait};
use vhost_target::device::OpenError;
use vhost_target::device_queue::{DeviceView, WakeFds};
use virtqueue::Buffer;
use vm_memory::Bytes;

use crate::entropy::{EntropyQueue, FILL, Source, Stream, Supply};
use crate::suites::device::{Kind, Outcome, Sent, State, Submitted, TestDevice};
use crate::suites::scene::PARTS;

/// The tag of a request, and the number of bytes that it wants.
pub(crate) type Record = (u64, u64);

/// The behaviour of openings.
#[derive(Debug, Default)]
pub(crate) struct Openings {
    /// They do not end.
    pub(crate) hang: bool,
    /// They fail.
    pub(crate) fail: bool,
    /// Openings in progress.
    pub(crate) count: usize,
}

/// The source. All of its streams share one state: the test has requests in flight on one of them.
#[derive(Debug)]
pub(crate) struct HeldSource {
    openings: Mutex<Openings>,
    changed: Condvar,
    state: Mutex<State<Record>>,
    wake: EventFd,
}

impl HeldSource {
    pub(crate) fn new(at_once: bool) -> Arc<Self> {
        let mut state = State::default();
        state.at_once = at_once;
        Arc::new(Self {
            openings: Mutex::default(),
            changed: Condvar::new(),
            state: Mutex::new(state),
            wake: EventFd::new().expect("an fd"),
        })
    }

    pub(crate) fn openings(&self) -> MutexGuard<'_, Openings> {
        self.openings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State<Record>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets openings complete.
    pub(crate) fn open(&self) {
        self.openings().hang = false;
        self.changed.notify_all();
    }

    /// Completes all requests in flight.
    pub(crate) fn complete(&self) {
        self.state().complete_all();
        self.wake.signal();
    }
}

impl Source for HeldSource {
    fn open(self: Arc<Self>) -> Result<Box<dyn Stream>, OpenError> {
        let mut openings = self.openings();
        openings.count += 1;
        let waited = self.changed.wait_while(openings, |openings| openings.hang);
        let mut openings = waited.unwrap_or_else(PoisonError::into_inner);
        openings.count -= 1;
        if openings.fail {
            return Err(OpenError("no entropy".into()));
        }
        drop(openings);
        Ok(Box::new(HeldStream(self)))
    }
}

struct HeldStream(Arc<HeldSource>);

impl Stream for HeldStream {
    fn request(&mut self, slot: u16, tag: u64, bytes: u64) -> Supply {
        match self.0.state().submit(slot, (tag, bytes)) {
            Submitted::Full => Supply::Full,
            Submitted::Pending => Supply::Later,
            Submitted::Ended(supplied) => Supply::Ended(supplied),
        }
    }

    fn poll(&mut self, ended: &mut Vec<(u16, bool)>) {
        ended.extend(self.0.state().poll(usize::MAX));
    }

    fn wait(&self) -> Wait {
        self.0.state().at_wait.run();
        Wait::Event
    }

    fn wake_fds(&self) -> WakeFds<'_> {
        [self.0.wake.as_fd()].into_iter().collect()
    }
}

/// The entropy device, for the suites.
pub(crate) struct TestEntropy(Arc<HeldSource>);

impl TestDevice for TestEntropy {
    type Queue = EntropyQueue;
    type Record = Record;

    fn create() -> Self {
        Self(HeldSource::new(false))
    }

    fn open(&self, _depth: u16) -> EntropyQueue {
        let stream = Box::new(HeldStream(Arc::clone(&self.0)));
        EntropyQueue { stream: Some(stream), ended: vec![] }
    }

    fn view(&self) -> DeviceView {
        Arc::new(())
    }

    fn state(&self) -> MutexGuard<'_, State<Record>> {
        self.0.state()
    }

    /// The first buffer begins with the tag until it is filled. A request that is called a write
    /// has a readable buffer too, which the device ignores.
    fn request(&self, memory: &GuestMemory, sent: &Sent) -> Vec<Buffer> {
        let put = |gpa, bytes: &[u8]| {
            memory.slice(gpa, bytes.len()).unwrap().write_slice(bytes, 0).unwrap();
        };
        // The byte behind each buffer must not change.
        sent.data.iter().for_each(|&(gpa, len)| put(gpa, &vec![0; len as usize + 1]));
        put(sent.data[0].0, &sent.tag.to_le_bytes());
        let readable = Buffer { gpa: PARTS + 16 * (sent.n as u64 % 1024), len: 16, write: false };
        put(readable.gpa, &[!FILL; 16]);
        let data = sent.data.iter().map(|&(gpa, len)| Buffer { gpa, len, write: true });
        (sent.kind == Kind::Write).then_some(readable).into_iter().chain(data).collect()
    }

    fn seen(record: &Record) -> (u64, u64) {
        *record
    }

    fn check_answer(&self, memory: &GuestMemory, sent: &Sent, len: u32, expected: Outcome) {
        let done = expected == Outcome::Done;
        assert_eq!(len, if done { sent.bytes() } else { 0 }, "{sent:?}");
        for (n, &(gpa, len)) in sent.data.iter().enumerate() {
            let mut bytes = vec![0; len as usize + 1];
            memory.slice(gpa, bytes.len()).unwrap().read_slice(&mut bytes, 0).unwrap();
            let mut expected = vec![if done { FILL } else { 0 }; len as usize];
            expected.push(0);
            if n == 0 && !done {
                expected[..8].copy_from_slice(&sent.tag.to_le_bytes());
            }
            assert!(bytes == expected, "piece {n} of {sent:?}");
        }
    }

    fn written(sent: &Sent) -> Vec<(u64, u32)> {
        sent.data.clone()
    }
}
