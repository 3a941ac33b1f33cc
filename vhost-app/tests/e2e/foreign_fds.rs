//! Fds whose close blocks, incomplete messages, unread answers and sockets of other processes: only
//! the front end or client that sends them is delayed.
//!
//! Each test sends something that would block the thread of `vhost` that closes it, and then checks
//! that the event thread, the DPDK thread and the control thread still serve others.

use std::fs;
use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use front_end::{
    FrontEnd, GuestRam, Lingering, Options, QueueOptions, RawConnection, Request, STATUS_OK,
    UnresponsiveSocket,
};
use rustix::event::{EventfdFlags, eventfd};
use serde_json::{Value, json};

use crate::support::harness::{Launch, Vhost, wait_until};

const GET_FEATURES: u32 = 1;
const SET_FEATURES: u32 = 2;
const SET_OWNER: u32 = 3;
const SET_MEM_TABLE: u32 = 5;
const SET_VRING_CALL: u32 = 13;
const SET_BACKEND_REQ_FD: u32 = 21;
const GET_INFLIGHT_FD: u32 = 31;
const VERSION: u32 = 1;

/// A target with controllers "a" and "b"; the tests attack "b".
fn target() -> Vhost {
    let vhost = Vhost::start(&[]);
    for name in ["a", "b"] {
        make(&vhost, name);
    }
    serves(&vhost, "a");
    wait_until("a's front end is closed", || has_closed_all(&vhost, "a"));
    vhost
}

/// Of the controller's fds, only its listening socket is left.
fn has_closed_all(vhost: &Vhost, name: &str) -> bool {
    fds_of(vhost, name) == json!({"open": 1, "closing": 0, "stuck": false})
}

fn make(vhost: &Vhost, name: &str) {
    vhost.malloc(&format!("M{name}"));
    vhost.ok("vhost_create_blk_controller", json!({"ctrlr": name, "dev_name": format!("M{name}")}));
}

/// The whole life of a front end: handshake, I/O, GET_VRING_BASE, disconnection.
fn serves(vhost: &Vhost, name: &str) {
    let ram = GuestRam::new(&[4 << 20]).unwrap();
    let mut front_end = FrontEnd::connect(&vhost.socket(name), ram, Options::default()).unwrap();
    let mut queue = front_end.start_new(1, QueueOptions::default()).unwrap().remove(0);
    let buffer = queue.ring().ram().alloc(4096, 4096).unwrap();
    assert_eq!(queue.run(&Request::read(0, &[buffer])).unwrap().status, STATUS_OK);
    front_end.stop().unwrap();
    front_end.disconnect().unwrap();
}

/// All threads of the target serve others than "b".
fn others_are_served(vhost: &Vhost) {
    serves(vhost, "a");
    make(vhost, "c");
    serves(vhost, "c");
    vhost.ok("vhost_delete_controller", json!({"ctrlr": "c", "force": true}));
    vhost.ok("bdev_malloc_delete", json!({"name": "Mc"}));
}

fn fds_of(vhost: &Vhost, name: &str) -> Value {
    vhost.ok("vhost_get_controller_stats", json!({"name": name}))[0]["fds"].clone()
}

fn message(request: u32, payload: &[u8]) -> Vec<u8> {
    let header = [request, VERSION, payload.len().try_into().unwrap()];
    let mut bytes: Vec<u8> = header.iter().flat_map(|word| word.to_le_bytes()).collect();
    bytes.extend(payload);
    bytes
}

