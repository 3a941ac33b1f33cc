//! Owners that sleep as [`Channel::wait`] allows, on connections that they share: none sleeps for
//! ever while work is left.
#![expect(clippy::unwrap_used, reason = "a test ends where something fails")]
#![expect(unsafe_code, reason = "submits I/Os")]

mod fake;

use std::sync::Arc;

use bdev::{Bdev, BdevChannel, Channel, Completion, Io, Op, Segment, Status, Submit, Tag, Wait};
use fake::{Fake, Fault};
use nbd::NbdDisk;
use nbd::protocol::transmission::CAN_MULTI_CONN;
use rustix::buffer::spare_capacity;
use rustix::event::{Timespec, epoll};

/// After this time, the test takes an owner for hung.
const LIMIT: Timespec = Timespec { tv_sec: 60, tv_nsec: 0 };

/// A channel whose owner sleeps.
struct Sleeper {
    channel: BdevChannel,
    epoll: rustix::fd::OwnedFd,
}

impl Sleeper {
    fn new(disk: &Arc<dyn Bdev>) -> Self {
        let channel = BdevChannel::open(disk, 8).unwrap();
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
        for fd in channel.wake_fds() {
            let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
            epoll::add(&epoll, fd, epoll::EventData::new_u64(0), flags).unwrap();
        }
        Self { channel, epoll }
    }

    /// Does one I/O, and sleeps as long as it is allowed to.
    fn run(&mut self, io: Io) -> Status {
        // SAFETY: the caller keeps the memory until this returns.
        match unsafe { self.channel.submit(io) } {
            Submit::Queued => {}
            other => panic!("{other:?}"),
        }
        let mut done = [Completion { tag: Tag(9), status: Status::IoError }; 4];
        loop {
            self.channel.kick();
            if self.channel.poll(&mut done) > 0 {
                return done[0].status;
            }
            if self.channel.wait() == Wait::Event {
                let mut events = Vec::with_capacity(4);
                match epoll::wait(&self.epoll, spare_capacity(&mut events), Some(&LIMIT)) {
                    // The kernel has finished an operation of the io_uring on this thread.
                    Err(rustix::io::Errno::INTR) => {}
                    result => assert!(result.unwrap() > 0, "nothing has woken the owner"),
                }
            }
        }
    }
}

/// More bytes than a staging buffer has, of several channels on one or two connections. From time
/// to time, a connection is cut.
#[test]
fn long_ios_of_several_owners_end() {
    const LEN: usize = 1 << 20;
    for (flags, fault) in [
        (0, Fault::None),
        (CAN_MULTI_CONN, Fault::None),
        (0, Fault::CloseAfter(5 << 20)),
        (CAN_MULTI_CONN, Fault::WrongMagic(15)),
    ] {
        let fake = Fake::unix(flags, move |_| fault);
        let mut options = fake.options();
        options.connections = 2;
        let disk: Arc<dyn Bdev> = NbdDisk::connect(options).unwrap();
        std::thread::scope(|scope| {
            for n in 0..3_u8 {
                let mut sleeper = Sleeper::new(&disk);
                scope.spawn(move || {
                    let mut memory = vec![n; LEN];
                    for round in 0..40 {
                        let segments = [Segment::new(memory.as_mut_ptr(), LEN)];
                        let op = if round % 2 == 0 { Op::Write } else { Op::Read };
                        let offset = u64::from(n) * LEN as u64;
                        let io = Io::rw(op, Tag(0), offset, LEN as u64, &segments);
                        assert_eq!(sleeper.run(io), Status::Ok);
                        assert!(memory.iter().all(|byte| *byte == n));
                    }
                });
            }
        });
    }
}
