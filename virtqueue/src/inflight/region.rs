//! Access to one queue's part of an in-flight area.
#![expect(unsafe_code, reason = "the area is shared with the front end")]

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

use super::{Area, REGION_ALIGN_BYTES};

/// One queue's part of an area.
#[derive(Debug)]
pub(super) struct Region {
    base: *mut u8,
    bytes: usize,
    area: Arc<Area>,
}

// SAFETY: the address is in the mapping of `area`, which `self` keeps. It is accessed as atomics.
unsafe impl Send for Region {}

/// Defines a load and a store of one width. A load returns what another process has stored, or what
/// the front end stores at the same time, which harms only its own guest.
macro_rules! access {
    ($load:ident, $store:ident, $plain:ty, $atomic:ty) => {
        #[inline]
        pub(super) fn $load(&self, at: usize) -> $plain {
            self.cell::<$atomic>(at).load(Ordering::Relaxed)
        }

        /// Release: a killed process leaves a prefix of its stores, in their order.
        #[inline]
        pub(super) fn $store(&self, at: usize, value: $plain) {
            #[cfg(test)]
            super::crash::store();
            self.cell::<$atomic>(at).store(value, Ordering::Release);
        }
    };
}

impl Region {
    /// # Safety
    /// The area has a queue's part of `bytes` bytes at `at`, aligned to [`REGION_ALIGN_BYTES`].
    pub(super) unsafe fn new(area: Arc<Area>, at: usize, bytes: usize) -> Self {
        let base = area.file.host().wrapping_add(at);
        debug_assert!((base as u64).is_multiple_of(REGION_ALIGN_BYTES));
        Self { base, bytes, area }
    }

    /// Number of entries.
    #[inline]
    pub(super) fn entries(&self) -> u16 {
        self.area.queue_size()
    }

    /// The field at `at`. It must be a field of the header or of an existing entry.
    #[inline]
    fn cell<T>(&self, at: usize) -> &T {
        debug_assert!(at + size_of::<T>() <= self.bytes && at.is_multiple_of(align_of::<T>()));
        // SAFETY: a field of the part is in bounds and aligned, because the part is aligned. The
        // mapping exists as long as the area. `T` is an atomic, for which any bit pattern is valid.
        unsafe { &*self.base.wrapping_add(at).cast() }
    }

    access!(load_u8, store_u8, u8, AtomicU8);
    access!(load_u16, store_u16, u16, AtomicU16);
    access!(load_u32, store_u32, u32, AtomicU32);
    access!(load_u64, store_u64, u64, AtomicU64);
}
