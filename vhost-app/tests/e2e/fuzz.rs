//! Scripts of `fuzz/` against the real process: random ones of front ends and RPC clients, and
//! those of the committed corpus. The process must not crash, must close everything, and must serve
//! correct clients.
//!
//! `VHOST_FUZZ_SEED` sets the seed, `VHOST_FUZZ_SCRIPTS` the number of scripts.

mod calls;

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;

use bench::{Load, LoadOptions};
use front_end::{FrontEnd, GuestRam, Options, QueueOptions, RawConnection, Request, STATUS_OK};
use serde_json::json;

use crate::input::Input;
use crate::script::{self, FRONTS, Fd, Message, RAM_BYTES, RINGS, Step};
use crate::support::harness::{Vhost, wait_until};

const VERSION: u32 = 1;
const NEED_REPLY: u32 = 1 << 3;
/// Scripts between two checks for leaks.
const LOOK_EVERY: u64 = 20;
const STEPS_MAX: usize = 64;
/// Scripts, unless the environment sets another number.
const SCRIPTS: u64 = 1000;

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().map_or(default, |text| text.parse().unwrap())
}

/// Pseudo-random numbers.
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn bytes(&mut self) -> Vec<u8> {
        let count = 8 + self.next() % 64;
        (0..count).flat_map(|_| self.next().to_le_bytes()).collect()
    }
}

/// A target with controllers to attack, and a neighbour under load.
struct Scene {
    vhost: Vhost,
    neighbour: Load,
    _front_end: FrontEnd,
    fds: usize,
}

impl Scene {
    fn new() -> Self {
        let vhost = Vhost::start(&[]);
        for name in ["n", "a", "b"] {
            let bdev = format!("M{name}");
            let disk = json!({"name": bdev, "num_blocks": 16384, "block_size": 512});
            vhost.ok("bdev_malloc_create", disk);
            let controller = json!({"ctrlr": name, "dev_name": bdev, "packed_ring": name == "b"});
            vhost.ok("vhost_create_blk_controller", controller);
        }
        let ram = GuestRam::new(&[16 << 20]).unwrap();
        let socket = vhost.socket("n");
        let mut front_end = FrontEnd::connect(&socket, ram, Options::default()).unwrap();
        let queues = front_end.start_new(1, QueueOptions::default()).unwrap();
        let neighbour = Load::start(queues, LoadOptions::default()).unwrap();
        neighbour.wait_for(100).unwrap();
        let fds = vhost.fds();
        Self { vhost, neighbour, _front_end: front_end, fds }
    }

    /// All fds are closed, and the neighbour is served.
    fn is_whole(&self, after: &str) {
        wait_until(&format!("fds back after {after}"), || self.vhost.fds() <= self.fds);
        self.neighbour.wait_for(50).unwrap();
    }

    /// A correct front end is served on the attacked controllers.
    fn end(self) {
        for name in ["a", "b"] {
            let ram = GuestRam::new(&[16 << 20]).unwrap();
            let socket = self.vhost.socket(name);
            let mut front_end = FrontEnd::connect(&socket, ram, Options::default()).unwrap();
            let mut queue = front_end.start_new(1, QueueOptions::default()).unwrap().remove(0);
            let buffer = queue.ring().ram().alloc(4096, 4096).unwrap();
            assert_eq!(queue.run(&Request::read(0, &[buffer])).unwrap().status, STATUS_OK);
            front_end.disconnect().unwrap();
        }
        let (summary, _) = self.neighbour.stop().unwrap();
        assert_eq!((summary.errors, summary.mismatches, summary.outstanding), (0, 0, 0));
        assert_eq!(self.vhost.stop(), 0);
    }
}

fn memory(len: u64) -> File {
    let file = tempfile::tempfile_in("/dev/shm").unwrap();
    file.set_len(len).unwrap();
    file
}

/// Front ends, and their guests' memories.
struct Play<'s> {
    scene: &'s Scene,
    fronts: [Option<RawConnection>; FRONTS],
    rams: [File; FRONTS],
    offered: [[u16; RINGS]; FRONTS],
}

impl<'s> Play<'s> {
    fn new(scene: &'s Scene) -> Self {
        let rams = std::array::from_fn(|_| memory(RAM_BYTES));
        Self { scene, fronts: Default::default(), rams, offered: Default::default() }
    }

