//! The queues between a channel on a reactor and the threads that do its I/O.
//!
//! For bdevs whose I/O may block, or whose library takes locks. The reactor puts I/Os into a
//! [`Line`] and takes results out of it. It waits for no thread in either case.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};

use crossbeam_queue::ArrayQueue;
use rustix::event::{EventfdFlags, eventfd};

use crate::io::{Io, Status, Tag};
use crate::waker::Asleep;

/// The result of an I/O of a [`Line`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// It completed in full.
    Ok,
    /// It failed with this errno. 0: only a part of it was done.
    Failed(i32),
    /// The device does not support the operation.
    Unsupported,
}

impl Ended {
    /// Returns the status for the channel's owner, and the errno of a failure.
    #[must_use]
    pub fn status(self) -> (Status, Option<i32>) {
        match self {
            Self::Ok => (Status::Ok, None),
            Self::Failed(errno) => (Status::IoError, Some(errno)),
            Self::Unsupported => (Status::Unsupported, Some(libc::EOPNOTSUPP)),
        }
    }
}

/// The submission and completion queues between a channel and the threads that do its I/O.
pub struct Line {
    /// I/Os to do.
    jobs: ArrayQueue<Io>,
    /// The results.
    done: Results,
    /// Whether the channel's owner sleeps until `wake` is signalled.
    owner: Asleep,
    /// Signalled for a result when the owner sleeps. It is never read.
    wake: OwnedFd,
    /// Set when I/Os that no thread has started must be cancelled.
    abandoned: AtomicBool,
}

impl Line {
    /// Makes a line for a channel of this depth.
    ///
    /// # Errors
    /// The system has no eventfd left.
    pub fn new(depth: u16) -> io::Result<Arc<Self>> {
        let depth = usize::from(depth).max(1);
        Ok(Arc::new(Self {
            jobs: ArrayQueue::new(depth),
            done: Results::new(depth),
            owner: Asleep::new(true),
            wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            abandoned: AtomicBool::new(false),
        }))
    }

    /// Returns an fd for the channel's [`wake_fds`](crate::Channel::wake_fds).
    #[must_use]
    pub fn wake_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    /// For the channel: adds an I/O. The line has room for `depth` I/Os.
    #[inline]
    pub fn push(&self, io: Io) {
        let pushed = self.jobs.push(io);
        debug_assert!(pushed.is_ok(), "more I/Os are outstanding than the depth");
    }

    /// For the channel: takes an I/O that has ended.
    #[inline]
    pub fn pop(&self) -> Option<(Tag, Ended)> {
        self.owner_is_awake();
        self.done.take()
    }

    /// For the channel: records that its owner does not sleep and needs no signal.
    #[inline]
    pub fn owner_is_awake(&self) {
        self.owner.wakes();
    }

    /// Wakes the owner if it sleeps, for another reason than a result.
    pub fn wake_owner(&self) {
        if self.owner.must_be_woken() {
            // Fails only if the counter is full, after 2^64 signals.
            let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
        }
    }

    /// For the channel's [`wait`](crate::Channel::wait): returns whether the owner may sleep until
    /// [`wake_fd`](Self::wake_fd) is signalled. If not, a result has arrived.
    #[must_use]
    pub fn may_wait(&self) -> bool {
        self.owner.sleeps();
        self.done.is_empty()
    }

    /// For the channel: cancels the I/Os that no thread has started.
    pub fn abandon(&self) {
        // Relaxed suffices: the flag publishes no other data.
        self.abandoned.store(true, Ordering::Relaxed);
    }

    /// Returns the flag that is set if I/Os that no thread has started must be cancelled.
    #[must_use]
    pub fn abandoned(&self) -> &AtomicBool {
        &self.abandoned
    }

    /// Returns the number of I/Os that no thread has taken.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.jobs.len()
    }

    /// Takes the next I/O to do.
    #[must_use]
    pub fn take_job(&self) -> Option<Io> {
        self.jobs.pop()
    }

    /// Reports the result of an I/O that was taken.
    pub fn complete(&self, tag: Tag, ended: Ended) {
        self.done.put(tag, ended);
        self.wake_owner();
    }
}

/// Results by tag. With a queue, the reader could wait for a writer that the system has interrupted
/// between two steps; here no thread waits.
struct Results {
    /// Valid if the tag's bit in `ready` is set.
    results: Box<[AtomicI32]>,
    /// One bit for each tag.
    ready: Box<[AtomicU64]>,
}

/// The values that [`Results`] stores for [`Ended::Ok`] and [`Ended::Unsupported`]; errnos are not
/// negative.
const OK: i32 = -1;
const UNSUPPORTED: i32 = -2;

