//! A queue of a virtio-blk or a virtio-scsi device that is served visit by visit for a guest that writes anything into
//! its rings.
//!
//! The input is a script: chains, well-formed or not; bytes written into descriptors, tables and indices; which I/O
//! the disk completes, fails or has no room for; new views (another memory table, a dirty log, write-through, no
//! disk); and visits. Invariants:
//!
//! * Each chain that is taken is returned once, in the next used element, whose length is at most the chain's
//!   writable bytes.
//! * A visit writes only used elements, statuses or responses, and data of reads. Its writes are marked in the dirty
//!   log.
//! * A well-formed chain has a status or a response when it is returned.
//! * No visit exceeds its limits on requests, bytes and pieces.
//! * A queue breaks only if its ring is invalid.
//! * At the end everything completes, the queue stops, and its views are freed.
//!
//! A guest may have the device write into the ring itself. From then on only the last invariant is checked, and that
//! the process does not crash.
#![expect(unsafe_code, reason = "visits a queue as its reactor does")]

mod device;
mod driver;
mod model;
mod oracle;
mod unit;

use std::cell::RefCell;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, OnceLock};

use bdev::{Bdev, Malloc, MallocOptions, Status};
use closer::ForeignFd;
use guest_memory::DirtyLog;
use qsbr::{Domain, Reader};
use reactor::EventFd;
use reactor::Garbage;
use reactor::{Iteration, PollHint, Pollable};
use vhost_target::Events;
use vhost_target::notify::CallFd;
use vhost_target::queue::{NewQueue, Queue, QueueId, QueueState, TargetQueue, ViewSpec};
use virtqueue::{Layout, RingAddrs};

use crate::disk::{ModelDisk, SECTORS};
use crate::guest::{END, FILE_BYTES, FILES, Guest, memfd};
use crate::input::Input;
use device::{Block, Device};
use driver::Driver;
use model::Chain;
use unit::Unit;

/// The places of the ring's parts, in file 0. In a packed ring, the available ring is the driver's event suppression
/// area, and the used ring is the device's.
const ADDRS: RingAddrs = RingAddrs { desc: 0, avail: 0x1000, used: 0x1400 };
/// Indirect tables.
const TABLES: u64 = 0x2000;
const HEADERS: u64 = 0x6100;
/// Rings, tables and headers end here: device writes below this address change its own input.
const STATUSES: u64 = 0x7000;
const DATA: u64 = 0x7800;

/// Steps of one script.
const STEPS_MAX: usize = 300;
/// Views that are published after the first one.
const VIEWS_MAX: usize = 64;

/// State that is made once per process.
struct Stage {
    guest: Guest,
    events: Events,
    call: Arc<CallFd>,
    log: (Arc<DirtyLog>, File),
    malloc: Arc<dyn Bdev>,
}

impl Stage {
    fn new() -> Self {
        let guest = Guest::new();
        let call = EventFd::new().expect("an eventfd");
        let call = ForeignFd::alone(call.as_fd().try_clone_to_owned().expect("an fd"));
        let fd = memfd(LOG_BYTES as u64);
        let file = File::from(fd.try_clone().expect("an fd"));
        let log = DirtyLog::map(&ForeignFd::alone(fd), 0, LOG_BYTES as u64, guest.unmapper());
        let malloc = MallocOptions {
            name: "Malloc0".into(),
            num_blocks: SECTORS,
            block_size: 512,
            uuid: None,
        };
        Self {
            guest,
            events: Events::new().expect("an eventfd"),
            call: Arc::new(CallFd::from_front_end(call).expect("an eventfd")),
            log: (Arc::new(log.expect("a log")), file),
            malloc: Malloc::create(malloc).expect("memory"),
        }
    }
}

const PAGE: usize = 4096;
const LOG_BYTES: usize = END as usize / PAGE / 8;

thread_local! {
    static STAGE: RefCell<Stage> = RefCell::new(Stage::new());
}

/// Runs an input on a split or a packed ring of a virtio-blk device.
///
/// # Panics
/// An invariant is broken.
pub fn run(bytes: &[u8], packed: bool) {
    run_device::<Block>(bytes, packed);
}

/// Runs an input on a split or a packed ring of a virtio-scsi device. Bit 0 of the first byte selects a packed ring.
///
/// # Panics
/// An invariant is broken.
pub fn run_scsi(bytes: &[u8]) {
    let Some((first, rest)) = bytes.split_first() else { return };
    run_device::<Unit>(rest, first & 1 != 0);
}

