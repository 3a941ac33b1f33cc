//! Anonymous memory for a disk: huge pages if free, populated and unmapped in pieces.
#![expect(unsafe_code, reason = "maps, populates and unmaps memory")]

use std::io;
use std::ptr;

use crate::available;
use crate::error::Error;

/// The unit of populating and unmapping. An address-space call delays every other one in the
/// process while it runs. Calls on pieces of this size cause no measurable delay.
const PIECE: usize = 2 << 20;

/// The kind of pages of a memory disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backing {
    /// Huge pages of 2 MiB from the pool that the operator reserved.
    HugePages,
    /// Normal pages, which the kernel was asked to merge into huge ones.
    NormalPages,
}

/// Memory that is allocated, zeroed and owned by this value.
#[derive(Debug)]
pub(crate) struct Pages {
    /// The mapping.
    mapping: *mut u8,
    mapped: usize,
    /// The first byte in use: `mapping`, aligned.
    base: *mut u8,
    backing: Backing,
}

// SAFETY: an owned mapping; the users of its memory handle races (see `crate::memory`).
unsafe impl Send for Pages {}
// SAFETY: as above.
unsafe impl Sync for Pages {}

impl Pages {
    /// Allocates `size` bytes; `size` is not 0. All of them are present afterwards, so that no
    /// reactor ever waits for a page fault, and a lack of memory is an error here instead of a
    /// killed process later.
    ///
    /// # Errors
    /// [`Error::NoMemory`].
    pub(crate) fn allocate(size: u64) -> Result<Self, Error> {
        let too_much = || Error::NoMemory(format!("{size} bytes"));
        let rounded = usize::try_from(size)
            .ok()
            .and_then(|n| n.checked_next_multiple_of(PIECE))
            .filter(|&n| isize::try_from(n).is_ok())
            .ok_or_else(too_much)?;
        let huge = libc::MAP_HUGETLB | libc::MAP_HUGE_2MB;
        // The kernel reserves huge pages when it maps them, so a successful mapping means that all
        // are available.
        if let Ok(pages) = Self::map(rounded, huge, Backing::HugePages)
            && pages.populate(rounded, |_| Ok(())).is_ok()
        {
            return Ok(pages);
        }
        available::check(size)?;
        // One piece more, so that the memory can begin at a multiple of the huge page size.
        let mapped = rounded.checked_add(PIECE).ok_or_else(too_much)?;
        let pages = Self::map(mapped, 0, Backing::NormalPages).map_err(|_| too_much())?;
        // SAFETY: advice on an owned mapping. Older kernels refuse it, which is harmless.
        unsafe { libc::madvise(pages.mapping.cast(), mapped, libc::MADV_HUGEPAGE) };
        pages.populate(rounded, |left| available::check(left as u64))?;
        Ok(pages)
    }

    /// First byte. Stays valid for as long as this value lives.
    #[inline]
    pub(crate) fn base(&self) -> *mut u8 {
        self.base
    }

    pub(crate) fn backing(&self) -> Backing {
        self.backing
    }

    fn map(mapped: usize, flags: i32, backing: Backing) -> io::Result<Self> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | flags;
        // SAFETY: creates a new mapping at an address of the kernel's choice.
        let mapping = unsafe { libc::mmap(ptr::null_mut(), mapped, protection, flags, -1, 0) };
        if mapping == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let mapping: *mut u8 = mapping.cast();
        let base = match backing {
            Backing::HugePages => mapping,
            Backing::NormalPages => mapping.wrapping_add(mapping.align_offset(PIECE)),
        };
        Ok(Self { mapping, mapped, base, backing })
    }

    /// Makes the first `size` bytes present. Calls `check` from time to time with the remaining
    /// bytes.
    fn populate(
        &self,
        size: usize,
        check: impl Fn(usize) -> Result<(), Error>,
    ) -> Result<(), Error> {
        /// The number of pieces between two checks: other processes may take memory meanwhile.
        const CHECK_EVERY: usize = 32;
        for (i, offset) in (0..size).step_by(PIECE).enumerate() {
            if i % CHECK_EVERY == 0 {
                check(size - offset)?;
            }
            let piece = self.base.wrapping_add(offset);
            // SAFETY: a piece of the owned mapping, which holds no data yet.
            let rc = unsafe { libc::madvise(piece.cast(), PIECE, libc::MADV_POPULATE_WRITE) };
            if rc == 0 {
                continue;
            }
            let e = io::Error::last_os_error();
            // Kernels before 5.14 do not support it.
            if e.raw_os_error() != Some(libc::EINVAL) {
                return Err(Error::NoMemory(format!("{size} bytes: {e}")));
            }
            for page in (0..PIECE).step_by(4096) {
                // SAFETY: a byte of the owned mapping. Volatile, as the compiler must not remove
                // the store.
                unsafe { piece.wrapping_add(page).write_volatile(0) };
            }
        }
        Ok(())
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        for offset in (0..self.mapped).step_by(PIECE) {
            let piece = self.mapping.wrapping_add(offset);
            // SAFETY: a piece of the owned mapping, which has no other user any more.
            unsafe { libc::munmap(piece.cast(), PIECE) };
        }
    }
}

#[cfg(test)]
mod tests {
    use guest_memory::usize_of;

    use super::*;

    #[test]
    fn memory_is_zero_and_aligned() {
        let size = 3 * PIECE as u64 + 512;
        let pages = Pages::allocate(size).unwrap();
        assert_eq!(pages.base() as usize % PIECE, 0);
        for at in (0..usize_of(size)).step_by(512) {
            // SAFETY: the address is within the mapping.
            assert_eq!(unsafe { pages.base().wrapping_add(at).read() }, 0);
        }
    }
}
