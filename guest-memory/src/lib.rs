//! A guest's memory as this process maps it, from its own duplicates of the front end's fds.
//!
//! Modules in the order in which a memory table passes through them:
//!
//! * `shared_file`: a part of a front end's memory file, mapped ([`SharedFile`]).
//! * `memory`: a memory table ([`GuestMemory`]), and the translation of guest-physical addresses
//!   ([`Near`]).
//! * `segment`: a piece of that memory, in the kernel's layout ([`Segment`]).
//! * `dirty_log`: the bitmap of written pages while a guest migrates ([`DirtyLog`]).
//! * `sigbus`: survives a front end that truncates a file after it was mapped.
//! * `unmapper`: unmaps, in pieces and on a thread of its own ([`Unmapper`]).
//!
//! This crate never depends on a ring, a device or a reactor. Nothing in it runs on a reactor but
//! address translation, marking in the dirty log, and the SIGBUS handler.

mod dirty_log;
mod memory;
mod segment;
mod shared_file;
mod sigbus;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
mod unmapper;

pub use dirty_log::DirtyLog;
pub use memory::{
    Error, FileRange, GuestMemory, Near, Nearest, REGIONS_MAX, Region, RegionSpec, SLOTS_MAX,
};
pub use segment::Segment;
pub use shared_file::{Error as FileError, SharedFile, identity};
pub use unmapper::Unmapper;
