//! A run from the connection to the figures.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Barrier, OnceLock};
use std::thread::{self, ScopedJoinHandle};
use std::time::Duration;

use front_end::features::{DRIVER_FEATURES, EVENT_IDX, INDIRECT_DESC, RING_PACKED};
use front_end::packed::FIRST_BASE;
use front_end::prepared::{Packed, Slots, Split, Virtqueue, stride};
use front_end::ring::Ring;
use front_end::{Backing, FrontEnd, GuestRam, Options, ProtocolFeatures, RingLayout};

use crate::error::{Error, Result};
use crate::perf::clock::Clock;
use crate::perf::lane::{Lane, Shown, Tally};
use crate::perf::outcome::Outcome;
use crate::perf::pace::Pace;
use crate::perf::plan::Plan;
use crate::perf::timeline::Timeline;
use crate::perf::verify::{self, Verified};
use crate::perf::work::{Area, Chooser, SECTOR, Work};
use crate::perf::worker::{Finding, Orders, Schedule, Worker};
use crate::pin::pin;

/// Feature bit: there is a limit on the bytes in a segment.
const SIZE_MAX: u64 = 1 << 1;
/// Feature bit: the disk is read-only.
const READ_ONLY: u64 = 1 << 5;
/// Feature bit: the disk's blocks are larger than a sector.
const BLK_SIZE: u64 = 1 << 6;
/// Feature bit: there is a limit on the segments in a request.
const SEG_MAX: u64 = 1 << 2;
/// Descriptors in a ring that nobody has asked to be larger: what QEMU's guests have, and twice.
const RING_SIZE: u16 = 256;
/// The most that servers take.
const RING_SIZE_MAX: usize = 1024;
/// Stretches of the time line, and the most of them: longer runs have longer ones.
const STRETCH: Duration = Duration::from_millis(100);
const STRETCHES_MAX: u32 = 36_000;
/// Guest memory is a multiple of this.
const RAM_UNIT: u64 = 2 << 20;
/// How often the caller's thread looks round.
const TICK: Duration = Duration::from_millis(200);

/// What is told while a run goes on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Progress {
    /// The ramp is over, and measuring begins.
    Started,
    /// Now and then: how long it has run, ramp included, and how much has completed.
    Running {
        /// Since the first request.
        elapsed: Duration,
        /// Requests.
        completed: u64,
    },
}

/// Connects to the server and does what `plan` says, until that is done or `stop` is set.
///
/// # Errors
/// The server does not answer or offers too little, or something broke off. Requests that went
/// wrong are no error, but figures.
///
/// # Panics
/// With a plan of no queue, no thread, no request, or a block size that is no multiple of 512.
pub fn run(plan: &Plan, stop: &AtomicBool, tell: &mut dyn FnMut(Progress)) -> Result<Outcome> {
    assert!(plan.queues > 0 && plan.threads > 0 && plan.depth > 0, "there is something to do");
    assert!(
        plan.block_bytes > 0 && plan.block_bytes.is_multiple_of(SECTOR),
        "blocks are whole sectors"
    );
    let mut session = Session::open(plan)?;
    let mut outcome = session.measure(plan, stop, tell)?;
    outcome.closed = session.front_end.is_closed();
    if !outcome.closed && outcome.outstanding == 0 {
        session.front_end.stop()?;
    }
    outcome.disk_bytes = session.disk_bytes;
    outcome.range = session.range;
    Ok(outcome)
}

/// A connection whose rings run, and what they work on.
struct Session {
    front_end: FrontEnd,
    ram: Arc<GuestRam>,
    queues: Vec<(Arc<Ring>, Slots)>,
    disk_bytes: u64,
    range: (u64, u64),
}

