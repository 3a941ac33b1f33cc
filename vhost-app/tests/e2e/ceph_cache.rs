//! A real cluster blocklists clients, which lose their caches, and guests migrate: no write is lost
//! silently, and no disk stays unusable.

use std::collections::BTreeSet;

use front_end::STATUS_OK;
use serde_json::json;

use crate::support::ceph::{Cluster, Driver, Image};
use crate::support::disks;
use crate::support::harness::{Vhost, wait_until};

fn blocklist(cluster: &Cluster, image: &Image) {
    for address in image.watchers() {
        cluster.ceph(&["osd", "blocklist", "add", &address, "60"]);
    }
}

/// A disk with librbd's cache, whose blocks are 1. The cache completes writes from now on. The cluster refuses the
/// writes of 2, as it has blocklisted the client meanwhile.
fn refused(cluster: &Cluster, image: &Image, blocklist: impl FnOnce()) -> (Vhost, Driver) {
    let vhost = cluster.start();
    let mut options = cluster.options("admin");
    options["rbd_cache"] = json!("true");
    image.disk(&vhost, "R", json!({"config": options}));
    let mut driver = Driver::start(&disks::controller(&vhost, "r", "R"));
    driver.write(0..32, 1);
    driver.flush();
    vhost.signal("STOP");
    wait_until("it is stopped", || vhost.is_stopped());
    driver.give(0..32, 2);
    blocklist();
    vhost.signal("CONT");
    (vhost, driver)
}

/// Asserts that no write is lost, unless a write or the flush has failed.
#[track_caller]
fn assert_told(driver: &mut Driver, written: &[u8]) {
    let flushed = driver.try_flush();
    let told = flushed != STATUS_OK || written.iter().any(|status| *status != STATUS_OK);
    let found: Vec<u8> = (0..32).map(|block| driver.read(block)).collect();
    assert!(told || found == [2; 32], "flushed with success: {found:?}, written: {written:?}");
}

/// Reads until the disk works with another client.
fn connects_again(vhost: &Vhost, driver: &mut Driver) {
    wait_until("it connects again", || {
        driver.try_read(40);
        vhost.log().contains("connected to the Ceph cluster again")
    });
    wait_until("it works again", || driver.try_read(40).is_some());
}

/// Completed writes of the cache are lost, and the flush says so.
#[test]
fn a_flush_after_an_operator_has_blocklisted_the_client() {
    let Some(cluster) = Cluster::find() else { return };
    let image = cluster.image(16);
    let (_vhost, mut driver) = refused(&cluster, &image, || blocklist(&cluster, &image));
    let written = driver.take();
    assert_told(&mut driver, &written);
}

/// The same; another I/O than the flush is refused first.
#[test]
fn a_flush_after_an_operator_has_blocklisted_the_client_and_a_read_was_refused() {
    let Some(cluster) = Cluster::find() else { return };
    let image = cluster.image(16);
    let (vhost, mut driver) = refused(&cluster, &image, || blocklist(&cluster, &image));
    let written = driver.take();
    connects_again(&vhost, &mut driver);
    assert_told(&mut driver, &written);
}

/// The same after a takeover, when the other client has gone.
#[test]
fn a_flush_after_a_takeover_when_a_read_was_refused() {
    let Some(cluster) = Cluster::find() else { return };
    let image = cluster.image(16);
    let (vhost, mut driver) = refused(&cluster, &image, || image.break_lock());
    let written = driver.take();
    connects_again(&vhost, &mut driver);
    assert_told(&mut driver, &written);
}

/// A guest that has moved reads what it has written, also where the cache would keep writes for long.
#[test]
fn a_moved_guest_reads_what_it_has_written_with_the_policy_writeback() {
    let Some(cluster) = Cluster::find() else { return };
    let image = cluster.image(16);
    let mut options = cluster.options("admin");
    options["rbd_cache_policy"] = json!("writeback");
    let vhosts = [(); 2].map(|()| {
        let vhost = cluster.start();
        image.disk(&vhost, "R", json!({"config": options}));
        disks::controller(&vhost, "r", "R");
        vhost
    });
    let mut from = Driver::start(&vhosts[0].socket("r"));
    from.write(0..32, 1);
    from.flush();
    from.write(0..32, 2);
    from.front_end.stop().unwrap();
    let mut to = Driver::start(&vhosts[1].socket("r"));
    let found: Vec<u8> = (0..32).map(|block| to.read(block)).collect();
    assert_eq!(found, [2; 32]);
}

