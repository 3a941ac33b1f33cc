//! Logical volumes in guests of QEMU: thin volumes and a clone with file systems and loads, beside
//! snapshots, a resize and discards.

use serde_json::{Value, json};

use crate::support::disks::{MIB, aio, controller};
use crate::support::guest::{Guest, GuestOptions};
use crate::support::harness::{Vhost, wait_until};

fn allocated(vhost: &Vhost, name: &str) -> u64 {
    let all = vhost.ok("bdev_lvol_get_lvols", Value::Null);
    let found = all.as_array().unwrap().iter().find(|volume| volume["name"] == name);
    found.unwrap()["num_allocated_clusters"].as_u64().unwrap()
}

#[test]
fn guests_use_thin_volumes_beside_snapshots_a_resize_and_discards() {
    let vhost = Vhost::start(&[]);
    aio(&vhost, "base", 256 * MIB);
    let store = json!({"bdev_name": "base", "lvs_name": "lvs", "cluster_sz": 1 << 20});
    vhost.ok("bdev_lvol_create_lvstore", store);
    let volume = json!({
        "lvs_name": "lvs", "lvol_name": "v", "size_in_mib": 32, "thin_provision": true,
    });
    vhost.ok("bdev_lvol_create", volume);
    let socket = controller(&vhost, "c", "lvs/v");
    let mut guest = Guest::boot(GuestOptions::new(&socket));
    assert_eq!(allocated(&vhost, "v"), 0, "a guest that only reads needs no cluster");

    guest.ok("payload 1 4 | dd of=/dev/vda bs=64k iflag=fullblock oflag=direct status=none");
    guest.ok("sync");
    let digest = guest.digest("vda", None);
    guest.start_io("vda", 8);
    for n in 0..5 {
        let snapshot = json!({"lvol_name": "lvs/v", "snapshot_name": format!("s{n}")});
        vhost.ok("bdev_lvol_snapshot", snapshot);
        guest.io_goes_on("vda", 8);
    }
    vhost.ok("bdev_lvol_resize", json!({"name": "lvs/v", "size_in_mib": 48}));
    wait_until("the guest sees the size", || {
        guest.disk("vda").number("size_bytes") == 48 * MIB as u64
    });
    guest.finish_io("vda", 8);

    // A clone of the first snapshot reads what the guest had written by then.
    vhost.ok("bdev_lvol_clone", json!({"snapshot_name": "lvs/s0", "clone_name": "c"}));
    let clone = controller(&vhost, "d", "lvs/c");
    let mut other = Guest::boot(GuestOptions::new(&clone));
    let first = |guest: &mut Guest| guest.digest("vda", Some(1));
    assert_eq!(first(&mut other), first(&mut guest));
    other.ok("dd if=/dev/zero of=/dev/vda bs=1M count=2 oflag=direct status=none");
    assert_ne!(first(&mut other), first(&mut guest));
    other.power_off();
    vhost.ok("vhost_delete_controller", json!({"ctrlr": "d"}));

    // Without its parents, the volume gives clusters back.
    vhost.ok("bdev_lvol_delete", json!({"name": "lvs/c"}));
    for n in 0..5 {
        vhost.ok("bdev_lvol_delete", json!({"name": format!("lvs/s{n}")}));
    }
    guest.ok("blkdiscard -o 8388608 -l 16777216 /dev/vda");
    assert_eq!(allocated(&vhost, "v"), 4);
    guest.ok("blkdiscard -o 33554432 /dev/vda");
    assert_eq!(guest.digest("vda", Some(4)), {
        // As written: the clusters of the snapshots went to the volume.
        guest.ok("payload 1 4 | dd of=/tmp/p bs=64k iflag=fullblock status=none");
        guest.ok("sha256sum /tmp/p").split(' ').next().unwrap().to_owned()
    });
    assert_eq!(digest.len(), 64);
    guest.power_off();
    assert_eq!(vhost.stop(), 0);
}
