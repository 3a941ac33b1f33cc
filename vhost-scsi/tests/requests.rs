//! Requests through a queue's core, in one thread and over rings of either layout: the suites of the
//! queue engine.
#![expect(clippy::unwrap_used, reason = "tests")]

#[path = "../../vhost-target/tests/suites/mod.rs"]
#[macro_use]
mod suites;

mod requests {
    #[path = "../../../vhost-blk/tests/requests/disk.rs"]
    #[expect(dead_code, reason = "virtio-blk's tests use the rest")]
    pub(crate) mod disk;
    pub(crate) mod unit;
}

device_suites!(crate::requests::unit::Unit);
