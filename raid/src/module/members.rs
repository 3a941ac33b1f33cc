//! `bdev_raid_add_base_bdev`, `bdev_raid_remove_base_bdev`, and members that return.

use std::rc::Rc;
use std::sync::Arc;

use bdev::method::{Answer, DecodeFailure, MethodError, Params};
use bdev::module::Entry;
use bdev::{Aside, Bdev, BdevId, Errno, Error, Features, Host, life};
use serde::Deserialize;
use tracing::{error, info, warn};

use super::assembly::{Assembly, Held};
use super::entry::RaidEntry;
use super::examine::{array_of, claim};
use super::{LIMIT, Shared, online, refused};
use crate::array::SlotState;
use crate::superblock::Superblock;

pub(super) async fn add(shared: Rc<Shared>, host: Rc<dyn Host>, params: Params) -> Answer {
    #[derive(Deserialize)]
    struct Add {
        raid_bdev: String,
        base_bdev: String,
    }
    let Add { raid_bdev, base_bdev } = params.decode(DecodeFailure::INTERNAL)?;
    let what = format!("Failed to add base bdev {base_bdev} to RAID bdev {raid_bdev}");
    shared.idle(&host, |assembly| assembly.name == raid_bdev).await;
    let Some((_, entry)) = online(&*host, &raid_bdev) else {
        // An array that waits for members must not come up with an empty one.
        if shared.assembly(|assembly| assembly.name == raid_bdev).is_some() {
            return Err(refused(&what, libc::EINVAL));
        }
        let text = format!("raid bdev {raid_bdev} is not found in config");
        return Err(MethodError { code: -i64::from(libc::ENODEV), text });
    };
    let bdev = host.registry().bdev(&base_bdev).ok_or_else(|| refused(&what, libc::ENODEV))?;
    if entry.disk.array.state().process.is_some() {
        return Err(MethodError::errno(libc::EPERM));
    }
    let slot = free_slot(&entry, &bdev).ok_or_else(|| refused(&what, libc::EINVAL))?;
    let held = claim(&host, &bdev).ok_or_else(|| refused(&what, libc::EPERM))?;
    // Now, as another call may look for a free slot meanwhile.
    let reserved = entry.reserve(slot, held);
    let added = add_to(&shared, &host, &entry, slot, bdev, reserved).await;
    let Err(errno) = added else { return Ok(true.into()) };
    let released = entry.release_claims();
    drop(entry);
    if released {
        life::settle(&host).await;
    }
    match errno {
        libc::EPERM => Err(MethodError::errno(errno)),
        _ => Err(refused(&what, errno)),
    }
}

/// Adds a bdev to a slot that is reserved for it, unless it is a member of another array.
async fn add_to(
    shared: &Rc<Shared>,
    host: &Rc<dyn Host>,
    entry: &Rc<RaidEntry>,
    slot: usize,
    bdev: Arc<dyn Bdev>,
    reserved: Arc<()>,
) -> Result<(), Errno> {
    let array = &entry.disk.array;
    // A member that was removed from this array may come back.
    if array_of(shared, host, &bdev).await?.is_some_and(|of| of != array.uuid) {
        return Err(libc::EEXIST);
    }
    // It may have been deleted meanwhile.
    if !host.registry().holds(&bdev) {
        return Err(libc::ENODEV);
    }
    start(host, entry, slot, bdev, reserved).await.map_err(|e| {
        error!("bdev {}: the new member is not added: {e}", array.name);
        e.errno()
    })
}

/// The slot for a new member, preferably the one that it had. `None` if it does not fit.
fn free_slot(entry: &RaidEntry, bdev: &Arc<dyn Bdev>) -> Option<usize> {
    let array = &entry.disk.array;
    let fits = bdev.block_size() == array.layout.block_size
        && can_join(entry.disk.features(), bdev.features());
    if !array.layout.level.is_redundant() || !fits {
        return None;
    }
    // First: a member that arrives meanwhile has the slot.
    let reserved: Vec<bool> = (0..array.layout.members()).map(|n| entry.is_reserved(n)).collect();
    let state = array.state();
    let free = |n: usize| {
        let slot = &state.slots[n];
        !reserved[n] && slot.state == SlotState::Absent && slot.bdev.is_none()
    };
    let slots = 0..state.slots.len();
    let own = slots.clone().find(|n| free(*n) && state.slots[*n].uuid == bdev.uuid());
    let slot = own.or_else(|| slots.clone().find(|n| free(*n)))?;
    let extent = array.layout.extents[slot];
    (extent.offset + extent.len <= bdev.size_bytes()).then_some(slot)
}

/// Whether a new member can do what the array does. One that needs flushes is refused if guests
/// were told that the array needs none: their data would not be durable there.
fn can_join(array: Features, new: Features) -> bool {
    !new.read_only
        && (new.unmap || !array.unmap)
        && (new.write_zeroes || !array.write_zeroes)
        && (array.flush || !new.flush)
}