/// Sends a lingering socket to "b" with `send`, and checks that its close delays nothing else, that
/// it is shown to the operator, that "b" accepts no front end until it ends, and that all fds are
/// closed then. `prepare` runs before; `after` checks how the connection continues.
fn nobody_waits_for<T>(
    prepare: impl FnOnce(&Vhost) -> T,
    send: impl FnOnce(&mut T, BorrowedFd<'_>),
    after: impl FnOnce(T),
) {
    let vhost = target();
    let fds = vhost.fds();
    let mut lingering = Lingering::new().unwrap();
    let mut front_end = prepare(&vhost);
    // Only the last reference lingers: it has to be the one that was sent.
    stopped(&vhost, || {
        send(&mut front_end, lingering.fd());
        lingering.is_sent();
    });
    after(front_end);
    others_are_served(&vhost);
    wait_until("b is stuck", || fds_of(&vhost, "b")["stuck"] == json!(true));
    vhost.wait_for_log("controller b: a close takes long");
    raw(&vhost).wait_for_close().unwrap();
    others_are_served(&vhost);
    drop(lingering);
    wait_until("all is closed", || has_closed_all(&vhost, "b"));
    wait_until("the fds are back", || vhost.fds() == fds);
    serves(&vhost, "b");
    assert_eq!(vhost.stop(), 0);
}

/// Runs `meanwhile` while the process is stopped.
fn stopped(vhost: &Vhost, meanwhile: impl FnOnce()) {
    vhost.signal("STOP");
    wait_until("it is stopped", || vhost.is_stopped());
    meanwhile();
    vhost.signal("CONT");
}

fn raw(vhost: &Vhost) -> RawConnection {
    RawConnection::connect(&vhost.socket("b")).unwrap()
}

fn ends(mut front_end: RawConnection) {
    front_end.wait_for_close().unwrap();
}

#[test]
fn an_fd_with_the_payload_holds_up_nobody() {
    let whole = message(SET_FEATURES, &[0; 8]);
    let send = |front_end: &mut RawConnection, fd: BorrowedFd<'_>| {
        front_end.send(&whole[..12], &[]).unwrap();
        front_end.send(&whole[12..], &[fd]).unwrap();
    };
    nobody_waits_for(raw, send, |mut front_end| {
        // The message takes no fd.
        front_end.send(&message(GET_FEATURES, &[]), &[]).unwrap();
        front_end.receive().unwrap();
    });
}

#[test]
fn an_fd_beyond_those_of_the_longest_message_holds_up_nobody() {
    let memory = tempfile::tempfile_in("/dev/shm").unwrap();
    let send = |front_end: &mut RawConnection, fd: BorrowedFd<'_>| {
        let mut all = vec![memory.as_fd(); 8];
        all.push(fd);
        front_end.send(&message(SET_MEM_TABLE, &[0; 264]), &all).unwrap();
    };
    nobody_waits_for(raw, send, ends);
}

#[test]
fn an_fd_in_a_message_that_is_never_read_holds_up_nobody() {
    let send = |front_end: &mut RawConnection, fd: BorrowedFd<'_>| {
        front_end.send(&message(4242, &[]), &[]).unwrap();
        front_end.send(&message(SET_OWNER, &[]), &[fd]).unwrap();
    };
    nobody_waits_for(raw, send, ends);
}

#[test]
fn an_fd_on_a_connection_that_is_refused_holds_up_nobody() {
    let prepare = |vhost: &Vhost| {
        let mut front_ends: Vec<RawConnection> = (0..16).map(|_| raw(vhost)).collect();
        for front_end in &mut front_ends {
            front_end.send(&message(GET_FEATURES, &[]), &[]).unwrap();
            front_end.receive().unwrap();
        }
        (front_ends, vhost.socket("b"), None)
    };
    type Prepared = (Vec<RawConnection>, PathBuf, Option<RawConnection>);
    let send = |(_, socket, refused): &mut Prepared, fd: BorrowedFd<'_>| {
        let mut front_end = RawConnection::connect(socket).unwrap();
        front_end.send(&message(SET_OWNER, &[]), &[fd]).unwrap();
        *refused = Some(front_end);
    };
    nobody_waits_for(prepare, send, |(_, _, refused)| ends(refused.unwrap()));
}

