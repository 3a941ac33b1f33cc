//! One io_uring per channel.
#![expect(unsafe_code, reason = "hands a guest's memory to the kernel")]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;

use io_uring::register::Restriction;
use io_uring::{Builder, IoUring, cqueue, opcode, squeue};

use super::steps::{Next, Steps};
use super::{FileDisk, Flavour};
use crate::failure::{Failure, FailureKind};
use crate::geometry::within;
use crate::io::{Bdev, Channel, Completion, Io, Op, Status, Submit, Tag, Wait};

/// The kernel makes no larger ring (`IORING_MAX_ENTRIES`).
const DEPTH_MAX: u16 = 32768;

/// Kernel threads that may wait for one reactor's slow operations (flush, unmap, write-zeroes,
/// buffered I/O), over all its disks. The kernel's default, 4 per CPU, is so few that one disk that
/// hangs could hold them all.
const WORKERS_MAX: u32 = 256;

/// The I/O path to a file.
///
/// An I/O has one entry in the ring at a time, so that a ring of `depth` entries has room for all.
/// The kernel ties an I/O to the thread that submitted it: the channel may change threads, best
/// while nothing is outstanding, and the I/Os of a thread that ends fail.
pub(super) struct FileChannel {
    ring: IoUring,
    steps: Steps,
    disk: Arc<FileDisk>,
    /// I/Os accepted and not yet reported.
    outstanding: usize,
    /// Entries in the ring that the kernel has not taken.
    unsubmitted: usize,
}

impl FileChannel {
    pub(super) fn open(disk: Arc<FileDisk>, depth: u16) -> io::Result<Self> {
        if depth == 0 || depth > DEPTH_MAX {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        let ring = make_ring(depth.into(), disk.file().as_fd())?;
        let steps = Steps::new(depth, disk.direct);
        let mut channel = Self { ring, steps, disk, outstanding: 0, unsubmitted: 0 };
        channel.self_test()?;
        Ok(channel)
    }

    /// Sends an entry round, while failing is still possible.
    fn self_test(&mut self) -> io::Result<()> {
        let nop = opcode::Nop::new().build().flags(squeue::Flags::FIXED_FILE);
        // SAFETY: it refers to no memory.
        let pushed = unsafe { self.ring.submission().push(&nop) };
        pushed.map_err(io::Error::other)?;
        self.ring.submit_and_wait(1)?;
        let nop = self.ring.completion().next();
        nop.map(|_| ()).ok_or_else(|| io::Error::from_raw_os_error(libc::EIO))
    }
}

impl Channel for FileChannel {
    #[inline]
    unsafe fn submit(&mut self, io: Io) -> Submit {
        let writes = matches!(io.op, Op::Write | Op::Unmap | Op::WriteZeroes);
        if !within(&io, self.disk.size_bytes()) || writes && self.disk.readonly {
            let refused = writes && self.disk.readonly;
            return self.refuse(&io, if refused { libc::EROFS } else { libc::EINVAL });
        }
        if io.op == Op::Unmap && !self.disk.features.unmap {
            return self.refuse(&io, libc::EOPNOTSUPP);
        }
        if io.len == 0 && io.op != Op::Flush {
            return Submit::Done(Status::Ok);
        }
        // SAFETY: the caller vouches for the memory.
        match unsafe { self.steps.begin(io) } {
            Err(status) => return Submit::Done(status),
            Ok(None) => {}
            Ok(Some(entry)) => {
                // SAFETY: what the entry refers to stays valid until the I/O is reported: the
                // caller's memory by the contract, the aligned buffer as `self` owns it.
                if unsafe { self.ring.submission().push(&entry) }.is_err() {
                    self.steps.take_back(io.tag);
                    return Submit::Full(io);
                }
                self.unsubmitted += 1;
            }
        }
        self.outstanding += 1;
        Submit::Queued
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        // SAFETY: the ring's own fd, open for as long as the ring.
        Some(unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) })
    }

    fn wait(&self) -> Wait {
        // What the kernel would not take is offered again with the next poll.
        if self.unsubmitted > 0 { Wait::Poll } else { Wait::Event }
    }

    fn failure(&mut self, tag: Tag) -> Option<Failure> {
        let aio = self.disk.flavour == Flavour::Aio;
        let kind = if aio { FailureKind::Aio } else { FailureKind::Failed };
        self.steps.failure(tag).map(|failure| Failure { kind, ..failure })
    }

    #[inline]
    fn kick(&mut self) {
        if self.unsubmitted == 0 {
            return;
        }
        // Never waits. An error (no memory for a request, say) leaves the entries in the
        // ring, and the next poll tries again.
        if let Ok(n) = self.ring.submit() {
            self.unsubmitted = self.unsubmitted.saturating_sub(n);
        }
    }

    fn abandon(&mut self) {
        self.steps.abandon();
    }

    #[inline]
    fn poll(&mut self, done: &mut [Completion]) -> usize {
        if self.outstanding == 0 {
            return 0;
        }
        self.kick();
        self.reap(done)
    }
}

