//! The unmapper: a thread that unmaps memory in pieces. Its handles also count and limit mappings.
#![expect(unsafe_code, reason = "munmap")]

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use crate::sigbus;

/// Bytes that one system call unmaps. The mmap of another thread waits for such a call: 0.2 s for 4
/// GiB of 4 KiB pages in one call (measured), a negligible time for a piece of this size.
const UNMAP_PIECE_BYTES: usize = 2 << 20;

/// Pieces of one mapping that are unmapped before pieces of the next mapping.
const UNMAP_ROUND_PIECES: usize = 64;

/// A mapping to unmap.
#[derive(Debug)]
struct Range {
    base: *mut u8,
    len: usize,
    slot: sigbus::Slot,
    _counted: Option<Counted>,
}

// SAFETY: an address and a length, and the thread that unmaps the range owns it.
unsafe impl Send for Range {}

/// A mapping that counts until it is unmapped.
#[derive(Debug)]
pub(crate) struct Counted(Arc<AtomicUsize>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A handle to the unmapper, which also counts mappings.
#[derive(Clone, Debug)]
pub struct Unmapper {
    ranges: Sender<Range>,
    mapped: Arc<AtomicUsize>,
    most: usize,
}

impl Unmapper {
    /// Starts the thread, which ends when the last handle is dropped.
    ///
    /// # Errors
    /// The system cannot start a thread.
    pub fn start() -> io::Result<Self> {
        let (sender, receiver) = channel();
        thread::Builder::new().name("vhost-unmap".into()).spawn(move || unmap(&receiver))?;
        Ok(Self { ranges: sender, mapped: Arc::default(), most: usize::MAX })
    }

    /// A handle to the same thread that allows `most` mappings at a time. Quarantined mappings,
    /// which only I/O in flight still uses, and mappings that are still to be unmapped count too.
    #[must_use]
    pub fn limited(&self, most: usize) -> Self {
        Self { ranges: self.ranges.clone(), mapped: Arc::default(), most }
    }

    /// Counts one more mapping.
    ///
    /// # Errors
    /// Returns the number of mappings if the limit is reached.
    pub(crate) fn count(&self) -> Result<Counted, usize> {
        let add = |mapped| (mapped < self.most).then_some(mapped + 1);
        self.mapped.fetch_update(Ordering::Relaxed, Ordering::Relaxed, add)?;
        Ok(Counted(Arc::clone(&self.mapped)))
    }

    /// Unmaps `len` bytes at `base` in the background. No thread may use them any more.
    pub(crate) fn unmap(
        &self,
        base: *mut u8,
        len: usize,
        slot: sigbus::Slot,
        counted: Option<Counted>,
    ) {
        let _ = self.ranges.send(Range { base, len, slot, _counted: counted });
    }
}

/// The unmapper's thread. It alternates between mappings, so that those of a small guest do not
/// wait for those of a huge one.
fn unmap(receiver: &Receiver<Range>) {
    let mut waiting = VecDeque::new();
    loop {
        let next = match waiting.pop_front() {
            Some(range) => range,
            None => match receiver.recv() {
                Ok(range) => begin(range),
                Err(_) => return,
            },
        };
        waiting.extend(receiver.try_iter().map(begin));
        waiting.extend(next.unmap_round());
    }
}

/// Ends the guard before the first piece is unmapped: from then on, the kernel may give the address
/// to another mapping.
fn begin(range: Range) -> Range {
    sigbus::unregister(range.slot);
    range
}

impl Range {
    /// Unmaps up to [`UNMAP_ROUND_PIECES`] pieces. Returns the rest.
    fn unmap_round(mut self) -> Option<Self> {
        for _ in 0..UNMAP_ROUND_PIECES {
            let piece = UNMAP_PIECE_BYTES.min(self.len);
            // SAFETY: part of a mapping that has no owner any more.
            if unsafe { libc::munmap(self.base.cast(), piece) } != 0 {
                // A huge page of 1 GiB can only be unmapped as a whole.
                // SAFETY: as above.
                unsafe { libc::munmap(self.base.cast(), self.len) };
                return None;
            }
            self.base = self.base.wrapping_add(piece);
            self.len -= piece;
            if self.len == 0 {
                return None;
            }
        }
        Some(self)
    }
}
