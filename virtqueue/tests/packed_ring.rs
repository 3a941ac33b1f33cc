//! Tests packed rings against a driver that follows the specification. Every chain arrives as the
//! driver added it and in order, is returned once, and neither side misses a notification.
#![expect(clippy::cast_possible_truncation, reason = "sizes and positions of small rings")]

#[path = "../../vhost-target/tests/simulation/rng.rs"]
mod rng;
mod packed_ring {
    pub(crate) mod device;
    pub(crate) mod driver;
}

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use guest_memory::GuestMemory;
use guest_memory::testing::flat_at;
use packed_ring::device::{Device, Held};
use packed_ring::driver::{Driver, position};
use rng::Rng;
use virtqueue::{Buffer, RingAddrs};
use vm_memory::Bytes;

const ADDRS: RingAddrs = RingAddrs { desc: 0, avail: 0x1000, used: 0x1100 };
/// Indirect tables, and a page of data for each buffer id.
const TABLES: u64 = 0x2000;
const TABLE_BYTES: u64 = 0x100;
const DATA: u64 = 0x1_0000;
const DATA_BYTES: u64 = 0x100;
const MEMORY: u64 = 0x10_0000;
/// Maximum number of buffers in a chain.
const BUFFERS: usize = 5;

/// Both sides of a ring in one thread, and what each of them may see.
struct Pair {
    rng: Rng,
    driver: Driver,
    device: Device,
    /// Chains that the driver has added and the device has not taken.
    added: VecDeque<Held>,
    held: Vec<Held>,
    /// Chains that were put, in order, and how many of them are published.
    put: VecDeque<(u16, u32)>,
    published: usize,
    /// The device was kicked, or the driver was called, and has not seen it yet.
    kicked: bool,
    called: bool,
    /// The driver has added a chain and not checked whether to kick.
    kick_unchecked: bool,
    /// Number of chains added, and of chains returned to the driver.
    count: (u64, u64),
    /// Number of descriptors added.
    descriptors: u64,
}

impl Pair {
    fn new(seed: u64, size: u16, event_idx: bool) -> Self {
        let mut rng = Rng::new(seed);
        let memory = flat_at(MEMORY, 0);
        let begin = rng.below(4 * usize::from(size)) as u64;
        Self {
            driver: Driver::new(&memory, ADDRS, size, event_idx, begin),
            device: Device::new(&memory, ADDRS, size, event_idx, position(begin, size)),
            rng,
            added: VecDeque::new(),
            held: vec![],
            put: VecDeque::new(),
            published: 0,
            kicked: false,
            called: false,
            kick_unchecked: false,
            count: (0, 0),
            descriptors: 0,
        }
    }

    fn step(&mut self) {
        match self.rng.below(16) {
            0..5 => self.add(),
            5 => self.check_kick(),
            6..8 => self.take_back(),
            8 => self.ask_for_call(),
            9..12 => self.take(),
            12..14 => self.put(),
            14 => self.publish(),
            _ => self.arm(),
        }
    }

    fn add(&mut self) {
        let room = self.driver.room();
        if room == 0 {
            return;
        }
        let table = self.rng.one_in(3).then(|| {
            TABLES + TABLE_BYTES * self.rng.below(32) as u64 + 16 * self.rng.below(2) as u64
        });
        // An indirect table must not change before its chain is taken.
        let table = table.filter(|_| self.added.is_empty());
        let most = if table.is_some() { BUFFERS } else { BUFFERS.min(room) };
        let buffers: Vec<Buffer> = (0..1 + self.rng.below(most))
            .map(|_| Buffer {
                gpa: self.rng.next(),
                len: 1 + self.rng.below(1 << 20) as u32,
                write: self.rng.one_in(2),
            })
            .collect();
        let span = if table.is_some() { 1 } else { buffers.len() as u16 };
        let id = self.driver.add(&buffers, table);
        self.added.push_back(Held { id, span, buffers });
        self.count.0 += 1;
        self.descriptors += u64::from(span);
        self.kick_unchecked = true;
    }

    fn check_kick(&mut self) {
        let kick = self.driver.wants_kick();
        assert!(!kick || self.device.armed, "an unwanted kick");
        let missed = self.device.armed && !self.added.is_empty() && !self.kicked && !kick;
        assert!(!missed, "a wanted kick is missing");
        self.kicked |= kick;
        self.kick_unchecked = false;
    }

    fn take(&mut self) {
        if self.device.armed && !self.kicked {
            return; // It is asleep.
        }
        let held = self.device.take();
        assert_eq!(held, self.added.pop_front());
        if !self.device.armed {
            self.kicked = false;
        }
        self.held.extend(held);
    }

    fn put(&mut self) {
        if self.held.is_empty() {
            return;
        }
        let held = self.held.swap_remove(self.rng.below(self.held.len()));
        let len = self.rng.pick(&[0, 1, 513, u32::MAX]).expect("not empty");
        self.device.put(&held, len);
        self.put.push_back((held.id, len));
    }

    fn publish(&mut self) {
        let Some(call) = self.device.publish() else {
            assert_eq!(self.put.len(), self.published);
            return;
        };
        self.published = self.put.len();
        assert!(!call || self.driver.calls, "an unwanted call");
        self.called |= call;
        assert!(self.called || !self.driver.calls, "a wanted call is missing");
    }

    fn arm(&mut self) {
        if self.device.armed {
            return;
        }
        assert_eq!(self.device.arm(), self.added.is_empty());
        self.kicked = false;
    }

