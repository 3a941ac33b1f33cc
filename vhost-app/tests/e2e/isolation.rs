//! The headline: whatever one VM, its disk or an operator does, other VMs' disks go on.
//!
//! Everything here asserts order and counts, not time: each queue of a neighbour has to complete so
//! many requests more while the thing in question is under way. Each case is tried in two [`Form`]s.

use std::fs;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use front_end::{FrontEnd, GuestRam, Options, QueueOptions, RawConnection};
use serde_json::{Value, json};

use crate::support::harness::wait_until;
use crate::support::isolation::{Form, Host, RAM_BYTES, Vm, refuses_connections};

macro_rules! cases {
    ($($case:ident,)*) => {
        mod one_split_ring {
            $(#[test] fn $case() { super::$case(super::Form::Small); })*
        }
        mod four_packed_rings_with_an_in_flight_area {
            $(#[test] fn $case() { super::$case(super::Form::Full); })*
        }
    };
}

cases! {
    a_slow_unmap_holds_up_nobody,
    a_disk_that_never_answers_holds_up_nobody,
    a_stop_that_takes_long_holds_up_nobody,
    a_reset_that_takes_long_holds_up_nobody,
    a_drain_is_waited_for_no_longer_than_the_limit,
    delete_answers_whatever_the_front_end_does,
    sixty_rounds_of_create_and_delete_against_a_client_that_connects,
    memory_and_call_fds_change_under_load,
    removing_and_resizing_a_disk_disturbs_nobody_else,
    sigterm_ends_with_io_that_never_completes,
}

/// The seed's own case: B is shut down and its memory takes four seconds to unmap.
fn a_slow_unmap_holds_up_nobody(form: Form) {
    let launch = form.launch();
    let dir = launch.dir().to_owned();
    // The library renames files, which the sandbox refuses to the threads that unmap.
    let mut launch = launch.args(&["--no-sandbox"]);
    for (name, value) in slow_munmap::environment(&dir) {
        launch = launch.env(name, value.to_str().unwrap());
    }
    let vhost = form.start_as(launch);
    let a = vhost.neighbour();
    let mut b = vhost.vm(&vhost.malloc_controller("b", "MB"));
    b.goes_on();
    a.goes_on();
    b.stop_loads();

    let is = |name: &str| dir.join(name).exists();
    fs::write(dir.join(slow_munmap::ARMED), "").unwrap();
    b.front_end.disconnect().unwrap();
    wait_until("the slow unmap", || is(slow_munmap::SLEEPING));

    let mut delete = vhost.connect();
    delete.send("vhost_delete_controller", json!({"ctrlr": "b"}));
    let coalescing = json!({"ctrlr": "a", "delay_base_us": 0, "iops_threshold": 1000});
    vhost.ok("vhost_get_controller_stats", json!({}));
    vhost.ok("vhost_controller_set_coalescing", coalescing);
    vhost.ok("framework_get_reactors", Value::Null);
    vhost.ok("bdev_get_iostat", json!({}));
    a.goes_on();
    // And its disk with it.
    vhost.passes_by();
    vhost.ok("vhost_delete_controller", json!({"ctrlr": "c"}));
    vhost.ok("bdev_malloc_delete", json!({"name": "MC"}));
    a.goes_on();
    assert!(is(slow_munmap::SLEEPING), "all of that came while B's memory was being unmapped");

    assert_eq!(delete.receive().1, Ok(json!(true)));
    wait_until("the end of the unmap", || is(slow_munmap::SLEPT));
    a.end();
    assert_eq!(vhost.stop(), 0);
}

/// A disk that never answers: its VM dies, its controller goes and comes back, others go on.
fn a_disk_that_never_answers_holds_up_nobody(form: Form) {
    let vhost = form.start();
    let a = vhost.neighbour();
    let socket = vhost.socket("b");
    let b = vhost.hung_vm();

    b.kill();
    wait_until("B is gone", || vhost.sessions("b")[0]["state"] == "closed");
    let left = &vhost.sessions("b")[0];
    assert_eq!(left["inflight_task_cnt"], form.held());
    assert_eq!(left["quarantined_bytes"], RAM_BYTES);
    a.goes_on();

    // A new VM on the same controller has to wait for its predecessor's I/O, and only it does.
    let ram = GuestRam::new(&[16 << 20]).unwrap();
    let mut waiting = form.connect(&socket, &ram);
    waiting.start_any(form.queues(), QueueOptions::default()).unwrap();
    assert_eq!(vhost.sessions("b")[1]["state"], "starting");
    waiting.kill();
    vhost.passes_by();

    let refusal = vhost.err("vhost_delete_controller", json!({"ctrlr": "b", "timeout_ms": 0}));
    assert_eq!((refusal.code, refusal.message.as_str()), (-32602, "Device or resource busy"));
    let forced = json!({"ctrlr": "b", "force": true, "timeout_ms": 10});
    assert_eq!(vhost.ok("vhost_delete_controller", forced), json!(true));
    vhost.heal();
    vhost.controller_on("b", "EE_MB");
    // A VM on the same disk waits for I/O that may still write to it.
    let b = vhost.vm(&socket);
    let states = || vhost.sessions("b").iter().map(|s| s["state"].clone()).collect::<Vec<_>>();
    assert_eq!(states(), ["closed", "starting"], "what is left shows under the name that it had");
    a.goes_on();

    // The I/O completes after all: the memory is given back.
    vhost.answer();
    wait_until("the quarantine ends", || states() == ["running"]);
    b.goes_on();
    b.end();
    a.end();
    assert_eq!(vhost.stop(), 0);
}

/// B waits for the end of its I/O, and nobody else for anything.
fn b_alone_waits(vhost: &Host, a: &Vm, answered: &AtomicBool) {
    wait_until("B waits", || vhost.sessions("b")[0]["state"] == "quiescing");
    vhost.passes_by();
    a.goes_on();
    assert!(!answered.load(Ordering::SeqCst), "no answer before the I/O is done");
}

/// Stopping a ring whose I/O hangs keeps its own front end waiting and nobody else.
fn a_stop_that_takes_long_holds_up_nobody(form: Form) {
    let vhost = form.start();
    let a = vhost.neighbour();
    let mut b = vhost.hung_vm();
    let answered = AtomicBool::new(false);
    thread::scope(|scope| {
        let stop = scope.spawn(|| {
            let bases = b.front_end.stop().unwrap();
            answered.store(true, Ordering::SeqCst);
            bases
        });
        b_alone_waits(&vhost, &a, &answered);
        vhost.answer();
        let bases = stop.join().unwrap();
        assert_eq!(bases.len(), form.queues());
        for (load, base) in b.loads.drain(..).zip(bases) {
            let (summary, mut queues) = load.abandon().unwrap();
            assert_eq!(summary.errors, 0);
            while queues[0].poll().unwrap().is_some() {}
            assert_eq!(base, queues[0].base(), "everything fetched was completed");
        }
    });
    assert_eq!(vhost.sessions("b")[0]["state"], "suspended");
    a.end();
}

/// So does a reset of the device, for a front end that wants to know when it is complete.
fn a_reset_that_takes_long_holds_up_nobody(form: Form) {
    const RESET_DEVICE: u32 = 34;
    const VERSION_NEED_REPLY: u32 = 1 | 1 << 3;
    let vhost = form.start();
    let a = vhost.neighbour();
    let mut b = vhost.hung_vm();
    let mut raw = b.front_end.raw().unwrap();
    let answered = AtomicBool::new(false);
    thread::scope(|scope| {
        let reset = scope.spawn(|| {
            raw.send_message(RESET_DEVICE, VERSION_NEED_REPLY, &[], &[]).unwrap();
            let answer = raw.receive().unwrap();
            answered.store(true, Ordering::SeqCst);
            (answer.request, answer.value())
        });
        b_alone_waits(&vhost, &a, &answered);
        vhost.answer();
        assert_eq!(reset.join().unwrap(), (RESET_DEVICE, Some(0)));
        for load in b.loads.drain(..) {
            let (summary, _) = load.abandon().unwrap();
            assert_eq!(summary.errors, 0);
        }
    });
    assert_eq!(vhost.sessions("b")[0]["state"], "suspended");
    a.end();
}

/// A front end that waits too long for its I/O loses its connection, which costs no data; a wrong
/// answer would.
fn a_drain_is_waited_for_no_longer_than_the_limit(form: Form) {
    let vhost = form.start_as(form.launch().args(&["--drain-limit", "1"]));
    let mut b = vhost.hung_vm();
    b.front_end.stop().expect_err("the connection ends without an answer");
    wait_until("B is gone", || vhost.sessions("b")[0]["state"] == "closed");
    vhost.wait_for_log("I/O still in flight after 1 s; closing the connection");
    b.loads.drain(..).for_each(|load| drop(load.abandon().unwrap()));
    vhost.answer();
    wait_until("its I/O has completed", || vhost.sessions("b").is_empty());
}

fn delete_answers_whatever_the_front_end_does(form: Form) {
    let vhost = form.start();
    let a = vhost.neighbour();
    let socket = vhost.malloc_controller("b", "MB");
    let delete = |params: Value| vhost.rpc("vhost_delete_controller", params);
    let b = vhost.vm(&socket);

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
    let socket = vhost.controller_on("b", "MB");
    let b = vhost.vm(&socket);
    b.goes_on();
    assert_eq!(delete(json!({"ctrlr": "b", "force": true})), Ok(json!(true)));
    b.kill();

    // The client gives up: so does the delete.
    let socket = vhost.controller_on("b", "MB");
    let b = vhost.vm(&socket);
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
fn sixty_rounds_of_create_and_delete_against_a_client_that_connects(form: Form) {
    let vhost = form.start();
    let a = vhost.neighbour();
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
            vhost.controller_on("b", "N");
            let seen = connections.load(Ordering::Relaxed);
            wait_until("a connection", || connections.load(Ordering::Relaxed) > seen);
            assert_eq!(vhost.ok("vhost_delete_controller", json!({"ctrlr": "b"})), json!(true));
        }
        end.store(true, Ordering::Relaxed);
    });
    a.goes_on();
    a.end();
}

