//! The headline: whatever one VM, its disk or an operator does, other VMs' disks go on.
//!
//! Everything here asserts order and counts, not time: a neighbour's load has to complete so many
//! requests more while the thing in question is under way.
#![expect(clippy::unwrap_used, reason = "tests")]

mod harness;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use bench::{FrontEnd, GuestRam, Load, LoadOptions, Options, QueueOptions, RawConnection};
use harness::{Launch, Vhost, wait_until};
use serde_json::{Value, json};

/// What a neighbour has to complete to count as undisturbed.
const UNDISTURBED: u64 = 500;

/// A VM in small: a front end with one queue.
struct Vm {
    ram: Arc<GuestRam>,
    front_end: FrontEnd,
    load: Option<Load>,
}

impl Vm {
    /// Connects and starts a verifying load.
    fn start(socket: &Path) -> Self {
        Self::with(socket, LoadOptions::default())
    }

    fn with(socket: &Path, options: LoadOptions) -> Self {
        let ram = GuestRam::new(&[64 << 20]).unwrap();
        let mut front_end = FrontEnd::connect(socket, ram.clone(), Options::default()).unwrap();
        let queues = front_end.start_new(1, QueueOptions::default()).unwrap();
        let load = Some(Load::start(queues, options).unwrap());
        Self { ram, front_end, load }
    }

    fn goes_on(&self) {
        self.load.as_ref().unwrap().wait_for(UNDISTURBED).unwrap();
    }

    /// Ends the load, which must have seen nothing wrong, and then the VM.
    fn end(mut self) {
        self.stop_load();
        self.front_end.disconnect().unwrap();
    }

    fn stop_load(&mut self) {
        let (summary, _) = self.load.take().unwrap().stop().unwrap();
        assert_eq!(summary.first_problem, None);
        assert_eq!((summary.errors, summary.mismatches, summary.outstanding), (0, 0, 0));
    }

    /// Ends as a VM that is killed does.
    fn kill(mut self) {
        if let Some(load) = self.load.take() {
            let killer = self.front_end.killer().unwrap();
            killer.kill();
            load.abandon().unwrap();
        }
        self.front_end.kill();
    }
}

fn malloc_controller(vhost: &Vhost, controller: &str, bdev: &str) -> PathBuf {
    vhost.ok("bdev_malloc_create", json!({"name": bdev, "num_blocks": 16384, "block_size": 512}));
    controller_on(vhost, controller, bdev)
}

fn controller_on(vhost: &Vhost, controller: &str, bdev: &str) -> PathBuf {
    vhost.ok("vhost_create_blk_controller", json!({"ctrlr": controller, "dev_name": bdev}));
    vhost.socket(controller)
}

/// Waits until a front end is turned away.
fn refuses_connections(socket: &Path) {
    let ram = GuestRam::new(&[1 << 20]).unwrap();
    wait_until("new connections are refused", || {
        FrontEnd::connect(socket, ram.clone(), Options::default()).is_err()
    });
}

fn sessions(vhost: &Vhost, controller: &str) -> Vec<Value> {
    let answer = vhost.ok("vhost_get_controllers", json!({"name": controller}));
    answer[0]["sessions"].as_array().unwrap().clone()
}

/// A VM on controller "b" whose disk never answers, with all its I/O in flight.
fn hung_vm(vhost: &Vhost) -> Vm {
    vhost.ok("bdev_malloc_create", json!({"name": "MB", "num_blocks": 16384, "block_size": 512}));
    vhost.ok("bdev_error_create", json!({"base_name": "MB"}));
    let vm = Vm::start(&controller_on(vhost, "b", "EE_MB"));
    vm.goes_on();
    let pending = json!({"name": "EE_MB", "io_type": "all", "error_type": "pending", "num": 1000});
    vhost.ok("bdev_error_inject_error", pending);
    wait_until("all of B's I/O is held", || {
        sessions(vhost, "b")[0]["inflight_task_cnt"] == LoadOptions::default().depth
    });
    vm
}

/// The disk of [`hung_vm`] holds no further I/O.
fn heal(vhost: &Vhost) {
    let clear = json!({"name": "EE_MB", "io_type": "clear", "error_type": "failure"});
    vhost.ok("bdev_error_inject_error", clear);
}

/// And answers what it has held.
fn answer(vhost: &Vhost) {
    vhost.ok("bdev_error_resume_pending", json!({"name": "EE_MB"}));
}

/// Builds the library that makes an unmapping slow; see its source.
fn slow_munmap(dir: &Path) -> PathBuf {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/slow_munmap.c");
    let library = dir.join("slow_munmap.so");
    let mut cc = Command::new("cc");
    cc.args(["-shared", "-fPIC", "-O2", "-o"]).arg(&library).arg(&source);
    assert!(cc.status().unwrap().success());
    library
}