impl Results {
    fn new(depth: usize) -> Self {
        Self {
            results: (0..depth).map(|_| AtomicI32::new(OK)).collect(),
            ready: (0..depth.div_ceil(64)).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    /// Stores the result of an I/O that has no result there.
    fn put(&self, tag: Tag, ended: Ended) {
        let value = match ended {
            Ended::Ok => OK,
            Ended::Unsupported => UNSUPPORTED,
            Ended::Failed(errno) => errno.max(0),
        };
        let tag = usize::from(tag.0);
        self.results[tag].store(value, Ordering::Relaxed);
        // Release: a thread that sees the bit also sees the result, and the data of a read.
        let before = self.ready[tag / 64].fetch_or(1 << (tag % 64), Ordering::Release);
        debug_assert_eq!(before >> (tag % 64) & 1, 0, "an I/O has only one result");
    }

    fn is_empty(&self) -> bool {
        self.ready.iter().all(|ready| ready.load(Ordering::Relaxed) == 0)
    }

    /// Takes one of the available results.
    fn take(&self) -> Option<(Tag, Ended)> {
        for (n, ready) in self.ready.iter().enumerate() {
            let bits = ready.load(Ordering::Relaxed);
            if bits == 0 {
                continue;
            }
            let bit = bits.trailing_zeros() as usize;
            // Acquire: pairs with the Release in `put`.
            ready.fetch_and(!(1 << bit), Ordering::Acquire);
            let tag = n * 64 + bit;
            let ended = match self.results[tag].load(Ordering::Relaxed) {
                OK => Ended::Ok,
                UNSUPPORTED => Ended::Unsupported,
                errno => Ended::Failed(errno),
            };
            #[expect(
                clippy::cast_possible_truncation,
                reason = "an index into `results`, one for each tag"
            )]
            return Some((Tag(tag as u16), ended));
        }
        None
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn each_result_is_taken_once_with_its_tag() {
        let results = Results::new(130);
        let all = [(0, Ended::Ok), (63, Ended::Failed(5)), (64, Ended::Failed(0))];
        let all = all.into_iter().chain([(129, Ended::Unsupported)]);
        let all: Vec<_> = all.map(|(tag, ended)| (Tag(tag), ended)).collect();
        for _ in 0..2 {
            assert!(results.is_empty());
            assert_eq!(results.take(), None);
            all.iter().rev().for_each(|(tag, ended)| results.put(*tag, *ended));
            assert!(!results.is_empty());
            let out: Vec<_> = std::iter::from_fn(|| results.take()).collect();
            assert_eq!(out, all);
        }
    }

    #[test]
    fn no_result_is_lost_between_threads() {
        const ROUNDS: u32 = 20_000;
        let results = Results::new(4);
        // Each thread waits for its own tag to come back before it stores the next result.
        let free = [const { AtomicBool::new(true) }; 4];
        thread::scope(|scope| {
            for (tag, free) in (0..).zip(&free) {
                let results = &results;
                scope.spawn(move || {
                    for _ in 0..ROUNDS {
                        while !free.swap(false, Ordering::Acquire) {
                            thread::yield_now();
                        }
                        results.put(Tag(tag), Ended::Failed(tag.into()));
                    }
                });
            }
            let mut left = ROUNDS * 4;
            while left > 0 {
                let Some((tag, ended)) = results.take() else {
                    thread::yield_now();
                    continue;
                };
                assert_eq!(ended, Ended::Failed(tag.0.into()));
                free[usize::from(tag.0)].store(true, Ordering::Release);
                left -= 1;
            }
        });
        assert_eq!(results.take(), None);
    }

    #[test]
    fn only_an_owner_that_waits_is_signalled() {
        let line = Line::new(4).unwrap();
        let signals = || {
            let mut count = [0; 8];
            rustix::io::read(&line.wake, &mut count).map_or(0, |_| u64::from_ne_bytes(count))
        };
        line.complete(Tag(0), Ended::Ok);
        assert_eq!(signals(), 1, "before the first pop, the owner may wait");
        assert_eq!(line.pop(), Some((Tag(0), Ended::Ok)));
        line.complete(Tag(1), Ended::Ok);
        assert_eq!(signals(), 0);
        assert!(!line.may_wait(), "a result is there");
        assert_eq!(line.pop(), Some((Tag(1), Ended::Ok)));
        assert_eq!(line.pop(), None);
        assert!(line.may_wait());
        line.complete(Tag(2), Ended::Ok);
        assert_eq!(signals(), 1);
    }
}
