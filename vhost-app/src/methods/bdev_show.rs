//! A device as `bdev_get_bdevs` shows it.

use bdev::{Bdev, Live};
use serde_json::{Map, Value, json};

use super::bdev_qos;

/// SPDK's operations that no device has here: nothing in a guest or in this program asks for them.
const NEVER_SUPPORTED: [&str; 13] = [
    "zcopy",
    "get_zone_info",
    "zone_management",
    "zone_append",
    "compare",
    "compare_and_write",
    "abort",
    "seek_hole",
    "seek_data",
    "copy",
    "nvme_iov_md",
    "nvme_nssr",
    "write_uncorrectable",
];

/// The device in SPDK's shape.
pub(super) fn describe(live: &Live, alias: Option<&str>, claim_type: Option<&str>) -> Value {
    let (bdev, about) = (&*live.bdev, live.entry.describe());
    let uuid = bdev.uuid().to_string();
    let own = Some(uuid.as_str()).filter(|uuid| *uuid != bdev.name());
    let aliases: Vec<&str> = alias.into_iter().chain(own).collect();
    let hint = |name: &str| about.hints.get(name).cloned().unwrap_or(0.into());
    let mut object = Map::new();
    let mut put = |name: &str, value: Value| drop(object.insert(name.to_owned(), value));
    put("name", bdev.name().into());
    put("aliases", json!(aliases));
    put("product_name", bdev.product_name().into());
    put("block_size", bdev.block_size().into());
    put("num_blocks", bdev.num_blocks().into());
    for name in [
        "preferred_write_alignment",
        "preferred_write_granularity",
        "optimal_write_size",
        "preferred_unmap_alignment",
        "preferred_unmap_granularity",
    ] {
        put(name, hint(name));
    }
    put("uuid", uuid.as_str().into());
    for (name, value) in about.fields {
        put(&name, value);
    }
    put("assigned_rate_limits", bdev_qos::object(bdev.qos().limits()).into());
    put("claimed", claim_type.is_some().into());
    if let Some(claim_type) = claim_type {
        put("claim_type", claim_type.into());
    }
    put("zoned", false.into());
    put("supported_io_types", supported_io_types(bdev));
    put("driver_specific", about.driver_specific.into());
    object.into()
}

fn supported_io_types(bdev: &dyn Bdev) -> Value {
    let features = bdev.features();
    let known = [
        ("read", true),
        ("write", !features.read_only),
        ("unmap", features.unmap),
        ("flush", features.flush),
        ("reset", features.reset),
        ("nvme_admin", false),
        ("nvme_io", false),
        ("nvme_io_md", false),
        ("write_zeroes", features.write_zeroes),
    ];
    let never = NEVER_SUPPORTED.iter().map(|name| (*name, false));
    let all = known.into_iter().chain(never).map(|(name, is)| (name.to_owned(), is.into()));
    Value::Object(all.collect())
}