impl Session {
    fn open(plan: &Plan) -> Result<Self> {
        let ram = memory(plan)?;
        let mut front_end = connect(plan, ram.clone())?;
        let config = front_end.config()?;
        let offered = front_end.offered();
        // Nought says nothing, as qemu-storage-daemon's size_max does.
        let limit = |bit, most| if offered & bit != 0 && most > 0 { most } else { u32::MAX };
        let blk_size = if offered & BLK_SIZE != 0 { config.blk_size.max(SECTOR) } else { SECTOR };
        if !plan.block_bytes.is_multiple_of(blk_size)
            || !plan.offset.is_multiple_of(blk_size.into())
        {
            let (have, at) = (plan.block_bytes, plan.offset);
            return too_little(format!(
                "the disk has blocks of {blk_size} bytes: {have} bytes from byte {at} on are not whole ones"
            ));
        }
        let segment_bytes = limit(SIZE_MAX, config.size_max).min(plan.block_bytes);
        let segments = plan.block_bytes.div_ceil(segment_bytes);
        let most = limit(SEG_MAX, config.seg_max);
        if segments > most {
            return too_little(format!(
                "the disk takes {most} segments of {segment_bytes} bytes in a request, not {segments}"
            ));
        }
        let disk_bytes = config.capacity.saturating_mul(SECTOR.into());
        let range = range(plan, disk_bytes)?;
        let queue = |index| queue(plan, &ram, index, segment_bytes);
        let queues = (0..plan.queues).map(queue).collect::<Result<Vec<_>>>()?;
        let base = if plan.rings == RingLayout::Packed { FIRST_BASE } else { 0 };
        front_end.start(queues.iter().map(|(ring, _)| (ring.clone(), base)).collect())?;
        Ok(Self { front_end, ram, queues, disk_bytes, range })
    }

    fn measure(
        &self,
        plan: &Plan,
        stop: &AtomicBool,
        tell: &mut dyn FnMut(Progress),
    ) -> Result<Outcome> {
        let event_idx = plan.event_idx;
        let split = |ring, slots| Split::new(ring, slots, event_idx);
        let packed = |ring, slots| Packed::new(ring, slots, event_idx);
        let chooser = |area, _: &Slots| Chooser::new(area, plan.order, plan.reads, plan.seed);
        let verified = |area, slots: &Slots| {
            let chooser = Chooser::new(area, plan.order, plan.reads, plan.seed);
            let buffers = slots.buffers().to_vec();
            Verified::new(chooser, self.ram.clone(), buffers, plan.seed, plan.reads < 100)
        };
        let crew = Crew { session: self, plan, clock: Clock::calibrated(), stop };
        match (plan.rings, plan.verify) {
            (RingLayout::Split, false) => crew.work(split, chooser, tell),
            (RingLayout::Split, true) => crew.work(split, verified, tell),
            (RingLayout::Packed, false) => crew.work(packed, chooser, tell),
            (RingLayout::Packed, true) => crew.work(packed, verified, tell),
        }
    }

    /// The part of the range that queue `index` works on.
    fn area(&self, plan: &Plan, index: usize) -> Area {
        let block_bytes = plan.block_bytes;
        let (first, blocks) =
            (self.range.0 / u64::from(block_bytes), self.range.1 / u64::from(block_bytes));
        let edge = |i: usize| blocks * i as u64 / plan.queues as u64;
        Area { first: first + edge(index), count: edge(index + 1) - edge(index), block_bytes }
    }
}

/// Guest memory for all that `plan` needs.
fn memory(plan: &Plan) -> Result<Arc<GuestRam>> {
    let ring = u64::from(plan.ring_size.unwrap_or(RING_SIZE_MAX as u16)) * 32 + 4096;
    // Segments are hardly ever smaller than a page, and then there is some room left.
    let slots = Slots::bytes(plan.depth.into(), plan.block_bytes, plan.block_bytes.min(4096));
    let needed = (plan.queues as u64 * (ring + slots)).next_multiple_of(RAM_UNIT);
    let bytes = plan.ram_bytes.unwrap_or(needed);
    let bytes =
        if plan.backing == Backing::Hugepages { bytes.next_multiple_of(RAM_UNIT) } else { bytes };
    Ok(GuestRam::with(&[bytes], 0, plan.backing)?)
}

