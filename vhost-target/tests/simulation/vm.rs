//! A virtual machine: its memory, and the driver's side of its rings.
//!
//! It checks what a driver relies on: each chain is returned once, with the status of the disk, and
//! with the data that the disk has read.
#![expect(clippy::cast_possible_truncation, reason = "sizes of small memories")]

use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::sync::{Arc, OnceLock};

use closer::ForeignFd;
use guest_memory::Unmapper;
use guest_memory::{GuestMemory, RegionSpec};
use virtqueue::inflight::{Area, AreaSpec};
use virtqueue::{Buffer, RingAddrs};
use vm_memory::Bytes;

use super::backend::DeviceKind;
use super::dirty::Logs;
use super::probe;
use super::request::{Kind, Place, Progress, Request};
use crate::driver::Driver;
use guest_memory::testing::memfd;

/// Rings of a machine.
pub(crate) const RINGS: usize = 4;
/// The address of the machine's memory in the front end.
const USER: u64 = 0x7000_0000;
const MAIN_LEN: u64 = 0x1_0000;
/// The part that every table includes: all rings, and the data of the first two.
const SMALL_LEN: u64 = 0x9000;
pub(super) const EXTRA: u64 = 0x10_0000;
/// From this address on, each table has a page of its own, which shows whether that table is still
/// mapped.
const MARKS: u64 = 0x20_0000;
pub(super) const PAGE: u64 = 0x1000;
/// Descriptors of a ring at most.
const RING_SIZE_MAX: u16 = 16;

const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// The state that a driver keeps of a ring.
#[derive(Debug)]
pub(crate) struct Ring {
    pub(crate) size: u16,
    pub(crate) slots: Vec<Option<Request>>,
    avail: u16,
    seen: u16,
    /// The contents of the used ring and the statuses when the back end replied that it had
    /// stopped.
    pub(crate) quiet: Option<Vec<u8>>,
    /// A connection has started it since it was reset.
    pub(crate) started: bool,
    /// The fetched requests are not recorded: the driver has to offer them again.
    pub(crate) lossy: bool,
    /// The eventfd of the driver's kicks, if the back end has one.
    pub(crate) kick: Option<File>,
    packed: Option<Packed>,
}

/// A packed ring's driver, and the slot of each buffer id.
#[derive(Debug)]
struct Packed {
    driver: Driver,
    slots: Vec<usize>,
}

/// The regions of a memory table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Layout {
    Whole,
    Split,
    WholeAndExtra,
    SplitAndExtra,
    Small,
    /// Without the rings.
    NoRings,
}

#[derive(Debug)]
pub(crate) struct Vm {
    pub(crate) controller: usize,
    pub(crate) device: DeviceKind,
    pub(crate) event_idx: bool,
    pub(crate) packed: bool,
    /// Whether its memory is set up in slots.
    pub(crate) slots: bool,
    /// Features that its driver does not support.
    pub(crate) declined: u64,
    pub(crate) rings: Vec<Ring>,
    pub(super) logs: Logs,
    /// The pages that identify the tables.
    marks: Vec<OwnedFd>,
    main: OwnedFd,
    extra: OwnedFd,
    memory: Arc<GuestMemory>,
    /// The number of the in-flight area, and the area.
    area: Option<(usize, AreaSpec, OwnedFd)>,
}

// The target writes to pages of their own: descriptors, used rings, statuses, data. Those of ring 0
// cross page boundaries.

/// Bytes from a part of a ring to that of the next ring.
const STRIDE: u64 = 0x100;

fn desc_gpa(ring: usize) -> u64 {
    0xf80 + STRIDE * ring as u64
}

/// The index is in another page than the elements.
fn used_gpa(ring: usize) -> u64 {
    0x1ffc + STRIDE * ring as u64
}

fn avail_gpa(ring: usize) -> u64 {
    0x3000 + STRIDE * ring as u64
}

fn header_gpa(ring: usize, slot: usize) -> u64 {
    0x3400 + STRIDE * ring as u64 + 16 * slot as u64
}

