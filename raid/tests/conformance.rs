//! The suite of bdevs, on arrays.
#![expect(clippy::unwrap_used, reason = "a test ends where something fails")]

use std::sync::Arc;

use bdev::{
    Bdev, Delay, DelayOptions, FileDisk, FileOptions, Flavour, Latency, Malloc, MallocOptions,
    RateLimits,
};
use bdev_conformance::{Fixture, SIZE, conformance};
use raid::{Extent, Level, OptionalMember, RaidDisk, RaidOptions};
use tempfile::TempDir;
use uuid::Uuid;

/// Bytes before the data of each member.
const OFFSET: u64 = 64 << 10;

fn malloc(block_size: u32, size: u64) -> Arc<dyn Bdev> {
    let num_blocks = (size + OFFSET) / u64::from(block_size);
    let options = MallocOptions { name: "M".into(), num_blocks, block_size, uuid: None };
    Malloc::create(options).unwrap()
}

fn file(dir: &TempDir, name: &str, size: u64, flavour: Flavour) -> Arc<dyn Bdev> {
    let filename = dir.path().join(name);
    std::fs::File::create(&filename).unwrap().set_len(size + OFFSET).unwrap();
    let options = FileOptions {
        name: name.into(),
        filename,
        block_size: Some(512),
        readonly: false,
        fallocate: true,
        uuid: None,
        flavour,
        engine: None,
    };
    FileDisk::create(options).unwrap()
}

fn files(count: u64, size: u64, flavour: Flavour) -> (Vec<Arc<dyn Bdev>>, TempDir) {
    let dir = TempDir::new().unwrap();
    ((0..count).map(|n| file(&dir, &n.to_string(), size, flavour)).collect(), dir)
}

fn delayed(base: Arc<dyn Bdev>) -> Arc<dyn Bdev> {
    let latency = Latency { avg_read_us: 0, p99_read_us: 300, avg_write_us: 50, p99_write_us: 100 };
    Delay::create(DelayOptions { name: "D".into(), base, latency, uuid: None }).unwrap()
}

fn of(level: Level, strip: u64, members: Vec<Arc<dyn Bdev>>) -> Arc<dyn Bdev> {
    let members = members.into_iter().map(|bdev| OptionalMember {
        extent: Extent { offset: OFFSET, len: bdev.size_bytes() - OFFSET },
        uuid: bdev.uuid(),
        bdev: Some(bdev),
    });
    let (name, uuid, members) = ("R".into(), Uuid::new_v4(), members.collect());
    let options = RaidOptions { name, uuid, level, strip, members, seq_number: None };
    RaidDisk::create(options).unwrap()
}

fn raid0(strip: u64, members: Vec<Arc<dyn Bdev>>) -> Fixture {
    Fixture::of(of(Level::Raid0, strip, members))
}

fn raid1(members: Vec<Arc<dyn Bdev>>) -> Fixture {
    Fixture::of(of(Level::Raid1, 0, members))
}

fn limited(fixture: Fixture) -> Fixture {
    let limits =
        RateLimits { rw_ios_per_sec: 20_000, rw_mbytes_per_sec: 2_000, ..Default::default() };
    fixture.disk.qos().set_limits(limits);
    fixture
}

fn on_files(level: Level, strip: u64, count: u64, size: u64, flavour: Flavour) -> Fixture {
    let (members, dir) = files(count, size, flavour);
    Fixture::on(of(level, strip, members), dir)
}

fn concat_of_three() -> Fixture {
    let sizes = [SIZE / 2, SIZE / 4, SIZE / 4];
    let members = sizes.map(|size| malloc(4096, size)).into();
    Fixture::of(of(Level::Concat, 64 << 10, members))
}

conformance! {
    raid0_of_two_malloc_512 => raid0(4096, vec![malloc(512, SIZE / 2), malloc(512, SIZE / 2)]);
    raid0_of_four_malloc_4096 => raid0(64 << 10, (0..4).map(|_| malloc(4096, SIZE / 4)).collect());
    raid0_of_one => raid0(512, vec![malloc(512, SIZE)]);
    raid0_of_files => on_files(Level::Raid0, 16 << 10, 2, SIZE / 2, Flavour::Uring);
    raid0_of_delays => raid0(8192, (0..2).map(|_| delayed(malloc(512, SIZE / 2))).collect());
    raid1_of_two_malloc_512 => raid1(vec![malloc(512, SIZE), malloc(512, SIZE)]);
    raid1_of_three_malloc_4096 => raid1((0..3).map(|_| malloc(4096, SIZE)).collect());
    raid1_of_files_uring => on_files(Level::Raid1, 0, 2, SIZE, Flavour::Uring);
    raid1_of_files_aio => on_files(Level::Raid1, 0, 2, SIZE, Flavour::Aio);
    raid1_of_delays => raid1((0..2).map(|_| delayed(malloc(512, SIZE))).collect());
    raid1_of_unlike_members => raid1(vec![malloc(512, SIZE), delayed(malloc(512, SIZE))]);
    limited_raid1 => limited(raid1((0..2).map(|_| malloc(512, SIZE)).collect()));
    concat => concat_of_three();
    concat_of_files => on_files(Level::Concat, 4096, 2, SIZE / 2, Flavour::Aio);
    raid1_of_raid0 => raid1((0..2).map(|_| raid0(4096, vec![
        malloc(512, SIZE / 2 + OFFSET / 2), malloc(512, SIZE / 2 + OFFSET / 2),
    ]).disk).collect());
}
