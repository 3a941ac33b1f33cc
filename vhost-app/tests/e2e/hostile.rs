//! Hostile front ends and guests: each is refused or contained, its fds come back, and a neighbour
//! on the same reactor goes on.

use std::fs::{self, File};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use bench::{Load, LoadOptions};
use front_end::descriptor::{Descriptor, NEXT, WRITE};
use front_end::{
    FrontEnd, GuestRam, Options, Queue, QueueOptions, RawConnection, Request, STATUS_OK,
};
use serde_json::json;

use crate::support::harness::{Vhost, wait_until};

const SET_FEATURES: u32 = 2;
const SET_MEM_TABLE: u32 = 5;
const SET_LOG_BASE: u32 = 6;
const SET_VRING_NUM: u32 = 8;
const SET_VRING_ADDR: u32 = 9;
const GET_VRING_BASE: u32 = 11;
const SET_VRING_KICK: u32 = 12;
const SET_VRING_CALL: u32 = 13;
const SET_BACKEND_REQ_FD: u32 = 21;
const GET_CONFIG: u32 = 24;
const SET_CONFIG: u32 = 25;
const GET_INFLIGHT_FD: u32 = 31;
const SET_INFLIGHT_FD: u32 = 32;
const ADD_MEM_REG: u32 = 37;
const REM_MEM_REG: u32 = 38;
const VERSION: u32 = 1;
const NEED_REPLY: u32 = 1 << 3;

/// A target with a controller "b" to attack, and a neighbour "a" under load.
struct Scene {
    vhost: Vhost,
    neighbour: Load,
    _front_end: FrontEnd,
    socket: PathBuf,
    fds: usize,
    mappings: usize,
}

impl Scene {
    fn new() -> Self {
        let vhost = Vhost::start(&[]);
        for name in ["a", "b"] {
            let bdev = format!("M{name}");
            let disk = json!({"name": bdev, "num_blocks": 16384, "block_size": 512});
            vhost.ok("bdev_malloc_create", disk);
            vhost.ok("vhost_create_blk_controller", json!({"ctrlr": name, "dev_name": bdev}));
        }
        let ram = GuestRam::new(&[16 << 20]).unwrap();
        let mut front_end = FrontEnd::connect(&vhost.socket("a"), ram, Options::default()).unwrap();
        let queues = front_end.start_new(1, QueueOptions::default()).unwrap();
        let neighbour = Load::start(queues, LoadOptions::default()).unwrap();
        neighbour.wait_for(100).unwrap();
        let (socket, fds, mappings) = (vhost.socket("b"), vhost.fds(), mappings(&vhost));
        Self { vhost, neighbour, _front_end: front_end, socket, fds, mappings }
    }

    fn raw(&self) -> RawConnection {
        RawConnection::connect(&self.socket).unwrap()
    }

    fn victim(&self) -> (FrontEnd, Queue) {
        let ram = GuestRam::new(&[16 << 20, 2 << 20]).unwrap();
        let mut front_end = FrontEnd::connect(&self.socket, ram, Options::default()).unwrap();
        let queue = front_end.start_new(1, QueueOptions::default()).unwrap().remove(0);
        (front_end, queue)
    }

    /// The target is whole: what the attack cost has come back, and the neighbour goes on.
    #[track_caller]
    fn is_whole(&self, after: &str) {
        wait_until(&format!("fds back after {after}"), || self.vhost.fds() == self.fds);
        wait_until(&format!("mappings back after {after}"), || {
            mappings(&self.vhost) == self.mappings
        });
        let b = || self.vhost.ok("vhost_get_controller_stats", json!({"name": "b"}))[0].clone();
        wait_until(&format!("no session after {after}"), || b()["sessions"] == json!([]));
        wait_until(&format!("nothing to be closed after {after}"), || {
            b()["fds"] == json!({"open": 1, "closing": 0, "stuck": false})
        });
        self.neighbour.wait_for(50).unwrap();
    }

    fn serves(&self) {
        let (front_end, mut queue) = self.victim();
        let buffer = queue.ring().ram().alloc(4096, 4096).unwrap();
        assert_eq!(queue.run(&Request::read(0, &[buffer])).unwrap().status, STATUS_OK);
        front_end.disconnect().unwrap();
    }

    fn end(self) {
        self.serves();
        let (summary, _) = self.neighbour.stop().unwrap();
        assert_eq!((summary.errors, summary.mismatches, summary.outstanding), (0, 0, 0));
        assert_eq!(self.vhost.stop(), 0);
    }
}

