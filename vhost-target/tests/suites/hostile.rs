//! Rings and chains that no correct driver makes: loops, descriptors and heads out of range, memory
//! that is not there, indices that jump, and rings with random contents.
#![expect(clippy::cast_possible_truncation, reason = "a test's numbers are small")]

use vhost_target::queue::QueueState;
use virtqueue::Buffer;

use super::device::{Kind, Outcome, Sent, TestDevice};
use super::scene::{ADDRS, DATA, FAR, LAYOUTS, PAGE, Scene};

const SIZE: u16 = 16;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
const AVAIL: u16 = 1 << 7;

/// An address outside of memory.
const OUTSIDE: u64 = 0x800_0000;
/// The buffers of invalid chains, and the memory that is checked for changes: one page on both
/// sides.
const BUFFERS: u64 = DATA + 0x10_0000;
const WATCHED: (u64, usize) = (BUFFERS - PAGE, 4 * PAGE as usize);
const UNTOUCHED: u8 = 0xee;

fn readable(gpa: u64, len: u32) -> Buffer {
    Buffer { gpa, len, write: false }
}

fn writable(gpa: u64, len: u32) -> Buffer {
    Buffer { gpa, len, write: true }
}

fn watch<D: TestDevice>(scene: &Scene<D>) {
    scene.put(WATCHED.0, &[UNTOUCHED; WATCHED.1]);
}

/// Asserts that no byte of the watched memory has changed, but for the one at `except`.
fn assert_untouched<D: TestDevice>(scene: &Scene<D>, except: Option<u64>, what: &str) {
    let bytes = scene.get(WATCHED.0, WATCHED.1);
    let changed =
        (WATCHED.0..).zip(&bytes).find(|&(gpa, &b)| b != UNTOUCHED && Some(gpa) != except);
    assert_eq!(changed, None, "{what}, packed: {}", scene.packed);
}

/// Asserts that the queue serves requests.
fn assert_serves<D: TestDevice>(scene: &mut Scene<D>, what: &str) {
    assert_eq!(scene.queue().control().state(), QueueState::Attached, "{what}");
    let n = scene.submit_one();
    scene.settle();
    scene.complete_all();
    assert_eq!(scene.done(), [n], "{what}");
}

/// Of chains whose buffers cannot be used, a device writes at most the last byte, which is a status
/// in many devices.
pub(crate) fn chains_with_invalid_buffers_are_returned<D: TestDevice>() {
    let header = readable(BUFFERS, 16);
    let data = writable(BUFFERS + 512, 512);
    let cases: [(&str, Vec<Buffer>); 8] = [
        ("the first buffer is outside of memory", vec![readable(OUTSIDE, 16), data]),
        ("the last buffer is outside of memory", vec![header, data, writable(OUTSIDE, 1)]),
        ("a buffer in the middle is outside of memory", vec![header, writable(OUTSIDE, 512), data]),
        ("a buffer ends outside", vec![header, data, writable(FAR + 0x10_0000 - 1, 2)]),
        ("a buffer begins at the highest address", vec![header, data, writable(u64::MAX, 2)]),
        ("an empty buffer", vec![header, writable(BUFFERS + 256, 0), data]),
        ("a readable buffer follows a writable one", vec![header, data, readable(BUFFERS, 1)]),
        (
            "the first buffer is writable and a readable one follows",
            vec![data, header, writable(BUFFERS + 2048, 512)],
        ),
    ];
    for packed in LAYOUTS {
        for indirect in [false, true] {
            let mut scene: Scene<D> = Scene::started(packed, SIZE);
            scene.indirect = indirect;
            for (what, buffers) in &cases {
                watch(&scene);
                let before = scene.queue().control().requests();
                let n = scene.send_raw(buffers);
                scene.settle();
                let taken = scene.take();
                assert!(matches!(taken[..], [(m, 0 | 1)] if m == n), "{what}: {taken:?}");
                let after = scene.queue().control().requests();
                assert_eq!(after, (before.0 + 1, before.1 + 1), "{what}: it counts as an error");
                let last = buffers.iter().rfind(|b| b.write && b.len > 0);
                let last = last.map(|b| b.gpa.wrapping_add(u64::from(b.len)).wrapping_sub(1));
                assert_untouched(&scene, last, what);
                assert_serves(&mut scene, what);
            }
            assert_eq!(scene.device.state().waiting(), 0);
        }
    }
}

