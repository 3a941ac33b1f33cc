//! How many of a disk's writes are durable at its server.

use std::sync::atomic::{AtomicU64, Ordering};

/// How many of a disk's writes are durable at its server, over all its queues.
#[derive(Debug, Default)]
pub(crate) struct Durability {
    /// The number of requests that have changed the disk, and how many of them a flush has covered.
    pub(crate) written: AtomicU64,
    pub(crate) flushed: AtomicU64,
    /// How often a server went away before a flush had covered all of these requests.
    losses: AtomicU64,
    /// The value of `losses` that a failed flush has reported last.
    pub(crate) reported: AtomicU64,
}

impl Durability {
    pub(crate) fn losses(&self) -> u64 {
        self.losses.load(Ordering::Relaxed)
    }

    /// Records that the server is gone: what it had not made durable may be lost. Called while no
    /// ring is in use.
    pub(crate) fn server_lost(&self) {
        // Relaxed suffices here and below: the queues order these accesses.
        let written = self.written.load(Ordering::Relaxed);
        if self.flushed.swap(written, Ordering::Relaxed) != written {
            self.losses.fetch_add(1, Ordering::Relaxed);
        }
    }
}
