//! A disk whose I/O completes when and how the script says, and which checks the I/Os that it gets.
//!
//! Simulated faults: I/O that does not complete, fails, or is unsupported, and a full channel.
#![expect(unsafe_code, reason = "reads and writes a guest's memory")]

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bdev::{
    Bdev, Channel, Completion, Features, Io, Op, Qos, Segment, Stats, Status, Submit, Tag, Wait,
};

/// Its size in sectors.
pub const SECTORS: u64 = 1024;

/// Memory ranges that an I/O may refer to: address and length.
pub type Span = (usize, usize);

/// Its configuration, and what it has recorded.
#[derive(Debug, Default)]
pub struct State {
    /// I/O completes in `submit`.
    pub at_once: bool,
    /// How many more I/Os the channels accept; `None`: no limit.
    pub room: Option<usize>,
    /// The number of I/Os until one fails; 0 for never.
    pub failing_in: usize,
    /// The status of that one.
    pub failure: Option<Status>,
    /// Where segments may be; anywhere if it is empty.
    pub memory: Vec<Span>,
    /// Channels that are open.
    pub open: usize,
    pending: Vec<Pending>,
    done: Vec<(usize, Completion)>,
    opened: usize,
}

#[derive(Debug)]
struct Pending {
    channel: usize,
    io: Io,
    status: Status,
}

/// The disk.
#[derive(Debug)]
pub struct ModelDisk {
    state: Arc<Mutex<State>>,
    block_size: u32,
    features: Features,
    stats: Stats,
    qos: Qos,
}

struct ModelChannel {
    state: Arc<Mutex<State>>,
    number: usize,
    depth: u16,
    block_size: u32,
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl State {
    /// I/Os in progress.
    #[must_use]
    pub fn pending(&self) -> usize {
        self.pending.len()
    }

    /// Completes one of the I/Os in progress.
    pub fn complete(&mut self, nth: usize) {
        if self.pending.is_empty() {
            return;
        }
        let Pending { channel, io, status } = self.pending.remove(nth % self.pending.len());
        // SAFETY: it was queued and has not completed.
        unsafe { transfer(&io) };
        self.done.push((channel, Completion { tag: io.tag, status }));
    }

    /// Completes all, and from now on each I/O at once.
    pub fn settle(&mut self) {
        (self.at_once, self.room, self.failing_in) = (true, None, 0);
        while !self.pending.is_empty() {
            self.complete(0);
        }
    }
}

impl ModelDisk {
    /// A disk with all features.
    #[must_use]
    pub fn new(block_size: u32) -> Arc<Self> {
        let features =
            Features { flush: true, unmap: true, write_zeroes: true, ..Features::default() };
        Arc::new(Self {
            state: Arc::default(),
            block_size,
            features,
            stats: Stats::default(),
            qos: Qos::default(),
        })
    }

    /// Its state.
    pub fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

impl Bdev for ModelDisk {
    fn name(&self) -> &str {
        "Model"
    }
    fn product_name(&self) -> &'static str {
        "Model disk"
    }
    fn uuid(&self) -> uuid::Uuid {
        uuid::Uuid::nil()
    }
    fn block_size(&self) -> u32 {
        self.block_size
    }
    fn num_blocks(&self) -> u64 {
        SECTORS * 512 / u64::from(self.block_size)
    }
    fn features(&self) -> Features {
        self.features
    }
    fn stats(&self) -> &Stats {
        &self.stats
    }

    fn qos(&self) -> &Qos {
        &self.qos
    }
    fn open(self: Arc<Self>, depth: u16) -> Result<Box<dyn Channel>, bdev::Error> {
        let mut state = self.state();
        state.open += 1;
        state.opened += 1;
        let (number, block_size) = (state.opened, self.block_size);
        drop(state);
        Ok(Box::new(ModelChannel { state: Arc::clone(&self.state), number, depth, block_size }))
    }
}

impl Channel for ModelChannel {
    unsafe fn submit(&mut self, io: Io) -> Submit {
        let mut state = lock(&self.state);
        // SAFETY: the caller keeps the segments until completion.
        self.check(&io, unsafe { io.segments() }, &state);
        match &mut state.room {
            Some(0) => return Submit::Full(io),
            Some(room) => *room -= 1,
            None => {}
        }
        let mut status = Status::Ok;
        if state.failing_in > 0 {
            state.failing_in -= 1;
            if state.failing_in == 0 {
                status = state.failure.unwrap_or(Status::IoError);
            }
        }
        if state.at_once {
            // SAFETY: the caller keeps its memory until this returns.
            unsafe { transfer(&io) };
            return Submit::Done(status);
        }
        state.pending.push(Pending { channel: self.number, io, status });
        Submit::Queued
    }

    /// Nothing to wait for: the script wakes the reactors.
    fn wait(&self) -> Wait {
        Wait::Event
    }

    fn poll(&mut self, done: &mut [Completion]) -> usize {
        let mut state = lock(&self.state);
        let mut n = 0;
        state.done.retain(|(channel, completion)| {
            if *channel != self.number || n == done.len() {
                return true;
            }
            done[n] = *completion;
            n += 1;
            false
        });
        n
    }
}

impl Drop for ModelChannel {
    fn drop(&mut self) {
        let mut state = lock(&self.state);
        state.open -= 1;
        let mine = |pending: &Pending| pending.channel == self.number;
        assert!(!state.pending.iter().any(mine), "a channel is dropped with I/O outstanding");
    }
}

impl ModelChannel {
    /// Checks the contract of [`Channel`] about an I/O.
    fn check(&self, io: &Io, segments: &[Segment], state: &State) {
        assert!(io.tag.0 < self.depth, "tag {} of {}", io.tag.0, self.depth);
        let same = |p: &Pending| p.channel == self.number && p.io.tag == io.tag;
        assert!(!state.pending.iter().any(same), "tag {} twice", io.tag.0);
        let block = u64::from(self.block_size);
        assert!(io.offset.is_multiple_of(block) && io.len.is_multiple_of(block), "{io:?}");
        assert!(io.offset.checked_add(io.len).is_some_and(|end| end <= SECTORS * 512), "{io:?}");
        let sum: u64 = segments.iter().map(|segment| segment.len() as u64).sum();
        let wanted = if matches!(io.op, Op::Read | Op::Write) { io.len } else { 0 };
        assert_eq!(sum, wanted, "{io:?}");
        for segment in segments {
            let (at, len) = (segment.base() as usize, segment.len());
            let inside =
                |&(start, size): &Span| at >= start && len <= size && at - start <= size - len;
            let known = state.memory.is_empty() || state.memory.iter().any(inside);
            assert!(known, "a segment outside of the guest's memory: {segment:?}");
        }
    }
}

/// Accesses the memory of an I/O: a read fills it, a write only reads it.
///
/// # Safety
/// The I/O was submitted and has not completed.
unsafe fn transfer(io: &Io) {
    let Tag(tag) = io.tag;
    // SAFETY: the caller says so.
    for segment in unsafe { io.segments() } {
        match io.op {
            // SAFETY: guest memory that is mapped until the I/O completes.
            Op::Read => unsafe {
                std::ptr::write_bytes(segment.base(), tag as u8 | 0x40, segment.len())
            },
            Op::Write => {
                for at in (0..segment.len()).step_by(512).chain(segment.len().checked_sub(1)) {
                    // SAFETY: as above.
                    let _ = unsafe { segment.base().wrapping_add(at).read_volatile() };
                }
            }
            _ => {}
        }
    }
}
