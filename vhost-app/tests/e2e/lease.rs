//! A disk in a file belongs to one process at a time while rings use it, and until the I/O of that
//! process has ended.

use std::fs;
use std::path::Path;

use bench::late_io::{self, End, Plan, SlowDisk};
use front_end::request::STATUS_IOERR;
use front_end::{
    FrontEnd, GuestRam, Options, Queue, QueueOptions, Request, RingLayout, STATUS_OK, Segment,
};
use serde_json::{Value, json};

use crate::support::disks;
use crate::support::harness::{self, Launch, Vhost, wait_until};
use crate::support::locks::LockingFiles;

/// What the file `disk`'s module tells of it.
fn shown(vhost: &Vhost, disk: &str) -> Value {
    let bdev = vhost.bdev(disk);
    bdev["driver_specific"].as_object().unwrap().values().next().unwrap().clone()
}

fn lease(vhost: &Vhost, disk: &str) -> String {
    shown(vhost, disk)["lease"].as_str().unwrap().to_owned()
}

fn waits_for(vhost: &Vhost, disk: &str) -> String {
    shown(vhost, disk)["waits_for"].as_str().unwrap_or_default().to_owned()
}

/// A `vhost` beside another on the same core, with a disk F on the file.
fn vhost_on(file: &Path, args: &[&str]) -> Vhost {
    let vhost = Launch::new().args(&["--interrupt-mode"]).args(args).start();
    disks::aio_on(&vhost, "F", file);
    disks::controller(&vhost, "f", "F");
    vhost
}

/// A guest with one queue.
struct Guest {
    front_end: FrontEnd,
    queue: Queue,
    buffer: Segment,
}

impl Guest {
    fn start(vhost: &Vhost, controller: &str) -> Self {
        let ram = GuestRam::new(&[4 << 20]).unwrap();
        let socket = vhost.socket(controller);
        let mut front_end = FrontEnd::connect(&socket, ram.clone(), Options::default()).unwrap();
        let queue = front_end.start_new(1, QueueOptions::default()).unwrap().remove(0);
        let buffer = ram.alloc(4096, 4096).unwrap();
        Self { front_end, queue, buffer }
    }

    fn submit(&mut self) {
        self.queue.submit(&Request::read(0, &[self.buffer])).unwrap();
        self.queue.kick().unwrap();
    }

    fn is_answered(&mut self) {
        assert_eq!(self.queue.wait().unwrap().status, STATUS_OK);
    }

    fn works(&mut self) {
        self.submit();
        self.is_answered();
    }
}

fn file() -> tempfile::TempPath {
    let file = tempfile::NamedTempFile::new().unwrap().into_temp_path();
    disks::make_file(&file, disks::MIB);
    file
}

#[test]
fn another_process_waits_until_the_rings_have_stopped() {
    let file = file();
    let [one, other] = [(); 2].map(|()| vhost_on(&file, &[]));
    assert_eq!(lease(&one, "F"), "none", "nobody uses it");
    let mut first = Guest::start(&one, "f");
    first.works();
    assert_eq!(lease(&one, "F"), "held");
    let mut second = Guest::start(&other, "f");
    second.submit();
    let holder = format!("process {}", one.pid());
    wait_until("it waits", || waits_for(&other, "F") == holder);
    assert_eq!(lease(&other, "F"), "waiting");
    other.wait_for_log(&format!("bdev F: {} is in use by {holder}", file.display()));
    first.works();
    assert!(second.queue.poll().unwrap().is_none());
    let base = first.front_end.stop().unwrap()[0];
    second.is_answered();
    assert_eq!(lease(&other, "F"), "held");
    wait_until("it is given back", || lease(&one, "F") == "none");
    other.wait_for_log(&format!("bdev F: {} is free after", file.display()));
    // The other way round; this time the holder is killed.
    first.front_end.start(vec![(first.queue.ring().clone(), base)]).unwrap();
    first.submit();
    wait_until("it waits", || waits_for(&one, "F") == format!("process {}", other.pid()));
    other.signal("KILL");
    first.is_answered();
    assert_eq!(one.stop(), 0);
}

