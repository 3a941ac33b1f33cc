//! SPDK's `vhost` goes and this one comes, under a front end that reconnects with what it has
//! negotiated: its features, its in-flight area, and rings in the middle of their lives.

mod area;
mod life;
mod packed;
mod split;

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;

use self::life::{End, Life, SIZE};
use self::packed::Packed;
use self::split::Split;
use front_end::{
    FrontEnd, GuestRam, Options, ProtocolFeatures, QueueOptions, RawConnection, Request, STATUS_OK,
    Segment,
};
use serde_json::json;

use crate::support::harness::{LIMIT, Vhost};

/// What SPDK offers for every blk controller (24.01 to 26.01): MQ, LOG_SHMFD, RARP, REPLY_ACK,
/// NET_MTU, BACKEND_REQ, CRYPTO, CONFIG, BACKEND_SEND_FD, HOST_NOTIFIER, INFLIGHT_SHMFD, STATUS.
const SPDK_PROTOCOL: u64 = 0x1_1ebf;

const FLUSH: u64 = 1 << 9;
const CONFIG_WCE: u64 = 1 << 11;
const DISCARD: u64 = 1 << 13;
const WRITE_ZEROES: u64 = 1 << 14;
const LOG_ALL: u64 = 1 << 26;
const EVENT_IDX: u64 = 1 << 29;
const PACKED: u64 = 1 << 34;

/// A disk, as it is made.
#[derive(Clone, Copy, Debug)]
struct Kind {
    bdev: &'static str,
    /// The aio disk's `fallocate`.
    fallocate: bool,
    readonly: bool,
    packed: bool,
}

const fn kind(bdev: &'static str) -> Kind {
    Kind { bdev, fallocate: false, readonly: false, packed: false }
}

/// What a uring disk has besides.
const URING: u64 = EVENT_IDX | CONFIG_WCE | FLUSH | DISCARD;

/// Virtio features that SPDK offers, and those that are offered here besides: the table of differences
/// in `docs/src/replacing-spdk.md` has these. There is no feature of SPDK's that is not offered.
const FEATURES: [(Kind, u64, u64); 8] = [
    (kind("malloc"), 0x1_5c00_7646, EVENT_IDX | CONFIG_WCE),
    (
        Kind { readonly: true, packed: true, ..kind("malloc") },
        0x5_5c00_7666,
        EVENT_IDX | CONFIG_WCE,
    ),
    (kind("aio"), 0x1_5c00_5646, EVENT_IDX | CONFIG_WCE),
    (Kind { fallocate: true, ..kind("aio") }, 0x1_5c00_7646, EVENT_IDX | CONFIG_WCE),
    (Kind { packed: true, ..kind("aio") }, 0x5_5c00_5646, EVENT_IDX | CONFIG_WCE),
    (kind("uring"), 0x1_5c00_5446, URING),
    (Kind { packed: true, ..kind("uring") }, 0x5_5c00_5446, URING),
    (kind("null"), 0x1_5c00_5446, EVENT_IDX),
];

const DISK_BYTES: u64 = 1 << 20;
/// Bytes of a request's data.
const BYTES: u32 = 1024;
const QUEUES: u16 = 2;

/// Makes a disk of this kind and a controller on it. Answers with the file behind it, if there is one.
fn create(vhost: &Vhost, kind: Kind) -> Option<File> {
    let path = vhost.file("disk", DISK_BYTES);
    match kind.bdev {
        "malloc" => vhost.malloc("D"),
        "null" => vhost.null("D"),
        file => {
            let mut params = json!({"name": "D", "filename": path, "block_size": 512});
            if file == "aio" {
                params["fallocate"] = kind.fallocate.into();
            }
            vhost.ok(&format!("bdev_{file}_create"), params);
        }
    }
    let params = json!({
        "ctrlr": "vhost.0", "dev_name": "D", "readonly": kind.readonly, "packed_ring": kind.packed,
    });
    vhost.ok("vhost_create_blk_controller", params);
    let of_file = !matches!(kind.bdev, "malloc" | "null");
    of_file.then(|| File::options().read(true).write(true).open(path).unwrap())
}