/// The disks of a connection that was blocklisted share the next one.
#[test]
fn disks_share_the_next_connection_too() {
    let Some(cluster) = Cluster::find() else { return };
    let images = [(); 4].map(|()| cluster.image(16));
    let vhost = cluster.start();
    let mut drivers = vec![];
    for (n, image) in images.iter().enumerate() {
        let name = format!("R{n}");
        image.disk(&vhost, &name, json!({}));
        let mut driver = Driver::start(&disks::controller(&vhost, &name, &name));
        driver.write(0..4, 1);
        drivers.push(driver);
    }
    let connections = || images.iter().flat_map(Image::watchers).collect::<BTreeSet<_>>();
    let threads = || std::fs::read_dir(format!("/proc/{}/task", vhost.pid())).unwrap().count();
    assert_eq!(connections().len(), 1);
    let before = threads();
    blocklist(&cluster, &images[0]);
    drivers.iter_mut().for_each(|driver| driver.give(0..4, 2));
    for driver in &mut drivers {
        assert_eq!(driver.take(), [STATUS_OK; 4]);
    }
    wait_until("all have connected again", || {
        vhost.log().matches("connected to the Ceph cluster again").count() == 4
    });
    eprintln!("threads: {before}, now {}", threads());
    assert_eq!(connections().len(), 1, "{:?}", connections());
}

/// A connection that was blocklisted while no I/O used it is replaced.
#[test]
fn a_disk_can_be_made_beside_an_idle_one_whose_client_was_blocklisted() {
    let Some(cluster) = Cluster::find() else { return };
    let (image, other) = (cluster.image(16), cluster.image(16));
    let vhost = cluster.start();
    image.disk(&vhost, "R", json!({}));
    blocklist(&cluster, &image);
    let create = || vhost.rpc("bdev_rbd_create", other.params("S", json!({})));
    let tries: Vec<_> = (0..3).map(|_| create()).collect();
    assert!(tries.iter().any(Result::is_ok), "{tries:?}");
}

/// The same with a registered cluster that no disk uses.
#[test]
fn a_registered_cluster_can_be_used_after_its_client_was_blocklisted() {
    let Some(cluster) = Cluster::find() else { return };
    let image = cluster.image(16);
    let vhost = cluster.start();
    vhost.ok("bdev_rbd_register_cluster", json!({"name": "C", "config_file": cluster.conf()}));
    image.disk(&vhost, "R", json!({"cluster_name": "C"}));
    let address = image.watchers();
    vhost.ok("bdev_rbd_delete", json!({"name": "R"}));
    wait_until("the image is closed", || image.watchers().is_empty());
    cluster.ceph(&["osd", "blocklist", "add", &address[0], "60"]);
    let create = || vhost.rpc("bdev_rbd_create", image.params("R", json!({"cluster_name": "C"})));
    let tries: Vec<_> = (0..3).map(|_| create()).collect();
    assert!(tries.iter().any(Result::is_ok), "{tries:?}");
}

/// The same for the resize of an idle disk.
#[test]
fn an_idle_disk_can_be_resized_after_its_client_was_blocklisted() {
    let Some(cluster) = Cluster::find() else { return };
    let image = cluster.image(16);
    let vhost = cluster.start();
    image.disk(&vhost, "R", json!({}));
    blocklist(&cluster, &image);
    let resize = || vhost.rpc("bdev_rbd_resize", json!({"name": "R", "new_size": 32}));
    let tries: Vec<_> = (0..3).map(|_| resize()).collect();
    assert!(tries.iter().any(Result::is_ok), "{tries:?}");
}

/// Its image was resized while its client was blocklisted.
#[test]
fn a_disk_that_connects_again_has_the_images_size() {
    let Some(cluster) = Cluster::find() else { return };
    let image = cluster.image(16);
    let vhost = cluster.start();
    image.disk(&vhost, "R", json!({}));
    let mut driver = Driver::start(&disks::controller(&vhost, "r", "R"));
    driver.write(0..4, 1);
    blocklist(&cluster, &image);
    image.resize(32);
    connects_again(&vhost, &mut driver);
    wait_until("the new size", || vhost.bdev("R")["num_blocks"] == 65536);
}

/// The same when it has become smaller: librbd would cut a write that crosses the end, and report success.
#[test]
fn a_disk_that_connects_again_refuses_writes_beyond_the_end_of_a_smaller_image() {
    let Some(cluster) = Cluster::find() else { return };
    let image = cluster.image(16);
    let vhost = cluster.start();
    image.disk(&vhost, "R", json!({}));
    let mut driver = Driver::start(&disks::controller(&vhost, "r", "R"));
    driver.write(0..4, 1);
    blocklist(&cluster, &image);
    let size = format!("{}B", (8 << 20) + 2048);
    let path = image.path();
    cluster.rbd(&["resize", "--no-progress", "--allow-shrink", &path, "--size", &size]);
    connects_again(&vhost, &mut driver);
    driver.give(2048..2049, 4);
    assert_eq!(driver.take(), [front_end::request::STATUS_IOERR]);
}

/// A read that the cluster has refused is submitted again, also if nobody has the lock, as with a guest that has
/// only read so far.
#[test]
fn a_guest_that_only_reads_sees_no_error_when_its_client_is_blocklisted() {
    let Some(cluster) = Cluster::find() else { return };
    let image = cluster.image(16);
    let vhost = cluster.start();
    image.disk(&vhost, "R", json!({}));
    let mut driver = Driver::start(&disks::controller(&vhost, "r", "R"));
    assert_eq!(driver.read(0), 0);
    blocklist(&cluster, &image);
    for _ in 0..100 {
        assert_eq!(driver.try_read(0), Some(0));
    }
}
