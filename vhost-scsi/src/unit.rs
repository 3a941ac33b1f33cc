//! The logical unit of a bdev. All targets that show the bdev share it, so that a reservation made
//! through one of them holds for all.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use bdev::{Bdev, Grace, Period};
use scsi::{Facts, Identity, LogicalUnit, Range};

/// SCSI devices in the process, as in SPDK.
pub(crate) const DEVICES_MAX: u16 = 1024;

/// The logical units of the process, and the numbers of its SCSI devices.
#[derive(Debug, Default)]
pub struct Units {
    units: Mutex<Vec<Weak<Unit>>>,
    devices: Mutex<BTreeSet<u16>>,
}

impl Units {
    /// Returns the logical unit of a bdev.
    pub(crate) fn of(&self, bdev: &Arc<dyn Bdev>) -> Arc<Unit> {
        let mut units = self.units.lock().unwrap_or_else(PoisonError::into_inner);
        units.retain(|unit| unit.strong_count() > 0);
        let known = units.iter().filter_map(Weak::upgrade);
        if let Some(unit) = known.into_iter().find(|unit| Arc::ptr_eq(&unit.bdev, bdev)) {
            return unit;
        }
        let unit = Arc::new(Unit::new(bdev));
        units.push(Arc::downgrade(&unit));
        unit
    }

    /// Returns all logical units.
    pub(crate) fn all(&self) -> Vec<Arc<Unit>> {
        let units = self.units.lock().unwrap_or_else(PoisonError::into_inner);
        units.iter().filter_map(Weak::upgrade).collect()
    }

    /// Returns the lowest free number of a SCSI device. `None` if there are too many.
    pub(crate) fn device(self: &Arc<Self>) -> Option<DeviceNumber> {
        let mut devices = self.devices.lock().unwrap_or_else(PoisonError::into_inner);
        let number = (0..DEVICES_MAX).find(|number| !devices.contains(number))?;
        devices.insert(number);
        Some(DeviceNumber { number, units: Arc::clone(self) })
    }
}

/// The number of a SCSI device in the process. It is free again when this is dropped.
#[derive(Debug)]
pub(crate) struct DeviceNumber {
    pub(crate) number: u16,
    units: Arc<Units>,
}

impl Drop for DeviceNumber {
    fn drop(&mut self) {
        let devices = self.units.devices.lock();
        devices.unwrap_or_else(PoisonError::into_inner).remove(&self.number);
    }
}

/// The logical unit of a bdev.
pub(crate) struct Unit {
    bdev: Arc<dyn Bdev>,
    state: Mutex<State>,
    /// Changes after each change of a gate, of the facts, or of the exclusive range.
    generation: AtomicU64,
    /// The exclusive command has ended. The next thread that locks the unit clears its range.
    exclusive_ended: AtomicBool,
    /// Counts the commands at work that change blocks, except exclusive ones.
    writes: Grace,
}

impl std::fmt::Debug for Unit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Unit({})", self.bdev.name())
    }
}

/// What the lock of a logical unit protects.
#[derive(Debug)]
pub(crate) struct State {
    pub(crate) logical_unit: LogicalUnit,
    /// The blocks that no other command may change now.
    exclusive: Option<Range>,
}

/// A logical unit that is locked. Other threads see the changes when it is unlocked.
pub(crate) struct Locked<'u> {
    unit: &'u Unit,
    state: MutexGuard<'u, State>,
    before: (u64, Option<Range>),
}

impl std::ops::Deref for Locked<'_> {
    type Target = State;

    fn deref(&self) -> &State {
        &self.state
    }
}

impl std::ops::DerefMut for Locked<'_> {
    fn deref_mut(&mut self) -> &mut State {
        &mut self.state
    }
}

impl Drop for Locked<'_> {
    fn drop(&mut self) {
        if self.state.version() != self.before {
            self.unit.changed();
        }
    }
}

impl Locked<'_> {
    /// Returns the unit's generation after this lock, if nothing else changes it.
    pub(crate) fn next_generation(&self) -> u64 {
        let changes = self.state.version() != self.before;
        self.unit.generation().wrapping_add(changes.into())
    }
}

impl State {
    fn version(&self) -> (u64, Option<Range>) {
        (self.logical_unit.generation(), self.exclusive)
    }

    /// Returns whether an exclusive command is at work.
    pub(crate) fn has_exclusive(&self) -> bool {
        self.exclusive.is_some()
    }

    /// Returns whether a command that changes `range` has to wait for an exclusive command.
    pub(crate) fn excludes(&self, range: Range) -> bool {
        let overlaps = |other: Range| {
            range.lba < other.lba.saturating_add(other.blocks)
                && other.lba < range.lba.saturating_add(range.blocks)
        };
        self.exclusive.is_some_and(overlaps)
    }

    /// Begins to exclude other commands from `range`. Returns false if another command is
    /// exclusive. The caller then waits for the commands that have begun: [`Unit::has_drained`].
    pub(crate) fn begin_exclusive(&mut self, range: Range) -> bool {
        let begins = self.exclusive.is_none();
        if begins {
            self.exclusive = Some(range);
        }
        begins
    }
}

