//! The driver's side of a packed ring: does what Linux's `virtio_ring` does. Buffer ids come from a
//! stack, chains are published in order and complete in any order, and the driver asks for one
//! notification at a time.
//!
//! Descriptors are counted from the first one ever, without wrapping, so that this code has no
//! arithmetic with wrap counters, unlike the device.
#![expect(clippy::cast_possible_truncation, reason = "sizes and positions of small rings")]

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering, fence};

use guest_memory::GuestMemory;
use virtqueue::{Buffer, RingAddrs};
use vm_memory::{AtomicInteger, VolatileMemory};

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;

const EVENTS_ENABLE: u16 = 0;
const EVENTS_DISABLE: u16 = 1;
const EVENTS_DESC: u16 = 2;

/// The position of descriptor number `n`, as the device computes it.
pub(crate) fn position(n: u64, size: u16) -> u16 {
    let wrap = (n / u64::from(size)).is_multiple_of(2);
    (n % u64::from(size)) as u16 | u16::from(wrap) << 15
}

/// A driver of a packed ring.
#[derive(Debug)]
pub(crate) struct Driver {
    memory: Arc<GuestMemory>,
    addrs: RingAddrs,
    size: u16,
    event_idx: bool,
    /// Numbers of descriptors: made available so far, returned as used so far, and made available
    /// at the last decision about a kick.
    added: u64,
    used: u64,
    kick_decided: u64,
    /// Free buffer ids.
    ids: Vec<u16>,
    /// Number of descriptors of each buffer id's chain.
    spans: Vec<u16>,
    /// Whether the driver wants calls.
    pub(crate) calls: bool,
}

impl Driver {
    /// A driver with an empty ring, in which `begin` descriptors have been used before. It wants no
    /// calls.
    pub(crate) fn new(
        memory: &Arc<GuestMemory>,
        addrs: RingAddrs,
        size: u16,
        event_idx: bool,
        begin: u64,
    ) -> Self {
        let mut driver = Self {
            memory: Arc::clone(memory),
            addrs,
            size,
            event_idx,
            added: begin,
            used: begin,
            kick_decided: begin,
            ids: (0..size).rev().collect(),
            spans: vec![0; size.into()],
            calls: false,
        };
        for n in begin.saturating_sub(size.into())..begin {
            let used = if position(n, size) >> 15 == 1 { AVAIL | USED } else { 0_u16 };
            driver.store::<AtomicU16>(driver.desc(n) + 14, used.to_le(), Ordering::Relaxed);
        }
        driver.refuse_calls();
        driver
    }

    fn store<T: AtomicInteger>(&self, gpa: u64, value: T::V, order: Ordering) {
        let slice = self.memory.slice(gpa, size_of::<T>()).expect("in memory");
        slice.get_atomic_ref::<T>(0).expect("aligned").store(value, order);
    }

    fn load<T: AtomicInteger>(&self, gpa: u64, order: Ordering) -> T::V {
        let slice = self.memory.slice(gpa, size_of::<T>()).expect("in memory");
        slice.get_atomic_ref::<T>(0).expect("aligned").load(order)
    }

    /// The address of descriptor number `n`.
    fn desc(&self, n: u64) -> u64 {
        self.addrs.desc + 16 * (n % u64::from(self.size))
    }

    /// Writes all of a descriptor but its flags.
    fn write(&self, at: u64, buffer: &Buffer, id: u16) {
        self.store::<AtomicU64>(at, buffer.gpa.to_le(), Ordering::Relaxed);
        self.store::<AtomicU32>(at + 8, buffer.len.to_le(), Ordering::Relaxed);
        self.store::<AtomicU16>(at + 12, id.to_le(), Ordering::Relaxed);
    }

    /// Number of free descriptors.
    pub(crate) fn room(&self) -> usize {
        usize::from(self.size) - (self.added - self.used) as usize
    }

