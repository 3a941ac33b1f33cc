//! The methods of Ceph RBD on a real cluster: what they take, answer, show and save.

use std::fs;

use front_end::request::STATUS_IOERR;
use serde_json::{Value, json};

use crate::support::ceph::{BLOCK, Cluster, Driver};
use crate::support::disks;
use crate::support::harness::{Launch, Refusal, Vhost, wait_until};

/// VIRTIO_BLK_F_RO.
const READ_ONLY: u64 = 1 << 5;

/// What SPDK answers to most failures.
fn not_permitted() -> Refusal {
    Refusal::new(-1, "Operation not permitted")
}

/// What SPDK's client prints, as JSON.
fn client(vhost: &Vhost, args: &[&str]) -> Value {
    let printed = vhost.spdk_rpc(args).unwrap();
    serde_json::from_str(&printed).unwrap_or_else(|_| printed.trim().into())
}

#[test]
fn spdks_client_creates_shows_resizes_and_deletes() {
    let Some(cluster) = Cluster::find() else { return };
    let (first, second) = (cluster.image(16), cluster.image(16));
    let vhost = cluster.start();
    let create = ["bdev_rbd_create", "rbd", &first.name, "4096"];
    assert_eq!(client(&vhost, &create), "Ceph0");
    assert_eq!(client(&vhost, &["bdev_rbd_create", "rbd", &second.name, "512"]), "Ceph1");

    let shown = client(&vhost, &["bdev_get_bdevs", "-b", "Ceph0"])[0].take();
    assert_eq!(shown["product_name"], "Ceph Rbd Disk");
    assert_eq!((&shown["block_size"], &shown["num_blocks"]), (&json!(4096), &json!(4096)));
    let names = json!({"pool_name": "rbd", "rbd_name": first.name, "state": "serving"});
    assert_eq!(shown["driver_specific"], json!({"rbd": names}));
    for io in ["read", "write", "unmap", "flush", "reset", "write_zeroes"] {
        assert_eq!(shown["supported_io_types"][io], true, "{io}");
    }

    assert_eq!(client(&vhost, &["bdev_rbd_resize", "Ceph0", "32"]), true);
    assert_eq!(vhost.bdev("Ceph0")["num_blocks"], 8192);
    assert_eq!(client(&vhost, &["bdev_rbd_resize", "Ceph0", "32"]), true, "to the same size");
    assert!(vhost.spdk_rpc(&["bdev_rbd_resize", "Ceph0", "31"]).is_err());

    client(&vhost, &["bdev_rbd_delete", "Ceph0"]);
    assert_eq!(vhost.bdev_names(), ["Ceph1"]);
    wait_until("the image is closed", || first.watchers().is_empty());
    let uuid = "5ac1e1d2-6f4e-4d0c-9c43-1d2f3a4b5c6d";
    let create = ["bdev_rbd_create", "rbd", &first.name, "512", "-b", "R", "-u", uuid, "-r"];
    assert_eq!(client(&vhost, &create), "R");
    let shown = vhost.bdev("R");
    assert_eq!((&shown["uuid"], &shown["num_blocks"]), (&json!(uuid), &json!(65536)));
    assert_eq!(client(&vhost, &create[..4]), "Ceph2", "the next number, beside a reader");
    assert_eq!(vhost.stop(), 0);
}