/// Connects, and sees to it that the server has what `plan` wants.
fn connect(plan: &Plan, ram: Arc<GuestRam>) -> Result<FrontEnd> {
    let mut features = DRIVER_FEATURES & !(INDIRECT_DESC | EVENT_IDX);
    let mut need = Vec::new();
    for (wanted, bit, name) in [
        (plan.indirect, INDIRECT_DESC, "indirect descriptors"),
        (plan.event_idx, EVENT_IDX, "EVENT_IDX"),
        (plan.rings == RingLayout::Packed, RING_PACKED, "packed rings"),
    ] {
        if wanted {
            features |= bit;
            need.push((bit, name));
        }
    }
    let options = Options { features, limit: plan.limit, ..Options::default() };
    let front_end = FrontEnd::connect(&plan.socket, ram, options)?;
    let missing = need.iter().find(|(bit, _)| front_end.offered() & bit == 0);
    if let Some((_, name)) = missing {
        return Err(front_end::Error::NotOffered(name).into());
    }
    if !front_end.protocol_features().contains(ProtocolFeatures::CONFIG) {
        let what = "its configuration space, which says how large the disk is";
        return Err(front_end::Error::NotOffered(what).into());
    }
    if front_end.offered() & READ_ONLY != 0 && plan.reads < 100 {
        return too_little("the disk is read-only, and the load writes".into());
    }
    let (have, want) = (front_end.queues_offered(), plan.queues as u64);
    if have < want {
        return too_little(format!("the back end has {have} queues, not {want}"));
    }
    Ok(front_end)
}

fn too_little<T>(what: String) -> Result<T> {
    Err(Error::TooLittle(what))
}

/// The bytes of the disk to use: the first one, and how many.
fn range(plan: &Plan, disk_bytes: u64) -> Result<(u64, u64)> {
    let block = u64::from(plan.block_bytes);
    let left = disk_bytes.saturating_sub(plan.offset);
    let size = plan.size.unwrap_or(left);
    if size > left {
        return too_little(format!(
            "the disk has {disk_bytes} bytes, and {size} from byte {} are more",
            plan.offset
        ));
    }
    // A request of each queue, and where blocks must not be in flight twice, one more than those.
    let least = if plan.verify { u64::from(plan.depth) + 1 } else { 1 };
    let first = plan.offset.div_ceil(block);
    let blocks = ((plan.offset + size) / block).saturating_sub(first);
    let wanted = least * plan.queues as u64;
    if blocks < wanted {
        return too_little(format!(
            "{size} of the disk's {disk_bytes} bytes are {blocks} blocks of {block}, and the load needs \
             {wanted}"
        ));
    }
    Ok((first * block, blocks * block))
}

/// A ring and the requests for it, the data filled so that writes do not write zeroes.
fn queue(
    plan: &Plan,
    ram: &Arc<GuestRam>,
    index: usize,
    segment_bytes: u32,
) -> Result<(Arc<Ring>, Slots)> {
    let depth = usize::from(plan.depth);
    let slots = Slots::new(ram, depth, plan.block_bytes, segment_bytes, plan.indirect)?;
    let needed = (depth * stride(&slots)).next_power_of_two();
    let most = plan.ring_size.map_or(RING_SIZE_MAX, usize::from);
    if needed > most {
        let parts = slots.parts();
        return too_little(format!(
            "{depth} requests of {parts} descriptors need a ring of {needed}, and it has {most}: \
             fewer requests, or indirect descriptors"
        ));
    }
    let size = plan.ring_size.unwrap_or(RING_SIZE.max(needed as u16));
    let ring = Arc::new(Ring::new(ram, index, size)?);
    let mut bytes = vec![0; plan.block_bytes as usize];
    for (slot, buffer) in slots.buffers().iter().enumerate() {
        verify::fill(&mut bytes, plan.seed, u64::MAX, slot as u64);
        ram.write(buffer.gpa, &bytes)?;
    }
    Ok((ring, slots))
}

/// The threads of one run, and who waits for them.
struct Crew<'s> {
    session: &'s Session,
    plan: &'s Plan,
    clock: Clock,
    stop: &'s AtomicBool,
}

