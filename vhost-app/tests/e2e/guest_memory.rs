//! Memory that is plugged into a guest and taken away from it again, under load.
//!
//! The load takes new pages for its buffers all the time, and Linux takes those for programs from
//! movable memory, which all of the plugged-in memory is, before any other: so the buffers move to
//! a DIMM when it comes, and from it, under I/O, when it goes. `ci/guest-loop hotplug N` does this
//! N times.

use serde_json::json;

use crate::support::disks::{MIB, controller_of, in_flight, malloc, rings};
use crate::support::guest::{Guest, GuestOptions, cycles};
use crate::support::harness::{Vhost, matrix, wait_until};

/// Linux plugs in memory in blocks of so many bytes.
const DIMM_BYTES: usize = 128 * MIB;

/// An awk program for what Linux says of its movable memory: a number of pages.
fn movable(pages: &str) -> String {
    let program = "/^Node/ { movable = $4 == \"Movable\" } \
        movable && $1 == \"pages\" { free = $3 } \
        movable && $1 == \"managed\"";
    format!("awk '{program} {{ print {pages} }}' /proc/zoneinfo")
}

/// Waits until the guest has so many DIMMs as movable memory.
fn wait_memory(guest: &mut Guest, dimms: usize) {
    let pages = dimms * DIMM_BYTES / 4096;
    guest.ok(&format!("until [ $({}) = {pages} ]; do sleep 0.05; done", movable("$2")));
}

fn plug(guest: &mut Guest, n: usize) {
    let (memory, dimm) = (format!("m{n}"), format!("dimm{n}"));
    let kind = "memory-backend-memfd";
    let backend = json!({"qom-type": kind, "id": memory, "size": DIMM_BYTES, "share": true});
    guest.qmp("object-add", backend);
    guest.qmp("device_add", json!({"driver": "pc-dimm", "id": dimm, "memdev": memory}));
}

fn unplug(guest: &mut Guest, n: usize) {
    guest.unplug(&format!("dimm{n}"));
    guest.qmp("object-del", json!({"id": format!("m{n}")}));
}

#[test]
fn memory_comes_and_goes_under_load() {
    comes_and_goes(false, cycles(4));
}

#[test]
fn memory_comes_and_goes_under_load_on_packed_rings() {
    comes_and_goes(true, cycles(4));
}

fn comes_and_goes(packed: bool, count: usize) {
    let vhost = Vhost::start(&[]);
    malloc(&vhost, "M", 16 * MIB, 512);
    let options = GuestOptions::new(&controller_of(&vhost, "vhost.0", "M", packed));
    let kernel_words = "memhp_default_state=online_movable";
    let disk_properties = if packed { ",packed=on" } else { "" };
    let options = GuestOptions { memory_slots: 4, kernel_words, disk_properties, ..options };
    let mut guest = Guest::boot(options);
    guest.start_io("vda", 4);
    let fds = vhost.fds();

    plug(&mut guest, 0);
    for n in 1..=count {
        // A new DIMM comes, in which the old one's pages find a place.
        plug(&mut guest, n);
        wait_memory(&mut guest, 2);
        guest.io_goes_on("vda", 4);
        let used: usize = guest.ok(&movable("$2 - free")).parse().unwrap();
        assert!(used > 0, "the load's buffers are in the DIMM");
        unplug(&mut guest, n - 1);
        guest.io_goes_on("vda", 4);
        if n % 10 == 0 {
            eprintln!("{n} cycles");
        }
    }
    unplug(&mut guest, count);
    guest.io_goes_on("vda", 4);
    guest.finish_io("vda", 4);
    wait_until("what was plugged in is let go", || vhost.fds() == fds);
    assert_eq!(in_flight(&vhost, "vhost.0"), 0);
    guest.power_off();
    assert_eq!(vhost.stop(), 0);
    // QEMU 7.2 tells of memory in slots wherever a back end has them, and in a table otherwise.
    matrix::cell("QEMU 7.2", rings(packed), "memory slots");
}
