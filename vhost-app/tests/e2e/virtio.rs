//! Disks of another vhost-user server: how they are attached by RPC and served, and what happens
//! when the server dies, hangs, or is not a vhost-user server.

use std::os::unix::net::UnixListener;
use std::path::Path;

use front_end::{FrontEnd, GuestRam, Options, QueueOptions, Request, STATUS_OK};
use serde_json::{Value, json};

use crate::support::disks::controller;
use crate::support::harness::{self, Launch, Refusal, Vhost, wait_until};
use crate::support::storage_daemon::StorageDaemon;
use crate::support::verified_load::{end, goes_on, guest};

const BYTES: u64 = 32 << 20;

fn attach(vhost: &Vhost, socket: &Path, name: &str) {
    let params = json!({"name": name, "trtype": "user", "traddr": socket, "dev_type": "blk"});
    assert_eq!(vhost.ok("bdev_virtio_attach_controller", params), json!([name]));
}

fn specific(vhost: &Vhost, name: &str) -> Value {
    vhost.bdev(name)["driver_specific"]["virtio"].clone()
}

#[test]
fn a_server_is_attached_shown_and_saved_as_in_spdk() {
    let server = StorageDaemon::start("qcow2", BYTES);
    let vhost = Vhost::start(&[]);
    let socket = server.socket();
    let socket = socket.to_str().unwrap();
    let args = ["bdev_virtio_attach_controller", "-t", "user", "-a", socket, "-d", "blk", "V0"];
    assert_eq!(vhost.spdk_rpc(&args).unwrap().trim(), "V0");
    let shown = vhost.bdev("V0");
    assert_eq!(shown["product_name"], "VirtioBlk Disk");
    assert_eq!((&shown["block_size"], &shown["num_blocks"]), (&json!(512), &json!(BYTES / 512)));
    let about = json!({"vq_count": 1, "vq_size": 512, "type": "user", "socket": socket,
        "connected": true});
    assert_eq!(shown["driver_specific"]["virtio"], about);
    let invalid = Refusal::new(-32602, "Invalid argument");
    let with = |key: &str, value: Value| {
        let mut params =
            json!({"name": "V1", "trtype": "user", "traddr": socket, "dev_type": "blk"});
        params[key] = value;
        vhost.err("bdev_virtio_attach_controller", params)
    };
    for (key, value) in [
        ("trtype", json!("pci")),
        ("dev_type", json!("scsi")),
        ("traddr", json!("/no/such/socket")),
        ("vq_size", json!(65)),
        ("vq_size", json!(65_536)),
        ("vq_count", json!(0)),
    ] {
        assert_eq!(with(key, value.clone()), invalid, "{key} {value}");
    }
    assert_eq!(with("name", json!("V0")).code, -17);
    assert_eq!(with("vq_count", json!("1")), invalid);
    let saved = vhost.spdk_rpc(&["save_config"]).unwrap();
    let uuid = shown["uuid"].clone();
    assert_eq!(vhost.stop(), 0);

    let vhost = Launch::new().config(&saved).start();
    assert_eq!(vhost.bdev("V0")["uuid"], uuid);
    assert_eq!(vhost.spdk_rpc(&["save_config"]).unwrap(), saved);
    vhost.malloc("M0");
    let no_device = Refusal::new(-19, "No such device");
    for name in ["V1", "M0"] {
        assert_eq!(vhost.err("bdev_virtio_detach_controller", json!({"name": name})), no_device);
    }
    vhost.spdk_rpc(&["bdev_virtio_detach_controller", "V0"]).unwrap();
    assert_eq!(vhost.bdev_names(), ["M0"]);
    // The server has one front end at a time.
    attach(&vhost, &server.socket(), "V0");
}

/// Four rings, of which two reactors serve two each, share the server's only queue.
fn a_load_outlives_its_server(args: &[&str]) {
    // The host keeps what this server has written.
    let mut server = StorageDaemon::start("raw", BYTES);
    let vhost = Launch::new().mask(harness::two_cores()).args(args).start();
    attach(&vhost, &server.socket(), "V0");
    let load = guest(&vhost, "V0", 4);
    goes_on(&vhost, "V0");
    for _ in 0..3 {
        server.kill();
        wait_until("the bdev notices", || specific(&vhost, "V0")["connected"] == false);
        server.serve_again();
        goes_on(&vhost, "V0");
    }
    assert_eq!(vhost.log().matches("connected to").count(), 4);
    end(load);
    assert_eq!(vhost.stop(), 0);
}

#[test]
fn a_load_outlives_its_server_on_reactors_that_poll() {
    a_load_outlives_its_server(&[]);
}

#[test]
fn a_load_outlives_its_server_on_reactors_that_sleep() {
    a_load_outlives_its_server(&["--interrupt-mode"]);
}