    /// Makes a chain available, in the ring or in an indirect table at `table`. Returns its buffer
    /// id.
    pub(crate) fn add(&mut self, buffers: &[Buffer], table: Option<u64>) -> u16 {
        let id = self.ids.pop().expect("as many ids as descriptors");
        let write = |buffer: &Buffer| if buffer.write { WRITE } else { 0 };
        let mut chain = buffers.to_vec();
        let mut indirect = 0;
        if let Some(table) = table {
            for (at, buffer) in (table..).step_by(16).zip(buffers) {
                self.write(at, buffer, 0);
                self.store::<AtomicU16>(at + 14, write(buffer).to_le(), Ordering::Relaxed);
            }
            let len = 16 * buffers.len() as u32;
            chain = vec![Buffer { gpa: table, len, write: false }];
            indirect = INDIRECT;
        }
        assert!(chain.len() <= self.room());
        let head = self.added;
        let mut head_flags = 0;
        for (n, buffer) in chain.iter().enumerate() {
            let state = if position(self.added, self.size) >> 15 == 1 { AVAIL } else { USED };
            let next = if n + 1 < chain.len() { NEXT } else { 0 };
            let flags = write(buffer) | state | next | indirect;
            // Only the id in the last descriptor is valid.
            self.write(self.desc(self.added), buffer, if next == 0 { id } else { !id });
            if n == 0 {
                head_flags = flags;
            } else {
                let at = self.desc(self.added) + 14;
                self.store::<AtomicU16>(at, flags.to_le(), Ordering::Relaxed);
            }
            self.added += 1;
        }
        self.spans[usize::from(id)] = chain.len() as u16;
        // Release: the device sees everything else before these flags.
        self.store::<AtomicU16>(self.desc(head) + 14, head_flags.to_le(), Ordering::Release);
        id
    }

    /// Returns whether the device wants a kick for the chains that were added since the last call.
    pub(crate) fn wants_kick(&mut self) -> bool {
        fence(Ordering::SeqCst);
        let events = u32::from_le(self.load::<AtomicU32>(self.addrs.used, Ordering::Relaxed));
        let (event, flags) = (events as u16, (events >> 16) as u16);
        let kick_decided = std::mem::replace(&mut self.kick_decided, self.added);
        match flags {
            EVENTS_DESC => {
                assert!(self.event_idx, "not negotiated");
                (kick_decided..self.added).any(|n| position(n, self.size) == event)
            }
            EVENTS_ENABLE => true,
            _ => {
                assert_eq!(flags, EVENTS_DISABLE);
                false
            }
        }
    }

    /// The position of the next used descriptor.
    pub(crate) fn used_position(&self) -> u16 {
        position(self.used, self.size)
    }

    /// Returns whether a chain is used.
    pub(crate) fn has_used(&self) -> bool {
        // Acquire: the rest of the descriptor and the data are read after it.
        let flags = self.load::<AtomicU16>(self.desc(self.used) + 14, Ordering::Acquire);
        let flags = u16::from_le(flags);
        let wrap = self.used_position() >> 15 == 1;
        (flags & AVAIL != 0) == wrap && (flags & USED != 0) == wrap
    }

    /// Takes a used chain. Returns its buffer id and its written length.
    pub(crate) fn take(&mut self) -> Option<(u16, u32)> {
        if !self.has_used() {
            return None;
        }
        let at = self.desc(self.used);
        let len = u32::from_le(self.load::<AtomicU32>(at + 8, Ordering::Relaxed));
        let id = u16::from_le(self.load::<AtomicU16>(at + 12, Ordering::Relaxed));
        let flags = u16::from_le(self.load::<AtomicU16>(at + 14, Ordering::Relaxed));
        assert_eq!(flags & WRITE != 0, len > 0, "WRITE is set if the length is valid");
        let span = self.spans.get_mut(usize::from(id)).map(std::mem::take).unwrap_or_default();
        assert!(span > 0, "the device does not have buffer {id}");
        self.used += u64::from(span);
        self.ids.push(id);
        if self.calls && self.event_idx {
            self.store::<AtomicU16>(
                self.addrs.avail,
                self.used_position().to_le(),
                Ordering::SeqCst,
            );
        }
        Some((id, len))
    }

    /// Asks for a call for the next used chain. Returns whether one is used already.
    pub(crate) fn ask_for_call(&mut self) -> bool {
        let flags = if self.event_idx { EVENTS_DESC } else { EVENTS_ENABLE };
        let position = self.used_position();
        self.store::<AtomicU16>(self.addrs.avail, position.to_le(), Ordering::Relaxed);
        self.store::<AtomicU16>(self.addrs.avail + 2, flags.to_le(), Ordering::Release);
        self.calls = true;
        fence(Ordering::SeqCst);
        self.has_used()
    }

    /// Asks for no calls.
    pub(crate) fn refuse_calls(&mut self) {
        self.calls = false;
        let flags = EVENTS_DISABLE.to_le();
        self.store::<AtomicU16>(self.addrs.avail + 2, flags, Ordering::Relaxed);
    }
}
