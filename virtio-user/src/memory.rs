//! The memory that a connection shares with its server: rings, request headers, bounce buffers.
//!
//! The server may change it at any time. So every value is read once, and nothing that the server
//! may have changed is trusted: this side keeps its own copy of what it has put there.
#![expect(unsafe_code, reason = "memory that another process changes is accessed by pointer")]

use std::ffi::c_void;
use std::io;
use std::os::fd::OwnedFd;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU16, Ordering};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, munmap};

/// The bytes of a bounce buffer: the most that one request transfers.
pub(crate) const CHUNK: usize = 64 << 10;

/// The descriptors of a request: header, data, status.
pub(crate) const DESCRIPTORS: u16 = 3;

const PAGE: usize = 4096;

/// Where the parts of each queue are, in bytes from the start of the queue's part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    /// Entries of the ring: a power of two.
    pub(crate) ring_size: u16,
    /// The most requests in flight.
    pub(crate) slots: u16,
    pub(crate) available: usize,
    pub(crate) used: usize,
    headers: usize,
    buffers: usize,
    /// The bytes of one queue's part.
    len: usize,
}

impl Layout {
    /// `ring_size` is a power of two from 4 to 32768.
    pub(crate) fn new(ring_size: u16) -> Self {
        /// More requests would not make a server faster, but take more memory.
        const SLOTS_MAX: u16 = 128;
        let entries = usize::from(ring_size);
        let slots = (ring_size / DESCRIPTORS).clamp(1, SLOTS_MAX);
        let available = entries * 16;
        let used = (available + 6 + 2 * entries).next_multiple_of(PAGE);
        let headers = (used + 6 + 8 * entries).next_multiple_of(PAGE);
        let buffers = (headers + usize::from(slots) * HEADER_ROOM).next_multiple_of(PAGE);
        let len = buffers + usize::from(slots) * CHUNK;
        Self { ring_size, slots, available, used, headers, buffers, len }
    }
}

/// The bytes for a request's header and its status. A cache line, so that no two requests share
/// one.
const HEADER_ROOM: usize = 64;

/// The offset of the status in these bytes.
const STATUS: usize = 32;

/// The memory that is shared with a server, for all queues of a connection.
#[derive(Debug)]
pub(crate) struct Memory {
    base: NonNull<u8>,
    len: usize,
    layout: Layout,
    pub(crate) file: OwnedFd,
}

// SAFETY: the mapping belongs to the value; its parts are accessed through `Part`s, of which one
// owner has each.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    pub(crate) fn new(queues: u16, layout: Layout) -> io::Result<Self> {
        let len = layout.len * usize::from(queues);
        let file = memfd_create("vhost-bounce", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        ftruncate(&file, len as u64)?;
        // If a server truncated the file, SIGBUS would end this process.
        fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let base = unsafe { mmap(ptr::null_mut(), len, access, MapFlags::SHARED, &file, 0) }?;
        let base = NonNull::new(base.cast::<u8>()).ok_or(io::ErrorKind::OutOfMemory)?;
        let memory = Self { base, len, layout, file };
        // Populated here, so that no reactor takes a page fault. Kernels before 5.14 refuse this.
        for (at, len) in memory.stretches() {
            // SAFETY: the range is in the mapping.
            let _ = unsafe { madvise(at, len, Advice::LinuxPopulateWrite) };
        }
        Ok(memory)
    }

    /// The mapping in pieces: other threads' mappings wait for the work on one piece.
    fn stretches(&self) -> impl Iterator<Item = (*mut c_void, usize)> {
        const PIECE: usize = 2 << 20;
        let (base, len) = (self.base.as_ptr(), self.len);
        (0..len).step_by(PIECE).map(move |at| (base.wrapping_add(at).cast(), PIECE.min(len - at)))
    }

    /// The address in this process.
    pub(crate) fn address(&self) -> u64 {
        self.base.as_ptr().addr() as u64
    }

    pub(crate) fn len(&self) -> u64 {
        self.len as u64
    }

    /// The part of a queue. The memory must outlive it.
    pub(crate) fn part(&self, queue: u16) -> Part {
        let offset = self.layout.len * usize::from(queue);
        assert!(offset < self.len, "the memory has a part for each queue");
        let base = self.base.as_ptr().wrapping_add(offset);
        Part { base, offset: offset as u64, layout: self.layout }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        for (at, len) in self.stretches() {
            // SAFETY: the mapping is this value's, and its parts are not used any more.
            let _ = unsafe { munmap(at, len) };
        }
    }
}

/// One queue's part of a [`Memory`].
#[derive(Debug)]
pub(crate) struct Part {
    base: *mut u8,
    /// From the start of the memory, which is address 0 for the server.
    offset: u64,
    layout: Layout,
}

// SAFETY: the pointer is to shared memory that stays mapped; the part has one owner.
unsafe impl Send for Part {}

impl Part {
    pub(crate) fn layout(&self) -> Layout {
        self.layout
    }

    fn at(&self, offset: usize, len: usize) -> *mut u8 {
        assert!(offset + len <= self.layout.len, "within the queue's part");
        self.base.wrapping_add(offset)
    }

    fn write(&self, offset: usize, bytes: &[u8]) {
        let to = self.at(offset, bytes.len());
        // SAFETY: `at` has checked the range, and a slice of this process does not overlap it.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) }
    }

