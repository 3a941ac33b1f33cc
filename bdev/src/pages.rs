//! Anonymous memory for a disk: huge pages where free, populated and unmapped in pieces.
#![expect(unsafe_code, reason = "maps, populates and unmaps memory")]

use std::io;
use std::ptr;

use crate::available;
use crate::error::Error;

/// Unit of populating and unmapping. An address-space call holds up every other one in
/// the process for as long as it takes: pieces of this size cannot be told from noise.
const PIECE: usize = 2 << 20;

/// What a memory disk is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backing {
    /// Huge pages of 2 MiB from the pool that the operator reserved.
    HugePages,
    /// Normal pages, which the kernel was asked to merge into huge ones.
    NormalPages,
}

/// Memory that is allocated, zeroed and this value's own.
#[derive(Debug)]
pub(crate) struct Pages {
    /// What was mapped.
    mapping: *mut u8,
    mapped: usize,
    /// First byte in use: `mapping`, aligned.
    base: *mut u8,
    backing: Backing,
}

// SAFETY: an owned mapping; whoever uses its memory answers for races (see `crate::memory`).
unsafe impl Send for Pages {}
// SAFETY: as above.
unsafe impl Sync for Pages {}

impl Pages {
    /// Allocates `size` bytes, not 0. All of it is present afterwards, so that no reactor ever
    /// waits for a page fault, and a lack of memory shows here and not later, as a killed process.
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
        // The kernel reserves huge pages when it maps them, so a mapping means that all are there.
        if let Ok(pages) = Self::map(rounded, huge, Backing::HugePages)
            && pages.populate(rounded, |_| Ok(())).is_ok()
        {
            return Ok(pages);
        }
        available::check(size)?;
        // One piece more, to begin at a multiple of the huge page size.
        let mapped = rounded.checked_add(PIECE).ok_or_else(too_much)?;
        let pages = Self::map(mapped, 0, Backing::NormalPages).map_err(|_| too_much())?;
        // SAFETY: advice on a mapping of our own. Refused by kernels without it, which is fine.
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
        // SAFETY: a new mapping, at an address of the kernel's choice.
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

    /// Makes the first `size` bytes present, asking `check` about what is left every now and then.
    fn populate(
        &self,
        size: usize,
        check: impl Fn(usize) -> Result<(), Error>,
    ) -> Result<(), Error> {
        /// Pieces between two checks: somebody else may be taking memory meanwhile.
        const CHECK_EVERY: usize = 32;
        for (i, offset) in (0..size).step_by(PIECE).enumerate() {
            if i % CHECK_EVERY == 0 {
                check(size - offset)?;
            }
            let piece = self.base.wrapping_add(offset);
            // SAFETY: a piece of our own mapping, in which nothing is stored yet.
            let rc = unsafe { libc::madvise(piece.cast(), PIECE, libc::MADV_POPULATE_WRITE) };
            if rc == 0 {
                continue;
            }
            let e = io::Error::last_os_error();
            // Kernels before 5.14 do not know it.
            if e.raw_os_error() != Some(libc::EINVAL) {
                return Err(Error::NoMemory(format!("{size} bytes: {e}")));
            }
            for page in (0..PIECE).step_by(4096) {
                // SAFETY: a byte of our own mapping. Volatile, as nobody reads it back.
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
            // SAFETY: a piece of our own mapping, which nobody uses any more.
            unsafe { libc::munmap(piece.cast(), PIECE) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_zero_and_aligned() {
        let size = 3 * PIECE as u64 + 512;
        let pages = Pages::allocate(size).unwrap();
        assert_eq!(pages.base() as usize % PIECE, 0);
        for at in (0..size as usize).step_by(512) {
            // SAFETY: within the mapping.
            assert_eq!(unsafe { pages.base().wrapping_add(at).read() }, 0);
        }
    }
}
