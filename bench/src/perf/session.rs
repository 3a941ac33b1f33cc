//! A run: connects, starts the threads, measures, and returns the results.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Barrier, OnceLock};
use std::thread::{self, ScopedJoinHandle};
use std::time::Duration;

use front_end::features::{EVENT_IDX, INDIRECT_DESC, PROTOCOL_FEATURES, RING_PACKED};
use front_end::packed::FIRST_BASE;
use front_end::prepared::{Blk, Form, Packed, Scsi, Slots, Split, Virtqueue, stride};
use front_end::ring::Ring;
use front_end::{Backing, FrontEnd, GuestRam, Options, ProtocolFeatures, RingLayout};

use crate::error::{Error, Result};
use crate::perf::clock::Clock;
use crate::perf::disk::{ASKING_BYTES, Disk};
use crate::perf::lane::{Lane, SharedCounter, Tally};
use crate::perf::outcome::Outcome;
use crate::perf::pace::Pace;
use crate::perf::plan::{Device, Plan};
use crate::perf::timeline::Timeline;
use crate::perf::verify::{self, Verified};
use crate::perf::work::{Area, Chooser, SECTOR, Work};
use crate::perf::worker::{Schedule, Worker, WorkerOptions, WorkerResult};
use crate::pin::pin;

/// Default of descriptors in a ring: twice QEMU's default.
const RING_SIZE: u16 = 256;
/// Limit on descriptors in a ring, as in QEMU.
const RING_SIZE_MAX: u16 = 1024;
/// The minimum length of a stretch of the time line.
const STRETCH: Duration = Duration::from_millis(100);
/// Limit on stretches: longer runs have longer stretches.
const STRETCHES_MAX: u32 = 36_000;
/// The size of guest memory is a multiple of this.
const RAM_UNIT: u64 = 2 << 20;
/// Interval of progress reports.
const TICK: Duration = Duration::from_millis(200);

/// A progress report.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Progress {
    /// The ramp is over, and the measurement begins.
    Started,
    /// The load runs.
    Running {
        /// The time since the first request, with the ramp.
        elapsed: Duration,
        /// Requests that have completed.
        completed: u64,
    },
}

/// Connects to the server, and runs the load of `plan` until its end or until `stop` is set. Calls
/// `report` with progress reports.
///
/// # Errors
/// The server does not answer or lacks a feature, or the system or the server failed. Failed
/// requests are not errors, but counted in the outcome.
///
/// # Panics
/// `plan` has no queue, no thread, depth 0, or a block size that is not a multiple of 512.
pub fn run(plan: &Plan, stop: &AtomicBool, report: &mut dyn FnMut(Progress)) -> Result<Outcome> {
    assert!(plan.queues > 0 && plan.threads > 0 && plan.depth > 0, "the load has requests");
    assert!(
        plan.block_bytes > 0 && plan.block_bytes.is_multiple_of(SECTOR),
        "a block is a number of sectors"
    );
    let ram = memory(plan)?;
    let mut front_end = connect(plan, ram.clone())?;
    match plan.device {
        Device::Blk => {
            let disk = Disk::of_blk(&mut front_end)?;
            Session::start(plan, front_end, ram, disk)?.run(plan, stop, report)
        }
        Device::Scsi { target } => {
            let disk = Disk::of_scsi(&mut front_end, &ram, plan, target)?;
            Session::start(plan, front_end, ram, disk)?.run(plan, stop, report)
        }
    }
}

/// A connection with running rings, and their memory.
struct Session<F> {
    front_end: FrontEnd,
    ram: Arc<GuestRam>,
    queues: Vec<(Arc<Ring>, Slots<F>)>,
    disk_bytes: u64,
    range: (u64, u64),
}

impl<F: Form + Copy + Sync> Session<F> {
    fn start(plan: &Plan, front_end: FrontEnd, ram: Arc<GuestRam>, disk: Disk<F>) -> Result<Self> {
        let Disk { form, bytes: disk_bytes, block_bytes, segment_bytes, segments, read_only } =
            disk;
        if read_only && plan.reads < 100 {
            return too_little("the disk is read-only, but the load writes".into());
        }
        if !plan.block_bytes.is_multiple_of(block_bytes)
            || !plan.offset.is_multiple_of(block_bytes.into())
        {
            let (block, offset) = (plan.block_bytes, plan.offset);
            return too_little(format!(
                "the disk has blocks of {block_bytes} bytes: block size {block} and offset {offset} \
                 must be multiples of it"
            ));
        }
        let segment_bytes = segment_bytes.min(plan.block_bytes);
        let needed = plan.block_bytes.div_ceil(segment_bytes);
        if needed > segments {
            return too_little(format!(
                "a request needs {needed} segments of {segment_bytes} bytes, but the disk takes at \
                 most {segments}: reduce the block size"
            ));
        }
        let range = range(plan, disk_bytes)?;
        let queue = |n| queue(plan, form, &ram, plan.device.first_queue() + n, segment_bytes);
        let queues = (0..plan.queues).map(queue).collect::<Result<Vec<_>>>()?;
        let mut session = Self { front_end, ram, queues, disk_bytes, range };
        session.start_rings(plan)?;
        Ok(session)
    }

