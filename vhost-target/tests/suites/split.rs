//! The driver's side of a split ring.
#![expect(clippy::cast_possible_truncation, reason = "sizes of small disks and rings")]

use std::sync::Arc;

use guest_memory::GuestMemory;
use virtqueue::{Buffer, RingAddrs};
use vm_memory::Bytes;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// A driver.
#[derive(Debug)]
pub(crate) struct Driver {
    memory: Arc<GuestMemory>,
    addrs: RingAddrs,
    size: u16,
    free: Vec<u16>,
    /// The descriptors of the chain at each head.
    chains: Vec<Vec<u16>>,
    avail: u16,
    used: u16,
}

impl Driver {
    pub(crate) fn new(memory: &Arc<GuestMemory>, addrs: RingAddrs, size: u16) -> Self {
        let (free, chains) = ((0..size).rev().collect(), vec![vec![]; size.into()]);
        Self { memory: Arc::clone(memory), addrs, size, free, chains, avail: 0, used: 0 }
    }

    fn put(&self, gpa: u64, bytes: &[u8]) {
        self.memory.slice(gpa, bytes.len()).unwrap().write_slice(bytes, 0).unwrap();
    }

    fn word<const N: usize>(&self, gpa: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.memory.slice(gpa, N).unwrap().read_slice(&mut bytes, 0).unwrap();
        bytes
    }

    /// Writes the descriptor at address `at`.
    fn write(&self, at: u64, buffer: &Buffer, flags: u16, next: u16) {
        let write = if buffer.write { WRITE } else { 0 };
        self.put(at, &buffer.gpa.to_le_bytes());
        self.put(at + 8, &buffer.len.to_le_bytes());
        self.put(at + 12, &(flags | write).to_le_bytes());
        self.put(at + 14, &next.to_le_bytes());
    }

    /// Makes a chain available, in the ring or in a table at `table`. Returns its head.
    pub(crate) fn add(&mut self, buffers: &[Buffer], table: Option<u64>) -> u16 {
        let mut chain = buffers.to_vec();
        let mut indirect = 0;
        if let Some(table) = table {
            for (n, (at, buffer)) in (table..).step_by(16).zip(buffers).enumerate() {
                let next = if n + 1 < buffers.len() { NEXT } else { 0 };
                self.write(at, buffer, next, n as u16 + 1);
            }
            let len = 16 * buffers.len() as u32;
            chain = vec![Buffer { gpa: table, len, write: false }];
            indirect = INDIRECT;
        }
        let taken = self.free.split_off(self.free.len() - chain.len());
        for (n, buffer) in chain.iter().enumerate() {
            let next = taken.get(n + 1).copied();
            let flags = indirect | if next.is_some() { NEXT } else { 0 };
            let at = self.addrs.desc + 16 * u64::from(taken[n]);
            self.write(at, buffer, flags, next.unwrap_or_default());
        }
        let head = taken[0];
        self.chains[usize::from(head)] = taken;
        let at = self.addrs.avail + 4 + 2 * u64::from(self.avail % self.size);
        self.put(at, &head.to_le_bytes());
        self.avail = self.avail.wrapping_add(1);
        self.put(self.addrs.avail + 2, &self.avail.to_le_bytes());
        head
    }

    /// Takes a used chain: its head and the written length.
    pub(crate) fn take(&mut self) -> Option<(u16, u32)> {
        if u16::from_le_bytes(self.word(self.addrs.used + 2)) == self.used {
            return None;
        }
        let at = self.addrs.used + 4 + 8 * u64::from(self.used % self.size);
        self.used = self.used.wrapping_add(1);
        let head = u32::from_le_bytes(self.word(at)) as u16;
        let chain = std::mem::take(&mut self.chains[usize::from(head)]);
        assert!(!chain.is_empty(), "chain {head} was not offered");
        self.free.extend(chain);
        Some((head, u32::from_le_bytes(self.word(at + 4))))
    }
}