/// The index of a descriptor, and its fields: address, length, flags, successor.
type Desc = (u16, u64, u32, u16, u16);

/// Writes a descriptor of a split ring, or of a table at `table`.
fn put_desc<D: TestDevice>(scene: &Scene<D>, table: u64, (index, gpa, len, flags, next): Desc) {
    let at = table + 16 * u64::from(index);
    scene.put(at, &gpa.to_le_bytes());
    scene.put(at + 8, &len.to_le_bytes());
    scene.put(at + 12, &[flags, next].map(u16::to_le_bytes).concat());
}

/// The driver's side of a split ring whose chains are written by hand.
struct Raw<D: TestDevice> {
    scene: Scene<D>,
    avail: u16,
    used: u16,
}

impl<D: TestDevice> Raw<D> {
    fn new() -> Self {
        Self { scene: Scene::started(false, SIZE), avail: 0, used: 0 }
    }

    /// Makes `head` available.
    fn offer(&mut self, head: u16) {
        let at = ADDRS.avail + 4 + 2 * u64::from(self.avail % SIZE);
        self.scene.put(at, &head.to_le_bytes());
        self.avail = self.avail.wrapping_add(1);
        self.scene.put(ADDRS.avail + 2, &self.avail.to_le_bytes());
    }

    /// Returns the next used element: head and length.
    fn take(&mut self) -> Option<(u32, u32)> {
        if self.scene.get(ADDRS.used + 2, 2) == self.used.to_le_bytes() {
            return None;
        }
        let at = ADDRS.used + 4 + 8 * u64::from(self.used % SIZE);
        self.used = self.used.wrapping_add(1);
        let bytes = self.scene.get(at, 8);
        let word = |at: usize| u32::from_le_bytes(std::array::from_fn(|n| bytes[at + n]));
        Some((word(0), word(4)))
    }

    /// Writes a valid request, beginning with descriptor 0.
    fn put_request(&self, n: usize) -> Sent {
        let data = vec![(DATA, 512)];
        let sent = Sent { n, kind: Kind::Read, tag: n as u64, data };
        let buffers = self.scene.device.request(&self.scene.memory, &sent);
        for (buffer, n) in buffers.iter().zip(0_u16..) {
            let next = if usize::from(n) + 1 < buffers.len() { NEXT } else { 0 };
            let write = if buffer.write { WRITE } else { 0 };
            put_desc(&self.scene, ADDRS.desc, (n, buffer.gpa, buffer.len, next | write, n + 1));
        }
        sent
    }

    /// Offers the chain at descriptor 0 and asserts that it is returned without a write.
    fn assert_returned(&mut self, what: &str) {
        watch(&self.scene);
        self.offer(0);
        self.scene.settle();
        assert_eq!(self.take(), Some((0, 0)), "{what}");
        assert_untouched(&self.scene, None, what);
    }

    /// Asserts that a request is served.
    fn assert_serves(&mut self, n: usize) {
        let sent = self.put_request(n);
        self.offer(0);
        self.scene.settle();
        self.scene.complete_all();
        let (head, len) = self.take().expect("the request is completed");
        assert_eq!(head, 0);
        self.scene.device.check_answer(&self.scene.memory, &sent, len, Outcome::Done);
    }
}

