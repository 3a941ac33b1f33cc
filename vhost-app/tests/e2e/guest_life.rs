//! What happens in the life of a virtual machine: firmware, resets, pauses, a disk that hangs, goes
//! or comes, and others that connect meanwhile.

use front_end::{FrontEnd, GuestRam, Options, QueueOptions, RawConnection};
use serde_json::json;

use crate::support::disks::{
    MIB, aio, answer, controller, hold, in_flight, make_file, malloc, sessions, slow, start_behind,
    wait_until_all_is_gone,
};
use crate::support::guest::boot::BootDisk;
use crate::support::guest::{Guest, GuestOptions, RING_PACKED};
use crate::support::harness::{Launch, Vhost, wait_until};

#[test]
fn firmware_boots_from_the_disk() {
    let vhost = Vhost::start(&[]);
    let file = aio(&vhost, "Aio0", MIB);
    let disk = BootDisk::make(&file);
    disk.put("GUEST: boot 0\n");
    let options = GuestOptions::new(&controller(&vhost, "vhost.0", "Aio0"));
    let properties = ",bootindex=0";
    let options = GuestOptions { job: None, disk_properties: properties, reboots: true, ..options };
    disk.boots(Guest::start(options));
    assert_eq!(vhost.stop(), 0);
}

#[test]
fn a_guest_is_reset_while_its_kernel_boots_and_while_it_works() {
    let vhost = Vhost::start(&[]);
    aio(&vhost, "Aio0", 16 * MIB);
    slow(&vhost, "Slow0", "Aio0");
    let socket = controller(&vhost, "vhost.0", "Slow0");
    let fds = vhost.fds();
    let mut guest = Guest::start(GuestOptions { reboots: true, ..GuestOptions::new(&socket) });
    let started =
        |vhost: &Vhost| sessions(vhost, "vhost.0").iter().any(|session| session["started"] == true);
    for _ in 0..3 {
        // The firmware has started the disk, or the kernel has and looks for partitions.
        wait_until("a started ring", || started(&vhost));
        guest.qmp("system_reset", json!({}));
        wait_until("a stopped ring", || !started(&vhost));
    }
    guest.wait_ready();
    guest.start_io("vda", 4);
    wait_until("I/O in flight", || in_flight(&vhost, "vhost.0") > 0);
    guest.qmp("system_reset", json!({}));
    guest.wait_ready();
    guest.start_io("vda", 4);
    guest.finish_io("vda", 4);
    assert_eq!(sessions(&vhost, "vhost.0").len(), 1);
    guest.power_off();
    wait_until_all_is_gone(&vhost, "vhost.0", fds);
    assert_eq!(vhost.stop(), 0);
}

#[test]
fn a_guest_whose_disk_hangs_is_paused_and_reset_when_the_disk_has_answered() {
    let vhost = Vhost::start(&[]);
    malloc(&vhost, "M", 16 * MIB, 512);
    vhost.ok("bdev_error_create", json!({"base_name": "M"}));
    let options = GuestOptions::new(&controller(&vhost, "vhost.0", "EE_M"));
    let mut guest = Guest::boot(GuestOptions { reboots: true, ..options });
    let hang = || {
        hold(&vhost, "EE_M", 99);
        wait_until("all of the guest's I/O is held", || in_flight(&vhost, "vhost.0") == 8);
    };
    let waits = || sessions(&vhost, "vhost.0")[0]["state"] == "quiescing";

    guest.start_io("vda", 4);
    for _ in 0..3 {
        hang();
        guest.qmp_send("stop", json!({}));
        wait_until("QEMU waits for the disk", waits);
        assert_eq!(in_flight(&vhost, "vhost.0"), 8);
        assert!(!guest.qmp_has_answer(), "QEMU may not stop with I/O in flight");
        answer(&vhost, "EE_M");
        guest.qmp_answer();
        assert_eq!((guest.status().as_str(), in_flight(&vhost, "vhost.0")), ("paused", 0));
        guest.qmp("cont", json!({}));
        guest.io_goes_on("vda", 4);
    }

    hang();
    guest.qmp_send("system_reset", json!({}));
    wait_until("QEMU waits for the disk", waits);
    answer(&vhost, "EE_M");
    guest.qmp_answer();
    guest.wait_ready();
    guest.start_io("vda", 4);
    guest.finish_io("vda", 4);
    guest.power_off();
    assert_eq!(vhost.stop(), 0);
}

