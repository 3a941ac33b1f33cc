//! The guest: memory, rings and requests, which know no connection.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use front_end::features::{EVENT_IDX, RING_PACKED};
use front_end::packed::FIRST_BASE;
use front_end::prepared::{Form, Head, HeadOf, Packed, Slots, Split, Virtqueue, stride};
use front_end::ring::Ring;
use front_end::{Error, FrontEnd, GuestRam, Options, RingLayout};

use super::{LIMIT, Plan, Toll};
use crate::error::Result;
use crate::perf::plan::Order;
use crate::perf::verify::Verified;
use crate::perf::work::{Area, Chooser, Io, Work};
use crate::servers;

const BLOCK_BYTES: u32 = 4096;
/// Two of them make a block.
const SEGMENT_BYTES: u32 = 2048;
/// Blocks of a queue for each request in flight: few, so that each is written and read often.
const BLOCKS_EACH: u64 = 4;
/// Completions taken at once.
const AT_ONCE: usize = 16;
const READS_PERCENT: u8 = 50;

fn blocks(plan: &Plan) -> u64 {
    BLOCKS_EACH * u64::from(plan.depth)
}

/// Bytes of the disk that it works on.
pub(super) fn disk_bytes(plan: &Plan) -> u64 {
    plan.queues as u64 * blocks(plan) * u64::from(BLOCK_BYTES)
}

/// What outlives servers, and the connection to the one of the moment.
pub(super) struct Guest<F> {
    plan: Plan,
    ram: Arc<GuestRam>,
    queues: Vec<(Arc<Ring>, Slots<F>)>,
    connection: Option<FrontEnd>,
}

impl<F: Form + Copy> Guest<F> {
    pub(super) fn new(plan: &Plan, form: F) -> Result<Self> {
        let depth = usize::from(plan.depth);
        let queue_bytes = Slots::<F>::bytes(depth, BLOCK_BYTES, SEGMENT_BYTES) + (1 << 20);
        let ram_bytes = (plan.queues as u64 * queue_bytes).next_multiple_of(2 << 20);
        let ram = GuestRam::new(&[ram_bytes])?;
        let queue = |n: usize| -> Result<(Arc<Ring>, Slots<F>)> {
            let indirect = n % 2 == 1;
            let slots = Slots::with(form, &ram, depth, (BLOCK_BYTES, SEGMENT_BYTES), indirect)?;
            let size = (depth * stride(&slots)).next_power_of_two();
            // `Ring::new` refuses the maximum, as it is not a power of two.
            let size = u16::try_from(size).unwrap_or(u16::MAX);
            let index = plan.device.first_queue() + n;
            Ok((Arc::new(Ring::new(&ram, index, size)?), slots))
        };
        let queues = (0..plan.queues).map(queue).collect::<Result<_>>()?;
        Ok(Self { plan: plan.clone(), ram, queues, connection: None })
    }

    /// Connects for the first time.
    pub(super) fn connect(&mut self, socket: PathBuf) -> Result<()> {
        let packed = self.plan.rings == RingLayout::Packed;
        let of_driver = self.plan.device.driver_features();
        let features = of_driver | if packed { RING_PACKED } else { 0 };
        let options = Options { features, inflight: true, ..Options::default() };
        let mut front_end = FrontEnd::connect(&socket, self.ram.clone(), options)?;
        if packed && front_end.offered() & RING_PACKED == 0 {
            return Err(Error::NotOffered("packed rings").into());
        }
        let base = if packed { FIRST_BASE } else { 0 };
        front_end.start(self.queues.iter().map(|(ring, _)| (ring.clone(), base)).collect())?;
        self.connection = Some(front_end);
        Ok(())
    }

    /// Has `serve` see to it that its requests are served.
    pub(super) fn serve(
        mut self,
        serve: impl FnOnce(&mut dyn Lanes, &mut FrontEnd) -> servers::Result<()>,
    ) -> servers::Result<()> {
        let mut connection = self.connection.take().expect("it has connected");
        let event_idx = connection.features() & EVENT_IDX != 0;
        match self.plan.rings {
            RingLayout::Split => {
                let mut crew = self.crew(|ring, slots| Split::new(ring, slots, event_idx));
                serve(&mut crew, &mut connection)
            }
            RingLayout::Packed => {
                let mut crew = self.crew(|ring, slots| Packed::new(ring, slots, event_idx));
                serve(&mut crew, &mut connection)
            }
        }
    }

    fn crew<'a, V: Virtqueue<Form = F>>(
        &'a self,
        queue: impl Fn(&'a Ring, &'a Slots<F>) -> V,
    ) -> Crew<'a, V> {
        let Self { plan, ram, .. } = self;
        let first_queue = plan.device.first_queue();
        let lane = |(ring, slots): &'a (Arc<Ring>, Slots<F>)| {
            let first = blocks(plan) * (ring.index() - first_queue) as u64;
            let area = Area { first, count: blocks(plan), block_bytes: BLOCK_BYTES };
            let chooser = Chooser::new(area, Order::Random, READS_PERCENT, plan.seed);
            let buffers = slots.buffers().to_vec();
            let work = Verified::new(chooser, ram.clone(), buffers, plan.seed, true);
            Lane::new(ring, queue(ring, slots), slots, work)
        };
        let lanes = self.queues.iter().map(lane).collect();
        Crew { lanes, first_queue, lively: Instant::now() }
    }
}

/// All queues of a guest, whichever kind they are.
pub(super) trait Lanes {
    /// Takes what has come back, and gives the device as much again. A device that does nothing for
    /// [`LIMIT`] has lost what is in flight.
    fn work(&mut self, toll: &mut Toll) -> Result<()>;

