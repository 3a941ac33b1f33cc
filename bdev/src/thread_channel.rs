//! The I/O path to a bdev for a thread that may block, with buffers of its own.
//!
//! Control-side users of bdevs (an NBD export, a module that reads metadata) have no guest memory
//! and no poll loop. [`ThreadChannel`] owns the buffers of its I/Os, holds the leases of the
//! storage while it is open, and sleeps on the channel's wake fds.
#![expect(unsafe_code, reason = "submits I/Os to `Channel::submit`")]

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::bdev_channel::BdevChannel;
use crate::contract::{Bdev, Channel, Granted, Lease, Wait, with_bases};
use crate::error::Error;
use crate::io::{Completion, Io, Op, Segment, Status, Submit, Tag};
use crate::wake_set::WakeSet;

/// The alignment of [`Buffer`]s: direct I/O of every known device accepts it.
const ALIGNMENT: usize = 4096;

/// Time in which the leases of a bdev's storage must be granted.
const LEASE_LIMIT: Duration = Duration::from_secs(10);

/// The interval of polls while the channel refuses an I/O or has no event to wait for.
const PAUSE: Duration = Duration::from_millis(1);

/// Bytes of one I/O, zeroed at first, at an address that direct I/O accepts.
#[derive(Debug, Default)]
pub struct Buffer {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl Buffer {
    /// Makes a buffer of `len` bytes.
    #[must_use]
    pub fn new(len: usize) -> Self {
        if len == 0 {
            return Self::default();
        }
        let bytes = vec![0; len + ALIGNMENT];
        let start = bytes.as_ptr().align_offset(ALIGNMENT).min(ALIGNMENT);
        Self { bytes, start, len }
    }

    /// The bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[self.start..self.start + self.len]
    }

    /// The bytes.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.len]
    }
}

/// An I/O with its buffer.
#[derive(Debug)]
pub struct Request {
    /// The operation.
    pub op: Op,
    /// Byte offset on the bdev, a multiple of its block size.
    pub offset: u64,
    /// The number of bytes, a multiple of the block size; 0 for a flush.
    pub len: u64,
    /// As [`Io::may_unmap`].
    pub may_unmap: bool,
    /// The data of a read or write. Empty for other operations.
    pub buffer: Buffer,
}

impl Request {
    /// Makes a read of `len` bytes.
    #[must_use]
    pub fn read(offset: u64, len: usize) -> Self {
        let buffer = Buffer::new(len);
        Self { op: Op::Read, offset, len: len as u64, may_unmap: false, buffer }
    }

    /// Makes a write of a buffer.
    #[must_use]
    pub fn write(offset: u64, buffer: Buffer) -> Self {
        let len = buffer.len as u64;
        Self { op: Op::Write, offset, len, may_unmap: false, buffer }
    }

    /// Makes an operation without data.
    #[must_use]
    pub fn plain(op: Op, offset: u64, len: u64) -> Self {
        Self { op, offset, len, may_unmap: false, buffer: Buffer::default() }
    }
}

/// An I/O that has ended.
#[derive(Debug)]
pub struct EndedRequest {
    /// What [`ThreadChannel::start`] returned for it.
    pub tag: Tag,
    /// The I/O.
    pub request: Request,
    /// The positive errno with which it failed.
    pub result: Result<(), i32>,
}

/// A request in a slot. It does not move while the channel uses its buffer and segment.
struct Pending {
    request: Request,
    segment: [Segment; 1],
}

impl Pending {
    fn io(&self, tag: Tag) -> Io {
        let Request { op, offset, len, may_unmap, .. } = self.request;
        match op {
            Op::Read | Op::Write => Io::rw(op, tag, offset, len, &self.segment),
            _ => Io::plain(op, tag, offset, len).unmapping(may_unmap),
        }
    }
}

/// The way in which a [`ThreadChannel`] uses its bdev.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rights {
    /// It only reads.
    Read,
    /// It also changes data, and holds the leases of the storage.
    Write,
}

