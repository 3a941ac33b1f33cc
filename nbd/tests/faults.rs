//! Servers that violate the protocol, go away or hang: I/O ends well on the next connection, and
//! the server's faults reach no other I/O.
#![expect(clippy::unwrap_used, reason = "a test ends where something fails")]
#![expect(unsafe_code, reason = "submits I/Os")]
#![expect(clippy::cast_possible_truncation, reason = "random numbers")]

mod fake;
mod server;

use std::sync::Arc;
use std::time::Duration;

use bdev::{Bdev, BdevChannel, Channel, Completion, Io, Op, Segment, Status, Submit, Tag};
use bdev_conformance::{Driver, Fixture, Memory, Request, conformance, pattern};
use fake::{Fake, Fault};
use nbd::protocol::transmission::{CAN_MULTI_CONN, SEND_FLUSH, SEND_TRIM, SEND_WRITE_ZEROES};
use nbd::{NbdDisk, NbdOptions};
use server::{Program, Server, options};

const ALL: u16 = SEND_FLUSH | SEND_TRIM | SEND_WRITE_ZEROES;

/// A server whose first connection has this fault.
fn first(fault: Fault) -> Fake {
    Fake::unix(ALL, move |number| if number == 0 { fault } else { Fault::None })
}

fn connect(fake: &Fake) -> Arc<dyn Bdev> {
    NbdDisk::connect(fake.options()).unwrap()
}

/// Faults of a connection, from a random number and a limit.
type Faults = fn(u64, usize) -> Fault;

/// Without FLUSH, as a flush fails after a connection was lost.
const NO_FLUSH: u16 = SEND_TRIM | SEND_WRITE_ZEROES | CAN_MULTI_CONN;

fn script(faults: Faults) -> impl Fn(usize) -> Fault + Send + Sync + 'static {
    move |number| {
        // Longer and longer, so that the longest I/O gets through.
        let random = (number as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 20;
        faults(random, 64 << 10 << (number % 8))
    }
}

fn that_breaks(faults: Faults) -> Fixture {
    let fake = Fake::unix(NO_FLUSH, script(faults));
    Fixture::on(connect(&fake), fake)
}

/// The kernel resets a connection that is closed while requests are unread.
fn that_breaks_over_tcp(faults: Faults) -> Fixture {
    let fake = Fake::tcp(NO_FLUSH, script(faults));
    Fixture::on(connect(&fake), fake)
}

conformance! {
    cut_connections => that_breaks(|random, limit| Fault::CloseAfter(random as usize % limit));
    cut_connections_over_tcp =>
        that_breaks_over_tcp(|random, limit| Fault::CloseAfter(random as usize % limit));
    half_closed_connections =>
        that_breaks(|random, limit| Fault::HalfCloseAfter(random as usize % limit));
    violations => that_breaks(|random, _| {
        let number = (random >> 3) as usize % 300;
        match random % 5 {
            0 => Fault::WrongMagic(number),
            1 => Fault::WrongCookie(number),
            2 => Fault::Twice(number),
            3 => Fault::Stale(number + 1),
            _ => Fault::Longer(number),
        }
    });
    over_tcp => {
        let fake = Fake::tcp(ALL, |_| Fault::None);
        Fixture::on(connect(&fake), fake)
    };
}

/// Each write and read has its own data. A reply with a fault ends the connection, and reaches no
/// other I/O.
#[test]
fn a_violation_ends_the_connection_and_no_io() {
    const COUNT: u64 = 8;
    for number in 0..6 {
        for fault in [
            Fault::WrongMagic(number),
            Fault::WrongCookie(number),
            Fault::Twice(number),
            Fault::Stale(number + 1),
            Fault::Longer(number),
            Fault::Unasked,
        ] {
            let fake = first(fault);
            let disk = connect(&fake);
            let mut driver = Driver::new(&disk, 16);
            for op in [Op::Write, Op::Read] {
                for n in 0..COUNT {
                    let mut memory = Memory::plain(4096);
                    if op == Op::Write {
                        memory.fill(&pattern(n, 4096));
                    }
                    let tag = driver.free_tag().unwrap();
                    let request = Request::rw(op, n * 4096, memory);
                    assert!(matches!(driver.submit(tag, request), Ok(None)));
                }
                let mut ended = 0;
                while ended < COUNT {
                    for (request, status) in driver.visit() {
                        assert_eq!(status, Status::Ok, "{fault:?}");
                        let expected = pattern(request.offset / 4096, 4096);
                        assert_eq!(request.memory.data(), expected, "{fault:?}");
                        ended += 1;
                    }
                }
            }
            assert_eq!(fake.connections(), 2, "{fault:?}");
        }
    }
}

