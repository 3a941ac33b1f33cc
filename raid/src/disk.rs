//! An array as a bdev.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::time::Duration;

use bdev::{Bdev, Channel, Error, Features, Qos, Stats, Topology, TryTaken, WakeSet};
use rustix::event::{EventfdFlags, eventfd};
use uuid::Uuid;

use crate::array::lane::{Lane, Member};
use crate::array::{Array, LaneCell, Slot, SlotState};
use crate::channel::RaidChannel;
use crate::layout::{Extent, Layout};
use crate::level::Level;
use crate::maintenance::{Command, Maintenance, Pace};

/// How long the deletion of an array waits for its I/O, if no member has a limit.
const DELETION_LIMIT: Duration = Duration::from_secs(30);

/// The parameters of [`RaidDisk::create`].
pub struct RaidOptions {
    /// The bdev's name.
    pub name: String,
    /// The bdev's UUID.
    pub uuid: Uuid,
    /// The level.
    pub level: Level,
    /// Bytes of a strip; 0 for raid1.
    pub strip: u64,
    /// The members by slot, each with the part that holds data. `None`: the member is missing.
    pub members: Vec<OptionalMember>,
    /// The number of the last superblock, if the members have superblocks.
    pub seq_number: Option<u64>,
}

/// A slot of a new array.
pub struct OptionalMember {
    /// The bdev.
    pub bdev: Option<Arc<dyn Bdev>>,
    /// Its UUID, if it is missing.
    pub uuid: Uuid,
    /// The part that holds data.
    pub extent: Extent,
}

/// A bdev on several others.
pub struct RaidDisk {
    pub(crate) array: Arc<Array>,
    features: Features,
    topology: Topology,
    /// Of a redundant array.
    pub(crate) maintenance: Option<Maintenance>,
    stats: Stats,
    qos: Qos,
}

impl RaidDisk {
    /// Makes an array of members whose data is right.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the members do not fit; the system's error.
    pub fn create(options: RaidOptions) -> Result<Arc<Self>, Error> {
        let RaidOptions { name, uuid, level, strip, members, seq_number } = options;
        let present: Vec<_> = members.iter().filter_map(|member| member.bdev.clone()).collect();
        let invalid = |text: &str| Error::Invalid(format!("{name}: {text}"));
        let Some(first) = present.first() else { return Err(invalid("no member is there")) };
        let block_size = first.block_size();
        if present.iter().any(|bdev| bdev.block_size() != block_size) {
            return Err(invalid("the members have blocks of different sizes"));
        }
        let striped = level != Level::Raid1;
        let unit = u64::from(block_size);
        if striped != (strip.is_power_of_two() && strip >= unit) || (!striped && strip != 0) {
            return Err(invalid("the strip size is not valid"));
        }
        if strip > level.strip_max() {
            return Err(invalid("its strips are too large"));
        }
        if present.len() < level.operational(members.len()) || members.len() < level.members_min() {
            return Err(invalid("it has too few members"));
        }
        if members.len() > level.members_max() {
            return Err(invalid("it has too many members"));
        }
        let extents = members.iter().map(|member| member.extent).collect();
        let layout = Layout::new(level, strip, block_size, extents)
            .map_err(|_| invalid("a member is too small, or the array too large"))?;
        let mut features = features(&present);
        // Only whole stripes can be written, and few unmaps are.
        features.unmap &= level != Level::Raid5f;
        let topology = topology(&layout, &present);
        let slots = members.into_iter().map(|OptionalMember { bdev, uuid, .. }| Slot {
            state: if bdev.is_some() { SlotState::InSync } else { SlotState::Absent },
            uuid: bdev.as_ref().map_or(uuid, |bdev| bdev.uuid()),
            bdev,
            has_failed: false,
        });
        let system = |source| Error::System { what: name.clone(), source };
        let slots = slots.collect();
        let array = Array::new(name.clone(), uuid, layout, seq_number, slots).map_err(system)?;
        let array = Arc::new(array);
        let maintenance = level.is_redundant().then(|| Maintenance::start(&array));
        let maintenance = maintenance.transpose().map_err(system)?;
        let (stats, qos) = (Stats::default(), Qos::default());
        Ok(Arc::new(Self { array, features, topology, maintenance, stats, qos }))
    }

    /// Asks for the removal of a member. The receiver gets the result when the member has no I/O of
    /// this array any more.
    pub fn remove_member(&self, slot: usize) -> Receiver<Result<(), Error>> {
        self.ask(|done| Command::Remove { slot, done })
    }

    /// Asks for a member in a free slot, which is rebuilt. The receiver gets the result when the
    /// rebuild has begun.
    pub fn add_member(
        &self,
        slot: usize,
        bdev: Arc<dyn Bdev>,
        pace: Pace,
    ) -> Receiver<Result<(), Error>> {
        self.add_reserved(slot, bdev, pace, Arc::default())
    }

    /// The same. `reserved` is dropped when the slot has the bdev, or will not get it.
    pub(crate) fn add_reserved(
        &self,
        slot: usize,
        bdev: Arc<dyn Bdev>,
        pace: Pace,
        reserved: Arc<()>,
    ) -> Receiver<Result<(), Error>> {
        self.ask(|done| Command::Add { slot, bdev, pace, reserved, done })
    }

