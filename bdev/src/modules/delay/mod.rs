//! A wrapper that makes a disk slow: it delays completions by a set time.
#![expect(unsafe_code, reason = "passes I/Os on under the contract's conditions")]

pub(crate) mod module;

use std::cmp::{self, Reverse};
use std::collections::BinaryHeap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use uuid::{Uuid, uuid};

use crate::bdev_channel::BdevChannel;
use crate::contract::{Bdev, Channel, Wait};
use crate::error::Error;
use crate::io::{Completion, Io, Op, Submit};
use crate::wrapper::{Wrapped, Wrapper, derived_uuid, forward_to_base};

/// SPDK's namespace of the UUIDs of delay bdevs.
const NAMESPACE: Uuid = uuid!("4009b574-6430-4f1b-bc40-ace811091027");

/// One of this many reads and writes on a channel has the p99 latency.
const P99_INTERVAL: u32 = 100;

/// The limit of a latency: one year, which can be added to a time without overflow.
const LATENCY_MAX_US: u64 = 365 * 24 * 3600 * 1_000_000;

/// Four latencies, in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Latency {
    /// The latency of most reads.
    pub avg_read_us: u64,
    /// The latency of one read in 100.
    pub p99_read_us: u64,
    /// The latency of most writes.
    pub avg_write_us: u64,
    /// The latency of one write in 100.
    pub p99_write_us: u64,
}

impl Latency {
    /// Checks that no p99 latency is below its average. `name` is the bdev's name.
    fn check(self, name: &str) -> Result<(), Error> {
        let Self { avg_read_us, p99_read_us, avg_write_us, p99_write_us } = self;
        for (avg, p99, what) in
            [(avg_read_us, p99_read_us, "read"), (avg_write_us, p99_write_us, "write")]
        {
            if p99 < avg {
                return Err(Error::Invalid(format!(
                    "{name}: p99 {what} latency {p99} us is below the average, {avg} us"
                )));
            }
        }
        Ok(())
    }
}

/// Identifies one of the four latencies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LatencyKind {
    /// The latency of most reads.
    AvgRead,
    /// The latency of one read in 100.
    P99Read,
    /// The latency of most writes.
    AvgWrite,
    /// The latency of one write in 100.
    P99Write,
}

/// A disk whose reads and writes complete a set time after those of its base.
///
/// The base does the I/O at once and the completion is delayed, as in SPDK; flush, unmap and
/// write-zeroes are not delayed. A new latency applies to later completions.
pub struct Delay {
    wrapped: Wrapped,
    latencies_us: [AtomicU64; 4],
}

/// The options of [`Delay::create`].
#[derive(Clone)]
pub struct DelayOptions {
    /// The name of the device; not empty.
    pub name: String,
    /// The base disk.
    pub base: Arc<dyn Bdev>,
    /// The latencies; each p99 is at least the average.
    pub latency: Latency,
    /// The UUID; random if absent.
    pub uuid: Option<Uuid>,
}

impl Delay {
    /// Wraps a disk.
    ///
    /// # Errors
    /// [`Error::Invalid`] if a p99 latency is below its average, or the name is empty.
    pub fn create(options: DelayOptions) -> Result<Arc<Self>, Error> {
        let DelayOptions { name, base, latency, uuid } = options;
        let uuid = uuid.unwrap_or_else(|| derived_uuid(NAMESPACE, &*base, &[]));
        let wrapped = Wrapped::new(name, base, Some(uuid))?;
        let Latency { avg_read_us, p99_read_us, avg_write_us, p99_write_us } = latency;
        latency.check(wrapped.name())?;
        let latencies_us = [avg_read_us, p99_read_us, avg_write_us, p99_write_us];
        Ok(Arc::new(Self { wrapped, latencies_us: latencies_us.map(AtomicU64::new) }))
    }

    /// Changes one latency, while in use. As in SPDK, the p99 may fall below the average here,
    /// since raising both takes two calls.
    pub fn update_latency(&self, kind: LatencyKind, latency_us: u64) {
        // Relaxed suffices: no other data is published with the number.
        self.latencies_us[kind as usize].store(latency_us, Ordering::Relaxed);
    }

