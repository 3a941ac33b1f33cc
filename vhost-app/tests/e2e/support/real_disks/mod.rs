//! Guests of file disks: one whose disk hangs, and neighbours that have to go on meanwhile.
#![expect(clippy::cast_possible_truncation, reason = "sizes of small disks")]

use std::path::Path;
use std::sync::Arc;

use bench::{Load, LoadOptions};
use front_end::request::range;
use front_end::{
    FrontEnd, GuestRam, Options, Queue, QueueOptions, Request, STATUS_OK, Segment, Tag,
};
use serde_json::{Value, json};

use crate::support::harness::Vhost;

pub(crate) const BLOCK: u64 = 4096;
pub(crate) const DISK_BYTES: u64 = 8 << 20;

/// Blocks of a neighbour's disk that it works on.
const BLOCKS: u64 = 16;
/// Rounds of all kinds of requests that a neighbour has to complete to count as undisturbed.
const UNDISTURBED: u64 = 20;

/// Which methods a file disk is made and unmade with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flavour {
    Aio,
    Uring,
}

pub(crate) const FLAVOURS: [Flavour; 2] = [Flavour::Aio, Flavour::Uring];

impl Flavour {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Aio => "aio",
            Self::Uring => "uring",
        }
    }

    pub(crate) fn method(self, what: &str) -> String {
        format!("bdev_{}_{what}", self.name())
    }

    /// What its create method takes, so that it offers discard.
    pub(crate) fn params(self, name: &str, file: &Path) -> Value {
        let mut params = json!({"name": name, "filename": file, "block_size": 512});
        if self == Self::Aio {
            params["fallocate"] = json!(true);
        }
        params
    }

    pub(crate) fn create(self, vhost: &Vhost, name: &str, file: &Path) {
        vhost.ok(&self.method("create"), self.params(name, file));
    }

    pub(crate) fn delete(self, vhost: &Vhost, name: &str) {
        assert_eq!(vhost.ok(&self.method("delete"), json!({"name": name})), json!(true));
    }

    /// What bdev_get_bdevs says of how such a disk does its I/O.
    pub(crate) fn io_path(self, vhost: &Vhost, name: &str) -> Value {
        let bdev = vhost.ok("bdev_get_bdevs", json!({"name": name}));
        bdev[0]["driver_specific"][self.name()]["io_path"].clone()
    }

    /// How the disk's own threads fare.
    pub(crate) fn workers(self, vhost: &Vhost, name: &str) -> Workers {
        let shown = self.io_path(vhost, name);
        let number = |field: &str| {
            let number = shown["workers"][field].as_u64();
            number.unwrap_or_else(|| panic!("no workers.{field} in {shown}"))
        };
        Workers {
            max: number("max"),
            threads: number("threads"),
            busy: number("busy"),
            queued: number("queued"),
        }
    }
}

/// The threads of a disk, and what they have to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Workers {
    pub(crate) max: u64,
    pub(crate) threads: u64,
    pub(crate) busy: u64,
    pub(crate) queued: u64,
}

/// What a guest asks of its disk, of one block unless it is a flush.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Io {
    Read,
    Write,
    Flush,
    Discard,
    Zeroes,
}

/// A guest with one split ring on one disk.
pub(crate) struct Guest {
    controller: String,
    ram: Arc<GuestRam>,
    pub(crate) front_end: FrontEnd,
    pub(crate) queue: Queue,
    /// For one request after the other.
    buffer: Segment,
    /// Memory of requests that have been given back.
    spare: Vec<Segment>,
    rounds: u64,
}

impl Guest {
    /// Makes a controller on the disk, connects and starts the ring.
    pub(crate) fn on(vhost: &Vhost, bdev: &str) -> Self {
        let controller = format!("{bdev}.vhost");
        let params = json!({"ctrlr": controller, "dev_name": bdev});
        vhost.ok("vhost_create_blk_controller", params);
        let ram = GuestRam::new(&[16 << 20]).unwrap();
        let buffer = ram.alloc(BLOCK as u32, BLOCK).unwrap();
        let socket = vhost.socket(&controller);
        let mut front_end =
            FrontEnd::connect(&socket, Arc::clone(&ram), Options::default()).unwrap();
        let options = QueueOptions { size: 256, ..QueueOptions::default() };
        let queue = front_end.start_new(1, options).unwrap().remove(0);
        Self { controller, ram, front_end, queue, buffer, spare: vec![], rounds: 0 }
    }

