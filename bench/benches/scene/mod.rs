//! The set for benches: a reactor without a thread, queues over a disk, and the driver's side of each.

use std::hint::black_box;
use std::sync::Arc;

use bdev::{Bdev, Malloc, MallocOptions, Null, NullOptions};
use bench::{GuestRam, QueueOptions, Request, STATUS_OK, Segment};
use qsbr::Domain;
use vhost_blk::Core;
use vhost_blk::config::Disk;
use vhost_blk::foreign::ForeignFd;
use vhost_blk::memory::{GuestMemory, RegionSpec};
use vhost_blk::queue::{Queue, QueueId, View};
use vhost_blk::reactor::{Events, Reactor, SteppedReactor};
use vhost_blk::reclaim::{Reclaim, Unmapper};
use vhost_blk::ring::RingAddrs;

/// Size of every disk: 8 MiB.
pub(crate) const DISK_BLOCKS: u64 = 16384;

/// Turns after which a request that has not come back never will.
const TURNS_MAX: u32 = 1 << 20;

/// A disk that does nothing.
pub(crate) fn null() -> Arc<dyn Bdev> {
    let name = "Null0".into();
    Null::create(NullOptions { name, num_blocks: DISK_BLOCKS, block_size: 512, uuid: None })
        .unwrap()
}

/// A disk in memory.
pub(crate) fn malloc() -> Arc<dyn Bdev> {
    let name = "Malloc0".into();
    let options = MallocOptions { name, num_blocks: DISK_BLOCKS, block_size: 512, uuid: None };
    Malloc::create(options).unwrap()
}

/// What the driver asks for, 4 KiB at a time.
#[derive(Clone, Copy)]
pub(crate) enum Kind {
    Read,
    Write,
    /// A read into two buffers of half the size.
    ReadInTwo,
}

/// A reactor with queues over a disk.
pub(crate) struct Scene {
    pub(crate) reactor: SteppedReactor,
    drivers: Vec<bench::Queue>,
    whole: [Segment; 1],
    halves: [Segment; 2],
}

impl Scene {
    pub(crate) fn new(queues: usize, indirect: bool, bdev: &Arc<dyn Bdev>) -> Self {
        let options = QueueOptions { size: 128, indirect, ..QueueOptions::default() };
        let domain = Domain::new(1);
        let events = Arc::new(Events::new().unwrap());
        let reactor = Arc::new(Reactor::new(Core(0), &domain).unwrap());
        let ram = GuestRam::new(&[64 << 20]).unwrap();
        let whole = ram.alloc(4096, 4096).unwrap();
        let halves = [ram.alloc(2048, 4096).unwrap(), ram.alloc(2048, 4096).unwrap()];
        let memory = memory(&ram);
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
        Self { reactor, drivers, whole: [whole], halves }
    }

    /// Has the first queue's driver submit `depth` requests, makes turns with `turn` until all are
    /// answered, and checks the answers.
    pub(crate) fn batch(
        &mut self,
        kind: Kind,
        depth: u64,
        mut turn: impl FnMut(&mut SteppedReactor),
    ) {
        let driver = &mut self.drivers[0];
        for n in 0..depth {
            let request = match kind {
                Kind::Read => Request::read(n * 8, &self.whole),
                Kind::Write => Request::write(n * 8, &self.whole),
                Kind::ReadInTwo => Request::read(n * 8, &self.halves),
            };
            driver.submit(&request).unwrap();
        }
        let (mut back, mut turns) = (0, 0);
        while back < depth {
            turn(&mut self.reactor);
            while let Some(done) = driver.poll().unwrap() {
                assert_eq!(black_box(done).status, STATUS_OK);
                back += 1;
            }
            turns += 1;
            assert!(turns < TURNS_MAX, "a request is lost");
        }
    }
}

/// The guest's memory as the target maps it.
fn memory(ram: &GuestRam) -> Arc<GuestMemory> {
    let line = &ram.table()[0];
    let spec = RegionSpec {
        gpa: line.guest_phys_addr,
        size: line.memory_size,
        user_addr: line.userspace_addr,
        offset: 0,
    };
    let fd = ForeignFd::new(ram.file(0).try_clone().unwrap().into());
    let unmapper = Unmapper::start().unwrap();
    Arc::new(GuestMemory::map(vec![(spec, fd)], None, &unmapper).unwrap())
}
