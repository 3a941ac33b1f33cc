//! The suite of bdevs, on arrays.
#![expect(unsafe_code, reason = "forwards I/O to `Channel::submit`")]
#![expect(clippy::unwrap_used, reason = "a test ends where something fails")]

use std::sync::Arc;

use bdev::{
    Bdev, Channel, Completion, Delay, DelayOptions, Error, Features, FileDisk, FileOptions,
    Flavour, Io, Latency, Malloc, MallocOptions, Qos, RateLimits, Stats, Status, Submit, Wait,
    WakeFds,
};
use bdev_conformance::{Driver, Fixture, SIZE, conformance, pattern};
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
    create(level, strip, members, None)
}

/// Makes an array, without one of the members.
fn create(
    level: Level,
    strip: u64,
    members: Vec<Arc<dyn Bdev>>,
    missing: Option<usize>,
) -> Arc<dyn Bdev> {
    let members = members.into_iter().enumerate().map(|(n, bdev)| OptionalMember {
        extent: Extent { offset: OFFSET, len: bdev.size_bytes() - OFFSET },
        uuid: bdev.uuid(),
        bdev: Some(bdev).filter(|_| missing != Some(n)),
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

/// An array with parity, whose stripes are shown as blocks: it takes no smaller writes.
struct Stripes {
    array: Arc<dyn Bdev>,
    stripe: u32,
}

impl Bdev for Stripes {
    fn name(&self) -> &str {
        self.array.name()
    }

    fn product_name(&self) -> &'static str {
        self.array.product_name()
    }

    fn uuid(&self) -> Uuid {
        self.array.uuid()
    }

    fn block_size(&self) -> u32 {
        self.stripe
    }

    fn num_blocks(&self) -> u64 {
        self.array.size_bytes() / u64::from(self.stripe)
    }

    fn features(&self) -> Features {
        self.array.features()
    }

    fn bases(&self) -> Vec<Arc<dyn Bdev>> {
        vec![Arc::clone(&self.array)]
    }

    fn stats(&self) -> &Stats {
        self.array.stats()
    }

    fn qos(&self) -> &Qos {
        self.array.qos()
    }

    fn open(self: Arc<Self>, depth: u16) -> Result<Box<dyn Channel>, Error> {
        // A channel keeps the disk that it was opened for.
        let channel = Arc::clone(&self.array).open(depth)?;
        Ok(Box::new(OfStripes { channel, _disk: self }))
    }
}

struct OfStripes {
    channel: Box<dyn Channel>,
    _disk: Arc<Stripes>,
}

impl Channel for OfStripes {
    unsafe fn submit(&mut self, io: Io) -> Submit {
        // SAFETY: by the caller's promise.
        unsafe { self.channel.submit(io) }
    }

    fn wake_fds(&self) -> WakeFds<'_> {
        self.channel.wake_fds()
    }

    fn wait(&self) -> Wait {
        self.channel.wait()
    }

    fn kick(&mut self) {
        self.channel.kick();
    }

    fn poll(&mut self, done: &mut [Completion]) -> usize {
        self.channel.poll(done)
    }

    fn abandon(&mut self) {
        self.channel.abandon();
    }
}

fn raid5f(strip: u64, members: Vec<Arc<dyn Bdev>>, missing: Option<usize>) -> Fixture {
    let stripe = strip * (members.len() as u64 - 1);
    let array = create(Level::Raid5f, strip, members, missing);
    Fixture::of(Arc::new(Stripes { array, stripe: u32::try_from(stripe).unwrap() }))
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
    raid1_degraded => Fixture::of(create(
        Level::Raid1, 0, (0..2).map(|_| malloc(512, SIZE)).collect(), Some(0),
    ));
    raid5f_of_three => raid5f(512, (0..3).map(|_| malloc(512, SIZE / 2)).collect(), None);
    raid5f_of_five => raid5f(1024, (0..5).map(|_| malloc(512, SIZE / 4)).collect(), None);
    raid5f_of_delays => raid5f(2048, (0..3).map(|_| delayed(malloc(512, SIZE / 2))).collect(), None);
    raid5f_without_one => raid5f(512, (0..3).map(|_| malloc(512, SIZE / 2)).collect(), Some(1));
    raid5f_of_five_without_one => raid5f(
        2048, (0..5).map(|_| malloc(512, SIZE / 4)).collect(), Some(4),
    );
    raid5f_of_delays_without_one => raid5f(
        2048, (0..3).map(|_| delayed(malloc(512, SIZE / 2))).collect(), Some(0),
    );
    raid1_of_raid0 => raid1((0..2).map(|_| raid0(4096, vec![
        malloc(512, SIZE / 2 + OFFSET / 2), malloc(512, SIZE / 2 + OFFSET / 2),
    ]).disk).collect());
}

/// Strips that are longer than what is computed at a time, read in parts from an array without one
/// member.
#[test]
fn long_strips_are_computed_in_pieces() {
    const STRIP: usize = 160 << 10;
    let strip = 256 << 10;
    for missing in 0..3 {
        let members: Vec<_> = (0..3).map(|_| malloc(512, 1 << 20)).collect();
        let whole = create(Level::Raid5f, strip, members.clone(), None);
        let data = pattern(7, 2 << 20);
        assert_eq!(Driver::new(&whole, 4).write(0, &data), Status::Ok);
        drop(whole);
        let degraded = create(Level::Raid5f, strip, members, Some(missing));
        let mut driver = Driver::new(&degraded, 4);
        assert_eq!(driver.read(0, data.len()), (data.clone(), Status::Ok));
        for at in (512..data.len() - STRIP).step_by(96 << 10) {
            let (bytes, status) = driver.read(at as u64, STRIP);
            assert_eq!((bytes == data[at..at + STRIP], status), (true, Status::Ok), "{at}");
        }
        let other = pattern(8, 1 << 20);
        assert_eq!(driver.write(512 << 10, &other), Status::Ok);
        assert_eq!(driver.read(512 << 10, other.len()), (other, Status::Ok));
        assert_eq!(driver.write(512, &data[..512]), Status::IoError, "not a whole stripe");
    }
}
