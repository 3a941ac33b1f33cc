//! A packed ring's life: chains of three descriptors in a ring that has no multiple of three, and what
//! rte_vhost keeps of them.

use std::fs::File;
use std::sync::Arc;

use front_end::ring::Ring;
use front_end::{GuestRam, STATUS_OK, Segment};

use super::area::Part;
use super::life::{End, Life, SIZE};

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;
/// Descriptors of a chain: header, data, status.
const CHAIN: u16 = 3;

#[derive(Debug)]
pub(crate) struct Packed {
    ring: Arc<Ring>,
    /// Headers and statuses, by buffer id.
    heads: Segment,
    /// Chains made available, and seen as used, ever.
    added: u64,
    seen: u64,
    ids: Vec<u16>,
    part: Part,
    /// Chains that SPDK has taken and completed, ever.
    taken: u64,
    used: u64,
    counter: u64,
    /// Buffer ids, and what the area calls their chains.
    held: Vec<(u16, u16)>,
}

/// The position of the `n`th chain ever.
fn position(n: u64) -> u16 {
    let place = n * u64::from(CHAIN);
    let wrap = (place / u64::from(SIZE)).is_multiple_of(2);
    u16::try_from(place % u64::from(SIZE)).unwrap() | u16::from(wrap) << 15
}

/// The position `by` descriptors after one.
fn after(position: u16, by: u16) -> u16 {
    let index = (position & 0x7fff) + by;
    let wrap = position & 0x8000;
    if index < SIZE { index | wrap } else { (index - SIZE) | (wrap ^ 0x8000) }
}

impl Packed {
    fn ram(&self) -> &Arc<GuestRam> {
        self.ring.ram()
    }

    fn desc(&self, position: u16) -> u64 {
        self.ring.addrs()[0] + 16 * u64::from(position & 0x7fff)
    }

    fn read<const N: usize>(&self, gpa: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.ram().read(gpa, &mut bytes).unwrap();
        bytes
    }

    fn flags(&self, position: u16) -> u16 {
        u16::from_le_bytes(self.read(self.desc(position) + 14))
    }

    fn status(&self, id: u16) -> u64 {
        self.heads.gpa + 32 * u64::from(id) + 16
    }
}

impl Life for Packed {
    fn new(ram: &Arc<GuestRam>, queue: u16, area: &File) -> Self {
        let ids = SIZE / CHAIN;
        let ring = Arc::new(Ring::new(ram, queue.into(), SIZE).unwrap());
        // The driver wants no calls: it looks.
        ram.write(ring.addrs()[1] + 2, &1_u16.to_le_bytes()).unwrap();
        Self {
            heads: ram.alloc(32 * u32::from(ids), 64).unwrap(),
            ring,
            added: 0,
            seen: 0,
            ids: (0..ids).collect(),
            part: Part::new(area, queue, SIZE, true),
            taken: 0,
            used: 0,
            counter: 0,
            held: vec![],
        }
    }

    fn ring(&self) -> &Arc<Ring> {
        &self.ring
    }

    fn base(&self) -> u16 {
        position(self.used)
    }

    fn end(&self) -> u16 {
        position(self.added)
    }

    fn submit(&mut self, write: bool, sector: u64, data: Segment) -> Option<u16> {
        let id = self.ids.pop()?;
        let header = self.heads.gpa + 32 * u64::from(id);
        self.ram().write(header, &u64::from(write).to_le_bytes()).unwrap();
        self.ram().write(header + 8, &sector.to_le_bytes()).unwrap();
        self.ram().write(self.status(id), &[0xee]).unwrap();
        let device_writes = if write { 0 } else { WRITE };
        let chain = [
            (header, 16, NEXT),
            (data.gpa, data.len, NEXT | device_writes),
            (self.status(id), 1, WRITE),
        ];
        // The first one's flags last.
        for (n, (addr, len, flags)) in (0..CHAIN).zip(chain).rev() {
            let position = after(position(self.added), n);
            let state = if position & 0x8000 != 0 { AVAIL } else { USED };
            let at = self.desc(position);
            self.ram().write(at, &addr.to_le_bytes()).unwrap();
            self.ram().write(at + 8, &u32::to_le_bytes(len)).unwrap();
            self.ram().write(at + 12, &id.to_le_bytes()).unwrap();
            self.ram().write(at + 14, &(flags | state).to_le_bytes()).unwrap();
        }
        self.added += 1;
        Some(id)
    }

