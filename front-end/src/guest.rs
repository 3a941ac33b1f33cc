//! A guest's memory: memfds that are mapped here and handed to the back end.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
pub use vhost::VhostUserMemoryRegionInfo as RegionInfo;
use vm_memory::bitmap::BitmapSlice;
use vm_memory::{AtomicAccess, Bytes, FileOffset, MmapRegion, VolatileMemory, VolatileSlice};

use crate::error::{Error, Result};

/// Bytes on either side of a boundary between regions that [`GuestRam::alloc`] never hands out, so
/// that tests can lay buffers across it.
pub const SEAM: u64 = 64 << 10;

/// What the memory is made of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Backing {
    /// Ordinary pages.
    #[default]
    Pages,
    /// Hugepages of 2 MiB: each region is a multiple of that.
    Hugepages,
}

/// A piece of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Guest-physical address of the first byte.
    pub gpa: u64,
    /// Bytes.
    pub len: u32,
}

impl Segment {
    /// `len` bytes from `gpa`.
    #[must_use]
    pub fn new(gpa: u64, len: u32) -> Self {
        Self { gpa, len }
    }
}

/// A guest's memory: regions that follow one another in guest-physical space, and an allocator
/// that only goes forward.
///
/// Shared by the front end, its queues and the tests, hence always in an [`Arc`]. Memory is only
/// ever accessed as volatile, as the back end may write it at any time.
#[derive(Debug)]
pub struct GuestRam {
    regions: Vec<Region>,
    next: AtomicU64,
}

#[derive(Debug)]
struct Region {
    gpa: u64,
    map: MmapRegion,
    file: Arc<File>,
}

impl Region {
    fn end(&self) -> u64 {
        self.gpa + self.map.size() as u64
    }
}

impl GuestRam {
    /// Makes one region of ordinary pages for each of `sizes` (bytes), from address 0.
    ///
    /// # Errors
    /// The system has no memory, or an address space too small.
    pub fn new(sizes: &[u64]) -> Result<Arc<Self>> {
        Self::with(sizes, 0, Backing::Pages)
    }

    /// As [`GuestRam::new`], from address `base` and made of `backing`. With a `base` past another
    /// memory's end, the tables of both can be joined into one.
    ///
    /// # Errors
    /// The system has no memory (or no hugepages), or an address space too small.
    pub fn with(sizes: &[u64], base: u64, backing: Backing) -> Result<Arc<Self>> {
        let mut regions = Vec::with_capacity(sizes.len());
        let mut gpa = base;
        for &size in sizes {
            regions.push(map(gpa, size, backing)?);
            gpa += size;
        }
        Ok(Arc::new(Self { regions, next: AtomicU64::new(base) }))
    }

