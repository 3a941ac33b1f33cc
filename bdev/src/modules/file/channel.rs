//! The I/O path to a file: an engine for I/O that does not wait, and the disk's workers for the
//! rest.
#![expect(unsafe_code, reason = "passes a guest's memory on")]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;

use closer::Account;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::aio::Aio;
use super::backing::Opened;
use super::blocking::goes_whole;
use super::engine::{Engine, NoEngine, Submitter};
use super::uring::Uring;
use super::{FileDisk, Flavour};
use crate::contract::{Bdev, Channel, Wait, WakeFds};
use crate::failure::{Failure, FailureKind};
use crate::geometry::within;
use crate::io::{Completion, Io, Op, Segment, Status, Submit, Tag};
use crate::line::Line;
use crate::outstanding::Outstanding;

/// The largest io_uring that the kernel makes (`IORING_MAX_ENTRIES`).
const DEPTH_MAX: u16 = 32768;

/// Opens the I/O path for one owner, with the disk's engine. If the system has no resources for it
/// (`fs.aio-max-nr` is reached, no memory), uses another engine, and in the last resort worker
/// threads only.
pub(super) fn open(disk: Arc<FileDisk>, depth: u16) -> io::Result<Box<dyn Channel>> {
    if depth == 0 || depth > DEPTH_MAX {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    let line = Line::new(depth)?;
    let source =
        Source { file: disk.file(), is_device: disk.is_block_device(), closer: &disk.closer };
    let mut engines = disk.engine.and_other().iter();
    let opened = engines.find_map(|engine| AnyEngine::open(*engine, source, depth, &line).ok());
    Ok(match opened {
        Some(AnyEngine::Aio(aio)) => Box::new(FileChannel::new(disk, aio, line, depth)),
        Some(AnyEngine::Uring(uring)) => Box::new(FileChannel::new(disk, uring, line, depth)),
        None => Box::new(FileChannel::new(disk, NoEngine, line, depth)),
    })
}

/// The file that an engine is opened on.
#[derive(Clone, Copy)]
struct Source<'a> {
    file: &'a File,
    is_device: bool,
    /// The account in which objects are dropped whose drop takes time.
    closer: &'a Account,
}

enum AnyEngine {
    Aio(Aio),
    Uring(Uring),
}

impl AnyEngine {
    fn open(engine: Engine, source: Source<'_>, depth: u16, line: &Arc<Line>) -> io::Result<Self> {
        let Source { file, is_device, closer } = source;
        match engine {
            Engine::Aio => {
                Aio::open(file.as_raw_fd(), is_device, closer, depth, line).map(Self::Aio)
            }
            Engine::IoUring => Uring::open(file.as_fd(), depth).map(Self::Uring),
            Engine::Threads => Err(io::ErrorKind::Unsupported.into()),
        }
    }
}

/// Returns the first of these engines that the system allows, if the file can be read without
/// waiting. Tests this with a read of the file's first block.
pub(super) fn first_that_works(file: &Opened, closer: &Account, engines: &[Engine]) -> Engine {
    let works = |engine: &&Engine| match probe(**engine, file, closer) {
        // The read would have waited, or the block is bad. Neither is a fault of the engine.
        Ok(result) => -result != libc::EOPNOTSUPP && -result != libc::EINVAL,
        Err(_) => false,
    };
    engines.iter().find(works).copied().unwrap_or(Engine::Threads)
}

/// Reads the first block through an engine. Returns the number of bytes, or a negative errno.
fn probe(engine: Engine, file: &Opened, closer: &Account) -> io::Result<i32> {
    let line = Line::new(1)?;
    let source = Source { file: &file.file, is_device: file.storage.is_block_device(), closer };
    match AnyEngine::open(engine, source, 1, &line)? {
        AnyEngine::Aio(aio) => read_first_block(aio, &line, file),
        AnyEngine::Uring(uring) => read_first_block(uring, &line, file),
    }
}

