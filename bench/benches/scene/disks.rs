//! Disks of each kind, all of one size.

use std::path::Path;
use std::sync::Arc;

use bdev::{
    Bdev, Delay, DelayOptions, ErrorDisk, ErrorOptions, FileDisk, FileOptions, Flavour, Latency,
    Malloc, MallocOptions, Null, NullOptions,
};

/// Size of every disk: small enough for a cache of the second or third level.
pub(crate) const DISK_BYTES: u64 = BLOCKS * BLOCK as u64;

const BLOCK: u32 = 512;
const BLOCKS: u64 = 16384;

/// A disk that does nothing.
pub(crate) fn null() -> Arc<dyn Bdev> {
    let name = "null".into();
    Null::create(NullOptions { name, num_blocks: BLOCKS, block_size: BLOCK, uuid: None }).unwrap()
}

/// A disk in memory.
pub(crate) fn malloc() -> Arc<dyn Bdev> {
    let name = "malloc".into();
    Malloc::create(MallocOptions { name, num_blocks: BLOCKS, block_size: BLOCK, uuid: None })
        .unwrap()
}

/// A disk in a file of [`DISK_BYTES`].
pub(crate) fn file(path: &Path) -> Arc<dyn Bdev> {
    let options = FileOptions {
        name: "file".into(),
        filename: path.into(),
        block_size: Some(BLOCK),
        readonly: false,
        fallocate: false,
        uuid: None,
        flavour: Flavour::Uring,
        engine: None,
    };
    FileDisk::create(options).unwrap()
}

/// The wrapper that delays, without a delay, over a disk that does nothing.
pub(crate) fn delay() -> Arc<dyn Bdev> {
    let (base, latency) = (null(), Latency::default());
    Delay::create(DelayOptions { name: "delay".into(), base, latency, uuid: None }).unwrap()
}

/// The wrapper that fails, told nothing, over a disk that does nothing.
pub(crate) fn error() -> Arc<dyn Bdev> {
    ErrorDisk::create(ErrorOptions { name: "error".into(), base: null(), uuid: None }).unwrap()
}
