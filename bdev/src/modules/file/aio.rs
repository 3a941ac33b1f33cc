//! Linux AIO for the reads and writes of a file disk.
//!
//! The kernel maps a completion ring into the process and may fill it from interrupt context, so
//! completions are read without a system call. A context belongs to the process, so a channel may
//! change threads at any time. See aio(7) and io_submit(2). The ring's layout is the one that
//! libaio and fio read.
//!
//! A write to a regular file may block in spite of `RWF_NOWAIT`: while the file system is frozen,
//! `io_submit` waits for the thaw (observed on Linux 6.18). A write to a block device does not.
#![expect(unsafe_code, reason = "system calls without a wrapper, and a ring that the kernel fills")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use closer::Account;

use super::engine::{Submitter, joined};
use crate::io::{Io, Op, Tag};
use crate::line::Line;

const CMD_PREAD: u16 = 0;
const CMD_PWRITE: u16 = 1;
const CMD_PREADV: u16 = 7;
const CMD_PWRITEV: u16 = 8;
/// `IOCB_FLAG_RESFD`: the completion adds one to an eventfd.
const FLAG_RESFD: u32 = 1;
/// The value that the kernel writes to [`Header::magic`].
const MAGIC: u32 = 0xa10a_10a1;

/// `struct iocb` of `linux/aio_abi.h`, little endian.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Iocb {
    data: u64,
    key: u32,
    rw_flags: i32,
    opcode: u16,
    priority: i16,
    fd: u32,
    buffer: u64,
    len: u64,
    offset: i64,
    reserved: u64,
    flags: u32,
    event_fd: u32,
}

/// `struct io_event` of `linux/aio_abi.h`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Event {
    data: u64,
    iocb: u64,
    result: i64,
    result2: i64,
}

/// The kernel's `struct aio_ring`; the events follow it.
#[repr(C)]
struct Header {
    id: u32,
    /// The number of events that follow.
    count: u32,
    /// The next event to read. Only this process writes it.
    head: AtomicU32,
    /// The next event that the kernel writes.
    tail: AtomicU32,
    magic: u32,
    compatible_features: u32,
    incompatible_features: u32,
    header_length: u32,
}

/// A context of Linux AIO.
struct Context(NonNull<Header>);

// SAFETY: the mapping belongs to the process; its fields are atomic or constant, and only the owner
// reads each event.
unsafe impl Send for Context {}

impl Context {
    fn new(depth: u16) -> io::Result<Self> {
        let mut id: libc::c_ulong = 0;
        // SAFETY: the kernel stores a context's address in a local variable.
        let rc = unsafe { libc::syscall(libc::SYS_io_setup, u32::from(depth), &raw mut id) };
        if rc < 0 {
            return Err(io::Error::last_os_error());
        }
        let Some(header) = NonNull::new(id as *mut Header) else {
            return Err(io::ErrorKind::Unsupported.into());
        };
        let context = Self(header);
        let Header { magic, incompatible_features, header_length, count, .. } = context.header();
        let known = *magic == MAGIC
            && *incompatible_features == 0
            && *header_length as usize == size_of::<Header>()
            && *count > u32::from(depth);
        if known { Ok(context) } else { Err(io::ErrorKind::Unsupported.into()) }
    }

    fn header(&self) -> &Header {
        // SAFETY: the kernel has mapped it, and it stays mapped until `drop`.
        unsafe { self.0.as_ref() }
    }

    fn id(&self) -> libc::c_ulong {
        self.0.as_ptr() as libc::c_ulong
    }

    fn next(&mut self) -> Option<Event> {
        let header = self.header();
        // Relaxed suffices: no other thread writes it.
        let head = header.head.load(Ordering::Relaxed);
        // Acquire: the kernel has written the event before it moved the tail.
        if head == header.tail.load(Ordering::Acquire) {
            return None;
        }
        let events: *const Event = self.0.as_ptr().wrapping_add(1).cast();
        // SAFETY: `head` is below `count`, as only the values below `count` are stored in it, and
        // the kernel does not write the event again before the head has passed it.
        let event = unsafe { events.wrapping_add(head as usize).read() };
        let next = if head + 1 == header.count { 0 } else { head + 1 };
        // Release: the event was read before the kernel may write it again.
        header.head.store(next, Ordering::Release);
        Some(event)
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // A failure cannot be handled here. SAFETY: this value owns the context.
        unsafe { libc::syscall(libc::SYS_io_destroy, self.id()) };
    }
}

/// Reads and writes of one channel through Linux AIO.
pub(super) struct Aio {
    /// Taken when `self` is dropped.
    context: Option<Context>,
    /// The account that destroys the context.
    closer: Account,
    /// Whether the file is a block device.
    is_device: bool,
    /// The iocbs by tag. Their addresses do not change.
    iocbs: Box<[Iocb]>,
    /// Requests that the kernel has not taken yet, the oldest first: addresses in `iocbs`, which
    /// only the kernel dereferences.
    batch: Box<[*mut Iocb]>,
    /// The number of valid entries in `batch`.
    queued: usize,
    /// An I/O that the kernel has refused.
    refused: Option<(Tag, i32)>,
    /// Whether completions signal `line`'s eventfd.
    wakes: bool,
    /// The number of I/Os that were submitted without such a signal.
    quiet: usize,
    /// Keeps the eventfd open.
    _line: Arc<Line>,
}

