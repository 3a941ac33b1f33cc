//! A guest moves from one `vhost` to another under load, over a file that both have.
//!
//! `ci/guest-loop migration N` does this N times.

use crate::support::disks::{
    MIB, answer, hold_some, in_flight, make_file, rings, sessions, start_behind,
};
use crate::support::guest::{self, Guest, GuestOptions, RING_PACKED, cycles};
use crate::support::harness::{Launch, matrix, wait_until};

fn moves(packed: bool) {
    guest::deaths::tolerated(|| one_guest_moves(packed));
    matrix::cell("QEMU 7.2", rings(packed), "live migration");
}

fn one_guest_moves(packed: bool) {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("disk");
    make_file(&file, 16 * MIB);
    // Both have the same core, so they have to leave it to one another.
    let vhosts = ["a", "b"].map(|name| {
        let launch = Launch::new().args(&["--interrupt-mode"]);
        let link = dir.path().join(name);
        (start_behind(launch, &link, &file), link)
    });
    let options = |n: usize| GuestOptions {
        disk_properties: if packed { ",packed=on" } else { "" },
        ..GuestOptions::new(&vhosts[n % 2].1)
    };
    let mut guest = Guest::boot(options(0));
    assert_eq!(guest.has_feature("vda", RING_PACKED), packed);
    guest.start_io("vda", 4);
    for n in 1..=cycles(2) {
        let (from, to) = (&vhosts[(n - 1) % 2].0, &vhosts[n % 2].0);
        // Every other time the load reads until QEMU stops the ring, by when it has copied all of
        // the guest's memory: only the log says that there is data in it now.
        let reads_wait = n % 2 == 1;
        if reads_wait {
            hold_some(from, "EE_Slow0", "read", u32::MAX);
        }
        let arguments = &["-incoming", "defer"];
        let next = Guest::start(GuestOptions { arguments, ..options(n) });
        wait_until("I/O in flight", || in_flight(from, "vhost.0") > 0);
        guest = guest.migrate(next, &dir.path().join(format!("migration.{n}")), || {
            if reads_wait {
                wait_until("QEMU stops the ring", || {
                    sessions(from, "vhost.0")[0]["state"] == "quiescing"
                });
                answer(from, "EE_Slow0");
            }
        });
        guest.io_goes_on("vda", 4);
        wait_until("the old session has ended", || sessions(from, "vhost.0").is_empty());
        assert_eq!(sessions(to, "vhost.0").len(), 1);
        eprintln!("{n} moves");
    }
    guest.finish_io("vda", 4);
    guest.power_off();
    for (vhost, _) in vhosts {
        assert_eq!(vhost.stop(), 0);
    }
}

#[test]
fn a_guest_moves_under_load_and_back() {
    moves(false);
}

#[test]
fn a_guest_with_packed_rings_moves_under_load_and_back() {
    moves(true);
}
