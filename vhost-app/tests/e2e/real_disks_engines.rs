//! Which engine serves a file disk, on hosts that forbid io_uring, Linux AIO, or both.
#![expect(clippy::cast_possible_truncation, reason = "sizes of small disks")]

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::json;

use crate::support::harness::{self, Launch, Vhost};
use crate::support::real_disks::{self, BLOCK, DISK_BYTES, FLAVOURS, Flavour, Guest, Io};

/// The engines of an aio disk and of a uring disk.
type Engines = [&'static str; 2];

/// What a host forbids, and the engines there: of disks in files that may be written, where Linux AIO
/// is the second choice, and on block devices.
const HOSTS: [(&[i64], Engines, Engines); 4] = [
    (&[], ["io_uring", "io_uring"], ["aio", "io_uring"]),
    (&[libc::SYS_io_uring_setup], ["aio", "aio"], ["aio", "aio"]),
    (&[libc::SYS_io_setup], ["io_uring", "io_uring"], ["io_uring", "io_uring"]),
    (&[libc::SYS_io_uring_setup, libc::SYS_io_setup], ["threads"; 2], ["threads"; 2]),
];

/// Requests of all kinds, one at a time and many at once, end up in the file.
fn a_guest_uses(vhost: &Vhost, flavour: Flavour, file: &Path) {
    flavour.create(vhost, "F", file);
    let mut guest = Guest::on(vhost, "F");
    guest.goes_on();
    let writes: Vec<_> = (0..60).map(|n| guest.begin(Io::Write, 100 + n, 1 + n as u8)).collect();
    guest.wait_for(&writes);
    let mixed: Vec<_> = (0..20)
        .flat_map(|n| {
            [(Io::Discard, 100 + n), (Io::Zeroes, 120 + n), (Io::Flush, 0), (Io::Read, 140 + n)]
        })
        .map(|(io, block)| (io, guest.begin(io, block, 0)))
        .collect();
    guest.wait_for(&mixed.iter().map(|(_, begun)| *begun).collect::<Vec<_>>());
    let reads = mixed.iter().filter(|(io, _)| *io == Io::Read);
    for (n, (_, read)) in (40..).zip(reads) {
        assert!(guest.memory(read).iter().all(|byte| *byte == 1 + n));
    }
    let stat = vhost.ok("bdev_get_iostat", json!({"names": ["F"]}));
    assert_eq!(stat["bdevs"][0]["io_error"], json!({}));
    guest.leaves(vhost);
    flavour.delete(vhost, "F");
    let bytes = fs::read(file).unwrap();
    for n in 0..60 {
        let block = &bytes[((100 + n) * BLOCK) as usize..][..BLOCK as usize];
        let expected = if n < 40 { 0 } else { 1 + n as u8 };
        assert!(block.iter().all(|byte| *byte == expected), "block {n}");
    }
}

/// Starts a `vhost` on each of the hosts, with the sandbox and without it.
fn on_each_host(devices: bool, test: impl Fn(&Vhost, Flavour, &str)) {
    for (forbidden, of_files, of_devices) in HOSTS {
        let engines = if devices { of_devices } else { of_files };
        for args in [&[][..], &["--no-sandbox"]] {
            let vhost = Launch::new().args(args).forbid(forbidden).start();
            for (flavour, engine) in FLAVOURS.into_iter().zip(engines) {
                println!("forbidden {forbidden:?}, {args:?}, {flavour:?}: {engine}");
                test(&vhost, flavour, engine);
            }
            assert_eq!(vhost.log().matches("*ERROR*").count(), 0, "{}", vhost.log());
            assert_eq!(vhost.stop(), 0);
        }
    }
}

#[test]
fn a_file_is_served_by_what_the_host_allows() {
    on_each_host(false, |vhost, flavour, engine| {
        let file = vhost.file("disk", DISK_BYTES);
        flavour.create(vhost, "F", file.as_ref());
        let shown = flavour.io_path(vhost, "F");
        assert_eq!(shown["engine"], engine, "{shown}");
        assert!(shown["direct"].is_boolean() && shown["nowait"].is_boolean(), "{shown}");
        assert_eq!(flavour.workers(vhost, "F").busy, 0);
        flavour.delete(vhost, "F");
        a_guest_uses(vhost, flavour, file.as_ref());
    });
}

/// Reactors that sleep are woken by each of them.
#[test]
fn an_engine_wakes_its_reactor() {
    for (forbidden, ..) in HOSTS {
        let vhost = Launch::new().args(&["--interrupt-mode"]).forbid(forbidden).start();
        for flavour in FLAVOURS {
            let file = vhost.file("disk", DISK_BYTES);
            a_guest_uses(&vhost, flavour, file.as_ref());
        }
        assert_eq!(vhost.stop(), 0);
    }
}

/// A loop device that goes when it is closed, held open by the first element.
fn loop_device(dir: &Path) -> Option<(fs::File, String)> {
    let file = dir.join("backing");
    fs::File::create(&file).unwrap().set_len(DISK_BYTES).unwrap();
    let made = Command::new("losetup").args(["--find", "--show"]).arg(&file).output().unwrap();
    if !made.status.success() {
        let reason = String::from_utf8_lossy(&made.stderr);
        test_report::skipped("block-device", &reason);
        return None;
    }
    let device = String::from_utf8(made.stdout).unwrap().trim().to_owned();
    let open = fs::File::open(&device).unwrap();
    assert!(Command::new("losetup").args(["--detach", &device]).status().unwrap().success());
    Some((open, device))
}

#[test]
fn a_block_device_is_served_by_what_the_host_allows() {
    let dir = tempfile::tempdir().unwrap();
    let Some((_open, device)) = loop_device(dir.path()) else { return };
    on_each_host(true, |vhost, flavour, engine| {
        flavour.create(vhost, "F", device.as_ref());
        let shown = flavour.io_path(vhost, "F");
        assert_eq!(shown["engine"], engine, "{shown}");
        flavour.delete(vhost, "F");
        a_guest_uses(vhost, flavour, device.as_ref());
    });
}

/// Queues go to and fro between reactors with I/O in flight.
#[test]
fn queues_move_under_each_engine() {
    for (forbidden, ..) in HOSTS {
        for args in [&[][..], &["--interrupt-mode"]] {
            let launch = Launch::new().mask(harness::two_cores()).args(args).forbid(forbidden);
            let vhost = launch.start();
            for flavour in FLAVOURS {
                let file = vhost.file("disk", DISK_BYTES);
                flavour.create(&vhost, "F", file.as_ref());
                real_disks::queues_move(&vhost, "F", 200);
                flavour.delete(&vhost, "F");
            }
            assert_eq!(vhost.stop(), 0);
        }
    }
}
