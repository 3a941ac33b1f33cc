//! Finds stores on new bdevs, and makes and removes the bdevs of their volumes.

use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use bdev::{Aside, Bdev, Claim, ClaimKind, Error, Host, life, with_bases};
use blobstore::BlobId;
use tracing::{debug, error, info, warn};

use super::entry::LvolEntry;
use super::state::{LIMIT, OpenStore, State};
use super::{NAME, show};
use crate::disk::LvolDisk;
use crate::facts::{Facts, VolumeFacts};
use crate::store::LvStore;

/// The time in which a bdev must answer the read of its first block.
const TASTE_LIMIT: Duration = Duration::from_secs(5);

/// Opens the store on a new bdev, if there is one, and makes the bdevs of volumes that had to wait
/// for it as their external snapshot.
pub(super) async fn examine(state: &Rc<State>, host: &Rc<dyn Host>, bdev: &Arc<dyn Bdev>) {
    for store in state.all() {
        let facts = store.facts();
        let waits = |volume: &&VolumeFacts| {
            volume.external.is_some() && volume.external_uuid() == Some(bdev.uuid())
        };
        for volume in facts.volumes.iter().filter(waits) {
            add(host, &store, &facts, volume).await;
        }
    }
    let name = bdev.name();
    if is_on_volume(bdev) {
        return;
    }
    let (aside, tasted) = (Aside::new(name, 1), Arc::clone(bdev));
    match aside.run(host, TASTE_LIMIT, move || LvStore::is_on(&tasted)).await {
        Ok(true) => {}
        Ok(false) => return,
        Err(e) => return warn!("bdev {name}: is not examined for an lvstore: {e}"),
    }
    let claim = match host.registry().claim(bdev, ClaimKind::WriteOne, NAME) {
        Ok(claim) => claim,
        Err(other) => return debug!("bdev {name}: {} uses it", other.owner),
    };
    let loaded = Arc::clone(bdev);
    match aside.run(host, LIMIT, move || LvStore::load(&loaded)).await {
        Ok(Some(store)) => open(state, host, bdev, store, claim).await,
        Ok(None) => {}
        Err(e) => error!("bdev {name}: its lvstore cannot be loaded: {e}"),
    }
}

/// Returns whether a bdev is a volume or built on one. A guest could write a store into its volume,
/// and take the name of a store that is found later, or make stores of any depth.
fn is_on_volume(bdev: &Arc<dyn Bdev>) -> bool {
    with_bases(bdev).iter().any(|bdev| bdev.product_name() == crate::disk::PRODUCT)
}

/// Adds a store that was loaded, and makes the bdevs of its volumes.
async fn open(
    state: &Rc<State>,
    host: &Rc<dyn Host>,
    bdev: &Arc<dyn Bdev>,
    store: LvStore,
    claim: Claim,
) {
    let facts = store.facts();
    let (name, base) = (&facts.store.name, bdev.name());
    let store = OpenStore::new(store, bdev, claim);
    if !host.registry().holds(bdev) || state.named(name).is_some() {
        error!(
            "bdev {base}: its lvstore {name} is not used: another lvstore has this name, or the bdev was removed"
        );
        close(host, &store).await;
        return;
    }
    state.add(Rc::clone(&store));
    info!("lvstore {name} on {base}: {} volumes", facts.volumes.len());
    for volume in &facts.volumes {
        add(host, &store, &facts, volume).await;
    }
}

/// Closes a store.
pub(super) async fn close(host: &Rc<dyn Host>, store: &Rc<OpenStore>) {
    if let Err(e) = store.end(host, LvStore::close).await {
        error!("cannot close an lvstore, which is recovered when it is loaded again: {e}");
    }
    drop(store.claim.take());
}