#[test]
fn spdks_client_registers_and_unregisters_clusters() {
    let Some(cluster) = Cluster::find() else { return };
    let image = cluster.image(16);
    let vhost = cluster.start();
    let (conf, key_file) = (cluster.conf(), cluster.file("client.guest.keyring"));
    let file = ["--config-file", &conf, "--key-file", &key_file, "--user", "guest"];
    let register = [&["bdev_rbd_register_cluster", "one"], &file[..]].concat();
    assert_eq!(client(&vhost, &register), "one");
    let options = cluster.options("admin");
    let [host, key] = ["mon_host", "key"].map(|o| format!("{o}={}", options[o].as_str().unwrap()));
    let params = ["--config-param", &host, "--config-param", &key, "--core-mask", "0x1"];
    let register = [&["bdev_rbd_register_cluster", "two"], &params[..]].concat();
    assert_eq!(client(&vhost, &register), "two");

    let one = json!({
        "cluster_name": "one", "user_id": "guest", "config_file": conf, "key_file": key_file,
    });
    let two = json!({"cluster_name": "two", "config_param": options, "core_mask": "0x1"});
    // With a name, SPDK answers with an object.
    assert_eq!(client(&vhost, &["bdev_rbd_get_clusters_info", "-b", "one"]), one);
    assert_eq!(client(&vhost, &["bdev_rbd_get_clusters_info"]), json!([one, two]));

    let create = ["bdev_rbd_create", "rbd", &image.name, "512", "-b", "R", "-c", "one"];
    assert_eq!(client(&vhost, &create), "R");
    let shown = json!({
        "pool_name": "rbd", "rbd_name": image.name, "user_id": "guest", "config_file": conf,
        "key_file": key_file, "state": "serving",
    });
    assert_eq!(vhost.bdev("R")["driver_specific"]["rbd"], shown);
    let mut driver = Driver::start(&disks::controller(&vhost, "r", "R"));
    driver.write(0..8, 7);
    assert_eq!(driver.read(7), 7);
    drop(driver);

    let unregister = |name: &str| vhost.rpc("bdev_rbd_unregister_cluster", json!({"name": name}));
    assert_eq!(unregister("one"), Err(not_permitted()), "it is in use");
    client(&vhost, &["bdev_rbd_unregister_cluster", "two"]);
    vhost.ok("vhost_delete_controller", json!({"ctrlr": "r"}));
    vhost.ok("bdev_rbd_delete", json!({"name": "R"}));
    // The image is closed now, or a moment later.
    wait_until("it can be unregistered", || unregister("one").is_ok());
    let none = vhost.err("bdev_rbd_get_clusters_info", Value::Null);
    assert_eq!(none, Refusal::new(-2, "No such file or directory"));
    assert_eq!(vhost.stop(), 0);
}

#[test]
fn refusals_have_spdks_codes_and_texts() {
    let Some(cluster) = Cluster::find() else { return };
    let image = cluster.image(16);
    let vhost = cluster.start();
    image.disk(&vhost, "R", json!({}));
    vhost.malloc("M");
    let create = |params: Value| vhost.err("bdev_rbd_create", params);
    let undecodable = Refusal::new(-32603, "spdk_json_decode_object failed");
    assert_eq!(create(json!({"pool_name": "rbd", "rbd_name": image.name})), undecodable);
    assert_eq!(create(image.params("X", json!({"config": "text"}))), undecodable);
    let invalid = Refusal::new(-22, "Invalid argument");
    assert_eq!(create(image.params("X", json!({"block_size": 0}))), invalid);
    let exists = Refusal::new(-17, "File exists");
    assert_eq!(create(image.params("R", json!({}))), exists);
    assert_eq!(create(image.params("M", json!({}))), exists);
    for more in [
        json!({"pool_name": "nope"}),
        json!({"rbd_name": "nope"}),
        json!({"namespace": "nope"}),
        json!({"cluster_name": "nope"}),
        json!({"user_id": "nobody"}),
        // No file is read then.
        json!({"config": {}, "user_id": "admin"}),
        json!({"config": {"no_such_option": "1"}}),
        // Another bdev writes to the image.
        json!({}),
    ] {
        assert_eq!(create(image.params("X", more.clone())), not_permitted(), "{more}");
    }
    let no_device = Refusal::new(-19, "No such device");
    assert_eq!(vhost.err("bdev_rbd_delete", json!({"name": "X"})), no_device);
    assert_eq!(vhost.err("bdev_rbd_delete", json!({"name": "M"})), no_device);
    let resize =
        |name: &str, mib: u64| vhost.err("bdev_rbd_resize", json!({"name": name, "new_size": mib}));
    assert_eq!(resize("X", 32), no_device);
    assert_eq!(resize("M", 32), invalid);
    assert_eq!(resize("R", 15), invalid);
    assert_eq!(resize("R", u64::MAX), invalid);

    let conf = cluster.conf();
    let register = |more: Value| {
        let mut params = json!({"name": "C", "config_file": conf});
        params.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        vhost.rpc("bdev_rbd_register_cluster", params)
    };
    for more in [
        json!({"config_file": "/nope"}),
        json!({"key_file": "/nope"}),
        json!({"user_id": "guest"}),
        json!({"config_param": {"no_such_option": "1"}}),
        json!({"core_mask": "no mask"}),
    ] {
        assert_eq!(register(more.clone()), Err(not_permitted()), "{more}");
    }
    assert_eq!(register(json!({})), Ok(json!("C")));
    assert_eq!(register(json!({})), Err(not_permitted()), "it is registered already");
    let unknown = json!({"name": "X"});
    assert_eq!(vhost.err("bdev_rbd_unregister_cluster", unknown.clone()), not_permitted());
    let no_such = Refusal::new(-2, "No such file or directory");
    assert_eq!(vhost.err("bdev_rbd_get_clusters_info", unknown), no_such);
    assert_eq!(vhost.bdev_names(), ["R", "M"]);
    assert_eq!(vhost.stop(), 0);
}