fn read_first_block(mut engine: impl Submitter, line: &Line, file: &Opened) -> io::Result<i32> {
    let len = file.block_size as usize;
    let alignment = file.direct.map_or(1, |direct| direct.memory);
    let mut memory = vec![0_u8; len + alignment];
    let start = memory.as_ptr().align_offset(alignment);
    let segments = [Segment::new(memory.as_mut_ptr().wrapping_add(start), len)];
    let read = Io::rw(Op::Read, Tag(0), 0, len as u64, &segments);
    // SAFETY: the memory is valid until the read has ended, below.
    unsafe { engine.push(&read) };
    loop {
        engine.kick();
        engine.refresh();
        if let Some((_, result)) = engine.next() {
            return Ok(result);
        }
        let wake = engine.wake_fd();
        let fds = [Some(line.wake_fd()), wake].into_iter().flatten();
        let mut fds: Vec<_> = fds.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)).collect();
        // An error (a signal) counts as an event. The engine resubmits I/O that the kernel has not
        // taken.
        let _ = poll(&mut fds, engine.is_behind().then_some(&RETRY));
    }
}

/// How long a probe waits before it resubmits I/O that the kernel has not taken.
const RETRY: Timespec = Timespec { tv_sec: 0, tv_nsec: 1_000_000 };

/// The I/O path to a file.
struct FileChannel<E> {
    engine: E,
    line: Arc<Line>,
    disk: Arc<FileDisk>,
    /// The outstanding I/Os, by tag.
    outstanding: Outstanding,
    /// The numbers of outstanding I/Os in the engine and at the workers.
    fast: usize,
    slow: usize,
    /// The number of I/Os at the workers that are not announced to them yet.
    unannounced: u64,
    /// Whether reads and writes may be tried without waiting.
    nowait_reads: bool,
    nowait_writes: bool,
}

impl<E: Submitter> FileChannel<E> {
    fn new(disk: Arc<FileDisk>, engine: E, line: Arc<Line>, depth: u16) -> Self {
        disk.workers.add(&line);
        let (nowait_reads, nowait_writes) = engine.nowait();
        Self {
            engine,
            line,
            disk,
            outstanding: Outstanding::new(depth),
            fast: 0,
            slow: 0,
            unannounced: 0,
            nowait_reads,
            nowait_writes,
        }
    }
}

impl<E: Submitter> Channel for FileChannel<E> {
    #[inline]
    unsafe fn submit(&mut self, io: Io) -> Submit {
        let writes = matches!(io.op, Op::Write | Op::Unmap | Op::WriteZeroes);
        if !within(&io, self.disk.size_bytes()) || writes && self.disk.readonly {
            let refused = writes && self.disk.readonly;
            return self.outstanding.refuse(&io, if refused { libc::EROFS } else { libc::EINVAL });
        }
        if io.op == Op::Unmap && !self.disk.features.unmap {
            return self.outstanding.refuse(&io, libc::EOPNOTSUPP);
        }
        if io.len == 0 && io.op != Op::Flush {
            return Submit::Done(Status::Ok);
        }
        if !self.outstanding.add(&io) {
            return Submit::Done(Status::IoError);
        }
        let nowait = match io.op {
            Op::Read => self.nowait_reads,
            Op::Write => self.nowait_writes,
            Op::Flush | Op::Unmap | Op::WriteZeroes => false,
        };
        // SAFETY: the caller guarantees that the segments are valid.
        if nowait && unsafe { goes_whole(&io, self.disk.direct) } {
            self.fast += 1;
            // SAFETY: the caller guarantees that the memory is valid until the I/O is reported, and
            // the tag unique.
            unsafe { self.engine.push(&io) };
        } else {
            self.hand_over(io);
        }
        Submit::Queued
    }

    fn wake_fds(&self) -> WakeFds<'_> {
        let own = Some(self.line.wake_fd());
        own.into_iter().chain(self.engine.wake_fd()).collect()
    }

    fn set_wakes(&mut self, wakes: bool) {
        self.engine.set_wakes(wakes);
    }

    fn wait(&self) -> Wait {
        // The next poll resubmits I/O that the kernel has not taken.
        let poll = self.engine.is_behind() || self.engine.is_quiet() || self.unannounced > 0;
        let has_result = || self.slow > 0 && !self.line.may_wait();
        if poll || has_result() { Wait::Poll } else { Wait::Event }
    }

    fn failure(&mut self, tag: Tag) -> Option<Failure> {
        let aio = self.disk.flavour == Flavour::Aio;
        let kind = if aio { FailureKind::Aio } else { FailureKind::Failed };
        self.outstanding.failure(tag).map(|failure| Failure { kind, ..failure })
    }

    #[inline]
    fn kick(&mut self) {
        self.engine.kick();
        if self.unannounced > 0 {
            self.announce();
        }
    }

    fn abandon(&mut self) {
        self.line.abandon();
    }

    #[inline]
    fn poll(&mut self, done: &mut [Completion]) -> usize {
        if self.fast + self.slow == 0 {
            return 0;
        }
        self.kick();
        let mut n = 0;
        if self.fast > 0 {
            self.engine.refresh();
            while n < done.len() {
                let Some((tag, result)) = self.engine.next() else { break };
                if let Some(status) = self.judge(tag, result) {
                    done[n] = Completion { tag, status };
                    n += 1;
                }
            }
            if self.unannounced > 0 {
                self.announce();
            }
        }
        if self.slow > 0 {
            n += self.poll_workers(&mut done[n..]);
        }
        n
    }
}

