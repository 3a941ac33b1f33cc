//! Requests of virtio-blk (section 5.2.6 of the virtio specification).

use bdev::{Io, Op};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
};

use crate::memory::CHUNK;

/// The unit of addresses, in bytes.
pub(crate) const SECTOR: u64 = 512;

/// The most bytes that a server accepts in one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Limits {
    pub(crate) transfer: u64,
    pub(crate) discard: u64,
    pub(crate) write_zeroes: u64,
}

impl Limits {
    /// Limits of whole sectors, from the server's limits (0: it has none) and from what a bounce
    /// buffer or a request can hold.
    pub(crate) fn new(transfer: u64, discard: u64, write_zeroes: u64) -> Self {
        /// The most sectors that a request can name.
        const RANGE_MAX: u64 = u32::MAX as u64 * SECTOR;
        let given = |limit: u64, max: u64| if limit == 0 { max } else { limit.min(max) };
        let whole = |limit: u64| (limit / SECTOR * SECTOR).max(SECTOR);
        Self {
            transfer: whole(given(transfer, CHUNK as u64)),
            discard: whole(given(discard, RANGE_MAX)),
            write_zeroes: whole(given(write_zeroes, RANGE_MAX)),
        }
    }
}

/// A part of an I/O that is one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    /// From the start of the I/O, in bytes.
    pub(crate) offset: u64,
    /// In bytes; 0 for a flush.
    pub(crate) len: u64,
}

impl Piece {
    /// The piece of an I/O that starts at `offset`.
    pub(crate) fn of(io: &Io, offset: u64, limits: Limits) -> Self {
        let max = match io.op {
            Op::Read | Op::Write => limits.transfer,
            Op::Unmap => limits.discard,
            Op::WriteZeroes => limits.write_zeroes,
            Op::Flush => 0,
        };
        Self { offset, len: (io.len - offset).min(max) }
    }

    /// The length of a piece of a read or write.
    pub(crate) fn bytes(self) -> usize {
        debug_assert!(self.len <= CHUNK as u64);
        usize::try_from(self.len).unwrap_or(CHUNK).min(CHUNK)
    }
}

/// Returns the header of a piece's request, and the range that is the data of a discard or
/// write-zeroes.
pub(crate) fn header(io: &Io, piece: Piece) -> ([u8; 16], Option<[u8; 16]>) {
    let kind = match io.op {
        Op::Read => VIRTIO_BLK_T_IN,
        Op::Write => VIRTIO_BLK_T_OUT,
        Op::Flush => VIRTIO_BLK_T_FLUSH,
        Op::Unmap => VIRTIO_BLK_T_DISCARD,
        Op::WriteZeroes => VIRTIO_BLK_T_WRITE_ZEROES,
    };
    let sector = (io.offset + piece.offset) / SECTOR;
    let of_data = matches!(io.op, Op::Read | Op::Write);
    let mut header = [0; 16];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    header[8..].copy_from_slice(&if of_data { sector } else { 0 }.to_le_bytes());
    let range = matches!(io.op, Op::Unmap | Op::WriteZeroes).then(|| {
        let sectors = u32::try_from(piece.len / SECTOR).unwrap_or(u32::MAX);
        // Bit 0 of the flags: the range may be unmapped. Section 5.2.6.2 forbids it for a discard.
        let flags = u32::from(io.op == Op::WriteZeroes && io.may_unmap);
        let mut range = [0; 16];
        range[..8].copy_from_slice(&sector.to_le_bytes());
        range[8..12].copy_from_slice(&sectors.to_le_bytes());
        range[12..].copy_from_slice(&flags.to_le_bytes());
        range
    });
    (header, range)
}

#[cfg(test)]
mod tests {
    use super::*;
    use bdev::Tag;

    #[test]
    fn an_io_is_cut_at_the_servers_limits() {
        let limits = Limits::new(0, 4096, 1000);
        assert_eq!((limits.transfer, limits.discard, limits.write_zeroes), (65536, 4096, 512));
        let of = |op, len| {
            let io = Io::plain(op, Tag(0), 1 << 20, len);
            let mut pieces = vec![];
            let mut at = 0;
            while at < len {
                pieces.push(Piece::of(&io, at, limits).len);
                at += pieces[pieces.len() - 1];
            }
            pieces
        };
        assert_eq!(of(Op::Unmap, 10_240), [4096, 4096, 2048]);
        assert_eq!(of(Op::WriteZeroes, 1024), [512, 512]);
        let flush = Io::plain(Op::Flush, Tag(0), 0, 0);
        assert_eq!(Piece::of(&flush, 0, limits), Piece { offset: 0, len: 0 });
    }

    #[test]
    fn headers_name_sectors() {
        let piece = Piece { offset: 4096, len: 1024 };
        let zeroes = Io::plain(Op::WriteZeroes, Tag(0), 1 << 20, 8192).unmapping(true);
        let (header_of, range) = header(&zeroes, piece);
        assert_eq!(header_of[..4], 13_u32.to_le_bytes());
        assert_eq!(header_of[8..], [0; 8]);
        let range = range.unwrap();
        assert_eq!(range[..8], 2056_u64.to_le_bytes());
        assert_eq!((range[8..12].to_vec(), range[12]), (2_u32.to_le_bytes().to_vec(), 1));
        let discard = Io::plain(Op::Unmap, Tag(0), 0, 8192).unmapping(true);
        assert_eq!(header(&discard, piece).1.unwrap()[12], 0);
    }
}
