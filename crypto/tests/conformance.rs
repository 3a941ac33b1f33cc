//! The suite of bdevs, on encrypted disks, and what is stored below them.
#![expect(clippy::unwrap_used, reason = "a test ends where something fails")]

use std::sync::Arc;

use bdev::{
    Bdev, Delay, DelayOptions, Error, FileDisk, FileOptions, Flavour, Latency, Malloc,
    MallocOptions, Op, RateLimits, Request, Rights, Status, ThreadChannel,
};
use bdev_conformance::{Driver, Fixture, Memory, SIZE, conformance, pattern};
use crypto::{CryptoDisk, CryptoOptions, Key};
use tempfile::TempDir;

fn key(bytes: usize) -> Arc<Key> {
    let [data, tweak] = ["0f", "f0"].map(|byte| byte.repeat(bytes).into());
    Key::new("k".into(), data, tweak).unwrap()
}

fn on(base: Arc<dyn Bdev>, bytes: usize) -> Result<Arc<CryptoDisk>, Error> {
    let (name, key) = ("C".into(), key(bytes));
    CryptoDisk::create(CryptoOptions { name, base, key, uuid: None })
}

/// Writes zeroes everywhere: blocks that were never written read as noise.
fn zeroed(fixture: Fixture, bytes: usize) -> Fixture {
    let disk: Arc<dyn Bdev> = on(fixture.disk, bytes).unwrap();
    let mut channel = ThreadChannel::open(&disk, 1, Rights::Write).unwrap();
    channel.run(Request::plain(Op::WriteZeroes, 0, SIZE)).unwrap();
    drop(channel);
    Fixture { disk, unmapped_is_noise: true, ..fixture }
}

fn malloc(block_size: u32) -> Fixture {
    let num_blocks = SIZE / u64::from(block_size);
    let options = MallocOptions { name: "M".into(), num_blocks, block_size, uuid: None };
    Fixture::of(Malloc::create(options).unwrap())
}

fn file(block_size: u32, flavour: Flavour) -> Fixture {
    let dir = TempDir::new().unwrap();
    let filename = dir.path().join("disk");
    std::fs::File::create(&filename).unwrap().set_len(SIZE).unwrap();
    let options = FileOptions {
        name: "F".into(),
        filename,
        block_size: Some(block_size),
        readonly: false,
        fallocate: false,
        uuid: None,
        flavour,
        engine: None,
    };
    Fixture::on(FileDisk::create(options).unwrap(), dir)
}

fn delayed(base: Fixture) -> Fixture {
    let latency = Latency { avg_read_us: 0, p99_read_us: 300, avg_write_us: 50, p99_write_us: 100 };
    let options = DelayOptions { name: "D".into(), base: base.disk, latency, uuid: None };
    Fixture { disk: Delay::create(options).unwrap(), ..base }
}

fn limited(fixture: Fixture) -> Fixture {
    let limits =
        RateLimits { rw_ios_per_sec: 20_000, rw_mbytes_per_sec: 2_000, ..Default::default() };
    fixture.disk.qos().set_limits(limits);
    fixture
}

conformance! {
    aes_128_on_malloc_512 => zeroed(malloc(512), 16);
    aes_256_on_malloc_4096 => zeroed(malloc(4096), 32);
    aes_256_on_file_512 => zeroed(file(512, Flavour::Uring), 32);
    aes_128_on_file_4096 => zeroed(file(4096, Flavour::Aio), 16);
    aes_128_on_delay => zeroed(delayed(malloc(512)), 16);
    limited_on_limited_malloc => limited(zeroed(limited(malloc(512)), 16));
    twice => zeroed(zeroed(malloc(512), 16), 32);
}

/// A block that arrives in several segments is encrypted as a whole: what is stored does not depend
/// on the guest's segments.
#[test]
fn what_is_stored_does_not_depend_on_the_segments() {
    for block_size in [512, 4096] {
        let base = malloc(block_size);
        let disk: Arc<dyn Bdev> = on(Arc::clone(&base.disk), 32).unwrap();
        let data = pattern(1, 4 * 4096);
        let len = data.len();
        let mut stored: Option<Vec<u8>> = None;
        for pieces in [&[len][..], &[100, 412, len - 512], &[1, 4095, 4096 + 8, len - 8200]] {
            let mut driver = Driver::new(&disk, 4);
            let mut memory = Memory::new(pieces, 1);
            memory.fill(&data);
            let write = bdev_conformance::Request::rw(Op::Write, 8192, memory);
            assert_eq!(driver.run(write).1, Status::Ok);
            assert_eq!(driver.read(8192, len), (data.clone(), Status::Ok));
            let mut below = Driver::new(&base.disk, 1);
            let (bytes, status) = below.read(8192, len);
            assert_eq!(status, Status::Ok);
            assert_ne!(bytes, data);
            assert_eq!(*stored.get_or_insert_with(|| bytes.clone()), bytes, "{pieces:?}");
        }
    }
}
