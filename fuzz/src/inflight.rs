//! In-flight areas from an untrusted front end, which may write into them meanwhile.
//!
//! An input is either a history of trackers (processes that start, track and are killed) or a queue that starts with
//! an area and whose ring is served. Invariants:
//!
//! * The entries to resubmit exist, are distinct, and fit the ring.
//! * If nobody else writes into the area, a process that starts finds exactly what the previous one had in flight,
//!   provided that the previous one found no foreign entries.
//! * Only the queue's own part of the area is written.
//! * A queue that starts with any area resubmits what has to be resubmitted, and finishes.
#![expect(unsafe_code, reason = "visits a queue as its reactor does")]

use std::cell::RefCell;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::thread;

use closer::ForeignFd;
use guest_memory::FileError;
use guest_memory::Unmapper;
use qsbr::Domain;
use reactor::{Iteration, PollHint, Pollable};
use vhost_blk::config::Disk;
use vhost_blk::{BlkQueue, BlkView};
use vhost_target::Events;
use vhost_target::queue::{NewQueue, Queue, QueueId, QueueState, Tracked, ViewSpec};
use virtqueue::inflight::{Area, AreaSpec, Error, Recovery, Tracker};
use virtqueue::{Desc, Layout, RingAddrs};

use crate::disk::ModelDisk;
use crate::guest::{Guest, memfd};
use crate::input::Input;

const FILE_BYTES: usize = 0x4000;
const WRAP: u16 = 1 << 15;
const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;
/// Limit on mappings at a time: another thread unmaps them, and is slower than the inputs.
const MAPPINGS_MAX: usize = 32;

struct Stage {
    guest: Guest,
    events: Events,
    unmapper: Unmapper,
    file: File,
}

thread_local! {
    static STAGE: RefCell<Stage> = RefCell::new(Stage::new());
}

impl Stage {
    fn new() -> Self {
        let guest = Guest::new();
        let unmapper = guest.unmapper().limited(MAPPINGS_MAX);
        let file = File::from(memfd(FILE_BYTES as u64));
        Self { guest, events: Events::new().expect("an eventfd"), unmapper, file }
    }

    fn contents(&self) -> Vec<u8> {
        let mut bytes = vec![0; FILE_BYTES];
        self.file.read_exact_at(&mut bytes, 0).expect("a memfd");
        bytes
    }

    fn map(&self, spec: AreaSpec) -> Option<Arc<Area>> {
        let fd = || ForeignFd::alone(OwnedFd::from(self.file.try_clone().expect("an fd")));
        loop {
            match Area::map(spec, &fd(), &self.unmapper) {
                Ok(area) => return Some(Arc::new(area)),
                Err(Error::File(FileError::TooManyOfController(_))) => thread::yield_now(),
                Err(_) => return None,
            }
        }
    }
}

/// Runs an input.
///
/// # Panics
/// An invariant is broken.
pub fn run(bytes: &[u8]) {
    STAGE.with_borrow_mut(|stage| {
        let mut input = Input::new(bytes);
        let options = input.u8();
        let mut spec = AreaSpec {
            mmap_size: FILE_BYTES as u64,
            mmap_offset: 0,
            num_queues: u16::from(input.u8() % 4),
            queue_size: u16::from(input.u8() % 48),
        };
        if options & 1 != 0 {
            spec.mmap_size = input.u16().into();
            spec.mmap_offset = u64::from(input.u8()) * 32;
        }
        if options & 2 != 0 {
            (spec.num_queues, spec.queue_size) = (input.u16(), input.u16());
        }
        let packed = options & 4 != 0;
        fill(stage, spec, packed, options & 8 != 0, &mut input);
        let Some(area) = stage.map(spec) else { return };
        assert!((spec.queue_size, spec.num_queues) == (area.queue_size(), area.num_queues()));
        if options & 16 != 0 {
            serve(stage, &area, packed, &mut input);
        } else {
            let before = stage.contents();
            let queue = usize::from(input.u8() % 4);
            Story::play(stage, (&area, spec.mmap_offset), queue, packed, &mut input);
            let part = part_bytes(spec.queue_size, packed);
            let own = spec.mmap_offset as usize + queue * part;
            let after = stage.contents();
            let changed = (0..FILE_BYTES)
                .find(|at| before[*at] != after[*at] && !(own..own + part).contains(at));
            assert_eq!(changed, None, "a write outside of the queue's part, which is at {own:#x}");
        }
    });
}

/// Bytes of a queue's part, according to the specification.
fn part_bytes(queue_size: u16, packed: bool) -> usize {
    let entry = if packed { 32 } else { 16 };
    (entry * (usize::from(queue_size) + 1)).next_multiple_of(64)
}