/// Returns the address of an indirect table.
fn table_gpa(ring: usize, slot: usize) -> u64 {
    0x3800 + 2 * STRIDE * ring as u64 + 0x40 * slot as u64
}

pub(super) fn status_gpa(ring: usize, slot: usize) -> u64 {
    0x4000 + STRIDE * ring as u64 + slot as u64
}

fn data_gpa(ring: usize, slot: usize) -> u64 {
    0x5000 + 0x2000 * ring as u64 + 0x400 * slot as u64
}

/// Returns the addresses of a ring's parts in the front end: descriptors, available, used.
pub(crate) fn user_addrs(ring: usize) -> (u64, u64, u64) {
    (USER + desc_gpa(ring), USER + avail_gpa(ring), USER + used_gpa(ring))
}

fn dup(fd: &OwnedFd) -> OwnedFd {
    fd.try_clone().expect("an fd")
}

fn spec(gpa: u64, size: u64, offset: u64) -> RegionSpec {
    RegionSpec { gpa, size, user_addr: USER + gpa, offset }
}

/// Returns the number of the table that a region identifies.
pub(crate) fn table_of(region: &RegionSpec) -> Option<usize> {
    Some((region.gpa.checked_sub(MARKS)? / PAGE) as usize)
}

fn new_area(number: usize, packed: bool) -> (usize, AreaSpec, OwnedFd) {
    let (spec, fd) = Area::create(RINGS as u16, RING_SIZE_MAX, packed).expect("an area");
    (number, spec, fd)
}

impl Vm {
    /// Creates a machine. With `tracked`, the back end records requests in flight in an area.
    pub(crate) fn new(
        controller: usize,
        device: DeviceKind,
        event_idx: bool,
        packed: bool,
        tracked: bool,
    ) -> Self {
        static UNMAPPER: OnceLock<Unmapper> = OnceLock::new();
        let unmapper = UNMAPPER.get_or_init(|| Unmapper::start().expect("a thread"));
        let (main, extra) = (memfd(MAIN_LEN), memfd(MAIN_LEN));
        let part = |gpa, fd| (spec(gpa, MAIN_LEN, 0), ForeignFd::alone(dup(fd)));
        let table = vec![part(0, &main), part(EXTRA, &extra)];
        let memory = Arc::new(GuestMemory::map(table, None, unmapper).expect("memory"));
        let ring = || Ring {
            size: 0,
            slots: vec![],
            avail: 0,
            seen: 0,
            quiet: None,
            started: false,
            lossy: false,
            kick: None,
            packed: None,
        };
        let rings = (0..RINGS).map(|_| ring()).collect();
        let marks = vec![];
        let area = tracked.then(|| new_area(0, packed));
        Self {
            controller,
            device,
            event_idx,
            packed,
            slots: false,
            declined: 0,
            rings,
            logs: Logs::default(),
            marks,
            main,
            extra,
            memory,
            area,
        }
    }

    /// Returns the in-flight area of the front end.
    pub(crate) fn area(&self) -> Option<(usize, AreaSpec, OwnedFd)> {
        self.area.as_ref().map(|(number, spec, fd)| (*number, *spec, dup(fd)))
    }

    /// Returns whether no back end uses a ring.
    fn is_unused(&self, ring: usize) -> bool {
        let Ring { ref quiet, started, .. } = self.rings[ring];
        quiet.is_some() || !started
    }

    /// Returns whether the front end or the back end knows the position at which a ring continues.
    pub(crate) fn may_start(&self, ring: usize) -> bool {
        !self.packed || self.area.is_some() || self.is_unused(ring)
    }

    /// Returns whether a ring may be reset. An area can only be replaced as a whole.
    pub(crate) fn may_reset(&self, ring: usize) -> bool {
        let needs_area = |other: usize| {
            let again = self.rings[other].slots.iter().flatten().any(|request| request.again);
            !self.is_unused(other) || other != ring && again
        };
        self.is_unused(ring) && (self.area.is_none() || !(0..RINGS).any(needs_area))
    }