    fn word(&self, offset: usize) -> &AtomicU16 {
        let at = self.at(offset, 2).cast();
        // SAFETY: in the mapping and aligned, as all parts are; accessed atomically on this side.
        unsafe { AtomicU16::from_ptr(at) }
    }

    /// Asks the server to signal used requests, or not to.
    pub(crate) fn set_signals(&self, wanted: bool) {
        const NO_INTERRUPT: u16 = 1;
        let flags = if wanted { 0 } else { NO_INTERRUPT };
        self.word(self.layout.available).store(flags.to_le(), Ordering::Release);
    }

    /// Returns whether the server needs no kick for new requests. [`publish`](Self::publish), which
    /// is called before, orders this read after the store of its index.
    pub(crate) fn needs_no_kick(&self) -> bool {
        const NO_NOTIFY: u16 = 1;
        u16::from_le(self.word(self.layout.used).load(Ordering::Acquire)) & NO_NOTIFY != 0
    }

    /// The server's index of used requests. Acquire: their status and data are seen.
    pub(crate) fn used_index(&self) -> u16 {
        u16::from_le(self.word(self.layout.used + 2).load(Ordering::Acquire))
    }

    /// The first descriptor of a used request, as the server says.
    pub(crate) fn used_id(&self, index: u16) -> u32 {
        let entry = usize::from(index % self.layout.ring_size);
        let at = self.at(self.layout.used + 4 + 8 * entry, 4).cast::<u32>();
        // SAFETY: in the mapping and aligned; read once, as the server may change it.
        u32::from_le(unsafe { at.read_volatile() })
    }

    /// Makes requests up to `index` available. Release: the server sees the requests.
    pub(crate) fn publish(&self, index: u16) {
        self.word(self.layout.available + 2).store(index.to_le(), Ordering::Release);
        // Orders the store before the read of the server's flags. When the server clears its flag
        // and then looks for requests, either it sees this request, or this side sees that it needs
        // a kick.
        std::sync::atomic::fence(Ordering::SeqCst);
    }

    /// Puts the request of a slot into the ring's entry `index`.
    pub(crate) fn put(&self, slot: u16, index: u16, header: &[u8; 16], data: Option<Data>) {
        const NEXT: u16 = 1;
        const WRITE: u16 = 2;
        let first = slot * DESCRIPTORS;
        let header_at = self.layout.headers + usize::from(slot) * HEADER_ROOM;
        self.write(header_at, header);
        // Not a status of virtio-blk: if the server writes none, the request has failed.
        self.write(header_at + STATUS, &[0xff]);
        let status = first + if data.is_some() { 2 } else { 1 };
        self.describe(first, header_at, 16, NEXT, first + 1);
        if let Some(Data { len, from_device }) = data {
            let flags = if from_device { NEXT | WRITE } else { NEXT };
            self.describe(first + 1, self.buffer_at(slot), len, flags, first + 2);
        }
        self.describe(status, header_at + STATUS, 1, WRITE, 0);
        let entry = usize::from(index % self.layout.ring_size);
        self.write(self.layout.available + 4 + 2 * entry, &first.to_le_bytes());
    }

    fn describe(&self, descriptor: u16, offset: usize, len: u32, flags: u16, next: u16) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&(self.offset + offset as u64).to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        self.write(16 * usize::from(descriptor), &bytes);
    }

    /// The status that the server gave to the request of a slot.
    pub(crate) fn status(&self, slot: u16) -> u8 {
        let at = self.at(self.status_at(slot), 1);
        // SAFETY: in the mapping; read once, as the server may change it.
        unsafe { at.read_volatile() }
    }

    /// The offset of a slot's status in the queue's part.
    pub(crate) fn status_at(&self, slot: u16) -> usize {
        self.layout.headers + usize::from(slot) * HEADER_ROOM + STATUS
    }

    fn buffer_at(&self, slot: u16) -> usize {
        self.layout.buffers + usize::from(slot) * CHUNK
    }

    /// The bounce buffer of a slot, of [`CHUNK`] bytes.
    pub(crate) fn buffer(&self, slot: u16) -> *mut u8 {
        self.at(self.buffer_at(slot), CHUNK)
    }

    /// Copies bytes into the bounce buffer of a slot.
    pub(crate) fn fill(&self, slot: u16, bytes: &[u8]) {
        self.write(self.buffer_at(slot), bytes);
    }

    /// The addresses of descriptors, available and used ring in this process, as vhost-user has
    /// them.
    pub(crate) fn addresses(&self) -> [u64; 3] {
        let address = |offset: usize| self.base.wrapping_add(offset).addr() as u64;
        [address(0), address(self.layout.available), address(self.layout.used)]
    }
}

/// The data of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Data {
    pub(crate) len: u32,
    /// The server writes it.
    pub(crate) from_device: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_do_not_overlap() {
        for ring_size in [4, 8, 256, 512, 32768] {
            let layout = Layout::new(ring_size);
            assert!(layout.slots * DESCRIPTORS <= ring_size || ring_size == 4, "{layout:?}");
            assert!(layout.available >= 16 * usize::from(ring_size));
            assert!(layout.used >= layout.available + 6 + 2 * usize::from(ring_size));
            assert!(layout.headers >= layout.used + 6 + 8 * usize::from(ring_size));
            assert!(layout.buffers >= layout.headers + usize::from(layout.slots) * HEADER_ROOM);
            assert!(layout.len.is_multiple_of(PAGE));
        }
    }
}
