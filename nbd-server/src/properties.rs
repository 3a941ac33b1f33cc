//! What an export tells its clients about its bdev.

use bdev::{Bdev, Features};
use nbd::protocol::transmission;

/// What an export tells its clients.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Properties {
    /// The size in bytes.
    pub size: u64,
    /// The block size in bytes: every request is a multiple of it.
    pub block_size: u32,
    /// Writes are refused.
    pub read_only: bool,
    /// Flushes are supported, and so are writes that are durable when they end.
    pub flush: bool,
    /// Unmap is supported.
    pub unmap: bool,
    /// Writes of zeroes are supported.
    pub write_zeroes: bool,
}

impl Properties {
    /// The properties of a bdev.
    #[must_use]
    pub fn of(bdev: &dyn Bdev, read_only: bool) -> Self {
        let Features { read_only: always, flush, unmap, write_zeroes, .. } = bdev.features();
        Self {
            size: bdev.size_bytes(),
            block_size: bdev.block_size(),
            read_only: read_only || always,
            flush,
            unmap,
            write_zeroes,
        }
    }

    /// Returns the transmission flags that do not depend on the client.
    pub(crate) fn flags(&self) -> u16 {
        let Self { read_only, flush, unmap, write_zeroes, .. } = *self;
        let when = |condition, flags| if condition { flags } else { 0 };
        transmission::HAS_FLAGS
            | when(read_only, transmission::READ_ONLY)
            | when(flush, transmission::SEND_FLUSH | transmission::SEND_FUA)
            | when(unmap && !read_only, transmission::SEND_TRIM)
            | when(write_zeroes && !read_only, transmission::SEND_WRITE_ZEROES)
    }
}
