//! The methods on volumes.

use std::rc::Rc;
use std::sync::Arc;

use bdev::method::{Answer, DecodeFailure, Method, MethodError, Named, Params, strerror};
use bdev::{Bdev, ClaimKind, Error, Host, life};
use blobstore::BlobId;
use blobstore::lvs::{NewVolume, check_name};
use serde::Deserialize;
use tracing::error;
use uuid::Uuid;

use super::entry::LvolEntry;
use super::state::{LIMIT, OpenStore, Selector, State};
use super::stores::late;
use super::{LvolModule, NAME, examine};

pub(super) fn methods(module: &LvolModule) -> Vec<Method> {
    vec![
        module.method("bdev_lvol_create", parse_create, create),
        module.method("bdev_lvol_snapshot", parse_snapshot, snapshot),
        module.method("bdev_lvol_clone", parse_clone, clone),
        module.method("bdev_lvol_clone_bdev", parse_clone_bdev, clone_bdev),
        module.method("bdev_lvol_rename", parse_rename, rename),
        module.method("bdev_lvol_resize", parse_resize, resize),
        module.method("bdev_lvol_set_read_only", named, set_read_only),
        module.method("bdev_lvol_delete", named, delete),
    ]
}

/// Decodes the name of a volume.
pub(super) fn named(params: &Params) -> Result<String, MethodError> {
    let Named { name } = params.decode(DecodeFailure::INTERNAL)?;
    Ok(name)
}

/// Finds a volume by its bdev's name, alias or UUID.
///
/// # Errors
/// ENODEV if there is none.
pub(super) fn find(host: &Rc<dyn Host>, name: &str) -> Result<Rc<LvolEntry>, MethodError> {
    host.registry().entry(name).ok_or_else(|| MethodError::errno(libc::ENODEV))
}

/// The number of clusters of a size in MiB.
fn clusters(size_in_mib: u64, cluster_size: u64) -> Result<u64, MethodError> {
    let bytes = size_in_mib.checked_mul(1 << 20);
    let bytes = bytes.ok_or_else(|| MethodError::errno(libc::EINVAL))?;
    Ok(bytes.div_ceil(cluster_size))
}

/// Returns whether a volume of the store has this name, or a bdev the alias that it would have.
fn is_taken(host: &Rc<dyn Host>, store: &OpenStore, name: &str) -> bool {
    let facts = store.facts();
    let alias = format!("{}/{name}", facts.store.name);
    facts.volumes.iter().any(|volume| volume.name == name) || host.registry().is_taken(&alias)
}

/// -32602 if the name of a new volume is taken.
fn check_name_of_new(
    host: &Rc<dyn Host>,
    store: &OpenStore,
    name: &str,
) -> Result<(), MethodError> {
    if is_taken(host, store, name) {
        return Err(MethodError::invalid_params(strerror(libc::EEXIST)));
    }
    Ok(())
}

/// Makes the bdev of a new volume, and answers with its name.
async fn made(
    method: &str,
    host: &Rc<dyn Host>,
    store: &Rc<OpenStore>,
    id: Result<BlobId, Error>,
) -> Answer {
    let id = id.map_err(|e| late(method, &e))?;
    let name = examine::add_new(host, store, id).await.map_err(|e| late(method, &e))?;
    Ok(name.into())
}

struct Create {
    name: String,
    size_in_mib: u64,
    thin: bool,
    clear: super::stores::Given,
    store: Selector,
}

fn parse_create(params: &Params) -> Result<Create, MethodError> {
    #[derive(Deserialize)]
    struct Given {
        lvol_name: String,
        size_in_mib: u64,
        #[serde(default)]
        thin_provision: bool,
        uuid: Option<String>,
        lvs_name: Option<String>,
        #[serde(default)]
        clear_method: super::stores::Given,
    }
    let p: Given = params.decode(DecodeFailure::INTERNAL)?;
    let store = Selector { uuid: p.uuid, name: p.lvs_name };
    let (name, thin, clear) = (p.lvol_name, p.thin_provision, p.clear_method);
    Ok(Create { name, size_in_mib: p.size_in_mib, thin, clear, store })
}