// SAFETY: the addresses in `batch` are of `iocbs`, which moves together with them and keeps its
// address.
unsafe impl Send for Aio {}

impl Aio {
    pub(super) fn open(
        fd: RawFd,
        is_device: bool,
        closer: &Account,
        depth: u16,
        line: &Arc<Line>,
    ) -> io::Result<Self> {
        let event_fd = line.wake_fd().as_raw_fd() as u32;
        let iocb = |tag: u16| Iocb {
            data: tag.into(),
            rw_flags: libc::RWF_NOWAIT,
            fd: fd as u32,
            event_fd,
            ..Iocb::default()
        };
        Ok(Self {
            context: Some(Context::new(depth)?),
            closer: closer.clone(),
            is_device,
            iocbs: (0..depth).map(iocb).collect(),
            batch: vec![std::ptr::null_mut(); depth.into()].into_boxed_slice(),
            queued: 0,
            refused: None,
            wakes: true,
            quiet: 0,
            _line: Arc::clone(line),
        })
    }

    fn ended(&mut self, tag: Tag) {
        let iocb = self.iocbs.get(usize::from(tag.0));
        if iocb.is_some_and(|iocb| iocb.flags & FLAG_RESFD == 0) {
            debug_assert!(self.quiet > 0, "more quiet completions than quiet submissions");
            self.quiet -= 1;
        }
    }
}

impl Drop for Aio {
    fn drop(&mut self) {
        // `io_destroy` takes about 30 ms.
        self.closer.drop_later(self.context.take());
    }
}

impl Submitter for Aio {
    fn nowait(&self) -> (bool, bool) {
        (true, self.is_device)
    }

    #[inline]
    unsafe fn push(&mut self, io: &Io) {
        let iocb = &mut self.iocbs[usize::from(io.tag.0)];
        // SAFETY: the caller guarantees that the segments are valid.
        let segments = unsafe { io.segments() };
        let reads = io.op == Op::Read;
        if let Some(one) = joined(segments) {
            iocb.opcode = if reads { CMD_PREAD } else { CMD_PWRITE };
            (iocb.buffer, iocb.len) = (one.base() as u64, one.len() as u64);
        } else {
            iocb.opcode = if reads { CMD_PREADV } else { CMD_PWRITEV };
            (iocb.buffer, iocb.len) = (segments.as_ptr() as u64, segments.len() as u64);
        }
        iocb.offset = io.offset as i64;
        iocb.flags = if self.wakes { FLAG_RESFD } else { 0 };
        self.quiet += usize::from(!self.wakes);
        // The batch has room: at most `depth` I/Os are outstanding.
        self.batch[self.queued] = &raw mut *iocb;
        self.queued += 1;
    }

    #[inline]
    fn kick(&mut self) {
        if self.queued == 0 || self.refused.is_some() {
            return;
        }
        let Some(context) = &self.context else { return };
        let (id, at) = (context.id(), self.batch.as_mut_ptr());
        // SAFETY: addresses of this channel's iocbs; the memory that they refer to is valid until
        // the I/O has ended, by the contract of `push`.
        let rc = unsafe { libc::syscall(libc::SYS_io_submit, id, self.queued, at) };
        match usize::try_from(rc) {
            Ok(n) => self.took(n),
            Err(_) => self.refuse(),
        }
    }

    fn is_behind(&self) -> bool {
        self.queued > 0
    }

    fn refresh(&mut self) {}

    #[inline]
    fn next(&mut self) -> Option<(Tag, i32)> {
        #[expect(
            clippy::cast_possible_truncation,
            reason = "`push` stored the tag; a result is an errno or at most `MAX_RW_COUNT`"
        )]
        let (tag, result) = match self.context.as_mut()?.next() {
            Some(event) => (Tag(event.data as u16), event.result as i32),
            None => self.refused.take()?,
        };
        self.ended(tag);
        Some((tag, result))
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn set_wakes(&mut self, wakes: bool) {
        self.wakes = wakes;
    }

    fn is_quiet(&self) -> bool {
        self.quiet > 0
    }
}

impl Aio {
    fn took(&mut self, n: usize) {
        self.batch.copy_within(n..self.queued, 0);
        self.queued -= n;
    }

    /// Handles an `io_submit` that took no request: the kernel is temporarily short of a resource,
    /// or refuses the first request.
    #[cold]
    fn refuse(&mut self) {
        let errno = io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO);
        if matches!(errno, libc::EAGAIN | libc::ENOMEM | libc::EINTR) {
            return;
        }
        let at = self.batch[0] as usize - self.iocbs.as_ptr() as usize;
        #[expect(
            clippy::cast_possible_truncation,
            reason = "an index into `iocbs`, one for each tag"
        )]
        let tag = Tag((at / size_of::<Iocb>()) as u16);
        self.refused = Some((tag, -errno));
        self.took(1);
    }
}
