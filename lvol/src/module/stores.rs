//! The methods on stores.

use std::rc::Rc;
use std::sync::Arc;

use bdev::method::{Answer, DecodeFailure, Method, MethodError, Params, strerror};
use bdev::{Aside, ClaimKind, Error, Host, life};
use blobstore::format::Clear;
use blobstore::lvs::check_name;
use serde::Deserialize;
use serde_json::Value;
use tracing::error;
use uuid::Uuid;

use super::entry::LvolEntry;
use super::state::{LIMIT, OpenStore, Selector, State};
use super::{LvolModule, NAME, examine, show};
use crate::store::{LvStore, NewStore};

/// SPDK's default: 4 MiB.
const CLUSTER_SIZE: u32 = 4 << 20;

pub(super) fn methods(module: &LvolModule) -> Vec<Method> {
    vec![
        module.method("bdev_lvol_create_lvstore", parse_create, create),
        module.method("bdev_lvol_delete_lvstore", selector_of_one, delete),
        module.method("bdev_lvol_rename_lvstore", parse_rename, rename),
        module.method("bdev_lvol_grow_lvstore", selector_of_one, grow),
        module.method("bdev_lvol_get_lvstores", selector, get_stores),
        module.method("bdev_lvol_get_lvols", selector_of_volumes, get_volumes),
    ]
}

/// -32602 with the text of the errno: most failures that SPDK finds late.
pub(super) fn late(method: &str, e: &Error) -> MethodError {
    error!("{method}: {e}");
    MethodError::invalid_params(strerror(e.errno()))
}

/// What is done to clusters that are given up.
#[derive(Clone, Copy, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Given {
    #[default]
    Default,
    None,
    Unmap,
    WriteZeroes,
}

impl Given {
    pub(super) fn clear(self) -> Clear {
        match self {
            Self::Default => Clear::Default,
            Self::None => Clear::None,
            Self::Unmap => Clear::Unmap,
            Self::WriteZeroes => Clear::WriteZeroes,
        }
    }
}

struct Create {
    base: String,
    new: NewStore,
}

fn parse_create(params: &Params) -> Result<Create, MethodError> {
    #[derive(Deserialize)]
    struct Given {
        bdev_name: String,
        lvs_name: String,
        cluster_sz: Option<u32>,
        #[serde(default)]
        clear_method: super::stores::Given,
        num_md_pages_per_cluster_ratio: Option<u32>,
        md_page_size: Option<u32>,
    }
    let p: Given = params.decode(DecodeFailure::INTERNAL)?;
    let ratio = p.num_md_pages_per_cluster_ratio.filter(|ratio| *ratio > 0);
    if check_name(&p.lvs_name).is_err() {
        error!("{}: a name has 1 to 63 bytes: {:?}", params.method(), p.lvs_name);
        return Err(MethodError::errno(libc::EINVAL));
    }
    let new = NewStore {
        name: p.lvs_name,
        uuid: Uuid::new_v4(),
        cluster_size: p.cluster_sz.filter(|size| *size > 0).unwrap_or(CLUSTER_SIZE),
        pages_per_hundred_clusters: ratio.unwrap_or(100),
        page_size: p.md_page_size.filter(|size| *size > 0).unwrap_or(4096),
        clear: p.clear_method.clear(),
    };
    Ok(Create { base: p.bdev_name, new })
}

async fn create(state: Rc<State>, host: Rc<dyn Host>, given: Create) -> Answer {
    const METHOD: &str = "bdev_lvol_create_lvstore";
    let registry = host.registry();
    let none = || MethodError::errno(libc::ENODEV);
    let base = registry.bdev(&given.base).ok_or_else(none)?;
    let taken = || MethodError::errno(libc::EEXIST);
    let _name = state.reserve(&given.new.name).ok_or_else(taken)?;
    let claim = registry.claim(&base, ClaimKind::WriteOne, NAME).map_err(|other| {
        error!("{METHOD}: bdev {}: {} uses it", given.base, other.owner);
        MethodError::errno(libc::EPERM)
    })?;
    let (aside, of_thread, new) = (Aside::new(&given.base, 1), Arc::clone(&base), given.new);
    let name = new.name.clone();
    let made = aside.run(&host, LIMIT, move || LvStore::create(&of_thread, &new)).await;
    let store = OpenStore::new(made.map_err(|e| late(METHOD, &e))?, &base, claim);
    // The bdev may have been removed, or another store of this name found on another one.
    if !registry.holds(&base) || state.named(&name).is_some() {
        drop(base);
        examine::close(&host, &store).await;
        host.released();
        return Err(MethodError::errno(libc::ENODEV));
    }
    let uuid = store.facts().store.uuid.to_string();
    state.add(store);
    Ok(uuid.into())
}

#[derive(Deserialize)]
struct Named {
    uuid: Option<String>,
    lvs_name: Option<String>,
}

