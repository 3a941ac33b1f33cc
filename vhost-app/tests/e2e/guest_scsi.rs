//! SCSI controllers under a real Linux guest: what works, what an operator does meanwhile, and what
//! happens in the life of a virtual machine.
//!
//! `ci/test-scsi` tests the commands; here are targets that come and go, resets, pauses, saved
//! guests and firmware.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::support::disks::{
    MIB, add_target, aio, aio_on, answer, file_sha256, hold, in_flight, make_file, malloc,
    remove_target, scsi_controller, sessions, sha256, slow, wait_until_all_is_gone,
};
use crate::support::guest::boot::{BootDisk, make_linux_disk};
use crate::support::guest::{self, Guest, GuestOptions, cycles};
use crate::support::harness::{Refusal, Vhost, wait_until};

/// A slow disk on a file, and a fast one in memory, as targets 0 and 1.
fn slow_and_fast(vhost: &Vhost) -> PathBuf {
    aio(vhost, "Aio0", 16 * MIB);
    slow(vhost, "Slow0", "Aio0");
    malloc(vhost, "Malloc0", 16 * MIB, 512);
    scsi_controller(vhost, "vhost.0", &[(0, "Slow0"), (1, "Malloc0")])
}

/// The targets of a controller that have a disk, and its bdev.
fn targets(vhost: &Vhost, controller: &str) -> Vec<(u64, String)> {
    let shown = vhost.ok("vhost_get_controllers", json!({"name": controller}));
    let scsi = shown[0]["backend_specific"]["scsi"].as_array().unwrap();
    let target = |t: &Value| {
        let bdev = t["luns"][0]["bdev_name"].as_str().unwrap();
        (t["scsi_dev_num"].as_u64().unwrap(), bdev.to_owned())
    };
    scsi.iter().map(target).collect()
}

fn wait_in_flight(vhost: &Vhost, controller: &str) {
    wait_until("I/O in flight", || in_flight(vhost, controller) > 0);
}

#[test]
fn a_guest_works_on_the_targets_of_a_controller() {
    let vhost = Vhost::start(&[]);
    let file = aio(&vhost, "Aio0", 32 * MIB);
    malloc(&vhost, "Malloc0", 32 * MIB, 4096);
    let readonly = vhost.dir().join("readonly.img");
    make_file(&readonly, 8 * MIB);
    let params = json!({
        "name": "Aio1", "filename": readonly, "block_size": 512, "readonly": true,
    });
    vhost.ok("bdev_aio_create", params);
    let bdevs = [(0, "Aio0"), (3, "Malloc0"), (7, "Aio1")];
    let socket = scsi_controller(&vhost, "vhost.0", &bdevs);
    let mut guest = Guest::boot(GuestOptions { cpus: 4, ..GuestOptions::scsi(&socket) });

    let disks = [0, 3, 7].map(|target| guest.scsi_disk(target));
    let [file_disk, malloc_disk, readonly_disk] = &disks;
    let expected =
        [(32, 512, 0, "Aio0"), (32, 4096, 0, "Malloc0"), (8, 512, 1, "Aio1")].into_iter();
    for (disk, (mib, block_bytes, read_only, bdev)) in disks.iter().zip(expected) {
        let facts = guest.disk(disk);
        let seen = ["size_bytes", "queues", "block_bytes", "ro"].map(|name| facts.number(name));
        assert_eq!(seen, [mib * MIB as u64, 4, block_bytes, read_only], "{disk}");
        assert_eq!(facts.text("serial"), bdev);
    }

    // What the host has written is there, what the guest writes arrives, by each of its queues.
    assert_eq!(guest.digest(file_disk, None), file_sha256(&file));
    let copy = format!("dd if=/dev/{file_disk} of=/dev/{malloc_disk} bs=1M");
    guest.ok(&format!("{copy} iflag=direct oflag=direct status=none"));
    assert_eq!(guest.digest(malloc_disk, None), file_sha256(&file));
    let payload = format!("dd of=/dev/{file_disk} bs=1M iflag=fullblock oflag=direct status=none");
    guest.ok(&format!("payload 1 8 | {payload}"));
    let digest = file_sha256(&file);
    assert_eq!(guest.digest(file_disk, None), digest);
    let read = format!("dd if=/dev/{file_disk} bs=1M count=4 iflag=direct status=none | sha256sum");
    let by_cpu = guest.ok(&format!("for mask in 1 2 4 8; do taskset $mask {read}; done"));
    let by_cpu: Vec<&str> = by_cpu.lines().collect();
    assert!(by_cpu.len() == 4 && by_cpu.iter().all(|sum| *sum == by_cpu[0]), "{by_cpu:?}");

    assert_eq!(guest.digest(readonly_disk, None), file_sha256(&readonly));
    let write = format!("dd if=/seed of=/dev/{readonly_disk} bs=64k count=1 oflag=direct");
    assert_ne!(guest.run(&write).rc, 0);
    discards_and_zeroes(&mut guest, file_disk, &file);

    guest.power_off();
    vhost.ok("vhost_delete_controller", json!({"ctrlr": "vhost.0"}));
    assert!(!vhost.socket("vhost.0").exists());
    assert_eq!(vhost.stop(), 0);
}

