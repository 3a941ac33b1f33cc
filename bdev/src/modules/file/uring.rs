//! io_uring for the reads and writes of a file disk.
//!
//! If the kernel supports it, the ring is restricted to reads and writes of the disk's own file:
//! seccomp does not filter the submissions of a thread to an io_uring, and reactors cannot create
//! other rings.
#![expect(unsafe_code, reason = "hands a guest's memory to the kernel")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use io_uring::register::Restriction;
use io_uring::{Builder, IoUring, cqueue, opcode, squeue, types};

use super::engine::{Submitter, joined};
use crate::io::{Io, Op, Tag};

/// The index of the file in the ring's table.
const FILE: types::Fixed = types::Fixed(0);

/// Reads and writes of one channel through an io_uring.
///
/// The kernel ties an I/O to the thread that submitted it. The channel may change threads,
/// preferably while no I/O is outstanding; the I/Os of a thread that ends fail.
pub(super) struct Uring {
    ring: IoUring,
    /// Entries in the ring that the kernel has not taken.
    unsubmitted: usize,
}

impl Uring {
    pub(super) fn open(file: BorrowedFd<'_>, depth: u16) -> io::Result<Self> {
        Ok(Self { ring: make_ring(depth.into(), file)?, unsubmitted: 0 })
    }
}

impl Submitter for Uring {
    fn nowait(&self) -> (bool, bool) {
        (true, true)
    }

    #[inline]
    unsafe fn push(&mut self, io: &Io) {
        // SAFETY: the caller guarantees that the segments are valid.
        let segments = unsafe { io.segments() };
        let (iovecs, count) = io.iovecs();
        let nowait = libc::RWF_NOWAIT;
        #[expect(
            clippy::cast_possible_truncation,
            reason = "`goes_whole` has limited the I/O to `TRANSFER_MAX`"
        )]
        let entry = match (io.op, joined(segments)) {
            (Op::Read, Some(one)) => opcode::Read::new(FILE, one.base(), one.len() as u32)
                .offset(io.offset)
                .rw_flags(nowait)
                .build(),
            (Op::Read, None) => {
                opcode::Readv::new(FILE, iovecs, count).offset(io.offset).rw_flags(nowait).build()
            }
            (_, Some(one)) => opcode::Write::new(FILE, one.base(), one.len() as u32)
                .offset(io.offset)
                .rw_flags(nowait)
                .build(),
            (_, None) => {
                opcode::Writev::new(FILE, iovecs, count).offset(io.offset).rw_flags(nowait).build()
            }
        };
        let entry = entry.user_data(u64::from(io.tag.0));
        // SAFETY: by the contract, the memory that the entry refers to stays valid until the I/O is
        // reported.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        // An I/O has one entry, and the ring has `depth` entries.
        debug_assert!(pushed.is_ok(), "the ring is smaller than the depth");
        self.unsubmitted += 1;
    }

    #[inline]
    fn kick(&mut self) {
        if self.unsubmitted == 0 {
            return;
        }
        // Never waits. After an error (such as no memory for a request), the entries stay in the
        // ring, and the next poll tries again.
        if let Ok(n) = self.ring.submit() {
            self.unsubmitted = self.unsubmitted.saturating_sub(n);
        }
    }

    fn is_behind(&self) -> bool {
        self.unsubmitted > 0
    }

    fn refresh(&mut self) {
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

    #[inline]
    fn next(&mut self) -> Option<(Tag, i32)> {
        let entry = self.ring.completion().next()?;
        #[expect(clippy::cast_possible_truncation, reason = "`push` stored the tag there")]
        let tag = Tag(entry.user_data() as u16);
        Some((tag, entry.result()))
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        // SAFETY: the ring's own fd, which is open as long as the ring exists.
        Some(unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) })
    }
}

impl Drop for Uring {
    fn drop(&mut self) {
        // Closing the ring would release the file some time later, and a block device would stay
        // busy until then. A failure cannot be handled here.
        let _ = self.ring.submitter().unregister_files();
    }
}