/// Decodes the name of a store that must be given.
fn selector_of_one(params: &Params) -> Result<Selector, MethodError> {
    let Named { uuid, lvs_name: name } = params.decode(DecodeFailure::INTERNAL)?;
    if uuid.is_none() && name.is_none() {
        error!("{}: neither uuid nor lvs_name is given", params.method());
        return Err(MethodError::internal("spdk_json_decode_object failed"));
    }
    Ok(Selector { uuid, name })
}

fn selector(params: &Params) -> Result<Selector, MethodError> {
    let Named { uuid, lvs_name: name } = params.decode(DecodeFailure::INTERNAL)?;
    Ok(Selector { uuid, name })
}

fn selector_of_volumes(params: &Params) -> Result<Selector, MethodError> {
    #[derive(Deserialize)]
    struct Named {
        lvs_uuid: Option<String>,
        lvs_name: Option<String>,
    }
    let Named { lvs_uuid: uuid, lvs_name: name } = params.decode(DecodeFailure::INTERNAL)?;
    Ok(Selector { uuid, name })
}

async fn delete(state: Rc<State>, host: Rc<dyn Host>, given: Selector) -> Answer {
    let store = state.select(&given)?;
    // From now on, no call finds it.
    state.remove(&store);
    let all = host.registry().entries_of::<LvolEntry>();
    let of_store = all.into_iter().filter(|(_, entry)| Rc::ptr_eq(&entry.store, &store));
    let ids: Vec<_> = of_store.map(|(id, _)| id).collect();
    life::remove_lost(&host, &ids).await;
    let destroyed = store.end(&host, LvStore::destroy).await;
    drop(store.claim.take());
    life::settle(&host).await;
    match destroyed {
        Ok(()) => Ok(true.into()),
        Err(e) => Err(MethodError::of("bdev_lvol_delete_lvstore", &e)),
    }
}

struct Rename {
    old: String,
    new: String,
}

fn parse_rename(params: &Params) -> Result<Rename, MethodError> {
    #[derive(Deserialize)]
    struct Given {
        old_name: String,
        new_name: String,
    }
    let Given { old_name: old, new_name: new } = params.decode(DecodeFailure::INTERNAL)?;
    Ok(Rename { old, new })
}

async fn rename(state: Rc<State>, host: Rc<dyn Host>, Rename { old, new }: Rename) -> Answer {
    const METHOD: &str = "bdev_lvol_rename_lvstore";
    let Some(store) = state.named(&old) else {
        let text = format!("Lvol store {old} not found");
        return Err(MethodError { code: -i64::from(libc::ENOENT), text });
    };
    if old == new {
        return Ok(true.into());
    }
    let taken = || MethodError::invalid_params(strerror(libc::EEXIST));
    let _name = state.reserve(&new).ok_or_else(taken)?;
    let facts = store.facts();
    let mut aliases = facts.volumes.iter().map(|volume| format!("{new}/{}", volume.name));
    if aliases.any(|alias| host.registry().is_taken(&alias)) {
        return Err(taken());
    }
    let renamed = store.run(&host, LIMIT, move |store| store.rename_store(&new)).await;
    renamed.map_err(|e| late(METHOD, &e))?;
    examine::set_aliases(&host, &store);
    Ok(true.into())
}

async fn grow(state: Rc<State>, host: Rc<dyn Host>, given: Selector) -> Answer {
    let store = state.select(&given)?;
    let grown = store.run(&host, LIMIT, LvStore::grow).await;
    grown.map_err(|e| late("bdev_lvol_grow_lvstore", &e))?;
    Ok(true.into())
}

/// The stores that the parameters name: all, if they name none.
fn selected(state: &State, given: &Selector) -> Result<Vec<Rc<OpenStore>>, MethodError> {
    match (&given.uuid, &given.name) {
        (None, None) => Ok(state.all()),
        _ => Ok(vec![state.select(given)?]),
    }
}

fn get_stores(state: Rc<State>, _: Rc<dyn Host>, given: Selector) -> std::future::Ready<Answer> {
    let shown = |store: &Rc<OpenStore>| show::store(&store.facts().store);
    let stores = selected(&state, &given);
    std::future::ready(stores.map(|stores| stores.iter().map(shown).collect::<Value>()))
}

fn get_volumes(
    state: Rc<State>,
    host: Rc<dyn Host>,
    given: Selector,
) -> std::future::Ready<Answer> {
    let stores = selected(&state, &given).map(|stores| {
        let facts = stores.iter().map(|store| store.facts());
        let shown = facts.flat_map(|facts| {
            let volumes = facts.volumes.iter();
            volumes.map(|volume| show::volume(host.registry(), &facts, volume)).collect::<Vec<_>>()
        });
        shown.collect::<Value>()
    });
    std::future::ready(stores)
}