    /// Requests in flight.
    fn in_flight(&self) -> u64;

    /// Connects to the server that has taken over.
    fn reconnect(&mut self, front_end: &mut FrontEnd) -> Result<()>;

    /// Lets everything come back, then reads each block.
    fn finish(&mut self, toll: &mut Toll) -> servers::Result<()>;
}

struct Crew<'a, V: Virtqueue> {
    lanes: Vec<Lane<'a, V>>,
    /// The index of the first lane's ring.
    first_queue: usize,
    /// When something has come back, or a server has taken over.
    lively: Instant,
}

impl<V: Virtqueue> Lanes for Crew<'_, V> {
    fn work(&mut self, toll: &mut Toll) -> Result<()> {
        let before = toll.completed;
        for lane in &mut self.lanes {
            lane.take(toll)?;
            lane.give()?;
        }
        if toll.completed > before {
            self.lively = Instant::now();
        } else if self.lively.elapsed() > LIMIT {
            toll.lost = self.in_flight();
            toll.note(|| format!("nothing has come back for {LIMIT:?}"));
        } else {
            std::thread::yield_now();
        }
        Ok(())
    }

    fn in_flight(&self) -> u64 {
        self.lanes.iter().map(|lane| (lane.held.len() - lane.free.len()) as u64).sum()
    }

    fn reconnect(&mut self, front_end: &mut FrontEnd) -> Result<()> {
        let Self { lanes, first_queue, .. } = &*self;
        front_end.reconnect_at(|ring| lanes[ring.index() - first_queue].queue.base())?;
        for lane in lanes {
            // As QEMU does: nobody knows which kicks the server before has seen.
            lane.ring.kick()?;
        }
        self.lively = Instant::now();
        Ok(())
    }

    fn finish(&mut self, toll: &mut Toll) -> servers::Result<()> {
        self.lanes.iter_mut().for_each(|lane| lane.left = 0);
        while self.in_flight() > 0 && toll.is_good() {
            self.work(toll)?;
        }
        for lane in &mut self.lanes {
            lane.work.read_through();
            lane.left = lane.blocks;
        }
        while (self.in_flight() > 0 || self.lanes.iter().any(|lane| lane.left > 0))
            && toll.is_good()
        {
            self.work(toll)?;
        }
        Ok(())
    }
}

/// One queue and its requests.
struct Lane<'a, V: Virtqueue> {
    ring: &'a Ring,
    queue: V,
    heads: Vec<HeadOf<'a, V>>,
    buffers: Vec<u64>,
    work: Verified,
    blocks: u64,
    /// Of each slot: whether the device has it.
    held: Vec<bool>,
    free: Vec<u16>,
    /// Slots whose requests are to be given again as they are.
    again: Vec<u16>,
    /// Requests that it may still give.
    left: u64,
}

impl<'a, V: Virtqueue> Lane<'a, V> {
    fn new(ring: &'a Ring, queue: V, slots: &'a Slots<V::Form>, work: Verified) -> Self {
        Self {
            ring,
            queue,
            heads: slots.heads().collect(),
            buffers: slots.buffers().iter().map(|buffer| buffer.gpa).collect(),
            work,
            blocks: BLOCKS_EACH * slots.count() as u64,
            held: vec![false; slots.count()],
            free: (0..).take(slots.count()).collect(),
            again: vec![],
            left: u64::MAX,
        }
    }

    fn give(&mut self) -> Result<()> {
        if !self.again.is_empty() {
            self.queue.give(&self.again);
            self.again.clear();
        }
        let count = self.free.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        if count > 0 {
            self.left -= count as u64;
            let slots = self.free.split_off(self.free.len() - count);
            let mut reads = vec![];
            let (heads, queue) = (&self.heads, &mut self.queue);
            self.work.next(&slots, |slot, Io { sector, write }| {
                heads[slot].set_sector(sector);
                heads[slot].set_kind(write);
                queue.set_kind(slot, write);
                if !write {
                    reads.push(slot);
                }
            })?;
            for slot in reads {
                // A read that is not done is not to look like one that is.
                self.ring.ram().write(self.buffers[slot], &[0; 8])?;
            }
            slots.iter().for_each(|slot| self.held[usize::from(*slot)] = true);
            self.queue.give(&slots);
        }
        if self.queue.take_kick() {
            self.ring.kick()?;
        }
        Ok(())
    }

    fn take(&mut self, toll: &mut Toll) -> Result<()> {
        let mut slots = [0; AT_ONCE];
        let count = self.queue.take(&mut slots);
        for slot in &slots[..count] {
            let index = usize::from(*slot);
            let here = format_args!("queue {}, request {index}", self.ring.index());
            if !self.held.get_mut(index).is_some_and(std::mem::take) {
                toll.duplicated += 1;
                toll.note(|| format!("{here}: came back and was not in flight"));
                continue;
            }
            let head = &self.heads[index];
            let status = head.take_status();
            if head.is_unit_attention(status) {
                toll.attentions += 1;
                self.held[index] = true;
                self.again.push(*slot);
                continue;
            }
            self.free.push(*slot);
            toll.completed += 1;
            let is_ok = status == HeadOf::<V>::OK;
            if let Some(complaint) = self.work.done(index, is_ok)? {
                toll.stale += 1;
                toll.note(|| format!("{here}: {complaint}"));
            }
            if status == HeadOf::<V>::UNWRITTEN {
                toll.duplicated += 1;
                toll.note(|| format!("{here}: came back without having been done"));
            } else if !is_ok {
                toll.errors += 1;
                toll.note(|| format!("{here}: {}", head.describe(status)));
            }
        }
        Ok(())
    }
}
