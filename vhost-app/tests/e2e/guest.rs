//! The real `vhost` under a real Linux guest: what works, what an operator does to it meanwhile, and
//! what dies.
//!
//! One test costs a boot or two, 4 to 8 s each under TCG, so a test tells a whole story.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use crate::support::disks::{
    MIB, aio, controller, controller_of, file_sha256, in_flight, make_file, malloc, rings,
    sessions, sha256, slow, start_behind, wait_until_all_is_gone,
};
use crate::support::guest::{Guest, GuestOptions};
use crate::support::harness::{Launch, Vhost, matrix, wait_until};

/// Writes a payload to a file system of its own, and reads it back from the disk.
const FILE_SYSTEM: &str = "check() {
    want=$(payload 1 4 | sha256sum) &&
    /sbin/mke2fs -q -F -t ext4 /dev/$1 && mkdir -p /mnt && mount -t ext4 /dev/$1 /mnt &&
    payload 1 4 >/mnt/file && sync && umount /mnt && echo 3 >/proc/sys/vm/drop_caches &&
    mount -t ext4 /dev/$1 /mnt && got=$(sha256sum </mnt/file) && umount /mnt && [ \"$got\" = \"$want\" ];
}; check";

#[test]
fn a_guest_works_on_disks_of_one_and_of_four_queues_and_on_a_read_only_one() {
    let vhost = Vhost::start(&[]);
    let file = aio(&vhost, "Aio0", 32 * MIB);
    let malloc = "bdev_malloc_create -b Malloc0 32 4096 -p 16384 -o 32";
    vhost.spdk_rpc(&malloc.split(' ').collect::<Vec<_>>()).unwrap();
    let options = GuestOptions {
        cpus: 4,
        ..GuestOptions::new(&controller(&vhost, "one", "Aio0"))
            .disk(&controller(&vhost, "four", "Malloc0"), 4)
    };
    let readonly = json!({"ctrlr": "readonly", "dev_name": "Aio0", "readonly": true});
    vhost.ok("vhost_create_blk_controller", readonly);
    let mut guest = Guest::boot(options.disk(&vhost.socket("readonly"), 1));

    let expected =
        [("vda", "Aio0", 1, 512, 0), ("vdb", "Malloc0", 4, 4096, 0), ("vdc", "Aio0", 1, 512, 1)];
    for (disk, bdev, queues, block_bytes, read_only) in expected {
        let facts = guest.disk(disk);
        let seen = ["size_bytes", "queues", "block_bytes", "ro"].map(|name| facts.number(name));
        assert_eq!(seen, [32 * MIB as u64, queues, block_bytes, read_only], "{disk}");
        assert_eq!(facts.text("serial").trim_end_matches('_'), bdev);
    }
    for (disk, topology) in [("vda", "512 512 0"), ("vdb", "16384 16384 131072")] {
        let sizes = "cat physical_block_size minimum_io_size optimal_io_size";
        assert_eq!(guest.ok(&format!("cd /sys/block/{disk}/queue && echo $({sizes})")), topology);
    }
    for (name, queues) in [("one", 1), ("four", 4), ("readonly", 1)] {
        let [session] = &sessions(&vhost, name)[..] else { panic!("{name}: not one session") };
        assert_eq!((&session["started"], &session["max_queues"]), (&json!(true), &json!(queues)));
    }

    // What the host has written is there, what the guest writes arrives, for both kinds of disk.
    assert_eq!(guest.digest("vda", None), file_sha256(&file));
    guest.ok(&format!("{} vda", FILE_SYSTEM.replace('\n', " ")));
    guest.ok(&format!("{} vdb", FILE_SYSTEM.replace('\n', " ")));
    let digest = guest.digest("vda", None);
    assert_eq!(digest, file_sha256(&file));
    // Each CPU has a queue of its own.
    let read = "dd if=/dev/vdb bs=1M count=4 iflag=direct status=none | sha256sum";
    let by_cpu = guest.ok(&format!("for mask in 1 2 4 8; do taskset $mask {read}; done"));
    let by_cpu: Vec<&str> = by_cpu.lines().collect();
    assert!(by_cpu.len() == 4 && by_cpu.iter().all(|sum| *sum == by_cpu[0]), "{by_cpu:?}");

    // The third disk shows the first, and cannot be written to.
    assert_eq!(guest.digest("vdc", None), digest);
    for write in ["dd if=/seed of=/dev/vdc bs=64k count=1 oflag=direct", "blkdiscard /dev/vdc"] {
        assert_ne!(guest.run(write).rc, 0, "{write}");
    }
    assert_eq!(file_sha256(&file), digest);

    guest.power_off();
    for name in ["one", "four", "readonly"] {
        vhost.ok("vhost_delete_controller", json!({"ctrlr": name}));
        assert!(!vhost.socket(name).exists());
    }
    assert_eq!(vhost.stop(), 0);
}