    pub(crate) fn controller(&self) -> &str {
        &self.controller
    }

    /// Hands a request over; its memory is its own, and holds `fill` where it is written.
    pub(crate) fn begin(&mut self, io: Io, block: u64, fill: u8) -> Begun {
        let spare = self.spare.pop();
        let buffer = spare.unwrap_or_else(|| self.ram.alloc(BLOCK as u32, BLOCK).unwrap());
        let tag = self.submit(io, block, fill, buffer);
        self.queue.kick().unwrap();
        Begun { tag, buffer }
    }

    fn submit(&mut self, io: Io, block: u64, fill: u8, buffer: Segment) -> Tag {
        let (sector, data) = (block * BLOCK / 512, [buffer]);
        let list = [Segment { len: 16, ..buffer }];
        let request = match io {
            Io::Read => Request::read(sector, &data),
            Io::Write => {
                self.ram.write(buffer.gpa, &[fill; BLOCK as usize]).unwrap();
                Request::write(sector, &data)
            }
            Io::Flush => Request::flush(),
            Io::Discard | Io::Zeroes => {
                let range = range(sector, (BLOCK / 512) as u32, 0);
                self.ram.write(buffer.gpa, &range).unwrap();
                if io == Io::Discard {
                    Request::discard(&list)
                } else {
                    Request::write_zeroes(&list)
                }
            }
        };
        self.queue.submit(&request).unwrap()
    }

    /// The memory of a request.
    pub(crate) fn memory(&self, begun: &Begun) -> Vec<u8> {
        let mut bytes = vec![0; BLOCK as usize];
        self.ram.read(begun.buffer.gpa, &mut bytes).unwrap();
        bytes
    }

    /// Takes back the memory of requests that have completed, for others.
    pub(crate) fn give_back(&mut self, begun: Vec<Begun>) {
        self.spare.extend(begun.into_iter().map(|begun| begun.buffer));
    }

    /// Waits for requests that are all that is in flight, each completed well and once.
    #[track_caller]
    pub(crate) fn wait_for(&mut self, begun: &[Begun]) {
        assert_eq!(self.queue.in_flight(), begun.len());
        let mut tags: Vec<Tag> = begun.iter().map(|begun| begun.tag).collect();
        while !tags.is_empty() {
            let done = self.queue.wait().unwrap();
            assert_eq!(done.status, STATUS_OK);
            let at = tags.iter().position(|tag| *tag == done.tag);
            tags.remove(at.expect("each completes once"));
        }
        self.has_nothing();
    }

    /// Nothing has come back.
    #[track_caller]
    pub(crate) fn has_nothing(&mut self) {
        assert_eq!(self.queue.poll().unwrap(), None);
    }

    /// Does one request with nothing else in flight.
    #[track_caller]
    pub(crate) fn run(&mut self, io: Io, block: u64, fill: u8) {
        let tag = self.submit(io, block, fill, self.buffer);
        self.queue.kick().unwrap();
        let done = self.queue.wait().unwrap();
        assert_eq!((done.tag, done.status), (tag, STATUS_OK), "{io:?} of block {block}");
    }

    /// What a block holds, read into memory that held something else.
    #[track_caller]
    pub(crate) fn read(&mut self, block: u64) -> Vec<u8> {
        self.ram.write(self.buffer.gpa, &[0xe7; BLOCK as usize]).unwrap();
        self.run(Io::Read, block, 0);
        let mut bytes = vec![0; BLOCK as usize];
        self.ram.read(self.buffer.gpa, &mut bytes).unwrap();
        bytes
    }

    /// Requests of all kinds, one after the other, whose data is right.
    #[track_caller]
    pub(crate) fn goes_on(&mut self) {
        for _ in 0..UNDISTURBED {
            self.works();
        }
    }

    /// One request of each kind.
    #[track_caller]
    pub(crate) fn works(&mut self) {
        self.rounds += 1;
        let (block, fill) = (self.rounds % BLOCKS, 1 + (self.rounds % 255) as u8);
        self.run(Io::Write, block, fill);
        self.run(Io::Flush, 0, 0);
        assert!(self.read(block).iter().all(|byte| *byte == fill), "wrote {fill}");
        self.run(Io::Discard, block, 0);
        self.run(Io::Zeroes, block, 0);
        assert!(self.read(block).iter().all(|byte| *byte == 0), "zeroed");
    }