    /// Returns the position at which a ring starts, as the front end sends it.
    pub(crate) fn base(&self, ring: usize) -> u16 {
        match &self.rings[ring].packed {
            Some(packed) => packed.driver.used_position(),
            None => self.used_idx(ring),
        }
    }

    /// Ends the use of its rings by a back end, whatever was fetched. Returns the fetched requests,
    /// with the memory table and the owner of each.
    pub(crate) fn abandon(&mut self) -> Vec<(u64, usize, Request)> {
        let mut fetched = vec![];
        for ring in 0..RINGS {
            if !self.rings[ring].started {
                continue;
            }
            for request in self.rings[ring].slots.iter_mut().flatten() {
                if request.progress != Progress::Offered {
                    fetched.push((request.id, ring, request.clone()));
                    let (table, durable) = (None, false);
                    let progress = Progress::Offered;
                    let again = true;
                    *request = Request { progress, table, durable, again, ..request.clone() };
                }
            }
            let any = fetched.iter().any(|(_, of, _)| *of == ring);
            self.rings[ring].lossy |= any && self.area.is_none();
            self.rings[ring].quiet = Some(self.used_part(ring));
        }
        fetched
    }

    pub(super) fn put(&self, gpa: u64, bytes: &[u8]) {
        let slice = self.memory.slice(gpa, bytes.len()).expect("in memory");
        slice.write_slice(bytes, 0).expect("as long");
    }

    pub(super) fn get(&self, gpa: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.get_into(gpa, &mut bytes);
        bytes
    }

    pub(super) fn get_into(&self, gpa: u64, bytes: &mut [u8]) {
        let slice = self.memory.slice(gpa, bytes.len()).expect("in memory");
        slice.read_slice(bytes, 0).expect("as long");
    }

    fn get_u16(&self, gpa: u64) -> u16 {
        let bytes = self.get(gpa, 2);
        u16::from_le_bytes([bytes[0], bytes[1]])
    }

    /// Returns a new memory table. The page that identifies it comes last.
    pub(crate) fn table(&mut self, layout: Layout) -> Vec<(RegionSpec, OwnedFd)> {
        let mark = memfd(PAGE);
        let main = |gpa: u64, size: u64| (spec(gpa, size, gpa), dup(&self.main));
        let mut table = match layout {
            Layout::Whole | Layout::WholeAndExtra => vec![main(0, MAIN_LEN)],
            Layout::Split | Layout::SplitAndExtra => {
                vec![main(SMALL_LEN, MAIN_LEN - SMALL_LEN), main(0, SMALL_LEN)]
            }
            Layout::Small => vec![main(0, SMALL_LEN)],
            Layout::NoRings => vec![main(SMALL_LEN, MAIN_LEN - SMALL_LEN)],
        };
        if matches!(layout, Layout::WholeAndExtra | Layout::SplitAndExtra) {
            table.push((spec(EXTRA, MAIN_LEN, 0), dup(&self.extra)));
        }
        table.push((spec(MARKS + PAGE * self.marks.len() as u64, PAGE, 0), dup(&mark)));
        self.marks.push(mark);
        table
    }

    /// Returns the number of tables so far.
    pub(crate) fn tables(&self) -> usize {
        self.marks.len()
    }

    /// Returns whether the back end has a table mapped.
    pub(crate) fn is_mapped(&self, table: usize) -> bool {
        probe::is_mapped(&self.marks[table])
    }

