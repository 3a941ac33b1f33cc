//! Stores and volumes in SPDK's shapes.

use bdev::Registry;
use serde_json::{Value, json};

use super::entry::LvolEntry;
use crate::facts::{Facts, StoreFacts, VolumeFacts};

/// An element of `bdev_lvol_get_lvstores`.
pub(super) fn store(store: &StoreFacts) -> Value {
    json!({
        "uuid": store.uuid.to_string(),
        "name": store.name,
        "base_bdev": store.base,
        "total_data_clusters": store.data_clusters,
        "free_clusters": store.free_clusters(),
        "block_size": store.block_size,
        "cluster_size": store.cluster_size,
        "max_growable_size": store.max_growable_size,
    })
}

/// The name of a volume's bdev.
pub(super) fn bdev_name(facts: &Facts, volume: &VolumeFacts) -> String {
    match volume.uuid {
        Some(uuid) => uuid.to_string(),
        None => format!("{}_{}", facts.store.uuid, volume.id.0),
    }
}

/// The alias of a volume's bdev.
pub(super) fn alias(facts: &Facts, volume: &VolumeFacts) -> String {
    format!("{}/{}", facts.store.name, volume.name)
}

/// An element of `bdev_lvol_get_lvols`.
pub(super) fn volume(registry: &Registry, facts: &Facts, volume: &VolumeFacts) -> Value {
    let name = bdev_name(facts, volume);
    let has_bdev =
        registry.entry::<LvolEntry>(&name).is_some_and(|entry| entry.disk.id() == volume.id);
    json!({
        "alias": alias(facts, volume),
        "uuid": name,
        "name": volume.name,
        "is_thin_provisioned": volume.thin,
        "is_snapshot": volume.is_snapshot(),
        "is_clone": volume.parent.is_some(),
        "is_esnap_clone": volume.external_clone,
        "is_degraded": volume.external.is_some() && !has_bdev,
        "num_allocated_clusters": volume.allocated(),
        "lvs": { "name": facts.store.name, "uuid": facts.store.uuid.to_string() },
    })
}

/// The object `driver_specific.lvol` of a volume's bdev.
pub(super) fn specific(facts: &Facts, volume: &VolumeFacts) -> Value {
    let mut shown = json!({
        "lvol_store_uuid": facts.store.uuid.to_string(),
        "base_bdev": facts.store.base,
        "thin_provision": volume.thin,
        "num_allocated_clusters": volume.allocated(),
        "snapshot": volume.is_snapshot(),
        "clone": volume.parent.is_some(),
    });
    let name = |id| facts.volume(id).map(|volume| volume.name.as_str());
    if let Some(parent) = volume.parent.and_then(name) {
        shown["base_snapshot"] = parent.into();
    }
    if volume.is_snapshot() {
        shown["clones"] = volume.clones.iter().filter_map(|id| name(*id)).collect();
    }
    shown["esnap_clone"] = volume.external_clone.into();
    if volume.external_clone
        && let Some(uuid) = volume.external_uuid()
    {
        shown["external_snapshot_name"] = uuid.to_string().into();
    }
    shown
}