/// Mappings of guest memory, logs and in-flight areas.
fn mappings(vhost: &Vhost) -> usize {
    let maps = fs::read_to_string(format!("/proc/{}/maps", vhost.pid())).unwrap();
    maps.lines().filter(|line| line.contains("/memfd:")).count()
}

fn memfd(len: u64) -> File {
    let file = tempfile::tempfile_in("/dev/shm").unwrap();
    file.set_len(len).unwrap();
    file
}

/// The payload of a memory table: (guest address, size, user address, offset) of each region.
fn table(regions: &[[u64; 4]]) -> Vec<u8> {
    let mut bytes = (regions.len() as u64).to_le_bytes().to_vec();
    regions.iter().flatten().for_each(|word| bytes.extend(word.to_le_bytes()));
    bytes
}

/// The payload of ADD_MEM_REG and REM_MEM_REG.
fn slot(region: [u64; 4]) -> Vec<u8> {
    [0].iter().chain(&region).flat_map(|word| word.to_le_bytes()).collect()
}

/// The payload of SET_LOG_BASE.
fn log(size: u64, offset: u64) -> Vec<u8> {
    [size, offset].iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// The payload of SET_INFLIGHT_FD.
fn area(size: u64, offset: u64, queues: u16, queue_size: u16) -> Vec<u8> {
    [log(size, offset), words(&[u32::from(queues) | u32::from(queue_size) << 16, 0])].concat()
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

#[test]
fn messages_that_say_something_impossible_end_the_connection() {
    let scene = Scene::new();
    let (memory, (pipe, _pipe)) = (memfd(1 << 20), std::io::pipe().unwrap());
    let null = File::open("/dev/null").unwrap();
    let (m, p, n) = (memory.as_fd(), pipe.as_fd(), null.as_fd());
    let region = |gpa, size, offset| [gpa, size, 0x1000_0000 + gpa, offset];
    let mib = 1 << 20;
    let cases: Vec<(&str, u32, Vec<u8>, Vec<BorrowedFd<'_>>)> = vec![
        ("a region beyond its file", SET_MEM_TABLE, table(&[region(0, 2 * mib, 0)]), vec![m]),
        ("a region that begins beyond it", SET_MEM_TABLE, table(&[region(0, mib, mib)]), vec![m]),
        ("a region that wraps", SET_MEM_TABLE, table(&[region(u64::MAX - 5, mib, 0)]), vec![m]),
        ("an offset that wraps", SET_MEM_TABLE, table(&[region(0, mib, u64::MAX)]), vec![m]),
        ("an empty region", SET_MEM_TABLE, table(&[region(0, 0, 0)]), vec![m]),
        ("overlap", SET_MEM_TABLE, table(&[region(0, mib, 0), region(4096, 4096, 0)]), vec![m, m]),
        ("no fd", SET_MEM_TABLE, table(&[region(0, mib, 0)]), vec![]),
        ("too many fds", SET_MEM_TABLE, table(&[region(0, mib, 0)]), vec![m; 8]),
        ("no region", SET_MEM_TABLE, table(&[]), vec![]),
        ("nine regions", SET_MEM_TABLE, words(&[9, 0]), vec![m; 8]),
        ("a pipe as memory", SET_MEM_TABLE, table(&[region(0, 4096, 0)]), vec![p]),
        ("a device as memory", SET_MEM_TABLE, table(&[region(0, 4096, 0)]), vec![n]),
        ("features that were not offered", SET_FEATURES, u64::MAX.to_le_bytes().into(), vec![]),
        ("a ring of no size", SET_VRING_NUM, words(&[0, 0]), vec![]),
        ("a ring that is too large", SET_VRING_NUM, words(&[0, 1 << 16]), vec![]),
        ("ring 200", SET_VRING_NUM, words(&[200, 128]), vec![]),
        ("ring 4 billion", GET_VRING_BASE, words(&[u32::MAX, 0]), vec![]),
        ("a kick before the ring is set up", SET_VRING_KICK, words(&[0x100, 0]), vec![]),
        ("a pipe as call fd", SET_VRING_CALL, words(&[0, 0]), vec![p]),
        ("a pipe as kick fd", SET_VRING_KICK, words(&[0, 0]), vec![p]),
        ("a pipe as backend channel", SET_BACKEND_REQ_FD, vec![], vec![p]),
        ("a short message", SET_VRING_ADDR, words(&[0]), vec![]),
        ("a config space of 4 GiB", GET_CONFIG, words(&[0, u32::MAX, 0]), vec![]),
        ("half a config space", SET_CONFIG, words(&[0, 60, 0]), vec![]),
        ("a log beyond its file", SET_LOG_BASE, log(mib + 1, 0), vec![m]),
        ("a log that begins beyond it", SET_LOG_BASE, log(1, mib), vec![m]),
        ("a log whose end is no number", SET_LOG_BASE, log(2, u64::MAX), vec![m]),
        ("a log of 1 EiB", SET_LOG_BASE, log(1 << 60, 0), vec![m]),
        ("a log of no bytes", SET_LOG_BASE, log(0, 0), vec![m]),
        ("a log without a file", SET_LOG_BASE, log(4096, 0), vec![]),
        ("a log with two", SET_LOG_BASE, log(4096, 0), vec![m, m]),
        ("a pipe as log", SET_LOG_BASE, log(4096, 0), vec![p]),
        ("an area beyond its file", SET_INFLIGHT_FD, area(1 << 30, 0, 128, 32768), vec![m]),
        ("an area that begins beyond it", SET_INFLIGHT_FD, area(4096, mib, 1, 128), vec![m]),
        ("an area whose end is no number", SET_INFLIGHT_FD, area(2, u64::MAX, 1, 128), vec![m]),
        ("an area of no bytes", SET_INFLIGHT_FD, area(0, 0, 1, 128), vec![m]),
        ("an area with no room", SET_INFLIGHT_FD, area(4096, 0, 128, 1024), vec![m]),
        ("an area for no queue", SET_INFLIGHT_FD, area(4096, 0, 0, 128), vec![m]),
        ("an area for no requests", SET_INFLIGHT_FD, area(4096, 0, 1, 0), vec![m]),
        ("an area for 65,535 queues", SET_INFLIGHT_FD, area(mib, 0, u16::MAX, u16::MAX), vec![m]),
        ("an area without a file", SET_INFLIGHT_FD, area(4096, 0, 1, 128), vec![]),
        ("a pipe as area", SET_INFLIGHT_FD, area(4096, 0, 1, 128), vec![p]),
        ("half an area", SET_INFLIGHT_FD, words(&[4096, 0, 0, 0]), vec![m]),
        ("an area for no queue?", GET_INFLIGHT_FD, area(0, 0, 0, 128), vec![]),
        ("an area for 65,535 queues?", GET_INFLIGHT_FD, area(0, 0, u16::MAX, u16::MAX), vec![]),
        ("postcopy", 28, vec![], vec![]),
        ("an IOTLB message", 22, vec![0; 40], vec![]),
        ("a crypto session", 26, vec![0; 64], vec![]),
        ("an empty slot", ADD_MEM_REG, slot(region(0, 0, 0)), vec![m]),
        ("a slot beyond its file", ADD_MEM_REG, slot(region(0, 2 * mib, 0)), vec![m]),
        ("a slot that wraps", ADD_MEM_REG, slot(region(u64::MAX - 5, mib, 0)), vec![m]),
        ("a slot without an fd", ADD_MEM_REG, slot(region(0, mib, 0)), vec![]),
        ("a slot with two", ADD_MEM_REG, slot(region(0, mib, 0)), vec![m, m]),
        ("a device as slot", ADD_MEM_REG, slot(region(0, 4096, 0)), vec![n]),
        ("half a slot", ADD_MEM_REG, vec![0; 20], vec![m]),
        ("a slot away that is not there", REM_MEM_REG, slot(region(0, mib, 0)), vec![m]),
        ("an unknown request", 4242, vec![7; 64], vec![m; 8]),
    ];
    for (what, request, payload, fds) in &cases {
        for flags in [VERSION, VERSION | NEED_REPLY] {
            let mut raw = scene.raw();
            raw.send_message(*request, flags, payload, fds).unwrap();
            raw.wait_for_close().unwrap_or_else(|e| panic!("{what}: {e}"));
            scene.is_whole(what);
        }
    }
    scene.end();
}

/// Adds a slot of a page, and says whether it was taken.
fn add_slot(raw: &mut RawConnection, memory: &File, n: u64) -> bool {
    let region = [0x10_0000 * n, 4096, 0x7000_0000 + 0x10_0000 * n, 0];
    let fds = [memory.as_fd()];
    raw.send_message(ADD_MEM_REG, VERSION | NEED_REPLY, &slot(region), &fds).unwrap();
    raw.receive().is_ok_and(|answer| answer.value() == Some(0))
}

/// A connection has 509 slots, a controller twice as many.
#[test]
fn slots_are_bounded() {
    let scene = Scene::new();
    let memory = memfd(4096);
    let mut first = scene.raw();
    for n in 0..509 {
        assert!(add_slot(&mut first, &memory, n), "slot {n}");
    }
    let mut second = scene.raw();
    assert!((0..509).all(|n| add_slot(&mut second, &memory, n)));
    let mut third = scene.raw();
    assert!(!add_slot(&mut third, &memory, 0), "the controller has 1,018");
    assert!(!add_slot(&mut first, &memory, 509), "the 510th");
    first.wait_for_close().unwrap();
    let taken = slot([0x10_0000, 4096, 0x7010_0000, 0]);
    second.send_message(REM_MEM_REG, VERSION | NEED_REPLY, &taken, &[]).unwrap();
    assert_eq!(second.receive().unwrap().value(), Some(0));
    assert!(add_slot(&mut second, &memory, 1), "there is room again");
    assert!(!add_slot(&mut second, &memory, 7), "two at one place");
    drop((first, second, third));
    scene.is_whole("slots");
    scene.end();
}

/// In-flight areas that are asked for and never used are the front end's alone.
#[test]
fn areas_that_are_asked_for_cost_nothing() {
    let scene = Scene::new();
    let mut raw = scene.raw();
    let areas: Vec<_> = (0..200)
        .flat_map(|_| {
            raw.send_message(GET_INFLIGHT_FD, VERSION, &area(0, 0, 16, 32768), &[]).unwrap();
            raw.receive().unwrap().fds
        })
        .map(|fd| File::from(fd).metadata().unwrap())
        .collect();
    assert_eq!(areas.len(), 200);
    assert!(areas.iter().all(|area| area.len() > 0 && area.blocks() == 0));
    wait_until("no fd but the connection's is left", || scene.vhost.fds() <= scene.fds + 4);
    drop(raw);
    scene.is_whole("areas");
    scene.end();
}

/// What a running ring stands on cannot be taken away from under it.
#[test]
fn memory_and_area_of_a_running_ring_stay() {
    let scene = Scene::new();
    let file = memfd(1 << 20);
    for takes in [REM_MEM_REG, SET_INFLIGHT_FD] {
        let (front_end, mut queue) = scene.victim();
        let ram = std::sync::Arc::clone(queue.ring().ram());
        let buffer = ram.alloc(4096, 4096).unwrap();
        assert_eq!(queue.run(&Request::read(0, &[buffer])).unwrap().status, STATUS_OK);
        let region = &ram.table()[0];
        let (gpa, size) = (region.guest_phys_addr, region.memory_size);
        let (payload, fds) = match takes {
            REM_MEM_REG => (slot([gpa, size, region.userspace_addr, 0]), vec![]),
            _ => (area(1 << 20, 0, 1, 128), vec![file.as_fd()]),
        };
        let mut raw = front_end.raw().unwrap();
        raw.send_message(takes, VERSION, &payload, &fds).unwrap();
        raw.wait_for_close().unwrap();
        drop((raw, front_end, queue));
        scene.is_whole("something taken away");
    }
    scene.end();
}

/// A log and an area that are no longer there when they are written to.
#[test]
fn a_log_that_is_cut_short() {
    let scene = Scene::new();
    let (mut front_end, mut queue) = scene.victim();
    let buffer = queue.ring().ram().alloc(4096, 4096).unwrap();
    let log = memfd(1 << 20);
    front_end.start_log(&log, 1 << 20).unwrap();
    assert_eq!(queue.run(&Request::read(0, &[buffer])).unwrap().status, STATUS_OK);
    let mut first_page = [0; 4096];
    std::os::unix::fs::FileExt::read_exact_at(&log, &mut first_page, 0).unwrap();
    assert_ne!(first_page, [0; 4096], "the read was logged");
    log.set_len(0).unwrap();
    assert_eq!(queue.run(&Request::read(0, &[buffer])).unwrap().status, STATUS_OK);
    front_end.stop_log().unwrap();
    front_end.disconnect().unwrap();
    drop(queue);
    scene.is_whole("a log cut short");
    scene.end();
}

/// One controller's front ends cannot take all of the target's connections.
#[test]
fn connections_of_one_controller_are_bounded() {
    let scene = Scene::new();
    let mut many: Vec<_> = (0..40).map(|_| scene.raw()).collect();
    let mut refused = 0;
    for raw in &mut many {
        let _ = raw.send_message(1, VERSION, &[], &[]);
        refused += usize::from(raw.receive().is_err());
    }
    assert_eq!(refused, 40 - 16);
    drop(many);
    scene.is_whole("many connections");
    scene.end();
}

/// Nor can they have more rings than a VM and its successor in a migration.
#[test]
fn rings_of_one_controller_are_bounded() {
    const RINGS: usize = 128;
    let scene = Scene::new();
    let options = QueueOptions { size: 8, ..QueueOptions::default() };
    let rss = scene.vhost.rss_kib();
    let start = || {
        let ram = GuestRam::new(&[16 << 20]).unwrap();
        let mut front_end = FrontEnd::connect(&scene.socket, ram, Options::default()).unwrap();
        front_end.start_new(RINGS, options).map(|queues| (front_end, queues))
    };
    let mut full = vec![start().unwrap(), start().unwrap()];
    for _ in 0..14 {
        start().expect_err("there are 256 rings");
    }
    let cost = scene.vhost.rss_kib() - rss;
    assert!(cost < 256 << 10, "256 rings cost {cost} KiB");
    let fds = scene.vhost.fds() - scene.fds;
    assert!(fds <= 4 * 2 * RINGS, "256 rings cost {fds} fds");
    scene.neighbour.wait_for(500).unwrap();
    drop(full.pop());
    wait_until("there is room again", || start().is_ok());
    drop(full);
    scene.is_whole("many rings");
    scene.end();
}

#[test]
fn memory_that_is_cut_short_under_a_running_queue() {
    let scene = Scene::new();
    let (front_end, mut queue) = scene.victim();
    let ram = std::sync::Arc::clone(queue.ring().ram());
    let buffer = front_end::Segment::new(ram.boundary(0) + (1 << 20), 4096);
    ram.file(1).set_len(4096).unwrap();
    // The reactor meets memory that is no longer there, in many places.
    let mappings = || {
        let maps = fs::read_to_string(format!("/proc/{}/maps", scene.vhost.pid())).unwrap();
        maps.lines().count()
    };
    let before = mappings();
    queue.submit(&Request::read(0, &[buffer])).unwrap();
    for page in (1..500).rev().step_by(16) {
        let buffer = front_end::Segment::new(ram.boundary(0) + page * 4096, 512);
        queue.submit(&Request::read(0, &[buffer])).unwrap();
    }
    scene.neighbour.wait_for(500).unwrap();
    assert!(mappings() < before + 10, "each hole would be a mapping, of which there are 65,530");
    let mut raw = front_end.raw().unwrap();
    drop(front_end);
    drop(raw.wait_for_close());
    drop((raw, queue));
    scene.is_whole("cut memory");
    scene.end();
}

#[test]
fn rings_that_lie() {
    let scene = Scene::new();
    // Invalid chains are returned, and the queue continues.
    let (front_end, mut queue) = scene.victim();
    let ring = std::sync::Arc::clone(queue.ring());
    let buffer = ring.ram().alloc(4096, 4096).unwrap();
    let outside = 1 << 40;
    let bad: [&dyn Fn(u16); 6] = [
        &|d| ring.set_descriptor(d, Descriptor { addr: buffer.gpa, len: 16, flags: NEXT, next: d }),
        &|d| ring.set_descriptor(d, Descriptor { addr: outside, len: 16, flags: WRITE, next: 0 }),
        &|d| ring.set_descriptor(d, Descriptor { addr: buffer.gpa, len: 0, flags: 0, next: 0 }),
        &|d| {
            ring.set_descriptor(
                d,
                Descriptor { addr: u64::MAX, len: u32::MAX, flags: WRITE, next: 0 },
            )
        },
        &|d| {
            ring.set_descriptor(
                d,
                Descriptor { addr: buffer.gpa, len: 16, flags: NEXT, next: 9999 },
            )
        },
        &|d| ring.set_descriptor(d, Descriptor { addr: buffer.gpa, len: 16, flags: 4, next: 0 }),
    ];
    for write in bad {
        let descriptor = queue.take_descriptors(1).unwrap()[0];
        write(descriptor);
        queue.make_available(descriptor);
        wait_until("it comes back", || {
            queue.poll_raw().is_some_and(|u| u.id == u32::from(descriptor))
        });
        assert_eq!(queue.run(&Request::read(0, &[buffer])).unwrap().status, STATUS_OK);
    }
    // A head that does not exist.
    queue.make_available(60000);
    wait_until("it comes back", || queue.poll_raw().is_some_and(|used| used.id == 60000));
    // An index that jumps: the queue stops alone, and can be stopped and started again.
    ring.set_available_index(ring.available_index().wrapping_add(10_000));
    scene.vhost.wait_for_log("made ring 0 of front end");
    scene.neighbour.wait_for(500).unwrap();
    front_end.disconnect().unwrap();
    drop((queue, ring));
    scene.is_whole("a broken ring");
    scene.end();
}

/// The call fd is filled up and made blocking: whoever writes it the ordinary way waits for ever.
#[test]
fn a_call_fd_that_would_block() {
    let scene = Scene::new();
    let (front_end, mut queue) = scene.victim();
    let buffer = queue.ring().ram().alloc(4096, 4096).unwrap();
    let call = queue.ring().call_fd();
    // What the guest asks for: a call for each completion.
    queue.ring().set_available_flags(0);
    make_blocking(front_end::event::as_fd(&call));
    let _ = call.read();
    call.write(u64::MAX - 1).unwrap();
    for _ in 0..10 {
        queue.ring().set_used_event(queue.ring().used_index());
        queue.submit(&Request::read(0, &[buffer])).unwrap();
        wait_until("it completes", || queue.poll().unwrap().is_some());
    }
    scene.neighbour.wait_for(500).unwrap();
    drop((queue, front_end));
    scene.is_whole("a full call fd");
    scene.end();
}

fn make_blocking(fd: BorrowedFd<'_>) {
    use std::os::fd::AsRawFd;

    #[expect(unsafe_code, reason = "a system call")]
    // SAFETY: an fd of ours and flags that it has.
    let result = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, 0) };
    assert_eq!(result, 0);
}