    /// The latencies as they are now.
    #[must_use]
    pub fn latency(&self) -> Latency {
        let us = |kind: LatencyKind| self.latencies_us[kind as usize].load(Ordering::Relaxed);
        Latency {
            avg_read_us: us(LatencyKind::AvgRead),
            p99_read_us: us(LatencyKind::P99Read),
            avg_write_us: us(LatencyKind::AvgWrite),
            p99_write_us: us(LatencyKind::P99Write),
        }
    }

    /// The base disk.
    #[must_use]
    pub fn base(&self) -> &Arc<dyn Bdev> {
        self.wrapped.base()
    }

    fn delay(&self, kind: LatencyKind) -> Option<Duration> {
        let us = self.latencies_us[kind as usize].load(Ordering::Relaxed);
        (us > 0).then(|| Duration::from_micros(us.min(LATENCY_MAX_US)))
    }
}

impl Wrapper for Delay {
    fn wrapped(&self) -> &Wrapped {
        &self.wrapped
    }

    fn product(&self) -> &'static str {
        "delay"
    }

    fn open_channel(self: Arc<Self>, depth: u16) -> Result<Box<dyn Channel>, Error> {
        let base = BdevChannel::open(self.base(), depth)?;
        Ok(Box::new(DelayChannel {
            base,
            kinds: vec![None; depth.into()].into_boxed_slice(),
            held: BinaryHeap::with_capacity(depth.into()),
            with_base: 0,
            count: [0; 2],
            disk: self,
        }))
    }
}

struct DelayChannel {
    base: BdevChannel,
    disk: Arc<Delay>,
    /// The kind of latency of each outstanding I/O, by tag.
    kinds: Box<[Option<LatencyKind>]>,
    /// Completions of the base that are delayed, the first one due on top.
    held: BinaryHeap<Reverse<Held>>,
    /// I/Os outstanding at the base.
    with_base: u64,
    /// The number of reads and writes so far, modulo [`P99_INTERVAL`].
    count: [u32; 2],
}

struct Held {
    due: Instant,
    completion: Completion,
}

impl Ord for Held {
    fn cmp(&self, other: &Self) -> cmp::Ordering {
        let key = |held: &Self| (held.due, held.completion.tag);
        key(self).cmp(&key(other))
    }
}