#[test]
fn a_connection_that_closes_after_any_byte_is_made_again() {
    const LAST: usize = 2 * 16 + 512;
    for kind in [Fault::CloseAfter, Fault::HalfCloseAfter] {
        let fake = Fake::unix(ALL, move |number| kind(number + 1));
        let disk = connect(&fake);
        let mut driver = Driver::new(&disk, 4);
        let mut written = 0;
        while fake.connections() <= LAST {
            let data = pattern(written, 512);
            assert_eq!(driver.write(0, &data), Status::Ok);
            assert_eq!(driver.read(0, 512), (data, Status::Ok));
            written += 1;
        }
    }
}

#[test]
fn io_goes_on_with_the_next_server() {
    let Some(mut server) = Server::new(Program::nbdkit_file(&[], &[])) else { return };
    let connected = server.connect("");
    let disk: Arc<dyn Bdev> = Arc::clone(&connected) as _;
    let mut driver = Driver::new(&disk, 16);
    let block = |n: u64| pattern(n, 4096);
    for n in 0..8 {
        assert_eq!(driver.write(n * 4096, &block(n)), Status::Ok);
    }
    server.stop();
    while connected.is_connected() {
        std::thread::yield_now();
    }
    for n in 8..16 {
        let mut memory = Memory::plain(4096);
        memory.fill(&block(n));
        let tag = driver.free_tag().unwrap();
        let write = Request::rw(Op::Write, n * 4096, memory);
        assert!(matches!(driver.submit(tag, write), Ok(None)));
    }
    assert!(driver.visit().is_empty());
    server.start();
    let mut ended = 0;
    while ended < 8 {
        let done = driver.visit();
        assert!(done.iter().all(|(_, status)| *status == Status::Ok));
        ended += done.len();
    }
    assert_eq!(driver.plain(Op::Flush, 0, 0), Status::IoError, "unflushed writes may be lost");
    assert_eq!(driver.plain(Op::Flush, 0, 0), Status::Ok);
    server.stop();
    server.start();
    assert_eq!(driver.plain(Op::Flush, 0, 0), Status::Ok, "all writes were flushed");
    for n in 0..16 {
        assert_eq!(driver.read(n * 4096, 4096), (block(n), Status::Ok), "{n}");
    }
}

/// It refuses requests before it closes the connection. No I/O fails.
#[test]
fn a_server_that_is_shutting_down_is_waited_for() {
    for number in 0..6 {
        let fake = first(Fault::ShuttingDown(number));
        let disk = connect(&fake);
        let mut driver = Driver::new(&disk, 4);
        for n in 0..3 {
            let data = pattern(n, 4096);
            assert_eq!(driver.write(n * 4096, &data), Status::Ok);
            assert_eq!(driver.plain(Op::Unmap, 1 << 20, 4096), Status::Ok);
            assert_eq!(driver.read(n * 4096, 4096), (data, Status::Ok));
        }
        assert_eq!(fake.connections(), 2);
    }
}

/// Keeps a channel full. Returns how many I/Os have ended; none may fail.
fn keep_busy(driver: &mut Driver, submitted: &mut u64) -> usize {
    while let Some(tag) = driver.free_tag() {
        let op = if submitted.is_multiple_of(2) { Op::Read } else { Op::Write };
        let request = Request::rw(op, *submitted % 64 * 4096, Memory::plain(4096));
        assert!(matches!(driver.submit(tag, request), Ok(None)));
        *submitted += 1;
    }
    let done = driver.visit();
    assert!(done.iter().all(|(_, status)| *status == Status::Ok));
    done.len()
}

/// A server is asked to end while I/O goes on, and is started again.
#[test]
fn a_graceful_restart_of_the_server_fails_no_io() {
    let program = Program::nbdkit_file(&["--filter=delay"], &["rdelay=1ms"]);
    let Some(mut server) = Server::new(program) else { return };
    let disk: Arc<dyn Bdev> = server.connect("");
    let mut driver = Driver::new(&disk, 16);
    let mut submitted = 0;
    for _ in 0..5 {
        let mut ended = 0;
        while ended < 200 {
            ended += keep_busy(&mut driver, &mut submitted);
        }
        server.signal("TERM");
        while !server.has_ended() {
            keep_busy(&mut driver, &mut submitted);
        }
        server.start();
    }
    while driver.visit().is_empty() {}
}