/// Begins a rebuild of a member whose slot is reserved.
async fn start(
    host: &Rc<dyn Host>,
    entry: &Rc<RaidEntry>,
    slot: usize,
    bdev: Arc<dyn Bdev>,
    reserved: Arc<()>,
) -> Result<(), Error> {
    let layout = entry.disk.layout();
    let unit = if layout.strip > 0 { layout.stripe() } else { u64::from(layout.block_size) };
    let pace = Shared::pace(&**host, unit);
    let added = Arc::downgrade(&bdev);
    let result = entry.disk.add_reserved(slot, bdev, pace, reserved);
    let ended = || Err(Error::Busy("the array does not answer".into()));
    let work = move || result.recv_timeout(LIMIT).unwrap_or_else(|_| ended());
    Aside::new(entry.disk.name(), 1).run(host, 2 * LIMIT, work).await?;
    if added.upgrade().is_some_and(|bdev| host.registry().holds(&bdev)) {
        return Ok(());
    }
    // It was deleted before it was a member, and nobody has told the array.
    let is_it = |bdev: &Arc<dyn Bdev>| std::ptr::addr_eq(Arc::as_ptr(bdev), added.as_ptr());
    if let Some(slot) = entry.slot_of(is_it) {
        let result = entry.disk.remove_member(slot);
        entry.wait_for_removal(host, result).await?;
    }
    Err(Error::of_errno("it was deleted", libc::ENODEV))
}

/// Takes a member back that was left out, or removed, with a rebuild.
pub(super) async fn rejoin(
    host: &Rc<dyn Host>,
    entry: &Rc<RaidEntry>,
    bdev: &Arc<dyn Bdev>,
    found: &Superblock,
    slot: usize,
) {
    let (name, array) = (bdev.name(), &entry.disk.array);
    let known = {
        let state = array.state();
        let place = state.slots.get(slot);
        let free = place.is_some_and(|place| {
            place.uuid == bdev.uuid() && place.state == SlotState::Absent && place.bdev.is_none()
        });
        (free, found.seq_number > state.seq_number)
    };
    match known {
        (_, true) => {
            let of = &array.name;
            error!("bdev {of}: {name} has a newer superblock than the array and is not used");
        }
        (true, false) if free_slot(entry, bdev) == Some(slot) => {
            let Some(claim) = claim(host, bdev) else { return };
            let reserved = entry.reserve(slot, claim);
            match start(host, entry, slot, Arc::clone(bdev), reserved).await {
                Ok(()) => info!("bdev {}: {name} is back and is rebuilt", array.name),
                Err(e) => {
                    entry.release_claims();
                    warn!("bdev {}: {name} is not taken back: {e}", array.name);
                }
            }
        }
        _ => info!("bdev {}: {name} is not a current member", array.name),
    }
}

pub(super) async fn remove(shared: Rc<Shared>, host: Rc<dyn Host>, params: Params) -> Answer {
    #[derive(Deserialize)]
    struct Remove {
        name: String,
    }
    let Remove { name } = params.decode(DecodeFailure::INTERNAL)?;
    let is_member = |held: &Held| held.bdev().is_some_and(|bdev| bdev.name() == name);
    let has = |assembly: &Assembly| {
        let slots = assembly.slots.borrow();
        slots.iter().any(|slot| slot.base.as_ref().is_some_and(is_member))
    };
    shared.idle(&host, has).await;
    let entries = host.registry().entries_of::<RaidEntry>().into_iter();
    let mut found = entries.filter_map(|(id, entry)| {
        let slot = entry.slot_of(|bdev| bdev.name() == name)?;
        Some((id, entry, slot))
    });
    if let Some((id, entry, slot)) = found.next() {
        drop(found);
        return remove_from(&host, &params, id, entry, slot).await;
    }
    drop(found);
    let Some(assembly) = shared.assembly(has) else {
        let text = "Failed to remove base bdev from raid bdev".to_owned();
        return Err(MethodError { code: -i64::from(libc::ENODEV), text });
    };
    let mut released = vec![];
    for slot in &mut *assembly.slots.borrow_mut() {
        released.extend(slot.base.take_if(|held| is_member(held)));
    }
    drop(released);
    if assembly.present().is_empty() {
        shared.forget(&assembly);
    }
    drop(assembly);
    life::settle(&host).await;
    Ok(true.into())
}

/// Removes a member of an array that is online, and the array with it if it is needed.
async fn remove_from(
    host: &Rc<dyn Host>,
    params: &Params,
    id: BdevId,
    entry: Rc<RaidEntry>,
    slot: usize,
) -> Answer {
    if entry.can_lose(slot) {
        let result = entry.disk.remove_member(slot);
        let removed = entry.wait_for_removal(host, result).await;
        drop(entry);
        life::settle(host).await;
        removed.map_err(|e| MethodError::of(params.method(), &e))?;
        return Ok(true.into());
    }
    entry.set_lost(slot);
    drop(entry.base_gone());
    // The removal waits until nobody has the bdev.
    drop(entry);
    life::remove(host, params, &[id]).await;
    Ok(true.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_member_that_cannot_do_what_the_array_does_is_refused() {
        let array = Features { flush: false, ..Features::default() };
        let flush = Features { flush: true, ..array };
        assert!(can_join(array, array));
        assert!(!can_join(array, flush), "nobody would flush it");
        assert!(can_join(flush, array), "it writes through");
        assert!(!can_join(Features { unmap: true, ..array }, array));
        assert!(!can_join(Features { write_zeroes: true, ..array }, array));
        assert!(!can_join(array, Features { read_only: true, ..array }));
    }
}
