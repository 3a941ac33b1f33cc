//! A thread that keeps queues busy with random I/O and checks every block that it reads.

mod pattern;

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use front_end::{AnyQueue, Completion, LIMIT, Request, STATUS_OK, Segment};

use self::pattern::{Random, describe, pattern};
use crate::error::{Error, Result};
use crate::pin::pin;

/// Bytes in each request, and in each of the blocks that [`LoadOptions::blocks`] counts.
pub const BLOCK: u32 = 4096;
/// Sectors in a block.
const SECTORS: u64 = BLOCK as u64 / 512;
/// How long a sleeping load takes to notice that it should stop if nothing completes.
const NAP: Duration = Duration::from_millis(50);
/// Empty iterations of a spinning load between two reads of the clock.
const SPINS: u32 = 4096;

/// What a load does when nothing has completed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Idle {
    /// Sleep until the device calls.
    #[default]
    Sleep,
    /// Look again at once. For measurements: it takes a whole core.
    Spin,
}

/// What a load does.
#[derive(Clone, Debug)]
pub struct LoadOptions {
    /// Requests in flight on each queue. The queue must have room for them.
    pub depth: usize,
    /// Blocks of 4 KiB that it reads and writes. Two loads on one disk take ranges of their own.
    pub blocks: Range<u64>,
    /// How many of a hundred requests are reads.
    pub reads: u8,
    /// Write a pattern that names block and version, and compare what is read with it. Each block
    /// is then written before it is read.
    pub verify: bool,
    /// Chooses blocks and kinds: the same seed makes the same sequence.
    pub seed: u64,
    /// The core to run on; any without it.
    pub core: Option<usize>,
    /// What to do when nothing has completed.
    pub idle: Idle,
    /// Submit no more after this many requests.
    pub limit: Option<u64>,
    /// Record how long each request takes, for [`Summary::latencies_ns`].
    pub latencies: bool,
    /// Sleep so long whenever something has completed, for a load that leaves the cores to others.
    pub pause: Duration,
    /// A counter that another thread increments, the unit of waits in
    /// [`Summary::longest_wait_heartbeats`].
    pub heartbeats: Option<Arc<AtomicU64>>,
}

impl Default for LoadOptions {
    /// Depth 8 over the first 4 MiB, half reads, verified, sleeping, without end.
    fn default() -> Self {
        Self {
            depth: 8,
            blocks: 0..1024,
            reads: 50,
            verify: true,
            seed: 1,
            core: None,
            idle: Idle::Sleep,
            limit: None,
            latencies: false,
            pause: Duration::ZERO,
            heartbeats: None,
        }
    }
}

/// What a load has seen.
#[derive(Clone, Debug, Default)]
pub struct Summary {
    /// Requests that came back, whatever their status.
    pub completed: u64,
    /// Of these, those with a status other than OK.
    pub errors: u64,
    /// Blocks that held something other than what was last written, and completions of requests
    /// that the device did not hold.
    pub mismatches: u64,
    /// The first error or mismatch, in words.
    pub first_problem: Option<String>,
    /// Requests that had not come back at the end.
    pub outstanding: usize,
    /// The longest time in which nothing completed, from start to end.
    pub longest_gap: Duration,
    /// The longest time of a completed request, in [`LoadOptions::heartbeats`].
    pub longest_wait_heartbeats: u64,
    /// From start to end.
    pub elapsed: Duration,
    /// Of each request in order of completion, if asked for: from before it was submitted until
    /// it was seen to be complete.
    pub latencies_ns: Vec<u32>,
}

/// A load that runs on a thread of its own. Dropping it stops it without waiting for its requests.
#[derive(Debug)]
pub struct Load {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<(Result<Summary>, Vec<AnyQueue>)>>,
}