/// Writes foreign bytes into the area: as they are in the input, or adjusted to be nearly valid.
fn fill(stage: &Stage, spec: AreaSpec, packed: bool, sound: bool, input: &mut Input<'_>) {
    let mut bytes = vec![0; FILE_BYTES];
    let len = usize::from(input.u16()) % 2048;
    let at = spec.mmap_offset as usize % FILE_BYTES;
    let given = input.bytes(len);
    let to = given.len().min(FILE_BYTES - at);
    bytes[at..at + to].copy_from_slice(&given[..to]);
    if sound {
        let small = u16::from_le_bytes([spec.queue_size as u8, 0]) + 1;
        for half in bytes[at..at + to].chunks_exact_mut(2) {
            let value = u16::from_le_bytes([half[0], half[1]]) % small;
            half.copy_from_slice(&value.to_le_bytes());
        }
        let part = part_bytes(spec.queue_size, packed);
        for queue in 0..usize::from(spec.num_queues.min(4)) {
            let version = at + queue * part + 8;
            if version + 2 <= FILE_BYTES {
                bytes[version..version + 2].copy_from_slice(&[1, 0]);
            }
        }
    }
    stage.file.write_all_at(&bytes, 0).expect("a memfd");
}

/// A request in flight, as its front end knows it.
#[derive(Clone, Debug, Default)]
struct Live {
    entry: u16,
    span: u16,
    /// The descriptors that were recorded; `None` for requests that were found in flight at the start.
    descs: Option<Vec<Desc>>,
}

/// A sequence of processes that track one queue.
struct Story<'a> {
    area: &'a Arc<Area>,
    /// Offset of the area in its file.
    offset: u64,
    queue: usize,
    size: u16,
    packed: bool,
    tracker: Tracker,
    /// Requests in flight, including those in `put`.
    live: Vec<Live>,
    /// Put into the used ring, and not published.
    put: Vec<Live>,
    used: u16,
    last_avail: u16,
    /// Flags of a packed ring's descriptors.
    flags: Vec<u16>,
    /// Nobody else has written what the process relies on: not since it started, nor the requests that it found in
    /// flight, whose links are foreign until they are done.
    trusted: bool,
}