#[test]
fn a_guest_with_packed_rings_is_paused_and_reset_in_the_middle_of_io() {
    let dir = tempfile::tempdir().unwrap();
    let (file, link) = (dir.path().join("disk"), dir.path().join("socket"));
    make_file(&file, 16 * MIB);
    let vhost = start_behind(Launch::new(), &link, &file);
    let options = GuestOptions::new(&link);
    let options = GuestOptions { reboots: true, disk_properties: ",packed=on", ..options };
    let mut guest = Guest::boot(options);
    assert!(guest.has_feature("vda", RING_PACKED));
    for _ in 0..2 {
        guest.start_io("vda", 4);
        for _ in 0..8 {
            wait_until("I/O in flight", || in_flight(&vhost, "vhost.0") > 0);
            guest.qmp("stop", json!({}));
            assert_eq!(in_flight(&vhost, "vhost.0"), 0);
            guest.qmp("cont", json!({}));
            guest.io_goes_on("vda", 4);
        }
        wait_until("I/O in flight", || in_flight(&vhost, "vhost.0") > 0);
        guest.qmp("system_reset", json!({}));
        guest.wait_ready();
    }
    guest.power_off();
    assert_eq!(vhost.stop(), 0);
}

#[test]
fn a_disk_is_unplugged_and_plugged_in_again_under_a_working_guest() {
    let vhost = Vhost::start(&[]);
    malloc(&vhost, "Stays", 16 * MIB, 512);
    aio(&vhost, "Aio0", 16 * MIB);
    slow(&vhost, "Comes", "Aio0");
    let socket = controller(&vhost, "comes", "Comes");
    let options = GuestOptions::new(&controller(&vhost, "stays", "Stays"));
    let arguments = &["-device", "pcie-root-port,id=root1,chassis=1"];
    let mut guest = Guest::boot(GuestOptions { arguments, ..options });
    guest.start_io("vda", 4);
    let fds = vhost.fds();
    for _ in 0..4 {
        let address = json!({"type": "unix", "data": {"path": socket}});
        let backend = json!({"type": "socket", "data": {"addr": address, "server": false}});
        guest.qmp("chardev-add", json!({"id": "plugged", "backend": backend}));
        let driver = "vhost-user-blk-pci";
        let device = json!({"driver": driver, "id": "d9", "chardev": "plugged", "bus": "root1"});
        guest.qmp("device_add", device);
        guest.ok("until [ -e /dev/vdb ]; do sleep 0.1; done");
        guest.start_io("vdb", 4);
        wait_until("I/O in flight", || in_flight(&vhost, "comes") > 0);

        guest.skip_lines();
        guest.unplug("d9");
        guest.io_fails("vdb");
        guest.qmp("chardev-remove", json!({"id": "plugged"}));
        wait_until_all_is_gone(&vhost, "comes", fds);
        guest.io_goes_on("vda", 4);
    }
    guest.finish_io("vda", 4);
    guest.power_off();
    for name in ["comes", "stays"] {
        vhost.ok("vhost_delete_controller", json!({"ctrlr": name}));
    }
    assert_eq!(vhost.stop(), 0);
}

#[test]
fn a_guest_works_on_while_others_connect_and_go_by_the_hundred() {
    let vhost = Vhost::start(&[]);
    malloc(&vhost, "M", 16 * MIB, 512);
    vhost.null("N");
    let own = controller(&vhost, "own", "M");
    let other = controller(&vhost, "other", "N");
    let mut guest = Guest::boot(GuestOptions::new(&own));
    guest.start_io("vda", 4);
    let fds = vhost.fds();
    for n in 0..300 {
        for socket in [&own, &other] {
            let ram = GuestRam::new(&[1 << 20]).unwrap();
            let mut front_end = FrontEnd::connect(socket, ram, Options::default()).unwrap();
            match n % 3 {
                0 => front_end.kill(),
                1 => {
                    front_end.start_new(1, QueueOptions::default()).unwrap();
                    front_end.kill();
                }
                _ => {
                    front_end.start_new(1, QueueOptions::default()).unwrap();
                    front_end.disconnect().unwrap();
                }
            }
            // Half a message.
            RawConnection::connect(socket).unwrap().send(&[1, 0, 0, 0, 1], &[]).unwrap();
        }
        if n % 30 == 0 {
            guest.io_goes_on("vda", 4);
        }
    }
    guest.finish_io("vda", 4);
    wait_until("the guest's session alone is left", || {
        sessions(&vhost, "own").len() == 1 && sessions(&vhost, "other").is_empty()
    });
    wait_until("no fd left", || vhost.fds() == fds);
    guest.power_off();
    assert_eq!(vhost.stop(), 0);
}
