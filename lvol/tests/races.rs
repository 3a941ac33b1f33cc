//! What a volume promises when I/O of guests meets operations on its store at a certain moment, on a
//! device that holds I/O back, fails it, and sees what it is given.
#![expect(clippy::unwrap_used, reason = "a test ends where something fails")]
#![expect(clippy::cast_possible_truncation, reason = "sizes of small disks")]
#![expect(unsafe_code, reason = "a device copies between its memory and the segments of an I/O")]

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use bdev::{
    Bdev, Buffer, Channel, Completion, EndedRequest, Error, Features, Io, Op, Qos, Request, Rights,
    Stats, Status, Submit, ThreadChannel, Wait, memory,
};
use lvol::{BlobId, Clear, LvStore, NewStore, NewVolume};
use uuid::Uuid;

/// The depth of channels of guests, by which the device knows them.
const GUEST_DEPTH: u16 = 7;
/// Longer reads are not copied, so that they take no time.
const COPIED: u64 = 1 << 20;
const NONE: u64 = u64::MAX;

/// The device. It does I/O at once.
struct Device {
    data: Mutex<Vec<u8>>,
    /// All I/O fails.
    fails: AtomicBool,
    /// Flushes of the store, and writes of guests, wait.
    holds_flushes: AtomicBool,
    holds_guests: AtomicBool,
    /// I/Os of guests that have ended.
    of_guests: AtomicU64,
    /// A long read of a guest that covers this offset sets `stale`.
    freed: AtomicU64,
    stale: AtomicBool,
    /// The offset of the last write of a guest.
    written: AtomicU64,
    stats: Stats,
    qos: Qos,
    uuid: Uuid,
}

impl Device {
    fn new(size: usize) -> Arc<Self> {
        Arc::new(Self {
            data: Mutex::new(vec![0; size]),
            fails: AtomicBool::new(false),
            holds_flushes: AtomicBool::new(false),
            holds_guests: AtomicBool::new(false),
            of_guests: AtomicU64::new(0),
            freed: AtomicU64::new(NONE),
            stale: AtomicBool::new(false),
            written: AtomicU64::new(NONE),
            stats: Stats::default(),
            qos: Qos::default(),
            uuid: Uuid::new_v4(),
        })
    }
}

impl Bdev for Device {
    fn name(&self) -> &str {
        "device"
    }

    fn product_name(&self) -> &'static str {
        "Device"
    }

    fn uuid(&self) -> Uuid {
        self.uuid
    }

    fn block_size(&self) -> u32 {
        512
    }

    fn num_blocks(&self) -> u64 {
        self.data.lock().unwrap().len() as u64 / 512
    }

    fn features(&self) -> Features {
        let (flush, write_zeroes, any_alignment) = (true, true, true);
        Features { flush, write_zeroes, any_alignment, ..Features::default() }
    }

    fn stats(&self) -> &Stats {
        &self.stats
    }

    fn qos(&self) -> &Qos {
        &self.qos
    }

    fn open(self: Arc<Self>, depth: u16) -> Result<Box<dyn Channel>, Error> {
        Ok(Box::new(Path { device: self, queue: vec![], of_guest: depth == GUEST_DEPTH }))
    }
}

struct Path {
    device: Arc<Device>,
    queue: Vec<Io>,
    of_guest: bool,
}

impl Path {
    fn is_held(&self, io: &Io) -> bool {
        match io.op {
            Op::Flush => !self.of_guest && self.device.holds_flushes.load(Ordering::SeqCst),
            Op::Write => self.of_guest && self.device.holds_guests.load(Ordering::SeqCst),
            _ => false,
        }
    }

