//! The target and its queue engine with a device that is not a disk, and openings that take long.
#![expect(clippy::unwrap_used, reason = "tests")]

mod entropy;
mod second_device {
    pub(crate) mod guest;

    mod opening;
    mod requests;
}
