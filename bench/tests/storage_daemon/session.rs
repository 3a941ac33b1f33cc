//! Stop, start, reconnection, and changes under a running device.

use std::time::Duration;

use front_end::{Backing, GuestRam, Options, QueueOptions, RawConnection, Request, STATUS_OK};

use crate::fixture::Daemon;

#[test]
fn stopped_rings_go_on_where_they_were() {
    let daemon = Daemon::start(2);
    let ram = GuestRam::new(&[16 << 20]).unwrap();
    let mut front_end = daemon.connect(&ram, Options::default());
    let mut queues = front_end.start_new(2, QueueOptions::default()).unwrap();
    let data = [ram.alloc(4096, 4096).unwrap()];
    for _ in 0..5 {
        assert_eq!(queues[0].run(&Request::read(0, &data)).unwrap().status, STATUS_OK);
    }
    let bases = front_end.stop().unwrap();
    assert_eq!(bases, [5, 0]);
    // Nobody serves a stopped ring, but what is in it is served after the start.
    queues[1].submit(&Request::read(8, &data)).unwrap();
    let rings = queues.iter().map(|queue| queue.ring().clone()).zip(bases).collect();
    front_end.start(rings).unwrap();
    queues[1].kick_anyway().unwrap();
    assert_eq!(queues[1].wait().unwrap().status, STATUS_OK);
    assert_eq!(queues[0].run(&Request::read(0, &data)).unwrap().status, STATUS_OK);
    assert_eq!(front_end.disconnect().unwrap(), [6, 1]);
}

#[test]
fn a_killed_connection_is_followed_by_another() {
    let daemon = Daemon::start(1);
    let ram = GuestRam::new(&[16 << 20]).unwrap();
    let mut front_end = daemon.connect(&ram, Options::default());
    let mut queues = front_end.start_new(1, QueueOptions::default()).unwrap();
    assert_eq!(queues[0].run(&Request::flush()).unwrap().status, STATUS_OK);
    front_end.kill();
    let mut front_end = daemon.connect(&ram, Options::default());
    let mut queues = front_end.start_new(1, QueueOptions::default()).unwrap();
    assert_eq!(queues[0].run(&Request::flush()).unwrap().status, STATUS_OK);
    front_end.reconnect().unwrap();
    assert_eq!(queues[0].run(&Request::flush()).unwrap().status, STATUS_OK);
    assert_eq!(front_end.stop().unwrap(), [2]);
    assert_eq!(queues[0].ring().used_index(), 2, "nothing was done twice");
}

#[test]
fn an_in_flight_area_that_is_not_offered_is_an_error() {
    let daemon = Daemon::start(1);
    let ram = GuestRam::new(&[16 << 20]).unwrap();
    let options = Options { inflight: true, ..Options::default() };
    let mut front_end = daemon.connect(&ram, options);
    let error = front_end.start_new(1, QueueOptions::default()).unwrap_err();
    assert!(matches!(error, front_end::Error::NotOffered("an in-flight area")), "{error}");
}

#[test]
fn a_guest_that_boots_again_begins_with_empty_rings() {
    let daemon = Daemon::start(1);
    let ram = GuestRam::new(&[16 << 20]).unwrap();
    let mut front_end = daemon.connect(&ram, Options::default());
    let mut queues = front_end.start_new(1, QueueOptions::default()).unwrap();
    assert_eq!(queues[0].run(&Request::flush()).unwrap().status, STATUS_OK);
    front_end.stop().unwrap();
    // A request that nobody serves any more is forgotten.
    queues[0].submit(&Request::flush()).unwrap();
    queues[0].reset();
    assert_eq!(queues[0].in_flight(), 0);
    front_end.start(vec![(queues[0].ring().clone(), 0)]).unwrap();
    assert_eq!(queues[0].run(&Request::flush()).unwrap().status, STATUS_OK);
    assert_eq!(front_end.stop().unwrap(), [1]);
}

