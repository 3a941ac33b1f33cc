//! The NBD protocol (network block device): disks of NBD servers as block devices.
//!
//! * `protocol`: the protocol's numbers and headers.

pub mod protocol;