impl Load {
    /// Starts a load on `queues`, whose buffers are taken from the queues' memory for good. The
    /// front end that started the queues goes on being the caller's.
    ///
    /// # Errors
    /// No memory for the buffers, or no thread.
    ///
    /// # Panics
    /// With no queue, or fewer blocks than requests in flight.
    pub fn start(queues: Vec<impl Into<AnyQueue>>, options: LoadOptions) -> Result<Self> {
        let in_flight = options.depth * queues.len();
        let blocks = options.blocks.end.saturating_sub(options.blocks.start);
        assert!(in_flight > 0 && blocks > in_flight as u64, "each request takes its own block");
        let shared = Arc::new(Shared::default());
        let queues = queues.into_iter().map(Into::into).collect();
        let worker = Worker::new(queues, options, shared.clone())?;
        let thread = std::thread::Builder::new()
            .name("load".into())
            .spawn(move || worker.run())
            .map_err(Error::system("cannot start a thread"))?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Requests that have come back so far.
    #[must_use]
    pub fn completed(&self) -> u64 {
        self.shared.completed.load(Ordering::Acquire)
    }

    /// Waits until `more` requests have come back, counted from now.
    ///
    /// # Errors
    /// [`front_end::Error::Stalled`] if none does for [`LIMIT`], [`Error::LoadEnded`] if none will.
    pub fn wait_for(&self, more: u64) -> Result<()> {
        self.shared.wait_for(self.completed() + more)
    }

    /// Submits no more, waits for what is in flight, and returns the queues, which can be used on.
    ///
    /// # Errors
    /// [`Error::LoadEnded`] if the load could not go on. That something did not come back within
    /// [`LIMIT`] is no error, but [`Summary::outstanding`].
    pub fn stop(mut self) -> Result<(Summary, Vec<AnyQueue>)> {
        self.shared.stop.store(true, Ordering::Relaxed);
        self.end()
    }

    /// Ends at once, whatever is in flight: for a back end that has gone, or that hangs.
    ///
    /// # Errors
    /// [`Error::LoadEnded`] if the load could not go on.
    pub fn abandon(mut self) -> Result<(Summary, Vec<AnyQueue>)> {
        self.shared.abandon.store(true, Ordering::Relaxed);
        self.end()
    }

    /// Waits until the load has done all that [`LoadOptions::limit`] allows.
    ///
    /// # Errors
    /// As [`Load::stop`].
    pub fn finish(mut self) -> Result<(Summary, Vec<AnyQueue>)> {
        self.end()
    }

    fn end(&mut self) -> Result<(Summary, Vec<AnyQueue>)> {
        let thread = self.thread.take().expect("taken only here, and the load is consumed");
        let Ok((summary, queues)) = thread.join() else {
            return Err(Error::LoadEnded("its thread panicked".into()));
        };
        Ok((summary?, queues))
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.shared.abandon.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // What it found is not wanted any more.
            drop(thread.join());
        }
    }
}

