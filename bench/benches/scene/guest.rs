//! A guest's memory, its queues on one disk as a reactor takes them, and the driver of the first.

use std::hint::black_box;
use std::sync::Arc;

use bdev::Bdev;
use closer::ForeignFd;
use front_end::scsi::{Command, CommandQueue, Layout, cdb, lun};
use front_end::{GuestRam, PackedQueue, QueueOptions, Request, STATUS_OK, Segment};
use guest_memory::Unmapper;
use guest_memory::{GuestMemory, RegionSpec};
use qsbr::Domain;
use reactor::{Garbage, Pollable};
use vhost_target::queue::{Event, NewQueue, QueueId, TargetQueue, Tracked, ViewSpec};
use virtqueue::RingAddrs;
use virtqueue::inflight::Area;

use super::devices::Device;

const RAM_BYTES: u64 = 64 << 20;
const RING_SIZE: u16 = 128;

/// What the driver asks for, 4 KiB at a time.
#[derive(Clone, Copy)]
pub(crate) enum Kind {
    Read,
    Write,
    /// A read into two buffers of half the size.
    ReadInTwo,
}

/// How a driver lays out requests.
#[derive(Clone, Copy)]
pub(crate) struct Form {
    pub(crate) packed: bool,
    /// In tables of their own.
    pub(crate) indirect: bool,
}

impl Form {
    pub(crate) const DIRECT: Self = Self { packed: false, indirect: false };
    pub(crate) const INDIRECT: Self = Self { packed: false, indirect: true };
    pub(crate) const PACKED: Self = Self { packed: true, indirect: false };
    pub(crate) const PACKED_INDIRECT: Self = Self { packed: true, indirect: true };

    pub(crate) fn layout(self) -> virtqueue::Layout {
        virtqueue::Layout { packed: self.packed, ..virtqueue::Layout::default() }
    }

    /// The position that a new ring begins at.
    pub(crate) fn base(self) -> u16 {
        if self.packed { front_end::packed::FIRST_BASE } else { 0 }
    }
}

enum Side {
    Split(front_end::Queue),
    Packed(PackedQueue),
    Scsi(CommandQueue),
}

/// READ(16) and WRITE(16) (SBC-3).
const READ_16: u8 = 0x88;
const WRITE_16: u8 = 0x8a;

/// The driver's side of a queue, and buffers for its requests.
pub(crate) struct Driver {
    side: Side,
    whole: [Segment; 1],
    halves: [Segment; 2],
}

impl Driver {
    pub(crate) fn new(ram: &Arc<GuestRam>, index: usize, form: Form) -> Self {
        let Form { packed, indirect } = form;
        let options = QueueOptions { size: RING_SIZE, indirect, ..QueueOptions::default() };
        let side = if packed {
            Side::Packed(PackedQueue::new(ram, index, options, false).unwrap())
        } else {
            Side::Split(front_end::Queue::new(ram, index, options, false).unwrap())
        };
        Self::of(ram, side)
    }

    /// Drives a split ring with commands of virtio-scsi.
    fn scsi(ram: &Arc<GuestRam>) -> Self {
        let options = QueueOptions { size: RING_SIZE, ..QueueOptions::default() };
        Self::of(ram, Side::Scsi(CommandQueue::new(ram, 0, options, (false, false), 0).unwrap()))
    }

    fn of(ram: &Arc<GuestRam>, side: Side) -> Self {
        let buffer = |bytes| ram.alloc(bytes, 4096).unwrap();
        Self { side, whole: [buffer(4096)], halves: [buffer(2048), buffer(2048)] }
    }

    /// Where its ring is.
    pub(crate) fn addrs(&self) -> (u16, RingAddrs) {
        let ring = match &self.side {
            Side::Split(queue) => queue.ring(),
            Side::Packed(queue) => queue.ring(),
            Side::Scsi(queue) => queue.ring(),
        };
        let [desc, avail, used] = ring.addrs();
        (RING_SIZE, RingAddrs { desc, avail, used })
    }

    /// Makes `n` requests available.
    pub(crate) fn submit(&mut self, kind: Kind, n: u64) {
        for sector in (0..n).map(|n| n * 8) {
            let request = match kind {
                Kind::Read => Request::read(sector, &self.whole),
                Kind::Write => Request::write(sector, &self.whole),
                Kind::ReadInTwo => Request::read(sector, &self.halves),
            };
            match &mut self.side {
                Side::Split(queue) => queue.submit(&request),
                Side::Packed(queue) => queue.submit(&request),
                Side::Scsi(queue) => {
                    queue.submit(&command(kind, sector, (&self.whole, &self.halves)), LAYOUT)
                }
            }
            .unwrap();
        }
    }

    /// Sends a command that may get a unit attention, as the first one of a nexus does. `visit` has
    /// it answered.
    pub(crate) fn clear_attention(&mut self, visit: impl FnOnce()) {
        let Side::Scsi(queue) = &mut self.side else { return };
        queue.submit(&Command::new(lun(0, 0), 0, cdb::test_unit_ready()), LAYOUT).unwrap();
        visit();
        assert!(queue.poll().unwrap().is_some(), "it was answered");
    }

