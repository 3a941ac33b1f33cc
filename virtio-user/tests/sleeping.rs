//! Owners that sleep as [`Channel::wait`] allows, on disks that `qemu-storage-daemon` serves: none
//! sleeps for ever while work is left.
#![expect(clippy::unwrap_used, reason = "a test ends where something fails")]
#![expect(unsafe_code, reason = "submits I/Os")]

mod server;

use std::sync::Arc;

use bdev::{Bdev, BdevChannel, Channel, Completion, Io, Op, Segment, Status, Submit, Tag, Wait};
use rustix::buffer::spare_capacity;
use rustix::event::{Timespec, epoll};
use server::Server;

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
                epoll::wait(&self.epoll, spare_capacity(&mut events), Some(&LIMIT)).unwrap();
                assert!(!events.is_empty(), "nothing has woken the owner");
            }
        }
    }
}

/// More pieces than one call serves, of several channels on one queue.
#[test]
fn long_ios_of_several_owners_end() {
    const LEN: usize = 2 << 20;
    let Some(server) = Server::new("raw", ",writable=on") else { return };
    let disk: Arc<dyn Bdev> = server.connect(1, 256);
    std::thread::scope(|scope| {
        for n in 0..3_u8 {
            let mut sleeper = Sleeper::new(&disk);
            scope.spawn(move || {
                let mut memory = vec![n; LEN];
                for round in 0..100 {
                    let segments = [Segment::new(memory.as_mut_ptr(), LEN)];
                    let op = if round % 2 == 0 { Op::Write } else { Op::Read };
                    let io = Io::rw(op, Tag(0), 0, LEN as u64, &segments);
                    assert_eq!(sleeper.run(io), Status::Ok);
                }
            });
        }
    });
}