/// The disk of a neighbour goes on, and so do RPCs, while a server hangs, is away, or never answers.
#[test]
fn a_server_that_hangs_holds_up_only_its_own_disk() {
    let mut server = StorageDaemon::start("qcow2", BYTES);
    let vhost = Vhost::start(&[]);
    attach(&vhost, &server.socket(), "V0");
    vhost.malloc("M0");
    let (neighbour, victim) = (guest(&vhost, "M0", 1), guest(&vhost, "V0", 1));
    goes_on(&vhost, "V0");
    server.signal("STOP");
    goes_on(&vhost, "M0");

    let silent = vhost.dir().join("silent");
    let _listener = UnixListener::bind(&silent).unwrap();
    let mut hangs = vhost.connect();
    let params = json!({"name": "V1", "trtype": "user", "traddr": silent, "dev_type": "blk"});
    hangs.send("bdev_virtio_attach_controller", params);
    goes_on(&vhost, "M0");
    vhost.null("N0");
    assert!(!hangs.has_answer(), "the server has not answered");

    // The server does not answer, and its disk is deleted all the same.
    vhost.ok("bdev_virtio_detach_controller", json!({"name": "V0"}));
    let (summary, _) = victim.1.stop().unwrap();
    assert!(summary.errors > 0 && summary.mismatches == 0 && summary.outstanding == 0);
    server.signal("CONT");
    server.kill();
    goes_on(&vhost, "M0");
    let (_, answer) = hangs.receive();
    assert_eq!(answer.unwrap_err(), Refusal::new(-32602, "Invalid argument"));
    end(neighbour);
    assert_eq!(vhost.stop(), 0);
}

/// Another `vhost` serves the disk.
#[test]
fn front_ends_and_operators_see_that_the_server_resizes_the_disk() {
    const CONFIG_CHANGE: u32 = 2;
    const MIB_SECTORS: u64 = (1 << 20) / 512;
    let server = Launch::new().mask("0x1").start();
    server.ok("bdev_null_create", json!({"name": "N", "num_blocks": 2048, "block_size": 512}));
    let socket = controller(&server, "n", "N");
    let vhost = Vhost::start(&[]);
    attach(&vhost, &socket, "V0");
    let ram = GuestRam::new(&[1 << 20]).unwrap();
    let socket = controller(&vhost, "v", "V0");
    let mut front_end = FrontEnd::connect(&socket, ram, Options::default()).unwrap();
    let mut channel = front_end.open_backend_channel().unwrap();
    let mut queue = front_end.start_new(1, QueueOptions::default()).unwrap().remove(0);
    let sector = [queue.ring().ram().alloc(512, 512).unwrap()];
    assert_eq!(front_end.config().unwrap().capacity, MIB_SECTORS);

    for mib in [2, 3] {
        server.ok("bdev_null_resize", json!({"name": "N", "new_size": mib}));
        assert_eq!(channel.receive().unwrap().request, CONFIG_CHANGE);
        assert_eq!(front_end.config().unwrap().capacity, mib * MIB_SECTORS);
        assert_eq!(vhost.bdev("V0")["num_blocks"], mib * MIB_SECTORS);
        let last = Request::read(mib * MIB_SECTORS - 1, &sector);
        assert_eq!(queue.run(&last).unwrap().status, STATUS_OK);
    }
    let told = vhost.ok("notify_get_notifications", json!({}));
    let told = told.as_array().unwrap().iter().filter(|one| one["type"] == "bdev_resize");
    assert_eq!(told.map(|one| &one["ctx"]).collect::<Vec<_>>(), ["V0", "V0"]);
    drop(front_end);
    assert_eq!(vhost.stop(), 0);
    assert_eq!(server.stop(), 0);
}

#[test]
fn a_server_may_come_back_with_a_larger_disk_but_not_with_a_smaller_one() {
    let mut server = StorageDaemon::start("raw", BYTES);
    let vhost = Vhost::start(&[]);
    attach(&vhost, &server.socket(), "V0");
    let mut again_with = |bytes: u64| {
        server.kill();
        wait_until("the bdev notices", || specific(&vhost, "V0")["connected"] == false);
        server.resize(bytes);
        server.serve_again();
    };
    again_with(2 * BYTES);
    wait_until("the larger disk", || specific(&vhost, "V0")["connected"] == true);
    assert_eq!(vhost.bdev("V0")["num_blocks"], 2 * BYTES / 512);
    again_with(BYTES);
    vhost.wait_for_log(
        "expected 1 queues and a disk of at least 67108864 bytes, found 1 and 33554432",
    );
    assert_eq!(specific(&vhost, "V0")["connected"], false);
    assert_eq!(vhost.bdev("V0")["num_blocks"], 2 * BYTES / 512);
    again_with(2 * BYTES);
    wait_until("the former size", || specific(&vhost, "V0")["connected"] == true);
    assert_eq!(vhost.stop(), 0);
}