    fn take_back(&mut self) {
        if self.driver.calls && !self.called {
            return; // It is asleep.
        }
        let expected = (self.published > 0).then(|| self.put.pop_front()).flatten();
        self.published = self.published.saturating_sub(1);
        assert_eq!(self.driver.take(), expected);
        self.count.1 += u64::from(expected.is_some());
        if expected.is_none() && self.rng.one_in(2) {
            self.driver.refuse_calls();
            self.called = false;
        }
    }

    fn ask_for_call(&mut self) {
        self.called = false;
        let used = self.driver.ask_for_call();
        assert_eq!(used, self.published > 0);
        if used {
            self.driver.refuse_calls();
        }
    }

    /// Completes all chains.
    fn complete_all(&mut self) {
        self.check_kick();
        while self.count.0 > self.count.1 {
            let left = (self.added.len(), self.held.len(), self.put.len());
            while !self.added.is_empty() {
                self.take();
            }
            while !self.held.is_empty() {
                self.put();
            }
            self.publish();
            while self.published > 0 {
                self.take_back();
            }
            assert_ne!(left, (self.added.len(), self.held.len(), self.put.len()));
        }
    }
}

#[test]
fn chains_complete_in_any_order_through_many_rounds() {
    for size in 1..=17_u16 {
        for event_idx in [false, true] {
            let mut pair = Pair::new(u64::from(size), size, event_idx);
            while pair.descriptors < 20_000 * u64::from(size) {
                pair.step();
            }
            pair.complete_all();
        }
    }
}

fn put_u64(memory: &GuestMemory, gpa: u64, value: u64) {
    memory.slice(gpa, 8).expect("in memory").write_slice(&value.to_ne_bytes(), 0).expect("8 bytes");
}

fn get_u64(memory: &GuestMemory, gpa: u64) -> u64 {
    let mut bytes = [0; 8];
    memory.slice(gpa, 8).expect("in memory").read_slice(&mut bytes, 0).expect("8 bytes");
    u64::from_ne_bytes(bytes)
}

/// The device's answer to a question.
fn answer(question: u64) -> u64 {
    question.wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// The device's thread. It answers until no chain is left and `done` is set. It holds chains back,
/// returns them in a different order, and sleeps when it has none.
fn serve(memory: &GuestMemory, mut device: Device, done: &AtomicBool, call: impl Fn()) -> u64 {
    let mut rng = Rng::new(1);
    let mut held: Vec<Held> = vec![];
    let mut count = 0;
    loop {
        while held.len() < 8
            && let Some(chain) = device.take()
        {
            held.push(chain);
        }
        for _ in 0..held.len().min(1 + rng.below(4)) {
            let chain = held.swap_remove(rng.below(held.len()));
            let question = get_u64(memory, chain.buffers[0].gpa);
            put_u64(memory, chain.buffers.last().expect("two buffers").gpa, answer(question));
            device.put(&chain, 8);
            count += 1;
        }
        if device.publish() == Some(true) {
            call();
        }
        if held.is_empty() && device.arm() {
            while !device.pending() {
                if done.load(Ordering::Acquire) {
                    return count;
                }
                thread::park();
            }
        }
    }
}

/// The driver's thread. It asks `total` questions, and sleeps when it has to wait.
fn ask(memory: &GuestMemory, mut driver: Driver, total: u64, kick: impl Fn()) {
    let mut rng = Rng::new(2);
    let mut asked = BTreeMap::new();
    let mut count = 0;
    let mut answered = 0;
    while answered < total {
        for _ in 0..1 + rng.below(4) {
            let indirect = rng.one_in(2);
            let parts = if indirect { 2 } else { 2.min(driver.room()) };
            if count == total || driver.room() == 0 || parts < 2 {
                break;
            }
            // The driver chooses a free place for the data. There are as many places as chains.
            let place =
                (0..).find(|place| !asked.values().any(|(p, _)| p == place)).expect("a free place");
            let at = DATA + DATA_BYTES * place;
            put_u64(memory, at, count);
            put_u64(memory, at + 8, 0);
            let question = Buffer { gpa: at, len: 8, write: false };
            let reply = Buffer { gpa: at + 8, len: 8, write: true };
            let table = indirect.then_some(TABLES + TABLE_BYTES * place);
            let id = driver.add(&[question, reply], table);
            assert_eq!(asked.insert(id, (place, count)), None, "the id is in use");
            count += 1;
        }
        if driver.wants_kick() {
            kick();
        }
        let mut returned = false;
        while let Some((id, len)) = driver.take() {
            let (place, question) = asked.remove(&id).expect("a question with this id");
            assert_eq!(len, 8);
            assert_eq!(get_u64(memory, DATA + DATA_BYTES * place + 8), answer(question));
            answered += 1;
            returned = true;
        }
        let full = driver.room() == 0 || count == total;
        if !returned && !asked.is_empty() && (full || rng.one_in(2)) {
            let mut used = driver.ask_for_call();
            while !used {
                thread::park();
                used = driver.has_used();
            }
            driver.refuse_calls();
        }
    }
    assert!(asked.is_empty());
}

#[test]
fn two_threads_exchange_chains() {
    const TOTAL: u64 = 40_000;
    for size in [2, 3, 8, 17] {
        for event_idx in [false, true] {
            let memory: Arc<GuestMemory> = flat_at(MEMORY, 0);
            let driver = Driver::new(&memory, ADDRS, size, event_idx, 0);
            let device = Device::new(&memory, ADDRS, size, event_idx, position(0, size));
            let done = AtomicBool::new(false);
            let main = thread::current();
            thread::scope(|scope| {
                let server = scope.spawn(|| serve(&memory, device, &done, || main.unpark()));
                let kick = || server.thread().unpark();
                ask(&memory, driver, TOTAL, kick);
                done.store(true, Ordering::Release);
                kick();
                assert_eq!(server.join().expect("the device's thread"), TOTAL);
            });
        }
    }
}