    /// Takes back what is done, which has to be well done; answers with how many.
    pub(crate) fn take_back(&mut self) -> u64 {
        let mut n = 0;
        let mut poll = || match &mut self.side {
            Side::Split(queue) => queue.poll().unwrap().map(|done| done.status),
            Side::Packed(queue) => queue.poll().unwrap().map(|done| done.status),
            Side::Scsi(queue) => queue.poll().unwrap().map(|done| {
                assert!(done.response.is_good(), "{:?}", done.response);
                STATUS_OK
            }),
        };
        while let Some(status) = poll() {
            assert_eq!(black_box(status), STATUS_OK);
            n += 1;
        }
        n
    }
}

/// Parts in descriptors of their own, as Linux does.
const LAYOUT: Layout = Layout::Separate;

/// A command of virtio-scsi.
fn command<'a>(
    kind: Kind,
    sector: u64,
    (whole, halves): (&'a [Segment], &'a [Segment]),
) -> Command<'a> {
    let opcode = if matches!(kind, Kind::Write) { WRITE_16 } else { READ_16 };
    let command = Command::new(lun(0, 0), sector, cdb::sixteen(opcode, 0, sector, 8));
    match kind {
        Kind::Read => command.with_data_in(whole),
        Kind::Write => command.with_data_out(whole),
        Kind::ReadInTwo => command.with_data_in(halves),
    }
}

/// A guest with queues over a disk.
pub(crate) struct Guest {
    pub(crate) domain: Arc<Domain>,
    /// All of them, to be published to a reactor.
    pub(crate) queues: Vec<Arc<dyn TargetQueue>>,
    /// Drives the first of them.
    pub(crate) driver: Driver,
    memory: Arc<GuestMemory>,
    device: Device,
    form: Form,
    /// Of the first queue's view.
    generation: u64,
}

impl Guest {
    pub(crate) fn new(queues: usize, form: Form, bdev: &Arc<dyn Bdev>) -> Self {
        Self::with(queues, form, Device::blk(bdev), None)
    }

    /// A guest with one queue of a virtio-scsi device.
    pub(crate) fn scsi(bdev: &Arc<dyn Bdev>) -> Self {
        Self::with(1, Form::DIRECT, Device::scsi(bdev), None)
    }

    /// A guest with one queue whose front end keeps a record of what is in flight.
    pub(crate) fn tracked(form: Form, bdev: &Arc<dyn Bdev>) -> Self {
        let packed = form.layout().packed;
        let (spec, fd) = Area::create(1, RING_SIZE, packed).unwrap();
        let unmapper = Unmapper::start().unwrap();
        let area = Area::map(spec, &ForeignFd::alone(fd), &unmapper).unwrap();
        Self::with(1, form, Device::blk(bdev), Some(&Arc::new(area)))
    }

    fn with(queues: usize, form: Form, device: Device, area: Option<&Arc<Area>>) -> Self {
        let domain = Domain::new(1);
        let ram = GuestRam::new(&[RAM_BYTES]).unwrap();
        let memory = map(&ram);
        let driver = match device {
            Device::Blk(_) => Driver::new(&ram, 0, form),
            Device::Scsi(..) => Driver::scsi(&ram),
        };
        let view = |driver: &Driver| view(driver, form, 1, &memory, &device);
        let queue = |n: usize, view| {
            let tracked = area.map(|area| Tracked { area, ring: n });
            let (id, domain, base) = (QueueId(n as u64), &domain, form.base());
            let new = NewQueue { id, domain, view, base, coalescing: Arc::default(), tracked };
            device.queue(RING_SIZE, new)
        };
        let mut list: Vec<_> =
            (1..queues).map(|n| queue(n, view(&Driver::new(&ram, n, form)))).collect();
        if queues > 0 {
            list.insert(0, queue(0, view(&driver)));
        }
        Self { domain, queues: list, driver, memory, device, form, generation: 1 }
    }

    /// All queues, for a reactor.
    pub(crate) fn pollables(&self) -> Vec<Arc<dyn Pollable<Event>>> {
        self.queues.iter().map(|queue| Arc::clone(queue) as _).collect()
    }

    /// A view for the first queue, to come after those made before.
    pub(crate) fn next_view(&mut self) -> ViewSpec {
        self.generation += 1;
        view(&self.driver, self.form, self.generation, &self.memory, &self.device)
    }

    /// Gives the first queue's reactor a view. The one before can be freed once it was adopted.
    pub(crate) fn hand_over(&self, view: ViewSpec) -> Box<dyn Garbage> {
        self.queues[0].publish(view).unwrap()
    }
}

fn view(
    driver: &Driver,
    form: Form,
    generation: u64,
    memory: &Arc<GuestMemory>,
    device: &Device,
) -> ViewSpec {
    let (size, addrs) = driver.addrs();
    let device = Some(device.view());
    ViewSpec { generation, ..ViewSpec::new(memory, size, addrs, form.layout(), device) }
}

/// The guest's memory as the target maps it.
pub(crate) fn map(ram: &GuestRam) -> Arc<GuestMemory> {
    let line = &ram.table()[0];
    let spec = RegionSpec {
        gpa: line.guest_phys_addr,
        size: line.memory_size,
        user_addr: line.userspace_addr,
        offset: 0,
    };
    let fd = ForeignFd::alone(ram.file(0).try_clone().unwrap().into());
    let unmapper = Unmapper::start().unwrap();
    Arc::new(GuestMemory::map(vec![(spec, fd)], None, &unmapper).unwrap())
}
