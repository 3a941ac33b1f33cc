//! Which ranges of an export are allocated (`base:allocation`).

use std::sync::Arc;

use bdev::{Bdev, Error, Extent};
use nbd::protocol::allocation;

/// The maximum number of extents in one reply.
const EXTENTS_MAX: usize = 1024;

/// An extent of a reply: its length in bytes and its flags.
pub(crate) type Described = (u32, u32);

/// Describes the range that begins at `offset`, or its beginning. Neighbours differ in their flags.
/// `offset` and `len` are multiples of the block size, and `len` is not 0.
///
/// # Errors
/// As [`Bdev::extent`].
pub(crate) fn describe(
    bdev: &Arc<dyn Bdev>,
    offset: u64,
    len: u32,
    only_one: bool,
) -> Result<Vec<Described>, Error> {
    let max = if only_one { 1 } else { EXTENTS_MAX };
    let block = u64::from(bdev.block_size());
    let mut extents: Vec<Described> = vec![];
    let mut done = 0;
    // A last extent may grow after the maximum is reached, but the work is bounded.
    for _ in 0..2 * EXTENTS_MAX {
        let left = u64::from(len) - done;
        if left == 0 {
            break;
        }
        let extent = in_blocks(bdev.extent(offset + done, left)?, block, left);
        let flags = if extent.allocated { 0 } else { allocation::HOLE | allocation::ZERO };
        let now = u32::try_from(extent.len).unwrap_or(len);
        let is_full = extents.len() == max;
        match extents.last_mut() {
            Some((total, same)) if *same == flags => *total += now,
            _ if is_full => break,
            _ => extents.push((now, flags)),
        }
        done += extent.len;
    }
    Ok(extents)
}

/// Makes the length a multiple of the block size. A block of which a part is allocated counts as
/// allocated.
fn in_blocks(extent: Extent, block: u64, left: u64) -> Extent {
    let down = extent.len / block * block;
    match extent.allocated {
        true => Extent { len: extent.len.next_multiple_of(block).min(left), ..extent },
        false if down == 0 => Extent { len: block.min(left), allocated: true },
        false => Extent { len: down, ..extent },
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use bdev::{FileDisk, FileOptions, Flavour};

    use super::*;

    #[test]
    fn holes_of_a_file_are_found_and_a_part_of_a_block_is_data() {
        let hole = allocation::HOLE | allocation::ZERO;
        for (block_size, data) in [(512, 4096), (32768, 32768)] {
            let image = tempfile::NamedTempFile::new().unwrap();
            image.as_file().set_len(1 << 20).unwrap();
            image.as_file().write_all_at(&[1; 4096], 256 << 10).unwrap();
            let options = FileOptions {
                name: "f".into(),
                filename: image.path().into(),
                block_size: Some(block_size),
                readonly: false,
                fallocate: false,
                uuid: None,
                flavour: Flavour::Uring,
                engine: None,
            };
            let disk: Arc<dyn Bdev> = FileDisk::create(options).unwrap();
            let described = describe(&disk, 0, 1 << 20, false).unwrap();
            let rest = (1 << 20) - (256 << 10) - data;
            assert_eq!(described, [(256 << 10, hole), (data, 0), (rest, hole)]);
            let described = describe(&disk, 0, 1 << 20, true).unwrap();
            assert_eq!(described, [(256 << 10, hole)]);
            let at_data = describe(&disk, 256 << 10, block_size, false).unwrap();
            assert_eq!(at_data[0].1, 0);
        }
    }
}