impl Unit {
    fn new(bdev: &Arc<dyn Bdev>) -> Self {
        let state = State { logical_unit: LogicalUnit::new(facts(&**bdev)), exclusive: None };
        let writes = Grace::default();
        Self {
            bdev: Arc::clone(bdev),
            state: Mutex::new(state),
            generation: AtomicU64::new(1),
            exclusive_ended: AtomicBool::new(false),
            writes,
        }
    }

    /// Returns the bdev.
    pub(crate) fn bdev(&self) -> &Arc<dyn Bdev> {
        &self.bdev
    }

    /// Returns the counter of the commands at work that change blocks.
    pub(crate) fn writes(&self) -> &Grace {
        &self.writes
    }

    /// Returns the generation of gates and facts.
    #[inline]
    pub(crate) fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    fn changed(&self) {
        // Release: a thread that sees the new generation locks the unit and sees the change.
        self.generation.fetch_add(1, Ordering::Release);
    }

    /// Ends the exclusive command, which the caller has begun. Does not wait for the lock.
    pub(crate) fn end_exclusive(&self) {
        // Release: what the command has written comes before.
        self.exclusive_ended.store(true, Ordering::Release);
        self.changed();
    }

    fn locked<'u>(&'u self, mut state: MutexGuard<'u, State>) -> Locked<'u> {
        if self.exclusive_ended.swap(false, Ordering::AcqRel) {
            state.exclusive = None;
        }
        let before = state.version();
        Locked { unit: self, state, before }
    }

    /// Locks the unit. May wait, so not for reactors. Whoever holds the lock does bounded work.
    pub(crate) fn lock(&self) -> Locked<'_> {
        self.locked(self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Locks the unit if no other thread has locked it. Does not wait.
    pub(crate) fn try_lock(&self) -> Option<Locked<'_>> {
        match self.state.try_lock() {
            Ok(state) => Some(self.locked(state)),
            Err(std::sync::TryLockError::Poisoned(state)) => Some(self.locked(state.into_inner())),
            Err(std::sync::TryLockError::WouldBlock) => None,
        }
    }

    /// Returns whether all commands have ended that had begun to change blocks before
    /// [`State::begin_exclusive`]. Does not wait.
    pub(crate) fn has_drained(&self, period: &mut Period) -> bool {
        self.writes.poll(period)
    }

    /// Takes over the bdev's size. Returns whether it has changed.
    pub(crate) fn resized(&self) -> bool {
        let blocks = self.bdev.num_blocks().max(1);
        let mut state = self.lock();
        let changed = state.logical_unit.facts().blocks != blocks;
        if changed {
            state.logical_unit.resized(blocks);
        }
        changed
    }
}

/// Returns the facts about a bdev.
fn facts(bdev: &dyn Bdev) -> Facts {
    let identity = Identity::of(bdev.product_name(), bdev.name());
    let block_bytes = bdev.block_size();
    let (features, topology) = (bdev.features(), bdev.topology().settled(block_bytes));
    let facts = Facts::new(block_bytes, bdev.num_blocks(), identity);
    let unmap = features.unmap.then(|| facts.default_unmap());
    // Both sizes are powers of two.
    let physical_exponent = (topology.physical_block_size / block_bytes).trailing_zeros();
    Facts {
        physical_exponent: u8::try_from(physical_exponent).unwrap_or(0).min(15),
        unmap,
        read_only: features.read_only,
        write_cache: features.flush,
        ..facts
    }
}

#[cfg(test)]
mod tests {
    use bdev::{Null, NullOptions};

    use super::*;

    fn null(name: &str) -> Arc<dyn Bdev> {
        let options =
            NullOptions { name: name.into(), num_blocks: 64, block_size: 512, uuid: None };
        Null::create(options).unwrap()
    }

    #[test]
    fn targets_of_one_bdev_share_a_unit() {
        let units = Units::default();
        let (one, other) = (null("n"), null("n"));
        let unit = units.of(&one);
        assert!(Arc::ptr_eq(&unit, &units.of(&one)));
        assert!(!Arc::ptr_eq(&unit, &units.of(&other)));
        drop(unit);
        assert_eq!(units.units.lock().unwrap().iter().filter(|u| u.strong_count() > 0).count(), 0);
    }

    #[test]
    fn numbers_of_devices_are_reused() {
        let units = Arc::new(Units::default());
        let numbers: Vec<_> = (0..DEVICES_MAX).map(|_| units.device().unwrap()).collect();
        assert!(units.device().is_none());
        assert_eq!(numbers[7].number, 7);
        drop(numbers);
        assert_eq!(units.device().unwrap().number, 0);
    }

    #[test]
    fn one_command_is_exclusive_at_a_time() {
        let unit = Units::default().of(&null("n"));
        let before = unit.generation();
        let range = Range { lba: 8, blocks: 8 };
        assert!(unit.lock().begin_exclusive(range));
        assert_ne!(unit.generation(), before, "queues look again");
        let state = unit.lock();
        for (lba, blocks, excluded) in [(0, 8, false), (0, 9, true), (15, 1, true), (16, 9, false)]
        {
            assert_eq!(state.excludes(Range { lba, blocks }), excluded, "{lba} {blocks}");
        }
        assert!(unit.try_lock().is_none(), "locked");
        drop(state);
        assert!(!unit.lock().begin_exclusive(range));
        unit.end_exclusive();
        assert!(unit.lock().begin_exclusive(range));
    }
}
