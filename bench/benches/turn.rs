//! A reactor's turn in one thread: with idle queues, and with a request end to end.
//!
//! `cargo bench -p bench --bench turn`. No socket, no second core: what remains is our own code.
#![expect(clippy::unwrap_used, reason = "a bench that cannot be set up ends")]

use std::hint::black_box;
use std::sync::Arc;

use bdev::{Bdev, Malloc, MallocOptions, Null, NullOptions};
use bench::{GuestRam, QueueOptions, Request, Segment};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use qsbr::Domain;
use vhost_blk::Core;
use vhost_blk::config::Disk;
use vhost_blk::foreign::ForeignFd;
use vhost_blk::memory::{GuestMemory, RegionSpec};
use vhost_blk::queue::{Queue, QueueId, View};
use vhost_blk::reactor::{Events, Reactor, SteppedReactor};
use vhost_blk::reclaim::{Reclaim, Unmapper};
use vhost_blk::ring::RingAddrs;

const DISK_BLOCKS: u64 = 16384;

fn null() -> Arc<dyn Bdev> {
    let name = "Null0".into();
    Null::create(NullOptions { name, num_blocks: DISK_BLOCKS, block_size: 512, uuid: None })
        .unwrap()
}

fn malloc() -> Arc<dyn Bdev> {
    let name = "Malloc0".into();
    let options = MallocOptions { name, num_blocks: DISK_BLOCKS, block_size: 512, uuid: None };
    Malloc::create(options).unwrap()
}

/// A reactor with queues over `bdev`, and the driver's side of each.
struct Scene {
    reactor: SteppedReactor,
    drivers: Vec<bench::Queue>,
    buffer: Segment,
}

impl Scene {
    fn new(queues: usize, options: QueueOptions, bdev: &Arc<dyn Bdev>) -> Self {
        let domain = Domain::new(1);
        let events = Arc::new(Events::new().unwrap());
        let reactor = Arc::new(Reactor::new(Core(0), &domain).unwrap());
        let ram = GuestRam::new(&[64 << 20]).unwrap();
        let buffer = ram.alloc(4096, 4096).unwrap();
        let line = &ram.table()[0];
        let spec = RegionSpec {
            gpa: line.guest_phys_addr,
            size: line.memory_size,
            user_addr: line.userspace_addr,
            offset: 0,
        };
        let fd = ForeignFd::new(ram.file(0).try_clone().unwrap().into());
        let unmapper = Unmapper::start().unwrap();
        let memory = Arc::new(GuestMemory::map(vec![(spec, fd)], None, &unmapper).unwrap());
        let disk = Arc::new(Disk { bdev: Arc::clone(bdev), read_only: false });
        let (mut drivers, mut attached) = (Vec::new(), Vec::new());
        for n in 0..queues {
            let driver = bench::Queue::new(&ram, n, options, false).unwrap();
            let [desc, avail, used] = driver.ring().addrs();
            let addrs = RingAddrs { desc, avail, used };
            let disk = Some(Arc::clone(&disk));
            let view = View::new(1, &memory, options.size, addrs, false, None, disk).unwrap();
            let id = QueueId(n as u64);
            attached.push(Queue::new(id, &domain, view, 0, Arc::default()).unwrap());
            drivers.push(driver);
        }
        reactor.publish(attached, &Reclaim::start(|| {}).unwrap());
        let mut reactor = SteppedReactor::new(&reactor, &domain, &events).unwrap();
        reactor.step();
        Self { reactor, drivers, buffer }
    }

    /// `depth` reads submitted, served in one turn or more, and taken back.
    fn batch(&mut self, depth: u64) {
        let driver = &mut self.drivers[0];
        for n in 0..depth {
            driver.submit(&Request::read(n * 8, &[self.buffer])).unwrap();
        }
        let mut back = 0;
        while back < depth {
            self.reactor.step();
            while let Some(done) = driver.poll().unwrap() {
                black_box(done);
                back += 1;
            }
        }
    }
}

fn idle(c: &mut Criterion) {
    let mut group = c.benchmark_group("idle turn");
    for queues in [0, 1, 16, 128] {
        let options = QueueOptions { size: 128, ..QueueOptions::default() };
        let mut scene = Scene::new(queues, options, &null());
        group.bench_function(BenchmarkId::new("queues", queues), |b| {
            b.iter(|| scene.reactor.step())
        });
    }
    group.finish();
}

fn request(c: &mut Criterion) {
    let mut group = c.benchmark_group("4 KiB read, driver and device in one thread");
    for (name, bdev) in [("null", null()), ("malloc", malloc())] {
        for (rings, indirect) in [("direct", false), ("indirect", true)] {
            for depth in [1, 32] {
                let options = QueueOptions { size: 128, indirect, ..QueueOptions::default() };
                let mut scene = Scene::new(1, options, &bdev);
                group.throughput(Throughput::Elements(depth));
                let id = BenchmarkId::new(format!("{name}, {rings}"), depth);
                group.bench_function(id, |b| b.iter(|| scene.batch(depth)));
            }
        }
    }
    group.finish();
}

criterion_group!(benches, idle, request);
criterion_main!(benches);