#[test]
fn io_fails_after_the_reconnect_delay_until_the_server_is_back() {
    for delay in [Duration::ZERO, Duration::from_millis(10)] {
        let Some(mut server) = Server::new(Program::nbdkit_file(&[], &[])) else { return };
        let options = NbdOptions { reconnect_delay: Some(delay), ..options(&server.socket(), "") };
        let connected = NbdDisk::connect(options).unwrap();
        let disk: Arc<dyn Bdev> = Arc::clone(&connected) as _;
        let mut driver = Driver::new(&disk, 4);
        assert_eq!(driver.write(0, &[7; 512]), Status::Ok);
        assert_eq!(driver.plain(Op::Flush, 0, 0), Status::Ok);
        server.stop();
        while connected.is_connected() {
            std::thread::yield_now();
        }
        assert_eq!(driver.read(0, 512).1, Status::IoError);
        assert_eq!(driver.write(0, &[8; 512]), Status::IoError);
        server.start();
        while !connected.is_connected() {
            std::thread::yield_now();
        }
        assert_eq!(driver.read(0, 512), (vec![7; 512], Status::Ok));
    }
}

/// A server of another disk is refused, and so is one that stops in the handshake.
#[test]
fn only_the_same_export_is_used_again() {
    let fake = Fake::unix(ALL, |number| match number {
        0 => Fault::CloseAfter(20),
        1 => Fault::OtherSize,
        2 => Fault::Handshake(30),
        _ => Fault::None,
    });
    let disk = connect(&fake);
    let mut driver = Driver::new(&disk, 4);
    assert_eq!(driver.write(0, &[7; 512]), Status::Ok);
    assert_eq!(driver.read(0, 512), (vec![7; 512], Status::Ok));
    assert_eq!(fake.connections(), 4);
}

#[test]
fn errors_of_the_server_end_the_io_only() {
    let parameters = ["error=ENOSPC", "error-pread-rate=100%", "error-zero-rate=100%"];
    let Some(server) = Server::new(Program::nbdkit(&["--filter=error"], &parameters)) else {
        return;
    };
    let disk: Arc<dyn Bdev> = server.connect("");
    let mut channel = BdevChannel::open(&disk, 4).unwrap();
    let mut bytes = [0_u8; 512];
    let segments = [Segment::new(bytes.as_mut_ptr(), 512)];
    let read = Io::rw(Op::Read, Tag(0), 512, 512, &segments);
    // SAFETY: the memory outlives the I/O.
    assert!(matches!(unsafe { channel.submit(read) }, Submit::Queued));
    assert_eq!(wait_for_one(&mut channel), (Tag(0), Status::IoError));
    let failure = channel.failure(Tag(0)).unwrap();
    assert_eq!((failure.errno, failure.offset), (libc::ENOSPC, Some(512)));
    drop(channel);
    let mut driver = Driver::new(&disk, 4);
    assert_eq!(driver.plain(Op::WriteZeroes, 0, 512), Status::IoError);
    assert_eq!(driver.write(0, &[1; 512]), Status::Ok);
}

fn wait_for_one(channel: &mut BdevChannel) -> (Tag, Status) {
    let mut done = [Completion { tag: Tag(9), status: Status::Ok }; 4];
    loop {
        channel.kick();
        if channel.poll(&mut done) > 0 {
            return (done[0].tag, done[0].status);
        }
        std::thread::yield_now();
    }
}

/// The owner's memory is free as soon as an abandoned I/O is reported, whatever the server does.
#[test]
fn abandoned_ios_end_at_once() {
    const LEN: usize = 1 << 20;
    for fault in [Fault::Mute, Fault::Unresponsive] {
        let fake = first(fault);
        let disk = connect(&fake);
        let mut abandoned = BdevChannel::open(&disk, 4).unwrap();
        let mut memory = vec![1_u8; LEN];
        let segments = [Segment::new(memory.as_mut_ptr(), LEN)];
        let mut done = [Completion { tag: Tag(9), status: Status::Ok }; 4];
        for tag in 0..3 {
            let op = if tag == 1 { Op::Read } else { Op::Write };
            let io = Io::rw(op, Tag(tag), 0, LEN as u64, &segments);
            // SAFETY: the memory outlives the I/O.
            assert!(matches!(unsafe { abandoned.submit(io) }, Submit::Queued));
            abandoned.kick();
            assert_eq!(abandoned.poll(&mut done), 0);
        }
        // Part of the first write is on its way to a server that does not read.
        abandoned.abandon();
        let mut ended = 0;
        for _ in 0..100 {
            ended += abandoned.poll(&mut done);
        }
        assert_eq!(ended, 3, "{fault:?}");
        memory.fill(2);
        drop(abandoned);
        assert_eq!(fake.connections(), 1);
    }
}

