//! Requests of every kind, over every kind of ring.

use std::os::unix::fs::FileExt;

use front_end::descriptor::{Descriptor, NEXT, WRITE};
use front_end::features::{EVENT_IDX, INDIRECT_DESC};
use front_end::request::{STATUS_IOERR, STATUS_UNSUPP, range};
use front_end::{FrontEnd, GuestRam, Options, Queue, QueueOptions, Request, STATUS_OK, Segment};

use crate::fixture::Daemon;

fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let byte = |i: u64| (i.wrapping_mul(0x9e37_79b9).wrapping_add(seed) >> 7 & 0xff) as u8;
    (0..len as u64).map(byte).collect()
}

fn read_back(ram: &GuestRam, segment: Segment) -> Vec<u8> {
    let mut bytes = vec![0; segment.len as usize];
    ram.read(segment.gpa, &mut bytes).unwrap();
    bytes
}

/// Writes, reads back, flushes, and looks into the file behind the disk.
fn writes_and_reads(features: u64, indirect: bool) {
    let daemon = Daemon::start(1);
    let ram = GuestRam::new(&[16 << 20, 16 << 20]).unwrap();
    let options =
        Options { features: Options::default().features & features, ..Options::default() };
    let mut front_end = daemon.connect(&ram, options);
    let wanted = QueueOptions { size: 16, indirect, ..QueueOptions::default() };
    let queue = &mut front_end.start_new(1, wanted).unwrap()[0];

    // More requests than the ring has room for, so that its indices wrap round many times.
    for i in 0..100 {
        let parts = [ram.alloc(4096, 4096).unwrap(), ram.alloc(8192, 512).unwrap()];
        let bytes = pattern(i, 12288);
        ram.write(parts[0].gpa, &bytes[..4096]).unwrap();
        ram.write(parts[1].gpa, &bytes[4096..]).unwrap();
        let done = queue.run(&Request::write(i * 24, &parts)).unwrap();
        assert_eq!((done.status, done.used_len), (STATUS_OK, 1));
        let whole = [ram.alloc(12288, 4096).unwrap()];
        let done = queue.run(&Request::read(i * 24, &whole)).unwrap();
        assert_eq!((done.status, done.used_len), (STATUS_OK, 12288 + 1));
        assert!(read_back(&ram, whole[0]) == bytes, "round {i}");
    }
    assert_eq!(queue.run(&Request::flush()).unwrap().status, STATUS_OK);
    let mut bytes = vec![0; 12288];
    std::fs::File::open(daemon.disk()).unwrap().read_exact_at(&mut bytes, 99 * 12288).unwrap();
    assert!(bytes == pattern(99, 12288));
    assert_eq!(front_end.stop().unwrap(), [201], "the whole ring has been seen");
}

#[test]
fn direct_descriptors() {
    writes_and_reads(!(INDIRECT_DESC | EVENT_IDX), false);
}

#[test]
fn indirect_tables() {
    writes_and_reads(!EVENT_IDX, true);
}

#[test]
fn event_idx() {
    writes_and_reads(!0, false);
}

#[test]
fn indirect_tables_with_event_idx() {
    writes_and_reads(!0, true);
}

/// Spins for a hundred completions and returns how many calls came meanwhile.
fn calls_while_spinning(features: u64) -> u64 {
    let daemon = Daemon::start(1);
    let ram = GuestRam::new(&[16 << 20]).unwrap();
    let options = Options { features, ..Options::default() };
    let mut front_end = daemon.connect(&ram, options);
    let queue = &mut front_end.start_new(1, QueueOptions::default()).unwrap()[0];
    for _ in 0..100 {
        queue.submit(&Request::flush()).unwrap();
        queue.kick().unwrap();
        while queue.poll().unwrap().is_none() {
            std::thread::yield_now();
        }
    }
    // Stopped, the device calls no more.
    front_end.stop().unwrap();
    queue.ring().call_fd().read().unwrap_or(0)
}

#[test]
fn nobody_calls_a_driver_that_does_not_wait() {
    use front_end::features::DRIVER_FEATURES;
    // The daemon calls once when it gets the fd, and once before it looks at what is wanted.
    assert!(calls_while_spinning(DRIVER_FEATURES) <= 2);
    assert!(calls_while_spinning(DRIVER_FEATURES & !EVENT_IDX) <= 2);
}

#[test]
fn a_full_queue_takes_no_more_until_something_completes() {
    let daemon = Daemon::start(1);
    let ram = GuestRam::new(&[16 << 20]).unwrap();
    let mut front_end = daemon.connect(&ram, Options::default());
    let wanted = QueueOptions { size: 8, ..QueueOptions::default() };
    let queue = &mut front_end.start_new(1, wanted).unwrap()[0];
    let data = [ram.alloc(4096, 4096).unwrap()];
    // Three descriptors each.
    let tags = [0, 8].map(|sector| queue.submit(&Request::read(sector, &data)).unwrap());
    assert!(matches!(queue.submit(&Request::read(16, &data)), Err(front_end::Error::Full)));
    queue.kick().unwrap();
    let mut done = [queue.wait().unwrap().tag, queue.wait().unwrap().tag];
    done.sort();
    let mut tags = tags;
    tags.sort();
    assert_eq!(done, tags);
    assert_eq!(queue.in_flight(), 0);
    assert_eq!(queue.run(&Request::read(16, &data)).unwrap().status, STATUS_OK);
}

