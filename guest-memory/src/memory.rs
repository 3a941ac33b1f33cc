//! Guest memory, as this process maps it from its own duplicates of the front end's fds.
#![expect(unsafe_code, reason = "maps the front end's files")]

use std::collections::HashSet;
use std::sync::Arc;

use vm_memory::VolatileSlice;

use crate::address_space::usize_of;
use crate::shared_file::{self, SharedFile};
use crate::sigbus;
use crate::unmapper::Unmapper;
use closer::ForeignFd;

/// Maximum number of memory regions in a `VHOST_USER_SET_MEM_TABLE` message.
pub const REGIONS_MAX: usize = 8;

/// Maximum number of memory regions that a front end can add one by one. It is KVM's limit for user
/// memory slots; QEMU asks for at most 512.
pub const SLOTS_MAX: usize = 509;

/// One region of a memory table, as the front end sent it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionSpec {
    /// Guest-physical address of the first byte.
    pub gpa: u64,
    /// Length in bytes.
    pub size: u64,
    /// Address of the first byte in the front end's address space. Ring addresses are in this
    /// space.
    pub user_addr: u64,
    /// Offset of the region in its file.
    pub offset: u64,
}

/// Why a memory table was refused.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// no regions, or too many
    #[error("invalid number of memory regions: {0}")]
    Count(usize),
    /// the region to remove does not exist
    #[error("no such memory region: {0:x?}")]
    NoSuchRegion(RegionSpec),
    /// a region is empty or exceeds the address space
    #[error("memory region {0:x?} is empty or exceeds the address space")]
    Range(RegionSpec),
    /// two regions overlap
    #[error("memory regions overlap at {0:#x}")]
    Overlap(u64),
    /// the regions together exceed the limit, which depends on the size of this machine
    #[error("guest memory is too large: {have} bytes, the limit is {most}")]
    TooLarge {
        /// The sum of the regions.
        have: u64,
        /// The limit.
        most: u64,
    },
    /// the region's file is invalid or could not be mapped
    #[error("guest memory: {0}")]
    File(#[from] shared_file::Error),
}

/// One mapped region, shared by the tables that contain it.
#[derive(Debug)]
pub struct Region {
    spec: RegionSpec,
    file: SharedFile,
}

/// The limit for the memory of one table. Guests may be overcommitted, but not without limit,
/// because the process has one address space for all of them.
fn table_bytes_max() -> u64 {
    /// Enough for the overcommitment of a small host.
    const FLOOR: u64 = 64 << 30;
    // SAFETY: all zeroes is a valid value of this C struct.
    let mut info: libc::sysinfo = unsafe { std::mem::zeroed() };
    // SAFETY: the struct is a local variable.
    unsafe { libc::sysinfo(&raw mut info) };
    let total = info.totalram.saturating_mul(u64::from(info.mem_unit));
    total.saturating_mul(2).max(FLOOR)
}

/// An entry of the translation table: what the data path needs to know of a region.
#[derive(Clone, Copy, Debug)]
struct Entry {
    gpa: u64,
    size: u64,
    host: *mut u8,
}

impl Entry {
    #[inline]
    fn translate(&self, gpa: u64) -> Option<(*mut u8, u64)> {
        let offset = gpa.wrapping_sub(self.gpa);
        (offset < self.size).then(|| (self.host.wrapping_add(usize_of(offset)), self.size - offset))
    }
}

/// Translates addresses. Tries the near region first: the one in which the previous address was
/// found.
#[derive(Debug)]
pub struct Near<'m> {
    memory: &'m GuestMemory,
    entry: Entry,
}

/// The near region, kept between two uses of a [`Near`]. It belongs to one memory table.
#[derive(Clone, Copy, Debug)]
pub struct Nearest(Entry);

// SAFETY: an address, which only a `Near` of the memory table that it belongs to uses.
unsafe impl Send for Nearest {}

impl Default for Nearest {
    fn default() -> Self {
        // An empty region, which contains no address.
        Self(Entry { gpa: 0, size: 0, host: std::ptr::null_mut() })
    }
}

impl Near<'_> {
    /// As [`GuestMemory::translate`].
    #[inline]
    #[must_use]
    pub fn translate(&mut self, gpa: u64) -> Option<(*mut u8, u64)> {
        if let Some(found) = self.entry.translate(gpa) {
            return Some(found);
        }
        self.entry = self.memory.entry_of(gpa)?;
        self.entry.translate(gpa)
    }

    /// The region in which the last address was found.
    #[inline]
    #[must_use]
    pub fn nearest(&self) -> Nearest {
        Nearest(self.entry)
    }
}

