//! The thread that unmaps guest memory, in pieces, and counts what there is to unmap.
#![expect(unsafe_code, reason = "munmap")]

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use crate::sigbus;

/// Bytes that one system call unmaps. Another thread's mmap waits for such a call: 0.2 s for 4 GiB
/// of 4 KiB pages at once (measured), an unnoticeable time for a piece of this size.
const UNMAP_PIECE_BYTES: usize = 2 << 20;

/// Pieces of one mapping that are unmapped before the next mapping's turn.
const UNMAP_TURN_PIECES: usize = 64;

/// A mapping to unmap.
#[derive(Debug)]
struct Range {
    base: *mut u8,
    len: usize,
    slot: sigbus::Slot,
    _counted: Option<Counted>,
}

// SAFETY: an address and a length, owned by whoever unmaps it.
unsafe impl Send for Range {}

/// A mapping, counted until it is unmapped.
#[derive(Debug)]
pub(crate) struct Counted(Arc<AtomicUsize>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A handle on the thread that unmaps guest memory, which also counts what there is to unmap.
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
    /// The system has no thread to give.
    pub fn start() -> io::Result<Self> {
        let (sender, receiver) = channel();
        thread::Builder::new().name("vhost-unmap".into()).spawn(move || unmap(&receiver))?;
        Ok(Self { ranges: sender, mapped: Arc::default(), most: usize::MAX })
    }

    /// A handle on the same thread that allows `most` mappings at a time. Mappings that only I/O in
    /// flight still uses, and mappings that are queued to be unmapped, count too.
    #[must_use]
    pub fn limited(&self, most: usize) -> Self {
        Self { ranges: self.ranges.clone(), mapped: Arc::default(), most }
    }

    /// Counts one more mapping.
    ///
    /// # Errors
    /// The limit, if it is reached.
    pub(crate) fn count(&self) -> Result<Counted, usize> {
        let add = |mapped| (mapped < self.most).then_some(mapped + 1);
        self.mapped.fetch_update(Ordering::Relaxed, Ordering::Relaxed, add)?;
        Ok(Counted(Arc::clone(&self.mapped)))
    }

    /// Unmaps `len` bytes at `base`, which nobody uses any more, in the background.
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

/// Takes turns, so that a small guest's memory does not wait for a huge one's.
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
        waiting.extend(next.unmap_some());
    }
}

/// Ends the guard first, so that the address cannot be somebody else's while it still stands.
fn begin(range: Range) -> Range {
    sigbus::unregister(range.slot);
    range
}

impl Range {
    /// Unmaps up to [`UNMAP_TURN_PIECES`] pieces; answers with what is left.
    fn unmap_some(mut self) -> Option<Self> {
        for _ in 0..UNMAP_TURN_PIECES {
            let piece = UNMAP_PIECE_BYTES.min(self.len);
            // SAFETY: part of a mapping whose owner is gone.
            if unsafe { libc::munmap(self.base.cast(), piece) } != 0 {
                // Huge pages of 1 GiB come off only as a whole.
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