/// When a run begins and ends, and an empty time line for it.
struct Timing {
    begin: u64,
    schedule: Schedule,
    timeline: Timeline,
}

impl Timing {
    /// A run that begins now.
    fn new(plan: &Plan, clock: &Clock) -> Self {
        let begin = clock.now();
        let start = begin + clock.ticks(plan.ramp);
        let end = start + clock.ticks(plan.runtime);
        let width = STRETCH.max(plan.runtime / STRETCHES_MAX);
        let stretches = plan.runtime.as_nanos().div_ceil(width.as_nanos()).max(1) as usize;
        let timeline = Timeline::new(start, clock.ticks(width), stretches);
        let patience = clock.ticks(plan.limit);
        Self { begin, schedule: Schedule { start, end, patience }, timeline }
    }
}

impl<'s> Crew<'s> {
    /// Has every thread work on its queues, and puts together what they found.
    fn work<V: Virtqueue, W: Work>(
        &self,
        make_queue: impl Fn(&'s Ring, &'s Slots) -> V + Sync,
        make_work: impl Fn(Area, &'s Slots) -> W + Sync,
        tell: &mut dyn FnMut(Progress),
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
        let completed: Vec<_> = (0..count).map(|_| Shown::default()).collect();
        let watcher = thread::current();
        let work = |thread: usize| -> Result<Finding> {
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
            let orders = Orders { schedule, idle: plan.idle, stop, abandon };
            let (shown, tally) = (&completed[thread], Tally::new(timeline.clone()));
            pinned?;
            Worker::new(lanes, &calls, self.clock, orders, shown, tally).run()
        };
        let work = |thread: usize| {
            let finding = work(thread);
            // The others need not go on.
            abandon.fetch_or(finding.is_err(), Ordering::Relaxed);
            watcher.unpark();
            finding
        };
        thread::scope(|scope| {
            let work = &work;
            let threads: Vec<_> = (0..count).map(|i| scope.spawn(move || work(i))).collect();
            ready.wait();
            let timing = timing.get_or_init(|| Timing::new(plan, &self.clock));
            self.watch(&threads, timing, &completed, &abandon, tell);
            let join = |thread: ScopedJoinHandle<'_, _>| thread.join().expect("it does not panic");
            let findings = threads.into_iter().map(join).collect::<Result<Vec<_>>>()?;
            let empty = Tally::new(timing.timeline.clone());
            Ok(Outcome::new(findings, timing.schedule.start, &self.clock, empty))
        })
    }

    /// When the requests of queue `index` are due, if there is a rate. The queues take turns.
    fn pace(&self, begin: u64, index: usize) -> Option<Pace> {
        let interval = self.clock.ticks_exactly(1e9 / self.plan.rate?);
        let offset = interval * index as f64 / self.plan.queues as f64;
        Some(Pace::new(begin + offset as u64, interval))
    }

    /// Tells of progress until all threads have ended, and has them end if the server has.
    fn watch(
        &self,
        threads: &[ScopedJoinHandle<'_, Result<Finding>>],
        timing: &Timing,
        completed: &[Shown],
        abandon: &AtomicBool,
        tell: &mut dyn FnMut(Progress),
    ) {
        let mut started = false;
        while !threads.iter().all(ScopedJoinHandle::is_finished) {
            let now = self.clock.now();
            if !started && now >= timing.schedule.start {
                started = true;
                tell(Progress::Started);
            }
            if self.session.front_end.is_closed() {
                abandon.store(true, Ordering::Relaxed);
            }
            let elapsed = Duration::from_nanos(self.clock.ns(now.saturating_sub(timing.begin)));
            tell(Progress::Running { elapsed, completed: completed.iter().map(Shown::get).sum() });
            let left = timing.schedule.start.saturating_sub(now);
            let left = Duration::from_nanos(self.clock.ns(left));
            // Seldom: this thread may have to take a core from one that measures.
            thread::park_timeout(if started { TICK } else { left.min(TICK) });
        }
    }
}
