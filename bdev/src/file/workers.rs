//! The threads of one file disk that do what may wait: they are the disk's own, so that a file that
//! hangs holds up no other disk.
//!
//! Each channel has a [`Line`]: the reactor puts I/Os in and takes results out, without a lock. The
//! workers share a lock among themselves and with the control side. While I/Os are under way, one
//! more worker waits for the next, as long as there are fewer than [`WORKERS_MAX`].

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Instant;

use crossbeam_queue::ArrayQueue;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use super::backing::Alignment;
use super::blocking::{Bounce, Ended, Slow};
use crate::io::{Io, Tag};

/// Worker threads of a disk, and so what it can have hanging in the kernel at a time.
pub(super) const WORKERS_MAX: usize = 32;

/// How long a worker beyond the first waits for work before it ends.
const IDLE: Timespec = Timespec { tv_sec: 10, tv_nsec: 0 };

/// A channel's way to the workers and back.
pub(super) struct Line {
    /// I/Os to be done.
    jobs: ArrayQueue<Io>,
    /// How they ended.
    done: ArrayQueue<(Tag, Ended)>,
    /// Signalled for each of these.
    wake: OwnedFd,
    /// What is not begun is not wanted any more.
    abandoned: AtomicBool,
}

impl Line {
    /// For a channel of this depth.
    pub(super) fn new(depth: u16) -> io::Result<Arc<Self>> {
        let depth = usize::from(depth).max(1);
        Ok(Arc::new(Self {
            jobs: ArrayQueue::new(depth),
            done: ArrayQueue::new(depth),
            wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            abandoned: AtomicBool::new(false),
        }))
    }

    /// Becomes readable when an I/O has ended. Never read.
    pub(super) fn wake_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    /// What has not begun is not done any more.
    pub(super) fn abandon(&self) {
        // Relaxed: a flag that stands for itself.
        self.abandoned.store(true, Ordering::Relaxed);
    }

    /// Puts an I/O in; [`Workers::announce`] tells the workers. There is room for the depth.
    #[inline]
    pub(super) fn push(&self, io: Io) {
        let pushed = self.jobs.push(io);
        debug_assert!(pushed.is_ok(), "more I/Os than the depth");
    }

    /// An I/O that has ended.
    #[inline]
    pub(super) fn pop(&self) -> Option<(Tag, Ended)> {
        self.done.pop()
    }
}

/// How many worker threads there are, and what they do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WorkerCounts {
    /// Limit of `threads`.
    pub max: usize,
    /// Worker threads that exist.
    pub threads: usize,
    /// Those that do an I/O.
    pub busy: usize,
    /// I/Os that wait for a worker.
    pub queued: usize,
    /// Seconds for which the oldest I/O has been under way.
    pub longest_s: u64,
}

/// The workers of a disk.
pub(super) struct Workers(Arc<Shared>);

impl fmt::Debug for Workers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Workers").field(&self.counts()).finish()
    }
}

struct Shared {
    file: Slow,
    /// Counts I/Os in the lines that no worker has claimed yet.
    announced: OwnedFd,
    ending: AtomicBool,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    lines: Vec<Arc<Line>>,
    /// The line that is looked at first next time.
    next: usize,
    threads: usize,
    idle: usize,
    /// When each I/O under way began.
    begun: Vec<Instant>,
}

