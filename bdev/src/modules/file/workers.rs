//! The worker threads of one file disk, for I/O that may wait. Each disk has its own, so that a
//! file that hangs delays no other disk.
//!
//! Each channel has a [`Line`]. The reactor puts I/Os into it and takes results out, and waits for
//! no worker in either case. The workers share a lock among themselves and with the control side.
//! While I/Os are under way, one additional worker waits for the next one, as long as the disk has
//! fewer than [`WORKERS_MAX`] and all disks together have fewer than [`EXTRA_MAX`] beyond their
//! first.

use std::fmt;
use std::io;
use std::os::fd::{OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Instant;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use super::backing::Alignment;
use super::blocking::{Bounce, Slow};
use crate::io::Io;
use crate::line::Line;

/// The most worker threads of a disk, and so the most I/Os that can hang in the kernel at a time.
pub(super) const WORKERS_MAX: usize = 32;

/// The most worker threads of all disks together, beyond the first of each. A thread takes three
/// mappings, of which a process may have 65,530 (`vm.max_map_count`); guest memory needs most of
/// them.
const EXTRA_MAX: usize = 2048;

/// The number of these threads.
static EXTRA: AtomicUsize = AtomicUsize::new(0);

/// How long a worker beyond the first waits for an I/O before it ends.
const IDLE: Timespec = Timespec { tv_sec: 10, tv_nsec: 0 };

/// The number of worker threads, and their work.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WorkerCounts {
    /// The limit of `threads`.
    pub max: usize,
    /// Worker threads that exist.
    pub threads: usize,
    /// Worker threads that do an I/O.
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
    /// The line to look at first next time.
    next: usize,
    threads: usize,
    idle: usize,
    /// The start time of each I/O under way.
    begun: Vec<Instant>,
}

impl Workers {
    /// Starts the first worker for a file. The file must stay open while a channel has I/O
    /// outstanding.
    pub(super) fn start(fd: RawFd, direct: Option<Alignment>) -> io::Result<Self> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK | EventfdFlags::SEMAPHORE;
        let workers = Self(Arc::new(Shared {
            file: Slow { fd, direct, zeroes_ranges: AtomicBool::new(true) },
            announced: eventfd(0, flags)?,
            ending: AtomicBool::new(false),
            state: Mutex::default(),
        }));
        workers.0.state().count_worker();
        workers.0.add_worker()?;
        Ok(workers)
    }

    /// Makes the workers serve a channel.
    pub(super) fn add(&self, line: &Arc<Line>) {
        self.0.state().lines.push(Arc::clone(line));
    }

    /// Removes a channel that has no outstanding I/O and is closed.
    pub(super) fn remove(&self, line: &Arc<Line>) {
        self.0.state().lines.retain(|other| !Arc::ptr_eq(line, other));
    }

    /// Tells the workers of `count` more I/Os. Does not wait.
    pub(super) fn announce(&self, count: u64) {
        // Fails only if the counter is full, after 2^64 I/Os.
        let _ = rustix::io::write(&self.0.announced, &count.to_ne_bytes());
    }

    pub(super) fn counts(&self) -> WorkerCounts {
        let state = self.0.state();
        let oldest = state.begun.iter().min();
        WorkerCounts {
            max: WORKERS_MAX,
            threads: state.threads,
            busy: state.begun.len(),
            queued: state.lines.iter().map(|line| line.waiting()).sum(),
            longest_s: oldest.map_or(0, |begun| begun.elapsed().as_secs()),
        }
    }
}

impl Drop for Workers {
    /// Ends the workers. No I/O is under way: all channels are closed.
    fn drop(&mut self) {
        self.0.ending.store(true, Ordering::Release);
        self.announce(WORKERS_MAX as u64);
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts a worker that has been counted.
    fn add_worker(self: &Arc<Self>) -> io::Result<()> {
        let shared = Arc::clone(self);
        // The stack has the default size: libc keeps 40 MiB of stacks of ended threads for reuse,
        // and counts reserved memory, not used memory.
        let builder = thread::Builder::new().name("vhost-disk".into());
        builder.spawn(move || shared.work()).map(drop).inspect_err(|_| self.state().lose_worker())
    }

    /// A worker's main function.
    fn work(self: Arc<Self>) {
        let mut bounce = Bounce::default();
        loop {
            let claimed = self.claim();
            let mut state = self.state();
            if self.ending.load(Ordering::Acquire) || claimed == Claim::TimedOut && state.idle > 1 {
                // One more worker stays than is busy.
                return state.lose_worker();
            }
            if claimed != Claim::Io {
                continue;
            }
            let Some((line, io)) = state.take() else { continue };
            let begun = Instant::now();
            state.idle -= 1;
            state.begun.push(begun);
            let alone = state.idle == 0 && state.may_add_worker();
            if alone {
                state.count_worker();
            }
            drop(state);
            if alone {
                // If the thread cannot be started (no memory, for example), the next I/O waits for
                // this worker.
                let _ = self.add_worker();
            }
            // SAFETY: the I/O came through a channel and is not reported before this has ended; the
            // file is open as long as the disk has channels.
            #[expect(unsafe_code, reason = "does I/O on a guest's memory")]
            let ended = unsafe { self.file.perform(&io, &mut bounce, line.abandoned()) };
            let mut state = self.state();
            state.idle += 1;
            if let Some(at) = state.begun.iter().position(|other| *other == begun) {
                state.begun.swap_remove(at);
            }
            drop(state);
            line.complete(io.tag, ended);
        }
    }

    /// Waits for an announced I/O and claims it.
    fn claim(&self) -> Claim {
        let mut fds = [PollFd::new(&self.announced, PollFlags::IN)];
        match poll(&mut fds, Some(&IDLE)) {
            Ok(0) => Claim::TimedOut,
            Ok(_) if rustix::io::read(&self.announced, &mut [0; 8]).is_ok() => Claim::Io,
            // Another worker was faster, or a signal arrived.
            Ok(_) | Err(_) => Claim::Nothing,
        }
    }
}

/// The result of a worker's wait for an I/O.
#[derive(PartialEq, Eq)]
enum Claim {
    Io,
    Nothing,
    TimedOut,
}

impl State {
    /// Returns whether the disk may have one more worker.
    fn may_add_worker(&self) -> bool {
        // Relaxed suffices: several threads may exceed the limit by a few.
        self.threads < WORKERS_MAX && EXTRA.load(Ordering::Relaxed) < EXTRA_MAX
    }

    fn count_worker(&mut self) {
        if self.threads > 0 {
            EXTRA.fetch_add(1, Ordering::Relaxed);
        }
        self.threads += 1;
        self.idle += 1;
    }

    fn lose_worker(&mut self) {
        self.threads -= 1;
        self.idle -= 1;
        if self.threads > 0 {
            EXTRA.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// Takes the next I/O, from the channels in rotation.
    fn take(&mut self) -> Option<(Arc<Line>, Io)> {
        for _ in 0..self.lines.len() {
            let at = self.next % self.lines.len();
            self.next = at + 1;
            if let Some(io) = self.lines[at].take_job() {
                return Some((Arc::clone(&self.lines[at]), io));
            }
        }
        None
    }
}
