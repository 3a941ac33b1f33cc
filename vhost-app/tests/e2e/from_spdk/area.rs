//! An in-flight area as DPDK's rte_vhost makes it, and one queue's part of it.

use std::fs::File;
use std::os::unix::fs::FileExt;

/// Makes an area for `queues` rings of `size`. DPDK has it in a memfd; any tmpfs does as well.
pub(crate) fn create(queues: u16, size: u16, packed: bool) -> File {
    let file = tempfile::tempfile_in("/dev/shm").unwrap();
    file.set_len(u64::from(queues) * part_bytes(size, packed)).unwrap();
    for queue in 0..queues {
        let part = Part::new(&file, queue, size, packed);
        if packed {
            // Both used wrap counters, and the free list.
            part.put(20, [1, 1]);
            for entry in 0..size {
                part.put(part.entry(entry) + 2, (entry + 1).to_le_bytes());
            }
        }
        // What SET_INFLIGHT_FD and the ring's start write: version, and the ring's size.
        part.put(8, 1_u16.to_le_bytes());
        part.put(10, size.to_le_bytes());
    }
    file
}

fn part_bytes(size: u16, packed: bool) -> u64 {
    let (head, entry) = if packed { (32, 32) } else { (16, 16) };
    (head + entry * u64::from(size)).next_multiple_of(64)
}

/// A queue's part.
#[derive(Debug)]
pub(crate) struct Part {
    file: File,
    at: u64,
    /// Bytes of its head, and of an entry.
    unit: u64,
}

impl Part {
    pub(crate) fn new(file: &File, queue: u16, size: u16, packed: bool) -> Self {
        let at = u64::from(queue) * part_bytes(size, packed);
        Self { file: file.try_clone().unwrap(), at, unit: if packed { 32 } else { 16 } }
    }

    /// Where an entry is.
    pub(crate) fn entry(&self, entry: u16) -> u64 {
        self.unit * (u64::from(entry) + 1)
    }

    pub(crate) fn put<const N: usize>(&self, at: u64, bytes: [u8; N]) {
        self.file.write_all_at(&bytes, self.at + at).unwrap();
    }

    pub(crate) fn half(&self, at: u64) -> u16 {
        let mut bytes = [0; 2];
        self.file.read_exact_at(&mut bytes, self.at + at).unwrap();
        u16::from_le_bytes(bytes)
    }
}
