//! A disk's channel without a queue before it.
#![expect(unsafe_code, reason = "submits I/O")]

use std::hint::black_box;
use std::sync::Arc;

use bdev::{Bdev, Channel, Completion, Io, Op, Segment, Status, Submit, Tag};

use super::disks::DISK_BYTES;

/// Polls after which an I/O that has not come back never will.
const POLLS_MAX: u32 = 1 << 28;

/// Memory as direct I/O wants it.
#[derive(Clone)]
#[repr(C, align(4096))]
struct Page([u8; 4096]);

/// A channel, and memory for as many I/Os as it may have.
pub(crate) struct Line {
    channel: Box<dyn Channel>,
    /// One for each I/O, in `memory`.
    segments: Vec<[Segment; 1]>,
    done: Vec<Completion>,
    len: u64,
    _memory: Vec<Page>,
}

impl Line {
    /// For `depth` I/Os of `len` bytes, whole pages, at a time.
    pub(crate) fn new(bdev: &Arc<dyn Bdev>, depth: u16, len: u64) -> Self {
        let bytes = usize::try_from(len).unwrap();
        let pages = bytes / size_of::<Page>();
        let mut memory = vec![Page([0x5a; 4096]); pages * usize::from(depth)];
        let segments =
            memory.chunks_mut(pages).map(|at| [Segment::new(at.as_mut_ptr().cast(), bytes)]);
        let (segments, none) = (segments.collect(), Completion { tag: Tag(0), status: Status::Ok });
        let channel = Arc::clone(bdev).open(depth).unwrap();
        Self { channel, segments, done: vec![none; depth.into()], len, _memory: memory }
    }

    /// Submits as many I/Os as there may be, kicks, and polls until all are done.
    pub(crate) fn run(&mut self, op: Op) {
        let mut left = self.segments.len();
        for (n, segments) in (0..).zip(&self.segments) {
            let offset = u64::from(n) * self.len % DISK_BYTES;
            let io = Io::rw(op, Tag(n), offset, self.len, segments);
            // SAFETY: segments and memory are `self`'s, and `run` ends after the last completion.
            match unsafe { self.channel.submit(io) } {
                Submit::Done(status) => {
                    assert_eq!(status, Status::Ok);
                    left -= 1;
                }
                Submit::Queued => {}
                Submit::Full(_) | Submit::Throttled(_) => {
                    unreachable!("the channel was opened for so many")
                }
            }
        }
        self.channel.kick();
        let mut polls = 0;
        while left > 0 {
            let n = self.channel.poll(&mut self.done);
            assert!(black_box(&self.done[..n]).iter().all(|done| done.status == Status::Ok));
            left -= n;
            polls += 1;
            assert!(polls < POLLS_MAX, "an I/O is lost");
        }
    }
}
