//! A disk's file whose close blocks, as on a network file system: only that disk's name stays in
//! use.

use front_end::{FrontEnd, GuestRam, Options, QueueOptions, Request, STATUS_OK};
use serde_json::json;

use crate::support::harness::{Vhost, wait_until};
use crate::support::slow_files::{Kind, Op, SlowFiles};

/// A VM connects, does I/O and disconnects, and its disk and its memory are released.
fn a_vm_comes_and_goes(vhost: &Vhost) {
    vhost.malloc("M");
    vhost.ok("vhost_create_blk_controller", json!({"ctrlr": "vm", "dev_name": "M"}));
    let ram = GuestRam::new(&[4 << 20]).unwrap();
    let mut front_end = FrontEnd::connect(&vhost.socket("vm"), ram, Options::default()).unwrap();
    let mut queue = front_end.start_new(1, QueueOptions::default()).unwrap().remove(0);
    let buffer = queue.ring().ram().alloc(4096, 4096).unwrap();
    assert_eq!(queue.run(&Request::read(0, &[buffer])).unwrap().status, STATUS_OK);
    front_end.stop().unwrap();
    front_end.disconnect().unwrap();
    vhost.ok("vhost_delete_controller", json!({"ctrlr": "vm", "force": true}));
    vhost.ok("bdev_malloc_delete", json!({"name": "M"}));
    let maps = format!("/proc/{}/maps", vhost.pid());
    wait_until("the VM's memory is unmapped", || {
        !std::fs::read_to_string(&maps).unwrap().contains("memfd:guest")
    });
}

#[test]
fn a_disk_whose_file_does_not_close_holds_up_its_own_name_only() {
    let vhost = Vhost::start(&[]);
    let Some(files) = SlowFiles::mount(&[("disk", Kind::Direct, 1 << 20)]) else { return };
    a_vm_comes_and_goes(&vhost);
    let create = json!({"name": "F", "filename": files.path("disk"), "block_size": 512});
    vhost.ok("bdev_aio_create", create.clone());
    // The process that opens disks has closed its copy.
    files.wait_for_answered("disk", Op::Close, 1);
    files.hold("disk", Op::Close);
    vhost.ok("bdev_aio_delete", json!({"name": "F"}));
    files.wait_for_held("disk", Op::Close, 1);
    a_vm_comes_and_goes(&vhost);
    let stuck = || vhost.ok("framework_get_reactors", json!({}))["stuck_closes"].clone();
    wait_until("the close counts as stuck", || {
        stuck() == json!([{"name": "bdev F", "waiting": 1}])
    });
    vhost.wait_for_log("bdev F: a close takes long");
    assert_eq!(vhost.err("bdev_aio_create", create.clone()).code, -i64::from(libc::EBUSY));
    vhost.wait_for_log("bdev F: the file of the deleted device of this name is still being closed");
    a_vm_comes_and_goes(&vhost);
    files.release("disk", Op::Close);
    wait_until("the close has ended", || stuck() == json!([]));
    vhost.ok("bdev_aio_create", create);
    vhost.ok("bdev_aio_delete", json!({"name": "F"}));
    assert_eq!(vhost.stop(), 0);
}