#[test]
fn four_queues_serve_one_disk() {
    let daemon = Daemon::start(4);
    let ram = GuestRam::new(&[16 << 20]).unwrap();
    let mut front_end = daemon.connect(&ram, Options::default());
    assert_eq!(front_end.queues_offered(), 4);
    assert_eq!(front_end.config().unwrap().num_queues, 4);
    let mut queues = front_end.start_new(4, QueueOptions::default()).unwrap();
    let data = [ram.alloc(4096, 4096).unwrap()];
    for (i, queue) in (0..).zip(&mut queues) {
        ram.write(data[0].gpa, &pattern(i, 4096)).unwrap();
        assert_eq!(queue.run(&Request::write(i * 8, &data)).unwrap().status, STATUS_OK);
    }
    for (i, queue) in (0..).zip(queues.iter_mut().rev()) {
        assert_eq!(queue.run(&Request::read(i * 8, &data)).unwrap().status, STATUS_OK);
        assert!(read_back(&ram, data[0]) == pattern(i, 4096));
    }
    assert_eq!(front_end.stop().unwrap(), [2; 4]);
}

fn one_queue(daemon: &Daemon, ram: &std::sync::Arc<GuestRam>) -> (FrontEnd, Queue) {
    let mut front_end = daemon.connect(ram, Options::default());
    let queue = front_end.start_new(1, QueueOptions::default()).unwrap().remove(0);
    (front_end, queue)
}

#[test]
fn other_requests() {
    let daemon = Daemon::start(1);
    let ram = GuestRam::new(&[16 << 20]).unwrap();
    let (mut front_end, mut queue) = one_queue(&daemon, &ram);
    let config = front_end.config().unwrap();
    assert_eq!((config.capacity, config.blk_size), (64 << 11, 512));
    assert!(config.max_write_zeroes_sectors > 0 && config.max_discard_sectors > 0, "{config:?}");

    let id = [ram.alloc(20, 4).unwrap()];
    assert_eq!(queue.run(&Request::id(&id)).unwrap().status, STATUS_OK);
    assert!(read_back(&ram, id[0]).starts_with(b"vhost_user_blk"));

    let data = [ram.alloc(4096, 4096).unwrap()];
    ram.write(data[0].gpa, &pattern(1, 4096)).unwrap();
    assert_eq!(queue.run(&Request::write(0, &data)).unwrap().status, STATUS_OK);
    let ranges = [ram.alloc(16, 16).unwrap()];
    ram.write(ranges[0].gpa, &range(2, 3, 0)).unwrap();
    assert_eq!(queue.run(&Request::write_zeroes(&ranges)).unwrap().status, STATUS_OK);
    assert_eq!(queue.run(&Request::read(0, &data)).unwrap().status, STATUS_OK);
    let mut expected = pattern(1, 4096);
    expected[1024..2560].fill(0);
    assert!(read_back(&ram, data[0]) == expected);
    assert_eq!(queue.run(&Request::discard(&ranges)).unwrap().status, STATUS_OK);

    let past_the_end = Request::read(config.capacity, &data);
    assert_eq!(queue.run(&past_the_end).unwrap().status, STATUS_IOERR);
    let unknown = Request { kind: 77, ..Request::flush() };
    assert_eq!(queue.run(&unknown).unwrap().status, STATUS_UNSUPP);
}

#[test]
fn a_buffer_may_cross_regions() {
    let daemon = Daemon::start(1);
    let ram = GuestRam::new(&[16 << 20, 16 << 20]).unwrap();
    let (_front_end, mut queue) = one_queue(&daemon, &ram);
    let crossing = [Segment::new(ram.boundary(0) - 1024, 4096)];
    let plain = [ram.alloc(4096, 4096).unwrap()];
    ram.write(crossing[0].gpa, &pattern(3, 4096)).unwrap();
    assert_eq!(queue.run(&Request::write(8, &crossing)).unwrap().status, STATUS_OK);
    assert_eq!(queue.run(&Request::read(8, &plain)).unwrap().status, STATUS_OK);
    assert!(read_back(&ram, plain[0]) == pattern(3, 4096));
}

#[test]
fn a_chain_made_by_hand_works_and_is_no_request_of_the_driver_s() {
    let daemon = Daemon::start(1);
    let ram = GuestRam::new(&[16 << 20]).unwrap();
    let (_front_end, mut queue) = one_queue(&daemon, &ram);
    let [header, id, status] = [16, 20, 1].map(|len| ram.alloc(len, 16).unwrap());
    ram.write(header.gpa, &8_u64.to_le_bytes()).unwrap();
    let descriptors = queue.take_descriptors(3).unwrap();
    let parts = [(header, NEXT), (id, 3), (status, WRITE)];
    for (i, (segment, flags)) in parts.into_iter().enumerate() {
        let next = descriptors.get(i + 1).copied().unwrap_or(0);
        let Segment { gpa: addr, len } = segment;
        let descriptor = Descriptor { addr, len, flags, next };
        queue.ring().set_descriptor(descriptors[i], descriptor);
    }
    queue.make_available(descriptors[0]);
    queue.kick_anyway().unwrap();
    match queue.wait() {
        Err(front_end::Error::NotHeld { id }) => assert_eq!(id, u32::from(descriptors[0])),
        other => panic!("{other:?}"),
    }
    assert!(read_back(&ram, id).starts_with(b"vhost_user_blk"));
    assert_eq!(queue.run(&Request::flush()).unwrap().status, STATUS_OK, "the driver goes on");
}