/// Long writes are on their way when their channel is abandoned. The other channel on the
/// connection does not notice: its writes are not lost, and its flush succeeds.
#[test]
fn an_abandoned_write_does_not_end_the_connection() {
    const LEN: usize = 1 << 20;
    let fake = first(Fault::None);
    let disk = connect(&fake);
    let mut abandoned = BdevChannel::open(&disk, 4).unwrap();
    let mut other = Driver::new(&disk, 4);
    assert_eq!(other.write(LEN as u64, &[7; 512]), Status::Ok);
    // The server waits for this.
    let store = fake.store();
    let mut memory = vec![1_u8; LEN];
    let segments = [Segment::new(memory.as_mut_ptr(), LEN)];
    let mut done = [Completion { tag: Tag(9), status: Status::Ok }; 4];
    for tag in 0..3 {
        let io = Io::rw(Op::Write, Tag(tag), 0, LEN as u64, &segments);
        // SAFETY: the memory outlives the I/O.
        assert!(matches!(unsafe { abandoned.submit(io) }, Submit::Queued));
    }
    abandoned.kick();
    abandoned.abandon();
    let mut ended = 0;
    while ended < 3 {
        ended += abandoned.poll(&mut done);
    }
    memory.fill(2);
    drop(store);
    drop(abandoned);
    assert_eq!(other.plain(Op::Flush, 0, 0), Status::Ok);
    assert_eq!(other.read(LEN as u64, 512), (vec![7; 512], Status::Ok));
    assert_eq!(fake.connections(), 1);
    assert!(!fake.store().contains(&2), "memory that was given back was sent");
}

/// Their number has a limit. Beyond it, the connection ends, and other I/O goes on with the next.
#[test]
fn a_server_that_does_not_reply_keeps_few_abandoned_ios() {
    const DEPTH: u16 = 1000;
    let fake = first(Fault::Mute);
    let disk = connect(&fake);
    let mut other = Driver::new(&disk, 4);
    let tag = other.free_tag().unwrap();
    let read = Request::rw(Op::Read, 0, Memory::plain(4096));
    assert!(matches!(other.submit(tag, read), Ok(None)));
    let mut done = [Completion { tag: Tag(0), status: Status::Ok }; 16];
    for round in 1..=5 {
        assert_eq!(fake.connections(), 1, "{round}");
        let mut abandoned = BdevChannel::open(&disk, DEPTH).unwrap();
        for tag in 0..DEPTH {
            let flush = Io::plain(Op::Flush, Tag(tag), 0, 0);
            // SAFETY: a flush has no memory.
            assert!(matches!(unsafe { abandoned.submit(flush) }, Submit::Queued));
        }
        while fake.requests() < 1 + round * usize::from(DEPTH) {
            abandoned.kick();
            assert_eq!(abandoned.poll(&mut done), 0);
        }
        abandoned.abandon();
        let mut ended = 0;
        while ended < DEPTH.into() {
            ended += abandoned.poll(&mut done);
        }
    }
    while other.visit().is_empty() {}
    assert_eq!(fake.connections(), 2);
}

/// The server answers an abandoned read after its memory has another use.
#[test]
fn a_late_reply_to_an_abandoned_read_changes_no_memory() {
    let fake = first(Fault::None);
    let disk = connect(&fake);
    let mut abandoned = BdevChannel::open(&disk, 4).unwrap();
    let mut memory = vec![1_u8; 4096];
    let segments = [Segment::new(memory.as_mut_ptr(), 4096)];
    let mut done = [Completion { tag: Tag(9), status: Status::Ok }; 4];
    // The server waits for this.
    let store = fake.store();
    let io = Io::rw(Op::Read, Tag(0), 0, 4096, &segments);
    // SAFETY: the memory outlives the I/O.
    assert!(matches!(unsafe { abandoned.submit(io) }, Submit::Queued));
    abandoned.kick();
    abandoned.abandon();
    assert_eq!(abandoned.poll(&mut done), 1);
    memory.fill(2);
    drop(store);
    drop(abandoned);
    let mut other = Driver::new(&disk, 4);
    assert_eq!(other.read(0, 512), (vec![0; 512], Status::Ok));
    assert_eq!(fake.connections(), 1);
    assert!(memory.iter().all(|byte| *byte == 2));
}

/// Its I/O fails, and its connections are closed.
#[test]
fn a_disk_that_is_dropped_disconnects() {
    let Some(server) = Server::new(Program::nbdkit(&["--filter=exitlast"], &[])) else { return };
    let disk: Arc<dyn Bdev> = server.connect("");
    assert_eq!(Driver::new(&disk, 4).write(0, &[1; 512]), Status::Ok);
    drop(disk);
    server.wait_for_its_end();
}
