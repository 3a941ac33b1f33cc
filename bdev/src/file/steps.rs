//! What an I/O on a file is made of: one ring entry, or several in a row.
#![expect(unsafe_code, reason = "copies between the guest's memory and the aligned buffer")]

use std::collections::VecDeque;

use io_uring::squeue::Entry;
use io_uring::{opcode, types};

use super::backing::Alignment;
use crate::failure::{Failure, Failures};
use crate::io::{Io, Op, Segment, Status, Tag};
use crate::memory::{self, Stores};

/// Size of the aligned buffer, and so of a piece that goes through it.
const BOUNCE: usize = 64 << 10;

/// Alignment of the aligned buffer: enough for every device (kernel: at most a page).
pub(super) const BOUNCE_ALIGN: usize = 4096;

/// The kernel takes no more segments at once (`UIO_MAXIOV`).
const SEGMENTS_MAX: u32 = 1024;

/// The kernel transfers no more at once (`MAX_RW_COUNT`), so that more would come back short.
const TRANSFER_MAX: u64 = 0x7fff_f000;

/// The file, in the ring's table.
const FILE: types::Fixed = types::Fixed(0);

#[derive(Clone)]
#[repr(C, align(4096))]
struct Page([u8; BOUNCE_ALIGN]);

/// Zeroes to write where the file system cannot make any itself.
static ZEROES: [Page; BOUNCE / BOUNCE_ALIGN] = [const { Page([0; BOUNCE_ALIGN]) }; _];

/// What the entry that is with the kernel does for its I/O.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Work {
    /// All of a read or write.
    Whole,
    /// All of a flush or unmap.
    Plain,
    /// All of a write-zeroes.
    ZeroRange,
    /// A piece of a write-zeroes, as a write.
    ZeroWrite,
    /// A piece of a read or write, through the aligned buffer.
    Bounce,
}

#[derive(Clone, Copy)]
struct Slot {
    io: Io,
    work: Work,
    /// Bytes that earlier entries did.
    done: u64,
}

/// What comes after an entry has completed.
pub(super) enum Next {
    /// The I/O goes on with this entry.
    Entry(Entry),
    /// The I/O has ended.
    Ended(Status),
}

/// The I/Os of one channel, by tag. Makes ring entries, and judges what came of them.
pub(super) struct Steps {
    slots: Box<[Option<Slot>]>,
    direct: Option<Alignment>,
    /// The aligned buffer. Pieces go through it one at a time.
    bounce: Box<[Page]>,
    /// Whose turn with the aligned buffer it is (front), and who comes after.
    bouncing: VecDeque<Tag>,
    /// The file system can zero a range, as far as is known.
    zero_range: bool,
    /// By tag: why an I/O failed, until somebody asks.
    failures: Failures,
    /// The callers' memory is not accessed any more.
    abandoned: bool,
}

impl Steps {
    pub(super) fn new(depth: u16, direct: Option<Alignment>) -> Self {
        let mut bounce = vec![Page([0; BOUNCE_ALIGN]); BOUNCE / BOUNCE_ALIGN].into_boxed_slice();
        for page in &mut bounce {
            let first: *mut u8 = &raw mut page.0[0];
            // Makes the page present, or the reactor would take a page fault.
            // SAFETY: a byte of the page.
            unsafe { first.write_volatile(0) };
        }
        Self {
            slots: vec![None; depth.into()].into_boxed_slice(),
            direct,
            bounce,
            bouncing: VecDeque::with_capacity(depth.into()),
            zero_range: true,
            failures: Failures::new(depth),
            abandoned: false,
        }
    }

    /// Takes an I/O whose range has been checked. `Ok(None)`: it waits for the aligned
    /// buffer. `Err`: the tag is out of range or taken, which the caller owes us not to do.
    ///
    /// # Safety
    /// As [`crate::Channel::submit`].
    pub(super) unsafe fn begin(&mut self, io: Io) -> Result<Option<Entry>, Status> {
        let work = match io.op {
            Op::Read | Op::Write => {
                // SAFETY: the caller vouches for the segments.
                let whole = unsafe { self.goes_whole(&io) };
                if whole { Work::Whole } else { Work::Bounce }
            }
            Op::Flush | Op::Unmap => Work::Plain,
            Op::WriteZeroes if self.zero_range => Work::ZeroRange,
            Op::WriteZeroes => Work::ZeroWrite,
        };
        match self.slots.get_mut(usize::from(io.tag.0)) {
            Some(slot @ None) => *slot = Some(Slot { io, work, done: 0 }),
            _ => return Err(Status::IoError),
        }
        if work == Work::Bounce {
            self.bouncing.push_back(io.tag);
            if self.bouncing.len() > 1 {
                return Ok(None);
            }
        }
        // SAFETY: the caller vouches for the segments.
        Ok(unsafe { self.entry(io.tag) })
    }