/// A range that is no multiple of anything reads as zeroes afterwards, in the guest and on the host.
fn discards_and_zeroes(guest: &mut Guest, disk: &str, file: &Path) {
    let facts = guest.disk(disk);
    assert!(facts.number("discard_max_bytes") > 0 && facts.number("zeroes_max_bytes") > 0);
    let mut expected = fs::read(file).unwrap();
    let discarded = 3 * MIB + 512..5 * MIB - 1536;
    expected[discarded.clone()].fill(0);
    let (at, len) = (discarded.start, discarded.len());
    guest.ok(&format!("blkdiscard -o {at} -l {len} /dev/{disk}"));
    assert_eq!(guest.digest(disk, None), sha256(&expected));
    assert_eq!(file_sha256(file), sha256(&expected));

    // The inode tables are cleared with the ioctl that Linux makes WRITE SAME of.
    let make = "/sbin/mke2fs -q -F -t ext4 -b 1024 -E lazy_itable_init=0,nodiscard";
    guest.ok(&format!("{make} /dev/{disk} && sync"));
    assert_eq!(guest.digest(disk, None), file_sha256(file));
    let files = format!(
        "want=$(payload 2 4 | sha256sum) && mkdir -p /mnt && mount -t ext4 /dev/{disk} /mnt && \
         payload 2 4 >/mnt/file && sync && umount /mnt && echo 3 >/proc/sys/vm/drop_caches && \
         mount -t ext4 /dev/{disk} /mnt && got=$(sha256sum </mnt/file) && umount /mnt && \
         [ \"$got\" = \"$want\" ]"
    );
    guest.ok(&files);
}

#[test]
fn firmware_boots_from_target_5() {
    let vhost = Vhost::start(&[]);
    let file = aio(&vhost, "Aio0", MIB);
    malloc(&vhost, "Malloc0", MIB, 512);
    let disk = BootDisk::make(&file);
    disk.put("GUEST: boot 0\n");
    let socket = scsi_controller(&vhost, "vhost.0", &[(0, "Malloc0"), (5, "Aio0")]);
    let scsi_properties = ",bootindex=0,boot_tpgt=5";
    let options = GuestOptions { job: None, reboots: true, ..GuestOptions::scsi(&socket) };
    disk.boots(Guest::start(GuestOptions { scsi_properties, ..options }));
    assert_eq!(vhost.stop(), 0);
}

#[test]
fn linux_boots_from_a_target() {
    let vhost = Vhost::start(&[]);
    let file = vhost.dir().join("linux.img");
    if let Err(lacks) = make_linux_disk(&file) {
        test_report::skipped("syslinux", &lacks);
        return;
    }
    aio_on(&vhost, "Aio0", &file);
    let socket = scsi_controller(&vhost, "vhost.0", &[(5, "Aio0")]);
    let scsi_properties = ",bootindex=0,boot_tpgt=5";
    let options = GuestOptions { job: None, ..GuestOptions::scsi(&socket) };
    let mut guest = Guest::boot(GuestOptions { scsi_properties, ..options });
    let disk = guest.scsi_disk(5);
    assert_eq!(guest.digest(&disk, None), file_sha256(&file));
    guest.power_off();
    assert_eq!(vhost.stop(), 0);
}