/// A range of a memory file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileRange {
    /// Device and inode.
    file: (u64, u64),
    from: u64,
    to: u64,
}

impl FileRange {
    /// Returns whether the two ranges have a byte in common.
    #[must_use]
    pub fn overlaps(&self, other: &Self) -> bool {
        self.file == other.file && self.from < other.to && other.from < self.to
    }
}

/// A mapped memory table. Immutable: a change creates a new table, which shares the unchanged
/// regions.
#[derive(Debug)]
pub struct GuestMemory {
    /// Sorted by guest-physical address.
    entries: Box<[Entry]>,
    regions: Box<[Arc<Region>]>,
}

// SAFETY: the entries' pointers point into the regions, which `self` keeps mapped.
unsafe impl Send for GuestMemory {}
// SAFETY: as above.
unsafe impl Sync for GuestMemory {}

impl GuestMemory {
    /// Maps a table. A region that `before` has too (same file, same addresses) is shared with it.
    ///
    /// # Errors
    /// The table is malformed or too large, or a file is invalid. Then no region of it stays
    /// mapped.
    pub fn map(
        table: Vec<(RegionSpec, ForeignFd)>,
        before: Option<&Self>,
        unmapper: &Unmapper,
    ) -> Result<Self, Error> {
        if table.is_empty() || table.len() > REGIONS_MAX {
            return Err(Error::Count(table.len()));
        }
        check(table.iter().map(|(spec, _)| *spec))?;
        let mut regions = Vec::with_capacity(table.len());
        for (spec, fd) in table {
            let id = shared_file::identity(&fd)?;
            let same = |r: &&Arc<Region>| r.spec == spec && r.file.identity() == id;
            let region = match before.and_then(|table| table.regions.iter().find(same)) {
                Some(region) => Arc::clone(region),
                None => Region::map(spec, &fd, unmapper)?,
            };
            regions.push(region);
        }
        Ok(Self::of(regions))
    }

    /// Maps one more region, in addition to the memory `before`.
    ///
    /// # Errors
    /// As for [`GuestMemory::map`], or there are [`SLOTS_MAX`] regions already.
    pub fn with_region(
        before: Option<&Self>,
        spec: RegionSpec,
        fd: &ForeignFd,
        unmapper: &Unmapper,
    ) -> Result<Self, Error> {
        let before = before.map(|table| &*table.regions).unwrap_or_default();
        if before.len() >= SLOTS_MAX {
            return Err(Error::Count(before.len() + 1));
        }
        check(before.iter().map(|region| region.spec).chain([spec]))?;
        let mut regions = Vec::with_capacity(before.len() + 1);
        regions.extend_from_slice(before);
        regions.push(Region::map(spec, fd, unmapper)?);
        Ok(Self::of(regions))
    }

    /// The same memory without the region of `spec`, which is identified by its addresses and its
    /// size. The result may have no regions.
    ///
    /// # Errors
    /// There is no such region.
    pub fn without_region(&self, spec: RegionSpec) -> Result<Self, Error> {
        let is = |r: &&Arc<Region>| RegionSpec { offset: spec.offset, ..r.spec } == spec;
        let left: Vec<_> = self.regions.iter().filter(|r| !is(r)).cloned().collect();
        if left.len() == self.regions.len() {
            return Err(Error::NoSuchRegion(spec));
        }
        Ok(Self::of(left))
    }

    fn of(regions: Vec<Arc<Region>>) -> Self {
        let entry =
            |r: &Arc<Region>| Entry { gpa: r.spec.gpa, size: r.spec.size, host: r.file.host() };
        let mut entries: Box<[Entry]> = regions.iter().map(entry).collect();
        entries.sort_unstable_by_key(|entry| entry.gpa);
        Self { entries, regions: regions.into() }
    }

    /// The regions' first guest-physical addresses and lengths in bytes.
    pub fn ranges(&self) -> impl Iterator<Item = (u64, u64)> {
        self.entries.iter().map(|entry| (entry.gpa, entry.size))
    }

    /// Number of regions.
    #[must_use]
    pub fn regions(&self) -> usize {
        self.regions.len()
    }