impl<E> FileChannel<E> {
    /// Passes an I/O to the workers.
    #[cold]
    fn hand_over(&mut self, io: Io) {
        self.line.push(io);
        self.slow += 1;
        self.unannounced += 1;
    }

    #[cold]
    fn announce(&mut self) {
        self.disk.workers.announce(std::mem::take(&mut self.unannounced));
    }

    /// Returns the status of an I/O that the engine has tried; `None` if the workers must do it.
    #[inline]
    fn judge(&mut self, tag: Tag, result: i32) -> Option<Status> {
        self.fast -= 1;
        let slot = self.outstanding.slot(tag);
        if let Some(slot) = slot
            && slot.as_ref().is_some_and(|io| i64::from(result) == io.len as i64)
        {
            *slot = None;
            return Some(Status::Ok);
        }
        self.judge_failed(tag, result)
    }

    #[cold]
    fn judge_failed(&mut self, tag: Tag, result: i32) -> Option<Status> {
        let slot = self.outstanding.slot(tag);
        let Some((slot, io)) = slot.and_then(|slot| slot.map(|io| (slot, io))) else {
            debug_assert!(false, "completion of {tag:?}, which is not outstanding");
            return Some(Status::IoError);
        };
        match -result {
            // The rest of a short transfer would have waited, unless the file has ended.
            libc::EAGAIN | ..=0 => {
                self.hand_over(io);
                None
            }
            // The file system never does this I/O without waiting.
            libc::EOPNOTSUPP => {
                let nowait = if io.op == Op::Read {
                    &mut self.nowait_reads
                } else {
                    &mut self.nowait_writes
                };
                *nowait = false;
                self.hand_over(io);
                None
            }
            errno => {
                *slot = None;
                self.outstanding.note(&io, errno);
                Some(Status::IoError)
            }
        }
    }

    #[inline(never)]
    fn poll_workers(&mut self, done: &mut [Completion]) -> usize {
        let n = self.outstanding.collect(&self.line, done);
        self.slow -= n;
        n
    }
}

impl<E> Drop for FileChannel<E> {
    fn drop(&mut self) {
        self.disk.workers.remove(&self.line);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::modules::file::FileOptions;

    /// Simulates that other processes have used up the resources for AIO and io_uring after the
    /// disk was made.
    #[test]
    fn a_channel_without_an_engine_passes_all_io_to_the_workers() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        let disk = FileDisk::create(FileOptions {
            name: "f".into(),
            filename: file.path().into(),
            block_size: Some(4096),
            readonly: false,
            fallocate: false,
            uuid: None,
            flavour: Flavour::Uring,
            engine: None,
        });
        let mut channel = FileChannel::new(disk.unwrap(), NoEngine, Line::new(1).unwrap(), 1);
        let mut memory = vec![1_u8; 2 * 4096];
        let start = memory.as_ptr().align_offset(4096);
        let segments = [Segment::new(memory.as_mut_ptr().wrapping_add(start), 4096)];
        let read = Io::rw(Op::Read, Tag(0), 0, 4096, &segments);
        // SAFETY: the memory outlives the read.
        assert!(matches!(unsafe { channel.submit(read) }, Submit::Queued));
        let mut done = [Completion { tag: Tag(9), status: Status::IoError }];
        while channel.poll(&mut done) == 0 {
            std::thread::yield_now();
        }
        assert_eq!(done[0], Completion { tag: Tag(0), status: Status::Ok });
        assert!(memory[start..start + 4096].iter().all(|byte| *byte == 0));
    }
}