/// Without `--ceph-dir`, the sandbox shows no file of the cluster.
#[test]
fn parameters_alone_reach_a_cluster() {
    let Some(cluster) = Cluster::find() else { return };
    let (image, other) = (cluster.image(16), cluster.image(16));
    let launch = Launch::new().args(&["--interrupt-mode"]);
    // Not that of the test.
    let vhost = launch.env("CEPH_CONF", "/nope/ceph.conf").start();
    assert_eq!(vhost.err("bdev_rbd_create", image.params("R", json!({}))), not_permitted());
    image.disk(&vhost, "R", json!({"config": cluster.options("admin")}));
    let guest = cluster.options("guest");
    other.disk(&vhost, "G", json!({"config": guest, "user_id": "guest"}));
    assert_eq!(vhost.bdev("G")["driver_specific"]["rbd"]["config"], guest);
    for name in ["R", "G"] {
        let mut driver = Driver::start(&disks::controller(&vhost, name, name));
        driver.write(0..8, 7);
        assert_eq!(driver.read(7), 7);
    }
    let (wrong, text) = (cluster.options("admin"), "cannot connect to the Ceph cluster");
    let params = image.params("X", json!({"config": wrong, "user_id": "guest"}));
    assert_eq!(vhost.err("bdev_rbd_create", params), not_permitted());
    vhost.wait_for_log(text);
    assert_eq!(vhost.stop(), 0);
}

#[test]
fn namespaces_hold_different_images_of_one_name() {
    struct Namespace(Cluster);
    impl Drop for Namespace {
        fn drop(&mut self) {
            self.0.rbd(&["namespace", "rm", "rbd/e2e"]);
        }
    }
    let Some(cluster) = Cluster::find() else { return };
    cluster.rbd(&["namespace", "create", "rbd/e2e"]);
    let _namespace = Namespace(cluster.clone());
    let outside = cluster.image(16);
    let inside = cluster.image_in(Some("e2e"), &outside.name, 16);
    let vhost = cluster.start();
    inside.disk(&vhost, "In", json!({}));
    outside.disk(&vhost, "Out", json!({}));
    assert_eq!(vhost.bdev("In")["driver_specific"]["rbd"]["namespace"], "e2e");
    let [mut to_in, mut to_out] =
        ["In", "Out"].map(|name| Driver::start(&disks::controller(&vhost, name, name)));
    to_in.write(0..4, 1);
    to_out.write(0..4, 2);
    assert_eq!((to_in.read(3), to_out.read(3)), (1, 2));
    drop((to_in, to_out));
    assert_eq!(vhost.stop(), 0);
    inside.assert_holds(0..4, 1);
    outside.assert_holds(0..4, 2);
}

