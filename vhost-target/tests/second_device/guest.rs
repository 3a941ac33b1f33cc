//! Front ends of a target with one reactor, each with a guest that has one ring.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use closer::ForeignFd;
use guest_memory::testing::memfd;
use reactor::EventFd;
use vhost_target::protocol::request;
use vhost_target::session::Phase;
use vhost_target::{ConnId, ControllerSpec, Core, Mode, Target, Verdict};

use super::source::HeldSource;
use crate::entropy::Entropy;
use crate::wire::{NoSockets, Wire};

pub(crate) const RAM_BYTES: u64 = 0x2_0000;
const USER: u64 = 0x7000_0000;
pub(crate) const SIZE: u16 = 16;
const AVAIL: u64 = 0x1000;
const USED: u64 = 0x2000;
/// Each request has a buffer of its own.
pub(crate) const DATA: u64 = 0x1_0000;
pub(crate) const DATA_BYTES: u64 = 0x100;

/// A target and its transport.
pub(crate) struct World {
    pub(crate) target: Arc<Target>,
}

/// A front end and its guest.
pub(crate) struct Guest {
    target: Arc<Target>,
    pub(crate) id: ConnId,
    pub(crate) wire: Arc<Wire>,
    pub(crate) ram: File,
    /// The number of requests that were offered.
    pub(crate) offered: u16,
}

pub(crate) fn until(mut done: impl FnMut() -> bool) {
    while !done() {
        thread::sleep(Duration::from_micros(50));
    }
}

fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

impl World {
    pub(crate) fn new() -> Self {
        let cores = thread::available_parallelism().map_or(1, usize::from);
        let target = Target::start(&[Core(cores - 1)], Mode::Poll, Arc::new(|| {})).unwrap();
        Self { target }
    }

    /// Creates a controller with its own device. Returns the device's source.
    pub(crate) fn controller(&self, name: &str) -> Arc<HeldSource> {
        self.controller_and_device(name).0
    }

    /// As [`World::controller`]. Returns the device, too.
    pub(crate) fn controller_and_device(&self, name: &str) -> (Arc<HeldSource>, Arc<Entropy>) {
        let source = HeldSource::new(true);
        let device = Entropy::new(source.clone());
        let spec = ControllerSpec {
            name: name.into(),
            socket: name.into(),
            device: device.clone(),
            cores: None,
            packed_ring: false,
        };
        self.target.create_controller(spec, &NoSockets).unwrap();
        (source, device)
    }

    /// Connects a front end and sets up its guest's memory.
    pub(crate) fn connect(&self, controller: &str) -> Option<Guest> {
        let (wire, ram) = (Arc::<Wire>::default(), memfd(RAM_BYTES));
        let id = self.target.connected(controller.as_ref(), wire.clone())?;
        let file = ram.try_clone().unwrap().into();
        let target = Arc::clone(&self.target);
        let guest = Guest { target, id, wire, ram: file, offered: 0 };
        guest.tell(request::SET_FEATURES, &[1 << 32], None);
        guest.tell(request::SET_MEM_TABLE, &[1, 0, RAM_BYTES, USER, 0], Some(ram));
        Some(guest)
    }

    /// Processes the reactors' events until `done`.
    pub(crate) fn settle(&self, done: impl Fn() -> bool) {
        until(|| {
            self.target.process_events();
            done()
        });
    }
}

impl Guest {
    pub(crate) fn send(&self, request: u32, payload: &[u64], fd: Option<OwnedFd>) -> Verdict {
        let fds = fd.into_iter().map(ForeignFd::alone).collect();
        self.target.message(self.id, request, false, &words(payload), fds)
    }

    #[track_caller]
    pub(crate) fn tell(&self, request: u32, payload: &[u64], fd: Option<OwnedFd>) {
        let verdict = self.send(request, payload, fd);
        assert!(matches!(verdict, Verdict::Done | Verdict::Pass), "{request}: {verdict:?}");
    }

    /// Starts the ring.
    pub(crate) fn start(&self) {
        self.tell(request::SET_VRING_NUM, &[u64::from(SIZE) << 32], None);
        let addrs = [0, USER, USER + USED, USER + AVAIL, 0];
        self.tell(request::SET_VRING_ADDR, &addrs, None);
        let kick = EventFd::new().unwrap().as_fd().try_clone_to_owned().unwrap();
        self.tell(request::SET_VRING_KICK, &[0], Some(kick));
    }

    /// Sends GET_VRING_BASE, whose reply is deferred.
    pub(crate) fn stop(&self) {
        let verdict = self.send(request::GET_VRING_BASE, &[0], None);
        assert!(matches!(verdict, Verdict::Deferred), "{verdict:?}");
    }

    pub(crate) fn phase(&self, controller: &str) -> Option<Phase> {
        let controllers = self.target.controllers();
        let controller = controllers.iter().find(|c| c.name == controller)?;
        Some(controller.sessions.last()?.phase)
    }

    /// Offers a request with one writable buffer.
    pub(crate) fn offer(&mut self) {
        let id = self.offered % SIZE;
        let n = u64::from(id);
        let rest = DATA_BYTES | 2 << 32;
        self.ram.write_all_at(&words(&[DATA + DATA_BYTES * n, rest]), 16 * n).unwrap();
        self.ram.write_all_at(&id.to_le_bytes(), AVAIL + 4 + 2 * n).unwrap();
        self.offered += 1;
        self.ram.write_all_at(&self.offered.to_le_bytes(), AVAIL + 2).unwrap();
    }

    /// Returns the number of completed requests.
    pub(crate) fn answered(&self) -> u16 {
        let mut used = [0; 2];
        self.ram.read_exact_at(&mut used, USED + 2).unwrap();
        u16::from_le_bytes(used)
    }

    /// Returns the heads and lengths in the used ring.
    pub(crate) fn used(&self) -> Vec<(u32, u32)> {
        let element = |n: u16| {
            let mut bytes = [0; 8];
            self.ram.read_exact_at(&mut bytes, USED + 4 + 8 * u64::from(n)).unwrap();
            let word = |at| u32::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
            (word(0), word(4))
        };
        (0..self.answered()).map(element).collect()
    }

    /// Asserts that a request completes.
    pub(crate) fn serves(&mut self) {
        self.offer();
        until(|| self.answered() == self.offered);
    }
}
