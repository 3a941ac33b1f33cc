//! A guest's memory for tests: a memfd, as a front end hands it over.
#![expect(clippy::unwrap_used, reason = "a test that cannot make its memory fails")]

pub(crate) mod memfd;

use std::sync::Arc;

use closer::ForeignFd;
use vhost_blk::memory::{GuestMemory, RegionSpec};
use vhost_blk::reclaim::Unmapper;

/// One region of `len` bytes at guest-physical 0, and at `user_addr` in the front end.
pub(crate) fn memory(len: u64, user_addr: u64) -> Arc<GuestMemory> {
    let spec = RegionSpec { gpa: 0, size: len, user_addr, offset: 0 };
    let unmapper = Unmapper::start().unwrap();
    Arc::new(
        GuestMemory::map(vec![(spec, ForeignFd::alone(memfd::memfd(len)))], None, &unmapper)
            .unwrap(),
    )
}