impl FileChannel {
    /// Ends an I/O that the disk does not support.
    #[cold]
    fn refuse(&mut self, io: &Io, errno: i32) -> Submit {
        self.steps.note_failure(io, errno);
        let unsupported = errno == libc::EOPNOTSUPP;
        Submit::Done(if unsupported { Status::Unsupported } else { Status::IoError })
    }

    fn reap(&mut self, done: &mut [Completion]) -> usize {
        let (submitter, mut sq, mut cq) = self.ring.split();
        if cq.is_empty() && (sq.taskrun() || sq.cq_overflow()) {
            // The kernel has completions that it writes to the ring when we enter it. A failure
            // leaves them there for the next poll. It also retries entries that the kernel did not
            // take before.
            if let Ok(n) = submitter.submit() {
                self.unsubmitted = self.unsubmitted.saturating_sub(n);
            }
            cq.sync();
        }
        let mut n = 0;
        while n < done.len() {
            let Some(cqe) = cq.next() else { break };
            let tag = Tag(cqe.user_data() as u16);
            // SAFETY: the I/O is reported below at the earliest.
            let mut more = match unsafe { self.steps.advance(tag, cqe.result()) } {
                Next::Entry(entry) => Some(entry),
                Next::Ended(status) => {
                    done[n] = Completion { tag, status };
                    n += 1;
                    // SAFETY: it concerns an I/O that waits.
                    unsafe { self.steps.unblocked(tag) }
                }
            };
            if let Some(entry) = more.take() {
                // SAFETY: as in `submit`. There is room: an I/O has one entry at a time, and the
                // ring has as many as there are tags.
                let pushed = unsafe { sq.push(&entry) };
                debug_assert!(pushed.is_ok(), "the ring is smaller than the depth");
                self.unsubmitted += 1;
            }
        }
        drop((sq, cq));
        self.outstanding -= n;
        self.kick();
        n
    }
}

impl Drop for FileChannel {
    fn drop(&mut self) {
        // Closing the ring would let go of the file some time later; a block device would stay
        // busy until then. Nothing can be done about a failure.
        let _ = self.ring.submitter().unregister_files();
    }
}

/// An io_uring whose only registered file is `file`. Where the kernel can, completions do not
/// interrupt the thread (5.19) and the ring is restricted (5.10).
fn make_ring(entries: u32, file: BorrowedFd<'_>) -> io::Result<IoUring> {
    let files = [file.as_raw_fd()];
    let restricted = |builder: &mut Builder<squeue::Entry, cqueue::Entry>| {
        let ring = builder.dontfork().setup_r_disabled().build(entries)?;
        ring.submitter().register_files(&files)?;
        set_workers(&ring);
        restrict(&ring)?;
        Ok(ring)
    };
    let mut quiet = IoUring::builder();
    quiet.setup_submit_all().setup_coop_taskrun().setup_taskrun_flag();
    restricted(&mut quiet).or_else(|_: io::Error| restricted(&mut IoUring::builder())).or_else(
        |_| {
            let ring = IoUring::builder().dontfork().build(entries)?;
            ring.submitter().register_files(&files)?;
            set_workers(&ring);
            Ok(ring)
        },
    )
}

fn set_workers(ring: &IoUring) {
    // Kernels before 5.15 cannot, and keep their default. 0 leaves the other kind as it is.
    let _ = ring.submitter().register_iowq_max_workers(&mut [WORKERS_MAX, 0]);
}

