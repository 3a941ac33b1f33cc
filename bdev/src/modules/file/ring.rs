//! An io_uring and the entries that the kernel has not taken yet: the part that does not depend on
//! the requests.
#![expect(unsafe_code, reason = "entries carry addresses in a guest's memory")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use io_uring::register::Restriction;
use io_uring::{IoUring, cqueue, squeue};

/// An io_uring of one channel. Its only file is at index 0 of its table.
///
/// The kernel ties an I/O to the thread that submitted it. The channel may change threads,
/// preferably while no I/O is outstanding; the I/Os of a thread that ends fail.
pub(super) struct Ring<S: squeue::EntryMarker, C: cqueue::EntryMarker> {
    pub(super) ring: IoUring<S, C>,
    /// Entries in the ring that the kernel has not taken.
    pub(super) unsubmitted: usize,
}

impl<S: squeue::EntryMarker, C: cqueue::EntryMarker> Ring<S, C> {
    pub(super) fn new(ring: IoUring<S, C>) -> Self {
        Self { ring, unsubmitted: 0 }
    }

    /// Queues an entry.
    ///
    /// # Safety
    /// The memory that the entry refers to stays valid until the I/O is reported. At most as many
    /// I/Os are outstanding as the ring has entries.
    #[inline]
    pub(super) unsafe fn push(&mut self, entry: &S) {
        // SAFETY: the caller guarantees that the memory stays valid.
        let pushed = unsafe { self.ring.submission().push(entry) };
        // An I/O has one entry, and the ring has `depth` entries.
        debug_assert!(pushed.is_ok(), "the ring is smaller than the depth");
        self.unsubmitted += 1;
    }

    #[inline]
    pub(super) fn kick(&mut self) {
        if self.unsubmitted == 0 {
            return;
        }
        // Never waits. After an error (such as no memory for a request), the entries stay in the
        // ring, and the next poll tries again.
        if let Ok(n) = self.ring.submit() {
            self.unsubmitted = self.unsubmitted.saturating_sub(n);
        }
    }

    pub(super) fn is_behind(&self) -> bool {
        self.unsubmitted > 0
    }

    pub(super) fn refresh(&mut self) {
        let (submitter, sq, mut cq) = self.ring.split();
        if cq.is_empty() && (sq.taskrun() || sq.cq_overflow()) {
            // The kernel holds completions that it writes to the ring when this thread enters it.
            // After a failure they stay there for the next poll. The call also retries entries that
            // the kernel has not taken before.
            if let Ok(n) = submitter.submit() {
                self.unsubmitted = self.unsubmitted.saturating_sub(n);
            }
            cq.sync();
        }
    }

    pub(super) fn wake_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the ring's own fd, which is open as long as the ring exists.
        unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) }
    }
}

impl<S: squeue::EntryMarker, C: cqueue::EntryMarker> Drop for Ring<S, C> {
    fn drop(&mut self) {
        // Closing the ring would release the file some time later, and a block device would stay
        // busy until then. A failure cannot be handled here.
        let _ = self.ring.submitter().unregister_files();
    }
}

/// Makes the kernel refuse all requests but `ops` on the ring's own file from now on. The ring was
/// made disabled.
pub(super) fn restrict<S: squeue::EntryMarker, C: cqueue::EntryMarker>(
    ring: &IoUring<S, C>,
    ops: &[u8],
) -> io::Result<()> {
    /// `IORING_UNREGISTER_FILES`, which `drop` calls.
    const UNREGISTER_FILES: u8 = 3;
    let mut restrictions: Vec<_> = ops.iter().map(|op| Restriction::sqe_op(*op)).collect();
    restrictions.push(Restriction::sqe_flags_required(squeue::Flags::FIXED_FILE.bits()));
    restrictions.push(Restriction::register_op(UNREGISTER_FILES));
    ring.submitter().register_restrictions(&mut restrictions)?;
    ring.submitter().register_enable_rings()
}
