//! Faults of a Ceph cluster and of its client `vhost`, under a load that checks every block:
//! daemons that stop or die, a client that is blocklisted, that loses its lock to another client,
//! or that is killed.

use std::collections::BTreeSet;

use bench::crash::{self, Plan};
use bench::{Load, LoadOptions};
use front_end::request::STATUS_IOERR;
use front_end::{FrontEnd, GuestRam, Options, QueueOptions, RingLayout, STATUS_OK};
use serde_json::{Value, json};

use crate::support::ceph::{Cluster, Driver, Image, wait_for_state};
use crate::support::disks;
use crate::support::harness::{self, Vhost, wait_until};
use crate::support::isolation::{Form, Host, Vm};

/// A disk of an image, and a VM with a load on it.
fn vm_on(vhost: &Host, image: &Image, name: &str) -> Vm {
    image.disk(vhost, name, json!({}));
    let vm = vhost.vm(&vhost.controller_on(name, name));
    vm.goes_on();
    vm
}

/// Waits until all of a VM's I/O is with the cluster, which does not answer.
fn wait_until_held(vhost: &Host, controller: &str) {
    wait_until("all of its I/O waits", || {
        vhost.sessions(controller)[0]["inflight_task_cnt"] == Form::Small.held()
    });
}

/// Waits until the log has so many lines with this text, no fewer.
fn wait_for_lines(vhost: &Vhost, count: usize, text: &str) {
    let what = format!("{count} times {text:?} in the log");
    wait_until(&what, || vhost.log().matches(text).count() >= count);
}

#[test]
fn io_waits_for_a_stopped_osd_and_goes_on_with_it() {
    let Some(cluster) = Cluster::find() else { return };
    let image = cluster.image(16);
    let vhost = Form::Small.start_as(cluster.launch());
    let vm = vm_on(&vhost, &image, "R");
    for _ in 0..3 {
        let stopped = cluster.stop_osd();
        wait_until_held(&vhost, "R");
        drop(stopped);
        vm.goes_on();
    }
    vm.end();
    assert_eq!(vhost.stop(), 0);
}

#[test]
fn with_a_timeout_io_fails_and_the_disk_works_again_later() {
    let Some(cluster) = Cluster::find() else { return };
    let image = cluster.image(16);
    let vhost = cluster.start();
    image.disk(&vhost, "R", json!({"timeout": 1}));
    let mut driver = Driver::start(&disks::controller(&vhost, "r", "R"));
    driver.write(0..32, 1);
    let stopped = cluster.stop_osd();
    driver.give(0..32, 2);
    assert_eq!(driver.take(), [STATUS_IOERR; 32]);
    assert_eq!(vhost.bdev("R")["driver_specific"]["rbd"]["state"], "serving");
    drop(stopped);
    // The cluster may still do what has failed, so these are other blocks.
    wait_until("it works again", || {
        driver.give(32..64, 3);
        driver.take() == [STATUS_OK; 32]
    });
    driver.write(32..64, 4);
    assert_eq!(driver.read(63), 4);
    drop(driver);
    let ram = GuestRam::new(&[16 << 20]).unwrap();
    let mut front_end = FrontEnd::connect(&vhost.socket("r"), ram, Options::default()).unwrap();
    let queues = front_end.start_any(1, QueueOptions::default()).unwrap();
    let options = LoadOptions { blocks: 1024..2048, limit: Some(1000), ..LoadOptions::default() };
    let (summary, _) = Load::start(queues, options).unwrap().finish().unwrap();
    assert_eq!((summary.first_problem, summary.completed), (None, 1000));
    front_end.disconnect().unwrap();
    assert_eq!(vhost.stop(), 0);
}

#[test]
fn io_goes_on_without_a_monitor_and_with_the_next_one() {
    let Some(cluster) = Cluster::find() else { return };
    let image = cluster.image(16);
    let vhost = Form::Small.start_as(cluster.launch());
    let vm = vm_on(&vhost, &image, "R");
    for _ in 0..2 {
        let killed = cluster.kill_mon();
        vm.goes_on();
        vhost.ok("bdev_get_bdevs", Value::Null);
        drop(killed);
        vm.goes_on();
    }
    // It has found the next one, if it takes a new map from it.
    let other = cluster.image(16);
    vm_on(&vhost, &other, "S").end();
    vm.end();
    assert_eq!(vhost.stop(), 0);
}