fn memory_and_call_fds_change_under_load(form: Form) {
    let vhost = form.start();
    let mut a = vhost.neighbour();
    let fds = vhost.fds();
    let more = GuestRam::with(&[2 << 20, 2 << 20], 1 << 32, front_end::Backing::Pages).unwrap();
    for round in 0..100 {
        let mut table = a.ram.table();
        table.extend(more.table().into_iter().take(round % 3));
        a.front_end.set_memory_table(&table).unwrap();
        let queue = round % form.queues();
        a.front_end.change_call_fd(queue).unwrap();
        a.loads[queue].wait_for(20).unwrap();
    }
    a.front_end.set_memory_table(&a.ram.table()).unwrap();
    a.goes_on();
    wait_until("every fd is given back", || vhost.fds() == fds);
    a.end();
}

fn removing_and_resizing_a_disk_disturbs_nobody_else(form: Form) {
    let vhost = form.start();
    let a = vhost.neighbour();
    let b = vhost.vm(&vhost.malloc_controller("b", "MB"));
    b.goes_on();
    assert_eq!(vhost.ok("bdev_malloc_delete", json!({"name": "MB"})), json!(true));
    let answer = vhost.ok("vhost_get_controller_stats", json!({"name": "b"}));
    assert_eq!(answer[0]["backend_specific"]["block"]["bdev"], Value::Null);
    b.goes_on(); // with errors, and without a hang
    for load in b.loads {
        let (summary, _) = load.stop().unwrap();
        assert!(summary.errors > 0 && summary.mismatches == 0 && summary.outstanding == 0);
    }
    vhost.ok("vhost_delete_controller", json!({"ctrlr": "b", "force": true}));

    vhost.ok("bdev_null_create", json!({"name": "N", "num_blocks": 2048, "block_size": 512}));
    let socket = vhost.controller_on("n", "N");
    let ram = GuestRam::new(&[16 << 20]).unwrap();
    let mut n = form.connect(&socket, &ram);
    let mut channel = n.open_backend_channel().unwrap();
    n.start_any(form.queues(), QueueOptions::default()).unwrap();
    assert_eq!(n.config().unwrap().capacity, 2048);
    vhost.ok("bdev_null_resize", json!({"name": "N", "new_size": 2}));
    assert_eq!(channel.receive().unwrap().request, 2, "CONFIG_CHANGE");
    assert_eq!(n.config().unwrap().capacity, 4096);
    a.goes_on();
    a.end();
}

/// A process with I/O that never completes still ends.
fn sigterm_ends_with_io_that_never_completes(form: Form) {
    let mut vhost = form.start();
    let socket = vhost.socket("b");
    let b = vhost.hung_vm();
    vhost.signal("TERM");
    assert_eq!(vhost.process.wait(), Some(0));
    assert!(!socket.exists() && !vhost.rpc_socket().exists());
    b.kill();
}
