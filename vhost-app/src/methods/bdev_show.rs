//! A device as `bdev_get_bdevs` shows it.

use bdev::{Bdev, LeaseState};
use serde_json::{Map, Value, json};

use crate::bdevs::{Disk, Shown, latency_params};

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
pub(super) fn describe(shown: &Shown) -> Value {
    let bdev = &*shown.bdev;
    let uuid = bdev.uuid().to_string();
    let aliases: Vec<&str> = if uuid == bdev.name() { vec![] } else { vec![uuid.as_str()] };
    let hint = |name: &str| shown.params.get(name).cloned().unwrap_or(0.into());
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
    if matches!(shown.disk, Disk::Malloc(_)) {
        put("numa_id", shown.params.get("numa_id").cloned().unwrap_or((-1).into()));
    }
    put(
        "assigned_rate_limits",
        json!({
            "rw_ios_per_sec": 0,
            "rw_mbytes_per_sec": 0,
            "r_mbytes_per_sec": 0,
            "w_mbytes_per_sec": 0,
        }),
    );
    put("claimed", shown.claimed.into());
    if shown.claimed {
        put("claim_type", "exclusive_write".into());
    }
    put("zoned", false.into());
    put("supported_io_types", supported_io_types(bdev));
    put("driver_specific", driver_specific(shown));
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

/// Not in SPDK: how a file is served.
fn io_path(service: bdev::Service) -> Value {
    let bdev::Service { engine, direct, nowait, workers } = service;
    json!({
        "engine": engine.name(),
        "direct": direct,
        "nowait": nowait,
        "workers": {
            "max": workers.max,
            "threads": workers.threads,
            "busy": workers.busy,
            "queued": workers.queued,
            "longest_s": workers.longest_s,
        },
    })
}

/// Whether rings may use the file, and which other process they wait for.
fn show_lease(module: &mut Value, lease: LeaseState) {
    module["lease"] = match lease {
        LeaseState::None => "none",
        LeaseState::Waiting(_) => "waiting",
        LeaseState::Held => "held",
    }
    .into();
    if let LeaseState::Waiting(Some(holder)) = lease {
        module["waits_for"] = holder.to_string().into();
    }
}

fn driver_specific(shown: &Shown) -> Value {
    match &shown.disk {
        Disk::Malloc(_) | Disk::Null(_) => json!({}),
        Disk::File(file) => {
            let filename = file.filename().display().to_string();
            let (module, mut about) = match file.flavour() {
                bdev::Flavour::Aio => {
                    let nowait = shown.params.get("nowait").is_some_and(|nowait| nowait == true);
                    let about = json!({
                        "filename": filename,
                        "block_size_override": file.block_size_override(),
                        "readonly": file.readonly(),
                        "fallocate": file.fallocate(),
                        "nowait": nowait,
                    });
                    ("aio", about)
                }
                bdev::Flavour::Uring => ("uring", json!({ "filename": filename })),
            };
            about["io_path"] = io_path(file.service());
            show_lease(&mut about, file.lease_state());
            json!({ module: about })
        }
        Disk::Delay(delay) => {
            let mut about = Map::new();
            about.insert("name".into(), delay.name().into());
            about.insert("base_bdev_name".into(), delay.base().name().into());
            about.insert("uuid".into(), delay.uuid().to_string().into());
            about.extend(latency_params(delay.latency()));
            json!({ "delay": about })
        }
        Disk::Error(disk) => json!({ "error_disk": { "base_bdev": disk.base().name() } }),
    }
}