#[test]
fn what_a_guest_discards_or_zeroes_reads_as_zeroes() {
    discards_and_zeroes(false);
}

#[test]
fn what_a_guest_with_packed_rings_discards_or_zeroes_reads_as_zeroes() {
    discards_and_zeroes(true);
}

fn discards_and_zeroes(packed: bool) {
    const SIZE: usize = 16 * MIB;
    let vhost = Vhost::start(&[]);
    let file = aio(&vhost, "Aio0", SIZE);
    malloc(&vhost, "Malloc0", SIZE, 512);
    let options = GuestOptions::new(&controller_of(&vhost, "aio", "Aio0", packed));
    let disk_properties = if packed { ",packed=on" } else { "" };
    let options = GuestOptions { disk_properties, ..options };
    let second = controller_of(&vhost, "malloc", "Malloc0", packed);
    let mut guest = Guest::boot(options.disk(&second, 1));
    guest.ok("dd if=/dev/vda of=/dev/vdb bs=1M oflag=direct status=none");
    let mut expected = fs::read(&file).unwrap();
    assert_eq!(guest.digest("vdb", None), sha256(&expected));

    // Sizes that are no multiple of anything, next to blocks that must stay.
    let discarded = 3 * MIB + 512..5 * MIB - 1536;
    expected[discarded.clone()].fill(0);
    for disk in ["vda", "vdb"] {
        let facts = guest.disk(disk);
        assert!(facts.number("discard_max_bytes") > 0 && facts.number("zeroes_max_bytes") > 0);
        let (at, len) = (discarded.start, discarded.len());
        guest.ok(&format!("blkdiscard -o {at} -l {len} /dev/{disk}"));
        assert_eq!(guest.digest(disk, None), sha256(&expected), "{disk}");
    }
    assert_eq!(file_sha256(&file), sha256(&expected));

    // The tool clears the inode tables with the ioctl that Linux makes WRITE_ZEROES of.
    let make = "/sbin/mke2fs -q -F -t ext4 -b 1024 -g 4096 -O ^flex_bg -N 8192 \
                -E lazy_itable_init=0,nodiscard";
    for disk in ["vda", "vdb"] {
        guest.ok(&format!("{make} /dev/{disk} && sync"));
    }
    let (first, last) = last_inode_table(&file);
    let table = first * 1024..(last + 1) * 1024;
    assert!(expected[table.clone()].iter().any(|byte| *byte != 0), "it was not empty before");
    assert!(fs::read(&file).unwrap()[table].iter().all(|byte| *byte == 0));
    for disk in ["vda", "vdb"] {
        let range = format!("skip={first} count={}", last + 1 - first);
        let left = format!("dd if=/dev/{disk} bs=1k {range} iflag=direct status=none");
        assert_eq!(guest.ok(&format!("{left} | tr -d '\\000' | wc -c")), "0", "{disk}");
    }
    guest.power_off();
    for feature in ["discard", "write zeroes"] {
        matrix::cell("QEMU 7.2", rings(packed), feature);
    }
}