impl Workers {
    /// Starts the first worker for a file that stays open until [`Workers::end`], or longer while
    /// an I/O is under way.
    pub(super) fn start(fd: RawFd, direct: Option<Alignment>) -> io::Result<Self> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK | EventfdFlags::SEMAPHORE;
        let workers = Self(Arc::new(Shared {
            file: Slow { fd, direct, zeroes_ranges: AtomicBool::new(true) },
            announced: eventfd(0, flags)?,
            ending: AtomicBool::new(false),
            state: Mutex::default(),
        }));
        workers.0.add_worker()?;
        Ok(workers)
    }

    /// Has them serve a channel.
    pub(super) fn add(&self, line: &Arc<Line>) {
        self.0.state().lines.push(Arc::clone(line));
    }

    /// The channel has nothing outstanding and is closed.
    pub(super) fn remove(&self, line: &Arc<Line>) {
        self.0.state().lines.retain(|other| !Arc::ptr_eq(line, other));
    }

    /// Tells the workers of so many I/Os more. Does not wait.
    pub(super) fn announce(&self, count: u64) {
        // Fails only if the counter is full, with 2^64 I/Os.
        let _ = rustix::io::write(&self.0.announced, &count.to_ne_bytes());
    }

    pub(super) fn counts(&self) -> WorkerCounts {
        let state = self.0.state();
        let oldest = state.begun.iter().min();
        WorkerCounts {
            max: WORKERS_MAX,
            threads: state.threads,
            busy: state.begun.len(),
            queued: state.lines.iter().map(|line| line.jobs.len()).sum(),
            longest_s: oldest.map_or(0, |begun| begun.elapsed().as_secs()),
        }
    }
}

impl Drop for Workers {
    /// Ends the workers. Nothing is under way: all channels are closed.
    fn drop(&mut self) {
        self.0.ending.store(true, Ordering::Release);
        self.announce(WORKERS_MAX as u64);
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add_worker(self: &Arc<Self>) -> io::Result<()> {
        let mut state = self.state();
        state.threads += 1;
        state.idle += 1;
        drop(state);
        let shared = Arc::clone(self);
        // Not with a small stack: libc keeps 40 MiB of stacks of ended threads, and counts what is
        // reserved and not what was used.
        let builder = thread::Builder::new().name("vhost-disk".into());
        builder.spawn(move || shared.work()).map(drop).inspect_err(|_| {
            let mut state = self.state();
            state.threads -= 1;
            state.idle -= 1;
        })
    }

    /// What a worker does.
    fn work(self: Arc<Self>) {
        let mut bounce = Bounce::default();
        loop {
            let claimed = self.claim();
            if self.ending.load(Ordering::Acquire) {
                return;
            }
            let mut state = self.state();
            if !claimed {
                // One more than is busy stays.
                if state.idle > 1 {
                    state.idle -= 1;
                    state.threads -= 1;
                    return;
                }
                continue;
            }
            let Some((line, io)) = state.take() else { continue };
            let begun = Instant::now();
            state.idle -= 1;
            state.begun.push(begun);
            let alone = state.idle == 0 && state.threads < WORKERS_MAX;
            drop(state);
            if alone {
                // Without another thread, what comes next waits for this one.
                let _ = self.add_worker();
            }
            // SAFETY: the I/O came through a channel and is not reported before this has ended; the
            // file is open as long as the disk has channels.
            #[expect(unsafe_code, reason = "does I/O on a guest's memory")]
            let ended = unsafe { self.file.perform(&io, &mut bounce, &line.abandoned) };
            let mut state = self.state();
            state.idle += 1;
            if let Some(at) = state.begun.iter().position(|other| *other == begun) {
                state.begun.swap_remove(at);
            }
            drop(state);
            let pushed = line.done.push((io.tag, ended));
            debug_assert!(pushed.is_ok(), "more I/Os than the depth");
            let _ = rustix::io::write(&line.wake, &1_u64.to_ne_bytes());
        }
    }

    /// Waits for an announced I/O and claims it; false if none came for a while.
    fn claim(&self) -> bool {
        let mut fds = [PollFd::new(&self.announced, PollFlags::IN)];
        // An error (a signal) is as good as the end of the time.
        let came = poll(&mut fds, Some(&IDLE)).is_ok_and(|count| count > 0);
        came && rustix::io::read(&self.announced, &mut [0; 8]).is_ok()
    }
}

impl State {
    /// The next I/O, from each channel in turn.
    fn take(&mut self) -> Option<(Arc<Line>, Io)> {
        for _ in 0..self.lines.len() {
            let at = self.next % self.lines.len();
            self.next = at + 1;
            if let Some(io) = self.lines[at].jobs.pop() {
                return Some((Arc::clone(&self.lines[at]), io));
            }
        }
        None
    }
}