pub(crate) fn chains_without_an_end_are_returned<D: TestDevice>() {
    let header = (0, BUFFERS, 16, NEXT, 1);
    let cases: [(&str, Vec<Desc>); 6] = [
        ("a descriptor that is its own successor", vec![(0, BUFFERS, 16, NEXT, 0)]),
        ("a loop", vec![header, (1, BUFFERS, 16, NEXT, 0)]),
        ("a loop with a writable buffer", vec![header, (1, BUFFERS, 1, NEXT | WRITE, 1)]),
        ("a successor out of range", vec![header, (1, BUFFERS, 1, NEXT | WRITE, SIZE)]),
        ("a successor far out of range", vec![header, (1, BUFFERS, 1, NEXT | WRITE, u16::MAX)]),
        (
            "a loop through all descriptors",
            (0..SIZE)
                .map(|n| (n, BUFFERS + 16 * u64::from(n), 16, NEXT | WRITE, (n + 1) % SIZE))
                .collect(),
        ),
    ];
    let mut raw = Raw::<D>::new();
    for (what, descs) in &cases {
        descs.iter().for_each(|desc| put_desc(&raw.scene, ADDRS.desc, *desc));
        raw.assert_returned(what);
    }
    let count = cases.len() as u64;
    assert_eq!(raw.scene.queue().control().requests(), (count, count));
    raw.assert_serves(0);
}

pub(crate) fn invalid_indirect_tables_are_returned<D: TestDevice>() {
    // Not in the watched memory. The descriptors of both tables are valid where a case does not say
    // otherwise.
    let (table, inner) = (BUFFERS + 8 * PAGE, BUFFERS + 9 * PAGE);
    let mut raw = Raw::<D>::new();
    for table in [table, inner] {
        put_desc(&raw.scene, table, (0, BUFFERS, 16, NEXT, 1));
        put_desc(&raw.scene, table, (1, BUFFERS + 512, 512, WRITE, 0));
    }
    let written = (0, BUFFERS, 1, NEXT | WRITE, 1);
    for (what, descs) in [
        ("a length that is no multiple of 16", vec![(0, table, 31, INDIRECT, 0)]),
        (
            "an indirect second descriptor with an invalid length",
            vec![written, (1, table, 15, INDIRECT, 0)],
        ),
        ("no descriptor", vec![(0, table, 0, INDIRECT, 0)]),
        ("a table outside of memory", vec![(0, OUTSIDE, 32, INDIRECT, 0)]),
        ("a table that ends outside of memory", vec![(0, FAR + 0x10_0000 - 16, 32, INDIRECT, 0)]),
        ("a table with a successor", vec![(0, table, 32, INDIRECT | NEXT, 1)]),
        ("a table that is longer than any chain", vec![(0, table, 16 << 16, INDIRECT, 0)]),
    ] {
        descs.iter().for_each(|desc| put_desc(&raw.scene, ADDRS.desc, *desc));
        raw.assert_returned(what);
    }
    put_desc(&raw.scene, ADDRS.desc, (0, table, 32, INDIRECT, 0));
    for (what, desc) in [
        ("a loop in a table", (1, BUFFERS + 512, 512, NEXT | WRITE, 1)),
        ("a successor out of the table", (1, BUFFERS + 512, 512, NEXT | WRITE, 2)),
        ("a table in a table", (1, inner, 32, INDIRECT, 0)),
    ] {
        put_desc(&raw.scene, table, desc);
        raw.assert_returned(what);
    }
    assert_eq!(raw.scene.queue().control().requests(), (10, 10));
    raw.assert_serves(0);
}

pub(crate) fn a_head_out_of_range_is_returned<D: TestDevice>() {
    let mut raw = Raw::<D>::new();
    for head in [SIZE, SIZE + 5, u16::MAX] {
        raw.offer(head);
        raw.scene.settle();
        assert_eq!(raw.take(), Some((head.into(), 0)));
    }
    assert_eq!(raw.scene.queue().control().requests(), (3, 3));
    raw.assert_serves(0);
}