/// The first and the last block of the last inode table of an ext4 file system.
fn last_inode_table(file: &Path) -> (usize, usize) {
    let output = Command::new("dumpe2fs").arg(file).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let line = text.lines().rfind(|line| line.contains("Inode table at ")).expect("ext4");
    let blocks = line.trim().strip_prefix("Inode table at ").unwrap();
    let (first, last) = blocks.split(' ').next().unwrap().split_once('-').unwrap();
    (first.parse().unwrap(), last.parse().unwrap())
}

#[test]
fn a_guest_is_paused_and_reset_in_the_middle_of_io() {
    let vhost = Vhost::start(&[]);
    let file = aio(&vhost, "Aio0", 16 * MIB);
    slow(&vhost, "Slow0", "Aio0");
    let options = GuestOptions::new(&controller(&vhost, "vhost.0", "Slow0"));
    let mut guest = Guest::boot(GuestOptions { reboots: true, ..options });
    guest.ok("payload 1 1 | dd of=/dev/vda bs=64k iflag=fullblock oflag=direct status=none");
    let digest = guest.digest("vda", Some(1));
    assert_eq!(digest, sha256(&fs::read(&file).unwrap()[..MIB]));
    guest.start_io("vda", 8);

    for _ in 0..5 {
        wait_until("I/O in flight", || in_flight(&vhost, "vhost.0") > 0);
        guest.qmp("stop", json!({}));
        assert_eq!(guest.status(), "paused");
        // QEMU has been told that each ring has stopped, and none of the I/O is left.
        assert_eq!(in_flight(&vhost, "vhost.0"), 0);
        guest.qmp("cont", json!({}));
        guest.io_goes_on("vda", 8);
    }

    wait_until("I/O in flight", || in_flight(&vhost, "vhost.0") > 0);
    guest.qmp("system_reset", json!({}));
    guest.wait_ready();
    assert_eq!(guest.disk("vda").number("size_bytes"), 16 * MIB as u64);
    assert_eq!(guest.digest("vda", Some(1)), digest);
    guest.start_io("vda", 8);
    assert_eq!(sessions(&vhost, "vhost.0").len(), 1);
    guest.power_off();
}

#[test]
fn two_guests_share_a_controller_and_one_is_killed() {
    let vhost = Vhost::start(&[]);
    aio(&vhost, "Aio0", 16 * MIB);
    slow(&vhost, "Slow0", "Aio0");
    let socket = controller(&vhost, "vhost.0", "Slow0");
    let fds = vhost.fds();

    let mut a = Guest::start(GuestOptions::new(&socket));
    let mut b = Guest::boot(GuestOptions::new(&socket));
    a.wait_ready();
    assert_eq!(sessions(&vhost, "vhost.0").len(), 2);
    // Each writes its half, and reads the other's.
    let write = "iflag=fullblock bs=64k oflag=direct conv=notrunc status=none";
    a.ok(&format!("payload 1 1 | dd of=/dev/vda {write}"));
    b.ok(&format!("payload 2 1 | dd of=/dev/vda {write} seek={}", 8 * 16));
    let both = a.digest("vda", None);
    assert_eq!(b.digest("vda", None), both);
    let read = |guest: &mut Guest, at: usize| {
        let part = format!("dd if=/dev/vda bs=1M count=1 skip={at} iflag=direct status=none");
        guest.ok(&format!("{part} | sha256sum"))
    };
    let (first, second) = (read(&mut b, 0), read(&mut a, 8));
    assert_eq!(first, a.ok("payload 1 1 | sha256sum"));
    assert_eq!(second, b.ok("payload 2 1 | sha256sum"));

    a.start_io("vda", 1);
    b.start_io("vda", 9);
    wait_until("I/O of both in flight", || {
        let in_flight = |s: &Value| s["inflight_task_cnt"].as_u64().unwrap() > 0;
        sessions(&vhost, "vhost.0").iter().all(in_flight)
    });
    b.kill9();
    // The next one may come at once.
    let mut c = Guest::start(GuestOptions::new(&socket));
    a.io_goes_on("vda", 1);
    c.wait_ready();
    assert_eq!(sessions(&vhost, "vhost.0").len(), 2, "A and C");
    assert_eq!((read(&mut c, 0), read(&mut c, 8)), (first, second));
    c.start_io("vda", 9);
    a.io_goes_on("vda", 1);

    a.kill9();
    c.io_goes_on("vda", 9);
    c.kill9();
    wait_until_all_is_gone(&vhost, "vhost.0", fds);
    vhost.ok("vhost_delete_controller", json!({"ctrlr": "vhost.0"}));
    assert_eq!(vhost.stop(), 0);
}

