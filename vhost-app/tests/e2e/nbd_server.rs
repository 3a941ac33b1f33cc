//! Exports over NBD: images are copied onto and off bdevs with the tools that people use, and
//! exports end when their bdev or the process does.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use bench::{Load, LoadOptions};
use front_end::{FrontEnd, GuestRam, Options, QueueOptions};
use serde_json::{Value, json};

use crate::support::harness::{Launch, Refusal, Vhost, wait_until};
use crate::support::slow_files::{Kind, Op, SlowFiles};

const BYTES: u64 = 64 << 20;

/// Exports a bdev on a socket, and returns the socket's path.
fn export(vhost: &Vhost, bdev: &str) -> PathBuf {
    let path = vhost.dir().join(format!("{bdev}.nbd"));
    let device = format!("unix:{}", path.display());
    let params = json!({"bdev_name": bdev, "nbd_device": device});
    assert_eq!(vhost.ok("nbd_start_disk", params), json!(device));
    path
}

fn device(path: &Path) -> Value {
    json!({"nbd_device": format!("unix:{}", path.display())})
}

fn uri(path: &Path) -> String {
    format!("nbd+unix:///?socket={}", path.display())
}

fn run(program: &str, args: &[&str]) -> Output {
    let output = Command::new(program).args(args).output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {args:?}: {error}");
    output
}

/// A sparse image with data at its beginning, in its middle and at its end.
fn image(path: &Path) {
    let mut bytes = vec![0; usize::try_from(BYTES).unwrap()];
    let len = bytes.len();
    for (seed, at) in [(1_u8, 0), (2, len / 2 + 4096), (3, len - (1 << 20))] {
        let part = &mut bytes[at..at + (1 << 20)];
        part.iter_mut()
            .enumerate()
            .for_each(|(i, byte)| *byte = seed ^ u8::try_from(i % 253).unwrap());
    }
    fs::write(path, bytes).unwrap();
}

#[test]
fn images_are_copied_onto_and_off_bdevs_with_qemu_and_libnbd() {
    let vhost = Vhost::start(&[]);
    let source = vhost.dir().join("source.raw");
    image(&source);
    let source_text = source.to_str().unwrap();
    vhost.ok(
        "bdev_malloc_create",
        json!({"name": "M", "num_blocks": BYTES / 4096, "block_size": 4096}),
    );
    let file = vhost.file("f.raw", BYTES);
    vhost.ok("bdev_uring_create", json!({"name": "F", "filename": file, "block_size": 512}));
    for bdev in ["M", "F"] {
        let socket = export(&vhost, bdev);
        let uri = uri(&socket);
        run("qemu-img", &["convert", "-n", "-f", "raw", "-O", "raw", source_text, &uri]);
        run("qemu-img", &["compare", "-f", "raw", "-F", "raw", source_text, &uri]);
        let copy = vhost.dir().join(format!("{bdev}.copy"));
        run("nbdcopy", &[&uri, copy.to_str().unwrap()]);
        assert!(fs::read(&copy).unwrap() == fs::read(&source).unwrap(), "{bdev}");
        let info = run("nbdinfo", &["--json", &uri]).stdout;
        let info: Value = serde_json::from_slice(&info).unwrap();
        let export = &info["exports"][0];
        assert_eq!(info["structured"], true);
        assert_eq!(
            (&export["export-size"], &export["is_read_only"]),
            (&json!(BYTES), &json!(false))
        );
        let can = |what: &str| export[what].as_bool().unwrap();
        assert!(can("can_flush") && can("can_fua") && can("can_multi_conn") && can("can_zero"));
        assert_eq!(vhost.ok("nbd_stop_disk", device(&socket)), json!(true));
        assert!(!socket.exists());
    }
    // A file's holes are known without reading them.
    let socket = export(&vhost, "F");
    let map = run("nbdinfo", &["--map", "--json", &uri(&socket)]).stdout;
    let map: Vec<Value> = serde_json::from_slice(&map).unwrap();
    let types: Vec<u64> = map.iter().map(|extent| extent["type"].as_u64().unwrap()).collect();
    assert!(types.contains(&0) && types.contains(&3), "{types:?}");
    let total: u64 = map.iter().map(|extent| extent["length"].as_u64().unwrap()).sum();
    assert_eq!(total, BYTES);
}

