//! The medium below a store, as the store sees it.

use std::future::Future;

use crate::error::DeviceError;

/// What the store must know of its device. Constant while the store is open, but for `size`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Properties {
    /// Size in bytes.
    pub size: u64,
    /// Size of a logical block in bytes: a power of two.
    pub block_size: u32,
    /// Whether [`Device::unmap`] does anything.
    pub unmap: bool,
    /// Whether blocks read as zeroes after [`Device::unmap`].
    pub unmap_zeroes: bool,
}

/// Asynchronous access to a device. Offsets and lengths are in bytes and multiples of the block
/// size.
///
/// The store relies on these: a completed [`flush`](Self::flush) makes every write that had
/// completed when it was called durable; writes that were not flushed may survive a power cut in
/// any subset; a metadata page of 4096 bytes is written whole or not at all. The format has no
/// second copy of such a page, so that the last one is an assumption of SPDK's, too.
pub trait Device {
    /// The device's properties.
    fn properties(&self) -> Properties;

    /// Reads `len` bytes. The answer has exactly this length.
    fn read(&self, offset: u64, len: usize) -> impl Future<Output = Result<Vec<u8>, DeviceError>>;

    /// Writes all of `data`.
    fn write(&self, offset: u64, data: Vec<u8>) -> impl Future<Output = Result<(), DeviceError>>;

    /// Makes completed writes durable. A device without a volatile cache does nothing.
    fn flush(&self) -> impl Future<Output = Result<(), DeviceError>>;

    /// Makes the range read as zeroes.
    fn write_zeroes(&self, offset: u64, len: u64) -> impl Future<Output = Result<(), DeviceError>>;

    /// Tells the device that the content of the range is not needed any more.
    fn unmap(&self, offset: u64, len: u64) -> impl Future<Output = Result<(), DeviceError>>;

    /// Reads from the external snapshot `id`, which blobs name as their parent; zeroes beyond its
    /// end. Fails with `ENODEV` if there is no such device.
    fn read_external(
        &self,
        id: &[u8],
        offset: u64,
        len: usize,
    ) -> impl Future<Output = Result<Vec<u8>, DeviceError>> {
        let _ = (id, offset, len);
        async { Err(DeviceError { errno: 19 }) }
    }
}