#[test]
fn a_client_that_an_operator_blocklists_connects_again_and_loses_nothing() {
    let Some(cluster) = Cluster::find() else { return };
    let images = [cluster.image(16), cluster.image(16)];
    let vhost = Form::Small.start_as(cluster.launch());
    // Both have one connection.
    let vms = [vm_on(&vhost, &images[0], "R"), vm_on(&vhost, &images[1], "S")];
    let owners = || -> BTreeSet<_> { images.iter().map(|i| i.lock().unwrap().address).collect() };
    assert_eq!(owners().len(), 1);
    for n in 1..=3 {
        for address in &owners() {
            cluster.ceph(&["osd", "blocklist", "add", address, "60"]);
        }
        for name in ["R", "S"] {
            wait_for_lines(&vhost, n, &format!("bdev {name}: the Ceph cluster has blocklisted"));
            wait_for_lines(&vhost, n, &format!("bdev {name}: connected to the Ceph cluster again"));
        }
        vms.iter().for_each(Vm::goes_on);
    }
    vms.into_iter().for_each(Vm::end);
    for name in ["R", "S"] {
        assert_eq!(vhost.bdev(name)["driver_specific"]["rbd"]["state"], "serving");
    }
    assert_eq!(vhost.stop(), 0);
}

/// Its cluster is registered, and is not in use in the end.
#[test]
fn disks_of_a_registered_cluster_connect_again_too() {
    let Some(cluster) = Cluster::find() else { return };
    let image = cluster.image(16);
    let vhost = cluster.start();
    vhost.ok("bdev_rbd_register_cluster", json!({"name": "C", "config_file": cluster.conf()}));
    image.disk(&vhost, "R", json!({"cluster_name": "C"}));
    let mut driver = Driver::start(&disks::controller(&vhost, "r", "R"));
    driver.write(0..32, 1);
    let address = image.lock().unwrap().address;
    cluster.ceph(&["osd", "blocklist", "add", &address, "60"]);
    driver.write(0..32, 2);
    driver.write(0..32, 3);
    assert_eq!(driver.read(31), 3);
    assert_ne!(image.lock().unwrap().address, address);
    drop(driver);
    let unregister = || vhost.rpc("bdev_rbd_unregister_cluster", json!({"name": "C"}));
    assert!(unregister().is_err(), "its new connection is in use");
    vhost.ok("vhost_delete_controller", json!({"ctrlr": "r", "force": true}));
    vhost.ok("bdev_rbd_delete", json!({"name": "R"}));
    wait_until("it can be unregistered", || unregister().is_ok());
    assert_eq!(vhost.stop(), 0);
    image.assert_holds(0..32, 3);
}

#[test]
fn two_processes_give_the_lock_to_each_other() {
    let Some(cluster) = Cluster::find() else { return };
    let image = cluster.image(16);
    let vhosts = [cluster.start(), cluster.start()];
    let mut drivers = vhosts.each_ref().map(|vhost| {
        image.disk(vhost, "R", json!({}));
        Driver::start(&disks::controller(vhost, "r", "R"))
    });
    for n in 1..=20 {
        let [one, other] = &mut drivers;
        let (writer, reader) = if n % 2 == 0 { (one, other) } else { (other, one) };
        writer.write(0..32, n);
        writer.flush();
        assert_eq!((reader.read(0), reader.read(31)), (n, n));
    }
    drop(drivers);
    for vhost in vhosts {
        assert!(!vhost.log().contains("blocklisted"));
        assert_eq!(vhost.stop(), 0);
    }
    image.assert_holds(0..32, 20);
}

/// A disk whose blocks are 1, and a `vhost` that is frozen with writes of 2 in its ring when another
/// client takes its lock.
fn frozen(cluster: &Cluster, image: &Image) -> (Vhost, Driver) {
    let vhost = cluster.start();
    image.disk(&vhost, "R", json!({}));
    let mut driver = Driver::start(&disks::controller(&vhost, "r", "R"));
    // No flush is needed: librbd's cache is off, so the cluster has each write that has completed.
    driver.write(0..32, 1);
    vhost.signal("STOP");
    wait_until("it is stopped", || vhost.is_stopped());
    driver.give(0..32, 2);
    image.break_lock();
    (vhost, driver)
}

#[test]
fn a_client_that_was_taken_over_writes_nothing_until_the_other_has_gone() {
    let Some(cluster) = Cluster::find() else { return };
    let image = cluster.image(16);
    let (first, mut driver) = frozen(&cluster, &image);
    let second = cluster.start();
    image.disk(&second, "R", json!({}));
    let mut other = Driver::start(&disks::controller(&second, "r", "R"));
    other.write(0..16, 3);
    let owner = image.lock().unwrap().address;

    first.signal("CONT");
    assert_eq!(driver.take(), [STATUS_IOERR; 32]);
    wait_for_state(&first, "R", "refused");
    first.wait_for_log(&format!("the client {owner} has taken over the Ceph image"));
    for _ in 0..10 {
        driver.give(0..32, 4);
        assert_eq!(driver.take(), [STATUS_IOERR; 32]);
        assert_eq!((driver.try_read(0), driver.try_flush()), (None, STATUS_IOERR));
    }
    other.write(8..16, 5);
    driver.give(0..32, 6);
    assert_eq!(driver.take(), [STATUS_IOERR; 32]);
    assert_eq!(image.lock().unwrap().address, owner);
    assert_eq!((other.read(0), other.read(15), other.read(31)), (3, 5, 1));
    drop(other);
    assert_eq!(second.stop(), 0);
    image.assert_holds(0..8, 3);
    image.assert_holds(8..16, 5);
    image.assert_holds(16..32, 1);

    wait_for_state(&first, "R", "serving");
    driver.write(0..32, 7);
    assert_eq!(driver.read(31), 7);
    drop(driver);
    assert_eq!(first.stop(), 0);
    image.assert_holds(0..32, 7);
}

