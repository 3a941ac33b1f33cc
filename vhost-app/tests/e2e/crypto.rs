//! Encrypted disks: keys and disks by RPC, what is stored, guests' data, and a restart.

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;

use bench::{Load, LoadOptions};
use front_end::{FrontEnd, GuestRam, Options, QueueOptions};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support::harness::{Launch, Refusal, Vhost};

/// The bytes 0 to 15, and 100 to 115.
const KEY: &str = "000102030405060708090a0b0c0d0e0f";
const KEY2: &str = "6465666768696a6b6c6d6e6f70717273";

fn key(name: &str) -> Value {
    json!({
        "name": name, "cipher": "AES_XTS", "key": KEY, "key2": KEY2, "tweak_mode": "SIMPLE_LBA",
    })
}

fn disk() -> Value {
    json!({"base_bdev_name": "F", "name": "C", "key_name": "k"})
}

/// Writes and reads back through a controller.
fn serves(vhost: &Vhost, controller: &str) {
    let ram = GuestRam::new(&[32 << 20]).unwrap();
    let socket = vhost.socket(controller);
    let mut front_end = FrontEnd::connect(&socket, ram, Options::default()).unwrap();
    let queues = front_end.start_any(1, QueueOptions::default()).unwrap();
    let load = Load::start(queues, LoadOptions { blocks: 0..256, ..LoadOptions::default() });
    let (summary, _) = load.unwrap().stop().unwrap();
    assert_eq!((summary.first_problem, summary.errors, summary.mismatches), (None, 0, 0));
    front_end.disconnect().unwrap();
}

#[test]
fn keys_and_disks_answer_as_in_spdk() {
    let vhost = Vhost::start(&[]);
    let create = |params: Value| vhost.err("accel_crypto_key_create", params);
    let parse = || Refusal::new(-32700, "spdk_json_decode_object failed");
    let dek = |rc: i32| Refusal::new(-32602, &format!("failed to create DEK, rc -{rc}"));
    let with = |name: &str, value: Value| {
        let mut params = key("k");
        params[name] = value;
        params
    };
    assert_eq!(create(json!({"name": "k"})), parse());
    assert_eq!(create(with("cipher", json!("AES"))), parse());
    assert_eq!(create(with("tweak_mode", json!("LBA"))), parse());
    let refused = [
        ("key2", KEY),
        ("key2", &KEY2[2..]),
        ("key", "xx0102030405060708090a0b0c0d0e0f"),
        ("cipher", "AES_CBC"),
        ("tweak_mode", "INCR_512_FULL_LBA"),
    ];
    for (name, value) in refused {
        assert_eq!(create(with(name, json!(value))), dek(22), "{name}");
    }
    let mut one = key("k");
    one.as_object_mut().unwrap().remove("key2");
    assert_eq!(create(one), dek(22));
    assert_eq!(vhost.ok("accel_crypto_keys_get", Value::Null), json!([]));
    assert_eq!(vhost.ok("accel_crypto_key_create", key("k")), true);
    assert_eq!(create(key("k")), dek(17));
    assert_eq!(vhost.ok("accel_crypto_keys_get", json!({"key_name": "k"})), json!([key("k")]));
    let none = Refusal::new(-32602, "key was not found");
    assert_eq!(vhost.err("accel_crypto_keys_get", json!({"key_name": "x"})), none);

    let create = |params: Value| vhost.err("bdev_crypto_create", params);
    let text = "Failed to decode crypto disk create parameters.";
    assert_eq!(create(json!({"name": "C"})), Refusal::new(-32700, text));
    let mut params = disk();
    params["key_name"] = json!("x");
    assert_eq!(create(params), Refusal::new(-32602, "Key was not found"));
    let params = json!({"base_bdev_name": "F", "name": "C"});
    assert_eq!(create(params), Refusal::new(-32603, "No key was found"));
    // The base may come later.
    assert_eq!(vhost.ok("bdev_crypto_create", disk()), "C");
    assert_eq!(create(disk()), Refusal::new(-17, "File exists"));
    let busy = Refusal::new(-16, "Device or resource busy");
    let destroy = |name: &str| vhost.rpc("accel_crypto_key_destroy", json!({"key_name": name}));
    assert_eq!(destroy("k"), Err(busy.clone()));
    vhost.malloc("F");
    let shown = vhost.bdev("C");
    assert_eq!(shown["product_name"], "crypto");
    assert_eq!(shown["driver_specific"]["crypto"], disk());
    assert_eq!(shown["supported_io_types"]["write_zeroes"], true);
    assert_eq!(destroy("k"), Err(busy));
    let mut second = disk();
    second["name"] = json!("D");
    assert_eq!(create(second), Refusal::new(-1, "Operation not permitted"));
    let delete = |params: Value| vhost.rpc("bdev_crypto_delete", params);
    assert_eq!(delete(json!({})), Err(Refusal::new(-32602, "Invalid parameters")));
    assert_eq!(delete(json!({"name": "F"})), Err(Refusal::new(-19, "No such device")));
    assert_eq!(delete(json!({"name": "C"})), Ok(json!(true)));
    assert_eq!(destroy("k"), Ok(json!(true)));
    assert_eq!(destroy("k"), Err(Refusal::new(-32602, "No key object found")));
    let log = vhost.log();
    assert!(!log.contains(KEY) && !log.contains(KEY2), "a key is in the log");
    assert_eq!(vhost.stop(), 0);
}

