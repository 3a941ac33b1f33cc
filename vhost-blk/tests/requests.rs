//! Requests through a queue's core, in one thread and over rings of either layout: long chains,
//! several ranges, durable writes, dirty pages, the sentences of virtio 1.2 one by one, and the
//! suites of the queue engine.
#![expect(clippy::unwrap_used, reason = "tests")]

#[path = "../../vhost-target/tests/suites/mod.rs"]
#[macro_use]
mod suites;

mod requests {
    pub(crate) mod block;
    pub(crate) mod disk;
    pub(crate) mod scene;

    mod device_operation;
    mod dirty;
    mod durable;
    mod long;
    mod parked;
    mod ranges;
    mod room;
    mod throttled;
}

device_suites!(crate::requests::block::Block);