    /// Takes `len` bytes at a multiple of `align` (a power of two). They lie in one region, are
    /// zero, and are never given back.
    ///
    /// # Errors
    /// [`Error::NoRam`].
    pub fn alloc(&self, len: u32, align: u64) -> Result<Segment> {
        let mut from = 0;
        self.next
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |next| {
                from = self.place(next, u64::from(len), align)?;
                Some(from + u64::from(len))
            })
            .map_err(|_| Error::NoRam(u64::from(len)))?;
        Ok(Segment { gpa: from, len })
    }

    /// Where region `index` ends and the next one begins. [`SEAM`] bytes on either side are
    /// the caller's.
    #[must_use]
    pub fn boundary(&self, index: usize) -> u64 {
        self.regions[index].end()
    }

    /// The memory table, as [`crate::FrontEnd::set_memory_table`] takes it. Its fds are borrowed:
    /// the table is of use while the memory lives.
    #[must_use]
    pub fn table(&self) -> Vec<RegionInfo> {
        let line = |region: &Region| RegionInfo {
            guest_phys_addr: region.gpa,
            memory_size: region.map.size() as u64,
            userspace_addr: region.map.as_ptr() as u64,
            mmap_offset: 0,
            mmap_handle: region.file.as_raw_fd(),
        };
        self.regions.iter().map(line).collect()
    }

    /// The file of region `index`: to shorten it, seal it, or hand it over otherwise.
    #[must_use]
    pub fn file(&self, index: usize) -> &File {
        &self.regions[index].file
    }

    /// The address in this process, as ring addresses are given to a back end.
    ///
    /// # Errors
    /// [`Error::Address`].
    pub fn user_addr(&self, gpa: u64) -> Result<u64> {
        let (region, offset) = self.find(gpa).ok_or(Error::Address { gpa, len: 1 })?;
        Ok(self.regions[region].map.as_ptr() as u64 + offset as u64)
    }

    /// Copies guest memory at `gpa` to `to`; it may cross regions.
    ///
    /// # Errors
    /// [`Error::Address`]; part of `to` may have been filled by then.
    pub fn read(&self, gpa: u64, to: &mut [u8]) -> Result<()> {
        let mut done = 0;
        while done < to.len() {
            let piece = self.piece(gpa, done, to.len())?;
            piece.copy_to(&mut to[done..]);
            done += piece.len();
        }
        Ok(())
    }

    /// Copies `from` to guest memory at `gpa`; it may cross regions.
    ///
    /// # Errors
    /// [`Error::Address`]; part of it may have been written by then.
    pub fn write(&self, gpa: u64, from: &[u8]) -> Result<()> {
        let mut done = 0;
        while done < from.len() {
            let piece = self.piece(gpa, done, from.len())?;
            piece.copy_from(&from[done..done + piece.len()]);
            done += piece.len();
        }
        Ok(())
    }

    /// Takes memory as [`GuestRam::alloc`] does, for repeated access without a look-up.
    pub(crate) fn window(self: &Arc<Self>, len: u32, align: u64) -> Result<Window> {
        let at = self.alloc(len, align)?;
        let (region, offset) =
            self.find(at.gpa).ok_or(Error::Address { gpa: at.gpa, len: u64::from(len) })?;
        Ok(Window { ram: self.clone(), region, offset, len: len as usize, gpa: at.gpa })
    }

    /// The first place from `next` on for `len` bytes, away from the seams.
    fn place(&self, next: u64, len: u64, align: u64) -> Option<u64> {
        let last = self.regions.len().checked_sub(1)?;
        self.regions.iter().enumerate().find_map(|(i, region)| {
            let first = if i == 0 { region.gpa } else { region.gpa + SEAM };
            let end = if i == last { region.end() } else { region.end().saturating_sub(SEAM) };
            let from = next.max(first).checked_next_multiple_of(align)?;
            (from.checked_add(len)? <= end).then_some(from)
        })
    }

    fn find(&self, gpa: u64) -> Option<(usize, usize)> {
        let index = self.regions.iter().position(|r| (r.gpa..r.end()).contains(&gpa))?;
        Some((index, (gpa - self.regions[index].gpa) as usize))
    }

    /// What lies in one region of the bytes `done..len` from `gpa`.
    fn piece(
        &self,
        gpa: u64,
        done: usize,
        len: usize,
    ) -> Result<VolatileSlice<'_, impl BitmapSlice>> {
        let error = || Error::Address { gpa, len: len as u64 };
        let from = gpa.checked_add(done as u64).ok_or_else(error)?;
        let (region, offset) = self.find(from).ok_or_else(error)?;
        let map = &self.regions[region].map;
        let here = (map.size() - offset).min(len - done);
        map.get_slice(offset, here).map_err(|_| error())
    }
}

fn map(gpa: u64, size: u64, backing: Backing) -> Result<Region> {
    // A mapping with MAP_NORESERVE on hugepages that are not there would end in SIGBUS.
    let (kind, flags) = match backing {
        Backing::Pages => (MemfdFlags::empty(), libc::MAP_SHARED | libc::MAP_NORESERVE),
        Backing::Hugepages => (MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB, libc::MAP_SHARED),
    };
    let fd = memfd_create("guest", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | kind)
        .map_err(Error::system("cannot make a memfd"))?;
    ftruncate(&fd, size).map_err(Error::system("cannot size a memfd"))?;
    let file = Arc::new(File::from(fd));
    let offset = FileOffset::from_arc(file.clone(), 0);
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let map = MmapRegion::build(Some(offset), size as usize, protection, flags)
        .map_err(|e| Error::Map(e.to_string()))?;
    Ok(Region { gpa, map, file })
}

