//! The parts of a request's chain: header, data-out, response, data-in, in any layout of the
//! descriptors (virtio 1.2, section 2.7.4).
#![expect(unsafe_code, reason = "reads and writes guest memory")]

use std::sync::atomic::{AtomicU64, Ordering};

use bdev::memory;
use guest_memory::{Segment, usize_of};
use scsi::Buffers;
use virtqueue::cache;
use virtqueue::chain::{Chain, Totals};

use crate::wire::{HEADER_BYTES, Header, RESPONSE_BYTES, RESPONSE_HEAD_BYTES, SENSE_BYTES};

/// Where the parts of a request are in the segments of its chain. The header has been removed. If
/// the response ends inside a segment, this is segment `data_in`, and the last `cut` bytes of the
/// response have been removed from its front. Otherwise `cut` is 0.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Parts {
    /// The first segment of data-out. Its last one is the last readable segment.
    data_out: u16,
    /// The first segment of the response.
    response: u16,
    /// The first segment of data-in. Its last one is the last segment.
    data_in: u16,
    cut: u8,
    end: u16,
}

/// A request that cannot be executed.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Malformed {
    /// The chain is invalid, or has no room for a response.
    NoResponse,
    /// The readable part is shorter than a header.
    NoHeader(Parts),
}

/// A number of a segment. A chain has some 1,000 at most.
fn short(n: usize) -> u16 {
    u16::try_from(n).unwrap_or(u16::MAX)
}

impl Parts {
    /// Finds the parts, and takes the header. Returns also the lengths of the data buffers.
    ///
    /// # Errors
    /// See [`Malformed`].
    #[inline]
    pub(crate) fn take(chain: &mut Chain) -> Result<(Header, Self, Buffers), Malformed> {
        let of_chain = chain.parts();
        let Totals { readable, count, malformed, .. } = *of_chain.totals;
        if malformed || readable == 0 || readable >= count {
            return Self::take_any(chain);
        }
        let (first, response) = (of_chain.segments[0], of_chain.segments[readable]);
        let words: *const AtomicU64 = first.base().cast();
        let is_common = first.len() == HEADER_BYTES && response.len() == RESPONSE_BYTES;
        if !is_common || !words.is_aligned() {
            return Self::take_any(chain);
        }
        // Fetches the response's two cache lines for writing while the command is executed.
        cache::prefetch_write(response.base());
        cache::prefetch_write(response.base().wrapping_add(RESPONSE_BYTES - 1));
        // SAFETY: `words` is aligned. The segment is longer than the words, and is guest memory that
        // stays mapped while the chain is in use.
        let header = unsafe { header_at(words) };
        let (response, end) = (short(readable), short(count));
        let parts = Self { data_out: 1, response, data_in: response + 1, cut: 0, end };
        let buffers = Buffers {
            data_in: of_chain.totals.writable_bytes() - RESPONSE_BYTES as u64,
            data_out: of_chain.totals.readable_bytes - HEADER_BYTES as u64,
        };
        Ok((header, parts, buffers))
    }

    /// Returns the header, if it is in a descriptor of its own and there is no data-out. Only for
    /// prefetching: the guest may change it before it is taken.
    #[inline]
    pub(crate) fn peek(chain: &Chain) -> Option<Header> {
        let words: *const AtomicU64 = chain.lone_readable(HEADER_BYTES)?.cast();
        // SAFETY: as in `take`.
        words.is_aligned().then(|| unsafe { header_at(words) })
    }

    /// As [`Parts::take`], for any layout.
    #[cold]
    #[inline(never)]
    fn take_any(chain: &mut Chain) -> Result<(Header, Self, Buffers), Malformed> {
        let mut of_chain = chain.parts();
        let totals = *of_chain.totals;
        let writable = totals.writable_bytes();
        if totals.malformed || writable < RESPONSE_BYTES as u64 {
            return Err(Malformed::NoResponse);
        }
        let (mut data_in, mut left) = (totals.readable, RESPONSE_BYTES);
        let mut cut = 0;
        while left > 0 {
            // The writable part is long enough.
            let segment = &mut of_chain.segments[data_in];
            if segment.len() <= left {
                left -= segment.len();
                data_in += 1;
            } else {
                *segment = Segment::new(segment.base().wrapping_add(left), segment.len() - left);
                // Less than the bytes of a response.
                cut = u8::try_from(left).unwrap_or(u8::MAX);
                left = 0;
            }
        }
        let (response, end) = (short(totals.readable), short(totals.count));
        let parts = Self { data_out: response, response, data_in: short(data_in), cut, end };
        if totals.readable_bytes < HEADER_BYTES as u64 {
            return Err(Malformed::NoHeader(parts));
        }
        let (header, data_out) = of_chain.take_front::<HEADER_BYTES>(0);
        let buffers = Buffers {
            data_in: writable - RESPONSE_BYTES as u64,
            data_out: totals.readable_bytes - HEADER_BYTES as u64,
        };
        let header = Header::of_bytes(&header);
        Ok((header, Self { data_out: short(data_out), ..parts }, buffers))
    }