#[test]
fn a_stop_waits_too_and_a_deletion_does_not() {
    let file = file();
    let [one, other] = [(); 2].map(|()| vhost_on(&file, &[]));
    let mut first = Guest::start(&one, "f");
    first.works();
    let mut second = Guest::start(&other, "f");
    wait_until("it waits", || lease(&other, "F") == "waiting");
    let base = std::thread::scope(|scope| {
        let stopped = scope.spawn(|| second.front_end.stop().unwrap());
        wait_until("it stops", || disks::sessions(&other, "f")[0]["state"] == "quiescing");
        let base = first.front_end.stop().unwrap()[0];
        assert_eq!(stopped.join().unwrap(), [0]);
        base
    });
    first.front_end.start(vec![(first.queue.ring().clone(), base)]).unwrap();
    first.works();
    let rings = vec![(second.queue.ring().clone(), 0)];
    second.front_end.start(rings).unwrap();
    wait_until("it waits", || lease(&other, "F") == "waiting");
    other.ok("vhost_delete_controller", json!({"ctrlr": "f", "force": true}));
    assert_eq!(lease(&other, "F"), "none");
    // Nor does the end of a disk that is waited for: its requests fail.
    disks::controller(&other, "g", "F");
    let mut third = Guest::start(&other, "g");
    third.submit();
    wait_until("it waits", || lease(&other, "F") == "waiting");
    other.ok("bdev_aio_delete", json!({"name": "F"}));
    assert_eq!(third.queue.wait().unwrap().status, STATUS_IOERR);
    assert_eq!(other.stop(), 0);
    first.works();
}

#[test]
fn a_second_disk_that_writes_to_the_file_is_refused() {
    let file = file();
    let dir = tempfile::tempdir().unwrap();
    let names = ["link", "same"].map(|name| dir.path().join(name));
    std::os::unix::fs::symlink(&file, &names[0]).unwrap();
    fs::hard_link(&file, file.with_extension("again")).unwrap();
    fs::rename(file.with_extension("again"), &names[1]).unwrap();
    let create =
        |name: &str, file: &Path| json!({"name": name, "filename": file, "block_size": 512});
    let vhost = Vhost::start(&[]);
    vhost.ok("bdev_aio_create", create("A", &file));
    for name in names.iter().map(AsRef::as_ref).chain([&*file]) {
        let refusal = vhost.err("bdev_aio_create", create("B", name));
        assert_eq!(refusal.code, -i64::from(libc::EBUSY));
        let refusal = vhost.err("bdev_uring_create", create("B", name));
        assert_eq!(refusal.message, "Unable to create URING bdev.");
    }
    vhost.wait_for_log(&format!(
        "bdev_aio_create: busy: bdev A writes to {} already; start vhost with --share to allow \
         several disks on it",
        names[0].display()
    ));
    let mut read_only = create("R", &file);
    read_only["readonly"] = true.into();
    vhost.ok("bdev_aio_create", read_only);
    vhost.ok("bdev_aio_delete", json!({"name": "A"}));
    vhost.ok("bdev_uring_create", create("U", &file));
    assert_eq!(vhost.stop(), 0);
}

#[test]
fn whoever_shares_does_not_wait() {
    let file = file();
    let [one, other] = [(); 2].map(|()| vhost_on(&file, &["--share"]));
    disks::aio_on(&one, "G", &file);
    disks::controller(&one, "g", "G");
    let mut guests = [(&one, "f"), (&one, "g"), (&other, "f")].map(|(v, c)| Guest::start(v, c));
    guests.iter_mut().for_each(Guest::works);
    assert_eq!(lease(&one, "F"), "none");
}

#[test]
fn a_file_system_without_locks_is_used_without() {
    let files = LockingFiles::default();
    files.refuse();
    let Some(mounted) = files.mount() else { return };
    let vhost = vhost_on(&mounted.file(), &[]);
    Guest::start(&vhost, "f").works();
    assert_eq!(lease(&vhost, "F"), "none");
    vhost.wait_for_log("bdev F: cannot lock ");
    Guest::start(&vhost, "f").works();
    assert_eq!(vhost.log().matches("cannot lock").count(), 1);
    assert_eq!(vhost.stop(), 0);
}