/// What the load's thread and its watchers share.
#[derive(Debug, Default)]
struct Shared {
    completed: AtomicU64,
    /// Somebody waits for `completed` to change.
    watched: AtomicBool,
    stop: AtomicBool,
    abandon: AtomicBool,
    ended: Mutex<bool>,
    progress: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, bool> {
        self.ended.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn report(&self, completed: u64) {
        self.completed.store(completed, Ordering::Release);
        // Missing a watcher that comes just now is fine: the next report finds it.
        if self.watched.load(Ordering::Relaxed) {
            let _guard = self.lock();
            self.progress.notify_all();
        }
    }

    fn wait_for(&self, goal: u64) -> Result<()> {
        let mut ended = self.lock();
        let mut seen = self.completed.load(Ordering::Acquire);
        let mut since = Instant::now();
        loop {
            let now = self.completed.load(Ordering::Acquire);
            if now >= goal {
                self.watched.store(false, Ordering::Relaxed);
                return Ok(());
            }
            if now != seen {
                (seen, since) = (now, Instant::now());
            }
            if *ended {
                return Err(Error::LoadEnded(format!("{now} requests completed, not {goal}")));
            }
            if since.elapsed() > LIMIT {
                return Err(front_end::Error::Stalled(0).into());
            }
            // Another waiter may have taken the mark away when it was content.
            self.watched.store(true, Ordering::Relaxed);
            ended =
                self.progress.wait_timeout(ended, NAP).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// Says that the load has ended, even if it panics.
struct End(Arc<Shared>);

impl Drop for End {
    fn drop(&mut self) {
        *self.0.lock() = true;
        self.0.progress.notify_all();
    }
}

/// A request in flight.
#[derive(Clone, Copy, Debug)]
struct Slot {
    buffer: Segment,
    block: u64,
    write: bool,
    /// Before it was submitted, if that is to be known.
    since: Option<Instant>,
    /// The heartbeat counter at that time.
    heartbeat: u64,
}

struct Worker {
    queues: Vec<AnyQueue>,
    options: LoadOptions,
    shared: Arc<Shared>,
    random: Random,
    /// Of each queue: buffers that no request uses.
    buffers: Vec<Vec<Segment>>,
    /// Of each queue and tag.
    slots: Vec<Vec<Option<Slot>>>,
    /// Of each block: how often it was written, 0 if what it holds is not known.
    versions: Vec<u32>,
    busy: Vec<bool>,
    submitted: u64,
    summary: Summary,
}

impl Worker {
    fn new(queues: Vec<AnyQueue>, options: LoadOptions, shared: Arc<Shared>) -> Result<Self> {
        let buffers = queues.iter().map(|queue| {
            let ram = queue.ring().ram();
            (0..options.depth)
                .map(|_| ram.alloc(BLOCK, u64::from(BLOCK)))
                .collect::<front_end::Result<_>>()
        });
        let blocks = options.blocks.end - options.blocks.start;
        let blocks = usize::try_from(blocks).expect("each block takes memory here");
        let latencies = options.limit.filter(|_| options.latencies).unwrap_or(0);
        let latencies = usize::try_from(latencies).expect("each latency takes memory here");
        Ok(Self {
            buffers: buffers.collect::<front_end::Result<_>>()?,
            slots: queues.iter().map(|q| vec![None; usize::from(q.ring().size())]).collect(),
            queues,
            shared,
            random: Random(options.seed),
            versions: vec![0; blocks],
            busy: vec![false; blocks],
            submitted: 0,
            summary: Summary { latencies_ns: Vec::with_capacity(latencies), ..Summary::default() },
            options,
        })
    }

    fn run(mut self) -> (Result<Summary>, Vec<AnyQueue>) {
        let _end = End(self.shared.clone());
        let result = self.work();
        let summary = std::mem::take(&mut self.summary);
        (result.map(|()| summary), self.queues)
    }

    fn work(&mut self) -> Result<()> {
        if let Some(core) = self.options.core {
            pin(core)?;
        }
        let start = Instant::now();
        let mut last = start;
        let mut spins = 0;
        loop {
            let before = self.summary.completed;
            // Reap first: what has completed makes room for what is submitted after.
            for queue in 0..self.queues.len() {
                self.reap(queue)?;
            }
            let stopping = self.stopping();
            if !stopping {
                for queue in 0..self.queues.len() {
                    self.refill(queue)?;
                }
            }
            let progress = self.summary.completed != before;
            if progress {
                let now = Instant::now();
                self.summary.longest_gap = self.summary.longest_gap.max(now - last);
                last = now;
                self.shared.report(self.summary.completed);
            }
            let in_flight: usize = self.queues.iter().map(AnyQueue::in_flight).sum();
            let abandoned = self.shared.abandon.load(Ordering::Relaxed);
            let lost = !progress && spins % SPINS == 0 && last.elapsed() > LIMIT;
            if abandoned || stopping && in_flight == 0 || lost {
                let now = Instant::now();
                self.summary.outstanding = in_flight;
                self.summary.elapsed = now - start;
                if in_flight > 0 {
                    self.summary.longest_gap = self.summary.longest_gap.max(now - last);
                }
                return Ok(());
            }
            if progress {
                spins = 0;
                if !self.options.pause.is_zero() {
                    std::thread::sleep(self.options.pause);
                }
            } else if self.options.idle == Idle::Sleep {
                AnyQueue::wait_any(&self.queues, NAP)?;
            } else {
                spins = spins.wrapping_add(1);
                std::hint::spin_loop();
            }
        }
    }

    fn stopping(&self) -> bool {
        self.options.limit.is_some_and(|limit| self.submitted >= limit)
            || self.shared.stop.load(Ordering::Relaxed)
    }

    fn reap(&mut self, queue: usize) -> Result<()> {
        loop {
            match self.queues[queue].poll() {
                Ok(None) => return Ok(()),
                Ok(Some(done)) => self.finish(queue, done)?,
                Err(error @ front_end::Error::NotHeld { .. }) => {
                    self.mismatch(|| error.to_string())
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn finish(&mut self, queue: usize, done: Completion) -> Result<()> {
        self.summary.completed += 1;
        let slot = self.slots[queue][usize::from(done.tag.0)].take();
        let slot = slot.expect("the queue knows what it holds");
        let Slot { buffer, block, write, since, heartbeat } = slot;
        let wait = self.heartbeat() - heartbeat;
        self.summary.longest_wait_heartbeats = self.summary.longest_wait_heartbeats.max(wait);
        if let Some(since) = since {
            let latency_ns = since.elapsed().as_nanos().try_into().unwrap_or(u32::MAX);
            self.summary.latencies_ns.push(latency_ns);
        }
        self.buffers[queue].push(buffer);
        let at = usize::try_from(block - self.options.blocks.start).expect("an index into `busy`");
        self.busy[at] = false;
        if done.status != STATUS_OK {
            self.summary.errors += 1;
            let kind = if write { "write" } else { "read" };
            self.problem(|| format!("{kind} of block {block}: status {}", done.status));
            if write {
                // The old data, the new data, or a mixture.
                self.versions[at] = 0;
            }
        } else if self.options.verify && !write {
            let mut bytes = [0; BLOCK as usize];
            self.queues[queue].ring().ram().read(buffer.gpa, &mut bytes)?;
            let version = self.versions[at];
            if bytes != pattern(self.options.seed, block, version) {
                self.mismatch(|| describe(&bytes, block, version));
            }
        }
        Ok(())
    }

    /// Submits until the queue is as deep as it should be, then kicks once.
    fn refill(&mut self, queue: usize) -> Result<()> {
        while self.options.limit.is_none_or(|limit| self.submitted < limit) {
            let Some(buffer) = self.buffers[queue].pop() else { break };
            let at = self.choose_block();
            let block = self.options.blocks.start + at as u64;
            let read = self.random.next() % 100 < u64::from(self.options.reads);
            // What a block holds must be known before it can be compared.
            let write = !read || self.options.verify && self.versions[at] == 0;
            if write && self.options.verify {
                self.versions[at] += 1;
                let bytes = pattern(self.options.seed, block, self.versions[at]);
                self.queues[queue].ring().ram().write(buffer.gpa, &bytes)?;
            }
            let data = [buffer];
            let request = if write { Request::write } else { Request::read };
            let (since, heartbeat) = (self.options.latencies.then(Instant::now), self.heartbeat());
            let tag = self.queues[queue].submit(&request(block * SECTORS, &data))?;
            self.slots[queue][usize::from(tag.0)] =
                Some(Slot { buffer, block, write, since, heartbeat });
            self.busy[at] = true;
            self.submitted += 1;
        }
        self.queues[queue].kick()?;
        Ok(())
    }

    fn heartbeat(&self) -> u64 {
        self.options.heartbeats.as_ref().map_or(0, |heartbeats| heartbeats.load(Ordering::Relaxed))
    }

    /// A block that no request uses, as the order of two that overlap is not defined.
    fn choose_block(&mut self) -> usize {
        let at = self.random.next() % self.busy.len() as u64;
        let mut at = usize::try_from(at).expect("an index into `busy`");
        while self.busy[at] {
            at = (at + 1) % self.busy.len();
        }
        at
    }

    fn mismatch(&mut self, what: impl FnOnce() -> String) {
        self.summary.mismatches += 1;
        self.problem(what);
    }

    fn problem(&mut self, what: impl FnOnce() -> String) {
        self.summary.first_problem.get_or_insert_with(what);
    }
}