    /// Resets a ring that the back end does not use. It begins at `base`. Returns the requests that
    /// are dropped with it.
    pub(crate) fn reset_ring(&mut self, ring: usize, size: u16, base: u16) -> Vec<u64> {
        let slots = vec![None; usize::from(size) / 3];
        let kick = self.rings[ring].kick.take();
        for part in [desc_gpa(ring), avail_gpa(ring), used_gpa(ring)] {
            self.put(part, &[0; STRIDE as usize]);
        }
        let packed = self.packed.then(|| {
            let (desc, avail, used) = (desc_gpa(ring), avail_gpa(ring), used_gpa(ring));
            let addrs = RingAddrs { desc, avail, used };
            let driver = Driver::new(&self.memory, addrs, size, self.event_idx, base.into());
            Packed { driver, slots: vec![0; size.into()] }
        });
        if packed.is_none() {
            self.put(avail_gpa(ring) + 2, &base.to_le_bytes());
            self.put(used_gpa(ring) + 2, &base.to_le_bytes());
        }
        let (avail, seen, quiet, started) = (base, base, None, false);
        let lossy = false;
        let new = Ring { size, slots, avail, seen, quiet, started, lossy, kick, packed };
        let old = std::mem::replace(&mut self.rings[ring], new);
        if old.size > 0
            && let Some((number, ..)) = self.area
        {
            self.area = Some(new_area(number + 1, self.packed));
        }
        self.want_calls(ring);
        self.has_written();
        old.slots.into_iter().flatten().map(|request| request.id).collect()
    }

    fn want_calls(&mut self, ring: usize) {
        if let Some(packed) = &mut self.rings[ring].packed {
            assert!(!packed.driver.ask_for_call(), "ring {ring}: a chain was completed meanwhile");
            return;
        }
        let Ring { size, seen, .. } = self.rings[ring];
        self.put(avail_gpa(ring) + 4 + 2 * u64::from(size), &seen.to_le_bytes());
    }

    pub(crate) fn free_slot(&self, ring: usize) -> Option<usize> {
        self.rings[ring].slots.iter().position(Option::is_none)
    }

    /// Makes a request available.
    pub(crate) fn offer(&mut self, id: u64, kind: Kind, ring: usize, slot: usize, far: bool) {
        let near = data_gpa(ring, slot);
        let data = if far { EXTRA + near } else { near };
        let len = kind.bytes(id);
        let place = Place { header: header_gpa(ring, slot), data, status: status_gpa(ring, slot) };
        let buffers = self.prepare(id, kind, &place);
        let position = self.rings[ring].avail;
        let progress = Progress::Offered;
        let (table, durable) = (None, false);
        let again = false;
        let request = Request { id, progress, table, durable, kind, again, position, data, len };
        self.rings[ring].slots[slot] = Some(request);
        if let Some(packed) = &mut self.rings[ring].packed {
            let table = id.is_multiple_of(3).then(|| table_gpa(ring, slot));
            let buffer_id = packed.driver.add(&buffers, table);
            packed.slots[usize::from(buffer_id)] = slot;
        } else {
            self.offer_split(ring, slot, &buffers);
        }
        if self.rings[ring].quiet.is_some() {
            self.rings[ring].quiet = Some(self.used_part(ring));
        }
        self.has_written();
        self.kick(ring, position);
    }

    fn offer_split(&mut self, ring: usize, slot: usize, buffers: &[Buffer; 3]) {
        let head = 3 * slot as u16;
        for (index, buffer) in (head..).zip(buffers) {
            let next = if index < head + 2 { NEXT } else { 0 };
            let write = if buffer.write { WRITE } else { 0 };
            self.desc(ring, index, buffer.gpa, buffer.len, next | write);
        }
        let state = &mut self.rings[ring];
        let position = state.avail;
        state.avail = position.wrapping_add(1);
        let at = u64::from(position % state.size);
        self.put(avail_gpa(ring) + 4 + 2 * at, &head.to_le_bytes());
        self.put(avail_gpa(ring) + 2, &position.wrapping_add(1).to_le_bytes());
    }