/// What a front end has that has negotiated with SPDK.
fn negotiated(features: u64) -> Options {
    Options {
        features: features & !LOG_ALL,
        protocol: ProtocolFeatures::from_bits_retain(SPDK_PROTOCOL),
        inflight: true,
        ..Options::default()
    }
}

#[test]
fn whatever_spdk_offers_is_offered() {
    for (kind, spdk, more) in FEATURES {
        let vhost = Vhost::start(&[]);
        create(&vhost, kind);
        let ram = GuestRam::new(&[1 << 20]).unwrap();
        let options = negotiated(spdk);
        let mut front_end = FrontEnd::connect(&vhost.socket("vhost.0"), ram, options).unwrap();
        assert_eq!(front_end.offered(), spdk | more, "{kind:?}");
        assert_eq!(spdk & more, 0);
        assert_eq!(front_end.protocol_features().bits(), SPDK_PROTOCOL, "{kind:?}");
        // Both of them: QEMU asks the one, cloud-hypervisor the other.
        assert_eq!(front_end.queues_offered(), 128);
        let config = front_end.config().unwrap();
        assert_eq!(config.num_queues, 128, "{kind:?}");
        assert_eq!(config.max_discard_sectors > 0, (spdk | more) & DISCARD != 0, "{kind:?}");
        assert_eq!(config.max_write_zeroes_sectors > 0, (spdk | more) & WRITE_ZEROES != 0);
    }
}

/// It says what it has agreed on with SPDK, and asks nothing.
#[test]
fn what_it_has_negotiated_is_taken_at_its_word() {
    const SET_FEATURES: u32 = 2;
    const SET_PROTOCOL_FEATURES: u32 = 16;
    const GET_QUEUE_NUM: u32 = 17;
    const SEND_RARP: u32 = 19;
    const NET_SET_MTU: u32 = 20;
    const VERSION: u32 = 1;
    const NEED_REPLY: u32 = 1 << 3;
    let vhost = Vhost::start(&[]);
    let (kind, features, _) = FEATURES[0];
    create(&vhost, kind);
    let mut raw = RawConnection::connect(&vhost.socket("vhost.0")).unwrap();
    for (request, number) in [
        (SET_PROTOCOL_FEATURES, SPDK_PROTOCOL),
        (SET_FEATURES, features),
        // Meant for a network device, and nothing to end a connection for.
        (SEND_RARP, 0),
        (NET_SET_MTU, 1500),
    ] {
        raw.send_message(request, VERSION | NEED_REPLY, &number.to_le_bytes(), &[]).unwrap();
        assert_eq!(raw.receive().unwrap().value(), Some(0), "request {request}");
    }
    raw.send_message(GET_QUEUE_NUM, VERSION, &[], &[]).unwrap();
    assert_eq!(raw.receive().unwrap().value(), Some(128));
    drop(raw);
    assert_eq!(vhost.stop(), 0);
}

/// With the area that it was given here, as after an end of this `vhost`.
#[test]
fn it_comes_back_again() {
    let vhost = Vhost::start(&[]);
    let (kind, features, _) = FEATURES[0];
    create(&vhost, kind);
    let ram = GuestRam::new(&[16 << 20]).unwrap();
    let options = negotiated(features);
    let mut front_end = FrontEnd::connect(&vhost.socket("vhost.0"), ram, options).unwrap();
    let mut queue = front_end.start_new(1, QueueOptions::default()).unwrap().remove(0);
    let buffer = queue.ring().ram().alloc(4096, 4096).unwrap();
    for _ in 0..3 {
        assert_eq!(queue.run(&Request::write(0, &[buffer])).unwrap().status, STATUS_OK);
        front_end.reconnect().unwrap();
        assert_eq!(queue.run(&Request::read(0, &[buffer])).unwrap().status, STATUS_OK);
    }
    front_end.disconnect().unwrap();
    drop(queue);
    assert_eq!(vhost.stop(), 0);
}

/// What the guest knows of a request.
#[derive(Clone, Copy, Debug)]
struct Sent {
    write: bool,
    /// The sector is its own while it is in flight.
    place: usize,
}

/// A queue, and what it has to do with the disk.
struct Lane<L> {
    life: L,
    queue: u16,
    /// Memory for data, by place.
    data: Vec<Segment>,
    /// Places that no request uses.
    places: Vec<usize>,
    sent: HashMap<u16, Sent>,
    /// What each place of the disk holds.
    content: Vec<u8>,
    /// The file of the disk, if what is read can be told.
    file: Option<File>,
    done: u64,
    serial: u8,
}