    fn start_rings(&mut self, plan: &Plan) -> Result<()> {
        let Self { front_end, queues, .. } = self;
        let base = if plan.rings == RingLayout::Packed { FIRST_BASE } else { 0 };
        let rings = || queues.iter().map(|(ring, _)| Arc::clone(ring));
        match plan.device {
            Device::Blk => front_end.start(rings().map(|ring| (ring, base)).collect())?,
            // The features were negotiated before the disk was asked.
            Device::Scsi { .. } => {
                for ring in rings() {
                    front_end.start_ring(&ring, base)?;
                }
                if front_end.features() & PROTOCOL_FEATURES != 0 {
                    for ring in rings() {
                        front_end.enable(ring.index(), true)?;
                    }
                }
            }
        }
        Ok(())
    }

    fn run(
        mut self,
        plan: &Plan,
        stop: &AtomicBool,
        report: &mut dyn FnMut(Progress),
    ) -> Result<Outcome> {
        let mut outcome = self.measure(plan, stop, report)?;
        outcome.closed = self.front_end.is_closed();
        if !outcome.closed && outcome.outstanding == 0 {
            self.front_end.stop()?;
        }
        outcome.disk_bytes = self.disk_bytes;
        outcome.range = self.range;
        Ok(outcome)
    }

    fn measure(
        &self,
        plan: &Plan,
        stop: &AtomicBool,
        report: &mut dyn FnMut(Progress),
    ) -> Result<Outcome> {
        let event_idx = plan.event_idx;
        let split = |ring, slots| Split::new(ring, slots, event_idx);
        let packed = |ring, slots| Packed::new(ring, slots, event_idx);
        let chooser = |area, _: &Slots<F>| Chooser::new(area, plan.order, plan.reads, plan.seed);
        let verified = |area, slots: &Slots<F>| {
            let chooser = Chooser::new(area, plan.order, plan.reads, plan.seed);
            let buffers = slots.buffers().to_vec();
            Verified::new(chooser, self.ram.clone(), buffers, plan.seed, plan.reads < 100)
        };
        let measurement = Measurement { session: self, plan, clock: Clock::calibrated(), stop };
        match (plan.rings, plan.verify) {
            (RingLayout::Split, false) => measurement.work(split, chooser, report),
            (RingLayout::Split, true) => measurement.work(split, verified, report),
            (RingLayout::Packed, false) => measurement.work(packed, chooser, report),
            (RingLayout::Packed, true) => measurement.work(packed, verified, report),
        }
    }

    /// The part of the range that queue `index` uses.
    fn area(&self, plan: &Plan, index: usize) -> Area {
        let block_bytes = plan.block_bytes;
        let (first, blocks) =
            (self.range.0 / u64::from(block_bytes), self.range.1 / u64::from(block_bytes));
        let edge = |i: usize| blocks * i as u64 / plan.queues as u64;
        Area { first: first + edge(index), count: edge(index + 1) - edge(index), block_bytes }
    }
}

/// Guest memory for the rings and requests of `plan`.
fn memory(plan: &Plan) -> Result<Arc<GuestRam>> {
    let ring = u64::from(plan.ring_size.unwrap_or(RING_SIZE_MAX)) * 32 + 4096;
    // The size of segments is not known yet. They are rarely smaller than a page.
    let (depth, block, segment) = (plan.depth.into(), plan.block_bytes, plan.block_bytes.min(4096));
    let (asking, slots) = match plan.device {
        Device::Blk => (0, Slots::<Blk>::bytes(depth, block, segment)),
        Device::Scsi { .. } => (ASKING_BYTES, Slots::<Scsi>::bytes(depth, block, segment)),
    };
    let needed = (asking + plan.queues as u64 * (ring + slots)).next_multiple_of(RAM_UNIT);
    let bytes = plan.ram_bytes.unwrap_or(needed);
    let bytes =
        if plan.backing == Backing::Hugepages { bytes.next_multiple_of(RAM_UNIT) } else { bytes };
    Ok(GuestRam::with(&[bytes], 0, plan.backing)?)
}

