//! A front end's memory file, or a range of it, as this process maps it: guest memory, a dirty log,
//! or an in-flight area.
#![expect(unsafe_code, reason = "maps the front end's files")]

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::address_space::usize_of;
use crate::sigbus;
use crate::unmapper::{Counted, Unmapper};
use closer::ForeignFd;

/// Why a file was refused.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// the fd is not a memory file
    #[error(transparent)]
    Kind(#[from] closer::Error),
    /// the range is empty, or its end exceeds 64 bits
    #[error("invalid range in memory file: offset {offset:#x}, length {size}")]
    Range {
        /// Offset of the range.
        offset: u64,
        /// Its length in bytes.
        size: u64,
    },
    /// the file ends before the range does
    #[error("memory file is too short: {have} bytes, the range in use ends at {want}")]
    Short {
        /// Size of the file.
        have: u64,
        /// End of the range.
        want: u64,
    },
    /// a system call failed
    #[error("cannot map a memory file: {0}")]
    System(#[from] io::Error),
    /// too many mappings in the process
    #[error("too many mappings of memory files")]
    TooMany,
    /// too many mappings of one controller
    #[error(
        "too many memory file mappings in all connections of the controller, old ones included: {0}"
    )]
    TooManyOfController(usize),
}

/// A mapped range of a memory file. If the front end truncates the file, accesses do not fail: see
/// `sigbus`. A drop unmaps the range on another thread, because that can take seconds.
#[derive(Debug)]
pub struct SharedFile {
    host: *mut u8,
    size: u64,
    /// Device and inode.
    identity: (u64, u64),
    /// Set when an access has found the file truncated.
    truncated: Arc<AtomicBool>,
    base: *mut u8,
    len: usize,
    slot: sigbus::Slot,
    unmapper: Unmapper,
    /// Counts the mapping. `Some` until the drop.
    counted: Option<Counted>,
}

// SAFETY: the pointers are addresses in a shared mapping. Any thread may use it while `self`
// exists, and the memory is only accessed as volatile memory or as atomics.
unsafe impl Send for SharedFile {}
// SAFETY: as above.
unsafe impl Sync for SharedFile {}

impl Drop for SharedFile {
    fn drop(&mut self) {
        self.unmapper.unmap(self.base, self.len, self.slot, self.counted.take());
    }
}

impl SharedFile {
    /// Maps `size` bytes at `offset` for reading and writing. The fd is not needed afterwards.
    ///
    /// # Errors
    /// The fd is not a memory file, the file is too short or cannot be mapped, or there are too
    /// many mappings.
    pub fn map(fd: &ForeignFd, offset: u64, size: u64, unmapper: &Unmapper) -> Result<Self, Error> {
        let stat = stat(fd)?;
        let page = page_bytes(fd)?;
        let range = Error::Range { offset, size };
        let end = offset.checked_add(size).filter(|_| size > 0).ok_or(range)?;
        if stat.size < end {
            return Err(Error::Short { have: stat.size, want: end });
        }
        let lead = offset % page;
        let len = usize_of((lead + size).next_multiple_of(page));
        let at = i64::try_from(offset - lead).map_err(|_| Error::Range { offset, size })?;
        let counted = Some(unmapper.count().map_err(Error::TooManyOfController)?);
        // SAFETY: a new shared mapping of a file, at an address that the kernel chooses.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_NORESERVE,
                fd.as_fd().as_raw_fd(),
                at,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error().into());
        }
        // SAFETY: sets an attribute of the new mapping: core dumps do not contain guest memory.
        unsafe { libc::madvise(base, len, libc::MADV_DONTDUMP) };
        let truncated = Arc::new(AtomicBool::new(false));
        let base = base.cast::<u8>();
        let Some(slot) = sigbus::register(base as usize, len, usize_of(page), &truncated) else {
            // SAFETY: the mapping made above, which nothing uses yet.
            unsafe { libc::munmap(base.cast(), len) };
            return Err(Error::TooMany);
        };
        let host = base.wrapping_add(usize_of(lead));
        let (identity, unmapper) = (stat.identity, unmapper.clone());
        Ok(Self { host, size, identity, truncated, base, len, slot, unmapper, counted })
    }

    /// Address of the first byte of the range, valid while `self` exists.
    #[must_use]
    pub fn host(&self) -> *mut u8 {
        self.host
    }

    /// Length of the range in bytes.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.size
    }

    /// Device and inode of the file.
    #[must_use]
    pub fn identity(&self) -> (u64, u64) {
        self.identity
    }

    /// Returns whether an access has found the file truncated.
    #[must_use]
    pub fn truncated(&self) -> bool {
        self.truncated.load(Ordering::Relaxed)
    }
}

/// Returns device and inode of a memory file.
///
/// # Errors
/// The fd is not a memory file, or `fstat` failed.
pub fn identity(fd: &ForeignFd) -> Result<(u64, u64), Error> {
    Ok(stat(fd)?.identity)
}

struct Stat {
    identity: (u64, u64),
    size: u64,
}

/// Calls `fstat` on a memory file. The fd is checked first: on other file systems, such as FUSE,
/// `fstat` can block.
fn stat(fd: &ForeignFd) -> Result<Stat, Error> {
    fd.check_memory()?;
    // SAFETY: all zeroes is a valid value of this C struct.
    let mut stat: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: the fd is open, and the struct is a local variable.
    if unsafe { libc::fstat(fd.as_fd().as_raw_fd(), &raw mut stat) } != 0 {
        return Err(io::Error::last_os_error().into());
    }
    let size = u64::try_from(stat.st_size).unwrap_or(0);
    Ok(Stat { identity: (stat.st_dev, stat.st_ino), size })
}

/// The page size of a memory file.
fn page_bytes(fd: &ForeignFd) -> Result<u64, Error> {
    // SAFETY: all zeroes is a valid value of this C struct.
    let mut fs: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: the fd is open, and the struct is a local variable.
    if unsafe { libc::fstatfs(fd.as_fd().as_raw_fd(), &raw mut fs) } != 0 {
        return Err(io::Error::last_os_error().into());
    }
    // SAFETY: a query without side effects.
    let base_page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) } as u64;
    let huge = fs.f_type == libc::HUGETLBFS_MAGIC;
    Ok(if huge { (fs.f_bsize as u64).max(base_page) } else { base_page })
}