    fn run(&self, io: &Io) -> Status {
        let device = &*self.device;
        if device.fails.load(Ordering::SeqCst) {
            return Status::IoError;
        }
        let (start, len) = (io.offset as usize, io.len as usize);
        if self.of_guest && io.op == Op::Read && io.len > COPIED {
            let freed = device.freed.load(Ordering::SeqCst);
            if (io.offset..io.offset + io.len).contains(&freed) {
                device.stale.store(true, Ordering::SeqCst);
            }
            return Status::Ok;
        }
        // SAFETY: the I/O has not been reported.
        let segments = unsafe { io.segments() };
        let mut data = device.data.lock().unwrap();
        let at = data[start..start + len].as_mut_ptr();
        match io.op {
            // SAFETY: as above; the device's memory is its own.
            Op::Read => assert!(unsafe { memory::scatter(segments, 0, at, len) }),
            Op::Write => {
                if self.of_guest {
                    device.written.store(io.offset, Ordering::SeqCst);
                }
                let cached = bdev::Stores::Cached;
                // SAFETY: as above.
                assert!(unsafe { memory::gather(segments, 0, at, len, cached) });
            }
            Op::WriteZeroes => data[start..start + len].fill(0),
            Op::Flush | Op::Unmap => {}
        }
        if self.of_guest {
            device.of_guests.fetch_add(1, Ordering::SeqCst);
        }
        Status::Ok
    }
}

impl Channel for Path {
    unsafe fn submit(&mut self, io: Io) -> Submit {
        if self.is_held(&io) {
            self.queue.push(io);
            return Submit::Queued;
        }
        Submit::Done(self.run(&io))
    }

    fn wait(&self) -> Wait {
        Wait::Until(Instant::now() + Duration::from_millis(1))
    }

    fn poll(&mut self, done: &mut [Completion]) -> usize {
        let ready = self.queue.iter().position(|io| !self.is_held(io));
        let (Some(at), Some(place)) = (ready, done.first_mut()) else { return 0 };
        let io = self.queue.remove(at);
        *place = Completion { tag: io.tag, status: self.run(&io) };
        1
    }
}

struct Fixture {
    device: Arc<Device>,
    store: Arc<LvStore>,
    id: BlobId,
    disk: Arc<dyn Bdev>,
}

impl Fixture {
    fn new(size: usize, cluster_size: u32, clusters: u64) -> Self {
        let device = Device::new(size);
        let base: Arc<dyn Bdev> = Arc::clone(&device) as _;
        let new = NewStore {
            name: "lvs".into(),
            uuid: Uuid::new_v4(),
            cluster_size,
            pages_per_hundred_clusters: 10,
            page_size: 4096,
            clear: Clear::None,
        };
        let store = LvStore::create(&base, &new).unwrap();
        let uuid = Uuid::new_v4();
        let new = NewVolume { name: "v", uuid, clusters, thin: true, clear: Clear::None };
        let id = store.create_volume(&new).unwrap();
        let disk = store.disk(id, "v".into(), uuid, Arc::clone(&base), None).unwrap();
        Self { device, store: Arc::new(store), id, disk }
    }

    fn guest(&self) -> ThreadChannel {
        ThreadChannel::open(&self.disk, GUEST_DEPTH, Rights::Write).unwrap()
    }
}

fn filled(len: u64, value: u8) -> Buffer {
    let mut buffer = Buffer::new(len as usize);
    buffer.bytes_mut().fill(value);
    buffer
}

/// Polls for at most this time.
fn ended_within(channel: &mut ThreadChannel, limit: Duration) -> Option<EndedRequest> {
    let began = Instant::now();
    while began.elapsed() < limit {
        if let Some(ended) = channel.poll() {
            return Some(ended);
        }
        thread::sleep(Duration::from_micros(200));
    }
    None
}

const PAUSE: Duration = Duration::from_millis(100);