#[test]
fn a_new_memory_table_and_a_new_call_fd_under_a_running_ring() {
    let daemon = Daemon::start(1);
    let ram = GuestRam::new(&[16 << 20]).unwrap();
    let mut front_end = daemon.connect(&ram, Options::default());
    let mut queues = front_end.start_new(1, QueueOptions::default()).unwrap();
    let more = GuestRam::with(&[16 << 20], 1 << 32, Backing::Pages).unwrap();
    front_end.set_memory_table(&[ram.table(), more.table()].concat()).unwrap();
    let far = [more.alloc(4096, 4096).unwrap()];
    more.write(far[0].gpa, &[0xff; 4096]).unwrap();
    assert_eq!(queues[0].run(&Request::read(0, &far)).unwrap().status, STATUS_OK);
    let mut bytes = [0xff; 4096];
    more.read(far[0].gpa, &mut bytes).unwrap();
    assert_eq!(bytes, [0; 4096], "the new memory was read into");
    for _ in 0..10 {
        front_end.change_call_fd(0).unwrap();
        assert_eq!(queues[0].run(&Request::read(0, &far)).unwrap().status, STATUS_OK);
    }
}

#[test]
fn a_raw_connection_says_and_hears_what_the_protocol_says() {
    let daemon = Daemon::start(1);
    let mut raw = RawConnection::connect(&daemon.socket()).unwrap();
    // SET_OWNER, then GET_FEATURES.
    raw.send_message(3, front_end::raw::VERSION, &[], &[]).unwrap();
    raw.send_message(1, front_end::raw::VERSION, &[], &[]).unwrap();
    let answer = raw.receive().unwrap();
    assert_eq!((answer.request, answer.flags & 7), (1, 5));
    assert!(answer.value().unwrap() & front_end::features::VERSION_1 != 0);
    // A request that does not exist ends the connection.
    raw.send_message(999, front_end::raw::VERSION, &[], &[]).unwrap();
    raw.wait_for_close().unwrap();
}

#[test]
fn nobody_at_the_path_is_named_in_the_error() {
    let ram = GuestRam::new(&[1 << 20]).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("nobody");
    let error = front_end::FrontEnd::connect(&path, ram, Options::default()).unwrap_err();
    assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
}

#[test]
fn a_back_end_that_never_answers_is_given_up() {
    let ram = GuestRam::new(&[1 << 20]).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("silent");
    // Connections are accepted by the backlog, and nobody reads.
    let _listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let options = Options { limit: Duration::from_millis(20), ..Options::default() };
    match front_end::FrontEnd::connect(&path, ram, options) {
        Err(front_end::Error::NoAnswer { message: "GET_FEATURES", .. }) => {}
        other => panic!("{other:?}"),
    }
}

#[test]
fn pages_that_the_device_writes_are_logged() {
    let daemon = Daemon::start(1);
    let ram = GuestRam::new(&[16 << 20]).unwrap();
    let mut front_end = daemon.connect(&ram, Options::default());
    let mut queues = front_end.start_new(1, QueueOptions::default()).unwrap();
    // Memory of the size of a page is as good a log as any: a bit for each page of 128 MiB.
    let log = GuestRam::new(&[4096]).unwrap();
    front_end.start_log(log.file(0), 4096).unwrap();
    let data = [ram.alloc(4096, 4096).unwrap()];
    assert_eq!(queues[0].run(&Request::read(0, &data)).unwrap().status, STATUS_OK);
    let logged = |gpa: u64| {
        let mut byte = [0];
        log.read(gpa >> 15, &mut byte).unwrap();
        byte[0] >> (gpa >> 12 & 7) & 1 == 1
    };
    let used_ring = queues[0].ring().addrs()[2];
    assert!(logged(data[0].gpa) && logged(used_ring));
    assert!(!logged(data[0].gpa + 4096));
    front_end.stop_log().unwrap();
    let data = [ram.alloc(4096, 4096).unwrap()];
    assert_eq!(queues[0].run(&Request::read(0, &data)).unwrap().status, STATUS_OK);
    assert!(!logged(data[0].gpa));
}

#[test]
fn the_back_end_may_have_a_channel_of_its_own() {
    let daemon = Daemon::start(1);
    let ram = GuestRam::new(&[16 << 20]).unwrap();
    let mut front_end = daemon.connect(&ram, Options::default());
    let mut channel = front_end.open_backend_channel().unwrap();
    front_end.kill();
    channel.wait_for_close().unwrap();
}
