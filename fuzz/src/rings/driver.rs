//! A driver that makes chains of all kinds, most of them valid.

use super::device::Device;
use super::{ADDRS, TABLES};
use crate::guest::Guest;
use crate::input::Input;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;
const WRAP: u16 = 1 << 15;

/// The driver.
pub(super) struct Driver {
    size: u16,
    packed: bool,
    /// The position at which the next chain is made available.
    position: u16,
    /// The next descriptor of a split ring to use, whether it is free or not.
    free: u16,
    count: u16,
}

/// A buffer of a chain.
#[derive(Clone, Copy)]
pub(super) struct Buffer {
    pub gpa: u64,
    pub len: u32,
    pub flags: u16,
}

impl Buffer {
    /// A buffer that the device reads.
    pub(super) fn readable(gpa: u64, len: u32) -> Self {
        Self { gpa, len, flags: 0 }
    }

    /// A buffer that the device writes.
    pub(super) fn writable(gpa: u64, len: u32) -> Self {
        Self { gpa, len, flags: WRITE }
    }
}

impl Driver {
    pub(super) fn new(size: u16, packed: bool, position: u16) -> Self {
        Self { size, packed, position, free: 0, count: 0 }
    }

    /// Offers a request to a device.
    pub(super) fn offer<D: Device>(
        &mut self,
        guest: &mut Guest,
        table: usize,
        input: &mut Input<'_>,
    ) {
        let n = self.count;
        self.count = self.count.wrapping_add(1);
        let mut buffers = D::request(guest, table, n, input);
        let defect = input.u8();
        corrupt(&mut buffers, defect, input);
        // Some descriptors in the ring, the rest in a table.
        let direct = match input.u8() {
            how if how & 1 == 0 => buffers.len(),
            how => usize::from(how >> 1) % 4,
        };
        let direct = direct.min(usize::from(self.size));
        let rest = buffers.split_off(direct.min(buffers.len()));
        if !rest.is_empty() {
            let at = TABLES + if rest.len() < 32 { 512 * u64::from(n % 32) } else { 0 };
            let odd = u64::from(defect & 0x3f == 0x3f);
            self.write_table(guest, table, at + odd, &rest);
            let len = 16 * rest.len() as u32;
            buffers.push(Buffer { gpa: at + odd, len, flags: INDIRECT });
        }
        buffers.truncate(self.size.into());
        let id = if defect == 0x80 { input.u16() } else { n % self.size };
        if self.packed {
            self.put_packed(guest, &buffers, id)
        } else {
            self.put_split(guest, &buffers)
        }
    }

    fn write_table(&self, guest: &mut Guest, table: usize, at: u64, buffers: &[Buffer]) {
        for (n, buffer) in buffers.iter().enumerate() {
            let more = if n + 1 < buffers.len() { NEXT } else { 0 };
            let desc = bytes(*buffer, buffer.flags | more, n as u16 + 1, self.packed);
            guest.put(table, at + 16 * n as u64, &desc);
        }
    }

    fn put_split(&mut self, guest: &mut Guest, buffers: &[Buffer]) {
        let head = self.free;
        for (n, buffer) in buffers.iter().enumerate() {
            let index = self.free;
            self.free = (self.free + 1) % self.size;
            let more = if n + 1 < buffers.len() { NEXT } else { 0 };
            let desc = bytes(*buffer, buffer.flags | more, self.free, false);
            guest.put(0, ADDRS.desc + 16 * u64::from(index), &desc);
        }
        let entry = ADDRS.avail + 4 + 2 * u64::from(self.position % self.size);
        guest.put(0, entry, &head.to_le_bytes());
        self.position = self.position.wrapping_add(1);
        guest.put(0, ADDRS.avail + 2, &self.position.to_le_bytes());
    }

    fn put_packed(&mut self, guest: &mut Guest, buffers: &[Buffer], id: u16) {
        for (n, buffer) in buffers.iter().enumerate() {
            let more = if n + 1 < buffers.len() { NEXT } else { 0 };
            let mine = if self.position & WRAP != 0 { AVAIL } else { USED };
            let desc = bytes(*buffer, buffer.flags | more | mine, id, true);
            guest.put(0, ADDRS.desc + 16 * u64::from(self.position & !WRAP), &desc);
            self.position = super::model::advance_packed(self.position, 1, self.size);
        }
    }

    /// Makes so many more chains available, or moves to another position of a packed ring.
    pub(super) fn jump(&mut self, guest: &mut Guest, by: u16) {
        if self.packed {
            self.position = (by & WRAP) | ((by & !WRAP) % self.size);
        } else {
            // Mostly small steps forward.
            let by = if by & 0xff < 0xc0 { by % 5 } else { by };
            self.position = self.position.wrapping_add(by);
            guest.put(0, ADDRS.avail + 2, &self.position.to_le_bytes());
        }
    }

    /// Sets when it wants to be notified.
    pub(super) fn events(&mut self, guest: &mut Guest, event: u16, flags: u16) {
        if self.packed {
            guest.put(0, ADDRS.avail, &event.to_le_bytes());
            guest.put(0, ADDRS.avail + 2, &flags.to_le_bytes());
        } else {
            guest.put(0, ADDRS.avail, &flags.to_le_bytes());
            guest.put(0, ADDRS.avail + 4 + 2 * u64::from(self.size), &event.to_le_bytes());
        }
    }
}

fn bytes(Buffer { gpa, len, .. }: Buffer, flags: u16, tag: u16, packed: bool) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&gpa.to_le_bytes());
    bytes[8..12].copy_from_slice(&len.to_le_bytes());
    let (first, second) = if packed { (tag, flags) } else { (flags, tag) };
    bytes[12..14].copy_from_slice(&first.to_le_bytes());
    bytes[14..].copy_from_slice(&second.to_le_bytes());
    bytes
}

/// Makes a request invalid, or at least unusual.
fn corrupt(buffers: &mut Vec<Buffer>, defect: u8, input: &mut Input<'_>) {
    let at = usize::from(defect >> 4) % buffers.len();
    match defect & 0xf {
        1 => drop(buffers.remove(at)),
        2 => buffers[at].flags ^= WRITE,
        3 => buffers[at].len = 0,
        4 => buffers[at].gpa = input.u64(),
        5 => buffers[at].gpa = u64::from(input.u16()),
        6 => buffers[at].flags |= input.u16(),
        7 => buffers[at].len = input.u32(),
        // Splits a buffer in two.
        8 if buffers[at].len > 1 => {
            let Buffer { gpa, len, flags } = buffers[at];
            let first = u32::from(input.u16()) % (len - 1) + 1;
            buffers[at].len = first;
            let rest = Buffer { gpa: gpa + u64::from(first), len: len - first, flags };
            buffers.insert(at + 1, rest);
        }
        9 => buffers.reverse(),
        _ => {}
    }
    if buffers.is_empty() {
        buffers.push(Buffer { gpa: 0, len: 1, flags: 0 });
    }
}