fn run_device<D: Device>(bytes: &[u8], packed: bool) {
    STAGE.with_borrow_mut(|stage| {
        let mut input = Input::new(bytes);
        let Some(mut scene) = Scene::<D>::new(stage, &mut input, packed) else { return };
        for _ in 0..STEPS_MAX {
            if input.is_empty() || !scene.step(&mut input) {
                break;
            }
        }
        scene.finish();
    });
}

/// The contents of a view.
#[derive(Clone, Copy)]
struct Shown {
    table: usize,
    log: bool,
    write_through: bool,
    disk: bool,
}

struct Scene<'s, D: Device> {
    stage: &'s mut Stage,
    model: Arc<ModelDisk>,
    device: D,
    /// The disk is `model`.
    is_model: bool,
    layout: Layout,
    size: u16,
    driver: Driver,
    queue: Arc<Queue<D::Queue>>,
    reader: Reader,
    iteration: Iteration,
    hint: PollHint,
    shown: Shown,
    generation: u64,
    retired: Vec<Box<dyn Garbage>>,
    /// Taken and not returned, with the memory table that they refer to.
    outstanding: Vec<Chain>,
    /// The device's position, and the number of returned requests.
    last_avail: u16,
    used: u16,
    /// Its position in the used ring when the visit began.
    published: u16,
    done: u64,
    /// The device has not written anything that it also reads.
    exact: bool,
    broken: bool,
    stopping: bool,
}

impl<'s, D: Device> Scene<'s, D> {
    fn new(stage: &'s mut Stage, input: &mut Input<'_>, packed: bool) -> Option<Self> {
        let options = input.u8();
        let size = match input.u8() {
            // Mostly small ones, which are faster to make.
            size if packed => {
                if size & 3 == 0 {
                    u16::from(size) + 1
                } else {
                    u16::from(size % 24) + 1
                }
            }
            size if size & 7 == 0 => 1 << (size >> 3 & 7) << 1,
            size => 1 << (size % 5),
        };
        let base = match input.u16() {
            base if packed => (base & 0x8000) | ((base & 0x7fff) % size),
            base => base,
        };
        stage.guest.clear();
        if !packed {
            stage.guest.put(0, ADDRS.used + 2, &base.to_le_bytes());
        }
        let model = ModelDisk::new(if options & 1 != 0 { 4096 } else { 512 });
        let hosts = [(0, 0), (0, FILE_BYTES as u64), (1, FILE_BYTES as u64)];
        if D::GUEST_MEMORY_ONLY {
            model.state().memory = hosts
                .map(|(table, gpa)| stage.guest.table(table).range(gpa, FILE_BYTES))
                .map(|host| (host.map_or(0, |host| host as usize), FILE_BYTES))
                .into();
        }
        let is_model = options & 2 == 0;
        let bdev = if is_model { model.clone() as _ } else { Arc::clone(&stage.malloc) };
        let device = D::new(bdev, options & 4 != 0);
        let layout = Layout { packed, event_idx: options & 8 != 0 };
        let shown = Shown {
            table: 0,
            log: options & 16 != 0,
            write_through: options & 32 != 0,
            disk: true,
        };
        let domain = Domain::new(1);
        let mut reader = domain.reader()?;
        reader.online();
        let view = view(stage, &device, size, layout, shown, 1);
        let (id, domain, coalescing) = (QueueId(1), &domain, Arc::default());
        let new = NewQueue { id, domain, view, base, coalescing, tracked: None };
        let queue = Queue::new(device.open(size.min(256)), new).ok()?;
        Some(Self {
            driver: Driver::new(size, packed, base),
            model,
            device,
            is_model,
            layout,
            size,
            queue,
            reader,
            iteration: Iteration::new(),
            hint: PollHint::default(),
            shown,
            generation: 1,
            retired: vec![],
            outstanding: vec![],
            last_avail: base,
            used: base,
            published: base,
            done: 0,
            exact: true,
            broken: false,
            stopping: false,
            stage,
        })
    }

    /// One step of the script; `false` if it is the last.
    fn step(&mut self, input: &mut Input<'_>) -> bool {
        let table = self.shown.table;
        match input.u8() % 16 {
            0..5 => self.driver.offer::<D>(&mut self.stage.guest, table, input),
            5..9 => self.visit(),
            9 => {
                let at = u64::from(input.u16()) % STATUSES;
                let len = usize::from(input.u8() % 17);
                self.stage.guest.put(table, at, input.bytes(len));
            }
            10 => self.driver.jump(&mut self.stage.guest, input.u16()),
            11 => self.driver.events(&mut self.stage.guest, input.u16(), input.u16()),
            12 | 13 => {
                let nth = input.u8().into();
                self.complete(nth);
            }
            14 => self.set_disk(input),
            _ => return self.control(input),
        }
        true
    }