    fn play(mut self, script: &[u8]) {
        let mut input = Input::new(script);
        for _ in 0..STEPS_MAX {
            if input.is_empty() {
                break;
            }
            match script::step(&mut input) {
                Step::Say(front, messages) => {
                    messages.iter().for_each(|message| self.say(front, message));
                }
                Step::Offer(front, ring, kind, sector) => {
                    let nth = &mut self.offered[front][ring % RINGS];
                    for (at, bytes) in script::offered(ring, *nth, kind, sector) {
                        self.rams[front].write_all_at(&bytes, at).unwrap();
                    }
                    *nth = nth.wrapping_add(1);
                }
                Step::Poke(front, at, bytes) => self.rams[front].write_all_at(&bytes, at).unwrap(),
                Step::Cut(front, len) => self.rams[front].set_len(len).unwrap(),
                Step::Leave(front) => self.fronts[front] = None,
                Step::Operate(what) => self.operate(what),
                // The process runs poll iterations by itself.
                Step::Complete(_) | Step::Iterations(_) => {}
            }
        }
    }

    fn fd(&self, front: usize, kind: Fd) -> OwnedFd {
        match kind {
            Fd::Ram => self.rams[front].try_clone().unwrap().into(),
            Fd::Memory(len) => memory(len).into(),
            Fd::Event => rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap(),
            Fd::Pipe => io::pipe().unwrap().1.into(),
            Fd::Socket => UnixStream::pair().unwrap().0.into(),
            Fd::File => File::open("/proc/self/exe").unwrap().into(),
            Fd::Area => memory(0x1000).into(),
        }
    }

    fn say(&mut self, front: usize, message: &Message) {
        let socket = self.scene.vhost.socket(if front == 0 { "a" } else { "b" });
        if self.fronts[front].is_none() {
            // It may have just been deleted.
            self.fronts[front] = RawConnection::connect(&socket).ok();
        }
        let fds: Vec<_> = message.fds.iter().map(|kind| self.fd(front, *kind)).collect();
        let fds: Vec<_> = fds.iter().map(|fd| fd.as_fd()).collect();
        let flags = VERSION | if message.need_reply { NEED_REPLY } else { 0 };
        let Some(connection) = &mut self.fronts[front] else { return };
        if connection.send_message(message.request, flags, &message.payload, &fds).is_err() {
            self.fronts[front] = None;
        }
    }

    fn operate(&self, what: u8) {
        let vhost = &self.scene.vhost;
        match what % 16 {
            0 => {
                let params =
                    json!({"ctrlr": "a", "delay_base_us": what >> 4, "iops_threshold": 100});
                vhost.ok("vhost_controller_set_coalescing", params);
            }
            1 => drop(vhost.ok("vhost_get_controllers", json!({}))),
            5 => {
                vhost.ok("vhost_delete_controller", json!({"ctrlr": "b", "force": true}));
                let controller = json!({"ctrlr": "b", "dev_name": "Mb", "packed_ring": true});
                vhost.ok("vhost_create_blk_controller", controller);
            }
            _ => {}
        }
    }
}

#[test]
fn whatever_front_ends_send() {
    let scene = Scene::new();
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus/messages");
    let mut scripts: Vec<Vec<u8>> =
        fs::read_dir(corpus).unwrap().map(|file| fs::read(file.unwrap().path()).unwrap()).collect();
    assert!(!scripts.is_empty());
    let mut rng = Rng(number("VHOST_FUZZ_SEED", 1));
    scripts.extend((0..number("VHOST_FUZZ_SCRIPTS", SCRIPTS)).map(|_| rng.bytes()));
    for (n, script) in scripts.iter().enumerate() {
        Play::new(&scene).play(script);
        if (n as u64).is_multiple_of(LOOK_EVERY) {
            scene.is_whole(&format!("script {n}: {script:?}"));
        }
    }
    scene.is_whole("the last script");
    scene.end();
}

#[test]
fn whatever_rpc_clients_ask_for() {
    let scene = Scene::new();
    let mut rng = Rng(number("VHOST_FUZZ_SEED", 1));
    let methods = scene.vhost.ok("rpc_get_methods", json!({"include_aliases": true}));
    let methods: Vec<&str> =
        methods.as_array().unwrap().iter().map(|name| name.as_str().unwrap()).collect();
    let mut rpc = scene.vhost.connect();
    let mut went_well = 0;
    for _ in 0..10 * number("VHOST_FUZZ_SCRIPTS", SCRIPTS) {
        let bytes = rng.bytes();
        let (method, params) = calls::call(&mut Input::new(&bytes), &methods);
        // Any answer will do.
        went_well += u32::from(rpc.call(&method, params).is_ok());
    }
    assert!(went_well > 100, "too few calls make sense: {went_well}");
    scene.neighbour.wait_for(50).unwrap();
    scene.end();
}
