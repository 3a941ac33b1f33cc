//! What all channels of an array share, and what its maintenance changes.

pub(crate) mod lane;

use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use bdev::{Bdev, TryTaken, WakeSet, Waker};
use crossbeam_queue::ArrayQueue;
use uuid::Uuid;

use crate::layout::Layout;
use crate::level::MASK_MAX;
use crate::superblock::{MemberState, SuperMember, Superblock};
use lane::Lane;

/// The most ranges that wait for a repair: the I/Os of several guests. Further ones stay as they are,
/// as after a power cut.
const TORN_MAX: usize = 4096;

/// Returns the bit of a member in a mask; 0 if the array is too large for masks, and not redundant.
pub(crate) fn bit(slot: usize) -> u64 {
    u32::try_from(slot).ok().and_then(|slot| 1_u64.checked_shl(slot)).unwrap_or(0)
}

/// Returns the members of a mask, in order.
pub(crate) fn slots_of(mask: u64) -> impl Iterator<Item = usize> {
    (0..MASK_MAX).filter(move |slot| mask & bit(*slot) != 0)
}

/// An array that is online.
pub(crate) struct Array {
    pub(crate) name: String,
    pub(crate) uuid: Uuid,
    pub(crate) layout: Layout,
    /// Whether the members have superblocks.
    pub(crate) superblock: bool,
    /// The members whose data is right. Only of a redundant array, whose channels remove a member
    /// when it fails a write.
    pub(crate) live: AtomicU64,
    /// The members that channels have removed, for the maintenance thread.
    pub(crate) failed: AtomicU64,
    /// Ranges in bytes in which the members may differ, for the maintenance thread.
    pub(crate) torn: ArrayQueue<Range<u64>>,
    /// Failed reads that another member has served.
    pub(crate) read_errors: AtomicU64,
    /// Wakes the maintenance thread.
    pub(crate) waker: Waker,
    state: Mutex<State>,
}

/// Whether a member takes part in I/O.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SlotState {
    /// No bdev, or it is not used any more.
    Absent,
    /// Writes go there behind the window of a rebuild.
    Writing,
    /// Its data is right.
    InSync,
}

/// A slot of an array.
#[derive(Clone)]
pub(crate) struct Slot {
    pub(crate) state: SlotState,
    /// Its bdev. Also while it is not used any more but has I/O outstanding.
    pub(crate) bdev: Option<Arc<dyn Bdev>>,
    /// The bdev's UUID, known also if it is missing.
    pub(crate) uuid: Uuid,
    /// The superblock says that it failed, not that it is missing.
    pub(crate) has_failed: bool,
}

/// The part of an array that changes.
pub(crate) struct State {
    pub(crate) slots: Vec<Slot>,
    /// Counts the changes of `slots`.
    pub(crate) version: u64,
    /// Channels hold the completions of changes.
    pub(crate) hold: bool,
    /// No superblock could be written: channels fail changes.
    pub(crate) failing: bool,
    /// A locked range in bytes: changes of it wait.
    pub(crate) window: Option<Range<u64>>,
    /// Changes below this byte go to the members that are `Writing`.
    pub(crate) copied: u64,
    /// The rebuild under way.
    pub(crate) process: Option<Process>,
    /// The number of the last superblock.
    pub(crate) seq_number: u64,
    pub(crate) lanes: Vec<Weak<LaneCell>>,
}

/// A rebuild, as it is shown.
#[derive(Clone, Copy)]
pub(crate) struct Process {
    pub(crate) slot: usize,
    /// The first byte that was not copied.
    pub(crate) at: u64,
}

/// A channel's state, which its owner and the maintenance thread use in turn.
pub(crate) struct LaneCell {
    pub(crate) lane: TryTaken<Lane>,
    /// The wake fds of all members, and `signal`.
    pub(crate) wakes: WakeSet,
    /// Written by the maintenance thread when the owner has something to do. Never read.
    pub(crate) signal: OwnedFd,
    /// The depth of the members' channels.
    pub(crate) depth: u16,
}

