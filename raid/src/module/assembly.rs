//! Arrays that are not online: they wait for members.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::{Arc, Weak};

use bdev::method::Call;
use bdev::{Bdev, Claim, Error, Host, Reservation, life};
use tracing::warn;
use uuid::Uuid;

use super::create::Given;
use super::entry::RaidEntry;
use super::{CREATE, Shared, info_online, write};
use crate::superblock::{MemberState, RESERVED, Superblock};
use crate::{Extent, Level, OptionalMember, RaidDisk, RaidOptions};

/// The size of a member that is not there: the others decide how much is used.
const EMPTY_LEN: u64 = i64::MAX.cast_unsigned();

/// The state that SPDK shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    Configuring,
    /// It was online, and has lost members.
    Offline,
}

/// The bdev that a slot waits for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Wanted {
    /// None: the array works without it.
    Nothing,
    Name(String),
    Uuid(Uuid),
}

/// A member that is there, with the claim on it. It does not keep the bdev alive: nobody tells an
/// array that is not online when a member is deleted.
pub(super) struct Held {
    bdev: Weak<dyn Bdev>,
    pub(super) claim: Claim,
}

impl Held {
    pub(super) fn new(bdev: &Arc<dyn Bdev>, claim: Claim) -> Self {
        Self { bdev: Arc::downgrade(bdev), claim }
    }

    /// The bdev, if it still exists.
    pub(super) fn bdev(&self) -> Option<Arc<dyn Bdev>> {
        self.bdev.upgrade()
    }
}

pub(super) struct AssemblySlot {
    pub(super) wanted: Wanted,
    pub(super) base: Option<Held>,
    /// The UUID in the superblock.
    pub(super) uuid: Uuid,
}

/// An array that is not online.
pub(super) struct Assembly {
    pub(super) name: String,
    pub(super) level: Level,
    /// Of an array that was created and has not been online since: the call.
    pub(super) given: Option<Given>,
    /// The newest superblock.
    pub(super) found: RefCell<Option<Superblock>>,
    pub(super) slots: RefCell<Vec<AssemblySlot>>,
    pub(super) phase: Phase,
    reservation: RefCell<Option<Reservation>>,
    /// It is going online.
    busy: Cell<bool>,
}

/// Resets the flag at the end, also if the start is given up.
struct Busy<'a>(&'a Cell<bool>);

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        self.0.set(false);
    }
}

impl Assembly {
    /// Makes an array of a create call.
    pub(super) fn of_call(
        given: Given,
        slots: Vec<AssemblySlot>,
        reservation: Reservation,
        phase: Phase,
    ) -> Rc<Self> {
        Rc::new(Self {
            name: given.name.clone(),
            level: given.level,
            given: Some(given),
            found: RefCell::default(),
            slots: RefCell::new(slots),
            phase,
            reservation: RefCell::new(Some(reservation)),
            busy: Cell::new(false),
        })
    }

    /// Makes an array of a superblock.
    pub(super) fn of_superblock(
        found: Superblock,
        slots: Vec<AssemblySlot>,
        reservation: Reservation,
        phase: Phase,
    ) -> Rc<Self> {
        Rc::new(Self {
            name: found.name.clone(),
            level: found.level,
            given: None,
            slots: RefCell::new(slots),
            found: RefCell::new(Some(found)),
            phase,
            reservation: RefCell::new(Some(reservation)),
            busy: Cell::new(false),
        })
    }

    /// The slots of a superblock, without bases.
    pub(super) fn slots_of(found: &Superblock) -> Vec<AssemblySlot> {
        let slot = |slot| {
            let member = found.member(slot);
            let uuid = member.map_or(Uuid::nil(), |member| member.uuid);
            let configured = member.is_some_and(|m| m.state == MemberState::Configured);
            let wanted = if configured { Wanted::Uuid(uuid) } else { Wanted::Nothing };
            AssemblySlot { wanted, base: None, uuid }
        };
        (0..usize::from(found.num_base_bdevs)).map(slot).collect()
    }

    /// Replaces the superblock by a newer one. Members that it does not count on are let go.
    pub(super) fn renew(&self, found: Superblock) {
        let mut slots = Self::slots_of(&found);
        let mut before = std::mem::take(&mut *self.slots.borrow_mut());
        for slot in &mut slots {
            let is_it = |other: &&mut AssemblySlot| {
                let uuid = other.base.as_ref().and_then(Held::bdev).map(|bdev| bdev.uuid());
                uuid.is_some_and(|uuid| slot.wanted == Wanted::Uuid(uuid))
            };
            slot.base = before.iter_mut().find(is_it).and_then(|other| other.base.take());
        }
        *self.slots.borrow_mut() = slots;
        *self.found.borrow_mut() = Some(found);
    }