/// What waited could overwrite what the other has written.
#[test]
fn requests_from_before_a_takeover_fail_even_if_the_other_has_gone() {
    let Some(cluster) = Cluster::find() else { return };
    let image = cluster.image(16);
    let (first, mut driver) = frozen(&cluster, &image);
    let second = cluster.start();
    image.disk(&second, "R", json!({}));
    let mut other = Driver::start(&disks::controller(&second, "r", "R"));
    other.write(0..16, 3);
    drop(other);
    assert_eq!(second.stop(), 0);
    assert!(image.lock().is_none());

    first.signal("CONT");
    assert_eq!(driver.take(), [STATUS_IOERR; 32]);
    first.wait_for_log("bdev R: connected to the Ceph cluster again");
    assert_eq!((driver.read(15), driver.read(16)), (3, 1));
    driver.write(24..32, 7);
    drop(driver);
    assert_eq!(first.stop(), 0);
    image.assert_holds(0..16, 3);
    image.assert_holds(16..24, 1);
    image.assert_holds(24..32, 7);
}

/// Its lock would stay with a dead client for 30 s.
#[test]
fn a_killed_process_has_a_successor_that_takes_its_lock_and_finishes_its_requests() {
    const KILLS: usize = 5;
    let Some(cluster) = Cluster::find() else { return };
    let image = cluster.image(16);
    let dir = tempfile::tempdir().unwrap();
    let link = dir.path().join("socket");
    let start = || {
        let vhost = cluster.start();
        let user = json!({"config": cluster.options("guest"), "user_id": "guest"});
        image.disk(&vhost, "R", user);
        let socket = disks::controller(&vhost, "r", "R");
        let _ = std::fs::remove_file(&link);
        std::os::unix::fs::symlink(socket, &link).unwrap();
        vhost
    };
    let mut vhost = start();
    let ram = GuestRam::new(&[16 << 20]).unwrap();
    let options = Options { inflight: true, ..Options::default() };
    let mut front_end = FrontEnd::connect(&link, ram, options).unwrap();
    let queues = front_end.start_any(2, QueueOptions::default()).unwrap();
    let rings: Vec<_> = queues.iter().map(|queue| queue.ring().clone()).collect();
    let load = Load::start(queues, LoadOptions { depth: 32, ..LoadOptions::default() }).unwrap();
    for _ in 0..KILLS {
        load.wait_for(500).unwrap();
        let owner = image.lock().unwrap().address;
        vhost.signal("KILL");
        assert_eq!(vhost.wait(), None);
        vhost = start();
        front_end.reconnect().unwrap();
        // Nobody knows which kicks the process before has seen.
        rings.iter().for_each(|ring| ring.kick().unwrap());
        load.wait_for(500).unwrap();
        vhost.wait_for_log(&format!("took the lock from {owner}, a process of this host"));
        assert_ne!(image.lock().unwrap().address, owner);
    }
    let (summary, _) = load.stop().unwrap();
    assert_eq!(summary.first_problem, None);
    assert_eq!((summary.errors, summary.mismatches, summary.outstanding), (0, 0, 0));
    front_end.disconnect().unwrap();
    assert_eq!(vhost.stop(), 0);
}

/// Each request is done once, whatever is killed when: see `bench::crash`.
fn killed_40_times(rings: RingLayout) {
    let Some(cluster) = Cluster::find() else { return };
    let image = cluster.image(16);
    let mut plan = Plan::new(env!("CARGO_BIN_EXE_vhost").into());
    assert!(plan.disk_bytes() <= 16 << 20);
    plan.core = usize::from(harness::core_mask() == "0x2");
    plan.rings = rings;
    plan.kills = 40;
    plan.args.push("--interrupt-mode".into());
    if std::env::var("VHOST_HUGEPAGES").is_ok_and(|v| v == "0") {
        plan.args.extend(["--no-huge", "-s", "256"].map(str::to_owned));
    }
    let user = json!({"config": cluster.options("guest"), "user_id": "guest"});
    plan.bdev = Some(("bdev_rbd_create", image.params("", user)));
    let toll = crash::run(&plan).unwrap();
    assert!(toll.is_good(), "{toll}");
    assert_eq!(toll.kills, plan.kills);
    println!("{toll}");
}

#[test]
fn split_rings_survive_kills() {
    killed_40_times(RingLayout::Split);
}

#[test]
fn packed_rings_survive_kills() {
    killed_40_times(RingLayout::Packed);
}