impl LaneCell {
    /// Wakes the channel's owner.
    pub(crate) fn wake_owner(&self) {
        // Fails only if the counter is full, after 2^64 signals.
        let _ = rustix::io::write(&self.signal, &1_u64.to_ne_bytes());
    }
}

impl Array {
    /// Makes an online array. `slots` has the members.
    ///
    /// # Errors
    /// The system has no eventfd left.
    pub(crate) fn new(
        name: String,
        uuid: Uuid,
        layout: Layout,
        seq_number: Option<u64>,
        slots: Vec<Slot>,
    ) -> std::io::Result<Self> {
        let in_sync = |(_, slot): &(usize, &Slot)| slot.state == SlotState::InSync;
        let live = slots.iter().enumerate().filter(in_sync).map(|(n, _)| bit(n)).sum();
        let state = State {
            slots,
            version: 0,
            hold: false,
            failing: false,
            window: None,
            copied: 0,
            process: None,
            seq_number: seq_number.unwrap_or(0),
            lanes: vec![],
        };
        Ok(Self {
            name,
            uuid,
            layout,
            superblock: seq_number.is_some(),
            live: AtomicU64::new(live),
            failed: AtomicU64::new(0),
            torn: ArrayQueue::new(TORN_MAX),
            read_errors: AtomicU64::new(0),
            waker: Waker::new()?,
            state: Mutex::new(state),
        })
    }

    /// The part that changes. Never locked on a reactor; held for a short time only.
    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The members that are in use.
    pub(crate) fn members(&self) -> Vec<Arc<dyn Bdev>> {
        self.state().slots.iter().filter_map(|slot| slot.bdev.clone()).collect()
    }

    /// Returns the superblock for the present state, with `more` as full members.
    pub(crate) fn superblock(&self, state: &State, more: u64) -> Superblock {
        let layout = &self.layout;
        let blocks = |bytes: u64| bytes / u64::from(layout.block_size);
        let members =
            (0_u8..).zip(state.slots.iter().zip(&layout.extents)).map(|(n, (slot, of))| {
                let configured = slot.state == SlotState::InSync || more & bit(n.into()) != 0;
                SuperMember {
                    uuid: slot.uuid,
                    data_offset: blocks(of.offset),
                    data_size: blocks(of.len),
                    state: match slot.has_failed {
                        _ if configured => MemberState::Configured,
                        true => MemberState::Failed,
                        false => MemberState::Missing,
                    },
                    slot: n,
                }
            });
        Superblock {
            uuid: self.uuid,
            name: self.name.clone(),
            raid_size: blocks(layout.size),
            block_size: layout.block_size,
            level: layout.level,
            strip_size: u32::try_from(blocks(layout.strip)).unwrap_or(0),
            seq_number: state.seq_number,
            num_base_bdevs: u8::try_from(layout.members()).unwrap_or(u8::MAX),
            members: members.collect(),
        }
    }

    /// Removes members from `live`, unless too few would be left. Returns whether it has.
    ///
    /// Several reactors may do so at once, each for the member that failed its own write: without
    /// one order of these changes, each could remove the member that the other counts on.
    pub(crate) fn remove_live(&self, slots: u64) -> bool {
        let min = self.layout.level.operational(self.layout.members());
        let rest = |live: u64| {
            let rest = live & !slots;
            (rest.count_ones() as usize >= min).then_some(rest)
        };
        // AcqRel: who finds a member removed also sees what was done before.
        self.live.fetch_update(Ordering::AcqRel, Ordering::Acquire, rest).is_ok()
    }
}

impl State {
    /// The members in one state, as a mask.
    pub(crate) fn mask(&self, state: SlotState) -> u64 {
        let slots = self.slots.iter().enumerate();
        slots.filter(|(_, slot)| slot.state == state).map(|(n, _)| bit(n)).fold(0, |a, b| a | b)
    }

    /// The open channels.
    pub(crate) fn open_lanes(&mut self) -> Vec<Arc<LaneCell>> {
        self.lanes.retain(|lane| lane.strong_count() > 0);
        self.lanes.iter().filter_map(Weak::upgrade).collect()
    }
}
