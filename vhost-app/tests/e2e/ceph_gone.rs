//! A Ceph cluster that does not answer delays only its own disks: other disks of the same reactor,
//! RPCs, deletions and the end of the process go on.

use serde_json::{Value, json};

use crate::support::ceph::{Cluster, Image};
use crate::support::harness::{Refusal, wait_until};
use crate::support::isolation::{Form, Host, RAM_BYTES, Vm};

/// A VM on controller "b" whose disk is an image of a cluster that will not answer.
fn vm_on(vhost: &Host, image: &Image) -> Vm {
    image.disk(vhost, "R", json!({}));
    let vm = vhost.vm(&vhost.controller_on("b", "R"));
    vm.goes_on();
    vm
}

/// All of B's I/O waits for the cluster.
fn wait_until_held(vhost: &Host) {
    wait_until("all of B's I/O waits", || holds_all(vhost));
}

fn holds_all(vhost: &Host) -> bool {
    vhost.sessions("b")[0]["inflight_task_cnt"] == Form::Small.held()
}

/// Asserts that other disks and RPCs go on.
fn others_go_on(vhost: &Host, a: &Vm) {
    a.goes_on();
    for method in ["bdev_get_bdevs", "bdev_get_iostat", "bdev_rbd_get_clusters_info"] {
        vhost.ok(method, json!({}));
    }
    vhost.ok("vhost_get_controller_stats", json!({}));
    vhost.ok("framework_get_config", json!({"name": "bdev"}));
    vhost.passes_by();
    vhost.ok("vhost_delete_controller", json!({"ctrlr": "c"}));
    vhost.ok("bdev_malloc_delete", json!({"name": "MC"}));
    a.goes_on();
}

fn register(vhost: &Host, cluster: &Cluster) {
    vhost.ok("bdev_rbd_register_cluster", json!({"name": "C", "config_file": cluster.conf()}));
}

#[test]
fn other_disks_and_rpcs_go_on_and_a_deletion_answers() {
    let Some(cluster) = Cluster::find() else { return };
    let image = cluster.image(16);
    let vhost = Form::Small.start_as(cluster.launch());
    register(&vhost, &cluster);
    let a = vhost.neighbour();
    let b = vm_on(&vhost, &image);
    let stopped = cluster.stop_osd();
    wait_until_held(&vhost);
    others_go_on(&vhost, &a);
    assert!(holds_all(&vhost), "all of that came while B waited");

    let mut delete = vhost.connect();
    delete.send("bdev_rbd_delete", json!({"name": "R"}));
    vhost.ok("bdev_get_iostat", json!({}));
    a.goes_on();
    assert!(!delete.has_answer(), "it waits for B's I/O, and nobody waits for it");
    others_go_on(&vhost, &a);
    assert_eq!(delete.receive().1, Ok(json!(true)));
    assert_eq!(vhost.bdev_names(), ["MA"]);
    assert_eq!(vhost.sessions("b")[0]["quarantined_bytes"], RAM_BYTES);
    others_go_on(&vhost, &a);
    // The name is free, and the image cannot be opened yet.
    vhost.malloc("R");

    drop(stopped);
    wait_until("B's memory is given back", || vhost.sessions("b")[0]["quarantined_bytes"] == 0);
    wait_until("the image is closed", || image.watchers().is_empty());
    assert!(image.lock().is_none());
    b.kill();
    a.end();
    assert_eq!(vhost.stop(), 0);
}

#[test]
fn a_forced_deletion_and_the_end_of_the_process_do_not_wait() {
    let Some(cluster) = Cluster::find() else { return };
    let image = cluster.image(16);
    let mut vhost = Form::Small.start_as(cluster.launch());
    register(&vhost, &cluster);
    let a = vhost.neighbour();
    let b = vm_on(&vhost, &image);
    let _stopped = cluster.stop_osd();
    wait_until_held(&vhost);
    let busy = vhost.err("vhost_delete_controller", json!({"ctrlr": "b", "timeout_ms": 0}));
    assert_eq!(busy, Refusal::new(-32602, "Device or resource busy"));
    let forced = json!({"ctrlr": "b", "force": true, "timeout_ms": 10});
    assert_eq!(vhost.ok("vhost_delete_controller", forced), json!(true));
    others_go_on(&vhost, &a);
    // Its VM may come back, and waits.
    let again = vhost.vm(&vhost.controller_on("b", "R"));
    others_go_on(&vhost, &a);
    a.end();
    vhost.signal("TERM");
    assert_eq!(vhost.process.wait(), Some(0));
    assert!(!vhost.rpc_socket().exists());
    again.kill();
    b.kill();
}

#[test]
fn a_creation_that_hangs_holds_up_nobody_and_gives_up_its_name() {
    let Some(cluster) = Cluster::find() else { return };
    let image = cluster.image(16);
    let vhost = Form::Small.start_as(cluster.launch());
    register(&vhost, &cluster);
    let a = vhost.neighbour();
    let stopped = cluster.stop_osd();
    let mut create = vhost.connect();
    create.send("bdev_rbd_create", image.params("R", json!({})));
    let mut other = vhost.connect();
    other.send("bdev_rbd_create", image.params("S", json!({"cluster_name": "C"})));
    others_go_on(&vhost, &a);
    // Also later ones of the same connection.
    create.send("bdev_get_bdevs", Value::Null);
    let (id, result) = create.receive();
    assert!(id == 2 && result.is_ok(), "{id}: {result:?}");
    let taken = vhost.err("bdev_rbd_create", image.params("R", json!({})));
    assert_eq!(taken, Refusal::new(-17, "File exists"));
    assert!(!create.has_answer() && !other.has_answer());
    for client in [&mut create, &mut other] {
        let refusal = Refusal::new(-1, "Operation not permitted");
        assert_eq!(client.receive().1, Err(refusal));
    }
    vhost.malloc("R");
    vhost.malloc("S");
    others_go_on(&vhost, &a);
    drop(stopped);
    wait_until("what has been opened late is closed", || image.watchers().is_empty());
    for name in ["R", "S"] {
        vhost.ok("bdev_malloc_delete", json!({"name": name}));
    }
    let b = vm_on(&vhost, &image);
    assert_eq!(vhost.bdev("R")["driver_specific"]["rbd"]["state"], "serving");
    b.end();
    a.end();
    assert_eq!(vhost.stop(), 0);
}
