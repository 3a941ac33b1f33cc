//! A file disk whose file system does not answer: only its own requests wait.
//!
//! One reactor has all the disks. While an operation on one file hangs, guests of other disks on
//! that reactor do all kinds of requests, stop, come and go, and the operator is answered. Nothing
//! here is about time: what has to go on does so many requests while the operation hangs, which is
//! known to have arrived, and not to be answered, at both ends of that.
#![expect(clippy::cast_possible_truncation, reason = "sizes of small disks")]

use std::path::PathBuf;

use serde_json::{Value, json};

use crate::support::disks;
use crate::support::harness::{Launch, Refusal, Vhost, wait_until};
use crate::support::real_disks::{
    BLOCK, Begun, DISK_BYTES, Flavour, Guest, Io, Neighbours, Workers,
};
use crate::support::slow_files::{Kind, Op, SlowFiles};

/// What a case is tried on.
#[derive(Clone, Copy)]
struct Form {
    flavour: Flavour,
    kind: Kind,
}

macro_rules! cases {
    ($($case:ident,)*) => {
        cases!{ @forms [$($case)*]
            aio_directly: Aio, Direct;
            aio_through_the_page_cache: Aio, PageCache;
            aio_uncached: Aio, Uncached;
            uring_directly: Uring, Direct;
        }
    };
    (@forms $cases:tt $($name:ident: $flavour:ident, $kind:ident;)*) => {
        $( cases!{ @module $name $flavour $kind $cases } )*
    };
    (@module $name:ident $flavour:ident $kind:ident [$($case:ident)*]) => {
        mod $name {
            use super::Form;
            use crate::support::{real_disks::Flavour, slow_files::Kind};
            const FORM: Form = Form { flavour: Flavour::$flavour, kind: Kind::$kind };
            $(#[test] fn $case() { super::$case(FORM); })*
        }
    };
}

cases! {
    a_read_hangs,
    a_write_hangs,
    a_flush_hangs,
    a_discard_hangs,
    a_write_of_zeroes_hangs,
    an_open_hangs,
    a_close_hangs,
    a_rescan_hangs,
    a_creation_hangs_in_getattr,
    a_lock_hangs,
    a_stop_waits_for_its_own_disk_only,
    a_disk_that_hangs_is_deleted,
    more_flushes_hang_than_there_are_threads,
    many_requests_of_all_kinds_hang_and_each_completes_once,
}

/// A disk "F" on the file "disk" of a file system that hangs, with neighbours.
struct Scene {
    // Dropped first, so that the process can end.
    files: SlowFiles,
    vhost: Vhost,
    form: Form,
    neighbours: Neighbours,
}

impl Scene {
    #[track_caller]
    fn new(form: Form) -> Option<Self> {
        Self::start(form, &[])
    }

    #[track_caller]
    fn start(form: Form, args: &[&str]) -> Option<Self> {
        let made = ["disk", "other", "third"].map(|name| (name, form.kind, DISK_BYTES));
        let files = SlowFiles::mount(&made)?;
        let vhost = Launch::new().args(args).start();
        let neighbours = Neighbours::new(&vhost, form.flavour);
        form.flavour.create(&vhost, "F", &files.path("disk"));
        Some(Self { files, vhost, form, neighbours })
    }

    /// A guest of "F" that has done one request of each kind.
    fn guest(&self) -> Guest {
        let mut guest = Guest::on(&self.vhost, "F");
        guest.works();
        guest
    }

    fn workers(&self) -> Workers {
        self.form.flavour.workers(&self.vhost, "F")
    }

    /// Hands over a request, whose operation is held.
    fn begin_held(&self, guest: &mut Guest, io: Io, op: Op, block: u64, fill: u8) -> Begun {
        self.files.hold("disk", op);
        let begun = guest.begin(io, block, fill);
        self.files.wait_for_held("disk", op, 1);
        begun
    }

    /// Everybody else goes on.
    #[track_caller]
    fn others_go_on(&mut self) {
        self.neighbours.go_on();
        self.neighbours.others_come_and_go(&self.vhost);
        self.neighbours.go_on();
    }

    /// SIGTERM, while an operation hangs in a thread of the process: everything else ends, and the
    /// process does when the operation has.
    #[track_caller]
    fn ends_but_for(mut self, name: &str, op: Op) {
        let sockets = [self.vhost.rpc_socket(), self.vhost.socket("N.vhost")];
        self.vhost.signal("TERM");
        wait_until("the end of all but what hangs", || self.vhost.has_ended_but_for_waits());
        assert!(self.files.held(name, op) > 0, "it ended while the operation hung");
        assert!(sockets.iter().all(|socket| !socket.exists()));
        self.files.release(name, op);
        assert_eq!(self.vhost.wait(), Some(0));
    }
}

/// A request of a guest hangs in an operation of the file system; then another, and SIGTERM comes.
#[track_caller]
fn a_request_hangs(form: Form, io: Io, op: Op) {
    const AT: u64 = 1000;
    let Some(mut scene) = Scene::new(form) else { return };
    let mut guest = scene.guest();
    let writes = matches!(io, Io::Discard | Io::Zeroes);
    if writes {
        guest.run(Io::Write, AT, 0x33);
    }
    let arrived = scene.files.arrived("disk", op);
    let begun = scene.begin_held(&mut guest, io, op, AT, 0x44);
    let Workers { threads, busy, queued, .. } = scene.workers();
    assert_eq!((busy, queued), (1, 0));
    assert!(threads >= 1);
    scene.others_go_on();
    guest.has_nothing();
    assert_eq!(disks::in_flight(&scene.vhost, guest.controller()), 1);
    assert_eq!(scene.files.held("disk", op), 1);
    scene.files.release("disk", op);
    guest.wait_for(&[begun]);
    assert_eq!(scene.files.arrived("disk", op), arrived + 1, "it was done once");
    if io == Io::Read {
        assert!(guest.memory(&begun).iter().all(|byte| *byte == 0));
    }
    let at = (AT * BLOCK) as usize;
    let now = if io == Io::Write { 0x44 } else { 0 };
    let bytes = &scene.files.contents("disk")[at..at + BLOCK as usize];
    assert!(bytes.iter().all(|byte| *byte == now));
    guest.works();
    wait_until("the thread is free", || scene.workers().busy == 0);

    // Far from what a page cache may have read ahead.
    scene.begin_held(&mut guest, io, op, AT + 600, 0x55);
    scene.others_go_on();
    scene.ends_but_for("disk", op);
}

fn a_read_hangs(form: Form) {
    a_request_hangs(form, Io::Read, Op::Read);
}

fn a_write_hangs(form: Form) {
    a_request_hangs(form, Io::Write, Op::Write);
}

fn a_flush_hangs(form: Form) {
    a_request_hangs(form, Io::Flush, Op::Fsync);
}

fn a_discard_hangs(form: Form) {
    a_request_hangs(form, Io::Discard, Op::Fallocate);
}

fn a_write_of_zeroes_hangs(form: Form) {
    a_request_hangs(form, Io::Zeroes, Op::Fallocate);
}

/// Sends a call that hangs in `op` of the file `name` while others go on, and has its answer after.
#[track_caller]
fn a_call_hangs(
    scene: &mut Scene,
    name: &str,
    op: Op,
    method: &str,
    params: Value,
) -> Result<Value, Refusal> {
    scene.files.hold(name, op);
    let mut client = scene.vhost.connect();
    client.send(method, params);
    scene.files.wait_for_held(name, op, 1);
    scene.others_go_on();
    assert!(!client.has_answer());
    assert!(scene.files.held(name, op) > 0);
    scene.files.release(name, op);
    client.receive().1
}

/// Where disks are opened by a process of its own, which is all that waits.
fn an_open_hangs(form: Form) {
    a_creation_hangs(form, Op::Open);
}

fn a_creation_hangs_in_getattr(form: Form) {
    a_creation_hangs(form, Op::Getattr);
}

fn a_creation_hangs(form: Form, op: Op) {
    let Some(mut scene) = Scene::new(form) else { return };
    let create = form.flavour.method("create");
    let params = |name: &str, file: &str| form.flavour.params(name, &scene.files.path(file));
    let [other, third] = [params("G", "other"), params("H", "third")];
    assert_eq!(a_call_hangs(&mut scene, "other", op, &create, other), Ok(json!("G")));
    let mut guest = Guest::on(&scene.vhost, "G");
    guest.works();

    scene.files.hold("third", op);
    scene.vhost.connect().send(&create, third);
    scene.files.wait_for_held("third", op, 1);
    scene.others_go_on();
    guest.goes_on();
    // The thread that waits is in the process that opens disks.
    scene.vhost.signal("TERM");
    assert_eq!(scene.vhost.wait(), Some(0));
    assert!(scene.files.held("third", op) > 0);
}

fn a_rescan_hangs(form: Form) {
    let Some(mut scene) = Scene::new(form) else { return };
    let mut guest = scene.guest();
    scene.files.resize("disk", 2 * DISK_BYTES);
    let (method, of) = (form.flavour.method("rescan"), json!({"name": "F"}));
    let answer = a_call_hangs(&mut scene, "disk", Op::Getattr, &method, of.clone());
    assert_eq!(answer, Ok(json!(true)));
    let bdev = scene.vhost.ok("bdev_get_bdevs", of.clone());
    assert_eq!(bdev[0]["num_blocks"], 2 * DISK_BYTES / 512);
    guest.run(Io::Write, DISK_BYTES / BLOCK, 0x11);

    scene.files.hold("disk", Op::Getattr);
    scene.vhost.connect().send(&method, of);
    scene.files.wait_for_held("disk", Op::Getattr, 1);
    scene.ends_but_for("disk", Op::Getattr);
}

fn a_close_hangs(form: Form) {
    let Some(mut scene) = Scene::new(form) else { return };
    scene.guest().leaves(&scene.vhost);
    // The process that opens disks has closed its copy.
    scene.files.wait_for_answered("disk", Op::Close, 1);
    scene.files.hold("disk", Op::Close);
    form.flavour.delete(&scene.vhost, "F");
    scene.files.wait_for_held("disk", Op::Close, 1);
    scene.others_go_on();
    assert!(!scene.vhost.bdev_names().contains(&"F".to_owned()));
    scene.files.release("disk", Op::Close);
    wait_until("the end of the close", || {
        scene.vhost.ok("framework_get_reactors", json!({}))["stuck_closes"] == json!([])
    });

    form.flavour.create(&scene.vhost, "G", &scene.files.path("other"));
    scene.files.wait_for_answered("other", Op::Close, 1);
    scene.files.hold("other", Op::Close);
    form.flavour.delete(&scene.vhost, "G");
    scene.files.wait_for_held("other", Op::Close, 1);
    scene.ends_but_for("other", Op::Close);
}

/// The server that has the locks does not answer. Whoever does not ask it goes on.
fn a_lock_hangs(form: Form) {
    let Some(mut scene) = Scene::new(form) else { return };
    scene.files.hold("disk", Op::Lock);
    let vhost = &scene.vhost;
    let params = json!({"ctrlr": "F.vhost", "dev_name": "F"});
    vhost.ok("vhost_create_blk_controller", params);
    let ram = front_end::GuestRam::new(&[4 << 20]).unwrap();
    let buffer = ram.alloc(BLOCK as u32, BLOCK).unwrap();
    let connect = || front_end::FrontEnd::connect(&vhost.socket("F.vhost"), ram, <_>::default());
    let mut front_end = connect().unwrap();
    let mut queue = front_end.start_new(1, <_>::default()).unwrap().remove(0);
    queue.submit(&front_end::Request::read(0, &[buffer])).unwrap();
    queue.kick().unwrap();
    scene.files.wait_for_held("disk", Op::Lock, 1);
    scene.others_go_on();
    assert_eq!(queue.poll().unwrap(), None);
    assert!(scene.files.held("disk", Op::Lock) > 0);
    scene.files.release("disk", Op::Lock);
    assert_eq!(queue.wait().unwrap().status, front_end::STATUS_OK);
}

/// GET_VRING_BASE of the disk that hangs is answered when the disk has.
fn a_stop_waits_for_its_own_disk_only(form: Form) {
    let Some(mut scene) = Scene::new(form) else { return };
    let mut guest = scene.guest();
    let base = guest.queue.ring().used_index();
    let flush = scene.begin_held(&mut guest, Io::Flush, Op::Fsync, 0, 0);
    std::thread::scope(|scope| {
        let stop = scope.spawn(|| guest.front_end.stop());
        wait_until("it waits", || {
            disks::sessions(&scene.vhost, "F.vhost")[0]["state"] == "quiescing"
        });
        scene.others_go_on();
        assert!(!stop.is_finished());
        assert_eq!(scene.files.held("disk", Op::Fsync), 1);
        scene.files.release("disk", Op::Fsync);
        assert_eq!(stop.join().unwrap().unwrap(), [base + 1]);
    });
    guest.wait_for(&[flush]);
    let Scene { vhost, neighbours, .. } = scene;
    neighbours.leave(&vhost);
    assert_eq!(vhost.stop(), 0);
}

/// Its controller with force, as its I/O does not end. The answer about the disk waits for that I/O,
/// and neighbours stop and are deleted meanwhile.
fn a_disk_that_hangs_is_deleted(form: Form) {
    for (io, op) in [(Io::Read, Op::Read), (Io::Write, Op::Write), (Io::Flush, Op::Fsync)] {
        let Some(mut scene) = Scene::new(form) else { return };
        let mut guest = scene.guest();
        scene.begin_held(&mut guest, io, op, 1000, 0x66);
        let forced = json!({"ctrlr": "F.vhost", "force": true, "timeout_ms": 1});
        assert_eq!(scene.vhost.ok("vhost_delete_controller", forced), json!(true));
        let closed = scene.files.arrived("disk", Op::Close);
        let mut client = scene.vhost.connect();
        client.send(&form.flavour.method("delete"), json!({"name": "F"}));
        wait_until("the disk is gone", || !scene.vhost.bdev_names().contains(&"F".to_owned()));
        scene.others_go_on();
        let Scene { files, vhost, neighbours, .. } = scene;
        neighbours.leave(&vhost);
        assert!(!client.has_answer());
        assert_eq!(files.held("disk", op), 1);
        files.release("disk", op);
        assert_eq!(client.receive().1, Ok(json!(true)));
        files.wait_for_answered("disk", Op::Close, closed + 1);
        guest.has_nothing();
        let written = files.contents("disk")[1000 * BLOCK as usize];
        assert_eq!(written, if io == Io::Write { 0x66 } else { 0 });
        assert_eq!(vhost.stop(), 0);
    }
}

/// One disk's flushes take all the threads that it may have, and no other's.
fn more_flushes_hang_than_there_are_threads(form: Form) {
    const FLUSHES: u64 = 100;
    let Some(mut scene) = Scene::new(form) else { return };
    // A disk on the same file system, too.
    form.flavour.create(&scene.vhost, "G", &scene.files.path("other"));
    let (mut guest, mut other) = (scene.guest(), Guest::on(&scene.vhost, "G"));
    other.works();
    let arrived = scene.files.arrived("disk", Op::Fsync);
    scene.files.hold("disk", Op::Fsync);
    let flushes: Vec<Begun> = (0..FLUSHES).map(|_| guest.begin(Io::Flush, 0, 0)).collect();
    scene.files.wait_for_held("disk", Op::Fsync, 1);
    wait_until("all threads are busy", || scene.workers().busy == scene.workers().max);
    wait_until("the rest is queued", || {
        let Workers { max, queued, .. } = scene.workers();
        queued == FLUSHES - max
    });
    let Workers { max, threads, .. } = scene.workers();
    assert_eq!(max, 32);
    assert_eq!(threads, max);
    scene.others_go_on();
    other.goes_on();
    guest.has_nothing();
    let Workers { busy, queued, .. } = scene.workers();
    assert_eq!((busy, queued), (max, FLUSHES - max));
    scene.files.release("disk", Op::Fsync);
    guest.wait_for(&flushes);
    let done = scene.files.arrived("disk", Op::Fsync) - arrived;
    assert_eq!(done as u64, FLUSHES, "each flush is one");
    wait_until("the threads are free", || {
        let Workers { busy, queued, .. } = scene.workers();
        (busy, queued) == (0, 0)
    });
    guest.goes_on();

    // SIGTERM while they hang.
    scene.files.hold("disk", Op::Fsync);
    for _ in 0..FLUSHES {
        guest.begin(Io::Flush, 0, 0);
    }
    scene.files.wait_for_held("disk", Op::Fsync, 1);
    wait_until("all threads are busy", || scene.workers().busy == max);
    scene.ends_but_for("disk", Op::Fsync);
}

/// Everything of one disk hangs. It is answered later, in part and then as a whole.
fn many_requests_of_all_kinds_hang_and_each_completes_once(form: Form) {
    const EACH: u64 = 12;
    let Some(mut scene) = Scene::new(form) else { return };
    let mut guest = scene.guest();
    let ops = [Op::Read, Op::Write, Op::Fsync, Op::Fallocate];
    for block in 0..EACH {
        guest.run(Io::Write, 200 + block, 0x77);
        guest.run(Io::Write, 400 + block, 0x77);
    }
    ops.iter().for_each(|op| scene.files.hold("disk", *op));
    let (mut all, mut reads) = (vec![], vec![]);
    for block in 0..EACH {
        // Far apart, as a page cache reads more than it is asked for.
        reads.push(guest.begin(Io::Read, 600 + 64 * block, 0));
        all.push(guest.begin(Io::Write, 100 + block, 1 + block as u8));
        all.push(guest.begin(Io::Discard, 200 + block, 0));
        all.push(guest.begin(Io::Flush, 0, 0));
        all.push(guest.begin(Io::Zeroes, 400 + block, 0));
    }
    all.extend(&reads);
    wait_until("all are accepted", || {
        disks::in_flight(&scene.vhost, guest.controller()) == all.len() as u64
    });
    scene.files.wait_for_held("disk", Op::Read, 1);
    scene.others_go_on();
    guest.has_nothing();
    ops.iter().for_each(|op| scene.files.answer("disk", *op, 1));
    scene.others_go_on();
    ops.iter().for_each(|op| scene.files.release("disk", *op));
    guest.wait_for(&all);
    let contents = scene.files.contents("disk");
    for block in 0..EACH {
        let of = |first: u64| contents[((first + block) * BLOCK) as usize];
        assert_eq!((of(100), of(200), of(400)), (1 + block as u8, 0, 0));
    }
    assert!(reads.iter().all(|read| guest.memory(read).iter().all(|byte| *byte == 0)));
    guest.goes_on();
    let Scene { files, vhost, neighbours, .. } = scene;
    guest.leaves(&vhost);
    neighbours.leave(&vhost);
    assert_eq!(vhost.stop(), 0);
    drop(files);
}

/// Where disks are not opened by a process of their own, the threads that open them are the
/// process's.
#[test]
fn opens_hang_without_the_sandbox() {
    let form = Form { flavour: Flavour::Aio, kind: Kind::Direct };
    let Some(mut scene) = Scene::start(form, &["--no-sandbox"]) else { return };
    let path: PathBuf = scene.files.path("other");
    let create = form.flavour.params("G", &path);
    let answer = a_call_hangs(&mut scene, "other", Op::Open, "bdev_aio_create", create);
    assert_eq!(answer, Ok(json!("G")));
    scene.files.hold("third", Op::Open);
    let create = form.flavour.params("H", &scene.files.path("third"));
    scene.vhost.connect().send("bdev_aio_create", create);
    scene.files.wait_for_held("third", Op::Open, 1);
    scene.ends_but_for("third", Op::Open);
}
