//! Creation and deletion of bdevs: the common parts of the modules' create and delete methods.

use std::rc::Rc;
use std::sync::Arc;

use tracing::error;

use crate::contract::Bdev;
use crate::control::claims::ClaimKind;
use crate::control::host::{BdevEvent, Host};
use crate::control::method::{Answer, DecodeFailure, MethodError, Named, Params};
use crate::control::module::{Base, Entry, Waiting};
use crate::control::registry::{BdevId, Due, Errno, Reservation};
use crate::error::Error;

/// Registers a new bdev, and creates the bdevs that wait for it.
///
/// # Errors
/// ENODEV if one of its bases was deleted meanwhile.
pub async fn add(
    host: &Rc<dyn Host>,
    reserved: Reservation,
    entry: Rc<dyn Entry>,
) -> Result<(), MethodError> {
    let done = reserved.complete(entry).map_err(MethodError::errno);
    settle(host).await;
    done
}

/// Creates bdevs on a base, now or when the base appears. Returns the names of those created now.
///
/// # Errors
/// EPERM if the base is claimed or a controller serves it; EEXIST if a name or UUID is taken; the
/// module's error if the bdevs cannot be created on an existing base.
pub async fn attach(
    host: &Rc<dyn Host>,
    method: &str,
    waiting: Rc<dyn Waiting>,
) -> Result<Vec<String>, Errno> {
    let registry = host.registry();
    let base = match registry.bdev(waiting.base()) {
        Some(bdev) => Some(claim(host, method, bdev, &*waiting)?),
        None => None,
    };
    let id = registry.add_waiting(Rc::clone(&waiting))?;
    let made = match base {
        Some(base) => wake(host, id, &waiting, base).await,
        None => Ok(vec![]),
    };
    if made.is_err() {
        drop(registry.remove(&[id]));
    }
    // Also after an error: other base bdevs and requests may have arrived meanwhile.
    settle(host).await;
    made.map_err(|e| {
        error!("{method}: {e}");
        e.errno()
    })
}

/// Claims a base for a create call.
fn claim(
    host: &Rc<dyn Host>,
    method: &str,
    bdev: Arc<dyn Bdev>,
    waiting: &dyn Waiting,
) -> Result<Base, Errno> {
    match host.registry().claim(&bdev, waiting.claims(), waiting.module()) {
        Ok(claim) => Ok(Base { bdev, claim }),
        Err(other) => {
            if other.kind == ClaimKind::Served {
                // Another bdev on it would write to the same blocks. Loading such a configuration
                // could not create the controller.
                let (name, controller) = (bdev.name(), other.owner);
                error!("{method}: bdev {name} is in use: controller {controller} serves it");
            }
            Err(libc::EPERM)
        }
    }
}

/// Lets a waiting request create its bdevs, and registers them.
async fn wake(
    host: &Rc<dyn Host>,
    id: BdevId,
    waiting: &Rc<dyn Waiting>,
    base: Base,
) -> Result<Vec<String>, Error> {
    let _under_way = host.registry().examining();
    let made = Rc::clone(waiting).wake(host, base).await?;
    host.registry()
        .come_to_life(id, &made)
        .map_err(|errno| Error::of_errno(waiting.name().unwrap_or(waiting.base()), errno))?;
    Ok(made.iter().map(|entry| entry.bdev().name().to_owned()).collect())
}

/// Creates all bdevs that can be created: those of waiting requests whose base exists, and those
/// that the modules find on new bdevs. Must be called after a bdev was added or a claim was
/// released.
pub async fn settle(host: &Rc<dyn Host>) {
    let registry = host.registry();
    loop {
        if let Some(due) = registry.next_to_wake() {
            wake_due(host, due).await;
        } else if let Some(bdev) = registry.next_to_examine() {
            let _under_way = registry.examining();
            for module in host.modules() {
                module.examine(host, &bdev).await;
            }
        } else {
            break;
        }
    }
    for name in registry.take_new() {
        host.bdev_event(BdevEvent::Registered, &name);
    }
    registry.changed();
    // This function held bdevs meanwhile.
    host.released();
}

async fn wake_due(host: &Rc<dyn Host>, Due { id, waiting, base }: Due) {
    let registry = host.registry();
    let woken = match registry.claim(&base, waiting.claims(), waiting.module()) {
        Ok(claim) => wake(host, id, &waiting, Base { bdev: Arc::clone(&base), claim }).await,
        Err(other) => Err(Error::Busy(format!("the base is claimed by {}", other.owner))),
    };
    if let Err(e) = woken {
        error!("bdev {}: {e}", waiting.name().unwrap_or(waiting.base()));
        registry.refuse(id, &base);
    }
}

/// Deletes a bdev of this module and the bdevs on it. Returns when they have no user any more.
///
/// # Errors
/// ENODEV if it does not exist, or belongs to another module.
pub async fn delete(host: Rc<dyn Host>, params: Params, module: &str) -> Answer {
    let named: Named = params.decode(DecodeFailure::INTERNAL)?;
    let Some(id) = host.registry().of_module(&named.name, module) else {
        error!("{}: no {module} bdev has this name: {:?}", params.method(), named.name);
        return Err(MethodError::errno(libc::ENODEV));
    };
    remove(&host, &params, &[id]).await;
    Ok(true.into())
}

/// Deletes these bdevs, the bdevs on them, and the waiting requests with these ids. Returns when
/// the bdevs have no user any more.
pub async fn remove(host: &Rc<dyn Host>, params: &Params, ids: &[BdevId]) {
    // The names are free. The I/O of guests may take long.
    remove_then(host, ids, || params.let_next_start()).await;
}

/// The same for bdevs whose device is gone.
pub async fn remove_lost(host: &Rc<dyn Host>, ids: &[BdevId]) {
    remove_then(host, ids, || {}).await;
}

/// Deletes bdevs, and calls `names_free` before it waits for their users.
async fn remove_then(host: &Rc<dyn Host>, ids: &[BdevId], names_free: impl FnOnce()) {
    let registry = host.registry();
    let bdevs = registry.remove(ids);
    for bdev in &bdevs {
        host.modules().iter().for_each(|module| module.removed(host, bdev));
    }
    // The bases are released now, and other requests may wait for them.
    settle(host).await;
    names_free();
    let names: Vec<String> = bdevs.iter().map(|bdev| bdev.name().to_owned()).collect();
    host.retire(bdevs).await;
    for name in names {
        host.bdev_event(BdevEvent::Unregistered, &name);
    }
}

/// Tells all users of a bdev, and of the bdevs on it, that its size has changed.
pub fn resized(host: &Rc<dyn Host>, bdev: &Arc<dyn Bdev>) {
    for bdev in host.registry().resized(bdev) {
        host.bdev_event(BdevEvent::Resized, bdev.name());
        host.bdev_resized(&bdev);
    }
}

#[cfg(test)]
mod tests;