    /// Returns the segments of data-out.
    #[inline]
    pub(crate) fn data_out<'c>(&self, chain: &'c Chain) -> &'c [Segment] {
        chain.data(self.data_out.into(), usize::from(self.response - self.data_out))
    }

    /// Returns the segments of data-in.
    #[inline]
    pub(crate) fn data_in<'c>(&self, chain: &'c Chain) -> &'c [Segment] {
        chain.data(self.data_in.into(), usize::from(self.end - self.data_in))
    }

    /// Shortens data-in to `bytes`, which it has.
    #[cold]
    pub(crate) fn trim_data_in(&mut self, chain: &mut Chain, bytes: u64) {
        let (first, end) = (usize::from(self.data_in), usize::from(self.end));
        self.end = short(first + trim(&mut chain.parts().segments[first..end], bytes));
    }

    /// Shortens data-out to `bytes`, which it has.
    ///
    /// The chain keeps the segments after these: they are only not part of the result.
    #[cold]
    pub(crate) fn trimmed_data_out<'c>(&self, chain: &'c mut Chain, bytes: u64) -> &'c [Segment] {
        let (first, end) = (usize::from(self.data_out), usize::from(self.response));
        let count = trim(&mut chain.parts().segments[first..end], bytes);
        chain.data(first, count)
    }

    /// Writes a response without sense data.
    #[inline]
    pub(crate) fn respond(&self, chain: &mut Chain, head: [u8; RESPONSE_HEAD_BYTES]) {
        let response = chain.data(self.response.into(), 1)[0];
        if self.cut != 0 || response.len() != RESPONSE_BYTES {
            return self.respond_any(chain, head);
        }
        let to = response.base();
        // SAFETY: the segment is guest memory that stays mapped while the chain is in use, and has
        // as many bytes. An array of bytes is aligned anywhere.
        unsafe { to.cast::<[u8; RESPONSE_HEAD_BYTES]>().write(head) };
        // SAFETY: as above.
        unsafe { memory::zero(to.wrapping_add(RESPONSE_HEAD_BYTES), SENSE_BYTES) };
    }

    /// As [`Parts::respond`], for any layout.
    #[cold]
    #[inline(never)]
    fn respond_any(&self, chain: &mut Chain, head: [u8; RESPONSE_HEAD_BYTES]) {
        let mut bytes = [0; RESPONSE_BYTES];
        bytes[..RESPONSE_HEAD_BYTES].copy_from_slice(&head);
        self.respond_with_sense(chain, &bytes);
    }

    /// Writes a response with sense data.
    #[cold]
    pub(crate) fn respond_with_sense(&self, chain: &mut Chain, response: &[u8; RESPONSE_BYTES]) {
        let (first, end) = (usize::from(self.response), usize::from(self.data_in));
        let segments = if self.cut == 0 {
            chain.data(first, end - first)
        } else {
            self.restore(chain);
            chain.data(first, end - first + 1)
        };
        // SAFETY: the segments are guest memory that stays mapped while the chain is in use, and the
        // array is not guest memory.
        unsafe { memory::scatter(segments, 0, response.as_ptr(), RESPONSE_BYTES) };
    }

    /// Undoes the removal of the last `cut` bytes of the response from segment `data_in`: the dirty
    /// log uses the segments.
    #[cold]
    fn restore(&self, chain: &mut Chain) {
        let cut = usize::from(self.cut);
        let segment = &mut chain.parts().segments[usize::from(self.data_in)];
        *segment = Segment::new(segment.base().wrapping_sub(cut), segment.len() + cut);
    }

    /// Writes bytes to data-in, which has room for them.
    pub(crate) fn put_data_in(&self, chain: &Chain, bytes: &[u8]) {
        let segments = self.data_in(chain);
        // SAFETY: as in `respond_with_sense`.
        unsafe { memory::scatter(segments, 0, bytes.as_ptr(), bytes.len()) };
    }

    /// Reads bytes of data-out, from byte `at` on. It has them.
    pub(crate) fn get_data_out(&self, chain: &Chain, at: u64, bytes: &mut [u8]) {
        let segments = self.data_out(chain);
        let (to, len) = (bytes.as_mut_ptr(), bytes.len());
        // SAFETY: as in `respond_with_sense`, in the other direction.
        unsafe { memory::gather(segments, at, to, len, memory::Stores::Cached) };
    }
}

/// Reads a header.
///
/// # Safety
/// `words` is aligned, and points to the first words of a header in mapped guest memory.
#[inline]
unsafe fn header_at(words: *const AtomicU64) -> Header {
    // SAFETY: the caller's promise. The guest may change the words meanwhile.
    let word = |n| unsafe { &*words.wrapping_add(n) }.load(Ordering::Relaxed);
    Header::of(std::array::from_fn(|n| u64::from_le(word(n))))
}

/// Shortens the last of the segments that have the first `bytes`. Returns the number of these.
fn trim(segments: &mut [Segment], bytes: u64) -> usize {
    let mut left = bytes;
    for (n, segment) in segments.iter_mut().enumerate() {
        let len = segment.len() as u64;
        if len >= left {
            *segment = Segment::new(segment.base(), usize_of(left));
            return n + 1;
        }
        left -= len;
    }
    segments.len()
}