async fn create(state: Rc<State>, host: Rc<dyn Host>, given: Create) -> Answer {
    const METHOD: &str = "bdev_lvol_create";
    let store = state.select(&given.store)?;
    let clusters = clusters(given.size_in_mib, store.facts().store.cluster_size)?;
    if check_name(&given.name).is_err() {
        error!("{METHOD}: a name has 1 to 63 bytes: {:?}", given.name);
        return Err(MethodError::errno(libc::EINVAL));
    }
    if is_taken(&host, &store, &given.name) {
        return Err(MethodError::errno(libc::EEXIST));
    }
    let operation = move |store: &crate::LvStore| {
        let (thin, clear) = (given.thin, given.clear.clear());
        let new = NewVolume { name: &given.name, uuid: Uuid::new_v4(), clusters, thin, clear };
        store.create_volume(&new)
    };
    let id = store.run(&host, LIMIT, operation).await;
    made(METHOD, &host, &store, id).await
}

/// The name of a volume, and that of a new one.
pub(super) struct Two {
    pub(super) of: String,
    pub(super) new: String,
}

fn parse_snapshot(params: &Params) -> Result<Two, MethodError> {
    #[derive(Deserialize)]
    struct Given {
        lvol_name: String,
        snapshot_name: String,
    }
    let Given { lvol_name: of, snapshot_name: new } = params.decode(DecodeFailure::INTERNAL)?;
    Ok(Two { of, new })
}

async fn snapshot(_: Rc<State>, host: Rc<dyn Host>, Two { of, new }: Two) -> Answer {
    let entry = find(&host, &of)?;
    let (store, id) = (Rc::clone(&entry.store), entry.disk.id());
    drop(entry);
    check_name_of_new(&host, &store, &new)?;
    let made_id = store.run(&host, LIMIT, move |store| store.snapshot(id, &new, Uuid::new_v4()));
    let made_id = made_id.await;
    made("bdev_lvol_snapshot", &host, &store, made_id).await
}

fn parse_clone(params: &Params) -> Result<Two, MethodError> {
    #[derive(Deserialize)]
    struct Given {
        snapshot_name: String,
        clone_name: String,
    }
    let Given { snapshot_name: of, clone_name: new } = params.decode(DecodeFailure::INTERNAL)?;
    Ok(Two { of, new })
}

async fn clone(_: Rc<State>, host: Rc<dyn Host>, Two { of, new }: Two) -> Answer {
    let entry = find(&host, &of)?;
    let (store, id) = (Rc::clone(&entry.store), entry.disk.id());
    drop(entry);
    check_name_of_new(&host, &store, &new)?;
    let operation = move |store: &crate::LvStore| store.clone_volume(id, &new, Uuid::new_v4());
    let made_id = store.run(&host, LIMIT, operation).await;
    made("bdev_lvol_clone", &host, &store, made_id).await
}

struct CloneBdev {
    bdev: String,
    store: String,
    name: String,
}

fn parse_clone_bdev(params: &Params) -> Result<CloneBdev, MethodError> {
    #[derive(Deserialize)]
    struct Given {
        bdev: String,
        lvs_name: String,
        clone_name: String,
    }
    let Given { bdev, lvs_name: store, clone_name: name } =
        params.decode(DecodeFailure::INTERNAL)?;
    Ok(CloneBdev { bdev, store, name })
}

async fn clone_bdev(state: Rc<State>, host: Rc<dyn Host>, given: CloneBdev) -> Answer {
    const METHOD: &str = "bdev_lvol_clone_bdev";
    let refused = |text: &str| MethodError::invalid_params(text);
    let store = state.named(&given.store).ok_or_else(|| refused("lvs does not exist"))?;
    let none = || refused("bdev does not exist");
    let bdev = host.registry().bdev(&given.bdev).ok_or_else(none)?;
    if let Some(entry) = host.registry().entry::<LvolEntry>(&given.bdev)
        && Rc::ptr_eq(&entry.store, &store)
    {
        let text = "bdev is an lvol in same lvs as clone; use bdev_lvol_clone instead";
        return Err(refused(text));
    }
    check_name_of_new(&host, &store, &given.name)?;
    check_external(METHOD, &store, &*bdev)?;
    let claimed = host.registry().claim(&bdev, ClaimKind::ReadMany, NAME);
    let _claim = claimed.map_err(|other| {
        error!("{METHOD}: bdev {}: {} uses it", given.bdev, other.owner);
        refused(&strerror(libc::EPERM))
    })?;
    let external = bdev.uuid();
    let clusters = bdev.size_bytes() / store.facts().store.cluster_size;
    drop(bdev);
    let operation = move |store: &crate::LvStore| {
        store.clone_external(external, clusters, &given.name, Uuid::new_v4())
    };
    let id = store.run(&host, LIMIT, operation).await;
    made(METHOD, &host, &store, id).await
}