/// Connects, and checks that the server offers what `plan` needs.
fn connect(plan: &Plan, ram: Arc<GuestRam>) -> Result<FrontEnd> {
    let mut features = plan.device.driver_features() & !(INDIRECT_DESC | EVENT_IDX);
    let mut needed = Vec::new();
    for (is_needed, bit, name) in [
        (plan.indirect, INDIRECT_DESC, "indirect descriptors"),
        (plan.event_idx, EVENT_IDX, "EVENT_IDX"),
        (plan.rings == RingLayout::Packed, RING_PACKED, "packed rings"),
    ] {
        if is_needed {
            features |= bit;
            needed.push((bit, name));
        }
    }
    let options = Options { features, limit: plan.limit, ..Options::default() };
    let front_end = FrontEnd::connect(&plan.socket, ram, options)?;
    let missing = needed.iter().find(|(bit, _)| front_end.offered() & bit == 0);
    if let Some((_, name)) = missing {
        return Err(front_end::Error::NotOffered(name).into());
    }
    let has_config = front_end.protocol_features().contains(ProtocolFeatures::CONFIG);
    if plan.device == Device::Blk && !has_config {
        let what = "the configuration space, which holds the disk's size";
        return Err(front_end::Error::NotOffered(what).into());
    }
    let needed = (plan.device.first_queue() + plan.queues) as u64;
    let offered = front_end.queues_offered();
    if offered < needed {
        return too_little(format!(
            "the back end has {offered} queues, but the load needs {needed}"
        ));
    }
    Ok(front_end)
}

fn too_little<T>(what: String) -> Result<T> {
    Err(Error::TooLittle(what))
}

/// The bytes of the disk to use: the first byte and the number of bytes.
fn range(plan: &Plan, disk_bytes: u64) -> Result<(u64, u64)> {
    let block = u64::from(plan.block_bytes);
    let left = disk_bytes.saturating_sub(plan.offset);
    let size = plan.size.unwrap_or(left);
    if size > left {
        return too_little(format!(
            "the disk has {disk_bytes} bytes, fewer than offset {} plus size {size}",
            plan.offset
        ));
    }
    // With verification, a block must not be in flight twice. One more block keeps the choice free.
    let per_queue = if plan.verify { u64::from(plan.depth) + 1 } else { 1 };
    let first = plan.offset.div_ceil(block);
    let blocks = ((plan.offset + size) / block).saturating_sub(first);
    let needed = per_queue * plan.queues as u64;
    if blocks < needed {
        return too_little(format!(
            "{size} of the disk's {disk_bytes} bytes are {blocks} blocks of {block} bytes, but the \
             load needs {needed}"
        ));
    }
    Ok((first * block, blocks * block))
}

/// Allocates a ring and its requests. Fills the buffers, so that writes do not write zeroes.
fn queue<F: Form>(
    plan: &Plan,
    form: F,
    ram: &Arc<GuestRam>,
    index: usize,
    segment_bytes: u32,
) -> Result<(Arc<Ring>, Slots<F>)> {
    let depth = usize::from(plan.depth);
    let slots = Slots::with(form, ram, depth, (plan.block_bytes, segment_bytes), plan.indirect)?;
    let needed = (depth * stride(&slots)).next_power_of_two();
    let most = plan.ring_size.unwrap_or(RING_SIZE_MAX);
    let Some(size) = u16::try_from(needed).ok().filter(|&needed| needed <= most) else {
        let parts = slots.parts();
        return too_little(format!(
            "{depth} requests of {parts} descriptors need a ring of {needed} descriptors, but the \
             limit is {most}: reduce the depth or use --indirect"
        ));
    };
    let size = plan.ring_size.unwrap_or(RING_SIZE.max(size));
    let ring = Arc::new(Ring::new(ram, index, size)?);
    let mut bytes = vec![0; plan.block_bytes as usize];
    for (slot, buffer) in slots.buffers().iter().enumerate() {
        verify::fill(&mut bytes, plan.seed, u64::MAX, slot as u64);
        ram.write(buffer.gpa, &bytes)?;
    }
    Ok((ring, slots))
}

/// The threads of one run, and the thread that waits for them.
struct Measurement<'s, F> {
    session: &'s Session<F>,
    plan: &'s Plan,
    clock: Clock,
    stop: &'s AtomicBool,
}

/// The begin and the end of a run, and an empty time line for it.
struct Timing {
    begin: u64,
    schedule: Schedule,
    timeline: Timeline,
}

impl Timing {
    /// The times of a run that begins now.
    fn new(plan: &Plan, clock: &Clock) -> Self {
        let begin = clock.now();
        let start = begin + clock.ticks(plan.ramp);
        let end = start + clock.ticks(plan.runtime);
        let width = STRETCH.max(plan.runtime / STRETCHES_MAX);
        let stretches = plan.runtime.as_nanos().div_ceil(width.as_nanos()).max(1);
        let stretches = usize::try_from(stretches).expect("at most STRETCHES_MAX");
        let timeline = Timeline::new(start, clock.ticks(width), stretches);
        let drain_limit = clock.ticks(plan.limit);
        Self { begin, schedule: Schedule { start, end, drain_limit }, timeline }
    }
}

