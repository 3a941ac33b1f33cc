//! The device's side of a packed ring: does what a queue's owner does with [`PackedRing`].
#![expect(unsafe_code, reason = "the device keeps its ring's memory")]

use std::sync::Arc;

use guest_memory::{GuestMemory, Nearest};
use virtqueue::{Buffer, PackedRing, Ring, RingAddrs};

/// A chain that the device has taken.
#[derive(Debug, PartialEq)]
pub(crate) struct Held {
    pub(crate) id: u16,
    pub(crate) span: u16,
    pub(crate) buffers: Vec<Buffer>,
}

/// A device that holds chains back.
pub(crate) struct Device {
    ring: PackedRing,
    memory: Arc<GuestMemory>,
    avail: u16,
    used: u16,
    published: u16,
    /// Whether the device has asked for a kick.
    pub(crate) armed: bool,
}

impl Device {
    pub(crate) fn new(
        memory: &Arc<GuestMemory>,
        addrs: RingAddrs,
        size: u16,
        event_idx: bool,
        base: u16,
    ) -> Self {
        // SAFETY: `Self` keeps the memory with the ring.
        let ring =
            unsafe { PackedRing::new(memory, size, addrs, event_idx) }.expect("valid addresses");
        ring.suppress_kicks(base);
        let memory = Arc::clone(memory);
        Self { ring, memory, avail: base, used: base, published: base, armed: false }
    }

    /// Returns whether there is a chain to take.
    pub(crate) fn pending(&self) -> bool {
        let pending = self.ring.pending(self.avail).expect("a packed ring has no index to check");
        let hint = self.ring.hint(self.avail);
        // With two threads, the driver may add a chain between the two calls.
        assert!(pending == 0 || hint.due);
        pending > 0
    }

    /// Takes the next chain, if there is one.
    pub(crate) fn take(&mut self) -> Option<Held> {
        if !self.pending() {
            return None;
        }
        if std::mem::take(&mut self.armed) {
            self.ring.suppress_kicks(self.avail);
        }
        let mut buffers = vec![];
        // SAFETY: the default is valid for every memory.
        let mut near = unsafe { self.memory.near(Nearest::default()) };
        let room = self.ring.room(self.published, self.avail);
        let taken = self.ring.walk(&mut near, self.avail, room, |_, buffer| {
            buffers.push(buffer);
            true
        });
        let taken = taken.expect("a valid chain");
        assert_eq!(taken.defect, None);
        self.avail = self.ring.advance(self.avail, taken.span);
        Some(Held { id: taken.id, span: taken.span, buffers })
    }

    /// Puts a chain into the ring. The driver does not see it yet.
    pub(crate) fn put(&mut self, held: &Held, len: u32) {
        self.ring.put_used(self.published, self.used, held.id, len);
        self.used = self.ring.advance(self.used, held.span);
    }

    /// Publishes all chains that were put. Returns whether the driver wants a call, or `None` if no
    /// chain was put.
    pub(crate) fn publish(&mut self) -> Option<bool> {
        let (from, to) = (self.published, self.used);
        if from == to {
            return None;
        }
        self.ring.publish_used(from, to);
        self.published = to;
        Some(self.ring.wants_call(from, to))
    }

    /// Asks for a kick. Returns false if a chain came before that; then no kick is requested.
    pub(crate) fn arm(&mut self) -> bool {
        if self.ring.want_kicks(self.avail) {
            self.ring.suppress_kicks(self.avail);
            return false;
        }
        self.armed = true;
        true
    }
}
