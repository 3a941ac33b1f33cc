//! The virtio-scsi device in a target with stepped reactors: guests drive it through rings in their
//! memory, and the test is the control thread.
#![expect(clippy::unwrap_used, reason = "tests")]
#![expect(clippy::cast_possible_truncation, reason = "a test's numbers are small")]

mod device {
    pub(crate) mod disk;
    #[path = "../../../vhost-target/tests/simulation/rng.rs"]
    #[expect(dead_code, reason = "the simulation uses the rest")]
    pub(crate) mod rng;
    #[path = "../../../vhost-target/tests/wire/mod.rs"]
    pub(crate) mod wire;
    pub(crate) mod world;

    mod atomic;
    mod data_path;
    mod hot_plug;
    mod life;
    mod medium;
    mod model;
    mod reservations;
    mod task_management;
}