/// As on a network file system whose server is gone.
#[test]
fn a_lock_call_that_hangs_holds_up_nobody() {
    let files = LockingFiles::default();
    files.hang();
    let Some(mounted) = files.mount() else { return };
    let vhost = vhost_on(&mounted.file(), &[]);
    let mut guest = Guest::start(&vhost, "f");
    guest.submit();
    files.wait_for_held();
    vhost.malloc("M");
    disks::controller(&vhost, "m", "M");
    let mut neighbour = Guest::start(&vhost, "m");
    neighbour.works();
    assert_eq!(lease(&vhost, "F"), "waiting");
    vhost.wait_for_log("bdev F: locking or unlocking ");
    neighbour.front_end.disconnect().unwrap();
    vhost.ok("vhost_delete_controller", json!({"ctrlr": "m"}));
    files.go_on();
    guest.is_answered();
    assert_eq!(lease(&vhost, "F"), "held");
    // Giving it back hangs as well.
    files.hang();
    guest.front_end.disconnect().unwrap();
    files.wait_for_held();
    vhost.ok("vhost_delete_controller", json!({"ctrlr": "f"}));
    vhost.ok("bdev_aio_delete", json!({"name": "F"}));
    Guest::start(&vhost, {
        disks::controller(&vhost, "m", "M");
        "m"
    })
    .works();
    files.go_on();
    assert_eq!(vhost.stop(), 0);
}

/// Ends `vhost` so often while its disk holds back I/O.
fn ends(rings: RingLayout, end: End, rounds: u64, args: &[&str]) -> Option<late_io::Toll> {
    let disk = match SlowDisk::new() {
        Ok(disk) => disk,
        Err(reason) => {
            test_report::skipped("block-throttle", &reason);
            return None;
        }
    };
    let mut plan = Plan {
        vhost: env!("CARGO_BIN_EXE_vhost").into(),
        args: args.iter().map(|arg| (*arg).to_owned()).collect(),
        core: usize::from(harness::core_mask() == "0x2"),
        rings,
        end,
        rounds,
    };
    if std::env::var("VHOST_HUGEPAGES").is_ok_and(|v| v == "0") {
        plan.args.extend(["--no-huge", "-s", "256"].map(str::to_owned));
    }
    let toll = late_io::run(&plan, &disk).unwrap();
    println!("{toll}");
    Some(toll)
}

fn nothing_is_late(rings: RingLayout, end: End, rounds: u64, args: &[&str]) {
    let Some(toll) = ends(rings, end, rounds, args) else { return };
    assert!(toll.is_good(), "{toll}");
    assert_eq!(toll.rounds, rounds);
}

#[test]
fn split_rings_wait_for_io_of_a_killed_process() {
    nothing_is_late(RingLayout::Split, End::Kill, 20, &[]);
}

#[test]
fn packed_rings_wait_for_io_of_a_killed_process() {
    nothing_is_late(RingLayout::Packed, End::Kill, 20, &[]);
}

#[test]
fn rings_of_reactors_that_sleep_wait_for_io_of_a_killed_process() {
    nothing_is_late(RingLayout::Split, End::Kill, 5, &["--interrupt-mode"]);
}

#[test]
fn rings_wait_for_io_of_a_process_that_did_not() {
    nothing_is_late(RingLayout::Split, End::Terminate, 1, &[]);
    nothing_is_late(RingLayout::Packed, End::Terminate, 1, &[]);
}

/// Without waiting, other processes would see this.
#[test]
fn without_a_lease_old_io_lands_over_what_is_newer() {
    let Some(toll) = ends(RingLayout::Split, End::Kill, 1, &["--share"]) else { return };
    assert!(toll.overtaken == 1 && toll.stale > 0 && toll.corrupted > 0, "{toll}");
}