/// The guest offers one chain again and again, although it has not been returned.
pub(crate) fn a_visit_is_bounded<D: TestDevice>() {
    let mut raw = Raw::<D>::new();
    raw.put_request(0);
    (0..SIZE).for_each(|_| raw.offer(0));
    raw.scene.visit();
    assert_eq!(raw.scene.device.state().waiting(), usize::from(SIZE));
    // The ring offers as many requests again, for which there is no slot.
    (0..SIZE).for_each(|_| raw.offer(0));
    assert!(!raw.scene.visit());
    assert_eq!(raw.scene.device.state().waiting(), usize::from(SIZE));
    raw.scene.device.state().complete_all();
    raw.scene.visit();
    let inflight = raw.scene.queue().control().inflight();
    assert_eq!(inflight, u32::from(SIZE), "the slots were reused");
}

pub(crate) fn an_index_that_jumps_stops_only_its_ring<D: TestDevice>() {
    for index in [SIZE + 1, 1 << 15, u16::MAX] {
        let mut raw = Raw::<D>::new();
        raw.put_request(0);
        raw.scene.put(ADDRS.avail + 2, &index.to_le_bytes());
        assert!(!raw.scene.visit());
        raw.scene.assert_broken();
        raw.scene.put(ADDRS.avail + 2, &1_u16.to_le_bytes());
        raw.scene.visit();
        assert_eq!(raw.take(), None, "nothing is fetched any more");
        assert_eq!(raw.scene.seen(), [0; 0]);
        raw.scene.queue().control().stop();
        raw.scene.visit();
        assert_eq!(raw.scene.queue().control().state(), QueueState::Stopped);
    }
}

/// The index goes back while a request is in flight, which still completes.
pub(crate) fn an_index_that_goes_back_stops_only_its_ring<D: TestDevice>() {
    let mut raw = Raw::<D>::new();
    let sent = raw.put_request(0);
    raw.offer(0);
    raw.scene.visit();
    raw.scene.put(ADDRS.avail + 2, &0_u16.to_le_bytes());
    raw.scene.visit();
    raw.scene.assert_broken();
    raw.scene.complete_all();
    let (head, len) = raw.take().expect("the request is completed");
    assert_eq!(head, 0);
    raw.scene.device.check_answer(&raw.scene.memory, &sent, len, Outcome::Done);
    raw.scene.stop();
}

/// The driver must not write to the used ring. The queue does not read it.
pub(crate) fn a_used_ring_that_the_guest_writes_changes_nothing<D: TestDevice>() {
    let mut raw = Raw::<D>::new();
    for n in 0..40 {
        raw.scene.put(ADDRS.used, &vec![0xa5; 6 + 8 * usize::from(SIZE)]);
        let sent = raw.put_request(n);
        raw.offer(0);
        raw.scene.settle();
        raw.scene.complete_all();
        let (head, len) = raw.take().expect("the request is completed");
        assert_eq!(head, 0);
        assert_eq!(raw.scene.get(ADDRS.used + 2, 2), (n as u16 + 1).to_le_bytes());
        raw.scene.device.check_answer(&raw.scene.memory, &sent, len, Outcome::Done);
    }
}

/// The guest changes the descriptors of a request in flight. The queue has read them before.
pub(crate) fn descriptors_that_change_in_flight_are_not_read_again<D: TestDevice>() {
    for packed in LAYOUTS {
        let mut scene: Scene<D> = Scene::started(packed, SIZE);
        scene.submit_one();
        scene.visit();
        watch(&scene);
        for index in 0..SIZE {
            let at = ADDRS.desc + 16 * u64::from(index);
            scene.put(at, &BUFFERS.to_le_bytes());
            scene.put(at + 8, &512_u32.to_le_bytes());
        }
        scene.complete_all();
        assert_untouched(&scene, None, "the buffer of later contents");
        assert_eq!(scene.done(), [0]);
    }
}