#[test]
fn exports_are_started_shown_saved_and_stopped_as_in_spdk() {
    let vhost = Vhost::start(&[]);
    vhost.malloc("M");
    let no_device = Refusal::new(-19, "No such device");
    let start = |params: Value| vhost.err("nbd_start_disk", params);
    assert_eq!(start(json!({"bdev_name": "X", "nbd_device": "unix:x"})), no_device);
    let illegal = Refusal::new(-19, "illegal nbd device /dev/sda");
    assert_eq!(start(json!({"bdev_name": "M", "nbd_device": "/dev/sda"})), illegal);
    if !Path::new("/sys/block/nbd0").exists() {
        let none = Refusal::new(-19, "nbd device not found");
        assert_eq!(start(json!({"bdev_name": "M"})), none);
        vhost.wait_for_log("export on a socket");
        assert_ne!(start(json!({"bdev_name": "M", "nbd_device": "/dev/nbd0"})).code, 0);
    }
    assert_eq!(start(json!({"nbd_device": "unix:x"})).code, -32603);
    // The client of SPDK, and a path that is relative to the directory of the sockets.
    let answer = vhost.spdk_rpc(&["nbd_start_disk", "M", "unix:m.nbd"]).unwrap();
    assert_eq!(answer.trim(), "unix:m.nbd");
    let busy = start(json!({"bdev_name": "M", "nbd_device": "unix:m.nbd"}));
    assert_eq!(busy, Refusal::new(-16, "Device or resource busy"));
    let occupied = vhost.dir().join("file");
    fs::write(&occupied, "x").unwrap();
    let occupied = format!("unix:{}", occupied.display());
    let busy = start(json!({"bdev_name": "M", "nbd_device": occupied}));
    assert_eq!(busy, Refusal::new(-16, "Device or resource busy"));
    let params = json!({"bdev_name": "M", "nbd_device": "unix:ro.nbd", "readonly": true});
    vhost.ok("nbd_start_disk", params);
    let shown = json!([
        {"nbd_device": "unix:m.nbd", "bdev_name": "M", "clients": 0},
        {"nbd_device": "unix:ro.nbd", "bdev_name": "M", "clients": 0},
    ]);
    assert_eq!(vhost.ok("nbd_get_disks", Value::Null), shown);
    assert_eq!(vhost.ok("nbd_get_disks", json!({"nbd_device": "unix:ro.nbd"})), json!([shown[1]]));
    assert_eq!(vhost.err("nbd_get_disks", json!({"nbd_device": "unix:x"})), no_device);
    assert_eq!(vhost.err("nbd_stop_disk", json!({"nbd_device": "unix:x"})), no_device);
    let info = run("nbdinfo", &["--is", "read-only", &uri(&vhost.socket("ro.nbd"))]);
    assert!(info.status.success());
    // A bdev on top would write to the same blocks.
    let split = json!({"base_bdev": "M", "split_count": 2});
    assert_eq!(vhost.err("bdev_split_create", split.clone()).code, -32602);
    let saved = vhost.spdk_rpc(&["save_config"]).unwrap();
    assert_eq!(vhost.stop(), 0);

    let vhost = Launch::new().config(&saved).start();
    assert_eq!(vhost.ok("nbd_get_disks", Value::Null), shown);
    assert_eq!(vhost.spdk_rpc(&["save_config"]).unwrap(), saved);
    for name in ["m.nbd", "ro.nbd"] {
        vhost.spdk_rpc(&["nbd_stop_disk", &format!("unix:{name}")]).unwrap();
        assert!(!vhost.socket(name).exists());
    }
    vhost.ok("bdev_split_create", split);
    let claimed = json!({"bdev_name": "M", "nbd_device": "unix:m.nbd"});
    let refused = Refusal::new(-1, "Operation not permitted");
    assert_eq!(vhost.err("nbd_start_disk", claimed), refused);
}