    fn ask(
        &self,
        command: impl FnOnce(Sender<Result<(), Error>>) -> Command,
    ) -> Receiver<Result<(), Error>> {
        let (done, result) = mpsc::channel();
        match &self.maintenance {
            Some(maintenance) => maintenance.ask(command(done)),
            None => {
                let text = format!("{}: its level has no redundancy", self.array.name);
                let _ = done.send(Err(Error::Unsupported(text)));
            }
        }
        result
    }

    /// The number of members whose data is right, of a redundant array.
    #[must_use]
    pub fn live_members(&self) -> u32 {
        self.array.live.load(std::sync::atomic::Ordering::Acquire).count_ones()
    }

    pub(crate) fn layout(&self) -> &Layout {
        &self.array.layout
    }

    /// Opens the members' channels, and adds the lane to those of the array.
    fn open_lane(&self, depth: u16) -> Result<Arc<LaneCell>, Error> {
        let array = &self.array;
        let pool = Lane::pool(depth, array.layout.members());
        let system = |source| Error::System { what: array.name.clone(), source };
        loop {
            let (slots, version) = {
                let state = array.state();
                (state.slots.clone(), state.version)
            };
            let wakes = WakeSet::new().map_err(system)?;
            let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
            let signal = eventfd(0, flags).map_err(|e| system(e.into()))?;
            wakes.add([signal.as_fd()]).map_err(system)?;
            let mut members = vec![];
            for slot in &slots {
                members.push(match &slot.bdev {
                    Some(bdev) if slot.state != SlotState::Absent => {
                        Member::open(bdev, pool, &wakes)?
                    }
                    _ => Member::default(),
                });
            }
            // The members may have changed meanwhile.
            let mut state = array.state();
            if state.version == version {
                let lane = Lane::new(Arc::clone(array), members, &state, depth, pool);
                let lane = TryTaken::new(lane);
                let cell = Arc::new(LaneCell { lane, wakes, signal, depth: pool });
                state.open_lanes();
                state.lanes.push(Arc::downgrade(&cell));
                return Ok(cell);
            }
            drop(state);
        }
    }
}

/// What all members support. A member without flush writes through.
fn features(members: &[Arc<dyn Bdev>]) -> Features {
    let of = members.iter().map(|bdev| bdev.features());
    let all = |has: fn(&Features) -> bool| of.clone().all(|features| has(&features));
    let any = |has: fn(&Features) -> bool| of.clone().any(|features| has(&features));
    Features {
        read_only: any(|features| features.read_only),
        flush: any(|features| features.flush),
        unmap: all(|features| features.unmap),
        write_zeroes: all(|features| features.write_zeroes),
        reset: all(|features| features.reset),
        any_alignment: all(|features| features.any_alignment),
    }
}

/// The sizes of the member with the largest physical blocks, and strips as the best size.
fn topology(layout: &Layout, members: &[Arc<dyn Bdev>]) -> Topology {
    let base = members.iter().map(|bdev| bdev.topology());
    let base = base.max_by_key(|topology| topology.physical_block_size).unwrap_or_default();
    let blocks = |bytes: u64| u32::try_from(bytes / u64::from(layout.block_size)).unwrap_or(0);
    match layout.level {
        Level::Raid1 => base,
        Level::Raid0 | Level::Concat => {
            Topology { optimal_io_blocks: blocks(layout.strip), ..base }
        }
        Level::Raid5f => {
            let stripe = blocks(layout.stripe());
            Topology { min_io_blocks: stripe, optimal_io_blocks: stripe, ..base }
        }
    }
}

impl Bdev for RaidDisk {
    fn name(&self) -> &str {
        &self.array.name
    }

    fn product_name(&self) -> &'static str {
        "Raid Volume"
    }

    fn uuid(&self) -> Uuid {
        self.array.uuid
    }

    fn block_size(&self) -> u32 {
        self.array.layout.block_size
    }

    fn num_blocks(&self) -> u64 {
        self.array.layout.size / u64::from(self.array.layout.block_size)
    }

    fn features(&self) -> Features {
        self.features
    }

    fn topology(&self) -> Topology {
        self.topology
    }

    fn bases(&self) -> Vec<Arc<dyn Bdev>> {
        self.array.members()
    }

    /// A member that hangs must not hold up the deletion for ever.
    fn deletion_limit(&self) -> Option<Duration> {
        let of_members = self.bases().iter().filter_map(|base| base.deletion_limit()).max();
        Some(of_members.unwrap_or(DELETION_LIMIT))
    }

    fn stats(&self) -> &Stats {
        &self.stats
    }

    fn qos(&self) -> &Qos {
        &self.qos
    }

    fn open(self: Arc<Self>, depth: u16) -> Result<Box<dyn Channel>, Error> {
        let cell = self.open_lane(depth)?;
        let array = Arc::clone(&self.array);
        Ok(Box::new(RaidChannel::new(self, array, cell, depth)))
    }
}

#[cfg(test)]
mod tests;
