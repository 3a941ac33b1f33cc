//! `vhost` ends under a working guest, in order or not, and is started again: QEMU connects again,
//! and no request is lost, repeated or stale.
//!
//! `ci/guest-loop crash N` has it killed N times.

use crate::support::disks::{MIB, in_flight, make_file, rings, sessions, start_behind};
use crate::support::guest::{Guest, GuestOptions, RING_PACKED, cycles};
use crate::support::harness::{Launch, matrix, wait_until};

/// Has `vhost` end by `signal` so many times, each time with I/O in flight.
fn ends(signal: &str, code: Option<i32>, times: usize, packed: bool) {
    let dir = tempfile::tempdir().unwrap();
    let (file, link) = (dir.path().join("disk"), dir.path().join("socket"));
    make_file(&file, 16 * MIB);
    let mut vhost = start_behind(Launch::new(), &link, &file);
    let options = GuestOptions::new(&link);
    let options = GuestOptions {
        reconnect: Some(1),
        disk_properties: if packed { ",packed=on" } else { "" },
        ..options
    };
    let mut guest = Guest::boot(options);
    assert_eq!(guest.has_feature("vda", RING_PACKED), packed);
    guest.start_io("vda", 4);
    for n in 1..=times {
        wait_until("I/O in flight", || in_flight(&vhost, "vhost.0") > 0);
        vhost.signal(signal);
        assert_eq!(vhost.wait(), code);
        vhost = start_behind(Launch::new(), &link, &file);
        guest.io_goes_on("vda", 4);
        assert_eq!(guest.status(), "running");
        assert_eq!(sessions(&vhost, "vhost.0").len(), 1);
        eprintln!("{n} ends");
    }
    guest.finish_io("vda", 4);
    guest.power_off();
    assert_eq!(vhost.stop(), 0);
    let feature = if signal == "KILL" { "recovery after kill" } else { "reconnect" };
    matrix::cell("QEMU 7.2", rings(packed), feature);
}

#[test]
fn vhost_is_restarted_many_times_under_a_working_guest() {
    ends("TERM", Some(0), 8, false);
}

#[test]
fn vhost_is_killed_many_times_under_a_working_guest() {
    ends("KILL", None, cycles(3), false);
}

#[test]
fn vhost_is_restarted_many_times_under_a_guest_with_packed_rings() {
    ends("TERM", Some(0), 4, true);
}

#[test]
fn vhost_is_killed_many_times_under_a_guest_with_packed_rings() {
    ends("KILL", None, cycles(3), true);
}
