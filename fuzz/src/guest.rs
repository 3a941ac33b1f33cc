//! A guest's memory: three files, of which each memory table has two, and a copy to compare with.
//!
//! Made once per process, as mapping it costs more than most inputs, and zeroed for each input.
#![expect(unsafe_code, reason = "reads and writes mapped memory")]

use std::ops::Range;
use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::Arc;

use closer::ForeignFd;
use guest_memory::Unmapper;
use guest_memory::{GuestMemory, RegionSpec};

/// Bytes of each file. File 0 is at guest-physical address 0; file 1 or file 2, depending on the table, follows
/// without a gap.
pub const FILE_BYTES: usize = 0x8000;
/// Number of files.
pub const FILES: usize = 3;
/// Where memory ends.
pub const END: u64 = 2 * FILE_BYTES as u64;

/// A place in the files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Which file.
    pub file: usize,
    /// Where in it.
    pub at: usize,
}

/// The memory.
pub struct Guest {
    tables: [Arc<GuestMemory>; 2],
    hosts: [*mut u8; FILES],
    copy: Vec<u8>,
    /// Keeps the unmapping thread running.
    unmapper: Unmapper,
}

/// A memfd of `len` bytes that allows sealing.
///
/// # Panics
/// The system cannot make one.
#[must_use]
pub fn memfd(len: u64) -> OwnedFd {
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    // SAFETY: a plain system call with a constant name.
    let fd = unsafe { libc::memfd_create(c"guest".as_ptr(), flags) };
    assert!(fd >= 0, "{}", std::io::Error::last_os_error());
    // SAFETY: the fd was just made.
    let file = std::fs::File::from(unsafe { OwnedFd::from_raw_fd(fd) });
    file.set_len(len).expect("a memfd takes any length");
    file.into()
}

impl Default for Guest {
    fn default() -> Self {
        Self::new()
    }
}

impl Guest {
    /// # Panics
    /// The system has no memory.
    #[must_use]
    pub fn new() -> Self {
        let unmapper = Unmapper::start().expect("a thread");
        let spec = |gpa| RegionSpec { gpa, size: FILE_BYTES as u64, user_addr: gpa, offset: 0 };
        let add = |before: Option<&GuestMemory>, gpa| {
            let fd = ForeignFd::alone(memfd(FILE_BYTES as u64));
            GuestMemory::with_region(before, spec(gpa), &fd, &unmapper).expect("memory")
        };
        let first = add(None, 0);
        let second = FILE_BYTES as u64;
        let tables = [add(Some(&first), second), add(Some(&first), second)].map(Arc::new);
        let host = |table: usize, gpa| tables[table].range(gpa, FILE_BYTES).expect("its region");
        let hosts = [host(0, 0), host(0, second), host(1, second)];
        let copy = vec![0; FILES * FILE_BYTES];
        Self { tables, hosts, copy, unmapper }
    }

    /// One of the two memory tables.
    #[must_use]
    pub fn table(&self, table: usize) -> &Arc<GuestMemory> {
        &self.tables[table]
    }

    /// The thread that unmaps memory.
    #[must_use]
    pub fn unmapper(&self) -> &Unmapper {
        &self.unmapper
    }

    /// The place of `gpa` in a table's files, and the bytes from there to the end of its region.
    #[must_use]
    pub fn locate(table: usize, gpa: u64) -> Option<(Place, u64)> {
        let at = usize::try_from(gpa).ok().filter(|at| *at < 2 * FILE_BYTES)?;
        let file = if at < FILE_BYTES { 0 } else { 1 + table };
        let at = at % FILE_BYTES;
        Some((Place { file, at }, (FILE_BYTES - at) as u64))
    }

    /// The place of `len` bytes at a host address, if they lie in one file.
    #[must_use]
    pub fn place_of_host(&self, host: *const u8, len: usize) -> Option<Place> {
        (0..FILES).find_map(|file| {
            let at = (host as usize).wrapping_sub(self.hosts[file] as usize);
            (at < FILE_BYTES && len <= FILE_BYTES - at).then_some(Place { file, at })
        })
    }