    /// Returns the slot that waits for this bdev.
    pub(super) fn slot_for(&self, bdev: &dyn Bdev) -> Option<usize> {
        let is_it = |slot: &AssemblySlot| {
            slot.base.is_none()
                && match &slot.wanted {
                    Wanted::Nothing => false,
                    Wanted::Name(name) => {
                        name == bdev.name() || Uuid::try_parse(name) == Ok(bdev.uuid())
                    }
                    Wanted::Uuid(uuid) => *uuid == bdev.uuid(),
                }
        };
        self.slots.borrow().iter().position(is_it)
    }

    pub(super) fn set_base(&self, slot: usize, base: Held) {
        if let Some(place) = self.slots.borrow_mut().get_mut(slot) {
            place.base = Some(base);
        }
    }

    /// Lets go of members that were deleted.
    pub(super) fn forget_deleted(&self, host: &dyn Host) {
        let is_there =
            |held: &mut Held| held.bdev().is_some_and(|bdev| host.registry().holds(&bdev));
        let mut gone = vec![];
        for slot in &mut *self.slots.borrow_mut() {
            gone.extend(slot.base.take_if(|held| !is_there(held)));
        }
    }

    pub(super) fn is_complete(&self, host: &dyn Host) -> bool {
        self.forget_deleted(host);
        let there = |slot: &AssemblySlot| slot.wanted == Wanted::Nothing || slot.base.is_some();
        let slots = self.slots.borrow();
        slots.iter().all(there) && slots.iter().any(|slot| slot.base.is_some())
    }

    pub(super) fn has_superblocks(&self) -> bool {
        self.found.borrow().is_some()
    }

    /// The UUID that the array has, or will have.
    pub(super) fn reserved_uuid(&self) -> Option<Uuid> {
        self.reservation.borrow().as_ref().map(|reservation| reservation.uuid)
    }

    pub(super) fn uuid(&self) -> Option<Uuid> {
        let found = self.found.borrow().as_ref().map(|found| found.uuid);
        found.or_else(|| self.given.as_ref()?.uuid)
    }

    /// The members that are there.
    pub(super) fn present(&self) -> Vec<Arc<dyn Bdev>> {
        let slots = self.slots.borrow();
        slots.iter().filter_map(|slot| slot.base.as_ref()?.bdev()).collect()
    }

    /// The call that creates it again. None if it is found by its superblocks.
    pub(super) fn config(&self) -> Option<Call> {
        let given = self.given.as_ref().filter(|_| !self.has_superblocks())?;
        Some(Call { method: CREATE, params: given.params.clone() })
    }

    /// Whether it is going online: then it must not be changed.
    pub(super) fn is_busy(&self) -> bool {
        self.busy.get()
    }

    /// Makes the bdev of a complete array, and writes superblocks. It stays in its list until it is
    /// online: a member that arrives meanwhile must find it.
    ///
    /// # Errors
    /// The members do not fit, or a superblock that is needed cannot be written.
    pub(super) async fn go_online(
        self: &Rc<Self>,
        shared: &Rc<Shared>,
        host: &Rc<dyn Host>,
    ) -> Result<(), Error> {
        if self.busy.replace(true) {
            return Ok(());
        }
        let _ends = Busy(&self.busy);
        self.bring_up(shared, host).await
    }

    async fn bring_up(
        self: &Rc<Self>,
        shared: &Rc<Shared>,
        host: &Rc<dyn Host>,
    ) -> Result<(), Error> {
        let taken = || Error::Busy(format!("{}: the name is taken", self.name));
        let uuid = self.reserved_uuid().ok_or_else(taken)?;
        let disk = self.write_first(host, uuid).await?;
        // A member that was deleted meanwhile may return.
        if !self.is_complete(&**host) {
            return Err(Error::Busy(format!("{}: a member was deleted", self.name)));
        }
        let reservation = self.reservation.borrow_mut().take().ok_or_else(taken)?;
        let bases = std::mem::take(&mut *self.slots.borrow_mut());
        let entry = RaidEntry::new(shared, host, disk, self.given.clone(), bases);
        // The bdev is registered before `add` waits for the first time, and what it waits for may
        // wait for this array.
        shared.forget(self);
        self.busy.set(false);
        life::add(host, reservation, entry).await.map_err(|e| Error::Busy(e.text))?;
        info_online(&self.name);
        Ok(())
    }

