//! A guest's memory: memfds that are mapped here and passed to the back end.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
pub use vhost::VhostUserMemoryRegionInfo as RegionInfo;
use vm_memory::bitmap::BitmapSlice;
use vm_memory::{AtomicAccess, Bytes, FileOffset, MmapRegion, VolatileMemory, VolatileSlice};

use crate::error::{Error, Result};

/// The bytes on either side of a boundary between regions that [`GuestRam::alloc`] never allocates,
/// so that tests can place buffers across the boundary.
pub const SEAM: u64 = 64 << 10;

/// The kind of pages of the memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Backing {
    /// Ordinary pages.
    #[default]
    Pages,
    /// Hugepages of 2 MiB. The size of each region is a multiple of that.
    Hugepages,
}

/// A piece of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Guest-physical address of the first byte.
    pub gpa: u64,
    /// The length in bytes.
    pub len: u32,
}

impl Segment {
    /// Makes a segment of `len` bytes from `gpa`.
    #[must_use]
    pub fn new(gpa: u64, len: u32) -> Self {
        Self { gpa, len }
    }
}

/// A guest's memory: regions that follow one another in guest-physical space, and an allocator that
/// never frees.
///
/// The front end, its queues and the tests share it, so it is always in an [`Arc`]. All accesses
/// are volatile, as the back end may write the memory at any time.
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
    /// Makes one region of ordinary pages for each of `sizes` (in bytes), from address 0.
    ///
    /// # Errors
    /// No memory or address space is left.
    pub fn new(sizes: &[u64]) -> Result<Arc<Self>> {
        Self::with(sizes, 0, Backing::Pages)
    }

    /// As [`GuestRam::new`], from address `base` and made of `backing`. With a `base` past the end
    /// of another memory, the tables of both can be joined into one.
    ///
    /// # Errors
    /// No memory, hugepages or address space is left.
    pub fn with(sizes: &[u64], base: u64, backing: Backing) -> Result<Arc<Self>> {
        let mut regions = Vec::with_capacity(sizes.len());
        let mut gpa = base;
        for &size in sizes {
            regions.push(map(gpa, size, backing)?);
            gpa += size;
        }
        Ok(Arc::new(Self { regions, next: AtomicU64::new(base) }))
    }

    /// Allocates `len` bytes at a multiple of `align` (a power of two). They lie in one region, are
    /// zero, and are never freed.
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

    /// Returns the address at which region `index` ends and the next one begins. The caller may use
    /// [`SEAM`] bytes on either side.
    #[must_use]
    pub fn boundary(&self, index: usize) -> u64 {
        self.regions[index].end()
    }

    /// Returns the memory table, as [`crate::FrontEnd::set_memory_table`] takes it. Its fds are
    /// borrowed: the table is valid as long as the memory exists.
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

    /// Returns the file of region `index`, so that a test can shorten it, seal it, or pass it on.
    #[must_use]
    pub fn file(&self, index: usize) -> &File {
        &self.regions[index].file
    }

    /// Returns the address in this process, as a back end expects ring addresses.
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
    /// [`Error::Address`]; a part of `to` may have been filled.
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
    /// [`Error::Address`]; a part of the memory may have been written.
    pub fn write(&self, gpa: u64, from: &[u8]) -> Result<()> {
        let mut done = 0;
        while done < from.len() {
            let piece = self.piece(gpa, done, from.len())?;
            piece.copy_from(&from[done..done + piece.len()]);
            done += piece.len();
        }
        Ok(())
    }

    /// Allocates memory as [`GuestRam::alloc`] does, for repeated access without a look-up.
    pub(crate) fn window(self: &Arc<Self>, len: u32, align: u64) -> Result<Window> {
        let at = self.alloc(len, align)?;
        let (region, offset) =
            self.find(at.gpa).ok_or(Error::Address { gpa: at.gpa, len: u64::from(len) })?;
        Ok(Window { ram: self.clone(), region, offset, len: len as usize, gpa: at.gpa })
    }

    /// Returns the first place from `next` on for `len` bytes, outside of the seams.
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
        Some((index, usize::try_from(gpa - self.regions[index].gpa).ok()?))
    }

    /// Returns the part of the bytes `done..len` from `gpa` that lies in one region.
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
    // Without available hugepages, an access to a mapping with MAP_NORESERVE would raise SIGBUS.
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
    let size = usize::try_from(size).map_err(|e| Error::Map(e.to_string()))?;
    let map = MmapRegion::build(Some(offset), size, protection, flags)
        .map_err(|e| Error::Map(e.to_string()))?;
    Ok(Region { gpa, map, file })
}

/// A piece of guest memory in one region, for repeated access.
///
/// An access outside is a bug of this crate: it panics.
#[derive(Clone, Debug)]
pub(crate) struct Window {
    ram: Arc<GuestRam>,
    region: usize,
    offset: usize,
    len: usize,
    gpa: u64,
}

impl Window {
    /// Returns the guest-physical address of the first byte.
    pub(crate) fn gpa(&self) -> u64 {
        self.gpa
    }

    /// Returns its length in bytes.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Returns the guest memory that it is a part of.
    pub(crate) fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    /// Returns its address in this process.
    pub(crate) fn user_addr(&self) -> u64 {
        self.ram.regions[self.region].map.as_ptr() as u64 + self.offset as u64
    }

    /// Reads the naturally aligned value at offset `at`.
    #[inline]
    pub(crate) fn load<T: AtomicAccess>(&self, at: usize, order: Ordering) -> T {
        self.check(at, size_of::<T>());
        self.slice()
            .load(self.offset + at, order)
            .expect("the access is aligned and inside the window")
    }

    /// Writes the naturally aligned value at offset `at`.
    #[inline]
    pub(crate) fn store<T: AtomicAccess>(&self, at: usize, value: T, order: Ordering) {
        self.check(at, size_of::<T>());
        self.slice()
            .store(value, self.offset + at, order)
            .expect("the access is aligned and inside the window");
    }

    /// Sets every byte to zero.
    pub(crate) fn clear(&self) {
        let zeroes = vec![0; self.len];
        self.slice().write_slice(&zeroes, self.offset).expect("the bytes are inside the window");
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
