//! The driver's side of one split virtqueue (section 2.7 of the virtio specification).
//!
//! Each slot has its own three descriptors. So this side needs nothing from the used ring but the
//! server's index and the ids of used requests, and it checks these.
#![expect(unsafe_code, reason = "the eventfd that the server shares has one user")]

use std::os::fd::OwnedFd;
use std::sync::Arc;

use bdev::Op;
use reactor::SharedEventFd;

use crate::memory::{DESCRIPTORS, Data, Memory, Part};
use crate::request::Piece;

/// A ring that a server serves.
#[derive(Debug)]
pub(crate) struct Ring {
    part: Part,
    /// Keeps the part mapped.
    _memory: Arc<Memory>,
    /// Signals new requests to the server.
    kick: SharedEventFd<OwnedFd>,
    /// The index of the next available entry, and the one that the server knows.
    available: u16,
    published: u16,
    /// The index of the next used entry.
    used: u16,
    broken: bool,
    /// The server needs a kick for requests that are published.
    kick_due: bool,
}

impl Ring {
    /// Makes the ring of a queue. The server knows the queue's part of the memory, and `kick`.
    pub(crate) fn new(memory: &Arc<Memory>, queue: u16, kick: OwnedFd) -> Self {
        Self {
            part: memory.part(queue),
            _memory: Arc::clone(memory),
            kick: SharedEventFd::new(kick),
            kick_due: false,
            available: 0,
            published: 0,
            used: 0,
            broken: false,
        }
    }

    pub(crate) fn set_signals(&self, wanted: bool) {
        self.part.set_signals(wanted);
    }

    /// Adds the request of a slot that is not in flight. `range` is the data of a discard or
    /// write-zeroes.
    pub(crate) fn put(
        &mut self,
        slot: u16,
        header: &[u8; 16],
        range: Option<&[u8; 16]>,
        piece: Piece,
        op: Op,
    ) {
        let data = match range {
            Some(range) => {
                self.part.fill(slot, range);
                Some(Data { len: 16, from_device: false })
            }
            None if op == Op::Flush => None,
            None => {
                let len = u32::try_from(piece.bytes()).unwrap_or(0);
                Some(Data { len, from_device: op == Op::Read })
            }
        };
        self.part.put(slot, self.available, header, data);
        self.available = self.available.wrapping_add(1);
    }

    /// Makes all requests that were added available to the server, and kicks it if it needs that.
    pub(crate) fn publish(&mut self) {
        if self.published != self.available {
            self.published = self.available;
            self.part.publish(self.available);
            self.kick_due |= !self.part.needs_no_kick();
        }
        if self.kick_due {
            // SAFETY: this ring is the only user, and it is borrowed mutably.
            self.kick_due = !unsafe { self.kick.signal() };
        }
    }

    /// Returns whether used requests wait, or a kick has failed.
    pub(crate) fn has_work(&self) -> bool {
        !self.broken && (self.kick_due || self.part.used_index() != self.used)
    }

    /// Takes a used request, and returns its slot. `None` if there is none, or if the ring is
    /// broken.
    #[inline]
    pub(crate) fn take_used(&mut self) -> Option<u16> {
        let waiting = self.part.used_index().wrapping_sub(self.used);
        if waiting == 0 || self.broken {
            return None;
        }
        let slots = self.part.layout().slots;
        let id = self.part.used_id(self.used);
        self.used = self.used.wrapping_add(1);
        let slot = u16::try_from(id / u32::from(DESCRIPTORS)).unwrap_or(u16::MAX);
        let valid = waiting <= slots && id.is_multiple_of(DESCRIPTORS.into()) && slot < slots;
        self.broken = !valid;
        valid.then_some(slot)
    }

    /// Records that the server has written an invalid index or id into the used ring.
    #[cold]
    pub(crate) fn set_broken(&mut self) {
        self.broken = true;
    }

    pub(crate) fn is_broken(&self) -> bool {
        self.broken
    }

    pub(crate) fn status(&self, slot: u16) -> u8 {
        self.part.status(slot)
    }

    /// The bounce buffer of a slot.
    pub(crate) fn buffer(&self, slot: u16) -> *mut u8 {
        self.part.buffer(slot)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Layout;
    use rustix::event::{EventfdFlags, eventfd};

    /// A ring, and the address of its used ring, into which a test writes as the server.
    fn ring() -> (Ring, Arc<Memory>, usize) {
        let layout = Layout::new(16);
        assert_eq!(layout.slots, 5);
        let memory = Arc::new(Memory::new(1, layout).unwrap());
        let used = usize::try_from(memory.part(0).addresses()[2] - memory.address()).unwrap();
        let kick = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
        (Ring::new(&memory, 0, kick), memory, used)
    }

    /// Writes through the file, as a server does.
    fn write(memory: &Memory, at: usize, bytes: &[u8]) {
        rustix::io::pwrite(&memory.file, bytes, at as u64).unwrap();
    }

    fn use_request(memory: &Memory, used: usize, entry: usize, id: u32, index: u16) {
        write(memory, used + 4 + 8 * entry, &id.to_le_bytes());
        write(memory, used + 2, &index.to_le_bytes());
    }

    #[test]
    fn used_requests_come_out_with_their_slots() {
        let (mut ring, memory, used) = ring();
        assert_eq!(ring.take_used(), None);
        use_request(&memory, used, 0, 12, 1);
        assert_eq!(ring.take_used(), Some(4));
        assert_eq!(ring.take_used(), None);
        use_request(&memory, used, 1, 0, 2);
        assert_eq!(ring.take_used(), Some(0));
        assert!(!ring.is_broken());
    }

    #[test]
    fn a_server_that_breaks_the_rules_is_found() {
        for (id, index) in [(1, 1), (15, 1), (u32::MAX, 1), (0, 6), (0, u16::MAX)] {
            let (mut ring, memory, used) = ring();
            use_request(&memory, used, 0, id, index);
            assert_eq!(ring.take_used(), None, "{id} {index}");
            assert!(ring.is_broken(), "{id} {index}");
            use_request(&memory, used, 1, 0, 2);
            assert_eq!(ring.take_used(), None, "it stays broken");
        }
    }
}