    /// From now on nothing is copied: an I/O that goes through the aligned buffer ends with its
    /// entry in flight.
    pub(super) fn abandon(&mut self) {
        self.abandoned = true;
    }

    /// Forgets an I/O that the ring had no room for.
    pub(super) fn take_back(&mut self, tag: Tag) {
        if let Some(slot) = self.slots.get_mut(usize::from(tag.0)) {
            *slot = None;
        }
        // It came last, or it would wait and have no entry.
        if self.bouncing.back() == Some(&tag) {
            self.bouncing.pop_back();
        }
    }

    /// Goes on with an I/O whose entry has completed with `result`: bytes, or an errno below 0.
    ///
    /// # Safety
    /// The I/O has not been reported, so that its memory is valid.
    pub(super) unsafe fn advance(&mut self, tag: Tag, result: i32) -> Next {
        let Some(Some(slot)) = self.slots.get_mut(usize::from(tag.0)) else {
            debug_assert!(false, "completion of {tag:?}, which is not outstanding");
            return Next::Ended(Status::IoError);
        };
        let status = match slot.work {
            Work::Whole if i64::from(result) == slot.io.len as i64 => Status::Ok,
            // A short transfer too.
            Work::Whole => Status::IoError,
            Work::Plain | Work::ZeroRange if result == 0 => Status::Ok,
            Work::ZeroRange if refused(result) => {
                self.zero_range = false;
                slot.work = Work::ZeroWrite;
                // SAFETY: the caller vouches for the I/O.
                return unsafe { self.next_entry(tag) };
            }
            Work::Plain if refused(result) => Status::Unsupported,
            Work::Plain | Work::ZeroRange => Status::IoError,
            Work::ZeroWrite | Work::Bounce => {
                let piece = piece(slot);
                if self.abandoned || i64::from(result) != piece as i64 {
                    Status::IoError
                } else {
                    if slot.work == Work::Bounce && slot.io.op == Op::Read {
                        let from = self.bounce.as_ptr().cast();
                        // SAFETY: the caller vouches for the segments.
                        let segments = unsafe { slot.io.segments() };
                        // SAFETY: the buffer is larger than a piece, and our own.
                        unsafe { memory::scatter(segments, slot.done, from, piece) };
                    }
                    slot.done += piece as u64;
                    if slot.done < slot.io.len {
                        // SAFETY: the caller vouches for the I/O.
                        return unsafe { self.next_entry(tag) };
                    }
                    Status::Ok
                }
            }
        };
        if status != Status::Ok {
            let io = slot.io;
            // If all bytes were requested, a smaller count is a short transfer.
            self.note_failure(&io, result.min(0).saturating_neg());
        }
        self.end(tag);
        Next::Ended(status)
    }

    /// Records why an I/O fails.
    #[cold]
    pub(super) fn note_failure(&mut self, io: &Io, errno: i32) {
        self.failures.note(io, errno);
    }

    /// Why an I/O failed; only the first call gets the answer.
    pub(super) fn failure(&mut self, tag: Tag) -> Option<Failure> {
        self.failures.take(tag)
    }

    /// The entry of the I/O that waits for the aligned buffer, if that has just become free.
    /// To be asked each time that an I/O has ended.
    ///
    /// # Safety
    /// As for `advance`.
    pub(super) unsafe fn unblocked(&mut self, ended: Tag) -> Option<Entry> {
        if self.bouncing.front() != Some(&ended) {
            return None;
        }
        self.bouncing.pop_front();
        let next = *self.bouncing.front()?;
        // SAFETY: it waits, so it has not been reported.
        unsafe { self.entry(next) }
    }

