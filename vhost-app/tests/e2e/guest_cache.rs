//! A guest decides whether what it has written may be in a cache.

use serde_json::json;

use crate::support::disks::{MIB, controller, malloc};
use crate::support::guest::{Guest, GuestOptions};
use crate::support::harness::Vhost;

#[test]
fn a_guest_turns_its_write_cache_off_and_on() {
    let vhost = Vhost::start(&[]);
    malloc(&vhost, "M", 16 * MIB, 512);
    vhost.ok("bdev_error_create", json!({"base_name": "M"}));
    let options = GuestOptions::new(&controller(&vhost, "vhost.0", "EE_M"));
    let mut guest = Guest::boot(GuestOptions { reboots: true, ..options });
    let write = "dd if=/seed of=/dev/vda bs=64k count=1 oflag=direct status=none";
    let flushes_fail = |on: bool| {
        let (io_type, num) = if on { ("flush", 1_000_000) } else { ("clear", 0) };
        let error =
            json!({"name": "EE_M", "io_type": io_type, "error_type": "failure", "num": num});
        vhost.ok("bdev_error_inject_error", error);
    };
    let cache = "/sys/block/vda/cache_type";

    assert_eq!(guest.ok(&format!("cat {cache}")), "write back");
    for _ in 0..2 {
        guest.ok(&format!("echo write back >{cache}"));
        assert_eq!(guest.ok(&format!("cat {cache}")), "write back");
        flushes_fail(true);
        guest.ok(write);
        assert_ne!(guest.run(&format!("{write} conv=fsync")).rc, 0, "a flush of the guest's own");

        // Now a write is not done before it is flushed, and the guest flushes no more.
        guest.ok(&format!("echo write through >{cache}"));
        assert_eq!(guest.ok(&format!("cat {cache}")), "write through");
        assert_ne!(guest.run(write).rc, 0, "a flush that belongs to the write");
        flushes_fail(false);
        guest.ok(&format!("{write} conv=fsync"));

        // A reset may leave it as it is (virtio 1.2, 5.2.5), and the driver finds out.
        guest.qmp("system_reset", json!({}));
        guest.wait_ready();
    }
    guest.start_io("vda", 4);
    for cache_type in ["write through", "write back"] {
        guest.ok(&format!("echo {cache_type} >{cache}"));
        guest.io_goes_on("vda", 4);
    }
    guest.finish_io("vda", 4);
    guest.power_off();
    assert_eq!(vhost.stop(), 0);
}