impl<'a> Story<'a> {
    fn play(
        stage: &Stage,
        (area, offset): (&'a Arc<Area>, u64),
        queue: usize,
        packed: bool,
        input: &mut Input<'_>,
    ) {
        let size = u16::from(input.u8() % 48);
        let base = input.u16();
        let flags: Vec<u16> =
            (0..size).map(|_| input.pick(&[0, AVAIL, USED, AVAIL | USED])).collect();
        let Some((tracker, recovery)) = begin(area, queue, size, packed, base, &flags) else {
            return;
        };
        check(&tracker, &recovery, size, packed, area);
        let live: Vec<_> =
            recovery.resubmissions.iter().map(|&entry| Live { entry, ..Live::default() }).collect();
        let mut story = Self {
            area,
            offset,
            queue,
            size,
            packed,
            tracker,
            live,
            put: vec![],
            used: recovery.used,
            last_avail: recovery.last_avail,
            flags,
            trusted: recovery.resubmissions.is_empty(),
        };
        story.measure();
        for _ in 0..200 {
            if input.is_empty() {
                break;
            }
            story.step(stage, input);
        }
        story.kill();
    }

    /// Determines the lengths of the requests that were found in flight.
    fn measure(&mut self) {
        for live in &mut self.live {
            live.span = 1;
            if self.packed {
                live.span = 0;
                let known = self.tracker.descs(live.entry, |_| live.span += 1);
                assert!(known || !self.trusted, "entry {} is not in order", live.entry);
            }
        }
        self.take_back();
    }

    /// As a queue does when it starts.
    fn take_back(&mut self) {
        let mut position = self.used;
        while self.packed && position != self.last_avail {
            self.flags[usize::from(position & !WRAP)] = available(position);
            position = advance(position, 1, self.size);
        }
    }

    fn step(&mut self, stage: &Stage, input: &mut Input<'_>) {
        match input.u8() % 8 {
            0..3 => self.fetch(input),
            3 | 4 => {
                let waiting: Vec<usize> = (0..self.live.len())
                    .filter(|n| !self.put.iter().any(|put| put.entry == self.live[*n].entry))
                    .collect();
                if !waiting.is_empty() {
                    let live = self.live[waiting[usize::from(input.u8()) % waiting.len()]].clone();
                    self.tracker.put(live.entry);
                    self.put.push(live);
                }
            }
            5 => self.publish(input.u8() % 4),
            6 => self.kill(),
            _ => {
                let at = u64::from(input.u16()) % (FILE_BYTES as u64 - 8);
                let part = part_bytes(self.area.queue_size(), self.packed) as u64;
                // When writes outside of the queue's part are checked, nobody else writes.
                let own = self.offset + self.queue as u64 * part;
                stage.file.write_all_at(input.bytes(2), own + at % (part - 2)).expect("a memfd");
                self.trusted = false;
            }
        }
    }

    fn fetch(&mut self, input: &mut Input<'_>) {
        let taken: u16 = self.live.iter().map(|live| live.span).sum();
        let Some(room) = self.size.checked_sub(taken).filter(|room| *room > 0) else { return };
        if !self.packed {
            let head = u16::from(input.u8()) % self.size;
            if self.live.iter().all(|live| live.entry != head) {
                self.tracker.fetched(head);
                self.live.push(Live { entry: head, span: 1, descs: None });
            }
            return;
        }
        let span = u16::from(input.u8() % 4 + 1).min(room);
        let desc =
            |n: u16| Desc { addr: u64::from(n) << 12, len: u32::from(n) + 1, flags: 0, tag: n };
        let descs: Vec<Desc> = (0..span).map(|n| desc(n ^ self.last_avail)).collect();
        let entry = self.tracker.fetched_packed(descs.iter().copied());
        assert!(entry.is_some() || !self.trusted, "no room for {span} of {room}");
        for _ in 0..span {
            self.flags[usize::from(self.last_avail & !WRAP)] = available(self.last_avail);
            self.last_avail = advance(self.last_avail, 1, self.size);
        }
        if let Some(entry) = entry {
            self.live.push(Live { entry, span, descs: Some(descs) });
        }
    }

    /// Publishes the requests in `put`; `stage` says at which step the process is killed.
    fn publish(&mut self, stage: u8) {
        if self.put.is_empty() {
            return;
        }
        let span: u16 = self.put.iter().map(|put| put.span).sum();
        let by = if self.packed { span } else { self.put.len() as u16 };
        let next = if self.packed {
            advance(self.used, by, self.size)
        } else {
            self.used.wrapping_add(by)
        };
        self.tracker.publishing(next);
        if stage == 1 {
            return self.kill();
        }
        if self.packed {
            self.flags[usize::from(self.used & !WRAP)] =
                if self.used & WRAP != 0 { AVAIL | USED } else { 0 };
        }
        self.used = next;
        for put in self.put.drain(..) {
            self.live.retain(|live| live.entry != put.entry);
        }
        if stage == 2 {
            return self.kill();
        }
        self.tracker.published(next);
    }

    /// The process is killed, and the next one begins.
    fn kill(&mut self) {
        self.put.clear();
        let begun = begin(self.area, self.queue, self.size, self.packed, self.used, &self.flags);
        let Some((tracker, recovery)) = begun else {
            assert!(!self.trusted, "no room any more");
            return;
        };
        check(&tracker, &recovery, self.size, self.packed, self.area);
        if self.trusted {
            let mut found = recovery.resubmissions.clone();
            let mut live: Vec<u16> = self.live.iter().map(|live| live.entry).collect();
            found.sort_unstable();
            live.sort_unstable();
            assert_eq!(found, live, "what is in flight");
            assert_eq!((recovery.damage, recovery.used), (None, self.used));
            for live in &self.live {
                let mut found = vec![];
                let known = !self.packed || tracker.descs(live.entry, |desc| found.push(desc));
                assert!(
                    known && live.descs.as_ref().is_none_or(|descs| *descs == found),
                    "{live:?}"
                );
            }
        } else {
            self.live = recovery
                .resubmissions
                .iter()
                .map(|&entry| Live { entry, ..Live::default() })
                .collect();
        }
        (self.tracker, self.used, self.last_avail) = (tracker, recovery.used, recovery.last_avail);
        if !self.trusted {
            self.trusted = recovery.resubmissions.is_empty();
            self.measure();
        }
        self.take_back();
    }
}

fn begin(
    area: &Arc<Area>,
    queue: usize,
    size: u16,
    packed: bool,
    position: u16,
    flags: &[u16],
) -> Option<(Tracker, Recovery)> {
    if packed {
        Tracker::packed(area, queue, size, position, |at| flags[usize::from(at & !WRAP)])
    } else {
        Tracker::split(area, queue, size, position)
    }
}

fn available(position: u16) -> u16 {
    if position & WRAP != 0 { AVAIL } else { USED }
}

fn advance(position: u16, by: u16, size: u16) -> u16 {
    let (index, wrap) = ((position & !WRAP) + by, position & WRAP);
    if index < size { index | wrap } else { (index - size) | (wrap ^ WRAP) }
}

/// Invariants of every recovery.
fn check(tracker: &Tracker, recovery: &Recovery, size: u16, packed: bool, area: &Arc<Area>) {
    let Recovery { used, last_avail, resubmissions, .. } = recovery;
    let mut seen = vec![false; area.queue_size().into()];
    let mut total = 0;
    for &entry in resubmissions {
        assert!(entry < if packed { area.queue_size() } else { size }, "entry {entry}");
        assert!(!std::mem::replace(&mut seen[usize::from(entry)], true), "entry {entry} twice");
        let mut span = 0;
        if packed {
            assert!(tracker.descs(entry, |_| span += 1), "entry {entry} is not in order");
        }
        total += if packed { span } else { 1 };
    }
    assert!(total <= size, "{total} of {size}");
    if packed {
        assert!(used & !WRAP < size && last_avail & !WRAP < size);
        assert_eq!(*last_avail, advance(*used, total, size));
    } else {
        assert_eq!(*last_avail, used.wrapping_add(total));
    }
}

/// A queue starts with the area, on a ring that the input describes.
fn serve(stage: &mut Stage, area: &Arc<Area>, packed: bool, input: &mut Input<'_>) {
    let addrs = RingAddrs { desc: 0, avail: 0x1000, used: 0x1400 };
    let size = match input.u8() % 48 {
        size if packed => u16::from(size) + 1,
        size => 1 << (size % 6),
    };
    let (base, used) = (input.u16(), input.u16());
    let ring = usize::from(input.u8() % 3);
    stage.guest.clear();
    stage.guest.put(0, addrs.used + 2, &used.to_le_bytes());
    let available = used.wrapping_add(u16::from(input.u8()) % (size + 1));
    stage.guest.put(0, addrs.avail + 2, &available.to_le_bytes());
    let model = ModelDisk::new(512);
    model.state().at_once = input.flag();
    for entry in 0..u64::from(size) {
        let bytes: [u8; 3] = input.array();
        stage.guest.put(0, addrs.avail + 4 + 2 * entry, &[bytes[0], 0]);
        let (flags, next) = (u16::from(bytes[1] & 7), u16::from(bytes[2] % 64));
        let desc = [0x2000 + 16 * entry, 16 | u64::from(flags) << 32 | u64::from(next) << 48];
        stage.guest.put(0, addrs.desc + 16 * entry, &desc.map(u64::to_le_bytes).concat());
        if packed {
            let flags = flags | u16::from(bytes[1] & 0x80) | u16::from(bytes[1] & 0x40) << 9;
            let rest = [next.to_le_bytes(), flags.to_le_bytes()].concat();
            stage.guest.put(0, addrs.desc + 16 * entry + 12, &rest);
        }
    }
    let domain = Domain::new(1);
    let Some(mut reader) = domain.reader() else { return };
    reader.online();
    let disk = Arc::new(Disk::new(model.clone(), false));
    let layout = Layout { packed, event_idx: false };
    let device = Some(BlkView::erased(&disk, false));
    let view = ViewSpec::new(stage.guest.table(0), size, addrs, layout, device);
    let tracked = Some(Tracked { area, ring });
    let (id, domain, coalescing) = (QueueId(1), &domain, Arc::default());
    let new = NewQueue { id, domain, view, base, coalescing, tracked };
    let device = BlkQueue::open(Some(&disk), size.min(256)).expect("a channel");
    let Ok(queue) = Queue::new(device, new) else { return };
    let begun = queue.control().last_avail();
    let (mut iteration, mut hint) = (Iteration::new(), PollHint::default());
    let mut visit = || {
        reader.quiesce();
        // SAFETY: this is the queue's one visitor, and the reader is online.
        let busy = unsafe { queue.visit(&reader, &mut iteration, &stage.events, &mut hint) };
        while stage.events.pop().is_some() {}
        busy
    };
    visit();
    model.state().settle();
    let visits = (0..2000).take_while(|_| visit()).count();
    assert!(visits < 2000, "no end of work");
    queue.control().stop();
    for _ in 0..4 {
        visit();
    }
    assert_eq!(queue.control().state(), QueueState::Stopped);
    assert_eq!(queue.control().inflight(), 0);
    if !packed {
        let resubmitted = u64::from(begun.wrapping_sub(used));
        let fetched = u64::from(queue.control().last_avail().wrapping_sub(begun));
        let requests = queue.control().requests().0;
        // A queue that broke may have left requests that had to be resubmitted.
        assert!(
            (fetched..=fetched + resubmitted).contains(&requests),
            "{requests}: {resubmitted} + {fetched}"
        );
    }
    drop(queue);
    assert_eq!(model.state().open, 0, "a channel is open");
}
