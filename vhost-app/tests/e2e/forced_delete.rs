//! A controller is deleted by force while its disk hangs, and its guest continues with the same
//! memory and the same rings: the I/O in flight does not access those rings any more, and delays no
//! other guest.
//!
//! The tests check order and counts, not durations.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use front_end::features::{DRIVER_FEATURES, RING_PACKED};
use front_end::{AnyQueue, FrontEnd, GuestRam, Options, QueueOptions, Request, STATUS_OK, Segment};
use serde_json::json;

use crate::support::disks;
use crate::support::harness::{Vhost, wait_until};

/// Requests that hang.
const HELD: usize = 4;
/// Contents of a buffer before it is read into.
const OLD: u8 = 0x5a;

/// The variants of a case.
#[derive(Clone, Copy)]
struct Form {
    packed: bool,
    inflight: bool,
}

macro_rules! cases {
    ($($case:ident,)*) => {
        mod split_rings {
            $(#[test] fn $case() { super::$case(super::Form { packed: false, inflight: false }); })*
        }
        mod split_rings_with_an_in_flight_area {
            $(#[test] fn $case() { super::$case(super::Form { packed: false, inflight: true }); })*
        }
        mod packed_rings {
            $(#[test] fn $case() { super::$case(super::Form { packed: true, inflight: false }); })*
        }
        mod packed_rings_with_an_in_flight_area {
            $(#[test] fn $case() { super::$case(super::Form { packed: true, inflight: true }); })*
        }
    };
}

cases! {
    nothing_is_touched_after_the_answer,
    the_same_name_waits_for_what_is_in_flight,
    another_name_and_another_disk_wait_for_it_too,
    another_guest_waits_for_the_same_disk,
}

/// A guest with requests in flight on a disk that hangs, through a symlink to the current
/// controller's socket.
struct Scene {
    vhost: Vhost,
    form: Form,
    path: PathBuf,
    ram: Arc<GuestRam>,
    front_end: FrontEnd,
    queue: AnyQueue,
    buffers: Vec<Segment>,
}

fn connect(path: &Path, ram: &Arc<GuestRam>, form: Form) -> FrontEnd {
    let features = DRIVER_FEATURES | if form.packed { RING_PACKED } else { 0 };
    let options = Options { features, inflight: form.inflight, ..Options::default() };
    FrontEnd::connect(path, Arc::clone(ram), options).unwrap()
}

fn lead(path: &Path, to: &Path) {
    let _ = std::fs::remove_file(path);
    symlink(to, path).unwrap();
}

fn read_all(queue: &mut AnyQueue, buffers: &[Segment]) {
    for (sector, buffer) in (0..).step_by(8).zip(buffers) {
        queue.submit(&Request::read(sector, &[*buffer])).unwrap();
    }
    queue.kick().unwrap();
}

/// Takes so many completions, and checks that there are no more.
fn take(queue: &mut AnyQueue, count: usize) {
    for _ in 0..count {
        assert_eq!(queue.wait().unwrap().status, STATUS_OK);
    }
    assert_eq!((queue.in_flight(), queue.poll().unwrap()), (0, None));
}

impl Scene {
    fn new(form: Form) -> Self {
        Self::on(form, |vhost| disks::malloc(vhost, "M", disks::MIB, 512))
    }

    /// With a disk below that `make` makes and calls "M".
    fn on(form: Form, make: impl FnOnce(&Vhost)) -> Self {
        Self::with(Vhost::start(&[]), form, make)
    }

    fn with(vhost: Vhost, form: Form, make: impl FnOnce(&Vhost)) -> Self {
        make(&vhost);
        vhost.ok("bdev_error_create", json!({"base_name": "M"}));
        let path = vhost.dir().join("link");
        lead(&path, &disks::controller_of(&vhost, "b", "EE_M", form.packed));
        let ram = GuestRam::new(&[16 << 20]).unwrap();
        let mut front_end = connect(&path, &ram, form);
        let mut queue = front_end.start_any(1, QueueOptions::default()).unwrap().remove(0);
        let buffers: Vec<Segment> = (0..HELD).map(|_| ram.alloc(4096, 4096).unwrap()).collect();
        read_all(&mut queue, &buffers);
        take(&mut queue, HELD);
        disks::hold(&vhost, "EE_M", 1000);
        buffers.iter().for_each(|buffer| ram.write(buffer.gpa, &[OLD; 4096]).unwrap());
        read_all(&mut queue, &buffers);
        wait_until("all is held", || disks::in_flight(&vhost, "b") == HELD as u64);
        Self { vhost, form, path, ram, front_end, queue, buffers }
    }

    fn delete(&self) {
        let forced = json!({"ctrlr": "b", "force": true, "timeout_ms": 1});
        assert_eq!(self.vhost.ok("vhost_delete_controller", forced), json!(true));
        self.vhost.wait_for_log(&format!("controller b: deleted with {HELD} I/Os in flight"));
        disks::heal(&self.vhost, "EE_M");
    }

    fn create(&self, name: &str, bdev: &str) {
        lead(&self.path, &disks::controller_of(&self.vhost, name, bdev, self.form.packed));
    }

    /// The guest continues where it was.
    fn reconnect(&mut self) {
        let base = self.queue.base();
        self.front_end.reconnect_at(|_| base).unwrap();
    }

    fn is_gated(&mut self, controller: &str) {
        let sessions = disks::sessions(&self.vhost, controller);
        assert_eq!(sessions.last().unwrap()["state"], "starting");
        assert_eq!(self.held(controller), HELD as u64 * u64::from(controller == "b"));
        assert_eq!(self.queue.poll().unwrap(), None, "nothing came back meanwhile");
    }

    fn held(&self, controller: &str) -> u64 {
        let sessions = disks::sessions(&self.vhost, controller);
        let closed = sessions.iter().filter(|s| s["state"] == "closed");
        closed.map(|s| s["inflight_task_cnt"].as_u64().unwrap()).sum()
    }

    /// Releases the held I/O; each request is completed once: by the new queue.
    fn comes_back_once(mut self, controller: &str) {
        disks::answer(&self.vhost, "EE_M");
        let left = self.queue.in_flight();
        take(&mut self.queue, left);
        let sessions = disks::sessions(&self.vhost, controller);
        assert_eq!(sessions.len(), 1, "the old one is gone");
        assert_eq!(sessions[0]["requests"], left, "the new queue has answered all of them");
        for _ in 0..100 {
            read_all(&mut self.queue, &self.buffers);
            take(&mut self.queue, HELD);
        }
        self.front_end.disconnect().unwrap();
        assert_eq!(self.vhost.stop(), 0);
    }
}

fn nothing_is_touched_after_the_answer(form: Form) {
    let mut scene = Scene::new(form);
    scene.delete();
    disks::answer(&scene.vhost, "EE_M");
    scene.create("b", "EE_M");
    wait_until("the I/O has ended", || disks::sessions(&scene.vhost, "b").is_empty());
    assert_eq!(scene.queue.poll().unwrap(), None, "nobody was told");
    let mut now = vec![0; 4096];
    for buffer in &scene.buffers {
        scene.ram.read(buffer.gpa, &mut now).unwrap();
        assert_eq!(now, [OLD; 4096], "what is copied by us is not");
    }
    scene.reconnect();
    scene.comes_back_once("b");
}

fn the_same_name_waits_for_what_is_in_flight(form: Form) {
    let mut scene = Scene::new(form);
    scene.delete();
    scene.create("b", "EE_M");
    scene.reconnect();
    scene.is_gated("b");
    scene.queue.submit(&Request::read(80, &[scene.buffers[0]])).unwrap();
    scene.queue.kick().unwrap();
    scene.comes_back_once("b");
}

/// Only the guest's memory is shared then. Another disk of the same guest is served.
fn another_name_and_another_disk_wait_for_it_too(form: Form) {
    let mut scene = Scene::new(form);
    disks::malloc(&scene.vhost, "M2", disks::MIB, 512);
    let neighbour = disks::controller_of(&scene.vhost, "n", "M2", form.packed);
    scene.delete();
    disks::malloc(&scene.vhost, "M3", disks::MIB, 512);
    scene.create("c", "M3");
    scene.reconnect();
    scene.is_gated("c");
    let mut other = connect(&neighbour, &scene.ram, form);
    let mut queue = other.start_any(1, QueueOptions::default()).unwrap().remove(0);
    read_all(&mut queue, &[scene.ram.alloc(4096, 4096).unwrap()]);
    take(&mut queue, 1);
    scene.is_gated("c");
    other.disconnect().unwrap();
    scene.comes_back_once("c");
}

/// Another guest, with other memory, on the same disk.
fn another_guest_waits_for_the_same_disk(form: Form) {
    let scene = Scene::new(form);
    scene.delete();
    another_guest_waits(scene, "EE_M");
}

/// Another guest, on another bdev on the same file.
#[test]
fn another_guest_waits_for_the_same_file() {
    let form = Form { packed: false, inflight: false };
    let mut file = PathBuf::new();
    let vhost = Vhost::start(&["--share"]);
    let scene = Scene::with(vhost, form, |vhost| file = disks::aio(vhost, "M", disks::MIB));
    scene.delete();
    disks::aio_on(&scene.vhost, "M2", &file);
    another_guest_waits(scene, "M2");
}

fn another_guest_waits(mut scene: Scene, bdev: &str) {
    let socket = disks::controller_of(&scene.vhost, "c", bdev, scene.form.packed);
    let ram = GuestRam::new(&[16 << 20]).unwrap();
    let mut other = connect(&socket, &ram, scene.form);
    let mut queue = other.start_any(1, QueueOptions::default()).unwrap().remove(0);
    scene.is_gated("c");
    read_all(&mut queue, &[ram.alloc(4096, 4096).unwrap()]);
    disks::answer(&scene.vhost, "EE_M");
    take(&mut queue, 1);
    other.disconnect().unwrap();
}