/// A piece of guest memory in one region, for repeated access.
///
/// An access outside is a mistake of this crate's: it panics.
#[derive(Clone, Debug)]
pub(crate) struct Window {
    ram: Arc<GuestRam>,
    region: usize,
    offset: usize,
    len: usize,
    gpa: u64,
}

impl Window {
    /// Guest-physical address of the first byte.
    pub(crate) fn gpa(&self) -> u64 {
        self.gpa
    }

    /// Bytes.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// The memory it is a piece of.
    pub(crate) fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    /// Its address in this process.
    pub(crate) fn user_addr(&self) -> u64 {
        self.ram.regions[self.region].map.as_ptr() as u64 + self.offset as u64
    }

    /// Reads the naturally aligned value `at` bytes from the start.
    #[inline]
    pub(crate) fn load<T: AtomicAccess>(&self, at: usize, order: Ordering) -> T {
        self.check(at, size_of::<T>());
        self.slice().load(self.offset + at, order).expect("aligned, and inside the window")
    }

    /// Writes the naturally aligned value `at` bytes from the start.
    #[inline]
    pub(crate) fn store<T: AtomicAccess>(&self, at: usize, value: T, order: Ordering) {
        self.check(at, size_of::<T>());
        self.slice().store(value, self.offset + at, order).expect("aligned, and inside the window");
    }

    /// Makes every byte zero.
    pub(crate) fn clear(&self) {
        let zeroes = vec![0; self.len];
        self.slice().write_slice(&zeroes, self.offset).expect("inside the window");
    }

    #[inline]
    fn slice(&self) -> VolatileSlice<'_, impl BitmapSlice> {
        self.ram.regions[self.region].map.as_volatile_slice()
    }

    #[inline]
    fn check(&self, at: usize, len: usize) {
        assert!(at + len <= self.len, "{at} is outside a window of {} bytes", self.len);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn allocations_stay_in_one_region_and_off_the_seam() {
        let ram = GuestRam::new(&[1 << 20, 1 << 20]).unwrap();
        let mut end = 0;
        let mut taken = 0;
        while let Ok(segment) = ram.alloc(40 << 10, 4096) {
            assert!(segment.gpa >= end && segment.gpa % 4096 == 0);
            end = segment.gpa + u64::from(segment.len);
            let seam = (1 << 20) - SEAM..(1 << 20) + SEAM;
            assert!(end <= seam.start || segment.gpa >= seam.end, "{segment:?}");
            taken += 1;
        }
        assert_eq!(taken, 2 * ((1 << 20) - SEAM) / (40 << 10));
        assert!(end <= 2 << 20);
    }

    #[test]
    fn bytes_cross_a_boundary_and_not_the_end() {
        let ram = GuestRam::with(&[1 << 20, 1 << 20], 1 << 30, Backing::Pages).unwrap();
        let bytes: Vec<u8> = (0..200).collect();
        let at = ram.boundary(0) - 100;
        ram.write(at, &bytes).unwrap();
        let mut back = vec![0; 200];
        ram.read(at, &mut back).unwrap();
        assert_eq!(back, bytes);
        let end = (1 << 30) + (2 << 20);
        assert!(matches!(ram.write(end - 1, &[0, 0]), Err(Error::Address { .. })));
        assert!(matches!(ram.read(0, &mut [0]), Err(Error::Address { .. })));
    }

    #[test]
    fn a_back_end_that_maps_the_fds_sees_the_same_bytes() {
        use std::os::unix::fs::FileExt;
        let ram = GuestRam::new(&[1 << 20, 1 << 20]).unwrap();
        ram.write((1 << 20) + 5, b"hello").unwrap();
        let mut bytes = [0; 5];
        ram.file(1).read_exact_at(&mut bytes, 5).unwrap();
        assert_eq!(&bytes, b"hello");
        assert_eq!(ram.table()[1].guest_phys_addr, 1 << 20);
    }
}