/// Compares a file with the disk that is exported as `C.nbd`, or copies it there.
fn qemu_img(vhost: &Vhost, command: &[&str], source: &Path) {
    let uri = format!("nbd+unix:///?socket={}", vhost.dir().join("C.nbd").display());
    let args = [command, &[source.to_str().unwrap(), &uri]].concat();
    let output = Command::new("qemu-img").args(args).output().unwrap();
    assert!(output.status.success(), "{output:?}");
}

const COPY: &[&str] = &["convert", "-n", "-f", "raw", "-O", "raw"];
const COMPARE: &[&str] = &["compare", "-f", "raw", "-F", "raw"];

#[test]
fn guests_data_is_stored_encrypted_and_read_after_a_restart() {
    let dir = TempDir::new().unwrap();
    let [file, source] = ["disk", "source"].map(|name| dir.path().join(name));
    File::create(&file).unwrap().set_len(8 << 20).unwrap();
    let vhost = Vhost::start(&[]);
    let params = json!({"name": "F", "filename": file, "block_size": 512});
    vhost.ok("bdev_aio_create", params);
    vhost.ok("accel_crypto_key_create", key("k"));
    vhost.ok("bdev_crypto_create", disk());
    vhost.ok("vhost_create_blk_controller", json!({"ctrlr": "c", "dev_name": "C"}));
    serves(&vhost, "c");
    vhost.ok("vhost_delete_controller", json!({"ctrlr": "c"}));
    // Through the disk, with a known pattern: another implementation has encrypted block 5.
    let byte = |i: u32| (i % 512 * 7 + i % 512 / 256).to_le_bytes()[0];
    fs::write(&source, (0..8 << 20).map(byte).collect::<Vec<u8>>()).unwrap();
    vhost.ok("nbd_start_disk", json!({"bdev_name": "C", "nbd_device": "unix:C.nbd"}));
    qemu_img(&vhost, COPY, &source);
    qemu_img(&vhost, COMPARE, &source);
    let saved = vhost.spdk_rpc(&["save_config"]).unwrap();
    assert!(saved.contains(KEY), "as in SPDK");
    assert_eq!(vhost.stop(), 0);
    let stored = fs::read(&file).unwrap();
    let begin = [0x64, 0x79, 0x7A, 0x36, 0xE0, 0xA8, 0x0C, 0x01];
    assert_eq!(stored[5 * 512..5 * 512 + 8], begin);

    let vhost = Launch::new().config(&saved).start();
    assert_eq!(vhost.spdk_rpc(&["save_config"]).unwrap(), saved);
    qemu_img(&vhost, COMPARE, &source);
    assert_eq!(vhost.stop(), 0);
}