const PLACES: usize = 40;

impl<L: Life> Lane<L> {
    fn new(ram: &std::sync::Arc<GuestRam>, queue: u16, area: &File, file: Option<&File>) -> Self {
        Self {
            life: L::new(ram, queue, area),
            queue,
            data: (0..PLACES).map(|_| ram.alloc(BYTES, 512).unwrap()).collect(),
            places: (0..PLACES).collect(),
            sent: HashMap::new(),
            content: vec![0; PLACES],
            file: file.map(|file| file.try_clone().unwrap()),
            done: 0,
            serial: 0,
        }
    }

    fn offset(&self, place: usize) -> u64 {
        (usize::from(self.queue) * PLACES + place) as u64 * u64::from(BYTES)
    }

    /// Makes one more request available, if there is room.
    fn submit(&mut self, write: bool, nth: usize) -> bool {
        if self.places.is_empty() {
            return false;
        }
        let place = self.places.remove(nth % self.places.len());
        self.serial = self.serial.wrapping_add(1);
        let (data, ram) = (self.data[place], self.life.ring().ram().clone());
        ram.write(data.gpa, &[self.serial; BYTES as usize]).unwrap();
        let sector = self.offset(place) / 512;
        let Some(id) = self.life.submit(write, sector, data) else {
            self.places.push(place);
            return false;
        };
        if write {
            self.content[place] = self.serial;
        }
        assert!(self.sent.insert(id, Sent { write, place }).is_none());
        true
    }

    /// SPDK does the I/O of a request that it holds, and completes it.
    fn spdk_completes(&mut self, nth: usize, end: End) {
        let held = self.life.held();
        let nth = nth % held.len();
        self.spdk_does(held[nth]);
        self.life.finish(nth, end);
    }

    fn spdk_does(&self, id: u16) {
        let Sent { write, place } = self.sent[&id];
        let Some(file) = &self.file else { return };
        let ram = self.life.ring().ram();
        let (gpa, at) = (self.data[place].gpa, self.offset(place));
        let mut bytes = [0; BYTES as usize];
        if write {
            ram.read(gpa, &mut bytes).unwrap();
            file.write_all_at(&bytes, at).unwrap();
        } else {
            file.read_exact_at(&mut bytes, at).unwrap();
            ram.write(gpa, &bytes).unwrap();
        }
    }

    /// Takes what has come back, and looks at what was read. Answers with how many.
    fn poll(&mut self) -> usize {
        let mut count = 0;
        while let Some((id, status)) = self.life.poll() {
            let Sent { write, place } = self.sent.remove(&id).expect("it comes back once");
            assert_eq!(status, STATUS_OK, "queue {}, request {id}", self.queue);
            if !write && self.file.is_some() {
                let mut bytes = [0; BYTES as usize];
                self.life.ring().ram().read(self.data[place].gpa, &mut bytes).unwrap();
                assert!(bytes == [self.content[place]; BYTES as usize], "place {place}");
            }
            self.places.push(place);
            count += 1;
        }
        self.done += count as u64;
        count
    }

    /// Waits until everything has come back.
    fn drain(&mut self) {
        let end = std::time::Instant::now() + LIMIT;
        while !self.sent.is_empty() {
            self.poll();
            assert!(std::time::Instant::now() < end, "{} never came back", self.sent.len());
            std::thread::yield_now();
        }
    }
}

/// A cheap source of choices.
struct Rng(u64);

impl Rng {
    fn below(&mut self, n: usize) -> usize {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % n
    }
}