impl PartialOrd for Held {
    fn partial_cmp(&self, other: &Self) -> Option<cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Held {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Held {}

impl DelayChannel {
    // Lets the compiler inline it into callers in other codegen units, as with `hold`.
    #[inline]
    fn kind(&mut self, op: Op) -> Option<LatencyKind> {
        let (count, avg, p99) = match op {
            Op::Read => (&mut self.count[0], LatencyKind::AvgRead, LatencyKind::P99Read),
            Op::Write => (&mut self.count[1], LatencyKind::AvgWrite, LatencyKind::P99Write),
            Op::Flush | Op::Unmap | Op::WriteZeroes => return None,
        };
        *count = (*count + 1) % P99_INTERVAL;
        Some(if *count == 0 { p99 } else { avg })
    }

    /// Delays a completion. Returns false if it has no latency.
    #[inline]
    fn hold(&mut self, completion: Completion, kind: Option<LatencyKind>) -> bool {
        let Some(delay) = kind.and_then(|kind| self.disk.delay(kind)) else { return false };
        self.held.push(Reverse(Held { due: Instant::now() + delay, completion }));
        true
    }
}

impl Channel for DelayChannel {
    unsafe fn submit(&mut self, io: Io) -> Submit {
        let (op, tag) = (io.op, io.tag);
        // SAFETY: the caller's promise covers the base, which completes no later than this channel.
        match unsafe { self.base.submit(io) } {
            Submit::Done(status) => {
                let kind = self.kind(op);
                if self.hold(Completion { tag, status }, kind) {
                    Submit::Queued
                } else {
                    Submit::Done(status)
                }
            }
            Submit::Queued => {
                let kind = self.kind(op);
                if let Some(slot) = self.kinds.get_mut(usize::from(tag.0)) {
                    *slot = kind;
                }
                self.with_base += 1;
                Submit::Queued
            }
            refused @ (Submit::Full(_) | Submit::Throttled(_)) => refused,
        }
    }

    fn wait(&self) -> Wait {
        let held = self.held.peek().map_or(Wait::Event, |top| Wait::Until(top.0.due));
        if self.with_base > 0 { held.sooner(self.base.wait()) } else { held }
    }

    fn poll(&mut self, done: &mut [Completion]) -> usize {
        let mut n = 0;
        if !self.held.is_empty() {
            let now = Instant::now();
            while n < done.len()
                && let Some(top) = self.held.peek()
                && top.0.due <= now
                && let Some(Reverse(held)) = self.held.pop()
            {
                done[n] = held.completion;
                n += 1;
            }
        }
        let first = n;
        let from_base = self.base.poll(&mut done[first..]);
        self.with_base -= from_base as u64;
        for i in first..first + from_base {
            let completion = done[i];
            let kind = self.kinds.get_mut(usize::from(completion.tag.0)).and_then(Option::take);
            if !self.hold(completion, kind) {
                done[n] = completion;
                n += 1;
            }
        }
        n
    }

    forward_to_base!(wake_fds, set_wakes, set_limiting, failure, kick, abandon);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::{Status, Tag};
    use crate::modules::null::{Null, NullOptions};

    fn delay(latency: Latency) -> Result<Arc<Delay>, Error> {
        let null = NullOptions { name: "n".into(), num_blocks: 8, block_size: 512, uuid: None };
        let base = Null::create(null)?;
        Delay::create(DelayOptions { name: "d".into(), base, latency, uuid: None })
    }

    /// Submits `n` empty I/Os of this kind. Returns the number that were delayed.
    fn held(channel: &mut dyn Channel, op: Op, n: u16) -> usize {
        (0..n)
            .filter(|&i| {
                let io = match op {
                    Op::Read | Op::Write => Io::rw(op, Tag(i), 0, 0, &[]),
                    _ => Io::plain(op, Tag(i), 0, 512),
                };
                // SAFETY: the I/O has no segments.
                matches!(unsafe { channel.submit(io) }, Submit::Queued)
            })
            .count()
    }

    #[test]
    fn a_p99_below_the_average_is_refused_at_creation_only() {
        let latency = Latency { avg_read_us: 2, p99_read_us: 1, ..Latency::default() };
        assert_eq!(delay(latency).map(|_| ()).unwrap_err().errno(), libc::EINVAL);
        let latency = Latency { avg_write_us: 2, p99_write_us: 1, ..Latency::default() };
        assert_eq!(delay(latency).map(|_| ()).unwrap_err().errno(), libc::EINVAL);
        let disk = delay(Latency::default()).unwrap();
        disk.update_latency(LatencyKind::AvgRead, 9);
        assert_eq!(disk.latency(), Latency { avg_read_us: 9, ..Latency::default() });
    }

    #[test]
    fn one_in_a_hundred_is_slow_and_only_reads_and_writes_are() {
        let slow = LATENCY_MAX_US;
        let latency = Latency { p99_read_us: slow, p99_write_us: slow, ..Latency::default() };
        let mut channel = delay(latency).unwrap().open(1000).unwrap();
        assert_eq!(held(&mut *channel, Op::Read, 300), 3);
        assert_eq!(held(&mut *channel, Op::Write, 500), 5);
        assert_eq!(held(&mut *channel, Op::WriteZeroes, 200), 0);
    }

    #[test]
    fn a_completion_comes_when_it_is_due_and_not_before() {
        let forever = LATENCY_MAX_US;
        let latency = Latency { avg_read_us: forever, p99_read_us: forever, ..Latency::default() };
        let disk = delay(latency).unwrap();
        let mut channel = Arc::clone(&disk).open(8).unwrap();
        assert_eq!(held(&mut *channel, Op::Read, 2), 2);
        disk.update_latency(LatencyKind::AvgRead, 10_000);
        let start = Instant::now();
        let io = Io::rw(Op::Read, Tag(7), 0, 0, &[]);
        // SAFETY: the I/O has no segments.
        assert!(matches!(unsafe { channel.submit(io) }, Submit::Queued));
        let mut done = [Completion { tag: Tag(0), status: Status::IoError }];
        while channel.poll(&mut done) == 0 {
            std::thread::yield_now();
        }
        assert_eq!(done[0], Completion { tag: Tag(7), status: Status::Ok });
        assert!(start.elapsed() >= Duration::from_millis(10));
        assert_eq!(channel.poll(&mut done), 0);
    }
}