#[test]
fn a_read_only_disk_reads_what_another_writes() {
    let Some(cluster) = Cluster::find() else { return };
    let image = cluster.image(16);
    let vhost = cluster.start();
    image.disk(&vhost, "W", json!({}));
    image.disk(&vhost, "R", json!({"read_only": true}));
    let types = vhost.bdev("R")["supported_io_types"].take();
    assert_eq!((&types["write"], &types["write_zeroes"]), (&json!(false), &json!(false)));
    let mut writer = Driver::start(&disks::controller(&vhost, "w", "W"));
    let mut reader = Driver::start(&disks::controller(&vhost, "r", "R"));
    assert_eq!(writer.front_end.offered() & READ_ONLY, 0);
    assert_eq!(reader.front_end.offered() & READ_ONLY, READ_ONLY);
    writer.write(0..4, 9);
    writer.flush();
    assert_eq!(reader.read(3), 9);
    reader.give(0..4, 1);
    assert_eq!(reader.take(), [STATUS_IOERR; 4]);
    assert_eq!(writer.read(0), 9);
    drop((writer, reader));
    assert_eq!(vhost.stop(), 0);
    image.assert_holds(0..4, 9);
}

/// Also what SPDK loses: clusters, `cluster_name` and `read_only`.
#[test]
fn a_saved_configuration_has_everything() {
    let Some(cluster) = Cluster::find() else { return };
    let images = [(); 4].map(|()| cluster.image(16));
    let vhost = cluster.start();
    let register = json!({
        "name": "one", "user_id": "guest", "config_file": cluster.conf(),
        "key_file": cluster.file("client.guest.keyring"), "core_mask": "0x1",
    });
    vhost.ok("bdev_rbd_register_cluster", register.clone());
    let of_second = json!({"name": "two", "config_param": cluster.options("admin")});
    vhost.ok("bdev_rbd_register_cluster", of_second.clone());
    let more = [
        json!({"cluster_name": "one"}),
        json!({"cluster_name": "two", "read_only": true}),
        json!({"config": cluster.options("guest"), "user_id": "guest", "timeout": 30}),
        json!({"block_size": 4096}),
    ];
    for (n, (image, more)) in images.iter().zip(&more).enumerate() {
        image.disk(&vhost, &format!("R{n}"), more.clone());
        disks::controller(&vhost, &format!("r{n}"), &format!("R{n}"));
    }
    let saved = vhost.spdk_rpc(&["save_config"]).unwrap();
    let shown = vhost.ok("bdev_get_bdevs", Value::Null);
    assert_eq!(vhost.stop(), 0);

    let config: Value = serde_json::from_str(&saved).unwrap();
    let bdevs = config["subsystems"].as_array().unwrap().iter();
    let bdevs = bdevs.filter(|s| s["subsystem"] == "bdev").flat_map(|s| s["config"].as_array());
    let calls: Vec<&Value> = bdevs.flatten().collect();
    let of = |method: &str| -> Vec<&Value> {
        calls.iter().filter(|c| c["method"] == method).map(|c| &c["params"]).collect()
    };
    assert_eq!(of("bdev_rbd_register_cluster"), [&register, &of_second]);
    for ((created, more), n) in of("bdev_rbd_create").into_iter().zip(&more).zip(0..) {
        assert_eq!(created["name"], format!("R{n}"));
        let given = more.as_object().unwrap().iter();
        given.for_each(|(key, value)| assert_eq!(&created[key], value, "R{n}: {key}"));
    }

    let launch = cluster.launch();
    let path = launch.dir().join("saved.json");
    fs::write(&path, &saved).unwrap();
    let path = path.to_str().unwrap().to_owned();
    let checked = cluster.launch().args(&["--check", &path]).run_to_end();
    assert_eq!(checked.code, Some(0), "{}", checked.log);
    let vhost = launch.args(&["-c", &path]).start();
    wait_until("the configuration is applied", || vhost.socket("r3").exists());
    assert_eq!(vhost.spdk_rpc(&["save_config"]).unwrap(), saved);
    assert_eq!(vhost.ok("bdev_get_bdevs", Value::Null), shown);
    for (name, read_only) in [("r0", false), ("r1", true), ("r2", false), ("r3", false)] {
        let mut driver = Driver::start(&vhost.socket(name));
        assert_eq!(driver.front_end.offered() & READ_ONLY != 0, read_only, "{name}");
        if !read_only {
            driver.write(0..4, 5);
        }
    }
    assert_eq!(vhost.stop(), 0);
    images[0].assert_holds(0..4, 5);
    images[1].assert_holds(0..4, 0);
}