    /// Stops its ring, disconnects, and its controller is deleted.
    #[track_caller]
    pub(crate) fn leaves(mut self, vhost: &Vhost) {
        assert_eq!(self.front_end.stop().unwrap().len(), 1);
        self.front_end.disconnect().unwrap();
        let deleted = vhost.ok("vhost_delete_controller", json!({"ctrlr": self.controller}));
        assert_eq!(deleted, json!(true));
    }
}

/// A request in flight.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Begun {
    tag: Tag,
    buffer: Segment,
}

/// Guests whose disks work: of memory, and on a file of the host.
pub(crate) struct Neighbours {
    flavour: Flavour,
    malloc: Guest,
    file: Guest,
    passed_by: u64,
}

impl Neighbours {
    pub(crate) fn new(vhost: &Vhost, flavour: Flavour) -> Self {
        vhost.malloc("M");
        let file = vhost.file("N.img", DISK_BYTES);
        flavour.create(vhost, "N", file.as_ref());
        let (malloc, file) = (Guest::on(vhost, "M"), Guest::on(vhost, "N"));
        let mut neighbours = Self { flavour, malloc, file, passed_by: 0 };
        neighbours.go_on();
        neighbours
    }

    /// Their I/O goes on.
    #[track_caller]
    pub(crate) fn go_on(&mut self) {
        self.malloc.goes_on();
        self.file.goes_on();
    }

    /// Another disk and another guest come, work and go, and the operator is answered.
    #[track_caller]
    pub(crate) fn others_come_and_go(&mut self, vhost: &Vhost) {
        self.passed_by += 1;
        let name = format!("P{}", self.passed_by);
        let file = vhost.file(&format!("{name}.img"), DISK_BYTES);
        self.flavour.create(vhost, &name, file.as_ref());
        let mut guest = Guest::on(vhost, &name);
        guest.works();
        for method in [
            "bdev_get_bdevs",
            "bdev_get_iostat",
            "vhost_get_controllers",
            "framework_get_reactors",
            "vhost_get_reactor_turns",
        ] {
            vhost.ok(method, json!({}));
        }
        vhost.ok(&self.flavour.method("rescan"), json!({"name": name}));
        guest.leaves(vhost);
        self.flavour.delete(vhost, &name);
    }

    /// Their rings stop, and their controllers and disks are deleted.
    #[track_caller]
    pub(crate) fn leave(self, vhost: &Vhost) {
        self.malloc.leaves(vhost);
        self.file.leaves(vhost);
        vhost.ok("bdev_malloc_delete", json!({"name": "M"}));
        self.flavour.delete(vhost, "N");
    }
}

/// Moves the queues of a guest on this disk between two reactors while they are in use, and checks
/// the data and the number of requests.
#[track_caller]
pub(crate) fn queues_move(vhost: &Vhost, bdev: &str, moves: usize) {
    const QUEUES: usize = 2;
    let controller = format!("{bdev}.vhost");
    let params = json!({"ctrlr": controller, "dev_name": bdev});
    vhost.ok("vhost_create_blk_controller", params);
    let ram = GuestRam::new(&[32 << 20]).unwrap();
    let socket = vhost.socket(&controller);
    let mut front_end = FrontEnd::connect(&socket, ram, Options::default()).unwrap();
    let queues = front_end.start_new(QUEUES, QueueOptions::default()).unwrap();
    let options = LoadOptions { blocks: 0..DISK_BYTES / BLOCK, ..LoadOptions::default() };
    let load = Load::start(queues, options).unwrap();
    load.wait_for(200).unwrap();
    let mut rpc = vhost.connect();
    for n in 0..moves {
        let to = json!({"ctrlr": controller, "queue": n % QUEUES, "core": n / QUEUES % 2});
        assert_eq!(rpc.call("vhost_move_queue", to), Ok(json!(true)));
        if n % 20 == 0 {
            load.wait_for(50).unwrap();
        }
    }
    load.wait_for(200).unwrap();
    let (summary, _) = load.stop().unwrap();
    assert_eq!(summary.first_problem, None);
    assert_eq!((summary.errors, summary.mismatches, summary.outstanding), (0, 0, 0));
    let session = vhost.ok("vhost_get_controller_stats", json!({"name": controller}));
    let requests = &session[0]["sessions"][0]["requests"];
    assert_eq!(*requests, summary.completed, "none is lost, none is done twice");
    front_end.disconnect().unwrap();
    vhost.ok("vhost_delete_controller", json!({"ctrlr": controller}));
}
