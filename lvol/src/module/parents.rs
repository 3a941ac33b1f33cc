//! The methods that change the parent of a volume.

use std::rc::Rc;
use std::sync::Arc;

use bdev::method::{Answer, DecodeFailure, Method, MethodError, Params, strerror};
use bdev::{Bdev, ClaimKind, Error, Host, with_bases};
use serde::Deserialize;
use tracing::error;

use super::entry::LvolEntry;
use super::state::{COPY_LIMIT, LIMIT, State};
use super::stores::late;
use super::volumes::{Two, check_external, find, named};
use super::{LvolModule, NAME, examine};
use crate::disk::LvolDisk;
use crate::store::LvStore;

pub(super) fn methods(module: &LvolModule) -> Vec<Method> {
    vec![
        module.method("bdev_lvol_inflate", named, inflate),
        module.method("bdev_lvol_decouple_parent", named, decouple),
        module.method("bdev_lvol_set_parent", parse_parent, set_parent),
        module.method("bdev_lvol_set_parent_bdev", parse_parent, set_parent_bdev),
    ]
}

async fn inflate(_: Rc<State>, host: Rc<dyn Host>, name: String) -> Answer {
    let entry = find(&host, &name)?;
    let id = entry.disk.id();
    let done = entry.store.run(&host, COPY_LIMIT, move |store| store.inflate(id)).await;
    done.map_err(|e| late("bdev_lvol_inflate", &e))?;
    examine::renew(&host, entry).await;
    Ok(true.into())
}

async fn decouple(_: Rc<State>, host: Rc<dyn Host>, name: String) -> Answer {
    let entry = find(&host, &name)?;
    let id = entry.disk.id();
    let done = entry.store.run(&host, COPY_LIMIT, move |store| store.decouple(id)).await;
    done.map_err(|e| late("bdev_lvol_decouple_parent", &e))?;
    examine::renew(&host, entry).await;
    Ok(true.into())
}

fn parse_parent(params: &Params) -> Result<Two, MethodError> {
    #[derive(Deserialize)]
    struct Given {
        lvol_name: String,
        parent_name: String,
    }
    let Given { lvol_name: of, parent_name: new } = params.decode(DecodeFailure::INTERNAL)?;
    Ok(Two { of, new })
}

/// Refuses to give a volume in use another external snapshot, or its first: its channels do not
/// have it.
fn check_use(method: &str, entry: &LvolEntry, reads_external: bool) -> Result<(), MethodError> {
    let has = entry.disk.bases.len() > 1;
    if entry.disk.is_open() && (reads_external || has) {
        error!("{method}: {}: it is in use", entry.disk.name());
        return Err(MethodError::invalid_params(strerror(libc::EBUSY)));
    }
    Ok(())
}

async fn set_parent(_: Rc<State>, host: Rc<dyn Host>, Two { of, new }: Two) -> Answer {
    const METHOD: &str = "bdev_lvol_set_parent";
    let (entry, parent) = (find(&host, &of)?, find(&host, &new)?);
    if !Rc::ptr_eq(&entry.store, &parent.store) {
        return Err(MethodError::invalid_params(strerror(libc::EINVAL)));
    }
    let (id, parent_id) = (entry.disk.id(), parent.disk.id());
    check_use(METHOD, &entry, parent.disk.bases.len() > 1)?;
    drop(parent);
    let operation = move |store: &LvStore| store.set_parent(id, parent_id);
    entry.store.run(&host, LIMIT, operation).await.map_err(|e| late(METHOD, &e))?;
    examine::renew(&host, entry).await;
    Ok(true.into())
}

/// Returns whether a bdev is this volume, or built on it.
fn is_on(bdev: &Arc<dyn Bdev>, disk: &Arc<LvolDisk>) -> bool {
    with_bases(bdev).iter().any(|bdev| std::ptr::addr_eq(Arc::as_ptr(bdev), Arc::as_ptr(disk)))
}

async fn set_parent_bdev(_: Rc<State>, host: Rc<dyn Host>, Two { of, new }: Two) -> Answer {
    const METHOD: &str = "bdev_lvol_set_parent_bdev";
    let entry = find(&host, &of)?;
    let none = || MethodError::invalid_params(strerror(libc::ENODEV));
    let bdev = host.registry().bdev(&new).ok_or_else(none)?;
    let same_size = bdev.size_bytes() == entry.disk.size_bytes();
    if !same_size || is_on(&bdev, &entry.disk) {
        error!("{METHOD}: {new}: it is the volume itself or on it, or has another size");
        return Err(MethodError::invalid_params(strerror(libc::EINVAL)));
    }
    check_external(METHOD, &entry.store, &*bdev)?;
    check_use(METHOD, &entry, true)?;
    let claimed = host.registry().claim(&bdev, ClaimKind::ReadMany, NAME);
    let _claim = claimed.map_err(|other| {
        late(METHOD, &Error::Busy(format!("bdev {new}: {} uses it", other.owner)))
    })?;
    let (id, external) = (entry.disk.id(), bdev.uuid());
    drop(bdev);
    let operation = move |store: &LvStore| store.set_external_parent(id, external);
    entry.store.run(&host, LIMIT, operation).await.map_err(|e| late(METHOD, &e))?;
    examine::renew(&host, entry).await;
    Ok(true.into())
}
