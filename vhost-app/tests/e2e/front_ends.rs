//! The real `vhost` under other people's front ends: what each of them can ask for, on split and on
//! packed rings.
//!
//! Each test is a cell of the table in `docs/src/front-ends.md`.
#![expect(clippy::cast_possible_truncation, reason = "sizes of small disks")]

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use front_end::RingLayout::{self, Packed, Split};
use front_end::{Backing, GuestRam, Segment};
use serde_json::json;

use crate::support::front_ends::{
    Blkio, Done, FrontEnd, Io, Messages, RustVmm, Setup, VirtioDriver,
};
use crate::support::harness::{Launch, Vhost, matrix, wait_until};

const DISK_BYTES: u64 = 16 << 20;
const SECTOR: u64 = 512;

/// A test for each of a column's cells.
macro_rules! column {
    ($column:ident: $front_end:ty, $rings:expr; $($cell:ident)*) => {
        mod $column { $(
            #[test]
            fn $cell() {
                use super::*;
                run::<$front_end>($rings, stringify!($cell), super::$cell::<$front_end>);
            }
        )* }
    };
}

column! {
    rust_vmm_split: RustVmm, Split;
    config_space read_and_write flush discard write_zeroes get_id many_segments four_queues event_idx
    indirect_descriptors memory_table memory_slots reconnect recovery_after_kill live_migration resize
}
column! {
    rust_vmm_packed: RustVmm, Packed;
    config_space read_and_write flush discard write_zeroes get_id many_segments four_queues event_idx
    indirect_descriptors memory_table memory_slots reconnect recovery_after_kill live_migration resize
}
column! {
    virtio_driver_split: VirtioDriver, Split;
    config_space read_and_write flush discard write_zeroes many_segments four_queues event_idx
    memory_slots reconnect
}
column! {
    virtio_driver_packed: VirtioDriver, Packed;
    config_space read_and_write flush discard write_zeroes many_segments four_queues event_idx
    memory_slots reconnect
}
column! {
    blkio_split: Blkio, Split;
    config_space read_and_write flush discard write_zeroes many_segments four_queues event_idx
    memory_slots reconnect
}

/// Runs a cell and tells the matrix.
fn run<F: FrontEnd>(rings: RingLayout, cell: &str, test: fn(&Scene)) {
    let args: &[&str] = if cell == "event_idx" { &["--interrupt-mode"] } else { &[] };
    let scene = Scene::new(rings, args);
    test(&scene);
    assert_eq!(scene.vhost.stop(), 0);
    let rings = if rings == Packed { "packed" } else { "split" };
    matrix::cell(F::NAME, rings, &cell.replace('_', " "));
}

/// A target with a disk on a file, and memory for a front end.
struct Scene {
    vhost: Vhost,
    rings: RingLayout,
    socket: PathBuf,
    file: PathBuf,
    ram: Arc<GuestRam>,
}

impl Scene {
    fn new(rings: RingLayout, args: &[&str]) -> Self {
        let launch = Launch::new().args(args);
        let file = launch.dir().join("disk");
        File::create(&file).unwrap().set_len(DISK_BYTES).unwrap();
        let vhost = launch.start();
        aio(&vhost, &file);
        let socket = controller(&vhost, "Aio0", rings);
        Self { vhost, rings, socket, file, ram: memory(0) }
    }

    fn setup(&self) -> Setup<'_> {
        Setup {
            socket: &self.socket,
            ram: &self.ram,
            rings: self.rings,
            queues: 1,
            event_idx: false,
            indirect: false,
            slots: false,
            inflight: false,
        }
    }

    fn alloc(&self, bytes: u64) -> Segment {
        self.ram.alloc(bytes as u32, 4096).unwrap()
    }

    /// A piece of memory that holds the pattern of the disk from `sector` on.
    fn written(&self, sector: u64, bytes: u64) -> Segment {
        let segment = self.alloc(bytes);
        self.ram.write(segment.gpa, &pattern(sector, bytes)).unwrap();
        segment
    }

    #[track_caller]
    fn holds(&self, segment: Segment, expected: &[u8]) {
        let mut bytes = vec![0; segment.len as usize];
        self.ram.read(segment.gpa, &mut bytes).unwrap();
        assert!(bytes == expected, "what was read is what is there");
    }

    /// Writes the pattern from `sector` on, and reads it back.
    #[track_caller]
    fn round_trip<F: FrontEnd>(&self, front_end: &mut F, sector: u64, bytes: u64) {
        let (from, to) = (self.written(sector, bytes), self.alloc(bytes));
        do_io(front_end, Io::Write { sector, data: &[from] });
        do_io(front_end, Io::Read { sector, data: &[to] });
        self.holds(to, &pattern(sector, bytes));
    }
}