    fn end(&mut self, tag: Tag) {
        if let Some(slot) = self.slots.get_mut(usize::from(tag.0)) {
            *slot = None;
        }
    }

    /// Whether the kernel can take a read or write as it is.
    ///
    /// # Safety
    /// The segments are alive.
    unsafe fn goes_whole(&self, io: &Io) -> bool {
        if io.iovecs().1 > SEGMENTS_MAX || io.len > TRANSFER_MAX {
            return false;
        }
        let Some(Alignment { memory, length }) = self.direct else { return true };
        // SAFETY: the caller vouches for it.
        let segments = unsafe { io.segments() };
        let odd = |s: &Segment| s.base() as usize & (memory - 1) | s.len() & (length - 1);
        segments.iter().all(|segment| odd(segment) == 0)
    }

    /// # Safety
    /// As for `advance`.
    unsafe fn next_entry(&mut self, tag: Tag) -> Next {
        // SAFETY: the caller vouches for it.
        match unsafe { self.entry(tag) } {
            Some(entry) => Next::Entry(entry),
            None => Next::Ended(Status::IoError),
        }
    }

    /// The ring entry for what the I/O has to do next.
    ///
    /// # Safety
    /// As for `advance`.
    unsafe fn entry(&mut self, tag: Tag) -> Option<Entry> {
        let slot = self.slots.get(usize::from(tag.0))?.as_ref()?;
        let Slot { io, work, done } = slot;
        let at = io.offset + done;
        let entry = match (work, io.op) {
            (Work::Whole, op) => {
                let (iovecs, count) = io.iovecs();
                // SAFETY: the caller vouches for the segments.
                let segments = unsafe { io.segments() };
                match (op, segments) {
                    // The kernel has less to do for one piece than for a list of one.
                    (Op::Read, [one]) => {
                        opcode::Read::new(FILE, one.base(), one.len() as u32).offset(at).build()
                    }
                    (Op::Write, [one]) => {
                        opcode::Write::new(FILE, one.base(), one.len() as u32).offset(at).build()
                    }
                    (Op::Read, _) => opcode::Readv::new(FILE, iovecs, count).offset(at).build(),
                    (_, _) => opcode::Writev::new(FILE, iovecs, count).offset(at).build(),
                }
            }
            (Work::Plain, Op::Flush) => {
                opcode::Fsync::new(FILE).flags(types::FsyncFlags::DATASYNC).build()
            }
            (Work::Plain, _) => fallocate(libc::FALLOC_FL_PUNCH_HOLE, io),
            (Work::ZeroRange, _) => fallocate(libc::FALLOC_FL_ZERO_RANGE, io),
            (Work::ZeroWrite, _) => {
                opcode::Write::new(FILE, ZEROES.as_ptr().cast(), piece(slot) as u32)
                    .offset(at)
                    .build()
            }
            (Work::Bounce, _) if self.abandoned => opcode::Nop::new().build(),
            (Work::Bounce, op) => {
                let buffer: *mut u8 = self.bounce.as_mut_ptr().cast();
                let len = piece(slot);
                if op == Op::Read {
                    opcode::Read::new(FILE, buffer, len as u32).offset(at).build()
                } else {
                    // SAFETY: the caller vouches for the segments.
                    let segments = unsafe { io.segments() };
                    // SAFETY: the buffer is larger than a piece, and nobody else's now.
                    unsafe { memory::gather(segments, *done, buffer, len, Stores::Cached) };
                    opcode::Write::new(FILE, buffer, len as u32).offset(at).build()
                }
            }
        };
        Some(entry.user_data(u64::from(tag.0)))
    }
}

/// Length of the piece that comes next.
fn piece(slot: &Slot) -> usize {
    (slot.io.len - slot.done).min(BOUNCE as u64) as usize
}

fn fallocate(mode: i32, io: &Io) -> Entry {
    opcode::Fallocate::new(FILE, io.len)
        .offset(io.offset)
        .mode(mode | libc::FALLOC_FL_KEEP_SIZE)
        .build()
}

/// Whether the file system or the device says that it has no such operation.
fn refused(result: i32) -> bool {
    matches!(-result, libc::EOPNOTSUPP | libc::EINVAL | libc::ENOSYS | libc::ENODEV)
}