/// Has the kernel refuse everything but I/O on the ring's own file from now on. seccomp does not
/// see what a thread submits to an io_uring, and reactors cannot create other rings.
fn restrict(ring: &IoUring) -> io::Result<()> {
    /// `IORING_UNREGISTER_FILES`, which `drop` calls.
    const UNREGISTER_FILES: u8 = 3;
    let op = Restriction::sqe_op;
    let mut restrictions = [
        op(opcode::Nop::CODE),
        op(opcode::Read::CODE),
        op(opcode::Readv::CODE),
        op(opcode::Write::CODE),
        op(opcode::Writev::CODE),
        op(opcode::Fsync::CODE),
        op(opcode::Fallocate::CODE),
        Restriction::sqe_flags_required(squeue::Flags::FIXED_FILE.bits()),
        Restriction::register_op(UNREGISTER_FILES),
    ];
    ring.submitter().register_restrictions(&mut restrictions)?;
    ring.submitter().register_enable_rings()
}

#[cfg(test)]
mod tests {
    use io_uring::{squeue::Entry, types};

    use super::*;
    use crate::file::FileOptions;
    use crate::io::Segment;

    #[test]
    fn a_ring_does_io_on_its_file_and_nothing_else() {
        let [file, other] = [(); 2].map(|()| tempfile::tempfile().unwrap());
        file.set_len(512).unwrap();
        let mut ring = make_ring(4, file.as_fd()).unwrap();
        let mut result = |entry: Entry| {
            // SAFETY: what it refers to outlives the wait.
            unsafe { ring.submission().push(&entry) }.unwrap();
            ring.submit_and_wait(1).unwrap();
            ring.completion().next().unwrap().result()
        };
        let refused = -libc::EACCES;
        let mut bytes = [0_u8; 512];
        let at = bytes.as_mut_ptr();
        assert_eq!(result(opcode::Read::new(types::Fixed(0), at, 512).build()), 512);
        let fd = types::Fd(other.as_raw_fd());
        assert_eq!(result(opcode::Read::new(fd, at, 512).build()), refused);
        let here = types::Fd(libc::AT_FDCWD);
        assert_eq!(result(opcode::OpenAt::new(here, c"/etc/passwd".as_ptr()).build()), refused);
        assert_eq!(result(opcode::UnlinkAt::new(here, c"/nowhere".as_ptr()).build()), refused);
        let (unix, stream) = (libc::AF_UNIX, libc::SOCK_STREAM);
        assert_eq!(result(opcode::Socket::new(unix, stream, 0).build()), refused);
        let files = [other.as_raw_fd()];
        ring.submitter().register_files_update(0, &files).unwrap_err();
        ring.submitter().unregister_files().unwrap();
    }

    /// A reactor that sleeps would otherwise poll for ever.
    #[test]
    fn what_the_kernel_takes_on_the_way_to_completions_was_submitted() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        let disk = FileDisk::create(FileOptions {
            name: "f".into(),
            filename: file.path().into(),
            block_size: Some(512),
            readonly: false,
            fallocate: false,
            uuid: None,
            flavour: Flavour::Aio,
        });
        let mut channel = FileChannel::open(disk.unwrap(), 1).unwrap();
        // More completions than the ring has places: the last one waits in the kernel.
        for _ in 0..3 {
            let nop = opcode::Nop::new().build().flags(squeue::Flags::FIXED_FILE);
            // SAFETY: it refers to no memory.
            unsafe { channel.ring.submission().push(&nop) }.unwrap();
            channel.ring.submit().unwrap();
        }
        assert_eq!(channel.ring.completion().count(), 2);
        assert!(channel.ring.submission().cq_overflow());
        let mut bytes = vec![0_u8; 512];
        let segments = [Segment::new(bytes.as_mut_ptr(), bytes.len())];
        let read = Io::rw(Op::Read, Tag(0), 0, 512, &segments);
        // SAFETY: the memory outlives the ring's last completion, below.
        assert!(matches!(unsafe { channel.submit(read) }, Submit::Queued));
        assert_eq!((channel.unsubmitted, channel.wait()), (1, Wait::Poll));
        // The kernel has not taken the entry when the ring is polled, as if it had refused it
        // before.
        let mut done = [Completion { tag: Tag(9), status: Status::Ok }; 1];
        assert_eq!(channel.reap(&mut done), 1, "the waiting one, in the read's name");
        assert_eq!((channel.unsubmitted, channel.wait()), (0, Wait::Event));
        channel.ring.submit_and_wait(1).unwrap();
        assert_eq!(channel.ring.completion().count(), 1, "the read itself");
        drop(bytes);
    }
}
