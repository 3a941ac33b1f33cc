//! A device in memory that does its I/O late and in any order, and records what it did: the states
//! in which a power cut could leave it follow from the record.
#![expect(unsafe_code, reason = "a device copies between its memory and the segments of an I/O")]

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

use bdev::{
    Bdev, Channel, Completion, Error, Features, Io, Op, Qos, Segment, Stats, Status, Submit, Tag,
    Wait, memory,
};
use blobstore::check::{Severity, check};
use blobstore::{Device, DeviceError, Properties};
use uuid::Uuid;

pub(crate) const BLOCK: u64 = 512;
/// The depth of guests' channels.
pub(crate) const GUEST_DEPTH: u16 = 16;
/// What is written whole or not at all.
const PAGE: usize = 4096;

/// Random numbers from a seed.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        let mut random = Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        random.below(2);
        random
    }

    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % limit
    }
}

/// What has happened, in order.
#[derive(Clone, Debug)]
pub(crate) enum Event {
    Write(u64, Vec<u8>),
    Flush,
    /// Of the test: it has been told of the end of something.
    Mark(u64),
}

pub(crate) struct State {
    data: Vec<u8>,
    pub(crate) events: Vec<Event>,
    random: Random,
}

/// The device.
pub(crate) struct Recorder {
    state: Mutex<State>,
    stats: Stats,
    qos: Qos,
    uuid: Uuid,
}

impl Recorder {
    pub(crate) fn new(data: Vec<u8>, seed: u64) -> Arc<Self> {
        let (events, random) = (vec![], Random::new(seed));
        Arc::new(Self {
            state: Mutex::new(State { data, events, random }),
            stats: Stats::default(),
            qos: Qos::default(),
            uuid: Uuid::new_v4(),
        })
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    pub(crate) fn mark(&self, mark: u64) {
        self.lock().events.push(Event::Mark(mark));
    }
}

impl State {
    pub(crate) fn data(&self) -> &[u8] {
        &self.data
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) {
        let at = offset as usize;
        self.data[at..at + bytes.len()].copy_from_slice(bytes);
        self.events.push(Event::Write(offset, bytes.to_vec()));
    }
}

/// A state after a power cut before event `end`: everything before the last flush is there, and any
/// pages of what was written later.
pub(crate) fn cut(before: &[u8], events: &[Event], end: usize, random: &mut Random) -> Vec<u8> {
    let mut data = before.to_vec();
    let flushed = events[..end].iter().rposition(|event| matches!(event, Event::Flush));
    for (n, event) in events[..end].iter().enumerate() {
        let Event::Write(offset, bytes) = event else { continue };
        let kept = flushed.is_some_and(|flush| n < flush);
        let fate = random.below(4);
        let mut at = *offset as usize;
        let mut left = &bytes[..];
        while !left.is_empty() {
            let piece = (PAGE - at % PAGE).min(left.len());
            if kept || fate == 0 || (fate == 1 && random.below(2) == 0) {
                data[at..at + piece].copy_from_slice(&left[..piece]);
            }
            (at, left) = (at + piece, &left[piece..]);
        }
    }
    data
}

impl Bdev for Recorder {
    fn name(&self) -> &str {
        "recorder"
    }

    fn product_name(&self) -> &'static str {
        "Recorder"
    }

    fn uuid(&self) -> Uuid {
        self.uuid
    }

    fn block_size(&self) -> u32 {
        BLOCK as u32
    }

    fn num_blocks(&self) -> u64 {
        self.lock().data.len() as u64 / BLOCK
    }

    fn features(&self) -> Features {
        let (flush, write_zeroes, any_alignment) = (true, true, true);
        Features { flush, write_zeroes, any_alignment, ..Features::default() }
    }

    fn stats(&self) -> &Stats {
        &self.stats
    }

    fn qos(&self) -> &Qos {
        &self.qos
    }