#[test]
fn an_export_ends_with_its_bdev_and_with_the_process() {
    let vhost = Vhost::start(&[]);
    vhost.malloc("M");
    vhost.malloc("N");
    let [socket, other] = ["M", "N"].map(|bdev| export(&vhost, bdev));
    // A client in the middle of the handshake, and one that has nothing to say.
    let mut client = UnixStream::connect(&socket).unwrap();
    let mut greeting = [0; 18];
    client.read_exact(&mut greeting).unwrap();
    vhost.ok("bdev_malloc_delete", json!({"name": "M"}));
    assert_eq!(client.read(&mut greeting).unwrap(), 0);
    assert!(!socket.exists());
    let left = vhost.ok("nbd_get_disks", Value::Null);
    assert_eq!(left[0]["bdev_name"], "N");
    let mut client = UnixStream::connect(&other).unwrap();
    client.read_exact(&mut greeting).unwrap();
    assert_eq!(vhost.stop(), 0);
    assert!(!other.exists());
    assert_eq!(client.read(&mut greeting).unwrap_or(0), 0);
}

#[test]
fn hostile_clients_disturb_neither_other_clients_nor_guests() {
    let vhost = Vhost::start(&[]);
    vhost.malloc("M");
    vhost.malloc("G");
    let socket = export(&vhost, "M");
    vhost.ok("vhost_create_blk_controller", json!({"ctrlr": "guest", "dev_name": "G"}));
    let ram = GuestRam::new(&[32 << 20]).unwrap();
    let mut front_end = FrontEnd::connect(&vhost.socket("guest"), ram, Options::default()).unwrap();
    let queues = front_end.start_any(1, QueueOptions::default()).unwrap();
    let options = LoadOptions { blocks: 0..256, ..LoadOptions::default() };
    let load = Load::start(queues, options).unwrap();
    // The handshake's beginning, each with other garbage behind it.
    let mut kept = vec![];
    for garbage in [&b""[..], b"\xff\xff\xff\xff", b"\0\0\0\x03garbage-garbage-garbage"] {
        let mut client = UnixStream::connect(&socket).unwrap();
        client.write_all(garbage).unwrap();
        kept.push(client);
    }
    // More clients than are served: the last ones are refused at once.
    let mut refused = 0;
    for _ in 0..40 {
        let mut client = UnixStream::connect(&socket).unwrap();
        let mut greeting = [0; 18];
        match client.read_exact(&mut greeting) {
            Ok(()) => kept.push(client),
            Err(_) => refused += 1,
        }
    }
    assert!(refused >= 24, "{refused}");
    drop(kept);
    wait_until("the clients are gone", || {
        vhost.ok("nbd_get_disks", Value::Null)[0]["clients"] == 0
    });
    assert!(run("nbdinfo", &["--size", &uri(&socket)]).status.success());
    let (summary, _) = load.stop().unwrap();
    assert_eq!((summary.first_problem, summary.errors, summary.mismatches), (None, 0, 0));
    front_end.disconnect().unwrap();
}

/// A client's write that its disk does not answer delays nobody, and the export's end is bounded.
#[test]
fn a_hung_disk_delays_only_its_own_export() {
    let Some(files) = SlowFiles::mount(&[("hung", Kind::Uncached, BYTES)]) else { return };
    let vhost = Vhost::start(&[]);
    let file = files.path("hung");
    vhost.ok("bdev_aio_create", json!({"name": "H", "filename": file, "block_size": 512}));
    vhost.malloc("M");
    let [hung, socket] = ["H", "M"].map(|bdev| export(&vhost, bdev));
    files.hold("hung", Op::Read);
    let mut reader = Command::new("nbdcopy").args([&uri(&hung), "null:"]).spawn().unwrap();
    files.wait_for_held("hung", Op::Read, 1);
    assert!(run("nbdinfo", &["--size", &uri(&socket)]).status.success());
    vhost.ok("nbd_stop_disk", device(&hung));
    assert!(!reader.wait().unwrap().success());
    vhost.wait_for_log("its bdev has not answered I/O");
    files.release("hung", Op::Read);
    vhost.ok("bdev_aio_delete", json!({"name": "H"}));
    assert_eq!(vhost.stop(), 0);
}