/// An unterminated chain in a packed ring that is otherwise empty, and one after a valid request.
pub(crate) fn a_packed_chain_without_an_end_breaks_the_ring<D: TestDevice>() {
    for before in [0, 1] {
        let mut scene: Scene<D> = Scene::started(true, SIZE);
        scene.submit_some(before);
        watch(&scene);
        for position in scene.places()..SIZE.into() {
            put_desc(&scene, ADDRS.desc, (position as u16, BUFFERS, 16, 7, AVAIL | NEXT | WRITE));
        }
        if before == 0 {
            // The ring continues at its beginning, whose descriptors are all available.
            scene.visit();
        }
        scene.settle();
        scene.assert_broken();
        scene.complete_all();
        assert_eq!(scene.done().len(), before);
        assert_untouched(&scene, None, "the unterminated chain");
        scene.stop();
    }
}

/// Returns the next random number.
fn next(rng: &mut u64) -> u64 {
    *rng = rng.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
    *rng >> 33
}

/// Writes a random descriptor, whose buffer is often valid. All buffers in memory are in one range.
fn random_desc(rng: &mut u64, packed: bool) -> Vec<u8> {
    let gpa = match next(rng) % 8 {
        0 => OUTSIDE,
        1 => next(rng) << 33 | 1 << 40,
        2 => BUFFERS + 16 * (next(rng) % 64),
        _ => BUFFERS + next(rng) % 0x1000,
    };
    let len = [0, 1, 16, 16, 16, 512, 512, 600][(next(rng) % 8) as usize] as u32;
    let flags = (next(rng) & next(rng) & 7) as u16;
    let (flags, last) =
        (flags & !(INDIRECT * u16::from(next(rng).is_multiple_of(2))), next(rng) as u16);
    let words = if packed {
        [last % (2 * SIZE), flags | (next(rng) as u16 & 0x8080)]
    } else {
        [flags, last % (SIZE + 2)]
    };
    [&gpa.to_le_bytes()[..], &len.to_le_bytes(), &words.map(u16::to_le_bytes).concat()].concat()
}

/// With any contents of the ring, the queue does not panic, it writes only to the buffers and its
/// own part of the ring, and it can be stopped.
pub(crate) fn random_rings_break_only_their_queue<D: TestDevice>() {
    for packed in LAYOUTS {
        for seed in 1..300_u64 {
            let mut scene: Scene<D> = Scene::started(packed, SIZE);
            let mut rng = seed;
            let table = BUFFERS + 2 * PAGE;
            scene.put(DATA, &[UNTOUCHED; PAGE as usize]);
            for round in 0..4 {
                for at in (ADDRS.desc..)
                    .step_by(16)
                    .take(SIZE.into())
                    .chain((BUFFERS..).step_by(16).take(64))
                {
                    scene.put(at, &random_desc(&mut rng, packed));
                }
                if !packed {
                    let offered = (round + 1) * (next(&mut rng) % 5) as u16;
                    for n in 0..u64::from(SIZE) {
                        let head = (next(&mut rng) % u64::from(SIZE + 2)) as u16;
                        scene.put(ADDRS.avail + 4 + 2 * n, &head.to_le_bytes());
                    }
                    scene.put(ADDRS.avail + 2, &offered.to_le_bytes());
                }
                scene.put(table, &[UNTOUCHED; PAGE as usize]);
                for _ in 0..4 {
                    scene.visit();
                    scene.device.state().complete_all();
                }
            }
            let untouched = |gpa| scene.get(gpa, PAGE as usize).iter().all(|b| *b == UNTOUCHED);
            assert!(untouched(DATA) && untouched(table), "seed {seed}, packed: {packed}");
            scene.queue().control().stop();
            for _ in 0..4 {
                scene.visit();
                scene.device.state().complete_all();
            }
            assert_eq!(scene.queue().control().state(), QueueState::Stopped, "seed {seed}");
            assert_eq!(scene.queue().control().inflight(), 0, "seed {seed}");
        }
    }
}
