//! What a Linux guest under QEMU does with its disk, on split and on packed rings: QEMU's columns of
//! the table in `docs/src/front-ends.md`.

use std::fs;

use serde_json::json;

use crate::support::disks::{MIB, aio, controller_of, file_sha256, malloc, rings};
use crate::support::guest::{Guest, GuestOptions, RING_PACKED};
use crate::support::harness::{Vhost, matrix};

/// VIRTIO_F_INDIRECT_DESC and VIRTIO_F_EVENT_IDX.
const INDIRECT: usize = 28;
const EVENT_IDX: usize = 29;

fn works(packed: bool) {
    let cell = |feature| matrix::cell("QEMU 7.2", rings(packed), feature);
    let vhost = Vhost::start(&[]);
    let file = aio(&vhost, "Aio0", 32 * MIB);
    vhost.ok("bdev_error_create", json!({"base_name": "Aio0"}));
    let options = GuestOptions::new(&controller_of(&vhost, "vhost.0", "EE_Aio0", packed));
    malloc(&vhost, "M", 32 * MIB, 512);
    let second = controller_of(&vhost, "vhost.1", "M", packed);
    let disk_properties = if packed { ",packed=on" } else { "" };
    let mut options = GuestOptions { cpus: 4, disk_properties, ..options }.disk(&second, 1);
    options.sockets[0].1 = 4;
    let mut guest = Guest::boot(options);
    for (feature, has) in [(RING_PACKED, packed), (INDIRECT, true), (EVENT_IDX, true)] {
        assert_eq!(guest.has_feature("vda", feature), has, "{feature}");
    }

    let facts = guest.disk("vda");
    let seen = ["size_bytes", "block_bytes", "ro"].map(|name| facts.number(name));
    assert_eq!(seen, [32 * MIB as u64, 512, 0]);
    assert_eq!(guest.ok("cat /sys/block/vd?/queue/max_segments"), "29\n126");
    cell("config space");
    assert_eq!(facts.text("serial").trim_end_matches('_'), "EE_Aio0");
    cell("get id");

    // What the host has written is there, what the guest writes arrives.
    assert_eq!(guest.digest("vda", None), file_sha256(&file));
    guest.ok("payload 1 8 >/tmp/p; dd if=/tmp/p of=/dev/vda bs=1M seek=4 oflag=direct status=none");
    assert_eq!(guest.digest("vda", None), file_sha256(&file));
    for feature in ["read and write", "indirect descriptors", "event idx"] {
        cell(feature);
    }
    // A MiB of pages that lie anywhere takes as many segments as there may be.
    guest.ok("dd if=/dev/vda of=/dev/vdb bs=1M iflag=direct oflag=direct status=none");
    assert_eq!(guest.digest("vdb", None), file_sha256(&file));
    cell("many segments");
    let read = "dd if=/dev/vda bs=1M count=4 iflag=direct status=none | sha256sum";
    let by_cpu = guest.ok(&format!("for mask in 1 2 4 8; do taskset $mask {read}; done"));
    let by_cpu: Vec<&str> = by_cpu.lines().collect();
    assert!(by_cpu.len() == 4 && by_cpu.iter().all(|sum| *sum == by_cpu[0]), "{by_cpu:?}");
    assert_eq!(facts.number("queues"), 4);
    cell("four queues");

    let write = "dd if=/seed of=/dev/vda bs=64k count=1 oflag=direct conv=fsync status=none";
    let error =
        json!({"name": "EE_Aio0", "io_type": "flush", "error_type": "failure", "num": 1000});
    vhost.ok("bdev_error_inject_error", error);
    assert_ne!(guest.run(write).rc, 0, "its flush fails");
    let clear = json!({"name": "EE_Aio0", "io_type": "clear", "error_type": "failure"});
    vhost.ok("bdev_error_inject_error", clear);
    guest.ok(write);
    cell("flush");

    fs::File::options().write(true).open(&file).unwrap().set_len(48 * MIB as u64).unwrap();
    vhost.ok("bdev_aio_rescan", json!({"name": "Aio0"}));
    let sectors = 48 * MIB / 512;
    guest.ok(&format!("until [ $(cat /sys/block/vda/size) = {sectors} ]; do sleep 0.1; done"));
    assert_eq!(guest.digest("vda", None), file_sha256(&file));
    cell("resize");
    guest.power_off();
    assert_eq!(vhost.stop(), 0);
}

#[test]
fn a_guest_works_on_split_rings() {
    works(false);
}

#[test]
fn a_guest_works_on_packed_rings() {
    works(true);
}
