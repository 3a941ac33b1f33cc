//! `bdev_raid_add_base_bdev`, `bdev_raid_remove_base_bdev`, and members that return.

use std::rc::Rc;
use std::sync::Arc;

use bdev::method::{Answer, DecodeFailure, MethodError, Params};
use bdev::module::Entry;
use bdev::{Aside, Bdev, BdevId, Claim, Error, Host, life};
use serde::Deserialize;
use tracing::{error, info, warn};

use super::assembly::Held;
use super::entry::RaidEntry;
use super::examine::{array_of, claim};
use super::{LIMIT, Shared, online, refused};
use crate::array::{Slot, SlotState};
use crate::superblock::Superblock;

pub(super) async fn add(shared: Rc<Shared>, host: Rc<dyn Host>, params: Params) -> Answer {
    #[derive(Deserialize)]
    struct Add {
        raid_bdev: String,
        base_bdev: String,
    }
    let Add { raid_bdev, base_bdev } = params.decode(DecodeFailure::INTERNAL)?;
    let what = format!("Failed to add base bdev {base_bdev} to RAID bdev {raid_bdev}");
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
    let of = array_of(&shared, &host, &bdev).await.map_err(|errno| refused(&what, errno))?;
    // A member that was removed from this array may come back.
    if of.is_some_and(|of| of != entry.disk.array.uuid) {
        return Err(refused(&what, libc::EEXIST));
    }
    match start(&host, &entry, slot, bdev, held).await {
        Ok(()) => Ok(true.into()),
        Err(e) if e.errno() == libc::EPERM => Err(MethodError::of(params.method(), &e)),
        Err(e) => {
            error!("{what}: {e}");
            Err(refused(&what, e.errno()))
        }
    }
}

/// The slot for a new member, preferably the one that it had. `None` if it does not fit.
fn free_slot(entry: &RaidEntry, bdev: &Arc<dyn Bdev>) -> Option<usize> {
    let (array, features) = (&entry.disk.array, bdev.features());
    let of_array = entry.disk.features();
    let fits = bdev.block_size() == array.layout.block_size
        && !features.read_only
        && (features.unmap || !of_array.unmap)
        && (features.write_zeroes || !of_array.write_zeroes);
    if !array.layout.level.is_redundant() || !fits {
        return None;
    }
    let free = |slot: &Slot| slot.state == SlotState::Absent && slot.bdev.is_none();
    let state = array.state();
    let own = state.slots.iter().position(|slot| free(slot) && slot.uuid == bdev.uuid());
    let slot = own.or_else(|| state.slots.iter().position(free))?;
    let extent = array.layout.extents[slot];
    (extent.offset + extent.len <= bdev.size_bytes()).then_some(slot)
}

/// Begins a rebuild.
async fn start(
    host: &Rc<dyn Host>,
    entry: &Rc<RaidEntry>,
    slot: usize,
    bdev: Arc<dyn Bdev>,
    claim: Claim,
) -> Result<(), Error> {
    let layout = entry.disk.layout();
    let unit = if layout.strip > 0 { layout.stripe() } else { u64::from(layout.block_size) };
    let result = entry.disk.add_member(slot, bdev, Shared::pace(&**host, unit));
    entry.set_claim(slot, claim);
    let ended = || Err(Error::Busy("the array does not answer".into()));
    let work = move || result.recv_timeout(LIMIT).unwrap_or_else(|_| ended());
    Aside::new(entry.disk.name(), 1).run(host, 2 * LIMIT, work).await
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
            error!("bdev {of}: {name} was changed after the array and is not used");
        }
        (true, false) if free_slot(entry, bdev) == Some(slot) => {
            let Some(claim) = claim(host, bdev) else { return };
            match start(host, entry, slot, Arc::clone(bdev), claim).await {
                Ok(()) => info!("bdev {}: {name} is back and is rebuilt", array.name),
                Err(e) => warn!("bdev {}: {name} is not taken back: {e}", array.name),
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
    let is_member = |held: &Held| held.bdev().is_some_and(|bdev| bdev.name() == name);
    let has = |slot: &super::assembly::AssemblySlot| slot.base.as_ref().is_some_and(is_member);
    let Some(assembly) = shared.assembly(|assembly| assembly.slots.borrow().iter().any(has)) else {
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