    /// Zeroes all memory.
    pub fn clear(&mut self) {
        for host in self.hosts {
            // SAFETY: `FILE_BYTES` are mapped there for as long as `self` lives, and nobody else
            // uses them now.
            unsafe { std::ptr::write_bytes(host, 0, FILE_BYTES) };
        }
    }

    /// Writes the part that lies within memory.
    pub fn put(&mut self, table: usize, mut gpa: u64, mut bytes: &[u8]) {
        while let Some((Place { file, at }, room)) = Self::locate(table, gpa)
            && !bytes.is_empty()
        {
            let (now, rest) = bytes.split_at(bytes.len().min(room as usize));
            // SAFETY: as in `clear`; what is written ends where the file does, or before.
            unsafe { now.as_ptr().copy_to(self.hosts[file].wrapping_add(at), now.len()) };
            (gpa, bytes) = (gpa + now.len() as u64, rest);
        }
    }

    /// Reads two bytes that lie in file 0.
    #[must_use]
    pub fn u16_now(&self, at: usize) -> u16 {
        assert!(at + 2 <= FILE_BYTES);
        let mut bytes = [0; 2];
        // SAFETY: as in `clear`, and just checked.
        unsafe { self.hosts[0].wrapping_add(at).copy_to(bytes.as_mut_ptr(), 2) };
        u16::from_le_bytes(bytes)
    }

    /// Updates the copy to the current contents.
    pub fn remember(&mut self) {
        for (file, host) in self.hosts.into_iter().enumerate() {
            let to = self.copy[file * FILE_BYTES..][..FILE_BYTES].as_mut_ptr();
            // SAFETY: as in `clear`, and the copy is as long.
            unsafe { host.copy_to_nonoverlapping(to, FILE_BYTES) };
        }
    }

    /// Bytes of the copy; zeroes if they do not lie in one file.
    #[must_use]
    pub fn remembered<const N: usize>(&self, table: usize, gpa: u64) -> [u8; N] {
        match Self::locate(table, gpa) {
            Some((place, room)) if N as u64 <= room => *self.copy
                [place.file * FILE_BYTES + place.at..]
                .first_chunk()
                .expect("just checked"),
            _ => [0; N],
        }
    }

    /// A byte of the copy.
    #[must_use]
    pub fn remembered_at(&self, Place { file, at }: Place) -> u8 {
        self.copy[file * FILE_BYTES + at]
    }

    /// Calls `visit` with each place that differs from the copy, and its current value.
    pub fn changed(&self, mut visit: impl FnMut(Place, u8)) {
        // Large blocks first, as most memory is unchanged.
        const STEPS: [usize; 2] = [4096, 64];
        for (file, host) in self.hosts.into_iter().enumerate() {
            // SAFETY: as in `clear`; all other writes happen between calls on this thread.
            let now = unsafe { std::slice::from_raw_parts(host.cast_const(), FILE_BYTES) };
            let then = &self.copy[file * FILE_BYTES..][..FILE_BYTES];
            let differs =
                |start: &usize, len: usize| now[*start..start + len] != then[*start..start + len];
            let pages = (0..FILE_BYTES).step_by(STEPS[0]).filter(|page| differs(page, STEPS[0]));
            let lines = pages.flat_map(|page| (page..page + STEPS[0]).step_by(STEPS[1]));
            for line in lines.filter(|line| differs(line, STEPS[1])) {
                for at in (line..line + STEPS[1]).filter(|at| now[*at] != then[*at]) {
                    visit(Place { file, at }, now[at]);
                }
            }
        }
    }

    /// The byte at a place.
    #[must_use]
    pub fn byte_now(&self, Place { file, at }: Place) -> u8 {
        assert!(at < FILE_BYTES);
        // SAFETY: as in `clear`, and just checked.
        unsafe { self.hosts[file].wrapping_add(at).read() }
    }
}

/// Whether `place` is in a range of a file.
#[must_use]
pub fn within(place: Place, file: usize, range: &Range<usize>) -> bool {
    place.file == file && range.contains(&place.at)
}