    /// Kicks for the request at `position` if the back end wants it (virtio 1.2, 2.7.10).
    fn kick(&mut self, ring: usize, position: u16) {
        let wanted = if let Some(packed) = &mut self.rings[ring].packed {
            packed.driver.wants_kick()
        } else if self.event_idx {
            let event = used_gpa(ring) + 4 + 8 * u64::from(self.rings[ring].size);
            self.get_u16(event) == position
        } else {
            self.get_u16(used_gpa(ring)) & 1 == 0
        };
        if let (true, Some(mut kick)) = (wanted, self.rings[ring].kick.as_ref()) {
            kick.write_all(&1_u64.to_ne_bytes()).expect("an eventfd");
        }
    }

    fn desc(&self, ring: usize, index: u16, addr: u64, len: u32, flags: u16) {
        let at = desc_gpa(ring) + 16 * u64::from(index);
        self.put(at, &addr.to_le_bytes());
        self.put(at + 8, &len.to_le_bytes());
        self.put(at + 12, &flags.to_le_bytes());
        self.put(at + 14, &(index + 1).to_le_bytes());
    }

    fn used_idx(&self, ring: usize) -> u16 {
        self.get_u16(used_gpa(ring) + 2)
    }

    /// Takes completed chains and returns their requests. `may_fail`: whether a request may have
    /// failed without its device.
    pub(crate) fn consume(&mut self, ring: usize, may_fail: impl Fn(&Request) -> bool) -> Vec<u64> {
        let mut ids = vec![];
        while let Some((slot, written)) = self.take_used(ring) {
            let request = self.rings[ring].slots.get_mut(slot).and_then(Option::take);
            let request = request.unwrap_or_else(|| {
                panic!("ring {ring}: slot {slot} was completed but is not outstanding")
            });
            self.check_answer(ring, slot, &request, written, may_fail(&request));
            ids.push(request.id);
        }
        if !ids.is_empty() {
            self.want_calls(ring);
            self.has_written();
        }
        ids
    }

    /// Returns the next completed chain: its slot, and the written length.
    fn take_used(&mut self, ring: usize) -> Option<(usize, u32)> {
        if let Some(packed) = &mut self.rings[ring].packed {
            let (id, written) = packed.driver.take()?;
            return Some((packed.slots[usize::from(id)], written));
        }
        let Ring { size, seen, .. } = self.rings[ring];
        if seen == self.used_idx(ring) {
            return None;
        }
        let element = self.get(used_gpa(ring) + 4 + 8 * u64::from(seen % size), 8);
        let word = |at: usize| u32::from_le_bytes(std::array::from_fn(|i| element[at + i]));
        let (head, written) = (word(0), word(4));
        assert!(head.is_multiple_of(3), "ring {ring}: chain {head} was never offered");
        self.rings[ring].seen = seen.wrapping_add(1);
        Some((head as usize / 3, written))
    }

    /// Returns all that a stopped back end must not change: used index, elements and statuses; of a
    /// packed ring, descriptors and statuses.
    pub(crate) fn used_part(&self, ring: usize) -> Vec<u8> {
        let Ring { size, ref slots, .. } = self.rings[ring];
        let mut bytes = if self.packed {
            self.get(desc_gpa(ring), 16 * usize::from(size))
        } else {
            self.get(used_gpa(ring) + 2, 2 + 8 * usize::from(size))
        };
        bytes.extend(self.get(status_gpa(ring, 0), slots.len()));
        bytes
    }

    /// Checks the reply to GET_VRING_BASE: all requests before `base` were completed.
    pub(crate) fn check_base(&self, ring: usize, base: u16) {
        assert_eq!(base, self.base(ring), "ring {ring}: the base and the used position");
        for request in self.rings[ring].slots.iter().flatten() {
            let ahead = self.packed || request.position.wrapping_sub(base) < 1 << 15;
            let untouched = request.progress == Progress::Offered;
            assert!(ahead && untouched, "ring {ring}: base {base} was replied before {request:?}");
        }
    }

    /// Returns the requests that were not completed.
    pub(crate) fn outstanding(&self, ring: usize) -> impl Iterator<Item = &Request> {
        self.rings[ring].slots.iter().flatten()
    }
}
