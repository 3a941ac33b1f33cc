//! A Linux guest in QEMU whose disk is an image of a Ceph cluster.

use serde_json::json;

use crate::support::ceph::Cluster;
use crate::support::disks::{MIB, answer, controller, hold_some, in_flight, sessions, slow_behind};
use crate::support::guest::{self, Guest, GuestOptions, cycles};
use crate::support::harness::wait_until;

const MOUNT: &str = "mkdir -p /mnt && mount -t ext4 /dev/vda /mnt";

/// Through a reset, an end of `vhost` and a guest, and a resize by another host.
#[test]
fn a_file_system_keeps_what_was_synced() {
    let Some(cluster) = Cluster::find() else { return };
    let image = cluster.image(64);
    let vhost = cluster.start();
    image.disk(&vhost, "R", json!({}));
    let options = GuestOptions::new(&controller(&vhost, "vhost.0", "R"));
    let mut guest = Guest::boot(GuestOptions { reboots: true, ..options });
    let facts = guest.disk("vda");
    assert_eq!(facts.number("size_bytes"), 64 * MIB as u64);
    assert_eq!((facts.text("ro"), facts.text("write_cache")), ("0", "write-back"));
    guest.ok(&format!("/sbin/mke2fs -q -F -t ext4 /dev/vda && {MOUNT}"));
    guest.ok("payload 1 16 >/mnt/payload && sync");
    let sum = guest.ok("sha256sum </mnt/payload");
    // Nothing has unmounted it.
    guest.qmp("system_reset", json!({}));
    guest.wait_ready();
    guest.ok(MOUNT);
    assert_eq!(guest.ok("sha256sum </mnt/payload"), sum);
    guest.ok("umount /mnt");
    guest.power_off();
    assert_eq!(vhost.stop(), 0);
    assert!(image.lock().is_none());

    let vhost = cluster.start();
    image.disk(&vhost, "R", json!({}));
    let mut guest = Guest::boot(GuestOptions::new(&controller(&vhost, "vhost.0", "R")));
    guest.ok(MOUNT);
    assert_eq!(guest.ok("sha256sum </mnt/payload"), sum);
    guest.ok("umount /mnt");
    image.resize(96);
    guest.ok("until [ $(cat /sys/block/vda/size) = 196608 ]; do sleep 0.1; done");
    guest.start_io("vda", 80);
    guest.finish_io("vda", 80);
    guest.power_off();
    assert_eq!(vhost.stop(), 0);
}

#[test]
fn a_guest_waits_for_an_absent_cluster_and_loses_nothing() {
    let Some(cluster) = Cluster::find() else { return };
    let image = cluster.image(16);
    let vhost = cluster.start();
    image.disk(&vhost, "R", json!({}));
    let mut guest = Guest::boot(GuestOptions::new(&controller(&vhost, "vhost.0", "R")));
    guest.start_io("vda", 4);
    for _ in 0..3 {
        let stopped = cluster.stop_osd();
        wait_until("all of the guest's I/O waits", || in_flight(&vhost, "vhost.0") == 8);
        drop(stopped);
        guest.io_goes_on("vda", 4);
    }
    let killed = cluster.kill_mon();
    guest.io_goes_on("vda", 4);
    drop(killed);
    guest.finish_io("vda", 4);
    guest.power_off();
    assert_eq!(vhost.stop(), 0);
}

/// The exclusive lock goes with it.
#[test]
fn a_guest_moves_under_load_and_back() {
    let Some(cluster) = Cluster::find() else { return };
    guest::deaths::tolerated(|| one_guest_moves(&cluster));
}

fn one_guest_moves(cluster: &Cluster) {
    let dir = tempfile::tempdir().unwrap();
    let image = cluster.image(16);
    let vhosts = ["a", "b"].map(|name| {
        let (vhost, link) = (cluster.start(), dir.path().join(name));
        image.disk(&vhost, "R", json!({}));
        slow_behind(&vhost, &link, "R");
        (vhost, link)
    });
    let options = |n: usize| GuestOptions::new(&vhosts[n % 2].1);
    let mut guest = Guest::boot(options(0));
    // If librbd's cache were on, it would complete writes from the first flush on.
    guest.ok("dd if=/seed of=/dev/vda bs=4k count=1 conv=fsync");
    guest.start_io("vda", 4);
    for n in 1..=cycles(2) {
        let (from, to) = (&vhosts[(n - 1) % 2].0, &vhosts[n % 2].0);
        let owner = image.lock().unwrap().address;
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
        assert_ne!(image.lock().unwrap().address, owner);
    }
    guest.finish_io("vda", 4);
    guest.power_off();
    for (vhost, _) in vhosts {
        assert_eq!(vhost.stop(), 0);
    }
}