/// Closes stores at the end of the process, all at the same time. The caller limits the time.
pub(super) async fn close_all(host: Rc<dyn Host>, stores: Vec<Rc<OpenStore>>) {
    let mut left: Vec<_> = stores.iter().map(|store| Box::pin(close(&host, store))).collect();
    std::future::poll_fn(|context| {
        left.retain_mut(|closing| closing.as_mut().poll(context).is_pending());
        if left.is_empty() { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
}

/// Closes the store on a bdev that was removed, and lets go of it as an external snapshot.
pub(super) fn removed(state: &Rc<State>, host: &Rc<dyn Host>, bdev: &Arc<dyn Bdev>) {
    state.copies.stop(bdev);
    for store in state.all() {
        if store.is_on(bdev) && state.remove(&store) {
            info!("lvstore {}: its bdev {} is gone", store.facts().store.name, bdev.name());
            let held = Rc::clone(host);
            host.spawn(Box::pin(async move {
                close(&held, &store).await;
                held.released();
            }));
            continue;
        }
        if !store.store.has_external(bdev) {
            continue;
        }
        // Dropping a channel may wait.
        let (held, of_thread) = (Rc::clone(host), (Arc::clone(&store.store), Arc::clone(bdev)));
        host.spawn(Box::pin(async move {
            held.blocking(move || of_thread.0.remove_external(&of_thread.1)).await;
            held.released();
        }));
    }
}

/// Makes the bdev of a volume, if it has none and can have one. The reason of a failure is in the
/// log.
pub(super) async fn add(
    host: &Rc<dyn Host>,
    store: &Rc<OpenStore>,
    facts: &Facts,
    volume: &VolumeFacts,
) {
    let alias = show::alias(facts, volume);
    match try_add(host, store, facts, volume).await {
        Ok(true) => {}
        Ok(false) => info!("volume {alias}: has no bdev until its external snapshot is there"),
        Err(e) => error!("volume {alias}: has no bdev: {e}"),
    }
}

async fn try_add(
    host: &Rc<dyn Host>,
    store: &Rc<OpenStore>,
    facts: &Facts,
    volume: &VolumeFacts,
) -> Result<bool, Error> {
    let (name, alias) = (show::bdev_name(facts, volume), show::alias(facts, volume));
    let system = |errno| Error::of_errno(name.clone(), errno);
    let mut external = None;
    let mut claim = None;
    if let Some(id) = &volume.external {
        let found = volume.external_uuid().and_then(|uuid| host.registry().bdev(&uuid.to_string()));
        let Some(bdev) = found else { return Ok(false) };
        let claimed = host.registry().claim(&bdev, ClaimKind::ReadMany, NAME);
        let claimed = claimed.map_err(|other| Error::Busy(format!("{} uses it", other.owner)));
        claim = Some(claimed?);
        let (id, reads, of_thread) = (id.clone(), Arc::clone(&bdev), Arc::clone(&store.store));
        host.blocking(move || of_thread.add_external(id, &reads)).await?;
        external = Some(bdev);
    }
    // No other task runs from here on.
    let base = store.base.upgrade().filter(|_| !store.gone.get());
    let base = base.ok_or_else(|| system(libc::ENODEV))?;
    let reserved = host.registry().reserve(name.clone(), volume.uuid).map_err(system)?;
    reserved.set_alias(alias).map_err(system)?;
    let (name, uuid) = (reserved.name.clone(), reserved.uuid);
    let disk = store.store.disk(volume.id, name, uuid, base, external)?;
    let entry = LvolEntry { disk, store: Rc::clone(store), _claim: claim };
    reserved.complete(Rc::new(entry)).map_err(system)?;
    Ok(true)
}

/// Makes the bdev of a new volume. Returns its name.
///
/// # Errors
/// Its bdev cannot be made.
pub(super) async fn add_new(
    host: &Rc<dyn Host>,
    store: &Rc<OpenStore>,
    id: BlobId,
) -> Result<String, Error> {
    let facts = store.facts();
    let none = || Error::NoDevice("the volume is gone".into());
    let volume = facts.volume(id).ok_or_else(none)?;
    if let Err(e) = try_add(host, store, &facts, volume).await {
        // Without a bdev, it could not be used or deleted.
        if let Err(e) = store.run(host, LIMIT, move |store| store.delete(id)).await {
            error!("volume {}: has no bdev, and cannot be deleted: {e}", volume.name);
        }
        return Err(e);
    }
    life::settle(host).await;
    Ok(show::bdev_name(&facts, volume))
}

/// Replaces the bdev of a volume that reads from another external snapshot than before, unless it is
/// in use.
pub(super) async fn renew(host: &Rc<dyn Host>, entry: Rc<LvolEntry>) {
    let (facts, Some(volume)) = entry.facts() else { return };
    let has = entry.disk.bases.get(1).map(|bdev| bdev.uuid());
    if has == volume.external_uuid() || entry.disk.is_open() {
        return;
    }
    let name = show::bdev_name(&facts, &volume);
    let store = Rc::clone(&entry.store);
    drop(entry);
    if let Some(id) = host.registry().id(&name) {
        life::remove_lost(host, &[id]).await;
        add(host, &store, &facts, &volume).await;
        life::settle(host).await;
    }
}

/// Gives the bdevs of a store's volumes the aliases that follow from its present names.
pub(super) fn set_aliases(host: &Rc<dyn Host>, store: &Rc<OpenStore>) {
    let facts = store.facts();
    for (_, entry) in host.registry().entries_of::<LvolEntry>() {
        if !Rc::ptr_eq(&entry.store, store) {
            continue;
        }
        let disk: Arc<LvolDisk> = Arc::clone(&entry.disk);
        if let Some(volume) = facts.volume(disk.id()) {
            let alias = show::alias(&facts, volume);
            let bdev: Arc<dyn Bdev> = disk;
            if host.registry().set_alias(&bdev, Some(alias.clone())).is_err() {
                error!("volume {alias}: another bdev has this name");
            }
        }
    }
}