/// The seed's own case: B is shut down and its memory takes four seconds to unmap.
#[test]
fn a_slow_unmap_holds_up_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let library = slow_munmap(dir.path());
    let vhost = Launch::new()
        .env("LD_PRELOAD", library.to_str().unwrap())
        .env("SLOW_MUNMAP", dir.path().to_str().unwrap())
        .start();
    let a = Vm::start(&malloc_controller(&vhost, "a", "MA"));
    let mut b = Vm::start(&malloc_controller(&vhost, "b", "MB"));
    b.goes_on();
    a.goes_on();
    b.stop_load();

    let is = |name: &str| dir.path().join(name).exists();
    fs::write(dir.path().join("armed"), "").unwrap();
    b.front_end.disconnect().unwrap();
    wait_until("the slow unmap", || is("sleeping"));

    let mut delete = vhost.connect();
    delete.send("vhost_delete_controller", json!({"ctrlr": "b"}));
    let coalescing = json!({"ctrlr": "a", "delay_base_us": 0, "iops_threshold": 1000});
    vhost.ok("vhost_get_controllers", json!({}));
    vhost.ok("vhost_controller_set_coalescing", coalescing);
    vhost.ok("framework_get_reactors", Value::Null);
    vhost.ok("bdev_get_iostat", json!({}));
    a.goes_on();
    // A VM comes, works and goes, and its disk with it.
    let c = Vm::start(&malloc_controller(&vhost, "c", "MC"));
    c.goes_on();
    c.end();
    vhost.ok("vhost_delete_controller", json!({"ctrlr": "c"}));
    vhost.ok("bdev_malloc_delete", json!({"name": "MC"}));
    a.goes_on();
    assert!(is("sleeping"), "all of that came while B's memory was being unmapped");

    assert_eq!(delete.receive().1, Ok(json!(true)));
    wait_until("the end of the unmap", || is("slept"));
    a.end();
    assert_eq!(vhost.stop(), 0);
}

/// A disk that never answers: its VM dies, its controller goes and comes back, others go on.
#[test]
fn a_disk_that_never_answers_holds_up_nobody() {
    let vhost = Vhost::start(&[]);
    let a = Vm::start(&malloc_controller(&vhost, "a", "MA"));
    let socket = vhost.socket("b");
    let b = hung_vm(&vhost);

    b.kill();
    wait_until("B is gone", || sessions(&vhost, "b")[0]["state"] == "closed");
    let left = &sessions(&vhost, "b")[0];
    assert_eq!(left["inflight_task_cnt"], LoadOptions::default().depth);
    assert_eq!(left["quarantined_bytes"], 64 << 20);
    a.goes_on();

    // A new VM on the same controller has to wait for its predecessor's I/O, and only it does.
    let ram = GuestRam::new(&[16 << 20]).unwrap();
    let mut waiting = FrontEnd::connect(&socket, ram, Options::default()).unwrap();
    waiting.start_new(1, QueueOptions::default()).unwrap();
    assert_eq!(sessions(&vhost, "b")[1]["state"], "starting");
    waiting.kill();
    let c = Vm::start(&malloc_controller(&vhost, "c", "MC"));
    c.goes_on();
    c.end();

    let refusal = vhost.err("vhost_delete_controller", json!({"ctrlr": "b", "timeout_ms": 0}));
    assert_eq!((refusal.code, refusal.message.as_str()), (-32602, "Device or resource busy"));
    let forced = json!({"ctrlr": "b", "force": true, "timeout_ms": 10});
    assert_eq!(vhost.ok("vhost_delete_controller", forced), json!(true));
    heal(&vhost);
    controller_on(&vhost, "b", "EE_MB");
    let b = Vm::start(&socket);
    b.goes_on();
    b.end();
    let zombie = &sessions(&vhost, "b")[0];
    assert_eq!(zombie["state"], "closed", "what is left shows under the name that it had");
    a.goes_on();

    // The I/O completes after all: the memory is given back.
    answer(&vhost);
    wait_until("the quarantine ends", || sessions(&vhost, "b").is_empty());
    a.end();
    assert_eq!(vhost.stop(), 0);
}

/// Stopping a ring whose I/O hangs keeps its own front end waiting and nobody else.
#[test]
fn a_stop_that_takes_long_holds_up_nobody() {
    let vhost = Vhost::start(&[]);
    let a = Vm::start(&malloc_controller(&vhost, "a", "MA"));
    let mut b = hung_vm(&vhost);
    let answered = AtomicBool::new(false);
    thread::scope(|scope| {
        let stop = scope.spawn(|| {
            let bases = b.front_end.stop().unwrap();
            answered.store(true, Ordering::SeqCst);
            bases
        });
        wait_until("B waits", || sessions(&vhost, "b")[0]["state"] == "quiescing");
        let c = Vm::start(&malloc_controller(&vhost, "c", "MC"));
        c.goes_on();
        c.end();
        a.goes_on();
        assert!(!answered.load(Ordering::SeqCst), "no answer before the I/O is done");
        heal(&vhost);
        answer(&vhost);
        let bases = stop.join().unwrap();
        let (summary, queues) = b.load.take().unwrap().abandon().unwrap();
        assert_eq!(summary.errors, 0);
        assert_eq!(bases, [queues[0].ring().used_index()], "everything fetched was completed");
    });
    assert_eq!(sessions(&vhost, "b")[0]["state"], "suspended");
    a.end();
}

