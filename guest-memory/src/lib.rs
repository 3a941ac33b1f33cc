//! Guest memory, as this process maps it from its own duplicates of the front end's fds.
//!
//! Modules, in the order in which a memory table passes through them:
//!
//! * `address_space`: the process's address space, of 64 bits ([`usize_of`]).
//! * `shared_file`: maps a range of a front end's memory file ([`SharedFile`]).
//! * `memory`: a memory table ([`GuestMemory`]), and the translation of guest-physical addresses
//!   ([`Near`]).
//! * `segment`: a piece of that memory, as a `struct iovec` ([`Segment`]).
//! * `dirty_log`: the bitmap of pages written during a live migration ([`DirtyLog`]).
//! * `sigbus`: handles the access to a file that the front end has truncated after it was mapped.
//! * `unmapper`: unmaps memory in pieces, on its own thread ([`Unmapper`]).
//!
//! This crate never depends on a ring, a device or a reactor. Of its code, reactors run only
//! address translation, marking in the dirty log, and the SIGBUS handler.

mod address_space;
mod dirty_log;
mod memory;
mod segment;
mod shared_file;
mod sigbus;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
mod unmapper;

pub use address_space::usize_of;
pub use dirty_log::DirtyLog;
pub use memory::{
    Error, FileRange, GuestMemory, Near, Nearest, REGIONS_MAX, Region, RegionSpec, SLOTS_MAX,
};
pub use segment::Segment;
pub use shared_file::{Error as FileError, SharedFile, identity};
pub use unmapper::Unmapper;