/// As a call fd, and as a backend channel.
#[test]
fn an_fd_that_is_not_what_its_message_wants_holds_up_nobody() {
    for request in [SET_VRING_CALL, SET_BACKEND_REQ_FD] {
        let payload = if request == SET_VRING_CALL { vec![0; 8] } else { vec![] };
        let send = |front_end: &mut RawConnection, fd: BorrowedFd<'_>| {
            front_end.send(&message(request, &payload), &[fd]).unwrap();
        };
        nobody_waits_for(raw, send, ends);
    }
}

/// Connections that were not accepted when their controller is deleted: some of these sixty are in
/// the backlog then.
#[test]
fn fds_in_the_backlog_of_a_deleted_controller_hold_up_nobody() {
    let vhost = target();
    let fds = vhost.fds();
    let mut lingering: Vec<Lingering> = (0..60).map(|_| Lingering::new().unwrap()).collect();
    let mut rpc = vhost.connect();
    let mut front_ends: Vec<RawConnection> = vec![];
    stopped(&vhost, || {
        for socket in &mut lingering {
            let mut front_end = raw(&vhost);
            front_end.send(&message(SET_OWNER, &[]), &[socket.fd()]).unwrap();
            socket.is_sent();
            front_ends.push(front_end);
        }
        rpc.send("vhost_delete_controller", json!({"ctrlr": "b", "force": true, "timeout_ms": 1}));
    });
    assert_eq!(rpc.receive().1, Ok(json!(true)));
    drop(rpc);
    others_are_served(&vhost);
    for front_end in &mut front_ends {
        front_end.wait_for_close().unwrap();
    }
    // A controller of the same name continues the account of the deleted one.
    vhost.ok("vhost_create_blk_controller", json!({"ctrlr": "b", "dev_name": "Mb"}));
    assert!(fds_of(&vhost, "b")["closing"].as_u64().unwrap() > 0);
    drop(lingering);
    wait_until("the fds are back", || vhost.fds() == fds);
    serves(&vhost, "b");
    assert_eq!(vhost.stop(), 0);
}

/// The end of the process does not wait for a close, either.
#[test]
fn the_process_ends_while_a_close_hangs() {
    let vhost = target();
    let mut lingering = Lingering::new().unwrap();
    let mut front_end = raw(&vhost);
    stopped(&vhost, || {
        front_end.send(&message(SET_OWNER, &[]), &[lingering.fd()]).unwrap();
        lingering.is_sent();
    });
    drop(front_end);
    wait_until("b is stuck", || fds_of(&vhost, "b")["stuck"] == json!(true));
    assert_eq!(vhost.stop(), 0);
}

#[test]
fn half_a_message_waits_for_its_rest_and_holds_up_nobody() {
    let vhost = target();
    let whole = message(SET_FEATURES, &[0; 8]);
    let mut halves: Vec<RawConnection> = (0..16).map(|_| raw(&vhost)).collect();
    for (n, front_end) in halves.iter_mut().enumerate() {
        front_end.send(&whole[..1 + n], &[]).unwrap();
    }
    for _ in 0..20 {
        serves(&vhost, "a");
    }
    for (n, front_end) in halves.iter_mut().enumerate() {
        front_end.send(&whole[1 + n..], &[]).unwrap();
        front_end.send(&message(GET_FEATURES, &[]), &[]).unwrap();
        assert_eq!(front_end.receive().unwrap().request, GET_FEATURES);
    }
    assert_eq!(vhost.stop(), 0);
}

#[test]
fn a_front_end_that_does_not_read_its_answers_holds_up_nobody_and_loses_none() {
    let vhost = target();
    let mut stream = UnixStream::connect(vhost.socket("b")).unwrap();
    stream.set_nonblocking(true).unwrap();
    let question = message(GET_FEATURES, &[]);
    let mut sent = 0;
    // Until neither direction has any room left.
    for _ in 0..20 {
        while let Ok(n) = stream.write(&question) {
            assert_eq!(n, question.len());
            sent += 1;
        }
        serves(&vhost, "a");
    }
    stream.set_nonblocking(false).unwrap();
    let mut first = [0; 20];
    stream.read_exact(&mut first).unwrap();
    for _ in 1..sent {
        let mut answer = [0; 20];
        stream.read_exact(&mut answer).unwrap();
        assert_eq!(answer, first);
    }
    assert_eq!(vhost.stop(), 0);
}