    /// Makes the disk, and writes its first superblocks. Members that do not take theirs are left
    /// out.
    async fn write_first(&self, host: &Rc<dyn Host>, uuid: Uuid) -> Result<Arc<RaidDisk>, Error> {
        let mut seq_number = self.first_seq_number();
        loop {
            let disk = RaidDisk::create(self.options(uuid, seq_number)?)?;
            if !disk.array.superblock {
                return Ok(disk);
            }
            let (bytes, members) = {
                let state = disk.array.state();
                let members = state.slots.iter().map(|slot| slot.bdev.clone()).enumerate();
                let members = members.filter_map(|(n, bdev)| Some((n, bdev?)));
                (disk.array.superblock(&state, 0).encode(), members.collect())
            };
            let failed = write(host, &self.name, members, bytes).await?;
            // Should the start fail, the next one counts on.
            if let (Some(found), Some(seq)) = (&mut *self.found.borrow_mut(), seq_number) {
                found.seq_number = seq;
            }
            let Some((_, e)) = failed.first() else { return Ok(disk) };
            self.leave_out(&failed).map_err(|()| {
                Error::Busy(format!("{}: superblocks are not written: {e}", self.name))
            })?;
            seq_number = seq_number.map(|seq| seq.saturating_add(1));
        }
    }

    /// Lets go of members that have failed, unless too few would be left.
    fn leave_out(&self, failed: &[(usize, Error)]) -> Result<(), ()> {
        let mut released = vec![];
        let mut slots = self.slots.borrow_mut();
        let stays = |n: usize| failed.iter().all(|(slot, _)| *slot != n);
        let left = slots.iter().enumerate().filter(|(n, slot)| slot.base.is_some() && stays(*n));
        // A new array needs all of its members.
        if self.found.borrow().is_none() || left.count() < self.level.operational(slots.len()) {
            return Err(());
        }
        for (slot, _) in failed {
            warn!("bdev {}: goes on without the member in slot {slot}", self.name);
            slots[*slot].wanted = Wanted::Nothing;
            released.push(slots[*slot].base.take());
        }
        Ok(())
    }

    fn first_seq_number(&self) -> Option<u64> {
        match &*self.found.borrow() {
            Some(found) => Some(found.seq_number.saturating_add(1)),
            None => self.given.as_ref().filter(|given| given.superblock).map(|_| 1),
        }
    }

    /// The array as it is now.
    fn options(&self, uuid: Uuid, seq_number: Option<u64>) -> Result<RaidOptions, Error> {
        let found = self.found.borrow();
        let slots = self.slots.borrow();
        let used = self.given.as_ref().and_then(|given| given.used);
        let mut members = vec![];
        for (n, slot) in slots.iter().enumerate() {
            let bdev = slot.base.as_ref().and_then(Held::bdev);
            let extent = match (&*found, &bdev) {
                (Some(found), _) => extent_in(found, n, bdev.as_deref())?,
                (None, Some(bdev)) => {
                    let Extent { offset, len } = extent_of(&**bdev, seq_number.is_some())?;
                    Extent { offset, len: len.min(used.unwrap_or(len)) }
                }
                // Of a redundant array: the smallest member decides.
                (None, None) => Extent { offset: 0, len: used.unwrap_or(EMPTY_LEN) },
            };
            members.push(OptionalMember { bdev, uuid: slot.uuid, extent });
        }
        let strip = match (&*found, &self.given) {
            (Some(found), _) => u64::from(found.strip_size) * u64::from(found.block_size),
            (None, Some(given)) => u64::from(given.strip_kb) << 10,
            (None, None) => 0,
        };
        let (name, level) = (self.name.clone(), self.level);
        Ok(RaidOptions { name, uuid, level, strip, members, seq_number })
    }
}

/// The data of a new member.
pub(super) fn extent_of(bdev: &dyn Bdev, superblock: bool) -> Result<Extent, Error> {
    let block = u64::from(bdev.block_size());
    let boundary = u64::from(bdev.topology().optimal_io_blocks).max(1).saturating_mul(block);
    let offset = if superblock { RESERVED.next_multiple_of(boundary.max(block)) } else { 0 };
    let len = bdev.size_bytes().saturating_sub(offset);
    if superblock && bdev.features().read_only {
        return Err(Error::Invalid(format!("{}: is read-only", bdev.name())));
    }
    Ok(Extent { offset, len })
}

/// The data of a member in a superblock, which may be wrong about the bdev.
fn extent_in(found: &Superblock, slot: usize, bdev: Option<&dyn Bdev>) -> Result<Extent, Error> {
    let invalid =
        || Error::Invalid(format!("{}: the member in slot {slot} is too small", found.name));
    let member = found.member(slot).ok_or_else(invalid)?;
    let bytes = |blocks: u64| blocks.checked_mul(u64::from(found.block_size)).ok_or_else(invalid);
    let extent = Extent { offset: bytes(member.data_offset)?, len: bytes(member.data_size)? };
    let end = extent.offset.checked_add(extent.len).ok_or_else(invalid)?;
    let room = |bdev: &dyn Bdev| end <= bdev.size_bytes() && bdev.block_size() == found.block_size;
    // The superblock itself must not be in the data.
    let apart = extent.offset >= Superblock::len(usize::from(found.num_base_bdevs)) as u64;
    (apart && bdev.is_none_or(room)).then_some(extent).ok_or_else(invalid)
}
