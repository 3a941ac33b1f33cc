//! Finds members among new bdevs: by the name that an array waits for, or by their superblock.

use std::any::Any;
use std::rc::Rc;
use std::sync::{Arc, Weak};
use std::time::Duration;

use bdev::{Aside, Bdev, Claim, ClaimKind, Errno, Host};
use tracing::{error, info, warn};
use uuid::Uuid;

use super::assembly::{Assembly, Held, Phase};
use super::entry::RaidEntry;
use super::members::rejoin;
use super::{NAME, Shared};
use crate::metadata;
use crate::superblock::{Parsed, Superblock};

/// The time in which a bdev must answer the read of its superblock. The call that creates the bdev
/// waits meanwhile.
const LIMIT: Duration = Duration::from_secs(5);

/// Looks for a superblock. `None` if there is none, or the bdev does not answer.
async fn superblock(
    shared: &Rc<Shared>,
    host: &Rc<dyn Host>,
    bdev: &Arc<dyn Bdev>,
) -> Result<Option<Superblock>, Errno> {
    let name = bdev.name();
    if shared.unanswered.has_device_of(bdev) {
        error!("bdev {name}: is not examined: an earlier read of its device has not ended");
        return Err(libc::ETIMEDOUT);
    }
    let token = Arc::new(());
    let held: Weak<dyn Any + Send + Sync> = Arc::downgrade(&token) as _;
    let of_thread = Arc::clone(bdev);
    let work = move || {
        let read = metadata::read(&of_thread);
        drop(of_thread);
        drop(token);
        read
    };
    match Aside::new(name, 1).run(host, LIMIT, work).await {
        Ok(Parsed::None) => Ok(None),
        Ok(Parsed::Valid(superblock)) => Ok(Some(superblock)),
        Ok(Parsed::Invalid(reason)) => {
            warn!("bdev {name}: its RAID superblock is not used: {reason}");
            Ok(None)
        }
        Err(e) => {
            warn!("bdev {name}: is not examined for a RAID superblock: {e}");
            shared.unanswered.add(bdev, &held);
            Err(e.errno())
        }
    }
}

/// Returns the UUID of the array that a bdev is a member of.
///
/// # Errors
/// Its superblock cannot be read.
pub(super) async fn array_of(
    shared: &Rc<Shared>,
    host: &Rc<dyn Host>,
    bdev: &Arc<dyn Bdev>,
) -> Result<Option<Uuid>, Errno> {
    Ok(superblock(shared, host, bdev).await?.map(|found| found.uuid))
}

pub(super) async fn examine(shared: Rc<Shared>, host: &Rc<dyn Host>, bdev: &Arc<dyn Bdev>) {
    let found = superblock(&shared, host, bdev).await;
    let waits =
        |assembly: &Assembly| !assembly.has_superblocks() && assembly.slot_for(&**bdev).is_some();
    shared.idle(host, waits).await;
    if let Some(assembly) = shared.assembly(waits) {
        match found {
            Ok(None) => add(&shared, host, &assembly, bdev).await,
            // Its start has failed after this member had its superblock.
            Ok(Some(own)) if Some(own.uuid) == assembly.reserved_uuid() => {
                add(&shared, host, &assembly, bdev).await;
            }
            Ok(Some(other)) => {
                let (name, array) = (bdev.name(), other.name);
                error!("bdev {}: {name} is not used: it belongs to {array}", assembly.name);
            }
            Err(_) => {}
        }
        return;
    }
    if let Ok(Some(found)) = found {
        add_found(&shared, host, bdev, found).await;
    }
}

/// Uses a bdev with a superblock.
async fn add_found(
    shared: &Rc<Shared>,
    host: &Rc<dyn Host>,
    bdev: &Arc<dyn Bdev>,
    found: Superblock,
) {
    let (name, array) = (bdev.name(), found.name.clone());
    let Some(member) = found.members.iter().find(|member| member.uuid == bdev.uuid()) else {
        info!(
            "bdev {name}: has a superblock of RAID array {array}, but its UUID is none of the members': create it with its earlier UUID"
        );
        return;
    };
    let slot = usize::from(member.slot);
    let of_array = |assembly: &Assembly| assembly.uuid() == Some(found.uuid);
    shared.idle(host, of_array).await;
    let entries = host.registry().entries_of::<RaidEntry>();
    if let Some((_, entry)) = entries.iter().find(|(_, e)| e.disk.array.uuid == found.uuid) {
        return rejoin(host, entry, bdev, &found, slot).await;
    }
    let assembly = match shared.assembly(of_array) {
        Some(assembly) => {
            let newer = |known: &Superblock| found.seq_number > known.seq_number;
            if assembly.found.borrow().as_ref().is_none_or(newer) {
                assembly.renew(found);
            }
            assembly
        }
        None => {
            let reservation = match host.registry().reserve(array.clone(), Some(found.uuid)) {
                Ok(reservation) => reservation,
                Err(_) => {
                    return error!(
                        "bdev {name}: cannot assemble RAID array {array}: its name or UUID is in use"
                    );
                }
            };
            let slots = Assembly::slots_of(&found);
            let phase = Phase::Configuring;
            let assembly = Assembly::of_superblock(found, slots, reservation, phase);
            shared.assemblies.borrow_mut().push(Rc::clone(&assembly));
            assembly
        }
    };
    add(shared, host, &assembly, bdev).await;
}

/// Adds a bdev to an array that waits for it and is not busy. If the array is complete then, it is
/// brought up.
async fn add(
    shared: &Rc<Shared>,
    host: &Rc<dyn Host>,
    assembly: &Rc<Assembly>,
    bdev: &Arc<dyn Bdev>,
) {
    let name = &assembly.name;
    match assembly.slot_for(&**bdev) {
        Some(slot) => {
            let Some(claim) = claim(host, bdev) else { return };
            info!("bdev {name}: member {} is there", bdev.name());
            assembly.set_base(slot, Held::new(bdev, claim));
        }
        None => info!("bdev {name}: {} is not a current member", bdev.name()),
    }
    if assembly.is_complete(&**host)
        && let Err(e) = assembly.go_online(shared, host).await
    {
        error!("bdev {name}: the array cannot go online: {e}");
    }
}

/// Claims a member.
pub(super) fn claim(host: &Rc<dyn Host>, bdev: &Arc<dyn Bdev>) -> Option<Claim> {
    match host.registry().claim(bdev, ClaimKind::WriteExclusive, NAME) {
        Ok(claim) => Some(claim),
        Err(other) => {
            warn!("bdev {}: is not used as a member: {} has claimed it", bdev.name(), other.owner);
            None
        }
    }
}
