//! The target and its queue engine with a device that is not a disk: openings that take long, and
//! the suites of the engine.
#![expect(clippy::unwrap_used, reason = "tests")]

#[macro_use]
mod suites;
mod entropy;
mod wire;
mod second_device {
    pub(crate) mod guest;
    pub(crate) mod source;

    mod deletion;
    mod opening;
    mod requests;
}

device_suites!(crate::second_device::source::TestEntropy);