    /// The host address of `gpa`, and the number of bytes from there to the end of its region.
    #[inline]
    #[must_use]
    pub fn translate(&self, gpa: u64) -> Option<(*mut u8, u64)> {
        self.entry_of(gpa)?.translate(gpa)
    }

    #[cold]
    fn entry_of(&self, gpa: u64) -> Option<Entry> {
        let after = self.entries.partition_point(|entry| entry.gpa <= gpa);
        let entry = self.entries.get(after.checked_sub(1)?)?;
        entry.translate(gpa).is_some().then_some(*entry)
    }

    /// A translator whose near region is `nearest`.
    ///
    /// # Safety
    /// `nearest` comes from a translator of this table, or is the default.
    #[inline]
    #[must_use]
    pub unsafe fn near(&self, nearest: Nearest) -> Near<'_> {
        Near { memory: self, entry: nearest.0 }
    }

    /// The host address of `len` bytes at `gpa`, if they are in one region.
    #[inline]
    #[must_use]
    pub fn range(&self, gpa: u64, len: usize) -> Option<*mut u8> {
        let (host, room) = self.translate(gpa)?;
        (len as u64 <= room).then_some(host)
    }

    /// `len` bytes at `gpa`, if they are in one region.
    #[must_use]
    pub fn slice(&self, gpa: u64, len: usize) -> Option<VolatileSlice<'_>> {
        let host = self.range(gpa, len)?;
        // SAFETY: `len` bytes at `host` are in a region that `self` keeps mapped.
        Some(unsafe { VolatileSlice::new(host, len) })
    }

    /// Translates an address in the front end's address space to a guest-physical address.
    #[must_use]
    pub fn gpa_of_user(&self, user: u64) -> Option<u64> {
        self.regions.iter().find_map(|region| {
            let offset = user.wrapping_sub(region.spec.user_addr);
            (offset < region.spec.size).then(|| region.spec.gpa + offset)
        })
    }

    /// Translates an address in this process to a guest-physical address.
    #[must_use]
    pub fn gpa_of_host(&self, host: *const u8) -> Option<u64> {
        self.entries.iter().find_map(|entry| {
            let offset = (host as u64).wrapping_sub(entry.host as u64);
            (offset < entry.size).then(|| entry.gpa + offset)
        })
    }

    /// The range of the memory file that contains `len` bytes at `gpa`, if they are in one region.
    #[must_use]
    pub fn file_range(&self, gpa: u64, len: usize) -> Option<FileRange> {
        let inside = |r: &&Arc<Region>| gpa.wrapping_sub(r.spec.gpa) < r.spec.size;
        let region = self.regions.iter().find(inside)?;
        let at = gpa - region.spec.gpa;
        let end = at.checked_add(len as u64).filter(|end| *end <= region.spec.size)?;
        let (file, offset) = (region.file.identity(), region.spec.offset);
        Some(FileRange { file, from: offset.checked_add(at)?, to: offset.checked_add(end)? })
    }

    /// Returns whether the two memories have a file in common.
    #[must_use]
    pub fn shares_file(&self, other: &Self) -> bool {
        let files = |memory: &Self| -> HashSet<_> {
            memory.regions.iter().map(|region| region.file.identity()).collect()
        };
        !files(self).is_disjoint(&files(other))
    }

    /// Returns whether an access has found a region's file truncated.
    #[must_use]
    #[inline]
    pub fn truncated(&self) -> bool {
        sigbus::ever_truncated() && self.any_truncated()
    }

    #[cold]
    fn any_truncated(&self) -> bool {
        self.regions.iter().any(|region| region.file.truncated())
    }

    /// Sum of the regions' sizes in bytes.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.regions.iter().map(|region| region.spec.size).sum()
    }
}

impl Region {
    fn map(spec: RegionSpec, fd: &ForeignFd, unmapper: &Unmapper) -> Result<Arc<Self>, Error> {
        let file = SharedFile::map(fd, spec.offset, spec.size, unmapper)?;
        Ok(Arc::new(Self { spec, file }))
    }
}