/// An I/O path to a bdev for a thread that may block. Rate limits do not apply.
///
/// Dropping it waits until its outstanding I/O has ended.
pub struct ThreadChannel {
    /// Dropped before `slots`, whose memory it may use.
    channel: BdevChannel,
    slots: Box<[Option<Box<Pending>>]>,
    /// The tags that no I/O has which was started and not returned.
    free: Vec<u16>,
    /// The number of I/Os in `slots`.
    outstanding: usize,
    /// Requests that the channel refused, in the order of their start.
    refused: VecDeque<Tag>,
    /// I/Os that have ended.
    ended: VecDeque<EndedRequest>,
    /// Reports the channel's wake fds.
    wakes: WakeSet,
    /// Released after the channel was closed.
    _leases: Leases,
}

impl ThreadChannel {
    /// Opens a bdev for at most `depth` I/Os at a time. Blocks.
    ///
    /// # Errors
    /// As [`Bdev::open`]; [`Error::Busy`] if another process holds the lease of the storage.
    pub fn open(bdev: &Arc<dyn Bdev>, depth: u16, rights: Rights) -> Result<Self, Error> {
        let leases = match rights {
            Rights::Read => Leases::default(),
            Rights::Write => Leases::take(bdev)?,
        };
        let channel = BdevChannel::open(bdev, depth)?;
        let system = |source| Error::System { what: bdev.name().to_owned(), source };
        let wakes = WakeSet::new().map_err(system)?;
        wakes.add(channel.wake_fds()).map_err(system)?;
        Ok(Self {
            channel,
            slots: (0..depth).map(|_| None).collect(),
            free: (0..depth).rev().collect(),
            outstanding: 0,
            refused: VecDeque::new(),
            ended: VecDeque::new(),
            wakes,
            _leases: leases,
        })
    }