/// An I/O that looks its clusters up before a discard has freed one of them, and begins after it,
/// must not reach the cluster: it may belong to another volume.
#[test]
fn no_io_reaches_a_cluster_that_was_given_away_since_its_look_up() {
    const CLUSTER: u64 = 4096;
    const CLUSTERS: u64 = 8192;
    let fixture = Fixture::new(64 << 20, CLUSTER as u32, CLUSTERS);
    let mut operator = ThreadChannel::open(&fixture.disk, 1, Rights::Write).unwrap();
    for at in (0..CLUSTERS * CLUSTER).step_by(1 << 20) {
        operator.run(Request::write(at, filled(1 << 20, 1))).unwrap();
    }
    let mut guest = fixture.guest();
    // The look-up of all other clusters lies between that of the first one and the I/O.
    guest.run(Request::write(0, filled(CLUSTER, 1))).unwrap();
    let first = fixture.device.written.load(Ordering::SeqCst);
    let stop = Arc::new(AtomicBool::new(false));
    let reader = {
        let stop = Arc::clone(&stop);
        thread::spawn(move || {
            let mut request = Some(Request::read(0, (CLUSTERS * CLUSTER) as usize));
            while !stop.load(Ordering::Relaxed) {
                guest.start(request.take().unwrap());
                request = loop {
                    if let Some(ended) = guest.poll() {
                        break Some(ended.request);
                    }
                };
            }
        })
    };
    let device = &fixture.device;
    for _ in 0..300 {
        operator.run(Request::plain(Op::Unmap, 0, CLUSTER)).unwrap();
        // It is free now.
        device.freed.store(first, Ordering::SeqCst);
        thread::sleep(Duration::from_millis(1));
        device.freed.store(NONE, Ordering::SeqCst);
        // The lowest free cluster is allocated: it is the same.
        operator.run(Request::write(0, filled(CLUSTER, 1))).unwrap();
    }
    stop.store(true, Ordering::Relaxed);
    reader.join().unwrap();
    fixture.store.close().unwrap();
    assert!(!device.stale.load(Ordering::SeqCst), "a free cluster was used");
}

/// A snapshot comes between a write of zeroes that may unmap and the store's thread.
#[test]
fn zeroes_are_written_although_a_snapshot_comes_first() {
    const CLUSTER: u64 = 64 << 10;
    let mut lost = 0;
    for _ in 0..5 {
        let fixture = Fixture::new(16 << 20, CLUSTER as u32, 4);
        let mut guest = fixture.guest();
        guest.run(Request::write(0, filled(CLUSTER, 7))).unwrap();
        let (device, id) = (&fixture.device, fixture.id);
        device.holds_flushes.store(true, Ordering::SeqCst);
        let store = Arc::clone(&fixture.store);
        let rename = thread::spawn(move || store.rename(id, "w").unwrap());
        thread::sleep(PAUSE);
        let store = Arc::clone(&fixture.store);
        let snapshot = thread::spawn(move || store.snapshot(id, "s", Uuid::new_v4()).unwrap());
        thread::sleep(PAUSE);
        let mut request = Request::plain(Op::WriteZeroes, 0, CLUSTER);
        request.may_unmap = true;
        guest.start(request);
        assert!(guest.poll().is_none());
        thread::sleep(PAUSE);
        device.holds_flushes.store(false, Ordering::SeqCst);
        rename.join().unwrap();
        snapshot.join().unwrap();
        let ended = ended_within(&mut guest, Duration::from_secs(5)).expect("it ends");
        ended.result.unwrap();
        let read = guest.run(Request::read(0, CLUSTER as usize)).unwrap();
        lost += u32::from(read.bytes().iter().any(|byte| *byte != 0));
        drop(guest);
        fixture.store.close().unwrap();
    }
    assert_eq!(lost, 0, "of 5 acknowledged writes of zeroes");
}

/// The base fails a change of the metadata and the loading after it, and works again.
#[test]
fn a_write_ends_after_the_store_could_not_be_loaded_again() {
    const CLUSTER: u64 = 64 << 10;
    let fixture = Fixture::new(16 << 20, CLUSTER as u32, 4);
    let mut guest = fixture.guest();
    guest.run(Request::write(0, filled(CLUSTER, 7))).unwrap();
    fixture.device.holds_flushes.store(true, Ordering::SeqCst);
    guest.start(Request::write(CLUSTER, filled(CLUSTER, 8)));
    assert!(ended_within(&mut guest, PAUSE).is_none());
    fixture.device.fails.store(true, Ordering::SeqCst);
    fixture.device.holds_flushes.store(false, Ordering::SeqCst);
    // It fails, or it succeeds once the base works.
    let mut ended = ended_within(&mut guest, Duration::from_secs(1));
    fixture.device.fails.store(false, Ordering::SeqCst);
    if ended.is_none() {
        ended = ended_within(&mut guest, Duration::from_secs(5));
    }
    let has_ended = ended.is_some();
    drop(guest);
    fixture.store.close().unwrap();
    assert!(has_ended, "no answer within 5 s of the base's recovery");
}