fn memory(gpa: u64) -> Arc<GuestRam> {
    GuestRam::with(&[16 << 20], gpa, Backing::Pages).unwrap()
}

fn aio(vhost: &Vhost, file: &Path) {
    let params = json!({"name": "Aio0", "filename": file, "block_size": 512, "fallocate": true});
    vhost.ok("bdev_aio_create", params);
}

fn controller(vhost: &Vhost, bdev: &str, rings: RingLayout) -> PathBuf {
    let name = format!("vhost.{bdev}");
    let packed = rings == Packed;
    let params = json!({"ctrlr": name, "dev_name": bdev, "packed_ring": packed});
    vhost.ok("vhost_create_blk_controller", params);
    vhost.socket(&name)
}

/// Bytes that differ from sector to sector and within one.
fn pattern(sector: u64, bytes: u64) -> Vec<u8> {
    let word = |n: u64| (n + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes();
    (sector * SECTOR / 8..(sector * SECTOR + bytes) / 8).flat_map(word).collect()
}

/// Does one request that succeeds.
#[track_caller]
fn do_io<F: FrontEnd>(front_end: &mut F, io: Io<'_>) {
    front_end.submit(0, io, 7);
    assert_eq!(front_end.wait(0), Done { tag: 7, ok: true });
}

/// Waits for the requests tagged 0 to `n`, which succeed, in any order.
#[track_caller]
fn all_succeed<F: FrontEnd>(front_end: &mut F, queue: usize, n: usize) {
    let mut done: Vec<_> = (0..n).map(|_| front_end.wait(queue)).collect();
    done.sort();
    assert_eq!(done, (0..n).map(|tag| Done { tag, ok: true }).collect::<Vec<_>>());
}

fn config_space<F: FrontEnd>(scene: &Scene) {
    let mut front_end = F::start(scene.setup());
    assert_eq!(front_end.config(), (DISK_BYTES, 128));
}

/// 16 requests in flight, each of 32 KiB.
fn read_and_write<F: FrontEnd>(scene: &Scene) {
    const BYTES: u64 = 32 << 10;
    let mut front_end = F::start(scene.setup());
    let sectors: Vec<u64> = (0..16).map(|i| i * BYTES / SECTOR).collect();
    for (tag, &sector) in sectors.iter().enumerate() {
        let data = [scene.written(sector, BYTES)];
        front_end.submit(0, Io::Write { sector, data: &data }, tag);
    }
    all_succeed(&mut front_end, 0, 16);
    let buffers: Vec<Segment> = sectors.iter().map(|_| scene.alloc(BYTES)).collect();
    for (tag, &sector) in sectors.iter().enumerate() {
        front_end.submit(0, Io::Read { sector, data: &buffers[tag..=tag] }, tag);
    }
    all_succeed(&mut front_end, 0, 16);
    for (&sector, &buffer) in sectors.iter().zip(&buffers) {
        scene.holds(buffer, &pattern(sector, BYTES));
    }
    let past_the_end = Io::Read { sector: DISK_BYTES / SECTOR, data: &buffers[..1] };
    front_end.submit(0, past_the_end, 0);
    assert_eq!(front_end.wait(0), Done { tag: 0, ok: false });
}

fn flush<F: FrontEnd>(scene: &Scene) {
    let mut front_end = F::start(scene.setup());
    do_io(&mut front_end, Io::Write { sector: 8, data: &[scene.written(8, 4096)] });
    do_io(&mut front_end, Io::Flush);
    assert!(fs::read(&scene.file).unwrap()[4096..8192] == pattern(8, 4096));
}

/// Sectors 16 to 32 of 48 are zero after `io`, and the others are as they were.
fn zeroes_the_middle<F: FrontEnd>(scene: &Scene, front_end: &mut F, io: Io<'_>) {
    const BYTES: u64 = 48 * SECTOR;
    scene.round_trip(front_end, 0, BYTES);
    do_io(front_end, io);
    let mut expected = pattern(0, BYTES);
    expected[16 * SECTOR as usize..][..16 * SECTOR as usize].fill(0);
    let buffer = scene.written(0, BYTES);
    do_io(front_end, Io::Read { sector: 0, data: &[buffer] });
    scene.holds(buffer, &expected);
}

fn discard<F: FrontEnd>(scene: &Scene) {
    let mut front_end = F::start(scene.setup());
    zeroes_the_middle(scene, &mut front_end, Io::Discard { sector: 16, sectors: 16 });
}

fn write_zeroes<F: FrontEnd>(scene: &Scene) {
    let mut front_end = F::start(scene.setup());
    for unmap in [false, true] {
        let io = Io::WriteZeroes { sector: 16, sectors: 16, unmap };
        zeroes_the_middle(scene, &mut front_end, io);
    }
}

fn get_id<F: Messages>(scene: &Scene) {
    let mut front_end = F::start(scene.setup());
    let buffer = scene.alloc(20);
    do_io(&mut front_end, Io::Id { data: &[buffer] });
    scene.holds(buffer, b"Aio0                ");
}

/// As many as the configuration space allows, with gaps between them.
fn many_segments<F: FrontEnd>(scene: &Scene) {
    segments(scene, &mut F::start(scene.setup()));
}

fn segments<F: FrontEnd>(scene: &Scene, front_end: &mut F) {
    let scattered = |buffer: Segment| -> Vec<Segment> {
        (0..126).map(|i| Segment::new(buffer.gpa + 2 * i * SECTOR, SECTOR as u32)).collect()
    };
    let (from, to) = (scattered(scene.alloc(126 * 1024)), scattered(scene.alloc(126 * 1024)));
    for (sector, segment) in (5..).zip(&from) {
        scene.ram.write(segment.gpa, &pattern(sector, SECTOR)).unwrap();
    }
    do_io(front_end, Io::Write { sector: 5, data: &from });
    do_io(front_end, Io::Read { sector: 5, data: &to });
    for (sector, &segment) in (5..).zip(&to) {
        scene.holds(segment, &pattern(sector, SECTOR));
    }
}

/// Each reads what another has written.
fn four_queues<F: FrontEnd>(scene: &Scene) {
    const EACH: usize = 4;
    let mut front_end = F::start(Setup { queues: 4, ..scene.setup() });
    let sector = |queue: usize, tag: usize| ((queue * EACH + tag) * 8) as u64;
    let cells = || (0..4).flat_map(|queue| (0..EACH).map(move |tag| (queue, tag)));
    for (queue, tag) in cells() {
        let sector = sector(queue, tag);
        let data = [scene.written(sector, 4096)];
        front_end.submit(queue, Io::Write { sector, data: &data }, tag);
    }
    (0..4).for_each(|queue| all_succeed(&mut front_end, queue, EACH));
    let mut buffers = vec![];
    for (queue, tag) in cells() {
        let (sector, buffer) = (sector(3 - queue, tag), scene.alloc(4096));
        front_end.submit(queue, Io::Read { sector, data: &[buffer] }, tag);
        buffers.push((sector, buffer));
    }
    (0..4).for_each(|queue| all_succeed(&mut front_end, queue, EACH));
    for (sector, buffer) in buffers {
        scene.holds(buffer, &pattern(sector, 4096));
    }
}

/// Both sides sleep for each other, so that a kick or call at the wrong index would be the end. The
/// ring goes round several times.
fn event_idx<F: FrontEnd>(scene: &Scene) {
    let mut front_end = F::start(Setup { event_idx: true, ..scene.setup() });
    let buffers: Vec<Segment> = (0..4).map(|i| scene.written(8 * i, 4096)).collect();
    for round in 0..200 {
        for tag in 0..=round % 4 {
            let data = &buffers[tag..=tag];
            front_end.submit(0, Io::Write { sector: 8 * tag as u64, data }, tag);
        }
        all_succeed(&mut front_end, 0, round % 4 + 1);
    }
    scene.round_trip(&mut front_end, 0, 16384);
}

fn indirect_descriptors<F: Messages>(scene: &Scene) {
    let mut front_end = F::start(Setup { indirect: true, ..scene.setup() });
    segments(scene, &mut front_end);
    let buffer = scene.written(0, 4096);
    // Three descriptors each would be more than the ring has.
    for tag in 0..200 {
        front_end.submit(0, Io::Write { sector: 0, data: &[buffer] }, tag);
    }
    all_succeed(&mut front_end, 0, 200);
}

/// What one more region is used for while requests on the others are in flight.
fn uses_more_memory<F: FrontEnd>(scene: &Scene, front_end: &mut F, more: &GuestRam) {
    let far = more.alloc(4096, 4096).unwrap();
    more.write(far.gpa, &pattern(1024, 4096)).unwrap();
    front_end.submit(0, Io::Write { sector: 1024, data: &[far] }, 8);
    all_succeed(front_end, 0, 9);
    let buffer = scene.alloc(4096);
    do_io(front_end, Io::Read { sector: 1024, data: &[buffer] });
    scene.holds(buffer, &pattern(1024, 4096));
}

fn submit_8<F: FrontEnd>(scene: &Scene, front_end: &mut F) {
    for tag in 0..8 {
        let sector = 8 * tag as u64;
        front_end.submit(0, Io::Write { sector, data: &[scene.written(sector, 4096)] }, tag);
    }
}

/// A table with more memory, and one without it again.
fn memory_table<F: Messages>(scene: &Scene) {
    let mut front_end = F::start(scene.setup());
    for round in 1..10 {
        let more = memory(round << 32);
        let table = [scene.ram.table(), more.table()].concat();
        submit_8(scene, &mut front_end);
        front_end.front_end().set_memory_table(&table).unwrap();
        uses_more_memory(scene, &mut front_end, &more);
        front_end.front_end().set_memory_table(&scene.ram.table()).unwrap();
        is_gone(scene, &mut front_end, &more);
    }
}

/// More regions than there are slots, one after another; their fds come back.
fn memory_slots<F: FrontEnd>(scene: &Scene) {
    let mut front_end = F::start(Setup { slots: true, ..scene.setup() });
    scene.round_trip(&mut front_end, 0, 4096);
    let fds = scene.vhost.fds();
    for round in 1..=40 {
        let more = memory(round << 32);
        submit_8(scene, &mut front_end);
        front_end.add_memory(&more);
        uses_more_memory(scene, &mut front_end, &more);
        front_end.remove_memory(&more);
        is_gone(scene, &mut front_end, &more);
    }
    wait_until("no fd left", || scene.vhost.fds() == fds);
}

/// Requests on `more` fail, and others go on.
fn is_gone<F: FrontEnd>(scene: &Scene, front_end: &mut F, more: &GuestRam) {
    let data = [more.alloc(4096, 4096).unwrap()];
    front_end.submit(0, Io::Write { sector: 1024, data: &data }, 0);
    assert_eq!(front_end.wait(0), Done { tag: 0, ok: false });
    let buffer = scene.alloc(512);
    do_io(front_end, Io::Read { sector: 1024, data: &[buffer] });
    scene.holds(buffer, &pattern(1024, 512));
}

/// A front end disconnects without stopping its rings, and connects again.
fn reconnect<F: FrontEnd>(scene: &Scene) {
    let mut front_end = F::start(scene.setup());
    do_io(&mut front_end, Io::Write { sector: 0, data: &[scene.written(0, 4096)] });
    let fds = scene.vhost.fds();
    for _ in 0..5 {
        submit_8(scene, &mut front_end);
        drop(front_end);
        front_end = F::start(scene.setup());
        let buffer = scene.alloc(4096);
        do_io(&mut front_end, Io::Read { sector: 0, data: &[buffer] });
        scene.holds(buffer, &pattern(0, 4096));
    }
    wait_until("no fd left", || scene.vhost.fds() == fds);
}

/// The backend channel says that the disk has grown.
fn resize<F: Messages>(scene: &Scene) {
    scene.vhost.null("N");
    let socket = controller(&scene.vhost, "N", scene.rings);
    let mut front_end = F::start(Setup { socket: &socket, ..scene.setup() });
    let mut channel = front_end.front_end().open_backend_channel().unwrap();
    assert_eq!(front_end.config().0, 1 << 20);
    scene.vhost.ok("bdev_null_resize", json!({"name": "N", "new_size": 2}));
    assert_eq!(channel.receive().unwrap().request, 2, "CONFIG_CHANGE");
    assert_eq!(front_end.config().0, 2 << 20);
    let sector = 3 << 10;
    do_io(&mut front_end, Io::Write { sector, data: &[scene.written(sector, 4096)] });
}

/// The back end's part of one: it logs the pages that it writes to, from one answer to another.
fn live_migration<F: Messages>(scene: &Scene) {
    const LOG_BYTES: u64 = 4096;
    let mut front_end = F::start(scene.setup());
    let log = tempfile::tempfile_in("/dev/shm").unwrap();
    log.set_len(LOG_BYTES).unwrap();
    let buffers = [(); 4].map(|()| scene.alloc(8192));
    let read =
        |front_end: &mut F, buffer| do_io(front_end, Io::Read { sector: 0, data: &[buffer] });
    read(&mut front_end, buffers[0]);
    front_end.front_end().start_log(&log, LOG_BYTES).unwrap();
    read(&mut front_end, buffers[1]);
    do_io(&mut front_end, Io::Write { sector: 0, data: &[buffers[2]] });
    front_end.front_end().stop_log().unwrap();
    read(&mut front_end, buffers[3]);
    let mut bits = [0; LOG_BYTES as usize];
    log.read_exact_at(&mut bits, 0).unwrap();
    let logged = |segment: Segment| {
        let pages = segment.gpa / 4096..(segment.gpa + u64::from(segment.len)) / 4096;
        pages.map(|page| bits[page as usize / 8] >> (page % 8) & 1).collect::<Vec<u8>>()
    };
    assert_eq!(buffers.map(logged), [[0, 0], [1, 1], [0, 0], [0, 0]]);
}

/// `vhost` is killed when it has done every other request, and the next one does just the rest.
fn recovery_after_kill<F: Messages>(scene: &Scene) {
    const HOURS_US: u64 = 3_600_000_000;
    const BYTES: u64 = 4096;
    fs::write(&scene.file, pattern(0, DISK_BYTES)).unwrap();
    let link = scene.vhost.socket("link");
    let mut first = Launch::new().start();
    aio(&first, &scene.file);
    let delay = json!({
        "name": "Slow0", "base_bdev_name": "Aio0",
        "avg_read_latency": HOURS_US, "p99_read_latency": HOURS_US,
        "avg_write_latency": 1, "p99_write_latency": 1,
    });
    first.ok("bdev_delay_create", delay);
    symlink(controller(&first, "Slow0", scene.rings), &link).unwrap();
    let mut front_end = F::start(Setup { socket: &link, inflight: true, ..scene.setup() });
    let buffers: Vec<Segment> = (0..8).map(|_| scene.alloc(BYTES)).collect();
    for (tag, sector) in (0..8).zip((0..).step_by(8)) {
        let data = &buffers[tag..=tag];
        let (read, write) = (Io::Read { sector, data }, Io::Write { sector, data });
        front_end.submit(0, if tag % 2 == 0 { read } else { write }, tag);
    }
    let done = |front_end: &mut F| {
        let mut tags: Vec<_> = (0..4).map(|_| front_end.wait(0)).collect();
        tags.sort();
        tags.into_iter().map(|done| done.ok.then_some(done.tag)).collect::<Option<Vec<_>>>()
    };
    assert_eq!(done(&mut front_end), Some(vec![1, 3, 5, 7]));
    wait_until("reads are in flight", || {
        let shown = first.ok("vhost_get_controllers", json!({"name": "vhost.Slow0"}));
        shown[0]["sessions"][0]["inflight_task_cnt"] == 4
    });
    first.signal("KILL");
    assert_eq!(first.wait(), None);

    let second = Launch::new().start();
    aio(&second, &scene.file);
    fs::remove_file(&link).unwrap();
    symlink(controller(&second, "Aio0", scene.rings), &link).unwrap();
    front_end.front_end().reconnect().unwrap();
    assert_eq!(done(&mut front_end), Some(vec![0, 2, 4, 6]));
    for tag in [0, 2, 4, 6] {
        scene.holds(buffers[tag], &pattern(8 * tag as u64, BYTES));
    }
    scene.round_trip(&mut front_end, 4096, BYTES);
    assert_eq!(front_end.in_flight(0), 0);
    drop(front_end);
    assert_eq!(second.stop(), 0);
}