#[test]
fn targets_come_and_go_under_a_working_guest() {
    let vhost = Vhost::start(&[]);
    malloc(&vhost, "Stays", 16 * MIB, 512);
    let file = aio(&vhost, "Aio0", 16 * MIB);
    slow(&vhost, "Comes", "Aio0");
    let socket = scsi_controller(&vhost, "vhost.0", &[(0, "Stays")]);
    let mut guest = Guest::boot(GuestOptions::scsi(&socket));
    let stays = guest.scsi_disk(0);
    guest.start_io(&stays, 4);
    let fds = vhost.fds();
    for _ in 0..4 {
        add_target(&vhost, "vhost.0", 6, "Comes");
        let comes = guest.scsi_disk(6);
        let first_mib = &fs::read(&file).unwrap()[..MIB];
        assert_eq!(guest.digest(&comes, Some(1)), sha256(first_mib));
        guest.start_io(&comes, 4);
        wait_in_flight(&vhost, "vhost.0");

        guest.skip_lines();
        remove_target(&vhost, "vhost.0", 6);
        guest.io_fails(&comes);
        guest.no_scsi_disk(6);
        assert_eq!(targets(&vhost, "vhost.0"), [(0, "Stays".into())]);
        guest.io_goes_on(&stays, 4);
    }

    // A bdev that is deleted takes its target with it.
    malloc(&vhost, "Goes", 16 * MIB, 512);
    add_target(&vhost, "vhost.0", 2, "Goes");
    let goes = guest.scsi_disk(2);
    guest.start_io(&goes, 4);
    guest.skip_lines();
    vhost.ok("bdev_malloc_delete", json!({"name": "Goes"}));
    guest.io_fails(&goes);
    guest.no_scsi_disk(2);
    wait_until("the target is gone", || targets(&vhost, "vhost.0").len() == 1);
    guest.io_goes_on(&stays, 4);
    guest.finish_io(&stays, 4);
    wait_until("no fd left", || vhost.fds() == fds);
    guest.power_off();
    assert_eq!(vhost.stop(), 0);
}

#[test]
fn a_target_is_removed_when_its_disk_has_answered() {
    let vhost = Vhost::start(&[]);
    malloc(&vhost, "Stays", 16 * MIB, 512);
    malloc(&vhost, "M", 16 * MIB, 512);
    vhost.ok("bdev_error_create", json!({"base_name": "M"}));
    let socket = scsi_controller(&vhost, "vhost.0", &[(0, "Stays"), (1, "EE_M")]);
    let mut guest = Guest::boot(GuestOptions::scsi(&socket));
    let (stays, goes) = (guest.scsi_disk(0), guest.scsi_disk(1));
    guest.start_io(&goes, 4);
    hold(&vhost, "EE_M", u32::MAX);
    wait_until("all of the load's I/O is held", || in_flight(&vhost, "vhost.0") == 8);
    guest.start_io(&stays, 4);

    let mut rpc = vhost.connect();
    let params = json!({"ctrlr": "vhost.0", "scsi_target_num": 1, "timeout_ms": 600_000});
    let removal = rpc.send("vhost_scsi_controller_remove_target", params.clone());
    wait_until("the removal is under way", || targets(&vhost, "vhost.0").len() == 1);
    let again = vhost.err("vhost_scsi_controller_remove_target", params);
    assert_eq!(again, Refusal::new(-32602, "Device or resource busy"));
    // A disk that hangs delays its own removal, and nothing else.
    guest.io_goes_on(&stays, 4);
    assert!(!rpc.has_answer());
    guest.skip_lines();
    answer(&vhost, "EE_M");
    assert_eq!(rpc.receive(), (json!(removal), Ok(json!(true))));
    guest.io_fails(&goes);
    guest.no_scsi_disk(1);
    guest.io_goes_on(&stays, 4);
    guest.power_off();
    assert_eq!(vhost.stop(), 0);
}