/// Even if several replies are read together.
#[test]
fn an_fd_goes_with_its_own_answer() {
    let vhost = target();
    let mut front_end = raw(&vhost);
    let question = message(GET_FEATURES, &[]);
    let mut area = [0; 24];
    (area[16], area[18]) = (1, 64);
    for _ in 0..20 {
        let mut questions = question.repeat(40);
        questions.extend(message(GET_INFLIGHT_FD, &area));
        front_end.send(&questions, &[]).unwrap();
        for _ in 0..40 {
            let answer = front_end.receive().unwrap();
            assert_eq!((answer.request, answer.fds.len()), (GET_FEATURES, 0));
        }
        let answer = front_end.receive().unwrap();
        assert_eq!((answer.request, answer.fds.len()), (GET_INFLIGHT_FD, 1));
    }
    assert_eq!(vhost.stop(), 0);
}

/// Only started rings have an io_uring for their call fd, and their number is limited.
#[test]
fn call_fds_of_rings_that_are_not_started_cost_no_io_uring() {
    let vhost = target();
    let io_urings = || {
        let fds = fs::read_dir(format!("/proc/{}/fd", vhost.pid())).unwrap().flatten();
        let links = fds.filter_map(|fd| fs::read_link(fd.path()).ok());
        links.filter(|link| link.as_os_str() == "anon_inode:[io_uring]").count()
    };
    let before = io_urings();
    let eventfd = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
    let mut front_end = raw(&vhost);
    for ring in 0..128_u64 {
        let set = message(SET_VRING_CALL, &ring.to_le_bytes());
        front_end.send(&set, &[eventfd.as_fd()]).unwrap();
    }
    front_end.send(&message(GET_FEATURES, &[]), &[]).unwrap();
    assert_eq!(front_end.receive().unwrap().request, GET_FEATURES);
    assert_eq!(io_urings(), before);
    assert_eq!(vhost.stop(), 0);
}

/// A socket of another process that is stopped and does not accept, with a full backlog.
#[test]
fn a_foreign_socket_is_left_alone_and_holds_up_nobody() {
    let vhost = target();
    let path = vhost.socket("f");
    let _unresponsive = UnresponsiveSocket::bind(&path).unwrap();
    let inode = fs::symlink_metadata(&path).unwrap().ino();
    let create = json!({"ctrlr": "f", "dev_name": "Mb"});
    let refusal = vhost.err("vhost_create_blk_controller", create);
    assert_eq!(refusal.code, -32602);
    others_are_served(&vhost);
    let b = vhost.socket("b");
    // Our socket file was replaced by another process's, which must not be removed.
    fs::remove_file(&b).unwrap();
    fs::write(&b, "somebody else's").unwrap();
    vhost.ok("vhost_delete_controller", json!({"ctrlr": "b"}));
    assert_eq!(fs::read(&b).unwrap(), b"somebody else's");
    assert_eq!(fs::symlink_metadata(&path).unwrap().ino(), inode);
    assert_eq!(vhost.stop(), 0);
}

#[test]
fn a_process_that_is_killed_leaves_nothing_in_the_directory_for_temporary_files() {
    for variable in ["XDG_RUNTIME_DIR", "RUNTIME_DIRECTORY", "TMPDIR"] {
        let dir = tempfile::tempdir().unwrap();
        let launch = Launch::new().env(variable, dir.path().to_str().unwrap());
        let vhost = launch.start();
        make(&vhost, "a");
        serves(&vhost, "a");
        // EAL has a directory of its own there, which the next process reuses.
        let left = fs::read_dir(dir.path()).unwrap().flatten().map(|entry| entry.file_name());
        let left: Vec<_> = left.filter(|name| name != "dpdk").collect();
        assert!(left.is_empty(), "{variable}: {left:?}");
        drop(vhost);
    }
}