    fn complete(&mut self, nth: usize) {
        self.model.state().complete(nth);
    }

    fn set_disk(&mut self, input: &mut Input<'_>) {
        let (what, n) = (input.u8(), usize::from(input.u8()));
        let mut state = self.model.state();
        state.at_once = what & 1 != 0;
        state.room = (what & 2 != 0).then_some(n);
        if what & 4 != 0 {
            state.failing_in = n % 8 + 1;
            let unsupported = what & 8 != 0;
            state.failure = Some(if unsupported { Status::Unsupported } else { Status::IoError });
        }
    }

    /// An operation of the control side; `false` if it stops the queue.
    fn control(&mut self, input: &mut Input<'_>) -> bool {
        let what = input.u8() % 8;
        match what {
            4 => self.queue.control().stop(),
            5 => self.queue.control().reset(),
            _ => {}
        }
        self.stopping |= matches!(what, 4 | 5);
        if self.retired.len() < VIEWS_MAX {
            match what {
                0 => self.shown.table ^= 1,
                1 => self.shown.log ^= true,
                2 => self.shown.write_through ^= true,
                3 => self.shown.disk = false,
                _ => {}
            }
            self.generation += 1;
            let (size, layout) = (self.size, self.layout);
            let view = view(self.stage, &self.device, size, layout, self.shown, self.generation);
            self.retired.push(self.queue.publish(view).expect("a ring in memory"));
        }
        !self.stopping
    }

    fn visit_blindly(&mut self) -> bool {
        self.reader.quiesce();
        // SAFETY: this is the queue's one visitor, and the reader is online.
        let busy = unsafe {
            self.queue.visit(&self.reader, &mut self.iteration, &self.stage.events, &mut self.hint)
        };
        while self.stage.events.pop().is_some() {}
        busy
    }

    fn visit(&mut self) {
        self.visit_and_look();
    }

    fn visit_and_look(&mut self) -> bool {
        self.stage.guest.remember();
        self.published = self.used;
        if self.shown.log {
            self.stage.log.1.write_all_at(&[0; LOG_BYTES], 0).expect("a memfd");
        }
        let busy = self.visit_blindly();
        if self.exact {
            self.look_at_fetched();
        }
        if self.exact {
            self.look_at_used_and_writes();
        }
        self.look_at_state();
        busy
    }

    /// Completes everything, and stops the queue.
    fn finish(mut self) {
        self.model.state().settle();
        // A guest may offer requests for ever: only what is available now is taken.
        let visits = (0..1000).take_while(|_| self.visit_and_look()).count();
        assert!(visits < 1000, "no end of work");
        if self.exact {
            assert_eq!(self.outstanding.len(), 0, "did not come back");
        }
        assert_eq!(self.queue.control().inflight(), 0);
        self.queue.control().stop();
        for _ in 0..4 {
            if self.queue.control().state() != QueueState::Stopped {
                self.visit_and_look();
            }
        }
        assert_eq!(self.queue.control().state(), QueueState::Stopped);
        self.reader.offline();
        for garbage in self.retired.drain(..) {
            assert!(garbage.try_free().is_none(), "a view is kept");
        }
        assert_eq!(self.queue.control().quarantined_bytes(), 0);
        drop(self.queue);
        drop(self.device);
        assert_eq!(self.model.state().open, 0, "a channel is open");
    }
}

fn view<D: Device>(
    stage: &Stage,
    device: &D,
    size: u16,
    layout: Layout,
    shown: Shown,
    generation: u64,
) -> ViewSpec {
    let memory = stage.guest.table(shown.table);
    let device = shown.disk.then(|| device.view(shown.write_through));
    ViewSpec {
        generation,
        call: Some(Arc::clone(&stage.call)),
        log: shown.log.then(|| Arc::clone(&stage.log.0)),
        ..ViewSpec::new(memory, size, ADDRS, layout, device)
    }
}

/// Prints an event, when an input is replayed with `VHOST_FUZZ_TRACE` set.
fn trace(what: &dyn Fn() -> String) {
    static WANTED: OnceLock<bool> = OnceLock::new();
    if *WANTED.get_or_init(|| std::env::var_os("VHOST_FUZZ_TRACE").is_some()) {
        eprintln!("{}", what());
    }
}

const _: () = assert!(FILES == 3, "which of them a table has is written down in `Guest::locate`");
