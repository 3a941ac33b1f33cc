//! The memory of requests: a readable and a writable part for each.

use std::sync::Arc;

use super::response::UNWRITTEN;
use crate::error::{Error, Result};
use crate::guest::{GuestRam, Segment};

/// The memory of one request.
#[derive(Clone, Copy, Debug)]
pub(super) struct Frame {
    /// What the device reads.
    pub(super) readable: Segment,
    /// What the device writes.
    pub(super) writable: Segment,
}

/// The memory of a queue's requests.
#[derive(Debug)]
pub(super) struct Frames {
    ram: Arc<GuestRam>,
    free: Vec<Frame>,
}

impl Frames {
    /// Allocates memory for `count` requests, with these numbers of bytes for each.
    pub(super) fn new(
        ram: &Arc<GuestRam>,
        count: u16,
        readable: u32,
        writable: u32,
    ) -> Result<Self> {
        let frame = || {
            let (readable, writable) = (ram.alloc(readable, 64)?, ram.alloc(writable, 64)?);
            Ok(Frame { readable, writable })
        };
        let free = (0..count).map(|_| frame()).collect::<Result<_>>()?;
        Ok(Self { ram: Arc::clone(ram), free })
    }

    /// Returns the guest memory that they are in.
    pub(super) fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    /// Takes the memory of one request. Writes `bytes` to its readable part, and marks the first
    /// `unwritten` bytes of its writable part as not written.
    pub(super) fn take(&mut self, bytes: &[u8], unwritten: u32) -> Result<Frame> {
        let frame = self.free.pop().ok_or(Error::Full)?;
        self.ram.write(frame.readable.gpa, bytes)?;
        self.ram.write(frame.writable.gpa, &vec![UNWRITTEN; unwritten as usize])?;
        Ok(frame)
    }

    /// Gives the memory of a request back. A frame without a readable part was not taken here: it
    /// names the memory of a caller's chain.
    pub(super) fn give_back(&mut self, frame: Frame) {
        if frame.readable.len > 0 {
            self.free.push(frame);
        }
    }
}

/// Returns a segment in pieces of at most `most` bytes.
pub(super) fn pieces(segment: Segment, most: u32) -> impl Iterator<Item = Segment> {
    let Segment { gpa, len } = segment;
    let most = most.max(1);
    (0..len.div_ceil(most)).map(move |n| {
        let at = n * most;
        Segment::new(gpa + u64::from(at), most.min(len - at))
    })
}

/// Returns the first `len` bytes of a segment.
pub(super) fn front(segment: Segment, len: u32) -> Segment {
    Segment::new(segment.gpa, len.min(segment.len))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_add_up_to_the_segment() {
        let of = |len, most| pieces(Segment::new(100, len), most).collect::<Vec<_>>();
        assert_eq!(of(5, 2), [(100, 2), (102, 2), (104, 1)].map(|(gpa, n)| Segment::new(gpa, n)));
        assert_eq!(of(5, u32::MAX), [Segment::new(100, 5)]);
        assert_eq!(of(0, 3), []);
    }
}