/// So does a reset of the device, for a front end that wants to know when it is complete.
#[test]
fn a_reset_that_takes_long_holds_up_nobody() {
    const RESET_DEVICE: u32 = 34;
    const VERSION_NEED_REPLY: u32 = 1 | 1 << 3;
    let vhost = Vhost::start(&[]);
    let a = Vm::start(&malloc_controller(&vhost, "a", "MA"));
    let mut b = hung_vm(&vhost);
    let mut raw = b.front_end.raw().unwrap();
    let answered = AtomicBool::new(false);
    thread::scope(|scope| {
        let reset = scope.spawn(|| {
            raw.send_message(RESET_DEVICE, VERSION_NEED_REPLY, &[], &[]).unwrap();
            let answer = raw.receive().unwrap();
            answered.store(true, Ordering::SeqCst);
            (answer.request, answer.value())
        });
        wait_until("B waits", || sessions(&vhost, "b")[0]["state"] == "quiescing");
        let c = Vm::start(&malloc_controller(&vhost, "c", "MC"));
        c.goes_on();
        c.end();
        a.goes_on();
        assert!(!answered.load(Ordering::SeqCst), "no answer before the I/O is done");
        heal(&vhost);
        answer(&vhost);
        assert_eq!(reset.join().unwrap(), (RESET_DEVICE, Some(0)));
        let (summary, _) = b.load.take().unwrap().abandon().unwrap();
        assert_eq!(summary.errors, 0);
    });
    assert_eq!(sessions(&vhost, "b")[0]["state"], "suspended");
    a.end();
}

/// A front end that waits too long for its I/O loses its connection, which costs no data; a wrong
/// answer would.
#[test]
fn a_drain_is_waited_for_no_longer_than_the_limit() {
    let vhost = Vhost::start(&["--drain-limit", "1"]);
    let mut b = hung_vm(&vhost);
    b.front_end.stop().expect_err("the connection ends without an answer");
    wait_until("B is gone", || sessions(&vhost, "b")[0]["state"] == "closed");
    vhost.wait_for_log("I/O still in flight after 1 s, ending the connection");
    b.load.take().unwrap().abandon().unwrap();
    heal(&vhost);
    answer(&vhost);
    wait_until("its I/O has completed", || sessions(&vhost, "b").is_empty());
}

#[test]
fn delete_answers_whatever_the_front_end_does() {
    let vhost = Vhost::start(&[]);
    let a = Vm::start(&malloc_controller(&vhost, "a", "MA"));
    let socket = malloc_controller(&vhost, "b", "MB");
    let delete = |params: Value| vhost.rpc("vhost_delete_controller", params);
    let b = Vm::start(&socket);

    let busy = delete(json!({"ctrlr": "b", "timeout_ms": 0})).unwrap_err();
    assert_eq!((busy.code, busy.message.as_str()), (-32602, "Device or resource busy"));
    assert_eq!(delete(json!({"ctrlr": "b", "timeout_ms": 50})).unwrap_err(), busy);
    b.goes_on();

    // The VM leaves while two deletes wait: the first wins, the second finds nothing.
    let mut first = vhost.connect();
    first.send("vhost_delete_controller", json!({"ctrlr": "b", "timeout_ms": 60_000}));
    refuses_connections(&socket);
    let mut second = vhost.connect();
    second.send("vhost_delete_controller", json!({"ctrlr": "b", "timeout_ms": 60_000}));
    a.goes_on();
    b.goes_on();
    assert!(!first.has_answer() && !second.has_answer());
    b.end();
    assert_eq!(first.receive().1, Ok(json!(true)));
    let refusal = second.receive().1.unwrap_err();
    assert_eq!((refusal.code, refusal.message.as_str()), (-32602, "No such device"));
    assert!(!socket.exists());

    // By force.
    let socket = controller_on(&vhost, "b", "MB");
    let b = Vm::start(&socket);
    b.goes_on();
    assert_eq!(delete(json!({"ctrlr": "b", "force": true})), Ok(json!(true)));
    b.kill();

    // The client gives up: so does the delete.
    let socket = controller_on(&vhost, "b", "MB");
    let b = Vm::start(&socket);
    let mut impatient = vhost.connect();
    impatient.send("vhost_delete_controller", json!({"ctrlr": "b", "timeout_ms": 600_000}));
    refuses_connections(&socket);
    drop(impatient);
    let ram = GuestRam::new(&[16 << 20]).unwrap();
    wait_until("connections are taken again", || {
        FrontEnd::connect(&socket, ram.clone(), Options::default()).is_ok()
    });
    b.end();
    assert_eq!(delete(json!({"ctrlr": "b"})), Ok(json!(true)));
    a.end();
}