#[test]
fn a_controller_is_unplugged_and_plugged_in_again_under_a_working_guest() {
    let vhost = Vhost::start(&[]);
    malloc(&vhost, "Stays", 16 * MIB, 512);
    aio(&vhost, "Aio0", 16 * MIB);
    slow(&vhost, "Comes", "Aio0");
    let socket = scsi_controller(&vhost, "comes", &[(3, "Comes")]);
    let options = GuestOptions::scsi(&scsi_controller(&vhost, "stays", &[(0, "Stays")]));
    let arguments = &["-device", "pcie-root-port,id=root1,chassis=1"];
    let mut guest = Guest::boot(GuestOptions { arguments, ..options });
    let stays = guest.scsi_disk(0);
    guest.start_io(&stays, 4);
    let fds = vhost.fds();
    for _ in 0..4 {
        let address = json!({"type": "unix", "data": {"path": socket}});
        let backend = json!({"type": "socket", "data": {"addr": address, "server": false}});
        guest.qmp("chardev-add", json!({"id": "plugged", "backend": backend}));
        let driver = "vhost-user-scsi-pci";
        let device = json!({"driver": driver, "id": "d9", "chardev": "plugged", "bus": "root1"});
        guest.qmp("device_add", device);
        let comes = guest.scsi_disk(3);
        guest.start_io(&comes, 4);
        wait_in_flight(&vhost, "comes");

        guest.skip_lines();
        guest.unplug("d9");
        guest.io_fails(&comes);
        guest.qmp("chardev-remove", json!({"id": "plugged"}));
        wait_until_all_is_gone(&vhost, "comes", fds);
        guest.io_goes_on(&stays, 4);
    }
    guest.finish_io(&stays, 4);
    guest.power_off();
    for name in ["comes", "stays"] {
        vhost.ok("vhost_delete_controller", json!({"ctrlr": name}));
    }
    assert_eq!(vhost.stop(), 0);
}

#[test]
fn a_guest_is_reset_and_paused_in_the_middle_of_io() {
    let vhost = Vhost::start(&[]);
    let socket = slow_and_fast(&vhost);
    let fds = vhost.fds();
    let mut guest = Guest::start(GuestOptions { reboots: true, ..GuestOptions::scsi(&socket) });
    let started = || sessions(&vhost, "vhost.0").iter().any(|session| session["started"] == true);
    for _ in 0..3 {
        // The firmware has started the controller, or the kernel has and looks for disks.
        wait_until("a started session", started);
        guest.qmp("system_reset", json!({}));
        wait_until("a stopped session", || !started());
    }
    guest.wait_ready();

    let disk = guest.scsi_disk(0);
    guest.start_io(&disk, 4);
    for _ in 0..8 {
        wait_in_flight(&vhost, "vhost.0");
        guest.qmp("stop", json!({}));
        assert_eq!(guest.status(), "paused");
        // QEMU has been told that each ring has stopped, and none of the I/O is left.
        assert_eq!(in_flight(&vhost, "vhost.0"), 0);
        guest.qmp("cont", json!({}));
        guest.io_goes_on(&disk, 4);
    }
    for _ in 0..2 {
        wait_in_flight(&vhost, "vhost.0");
        guest.qmp("system_reset", json!({}));
        guest.wait_ready();
        let disk = guest.scsi_disk(0);
        guest.start_io(&disk, 4);
        assert_eq!(sessions(&vhost, "vhost.0").len(), 1);
    }
    guest.power_off();
    wait_until_all_is_gone(&vhost, "vhost.0", fds);
    assert_eq!(vhost.stop(), 0);
}