    fn open(self: Arc<Self>, depth: u16) -> Result<Box<dyn Channel>, Error> {
        Ok(Box::new(Late { device: self, queue: vec![], very_late: depth == GUEST_DEPTH }))
    }
}

/// A channel. What it does happens in `poll`, some time after the submission, in any order.
struct Late {
    device: Arc<Recorder>,
    /// The I/Os, each with the number of polls before it may be done.
    queue: Vec<(u64, Io)>,
    very_late: bool,
}

impl Channel for Late {
    unsafe fn submit(&mut self, io: Io) -> Submit {
        // Only I/O of guests is very late: the store waits for each of its own.
        let random = &mut self.device.lock().random;
        let polls = if self.very_late && random.below(6) == 0 { random.below(400) } else { 0 };
        self.queue.push((polls, io));
        Submit::Queued
    }

    fn wait(&self) -> Wait {
        Wait::Until(Instant::now())
    }

    fn poll(&mut self, done: &mut [Completion]) -> usize {
        let mut state = self.device.lock();
        let mut n = 0;
        self.queue.iter_mut().for_each(|(polls, _)| *polls = polls.saturating_sub(1));
        while n < done.len() && !self.queue.is_empty() && state.random.below(3) > 0 {
            let at = state.random.below(self.queue.len() as u64) as usize;
            if self.queue[at].0 > 0 {
                continue;
            }
            let (_, io) = self.queue.swap_remove(at);
            let (start, len) = (io.offset as usize, io.len as usize);
            // SAFETY: the I/O has not been reported.
            let segments: &[Segment] = unsafe { io.segments() };
            match io.op {
                Op::Read => {
                    // SAFETY: as above; the device's memory is its own.
                    assert!(unsafe {
                        memory::scatter(segments, 0, state.data[start..start + len].as_ptr(), len)
                    });
                }
                Op::Write => {
                    let mut bytes = vec![0; len];
                    let to = bytes.as_mut_ptr();
                    // SAFETY: as above; `bytes` is `len` bytes long.
                    assert!(unsafe { memory::gather(segments, 0, to, len, bdev::Stores::Cached) });
                    state.write(io.offset, &bytes);
                }
                Op::WriteZeroes => state.write(io.offset, &vec![0; len]),
                // It covers what has completed: what is in the queue comes later.
                Op::Flush => state.events.push(Event::Flush),
                Op::Unmap => panic!("it was not offered"),
            }
            done[n] = Completion { tag: Tag(io.tag.0), status: Status::Ok };
            n += 1;
        }
        n
    }
}

/// A state of the device, for the check of the store in it.
struct Image<'a>(&'a [u8]);

impl Device for Image<'_> {
    fn properties(&self) -> Properties {
        let size = self.0.len() as u64;
        Properties { size, block_size: BLOCK as u32, unmap: false, unmap_zeroes: false }
    }

    async fn read(&self, offset: u64, len: usize) -> Result<Vec<u8>, DeviceError> {
        let start = offset as usize;
        self.0.get(start..start + len).map(<[u8]>::to_vec).ok_or(DeviceError { errno: 5 })
    }

    async fn write(&self, _: u64, _: Vec<u8>) -> Result<(), DeviceError> {
        panic!("a check writes nothing")
    }

    async fn flush(&self) -> Result<(), DeviceError> {
        Ok(())
    }

    async fn write_zeroes(&self, _: u64, _: u64) -> Result<(), DeviceError> {
        panic!("a check writes nothing")
    }

    async fn unmap(&self, _: u64, _: u64) -> Result<(), DeviceError> {
        panic!("a check writes nothing")
    }
}

/// The contradictions in a store.
pub(crate) fn findings(data: &[u8]) -> Vec<String> {
    let image = Image(data);
    let mut found = std::pin::pin!(check(&image));
    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    let std::task::Poll::Ready(found) = found.as_mut().poll(&mut context) else {
        panic!("the device never waits")
    };
    let bad = found.unwrap().into_iter().filter(|finding| finding.severity > Severity::Note);
    bad.map(|finding| finding.to_string()).collect()
}