#[test]
fn a_disk_grows_and_a_disk_goes_under_a_running_guest() {
    let vhost = Vhost::start(&[]);
    let file = aio(&vhost, "Grows", 16 * MIB);
    malloc(&vhost, "Goes", 16 * MIB, 512);
    malloc(&vhost, "Stays", 16 * MIB, 512);
    let options = GuestOptions::new(&controller(&vhost, "grows", "Grows"));
    let mut other = Guest::start(GuestOptions::new(&controller(&vhost, "stays", "Stays")));
    let mut guest = Guest::boot(options.disk(&controller(&vhost, "goes", "Goes"), 1));
    other.wait_ready();
    guest.start_io("vda", 0);
    guest.start_io("vdb", 0);
    other.start_io("vda", 0);

    // Told by the backend channel, the guest looks again by itself.
    fs::File::options().write(true).open(&file).unwrap().set_len(24 * MIB as u64).unwrap();
    vhost.ok("bdev_aio_rescan", json!({"name": "Grows"}));
    let sectors = 24 * MIB / 512;
    guest.ok(&format!("until [ $(cat /sys/block/vda/size) = {sectors} ]; do sleep 0.1; done"));
    let at = 23 * 16;
    guest.ok(&format!("dd if=/seed of=/dev/vda bs=64k seek={at} oflag=direct status=none"));
    assert_eq!(
        guest.ok("sha256sum </seed").split(' ').next().unwrap(),
        sha256(&fs::read(&file).unwrap()[23 * MIB..])
    );
    guest.io_goes_on("vda", 0);

    // A disk that is gone gives errors: to what is under way, and to what comes later.
    guest.skip_lines();
    vhost.ok("bdev_malloc_delete", json!({"name": "Goes"}));
    guest.io_fails("vdb");
    assert_ne!(guest.run("dd if=/dev/vdb of=/dev/null bs=64k count=1 iflag=direct").rc, 0);
    let shown = vhost.ok("vhost_get_controller_stats", json!({"name": "goes"}));
    assert_eq!(shown[0]["backend_specific"]["block"]["bdev"], Value::Null);
    guest.io_goes_on("vda", 0);
    other.io_goes_on("vda", 0);
    guest.power_off();
    other.power_off();
    vhost.ok("vhost_delete_controller", json!({"ctrlr": "goes"}));
}

#[test]
fn vhost_ends_under_a_working_guest_and_another_takes_over() {
    let dir = tempfile::tempdir().unwrap();
    let (file, link) = (dir.path().join("disk"), dir.path().join("socket"));
    make_file(&file, 16 * MIB);
    let mut vhost = start_behind(Launch::new(), &link, &file);
    let options = GuestOptions::new(&link);
    let mut guest = Guest::boot(GuestOptions { reconnect: Some(1), ..options });
    guest.start_io("vda", 4);
    wait_until("I/O in flight", || in_flight(&vhost, "vhost.0") > 0);
    vhost.signal("TERM");
    assert_eq!(vhost.wait(), Some(0));
    assert!(!vhost.socket("vhost.0").exists() && !vhost.rpc_socket().exists());
    assert_eq!(guest.status(), "running");

    let vhost = start_behind(Launch::new(), &link, &file);
    guest.io_goes_on("vda", 4);
    guest.power_off();
    assert_eq!(vhost.stop(), 0);
}
