//! Requests through a queue's core, in one thread and over rings of either layout: long chains,
//! several ranges, durable writes, dirty pages, calls, recovery after a kill, and the sentences of
//! virtio 1.2 one by one.
#![expect(unsafe_code, reason = "visits a queue as its reactor does; takes io_uring from a thread")]
#![expect(clippy::unwrap_used, reason = "tests")]

#[path = "../../virtqueue/tests/packed_ring/driver.rs"]
#[expect(dead_code, reason = "the packed ring's own tests use the rest")]
mod packed;

mod requests {
    pub(crate) mod disk;
    pub(crate) mod scene;
    pub(crate) mod split;

    mod calls;
    mod device_operation;
    mod dirty;
    mod durable;
    mod long;
    mod parked;
    mod ranges;
    mod recovery;
    mod room;
    mod throttled;
}