/// Makes an io_uring whose only registered file is `file`. If the kernel supports it, completions
/// do not interrupt the thread (5.19) and the ring is restricted (5.10).
fn make_ring(entries: u32, file: BorrowedFd<'_>) -> io::Result<IoUring> {
    let files = [file.as_raw_fd()];
    let restricted = |builder: &mut Builder<squeue::Entry, cqueue::Entry>| {
        let ring = builder.dontfork().setup_r_disabled().build(entries)?;
        ring.submitter().register_files(&files)?;
        restrict(&ring)?;
        Ok(ring)
    };
    let mut quiet = IoUring::builder();
    quiet.setup_submit_all().setup_coop_taskrun().setup_taskrun_flag();
    restricted(&mut quiet).or_else(|_: io::Error| restricted(&mut IoUring::builder())).or_else(
        |_| {
            let ring = IoUring::builder().dontfork().build(entries)?;
            ring.submitter().register_files(&files)?;
            Ok(ring)
        },
    )
}

/// Makes the kernel refuse everything but reads and writes of the ring's own file from now on.
fn restrict(ring: &IoUring) -> io::Result<()> {
    /// `IORING_UNREGISTER_FILES`, which `drop` calls.
    const UNREGISTER_FILES: u8 = 3;
    let op = Restriction::sqe_op;
    let mut restrictions = [
        op(opcode::Read::CODE),
        op(opcode::Readv::CODE),
        op(opcode::Write::CODE),
        op(opcode::Writev::CODE),
        Restriction::sqe_flags_required(squeue::Flags::FIXED_FILE.bits()),
        Restriction::register_op(UNREGISTER_FILES),
    ];
    ring.submitter().register_restrictions(&mut restrictions)?;
    ring.submitter().register_enable_rings()
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use io_uring::squeue::Entry;

    use super::*;
    use crate::io::Segment;

    #[test]
    fn a_ring_only_reads_and_writes_its_file() {
        let [file, other] = [(); 2].map(|()| tempfile::tempfile().unwrap());
        file.set_len(512).unwrap();
        let mut ring = make_ring(4, file.as_fd()).unwrap();
        let mut result = |entry: Entry| {
            // SAFETY: the memory that it refers to outlives the wait.
            unsafe { ring.submission().push(&entry) }.unwrap();
            ring.submit_and_wait(1).unwrap();
            ring.completion().next().unwrap().result()
        };
        let refused = -libc::EACCES;
        let mut bytes = [0_u8; 512];
        let at = bytes.as_mut_ptr();
        assert_eq!(result(opcode::Read::new(FILE, at, 512).build()), 512);
        let fd = types::Fd(other.as_raw_fd());
        assert_eq!(result(opcode::Read::new(fd, at, 512).build()), refused);
        assert_eq!(result(opcode::Fsync::new(FILE).build()), refused, "it could wait");
        let here = types::Fd(libc::AT_FDCWD);
        assert_eq!(result(opcode::OpenAt::new(here, c"/etc/passwd".as_ptr()).build()), refused);
        assert_eq!(result(opcode::UnlinkAt::new(here, c"/nowhere".as_ptr()).build()), refused);
        let (unix, stream) = (libc::AF_UNIX, libc::SOCK_STREAM);
        assert_eq!(result(opcode::Socket::new(unix, stream, 0).build()), refused);
        let files = [other.as_raw_fd()];
        ring.submitter().register_files_update(0, &files).unwrap_err();
        ring.submitter().unregister_files().unwrap();
    }

    /// Otherwise, a reactor that could sleep would poll for ever.
    #[test]
    fn entries_that_the_kernel_takes_while_it_writes_completions_are_submitted() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        let mut uring = Uring::open(file.as_fd(), 1).unwrap();
        let mut bytes = vec![0_u8; 512];
        let segments = [Segment::new(bytes.as_mut_ptr(), bytes.len())];
        let read = Io::rw(Op::Read, Tag(0), 0, 512, &segments);
        // More completions than the ring has entries: the last one waits in the kernel.
        for _ in 0..3 {
            // SAFETY: the memory outlives the ring's last completion, below.
            unsafe { uring.push(&read) };
            uring.ring.submit_and_wait(1).unwrap();
            uring.unsubmitted = 0;
        }
        assert_eq!(uring.ring.completion().count(), 2);
        assert!(uring.ring.submission().cq_overflow());
        // SAFETY: as above.
        unsafe { uring.push(&read) };
        assert!(uring.is_behind());
        // The kernel has not taken the entry when the ring is polled, as after an earlier refusal.
        uring.refresh();
        assert_eq!(uring.next(), Some((Tag(0), 512)), "the completion that waited in the kernel");
        assert!(!uring.is_behind());
        uring.ring.submit_and_wait(1).unwrap();
        assert_eq!(uring.next(), Some((Tag(0), 512)), "the read itself");
        drop(bytes);
    }
}