/// Refuses a bdev that cannot be the external snapshot of a volume.
pub(super) fn check_external(
    method: &str,
    store: &OpenStore,
    bdev: &dyn Bdev,
) -> Result<(), MethodError> {
    let facts = store.facts();
    let (cluster, block) = (facts.store.cluster_size, facts.store.block_size);
    if !bdev.size_bytes().is_multiple_of(cluster) || bdev.block_size() > block {
        error!(
            "{method}: bdev {}: its size is not a multiple of the cluster size {cluster}, or its \
             blocks are larger than {block}",
            bdev.name()
        );
        return Err(MethodError::invalid_params(strerror(libc::EINVAL)));
    }
    Ok(())
}

fn parse_rename(params: &Params) -> Result<Two, MethodError> {
    #[derive(Deserialize)]
    struct Given {
        old_name: String,
        new_name: String,
    }
    let Given { old_name: of, new_name: new } = params.decode(DecodeFailure::INTERNAL)?;
    Ok(Two { of, new })
}

async fn rename(_: Rc<State>, host: Rc<dyn Host>, Two { of, new }: Two) -> Answer {
    let entry = find(&host, &of)?;
    let (store, id) = (Rc::clone(&entry.store), entry.disk.id());
    drop(entry);
    let snapshot = store.facts().volume(id).is_some_and(|volume| volume.read_only);
    if !snapshot {
        check_name_of_new(&host, &store, &new)?;
    }
    let renamed = store.run(&host, LIMIT, move |store| store.rename(id, &new)).await;
    renamed.map_err(|e| late("bdev_lvol_rename", &e))?;
    examine::set_aliases(&host, &store);
    Ok(true.into())
}

struct Resize {
    name: String,
    size_in_mib: u64,
}

fn parse_resize(params: &Params) -> Result<Resize, MethodError> {
    #[derive(Deserialize)]
    struct Given {
        name: String,
        size_in_mib: u64,
    }
    let Given { name, size_in_mib } = params.decode(DecodeFailure::INTERNAL)?;
    Ok(Resize { name, size_in_mib })
}

async fn resize(_: Rc<State>, host: Rc<dyn Host>, given: Resize) -> Answer {
    let entry = find(&host, &given.name)?;
    let clusters = clusters(given.size_in_mib, entry.store.facts().store.cluster_size)?;
    let (id, bdev) = (entry.disk.id(), Arc::clone(&entry.disk) as Arc<dyn Bdev>);
    let resized = entry.store.run(&host, LIMIT, move |store| store.resize(id, clusters)).await;
    resized.map_err(|e| late("bdev_lvol_resize", &e))?;
    life::resized(&host, &bdev);
    Ok(true.into())
}

async fn set_read_only(_: Rc<State>, host: Rc<dyn Host>, name: String) -> Answer {
    let entry = find(&host, &name)?;
    let id = entry.disk.id();
    let done = entry.store.run(&host, LIMIT, move |store| store.set_read_only(id)).await;
    done.map_err(|e| late("bdev_lvol_set_read_only", &e))?;
    Ok(true.into())
}

async fn delete(_: Rc<State>, host: Rc<dyn Host>, name: String) -> Answer {
    const METHOD: &str = "bdev_lvol_delete";
    let entry = find(&host, &name)?;
    let (store, id) = (Rc::clone(&entry.store), entry.disk.id());
    let (bdev, name) = (entry.disk.name().to_owned(), name);
    drop(entry);
    let clones = store.facts().volume(id).map_or(0, |volume| volume.clones.len());
    if clones > 1 {
        error!("{METHOD}: {name}: it has {clones} clones");
        return Err(MethodError::internal(strerror(libc::EPERM)));
    }
    let Some(row) = host.registry().id(&bdev) else {
        return Err(MethodError::errno(libc::ENODEV));
    };
    life::remove_lost(&host, &[row]).await;
    if let Err(e) = store.run(&host, LIMIT, move |store| store.delete(id)).await {
        error!("{METHOD}: {e}");
        let facts = store.facts();
        if let Some(volume) = facts.volume(id) {
            examine::add(&host, &store, &facts, volume).await;
            life::settle(&host).await;
        }
        return Err(MethodError::internal(strerror(e.errno())));
    }
    Ok(true.into())
}
