//! A front end's memory file, or a part of it, as this program has mapped it: guest memory, the
//! dirty log, the in-flight area.
#![expect(unsafe_code, reason = "maps what a front end hands over")]

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::sigbus;
use crate::unmapper::{Counted, Unmapper};
use closer::ForeignFd;

/// Why a file was refused.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// the fd is not a file of memory
    #[error(transparent)]
    Kind(#[from] closer::Error),
    /// the part is empty, or its end is no number
    #[error("{size} bytes at {offset:#x} of a memory file are no range")]
    Range {
        /// Where the part begins.
        offset: u64,
        /// Its length in bytes.
        size: u64,
    },
    /// the file is shorter than its part
    #[error("memory file has {have} bytes, the part in use ends at {want}")]
    Short {
        /// Size of the file.
        have: u64,
        /// End of the part.
        want: u64,
    },
    /// the system refused
    #[error("cannot map a memory file: {0}")]
    System(#[from] io::Error),
    /// too many mappings in the process
    #[error("too many mappings of memory files")]
    TooMany,
    /// too many mappings of one controller
    #[error("{0} mappings of memory files in all connections of the controller, old ones included")]
    TooManyOfController(usize),
}

/// A part of a memory file, mapped. What happens when the front end cuts the file short is in
/// `sigbus`. Dropping it unmaps it on another thread, as that can take seconds.
#[derive(Debug)]
pub struct SharedFile {
    host: *mut u8,
    size: u64,
    /// Device and inode.
    identity: (u64, u64),
    /// Set when part of the file was found missing after it had been mapped.
    truncated: Arc<AtomicBool>,
    base: *mut u8,
    len: usize,
    slot: sigbus::Slot,
    unmapper: Unmapper,
    /// Until it is dropped.
    counted: Option<Counted>,
}

// SAFETY: the pointers are addresses in a shared mapping, which any thread may use as long as the
// value lives; what they point to is only accessed as volatile memory or as atomics.
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
    /// It is no file of memory, too short, or cannot be mapped; or `unmapper` counts too many.
    pub fn map(fd: &ForeignFd, offset: u64, size: u64, unmapper: &Unmapper) -> Result<Self, Error> {
        let stat = stat(fd)?;
        let page = page_bytes(fd)?;
        let range = Error::Range { offset, size };
        let end = offset.checked_add(size).filter(|_| size > 0).ok_or(range)?;
        if stat.size < end {
            return Err(Error::Short { have: stat.size, want: end });
        }
        let lead = offset % page;
        let len = (lead + size).next_multiple_of(page) as usize;
        let at = i64::try_from(offset - lead).map_err(|_| Error::Range { offset, size })?;
        let counted = Some(unmapper.count().map_err(Error::TooManyOfController)?);
        // SAFETY: a new shared mapping of a file; nothing else is at the address the kernel picks.
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
        // SAFETY: advice on the mapping just made: a guest's memory is not for core dumps.
        unsafe { libc::madvise(base, len, libc::MADV_DONTDUMP) };
        let truncated = Arc::new(AtomicBool::new(false));
        let base = base.cast::<u8>();
        let Some(slot) = sigbus::register(base as usize, len, page as usize, &truncated) else {
            // SAFETY: the mapping made above, which nobody knows of.
            unsafe { libc::munmap(base.cast(), len) };
            return Err(Error::TooMany);
        };
        let host = base.wrapping_add(lead as usize);
        let (identity, unmapper) = (stat.identity, unmapper.clone());
        Ok(Self { host, size, identity, truncated, base, len, slot, unmapper, counted })
    }

    /// Address of the part's first byte, good while `self` lives.
    #[must_use]
    pub fn host(&self) -> *mut u8 {
        self.host
    }

    /// Length of the part in bytes.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.size
    }

    /// Device and inode of the file.
    #[must_use]
    pub fn identity(&self) -> (u64, u64) {
        self.identity
    }

    /// Whether part of it was found missing.
    #[must_use]
    pub fn truncated(&self) -> bool {
        self.truncated.load(Ordering::Relaxed)
    }
}

/// Device and inode of a memory file.
///
/// # Errors
/// It is something else.
pub fn identity(fd: &ForeignFd) -> Result<(u64, u64), Error> {
    Ok(stat(fd)?.identity)
}

struct Stat {
    identity: (u64, u64),
    size: u64,
}

/// Asks the kernel about an fd that is known to be memory, so that nobody else is asked.
fn stat(fd: &ForeignFd) -> Result<Stat, Error> {
    fd.check_memory()?;
    // SAFETY: all zeroes is a value of this plain C struct.
    let mut stat: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: the fd is open and the struct is ours.
    if unsafe { libc::fstat(fd.as_fd().as_raw_fd(), &raw mut stat) } != 0 {
        return Err(io::Error::last_os_error().into());
    }
    let size = u64::try_from(stat.st_size).unwrap_or(0);
    Ok(Stat { identity: (stat.st_dev, stat.st_ino), size })
}

/// The size of a memory file's pages.
fn page_bytes(fd: &ForeignFd) -> Result<u64, Error> {
    // SAFETY: all zeroes is a value of this plain C struct.
    let mut fs: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: the fd is open and the struct is ours.
    if unsafe { libc::fstatfs(fd.as_fd().as_raw_fd(), &raw mut fs) } != 0 {
        return Err(io::Error::last_os_error().into());
    }
    // SAFETY: a query without side effects.
    let base_page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) } as u64;
    let huge = fs.f_type == libc::HUGETLBFS_MAGIC;
    Ok(if huge { (fs.f_bsize as u64).max(base_page) } else { base_page })
}