#[test]
fn two_guests_share_a_controller_and_one_is_killed() {
    let vhost = Vhost::start(&[]);
    let socket = slow_and_fast(&vhost);
    let fds = vhost.fds();
    let mut a = Guest::start(GuestOptions::scsi(&socket));
    let mut b = Guest::boot(GuestOptions::scsi(&socket));
    a.wait_ready();
    assert_eq!(sessions(&vhost, "vhost.0").len(), 2);
    let (of_a, of_b) = (a.scsi_disk(0), b.scsi_disk(0));
    a.start_io(&of_a, 1);
    b.start_io(&of_b, 9);
    wait_until("I/O of both in flight", || {
        let in_flight = |s: &Value| s["inflight_task_cnt"].as_u64().unwrap() > 0;
        sessions(&vhost, "vhost.0").iter().all(in_flight)
    });
    b.kill9();
    let mut c = Guest::boot(GuestOptions::scsi(&socket));
    a.io_goes_on(&of_a, 1);
    let of_c = c.scsi_disk(0);
    c.start_io(&of_c, 9);
    assert_eq!(sessions(&vhost, "vhost.0").len(), 2, "A and C");

    // Both are told of a target that comes, and of one that goes.
    malloc(&vhost, "Comes", 16 * MIB, 512);
    add_target(&vhost, "vhost.0", 7, "Comes");
    for guest in [&mut a, &mut c] {
        guest.scsi_disk(7);
    }
    remove_target(&vhost, "vhost.0", 7);
    for guest in [&mut a, &mut c] {
        guest.no_scsi_disk(7);
    }
    a.io_goes_on(&of_a, 1);
    a.kill9();
    c.io_goes_on(&of_c, 9);
    c.kill9();
    wait_until_all_is_gone(&vhost, "vhost.0", fds);
    vhost.ok("vhost_delete_controller", json!({"ctrlr": "vhost.0"}));
    assert_eq!(vhost.stop(), 0);
}

#[test]
fn a_disk_grows_under_running_guests() {
    let vhost = Vhost::start(&[]);
    let file = aio(&vhost, "Grows", 16 * MIB);
    malloc(&vhost, "Stays", 16 * MIB, 512);
    let socket = scsi_controller(&vhost, "vhost.0", &[(0, "Stays"), (4, "Grows")]);
    // Each session hears of it.
    let mut guests = [(); 2].map(|()| Guest::boot(GuestOptions::scsi(&socket)));
    let disks = guests.each_mut().map(|guest| guest.scsi_disk(4));
    guests[0].start_io(&disks[0], 4);
    fs::File::options().write(true).open(&file).unwrap().set_len(24 * MIB as u64).unwrap();
    vhost.ok("bdev_aio_rescan", json!({"name": "Grows"}));
    let sectors = 24 * MIB / 512;
    for (guest, disk) in guests.iter_mut().zip(&disks) {
        guest.ok(&format!(
            "until [ $(cat /sys/block/{disk}/size) = {sectors} ]; do sleep 0.1; done"
        ));
    }
    guests[0].io_goes_on(&disks[0], 4);
    guests[0].finish_io(&disks[0], 4);
    let at = 23 * 16;
    let write = format!("dd if=/seed of=/dev/{} bs=64k seek={at} oflag=direct", disks[0]);
    guests[0].ok(&format!("{write} status=none"));
    for (guest, disk) in guests.iter_mut().zip(&disks) {
        assert_eq!(guest.digest(disk, None), file_sha256(&file));
    }
    for guest in guests {
        guest.power_off();
    }
    assert_eq!(vhost.stop(), 0);
}

#[test]
fn a_guest_is_saved_to_a_file_and_goes_on_from_it() {
    guest::deaths::tolerated(|| {
        let vhost = Vhost::start(&[]);
        let socket = slow_and_fast(&vhost);
        let file = vhost.dir().join("saved");
        let mut guest = Guest::boot(GuestOptions::scsi(&socket));
        let disks = [0, 1].map(|target| guest.scsi_disk(target));
        for disk in &disks {
            guest.start_io(disk, 4);
        }
        for n in 1..=cycles(3) {
            wait_in_flight(&vhost, "vhost.0");
            guest.save(&file);
            wait_until("the session has ended", || sessions(&vhost, "vhost.0").is_empty());
            guest = Guest::restore(GuestOptions::scsi(&socket), &file);
            for disk in &disks {
                guest.io_goes_on(disk, 4);
            }
            eprintln!("{n} times saved");
        }
        for disk in &disks {
            guest.finish_io(disk, 4);
        }
        guest.power_off();
        assert_eq!(vhost.stop(), 0);
    });
}