/// SPDK deadlocks here after some forty rounds.
#[test]
fn sixty_rounds_of_create_and_delete_against_a_client_that_connects() {
    let vhost = Vhost::start(&[]);
    let a = Vm::start(&malloc_controller(&vhost, "a", "MA"));
    vhost.ok("bdev_null_create", json!({"name": "N", "num_blocks": 2048, "block_size": 512}));
    let socket = vhost.socket("b");
    let (end, connections) = (AtomicBool::new(false), AtomicU64::new(0));
    thread::scope(|scope| {
        scope.spawn(|| {
            while !end.load(Ordering::Relaxed) {
                let Ok(mut raw) = RawConnection::connect(&socket) else { continue };
                connections.fetch_add(1, Ordering::Relaxed);
                if raw.send_message(1, 1, &[], &[]).is_ok() {
                    let _ = raw.receive();
                }
            }
        });
        for _ in 0..60 {
            controller_on(&vhost, "b", "N");
            let seen = connections.load(Ordering::Relaxed);
            wait_until("a connection", || connections.load(Ordering::Relaxed) > seen);
            assert_eq!(vhost.ok("vhost_delete_controller", json!({"ctrlr": "b"})), json!(true));
        }
        end.store(true, Ordering::Relaxed);
    });
    a.goes_on();
    a.end();
}

#[test]
fn memory_and_call_fds_change_under_load() {
    let vhost = Vhost::start(&[]);
    let mut a = Vm::start(&malloc_controller(&vhost, "a", "MA"));
    let fds = vhost.fds();
    let more = GuestRam::with(&[2 << 20, 2 << 20], 1 << 32, bench::Backing::Pages).unwrap();
    for round in 0..100 {
        let mut table = a.ram.table();
        table.extend(more.table().into_iter().take(round % 3));
        a.front_end.set_memory_table(&table).unwrap();
        a.front_end.change_call_fd(0).unwrap();
        a.load.as_ref().unwrap().wait_for(20).unwrap();
    }
    a.front_end.set_memory_table(&a.ram.table()).unwrap();
    a.goes_on();
    wait_until("every fd is given back", || vhost.fds() == fds);
    a.end();
}

#[test]
fn removing_and_resizing_a_disk_disturbs_nobody_else() {
    let vhost = Vhost::start(&[]);
    let a = Vm::start(&malloc_controller(&vhost, "a", "MA"));
    let b = Vm::start(&malloc_controller(&vhost, "b", "MB"));
    b.goes_on();
    assert_eq!(vhost.ok("bdev_malloc_delete", json!({"name": "MB"})), json!(true));
    let answer = vhost.ok("vhost_get_controllers", json!({"name": "b"}));
    assert_eq!(answer[0]["backend_specific"]["block"]["bdev"], Value::Null);
    b.goes_on(); // with errors, and without a hang
    let (summary, _) = b.load.unwrap().stop().unwrap();
    assert!(summary.errors > 0 && summary.mismatches == 0 && summary.outstanding == 0);
    vhost.ok("vhost_delete_controller", json!({"ctrlr": "b", "force": true}));

    vhost.ok("bdev_null_create", json!({"name": "N", "num_blocks": 2048, "block_size": 512}));
    let socket = controller_on(&vhost, "n", "N");
    let ram = GuestRam::new(&[16 << 20]).unwrap();
    let mut n = FrontEnd::connect(&socket, ram, Options::default()).unwrap();
    let mut channel = n.open_backend_channel().unwrap();
    n.start_new(1, QueueOptions::default()).unwrap();
    assert_eq!(n.config().unwrap().capacity, 2048);
    vhost.ok("bdev_null_resize", json!({"name": "N", "new_size": 2}));
    assert_eq!(channel.receive().unwrap().request, 2, "CONFIG_CHANGE");
    assert_eq!(n.config().unwrap().capacity, 4096);
    a.goes_on();
    a.end();
}

/// A process with I/O that never completes still ends.
#[test]
fn sigterm_ends_with_io_that_never_completes() {
    let mut vhost = Vhost::start(&[]);
    let socket = vhost.socket("b");
    let b = hung_vm(&vhost);
    vhost.signal("TERM");
    assert_eq!(vhost.wait(), Some(0));
    assert!(!socket.exists() && !vhost.rpc_socket().exists());
    b.kill();
}