/// Checks that regions can be a guest's memory: none is empty, no two overlap, and together they
/// are not too large.
fn check(specs: impl Iterator<Item = RegionSpec>) -> Result<(), Error> {
    let (mut guest, mut user) = (vec![], vec![]);
    let mut have = 0_u64;
    for spec in specs {
        have = have.saturating_add(spec.size);
        let end = |start: u64| start.checked_add(spec.size).ok_or(Error::Range(spec));
        if spec.size == 0 {
            return Err(Error::Range(spec));
        }
        guest.push((spec.gpa, end(spec.gpa)?));
        user.push((spec.user_addr, end(spec.user_addr)?));
    }
    for mut ranges in [guest, user] {
        ranges.sort_unstable();
        if let Some(pair) = ranges.windows(2).find(|pair| pair[0].1 > pair[1].0) {
            return Err(Error::Overlap(pair[1].0));
        }
    }
    let most = table_bytes_max();
    if have > most { Err(Error::TooLarge { have, most }) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::fd::OwnedFd;

    use vm_memory::VolatileMemory;

    use crate::testing::memfd;

    fn map(
        table: Vec<(RegionSpec, OwnedFd)>,
        before: Option<&GuestMemory>,
        unmapper: &Unmapper,
    ) -> Result<GuestMemory, Error> {
        let table = table.into_iter().map(|(spec, fd)| (spec, ForeignFd::alone(fd)));
        GuestMemory::map(table.collect(), before, unmapper)
    }

    fn spec(gpa: u64, size: u64) -> RegionSpec {
        RegionSpec { gpa, size, user_addr: 0x7000_0000 + gpa, offset: 0 }
    }

    #[test]
    fn file_ranges_do_not_depend_on_addresses() {
        let unmapper = Unmapper::start().unwrap();
        let (file, other) = (memfd(0x3000), memfd(0x3000));
        let at = |fd: &OwnedFd, gpa, offset| {
            let spec = RegionSpec { offset, ..spec(gpa, 0x2000) };
            map(vec![(spec, fd.try_clone().unwrap())], None, &unmapper).unwrap()
        };
        let here = at(&file, 0x10_0000, 0x1000);
        let (there, elsewhere) = (at(&file, 0, 0), at(&other, 0x10_0000, 0x1000));
        let range = here.file_range(0x10_0010, 0x10).unwrap();
        assert_eq!(there.file_range(0x1010, 0x10), Some(range));
        for (gpa, len, overlaps) in
            [(0x1000, 0x10, false), (0x1000, 0x11, true), (0x101f, 1, true), (0x1020, 9, false)]
        {
            assert_eq!(there.file_range(gpa, len).unwrap().overlaps(&range), overlaps, "{gpa:#x}");
        }
        assert!(!elsewhere.file_range(0x10_0010, 0x10).unwrap().overlaps(&range));
        assert_eq!(here.file_range(0x10_1fff, 2), None, "beyond the region");
        assert_eq!(here.file_range(0, 1), None);
        assert!(here.shares_file(&there) && !here.shares_file(&elsewhere));
    }

    #[test]
    fn translation_stays_inside_regions() {
        let unmapper = Unmapper::start().unwrap();
        let table = vec![(spec(0, 0x1000), memfd(0x1000)), (spec(0x2000, 0x3000), memfd(0x3000))];
        let memory = map(table, None, &unmapper).unwrap();
        assert_eq!(memory.translate(0xfff).map(|t| t.1), Some(1));
        assert!(memory.translate(0x1000).is_none());
        assert_eq!(memory.translate(0x2000).map(|t| t.1), Some(0x3000));
        assert!(memory.translate(u64::MAX).is_none());
        assert!(memory.slice(0x800, 0x801).is_none());
        assert!(memory.slice(0x800, 0x800).is_some());
        assert_eq!(memory.gpa_of_user(0x7000_2001), Some(0x2001));
        assert!(memory.gpa_of_user(0x7000_1000).is_none());
    }

    #[test]
    fn invalid_tables_are_refused() {
        let unmapper = Unmapper::start().unwrap();
        let map = |table| map(table, None, &unmapper).map(|_| ()).unwrap_err();
        assert!(matches!(map(vec![]), Error::Count(0)));
        assert!(matches!(map(vec![(spec(0, 0), memfd(1))]), Error::Range(_)));
        assert!(matches!(
            map(vec![(RegionSpec { gpa: u64::MAX, ..spec(0, 2) }, memfd(4096))]),
            Error::Range(_)
        ));
        assert!(matches!(
            map(vec![(spec(0, 8192), memfd(4096))]),
            Error::File(shared_file::Error::Short { .. })
        ));
        let overlap = vec![(spec(0, 8192), memfd(8192)), (spec(4096, 8192), memfd(8192))];
        assert!(matches!(map(overlap), Error::Overlap(_)));
        assert!(matches!(map(vec![(spec(0, 1 << 50), memfd(1 << 50))]), Error::TooLarge { .. }));
        let (pipe, _other) = std::io::pipe().unwrap();
        assert!(matches!(
            map(vec![(spec(0, 4096), pipe.into())]),
            Error::File(shared_file::Error::Kind(_))
        ));
    }

    #[test]
    fn regions_are_added_and_removed_one_by_one() {
        let unmapper = Unmapper::start().unwrap();
        let file = memfd(0x1000);
        let fd = || ForeignFd::alone(file.try_clone().unwrap());
        let add = |before: Option<&GuestMemory>, gpa| {
            GuestMemory::with_region(before, spec(gpa, 0x1000), &fd(), &unmapper)
        };
        // Every other page, in an order different from that of the addresses.
        let gpa = |n: usize| 0x2000 * ((n * 100) % SLOTS_MAX) as u64;
        let mut memory = add(None, gpa(0)).unwrap();
        for n in 1..SLOTS_MAX {
            memory = add(Some(&memory), gpa(n)).unwrap();
        }
        assert_eq!(memory.regions(), SLOTS_MAX);
        let end = 0x2000 * SLOTS_MAX as u64;
        assert!(matches!(add(Some(&memory), end), Err(Error::Count(510))));
        for gpa in (0..end).step_by(0x2000) {
            let host = memory.translate(gpa).map(|t| t.0);
            assert_eq!(memory.translate(gpa + 0xfff), host.map(|h| (h.wrapping_add(0xfff), 1)));
            assert!(memory.translate(gpa + 0x1000).is_none());
            assert_eq!(memory.gpa_of_user(0x7000_0000 + gpa), Some(gpa));
        }
        let fewer = memory.without_region(RegionSpec { offset: 5, ..spec(0x2000, 0x1000) });
        let fewer = fewer.expect("the offset does not matter");
        assert!(fewer.translate(0x2000).is_none());
        assert_eq!(fewer.translate(0x4000), memory.translate(0x4000), "the others are shared");
        assert_eq!(fewer.size_bytes(), 0x1000 * (SLOTS_MAX as u64 - 1));
        let other = [
            spec(0x2000, 0x1000),
            spec(0x4000, 0x800),
            RegionSpec { user_addr: 0, ..spec(0x4000, 0x1000) },
        ];
        for other in other {
            assert!(matches!(fewer.without_region(other), Err(Error::NoSuchRegion(_))));
        }
        assert!(matches!(add(Some(&fewer), 0x4000 + 0x800), Err(Error::Overlap(_))));
        let mut memory = fewer;
        for gpa in (0..end).step_by(0x2000).filter(|gpa| *gpa != 0x2000) {
            memory = memory.without_region(spec(gpa, 0x1000)).unwrap();
        }
        assert!(memory.translate(0).is_none());
        assert_eq!(memory.regions(), 0);
    }

    #[test]
    fn unchanged_regions_are_shared() {
        let unmapper = Unmapper::start().unwrap();
        let (low, high) = (memfd(0x1000), memfd(0x1000));
        let dup = |fd: &OwnedFd| fd.try_clone().unwrap();
        let table = vec![(spec(0, 0x1000), dup(&low))];
        let before = map(table, None, &unmapper).unwrap();
        let table = vec![(spec(0, 0x1000), dup(&low)), (spec(0x1000, 0x1000), high)];
        let after = map(table, Some(&before), &unmapper).unwrap();
        assert_eq!(before.translate(0), after.translate(0));
        let other = vec![(spec(0, 0x1000), memfd(0x1000))];
        let other = map(other, Some(&before), &unmapper).unwrap();
        assert_ne!(before.translate(0), other.translate(0), "a different file");
    }

    #[test]
    fn truncated_memory_reads_as_zero_and_is_reported() {
        let unmapper = Unmapper::start().unwrap();
        let fd = memfd(0x2000);
        let file = File::from(fd.try_clone().unwrap());
        let memory = map(vec![(spec(0, 0x2000), fd)], None, &unmapper).unwrap();
        let slice = memory.slice(0x1800, 1).unwrap();
        let byte = slice.get_ref::<u8>(0).unwrap();
        byte.store(7);
        assert!(!memory.truncated());
        file.set_len(0x1000).unwrap();
        assert_eq!(byte.load(), 0);
        assert!(memory.truncated());
    }
}
