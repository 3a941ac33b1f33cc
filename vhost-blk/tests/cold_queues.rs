//! Many idle queues on one reactor: each is visited often enough, however long it was idle.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::sync::Arc;

use bdev::{Null, NullOptions};
use guest_memory::GuestMemory;
use guest_memory::testing::flat_at;
use qsbr::Domain;
use reactor::Reclaim;
use vhost_blk::config::Disk;
use vhost_blk::{BlkQueue, BlkView};
use vhost_target::queue::{NewQueue, Queue, QueueId, ViewSpec};
use vhost_target::{Core, Mode};
use vhost_target::{Events, Reactor, SteppedReactor};
use virtqueue::{Layout, RingAddrs};
use vm_memory::Bytes;

const QUEUES: usize = 40;
const SIZE: u16 = 4;
/// Guest memory of one queue: descriptors, available ring, used ring, header, status, data.
const STRIDE: u64 = 0x5000;
/// Idle poll iterations after which all queues are cold: twice the required number.
const LONG: usize = 1 << 16;
/// Poll iterations in which all cold queues are visited: 16 in each without work, 4 in each with
/// some.
const PASS: usize = QUEUES.div_ceil(16) + 1;
const BUSY_PASS: usize = QUEUES.div_ceil(4) + 1;

struct Scene {
    memory: Arc<GuestMemory>,
    reactor: SteppedReactor,
    /// For each queue, the number of requests made available so far.
    offered: Vec<u16>,
}

impl Scene {
    /// Creates queues that have been idle for long.
    fn idle() -> Self {
        let domain = Domain::new(1);
        let events = Arc::new(Events::new().unwrap());
        let memory = flat_at(STRIDE * QUEUES as u64, 0);
        let options = NullOptions { name: "n".into(), num_blocks: 64, block_size: 512, uuid: None };
        let disk = Arc::new(Disk::new(Null::create(options).unwrap(), false));
        let queue = |n: usize| {
            let at = STRIDE * n as u64;
            let addrs = RingAddrs { desc: at, avail: at + 0x1000, used: at + 0x2000 };
            let device = Some(BlkView::erased(&disk, false));
            let view = ViewSpec::new(&memory, SIZE, addrs, Layout::default(), device);
            let (id, coalescing) = (QueueId(n as u64), Arc::default());
            let new = NewQueue { id, domain: &domain, view, base: 0, coalescing, tracked: None };
            Queue::new(BlkQueue::open(Some(&disk), SIZE).unwrap(), new).unwrap() as Arc<_>
        };
        let reactor = Arc::new(Reactor::new(Core(0), &domain, Mode::Poll).unwrap());
        reactor.publish((0..QUEUES).map(queue).collect(), &Reclaim::start(|| {}).unwrap());
        let reactor = SteppedReactor::new(&reactor, &domain, &events).unwrap();
        let mut scene = Self { memory, reactor, offered: vec![0; QUEUES] };
        for queue in 0..QUEUES {
            scene.set_up(queue);
        }
        scene.steps(LONG);
        scene
    }

    fn put(&self, gpa: u64, bytes: &[u8]) {
        self.memory.slice(gpa, bytes.len()).unwrap().write_slice(bytes, 0).unwrap();
    }

    /// Writes the descriptors of one read into the queue's first three descriptors.
    fn set_up(&self, queue: usize) {
        let at = STRIDE * queue as u64;
        for (n, (offset, len, flags)) in
            [(0x3000, 16_u32, 1_u16), (0x4000, 512, 3), (0x3100, 1, 2)].into_iter().enumerate()
        {
            let desc = at + 16 * n as u64;
            self.put(desc, &(at + offset).to_le_bytes());
            self.put(desc + 8, &len.to_le_bytes());
            self.put(desc + 12, &flags.to_le_bytes());
            self.put(desc + 14, &u16::try_from(n + 1).unwrap().to_le_bytes());
        }
    }

    fn offer(&mut self, queue: usize) {
        self.offered[queue] += 1;
        let index = self.offered[queue].to_le_bytes();
        self.put(STRIDE * queue as u64 + 0x1002, &index);
    }

    fn steps(&mut self, n: usize) {
        for _ in 0..n {
            self.reactor.step();
        }
    }

    fn answered(&self, queue: usize) -> bool {
        let mut used = [0; 2];
        let at = STRIDE * queue as u64 + 0x2002;
        self.memory.slice(at, 2).unwrap().read_slice(&mut used, 0).unwrap();
        u16::from_le_bytes(used) == self.offered[queue]
    }
}

#[test]
fn the_first_request_of_an_idle_queue_waits_for_one_pass() {
    let mut scene = Scene::idle();
    for queue in 0..QUEUES {
        scene.offer(queue);
        assert!(!scene.answered(queue));
        // The previous poll iteration may have had work.
        scene.steps(PASS + 1);
        assert!(scene.answered(queue), "queue {queue}");
    }
}

#[test]
fn idle_queues_that_begin_together_are_all_served() {
    let mut scene = Scene::idle();
    for round in 0..3 {
        for queue in 0..QUEUES {
            scene.offer(queue);
        }
        scene.steps(BUSY_PASS);
        assert!((0..QUEUES).all(|queue| scene.answered(queue)), "round {round}");
        scene.steps(LONG);
    }
}

#[test]
fn a_busy_queue_does_not_starve_cold_queues() {
    for busy in [0, QUEUES / 2, QUEUES - 1] {
        let mut scene = Scene::idle();
        for queue in (0..QUEUES).filter(|queue| *queue != busy) {
            scene.offer(queue);
            for _ in 0..BUSY_PASS {
                scene.offer(busy);
                scene.steps(1);
                // The queue is cold at first, and hot from its first request on.
                assert!(queue == 0 || busy == 0 && queue == 1 || scene.answered(busy));
            }
            assert!(scene.answered(queue), "queue {queue} beside {busy}");
        }
    }
}