    /// Returns whether `depth` I/Os were started that [`ThreadChannel::poll`] has not returned.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.free.is_empty()
    }

    /// Starts an I/O. [`ThreadChannel::poll`] returns it when it has ended.
    ///
    /// # Panics
    /// The channel is full, or the buffer of a read or write is not `len` bytes long.
    pub fn start(&mut self, mut request: Request) -> Tag {
        let is_rw = matches!(request.op, Op::Read | Op::Write);
        let expected = if is_rw { request.len } else { 0 };
        assert_eq!(request.buffer.len as u64, expected, "a request of another length");
        let tag = Tag(self.free.pop().expect("the caller has checked `is_full`"));
        let bytes = request.buffer.bytes_mut();
        let segment = [Segment::new(bytes.as_mut_ptr(), bytes.len())];
        self.slots[usize::from(tag.0)] = Some(Box::new(Pending { request, segment }));
        self.outstanding += 1;
        if !self.refused.is_empty() || !self.submit(tag) {
            self.refused.push_back(tag);
        }
        tag
    }

    /// Submits the I/O of a slot. Returns whether the channel has accepted it.
    fn submit(&mut self, tag: Tag) -> bool {
        let Some(pending) = &self.slots[usize::from(tag.0)] else { return true };
        // SAFETY: the slot keeps the buffer and the segment, unmoved on the heap, until the I/O has
        // ended; `drop` waits for that.
        match unsafe { self.channel.submit(pending.io(tag)) } {
            Submit::Queued => true,
            Submit::Done(status) => {
                self.finish(tag, status);
                true
            }
            Submit::Full(_) | Submit::Throttled(_) => false,
        }
    }

    fn finish(&mut self, tag: Tag, status: Status) {
        let Some(pending) = self.slots.get_mut(usize::from(tag.0)).and_then(Option::take) else {
            return;
        };
        self.outstanding -= 1;
        let reason = self.channel.failure(tag).map(|failure| failure.errno);
        let result = match status {
            Status::Ok => Ok(()),
            // 0 stands for a partial transfer.
            Status::IoError => Err(reason.filter(|errno| *errno > 0).unwrap_or(libc::EIO)),
            Status::Unsupported => Err(libc::EOPNOTSUPP),
        };
        self.ended.push_back(EndedRequest { tag, request: pending.request, result });
    }

    /// Returns an I/O that has ended. Does not wait.
    pub fn poll(&mut self) -> Option<EndedRequest> {
        if self.ended.is_empty() && self.outstanding > 0 {
            self.visit();
        }
        let ended = self.ended.pop_front()?;
        self.free.push(ended.tag.0);
        Some(ended)
    }

    fn visit(&mut self) {
        while let Some(&tag) = self.refused.front()
            && self.submit(tag)
        {
            self.refused.pop_front();
        }
        self.channel.kick();
        let mut done = [Completion { tag: Tag(0), status: Status::Ok }; 32];
        let n = self.channel.poll(&mut done);
        for Completion { tag, status } in &done[..n] {
            self.finish(*tag, *status);
        }
    }

    /// Sleeps until [`ThreadChannel::poll`] may return an I/O, or one of `others` is ready. Returns
    /// early for no reason at times. Called after a `poll` that returned nothing.
    ///
    /// # Errors
    /// As `poll(2)`.
    pub fn sleep<'a>(&'a self, others: &mut [PollFd<'a>]) -> io::Result<()> {
        self.sleep_until(others, None)
    }

    /// As [`ThreadChannel::sleep`], until `deadline` at the latest.
    ///
    /// # Errors
    /// As `poll(2)`.
    pub fn sleep_until<'a>(
        &'a self,
        others: &mut [PollFd<'a>],
        deadline: Option<Instant>,
    ) -> io::Result<()> {
        let until = if self.outstanding == 0 {
            None
        } else if self.refused.is_empty() {
            match self.channel.wait() {
                Wait::Event => None,
                Wait::Until(time) => Some(time.saturating_duration_since(Instant::now())),
                Wait::Poll => Some(PAUSE),
            }
        } else {
            Some(PAUSE)
        };
        let left = deadline.map(|time| time.saturating_duration_since(Instant::now()));
        let until = until.into_iter().chain(left).min();
        let wakes = self.wakes.fd();
        let mut fds = vec![PollFd::from_borrowed_fd(wakes, PollFlags::IN)];
        fds.extend(others.iter().cloned());
        let until = until.map(|time| Timespec {
            tv_sec: i64::try_from(time.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: time.subsec_nanos().into(),
        });
        match poll(&mut fds, until.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
        // An event that arrives from now on makes the next call return.
        self.wakes.clear();
        others.clone_from_slice(&fds[1..]);
        Ok(())
    }

    /// Does one I/O from start to end. No other I/O may be outstanding.
    ///
    /// # Errors
    /// The positive errno with which it failed.
    pub fn run(&mut self, request: Request) -> Result<Buffer, i32> {
        debug_assert_eq!(self.free.len(), self.slots.len());
        self.start(request);
        loop {
            if let Some(ended) = self.poll() {
                return ended.result.map(|()| ended.request.buffer);
            }
            self.sleep(&mut []).map_err(|e| e.raw_os_error().unwrap_or(libc::EIO))?;
        }
    }

    /// As [`Channel::abandon`].
    pub fn abandon(&mut self) {
        self.channel.abandon();
        // The channel starts no further I/O.
        while let Some(tag) = self.refused.pop_front() {
            self.finish(tag, Status::IoError);
        }
    }
}

impl Drop for ThreadChannel {
    fn drop(&mut self) {
        if self.outstanding > 0 {
            self.abandon();
        }
        loop {
            self.visit();
            self.ended.clear();
            if self.outstanding == 0 {
                break;
            }
            // An error makes this loop poll, but never end early.
            let _ = self.sleep(&mut []);
        }
    }
}

/// The leases of a bdev's storage, released when dropped.
#[derive(Default)]
struct Leases(Vec<Arc<dyn Lease>>);

impl Leases {
    /// Takes the leases of all storage below `bdev`, and waits until they are held.
    fn take(bdev: &Arc<dyn Bdev>) -> Result<Self, Error> {
        let mut taken = Self::default();
        let waiter = thread::current();
        let granted: Granted = Arc::new(move || waiter.unpark());
        for device in with_bases(bdev).iter().filter(|bdev| bdev.bases().is_empty()) {
            taken.0.extend(device.lease().inspect(|lease| {
                lease.add_user(&granted);
            }));
        }
        let began = Instant::now();
        while !taken.0.iter().all(|lease| lease.is_held()) {
            let left = LEASE_LIMIT.saturating_sub(began.elapsed());
            if left.is_zero() {
                let name = bdev.name();
                return Err(Error::Busy(format!("{name}: another process uses its storage")));
            }
            thread::park_timeout(left);
        }
        Ok(taken)
    }
}

impl Drop for Leases {
    fn drop(&mut self) {
        self.0.iter().for_each(|lease| lease.remove_user());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::modules::delay::{Delay, DelayOptions, Latency};
    use crate::modules::file::{FileDisk, FileOptions, Flavour};
    use crate::modules::malloc::{Malloc, MallocOptions};

    const SIZE: usize = 1 << 20;

    fn malloc() -> Arc<dyn Bdev> {
        let num_blocks = SIZE as u64 / 512;
        let options = MallocOptions { name: "m".into(), num_blocks, block_size: 512, uuid: None };
        Malloc::create(options).unwrap()
    }

    fn delayed() -> Arc<dyn Bdev> {
        let latency =
            Latency { avg_read_us: 100, p99_read_us: 100, avg_write_us: 100, p99_write_us: 100 };
        let options = DelayOptions { name: "d".into(), base: malloc(), latency, uuid: None };
        Delay::create(options).unwrap()
    }

    fn file(path: &std::path::Path) -> Arc<dyn Bdev> {
        let options = FileOptions {
            name: "f".into(),
            filename: path.into(),
            block_size: Some(512),
            readonly: false,
            fallocate: false,
            uuid: None,
            flavour: Flavour::Uring,
            engine: None,
        };
        FileDisk::create(options).unwrap()
    }

    /// Writes blocks at full depth, then reads them back.
    fn check(bdev: &Arc<dyn Bdev>) {
        let mut channel = ThreadChannel::open(bdev, 4, Rights::Write).unwrap();
        let (mut next, mut ended) = (0_u8, 0);
        while ended < 64 {
            while next < 64 && !channel.is_full() {
                let mut buffer = Buffer::new(4096);
                buffer.bytes_mut().fill(next + 1);
                channel.start(Request::write(u64::from(next) * 4096, buffer));
                next += 1;
            }
            match channel.poll() {
                Some(done) => {
                    assert_eq!(done.result, Ok(()));
                    ended += 1;
                }
                None => channel.sleep(&mut []).unwrap(),
            }
        }
        assert_eq!(channel.outstanding, 0);
        for block in 0..64_u8 {
            let read = channel.run(Request::read(u64::from(block) * 4096, 4096)).unwrap();
            assert!(read.bytes().iter().all(|byte| *byte == block + 1));
        }
        let past = channel.run(Request::read(SIZE as u64, 512));
        assert!(past.is_err(), "{past:?}");
    }

    #[test]
    fn blocks_are_written_and_read_back_whatever_the_channel_waits_for() {
        check(&malloc());
        check(&delayed());
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(SIZE as u64).unwrap();
        check(&file(image.path()));
    }

    #[test]
    fn dropping_it_waits_for_io_under_way() {
        let bdev = delayed();
        let mut channel = ThreadChannel::open(&bdev, 2, Rights::Write).unwrap();
        channel.start(Request::read(0, 4096));
        channel.start(Request::read(4096, 4096));
        drop(channel);
        assert_eq!(Arc::strong_count(&bdev), 1, "the channel is closed");
    }

    #[test]
    fn a_writer_holds_the_lease_of_the_file() {
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(SIZE as u64).unwrap();
        let disk = file(image.path());
        let lease = disk.lease().unwrap();
        let reader = ThreadChannel::open(&disk, 1, Rights::Read).unwrap();
        assert!(!lease.is_held());
        let writer = ThreadChannel::open(&disk, 1, Rights::Write).unwrap();
        assert!(lease.is_held());
        drop((reader, writer));
        // Its thread releases it.
        while lease.is_held() {
            thread::yield_now();
        }
    }
}