/// SPDK serves the rings for `requests` and is killed in the middle of the last one's completion.
fn live_with_spdk<L: Life>(lane: &mut Lane<L>, requests: u64, writes: bool, end: End) {
    let mut rng = Rng(requests + u64::from(lane.queue));
    while lane.done < requests {
        for _ in 0..rng.below(6) {
            let write = writes && rng.below(2) == 0;
            let nth = rng.below(PLACES);
            lane.submit(write, nth);
        }
        while lane.life.take() {}
        for _ in 0..rng.below(6).min(lane.life.held().len()) {
            lane.spdk_completes(rng.below(PLACES), End::Whole);
        }
        lane.poll();
    }
    // Ten in flight or so: some done out of order, one half done, some written and not completed,
    // and the last one never taken.
    while lane.sent.len() < 10 {
        let write = writes && rng.below(2) == 0;
        let nth = rng.below(PLACES);
        assert!(lane.submit(write, nth));
    }
    while lane.life.take() {}
    for nth in [3, 1, 4] {
        lane.spdk_completes(nth, End::Whole);
    }
    let held = lane.life.held();
    lane.spdk_does(held[0]);
    assert!(lane.submit(false, 0));
    lane.spdk_completes(2, end);
}

/// SPDK's life with rings of kind `L`, its death, and what comes after.
fn swap<L: Life>(kind: Kind, features: u64, requests: u64, end: End) {
    let vhost = Vhost::start(&[]);
    let file = create(&vhost, kind);
    let ram = GuestRam::new(&[4 << 20]).unwrap();
    let area = area::create(QUEUES, SIZE, kind.packed);
    let mut lanes: Vec<Lane<L>> =
        (0..QUEUES).map(|queue| Lane::new(&ram, queue, &area, file.as_ref())).collect();
    for lane in &mut lanes {
        live_with_spdk(lane, requests, !kind.readonly, end);
    }
    let mut front_end =
        FrontEnd::connect(&vhost.socket("vhost.0"), ram, negotiated(features)).unwrap();
    front_end.bring_inflight(area, QUEUES, SIZE).unwrap();
    assert_eq!(front_end.features(), features & !LOG_ALL, "everything that it has accepted");
    let before: u64 = lanes.iter().map(|lane| lane.done).sum();
    let published: u64 = lanes.iter_mut().map(|lane| lane.poll() as u64).sum();
    let rings = lanes.iter().map(|lane| (lane.life.ring().clone(), lane.life.base())).collect();
    front_end.start(rings).unwrap();
    lanes.iter_mut().for_each(Lane::drain);
    // And the life goes on.
    let mut rng = Rng(7);
    for _ in 0..300 {
        for lane in &mut lanes {
            for _ in 0..rng.below(8) {
                let write = !kind.readonly && rng.below(2) == 0;
                let nth = rng.below(PLACES);
                lane.submit(write, nth);
            }
            lane.life.kick();
            lane.poll();
        }
    }
    lanes.iter_mut().for_each(Lane::drain);
    let ours = lanes.iter().map(|lane| lane.done).sum::<u64>() - before - published;
    let session = vhost.ok("vhost_get_controller_stats", json!({}))[0]["sessions"][0].take();
    assert_eq!(session["requests"], ours, "none is done twice");
    assert_eq!(session["errors"], 0);
    let positions = front_end.disconnect().unwrap();
    assert_eq!(positions, lanes.iter().map(|lane| lane.life.end()).collect::<Vec<_>>());
    assert!(lanes.iter_mut().all(|lane| lane.poll() == 0));
    assert!(!vhost.log().contains("in-flight area"), "nothing was wrong with it");
    assert_eq!(vhost.stop(), 0);
    // What the guest has written is in the file.
    for lane in &lanes {
        for (place, &byte) in lane.content.iter().enumerate() {
            let Some(file) = &lane.file else { continue };
            let mut bytes = [0; BYTES as usize];
            file.read_exact_at(&mut bytes, lane.offset(place)).unwrap();
            assert!(bytes == [byte; BYTES as usize], "queue {}, place {place}", lane.queue);
        }
    }
}

#[test]
fn a_front_end_of_spdks_goes_on_here() {
    for (kind, features, _) in FEATURES {
        for end in [End::Whole, End::Published, End::Announced] {
            if features & PACKED == 0 {
                swap::<Split>(kind, features, 500, end);
            } else {
                swap::<Packed>(kind, features, 500, end);
            }
        }
    }
}

/// Indices that have gone round, and a ring at its very beginning.
#[test]
fn wherever_the_rings_are_in_their_lives() {
    for requests in [0, 70_000] {
        swap::<Split>(kind("aio"), 0x1_5c00_5646, requests, End::Published);
        let packed = Kind { packed: true, ..kind("aio") };
        swap::<Packed>(packed, 0x5_5c00_5646, requests, End::Published);
    }
}