#[test]
fn front_ends_and_operators_see_that_another_host_resizes_an_image() {
    const CONFIG_CHANGE: u32 = 2;
    const MIB_SECTORS: u64 = (1 << 20) / 512;
    let Some(cluster) = Cluster::find() else { return };
    let image = cluster.image(16);
    let vhost = cluster.start();
    image.disk(&vhost, "R", json!({}));
    let mut driver = Driver::start(&disks::controller(&vhost, "r", "R"));
    let mut channel = driver.front_end.open_backend_channel().unwrap();
    assert_eq!(driver.front_end.config().unwrap().capacity, 16 * MIB_SECTORS);

    image.resize(32);
    assert_eq!(channel.receive().unwrap().request, CONFIG_CHANGE);
    assert_eq!(driver.front_end.config().unwrap().capacity, 32 * MIB_SECTORS);
    assert_eq!(vhost.bdev("R")["num_blocks"], 32 * MIB_SECTORS);
    let last = 32 * (1 << 20) / BLOCK - 1;
    driver.write(last..last + 1, 3);
    vhost.ok("bdev_rbd_resize", json!({"name": "R", "new_size": 48}));
    assert_eq!(channel.receive().unwrap().request, CONFIG_CHANGE);
    assert_eq!(driver.front_end.config().unwrap().capacity, 48 * MIB_SECTORS);
    let told = vhost.ok("notify_get_notifications", json!({}));
    let told = told.as_array().unwrap().iter().map(|n| format!("{} {}", n["type"], n["ctx"]));
    let once = ["bdev_register R", "bdev_resize R", "bdev_resize R"];
    assert_eq!(told.map(|line| line.replace('"', "")).collect::<Vec<_>>(), once);

    // Smaller: it keeps its size, and I/O beyond the end fails; librbd would cut the first write.
    let (end, path) = (8 << 20, image.path());
    let size = format!("{}B", end + BLOCK / 2);
    cluster.rbd(&["resize", "--no-progress", "--allow-shrink", &path, "--size", &size]);
    vhost.wait_for_log(&format!("shrank to {} bytes", end + BLOCK / 2));
    assert_eq!(vhost.bdev("R")["num_blocks"], 48 * MIB_SECTORS);
    for block in [end / BLOCK, last] {
        driver.give(block..block + 1, 4);
        assert_eq!(driver.take(), [STATUS_IOERR]);
    }
    driver.write(0..1, 4);
    drop(driver);
    assert_eq!(vhost.stop(), 0);
}

#[test]
fn the_end_of_a_process_releases_its_locks() {
    let Some(cluster) = Cluster::find() else { return };
    let image = cluster.image(16);
    let vhost = cluster.start();
    image.disk(&vhost, "R", json!({}));
    let mut driver = Driver::start(&disks::controller(&vhost, "r", "R"));
    assert!(image.lock().is_none(), "the first write takes it");
    driver.write(0..8, 1);
    assert!(image.lock().is_some());
    assert_eq!(vhost.stop(), 0);
    assert!(image.lock().is_none() && image.watchers().is_empty());
    image.assert_holds(0..8, 1);
}