impl<'s, F: Form + Copy + Sync> Measurement<'s, F> {
    /// Runs the threads, each with its queues, and combines their results.
    fn work<V: Virtqueue<Form = F>, W: Work>(
        &self,
        make_queue: impl Fn(&'s Ring, &'s Slots<F>) -> V + Sync,
        make_work: impl Fn(Area, &'s Slots<F>) -> W + Sync,
        report: &mut dyn FnMut(Progress),
    ) -> Result<Outcome> {
        let (plan, queues) = (self.plan, &self.session.queues);
        let count = plan.threads.min(plan.queues);
        let lane = |index: usize| {
            let (ring, slots) = &queues[index];
            let work = make_work(self.session.area(plan, index), slots);
            Lane::new(ring, make_queue(ring, slots), slots, work)
        };
        let mine = |thread: usize| (thread..plan.queues).step_by(count);
        let (timing, ready) = (OnceLock::new(), Barrier::new(count + 1));
        let abandon = AtomicBool::new(false);
        let completed: Vec<_> = (0..count).map(|_| SharedCounter::default()).collect();
        let watcher = thread::current();
        let work = |thread: usize| -> Result<WorkerResult> {
            let pinned =
                plan.cores.get(thread % plan.cores.len().max(1)).map_or(Ok(()), |&c| pin(c));
            let calls: Vec<_> = mine(thread).map(|index| queues[index].0.call_fd()).collect();
            let mut lanes: Vec<_> = mine(thread).map(lane).collect();
            ready.wait();
            let timing: &Timing = timing.wait();
            for (index, lane) in mine(thread).zip(&mut lanes) {
                lane.begin(timing.begin, self.pace(timing.begin, index));
            }
            let Timing { schedule, ref timeline, .. } = *timing;
            let (stop, abandon) = (self.stop, &abandon);
            let options = WorkerOptions { schedule, idle: plan.idle, stop, abandon };
            let (shown, tally) = (&completed[thread], Tally::new(timeline.clone()));
            pinned?;
            Worker::new(lanes, &calls, self.clock, options, shown, tally).run()
        };
        let work = |thread: usize| {
            let result = work(thread);
            // After an error, the other threads must end.
            abandon.fetch_or(result.is_err(), Ordering::Relaxed);
            watcher.unpark();
            result
        };
        thread::scope(|scope| {
            let work = &work;
            let threads: Vec<_> = (0..count).map(|i| scope.spawn(move || work(i))).collect();
            ready.wait();
            let timing = timing.get_or_init(|| Timing::new(plan, &self.clock));
            self.watch(&threads, timing, &completed, &abandon, report);
            let join = |thread: ScopedJoinHandle<'_, _>| thread.join().expect("it does not panic");
            let results = threads.into_iter().map(join).collect::<Result<Vec<_>>>()?;
            let empty = Tally::new(timing.timeline.clone());
            Ok(Outcome::new(results, timing.schedule.start, &self.clock, empty))
        })
    }

    /// The schedule of queue `index`, if there is a rate. The queues' schedules are interleaved.
    fn pace(&self, begin: u64, index: usize) -> Option<Pace> {
        let interval = self.clock.ticks_exactly(1e9 / self.plan.rate?);
        let offset = interval * index as f64 / self.plan.queues as f64;
        #[expect(clippy::cast_possible_truncation, reason = "whole ticks")]
        let offset = offset as u64;
        Some(Pace::new(begin + offset, interval))
    }

    /// Reports progress until all threads have ended, and ends them when the server disconnects.
    fn watch(
        &self,
        threads: &[ScopedJoinHandle<'_, Result<WorkerResult>>],
        timing: &Timing,
        completed: &[SharedCounter],
        abandon: &AtomicBool,
        report: &mut dyn FnMut(Progress),
    ) {
        let mut started = false;
        while !threads.iter().all(ScopedJoinHandle::is_finished) {
            let now = self.clock.now();
            if !started && now >= timing.schedule.start {
                started = true;
                report(Progress::Started);
            }
            if self.session.front_end.is_closed() {
                abandon.store(true, Ordering::Relaxed);
            }
            let elapsed = Duration::from_nanos(self.clock.ns(now.saturating_sub(timing.begin)));
            report(Progress::Running {
                elapsed,
                completed: completed.iter().map(SharedCounter::get).sum(),
            });
            let left = timing.schedule.start.saturating_sub(now);
            let left = Duration::from_nanos(self.clock.ns(left));
            // Sleeps long, because this thread may share a core with a thread that measures.
            thread::park_timeout(if started { TICK } else { left.min(TICK) });
        }
    }
}