/// A seeded storm of messages: every connection ends or answers, nothing leaks.
#[test]
fn random_messages() {
    let scene = Scene::new();
    let seed = 0x5eed_u64;
    let mut state = seed;
    let mut random = move || {
        // SplitMix64.
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    let memory = memfd(1 << 20);
    for _ in 0..300 {
        let mut raw = scene.raw();
        for _ in 0..random() % 12 {
            let request = (random() % 45) as u32;
            let len = [0, 4, 8, 12, 16, 40, 72, 264][(random() % 8) as usize];
            let small = random() % 2 == 0;
            let byte = |r: u64| if small { (r % 3) as u8 } else { (r & 0xff) as u8 };
            let payload: Vec<u8> = (0..len).map(|_| byte(random())).collect();
            let fds = vec![memory.as_fd(); (random() % 4) as usize];
            let flags = VERSION | if random() % 2 == 0 { NEED_REPLY } else { 0 };
            if raw.send_message(request, flags, &payload, &fds).is_err() {
                break;
            }
        }
    }
    scene.is_whole(&format!("random messages, seed {seed:#x}"));
    scene.end();
}

#[test]
fn a_socket_is_not_taken_from_another_process() {
    let vhost = Vhost::start(&[]);
    vhost.ok("bdev_null_create", json!({"name": "N", "num_blocks": 2048, "block_size": 512}));
    let create = |name: &str| {
        vhost.rpc("vhost_create_blk_controller", json!({"ctrlr": name, "dev_name": "N"}))
    };
    let live = std::os::unix::net::UnixListener::bind(vhost.socket("live")).unwrap();
    assert_eq!(create("live").unwrap_err().message, "Input/output error");
    assert!(vhost.socket("live").exists());
    drop(live);
    create("live").expect("a socket that nobody listens on is replaced");
    std::fs::write(vhost.socket("file"), "mine").unwrap();
    assert_eq!(create("file").unwrap_err().message, "Input/output error");
    assert_eq!(std::fs::read_to_string(vhost.socket("file")).unwrap(), "mine");
    // Beside the directory of sockets lies what is other people's: a name that nobody else has.
    let own = Path::new(vhost.dir()).file_name().unwrap().to_str().unwrap();
    let (beside, deeper) = (format!("../{own}.x"), format!("a/../../{own}.x"));
    for name in ["", ".", "..", &beside, &deeper, &"n".repeat(120)] {
        assert_eq!(create(name).unwrap_err().message, "Input/output error", "{name:?}");
    }
    assert!(!Path::new(vhost.dir()).with_extension("x").exists());
    assert_eq!(vhost.ok("vhost_get_controller_stats", json!({})).as_array().unwrap().len(), 1);
}