/// A volume is made read-only while an I/O with two parts is under way.
#[test]
fn a_read_only_volume_does_not_change() {
    const CLUSTER: u64 = 64 << 10;
    let fixture = Fixture::new(16 << 20, CLUSTER as u32, 4);
    let mut guest = fixture.guest();
    // Not in the order of the base, so that an I/O to both has two parts.
    guest.run(Request::write(CLUSTER, filled(CLUSTER, 1))).unwrap();
    guest.run(Request::write(0, filled(CLUSTER, 1))).unwrap();
    let device = &fixture.device;
    device.holds_guests.store(true, Ordering::SeqCst);
    guest.start(Request::write(0, filled(2 * CLUSTER, 2)));
    assert!(guest.poll().is_none());
    let (store, id) = (Arc::clone(&fixture.store), fixture.id);
    let read_only = thread::spawn(move || store.set_read_only(id).unwrap());
    thread::sleep(PAUSE);
    device.holds_guests.store(false, Ordering::SeqCst);
    let before = device.of_guests.load(Ordering::SeqCst);
    // The second part fails, or waits.
    let mut ended = None;
    while device.of_guests.load(Ordering::SeqCst) == before && ended.is_none() {
        ended = guest.poll();
    }
    read_only.join().unwrap();
    let read = || {
        let mut reader = ThreadChannel::open(&fixture.disk, 1, Rights::Read).unwrap();
        reader.run(Request::read(CLUSTER, CLUSTER as usize)).unwrap().bytes()[0]
    };
    let at_first = read();
    if ended.is_none() {
        ended_within(&mut guest, Duration::from_secs(5)).expect("it ends");
    }
    let later = read();
    drop(guest);
    fixture.store.close().unwrap();
    assert_eq!(at_first, later, "the read-only volume has changed");
}

/// A snapshot is the first operation after the store could not be loaded again.
#[test]
fn a_snapshot_waits_for_writes_also_after_a_failure() {
    const CLUSTER: u64 = 64 << 10;
    let fixture = Fixture::new(16 << 20, CLUSTER as u32, 4);
    let mut guest = fixture.guest();
    guest.run(Request::write(0, filled(CLUSTER, 7))).unwrap();
    let device = &fixture.device;
    device.holds_flushes.store(true, Ordering::SeqCst);
    guest.start(Request::write(CLUSTER, filled(CLUSTER, 8)));
    assert!(ended_within(&mut guest, PAUSE).is_none());
    device.fails.store(true, Ordering::SeqCst);
    device.holds_flushes.store(false, Ordering::SeqCst);
    thread::sleep(PAUSE);
    device.fails.store(false, Ordering::SeqCst);
    // Whatever has become of that write.
    drop(guest);
    let mut guest = fixture.guest();
    device.holds_guests.store(true, Ordering::SeqCst);
    guest.start(Request::write(0, filled(CLUSTER, 9)));
    assert!(guest.poll().is_none());
    let (store, id) = (Arc::clone(&fixture.store), fixture.id);
    let snapshot = thread::spawn(move || store.snapshot(id, "s", Uuid::new_v4()).unwrap());
    thread::sleep(3 * PAUSE);
    let was_early = snapshot.is_finished();
    device.holds_guests.store(false, Ordering::SeqCst);
    ended_within(&mut guest, Duration::from_secs(5)).expect("it ends").result.unwrap();
    snapshot.join().unwrap();
    drop(guest);
    fixture.store.close().unwrap();
    assert!(!was_early, "the snapshot was taken while a write to its cluster was under way");
}
