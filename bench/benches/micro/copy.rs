//! 4 KiB between one buffer and random places of a malloc disk: the bound of that disk's figures.
#![expect(unsafe_code, reason = "copies between two allocations")]

use bdev::memory::{Stores, gather, scatter};
use bdev::{Bdev, Malloc, MallocOptions, Segment, Shortcut};
use criterion::{Criterion, Throughput};

/// As large as the disks of `bench/compare`: more than a cache holds.
const DISK: usize = 64 << 20;
const BLOCK: usize = 4096;

pub(crate) fn bench(c: &mut Criterion) {
    let options = MallocOptions {
        name: "copy".into(),
        num_blocks: (DISK / BLOCK) as u64,
        block_size: BLOCK.try_into().unwrap(),
        uuid: None,
    };
    // Kept open, so that its memory stays.
    let channel = Malloc::create(options).unwrap().open(1).unwrap();
    let Shortcut::Memory { base, .. } = channel.shortcut() else { panic!("it is memory") };
    let mut buffer = vec![1_u8; BLOCK];
    let segments = [Segment::new(buffer.as_mut_ptr(), BLOCK)];
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    #[expect(clippy::cast_possible_truncation, reason = "a random number, of which half is enough")]
    let mut block = || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        base.wrapping_add(random as usize % (DISK / BLOCK) * BLOCK)
    };
    let mut group = c.benchmark_group("copy of 4 KiB");
    group.throughput(Throughput::Bytes(BLOCK as u64));
    group.bench_function("read", |b| {
        // SAFETY: a block of the disk, and a buffer as large.
        b.iter(|| unsafe { scatter(&segments, 0, block(), BLOCK) });
    });
    for (name, stores) in [("write", Stores::Cached), ("write, streamed", Stores::Streamed)] {
        group.bench_function(name, |b| {
            // SAFETY: as above, the other way round.
            b.iter(|| unsafe { gather(&segments, 0, block(), BLOCK, stores) });
        });
    }
    group.finish();
}