    fn kick(&mut self) {
        self.ring.kick_fd().write(1).unwrap();
    }

    fn poll(&mut self) -> Option<(u16, u8)> {
        let next = position(self.seen);
        let flags = self.flags(next);
        let wrap = next & 0x8000 != 0;
        if (flags & AVAIL != 0) != wrap || (flags & USED != 0) != wrap {
            return None;
        }
        let id = u16::from_le_bytes(self.read(self.desc(next) + 12));
        assert!(id < SIZE / CHAIN && !self.ids.contains(&id), "{id} is not with the device");
        self.ids.push(id);
        self.seen += 1;
        Some((id, self.read::<1>(self.status(id))[0]))
    }

    fn take(&mut self) -> bool {
        if self.taken == self.added {
            return false;
        }
        // rte_vhost_set_inflight_desc_packed: as many entries of the free list as descriptors.
        let part = &self.part;
        let first = position(self.taken);
        let entry = part.half(14);
        part.put(part.entry(entry) + 8, self.counter.to_le_bytes());
        part.put(part.entry(entry), [1]);
        let (mut free, mut id) = (entry, 0);
        for n in 0..CHAIN {
            let desc = self.desc(after(first, n));
            let to = part.entry(free);
            id = u16::from_le_bytes(self.read(desc + 12));
            part.put(to + 24, self.read::<8>(desc));
            part.put(to + 20, self.read::<4>(desc + 8));
            part.put(to + 16, self.read::<4>(desc + 12));
            part.put(part.entry(entry) + 4, free.to_le_bytes());
            part.put(part.entry(entry) + 6, (n + 1).to_le_bytes());
            free = part.half(to + 2);
        }
        part.put(12, free.to_le_bytes());
        part.put(14, free.to_le_bytes());
        self.counter += 1;
        self.taken += 1;
        self.held.push((id, entry));
        true
    }

    fn held(&self) -> Vec<u16> {
        self.held.iter().map(|&(id, _)| id).collect()
    }

    fn finish(&mut self, nth: usize, end: End) {
        let (id, entry) = self.held.remove(nth);
        let part = &self.part;
        self.ram().write(self.status(id), &[STATUS_OK]).unwrap();
        let old = position(self.used);
        let new = position(self.used + 1);
        // rte_vhost_set_last_inflight_io_packed: the chain goes back to the free list.
        let last = part.half(part.entry(entry) + 4);
        part.put(part.entry(last) + 2, part.half(12).to_le_bytes());
        part.put(12, entry.to_le_bytes());
        part.put(16, (new & 0x7fff).to_le_bytes());
        part.put(20, [(new >> 15) as u8]);
        if end == End::Announced {
            return;
        }
        let at = self.desc(old);
        self.ram().write(at + 8, &1_u32.to_le_bytes()).unwrap();
        self.ram().write(at + 12, &id.to_le_bytes()).unwrap();
        let state = if old & 0x8000 != 0 { AVAIL | USED } else { 0 };
        self.ram().write(at + 14, &(state | WRITE).to_le_bytes()).unwrap();
        self.used += 1;
        if end == End::Whole {
            // rte_vhost_clr_inflight_desc_packed
            part.put(part.entry(entry), [0]);
            part.put(14, part.half(12).to_le_bytes());
            part.put(18, part.half(16).to_le_bytes());
            part.put(21, [(part.half(20) & 0xff) as u8]);
        }
    }
}
